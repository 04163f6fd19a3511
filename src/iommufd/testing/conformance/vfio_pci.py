"""devices 11: what vfio-pci says of a device and takes from its owner, odd arguments included.

The device is QEMU's edu: one BAR, INTx and one MSI, no MSI-X, no reset of its own; two more are below a bridge. What a
BAR reads, and where it is on the bus, is the device's own affair and not asked.
"""

from __future__ import annotations

import mmap
import os
import struct
from errno import EBADF, EBUSY, EFAULT, EINVAL, EIO, ENODEV, ENOSPC, ENOTTY, ERANGE

from iommufd.testing.conformance import check
from iommufd.testing.conformance.vfio_devices import ALONE, CONFIG, EDGE, FIRST, GET_INFO, SECOND, bound, cdev, wants
from iommufd.testing.conformance.vfio_groups import device_fd, joined
from iommufd.testing.subject import PAGE, Answer, Subject

REGION_INFO, IRQ_INFO, SET_IRQS, RESET = 0x3B6C, 0x3B6D, 0x3B6E, 0x3B6F
HOT_RESET_INFO, HOT_RESET, FEATURE = 0x3B70, 0x3B71, 0x3B75
NONE, BOOL, EVENTFD, MASK, UNMASK, TRIGGER = 1, 2, 4, 8, 16, 32
INTX, MSI, MSIX, ERR, REQ = range(5)
GET, SET, PROBE = 1 << 16, 1 << 17, 1 << 18
ENTRY, ENTRY_WITH_WAKEUP, EXIT = 3, 4, 5
BEYOND = 9999  # no descriptor has this number


def words(*values: int) -> bytes:
    return b"".join((value & 0xFFFF_FFFF).to_bytes(4, "little") for value in values)


def irqs(s: Subject, fd: int, flags: int, index: int, start: int, count: int, data: bytes = b"") -> int:
    """The errno of SET_IRQS."""
    return s.ioctl(fd, SET_IRQS, words(20 + len(data), flags, index, start, count) + data).errno


def feature(s: Subject, fd: int, flags: int, payload: bytes = b"", argsz: int | None = None) -> int:
    """The errno of FEATURE."""
    size = 8 + len(payload) if argsz is None else argsz
    return s.ioctl(fd, FEATURE, words(size, flags) + payload).errno


def at_the_edge(s: Subject, fd: int, cmd: int, data: bytes, mapped: int) -> Answer:
    """The ioctl with ``data`` of which only the first ``mapped`` bytes are there."""
    s.mmap(EDGE, PAGE)
    s.munmap(EDGE + PAGE, PAGE)
    s.poke(EDGE + PAGE - mapped, data[:mapped])
    answer = s.ioctl(fd, cmd, at=EDGE + PAGE - mapped, poke=False)
    s.peek(EDGE + PAGE - mapped, mapped)
    return answer


def read_only(s: Subject, fd: int, cmd: int, data: bytes) -> Answer:
    """The ioctl with ``data`` where nothing can be written."""
    s.mmap(EDGE, PAGE)
    s.poke(EDGE, data)
    s.mprotect(EDGE, PAGE, mmap.PROT_READ)
    return s.ioctl(fd, cmd, at=EDGE, poke=False)


@check("devices 11 info", needs="vtd")
def sizes_of_information(s: Subject) -> None:
    """Each of the three looks at its own minimum, and writes no more than the caller has room for."""
    fd, _ = bound(s, ALONE, s.open())
    for cmd, minimum, most in ((GET_INFO, 16, 24), (REGION_INFO, 32, 32), (IRQ_INFO, 16, 16)):
        for argsz in (0, 1, minimum - 1):
            wants(s, EINVAL, s.ioctl(fd, cmd, words(argsz).ljust(48, b"\x05")).errno, f"{cmd:#x} of {argsz}")
        for argsz in (minimum, minimum + 1, minimum + 4, minimum + 7, most, most + 1, PAGE, 2**32 - 1):
            data = words(argsz, 2**32 - 1, INTX if cmd == IRQ_INFO else 7).ljust(48, b"\x05")
            wants(s, 0, s.ioctl(fd, cmd, data).errno, f"{cmd:#x} of {argsz}")
        data = words(minimum, 0, 1).ljust(minimum, b"\0")
        wants(s, EFAULT, read_only(s, fd, cmd, data).errno, "read-only memory")
        wants(s, 0, at_the_edge(s, fd, cmd, data, minimum).errno, "just enough memory")
        for mapped in (minimum - 1, 8, 4):
            wants(s, EFAULT, at_the_edge(s, fd, cmd, data, mapped).errno, f"{mapped} bytes")
        wants(s, EFAULT, at_the_edge(s, fd, cmd, words(0).ljust(minimum, b"\0"), 4).errno, "before argsz is looked at")


@check("devices 11 info", needs="vtd")
def numbers_of_regions_and_interrupts(s: Subject) -> None:
    fd, _ = bound(s, ALONE, s.open())
    for index, errno in (*((n, 0) for n in range(1, 8)), *((n, EINVAL) for n in (8, 9, 255, 2**31, 2**32 - 1))):
        data = words(32, 2**32 - 1, index, 7) + b"\x05" * 16
        wants(s, errno, s.ioctl(fd, REGION_INFO, data).errno, f"region {index}")
    for index, errno in (*((n, 0) for n in range(5)), *((n, EINVAL) for n in (5, 6, 2**31, 2**32 - 1))):
        wants(s, errno, s.ioctl(fd, IRQ_INFO, words(16, 7, index, 7)).errno, f"interrupt index {index}")


@check("devices 11 interrupts", needs="vtd")
def words_of_set_irqs(s: Subject) -> None:
    """Every pair of type and action, for every index; what is set is taken back."""
    fd, _ = bound(s, ALONE, s.open())
    event = words(s.eventfd())
    for index in range(6):
        for flags in range(64):
            if irqs(s, fd, flags, index, 0, 1, event) == 0:
                irqs(s, fd, EVENTFD | TRIGGER, index, 0, 1, words(-1))
                irqs(s, fd, NONE | TRIGGER, index, 0, 0)
    for bit in range(6, 32):
        wants(s, EINVAL, irqs(s, fd, 1 << bit | NONE | TRIGGER, INTX, 0, 0), f"flag {1 << bit:#x}")
    for argsz in (0, 4, 19, 20, 23):
        data = words(argsz, EVENTFD | TRIGGER, ERR, 0, 1) + event
        wants(s, EINVAL, s.ioctl(fd, SET_IRQS, data).errno, f"argsz {argsz}")
    for start, count in ((1, 0), (1, 1), (0, 2), (1, 2**32 - 1), (2**32 - 1, 0), (2**32 - 1, 1), (2**31, 2**31)):
        for kind in (NONE, EVENTFD):
            for index in (INTX, MSI, REQ):
                wants(s, EINVAL, irqs(s, fd, kind | TRIGGER, index, start, count, event), f"{count} from {start} on")
    head = words(24, EVENTFD | TRIGGER, ERR, 0, 1)
    for mapped in (20, 23):
        wants(s, EFAULT, at_the_edge(s, fd, SET_IRQS, head + words(-1), mapped).errno, "data that is not there")
    wants(s, 0, at_the_edge(s, fd, SET_IRQS, head + words(-1), 24).errno, "data that is")


@check("devices 11 interrupts", needs="vtd")
def what_is_no_eventfd(s: Subject) -> None:
    iommufd = s.open()
    fd, _ = bound(s, ALONE, iommufd)
    for index in (INTX, MSI, ERR, REQ):
        for number, errno in ((BEYOND, EBADF), (s.memfd(PAGE), EINVAL), (iommufd, EINVAL), (fd, EINVAL)):
            wants(s, errno, irqs(s, fd, EVENTFD | TRIGGER, index, 0, 1, words(number)), f"index {index}")
            wants(s, EINVAL, irqs(s, fd, NONE | TRIGGER, index, 0, 1), "nothing was set")
    for index in (INTX, MSI):
        for number in (-2, -(2**31)):
            wants(s, 0, irqs(s, fd, EVENTFD | TRIGGER, index, 0, 1, words(number)), "any negative number is none")
            wants(s, 0, irqs(s, fd, NONE | TRIGGER, index, 0, 0), "it was configured")
    for index in (ERR, REQ):
        wants(s, 0, irqs(s, fd, EVENTFD | TRIGGER, index, 0, 1, words(-1)), "none")
        wants(s, EINVAL, irqs(s, fd, EVENTFD | TRIGGER, index, 0, 1, words(-2)), "only -1 is none")


@check("devices 11 interrupts", needs="vtd")
def errors_and_requests(s: Subject) -> None:
    """One signal each; to trigger it by a flag is right even when there is none."""
    fd, _ = bound(s, ALONE, s.open())
    first, second = s.eventfd(), s.eventfd()
    for index in (ERR, REQ):
        for byte in (0, 1):
            wants(s, 0, irqs(s, fd, BOOL | TRIGGER, index, 0, 1, bytes([byte])), "nobody hears it")
        for count in (0, 1):
            wants(s, EINVAL, irqs(s, fd, NONE | TRIGGER, index, 0, count), "there is none")
        wants(s, 0, irqs(s, fd, EVENTFD | TRIGGER, index, 0, 1, words(first)), "set")
        for byte, expected in ((0, 0), (1, 1), (2, 1), (255, 1)):
            wants(s, 0, irqs(s, fd, BOOL | TRIGGER, index, 0, 1, bytes([byte])), "a flag")
            s.expect(s.signals(first) == expected, f"the flag {byte}")
        wants(s, 0, irqs(s, fd, EVENTFD | TRIGGER, index, 0, 1, words(second)), "another one")
        wants(s, 0, irqs(s, fd, NONE | TRIGGER, index, 0, 1), "triggered")
        s.expect((s.signals(first), s.signals(second)) == (0, 1), "the second has it")
        for action in (MASK, UNMASK):
            wants(s, ENOTTY, irqs(s, fd, NONE | action, index, 0, 1), "only triggered")
        wants(s, 0, irqs(s, fd, NONE | TRIGGER, index, 0, 0), "off")
        wants(s, EINVAL, irqs(s, fd, NONE | TRIGGER, index, 0, 1), "it is off")


@check("devices 11 interrupts", needs="vtd")
def message_signalled(s: Subject) -> None:
    fd, _ = bound(s, ALONE, s.open())
    event = s.eventfd()
    wants(s, ERANGE, irqs(s, fd, EVENTFD | TRIGGER, MSI, 0, 0), "configured for no vector")
    wants(s, EINVAL, irqs(s, fd, EVENTFD | TRIGGER, MSIX, 0, 0), "there is no MSI-X")
    for kind in (NONE, BOOL):
        wants(s, EINVAL, irqs(s, fd, kind | TRIGGER, MSI, 0, 1, b"\1"), "not configured")
    wants(s, 0, irqs(s, fd, EVENTFD | TRIGGER, MSI, 0, 1, words(event)), "configured")
    wants(s, 0, irqs(s, fd, EVENTFD | TRIGGER, MSI, 0, 0), "no vector is changed")
    wants(s, 0, irqs(s, fd, NONE | TRIGGER, MSI, 0, 1), "triggered")
    s.expect(s.signals(event) == 1, "it arrives")
    wants(s, EINVAL, irqs(s, fd, EVENTFD | TRIGGER, INTX, 0, 1, words(event)), "one of them at a time")
    wants(s, 0, irqs(s, fd, BOOL | TRIGGER, MSI, 0, 0), "nothing is off by this")
    for action in (MASK, UNMASK):
        wants(s, ENOTTY, irqs(s, fd, NONE | action, MSI, 0, 1), "not masked")
    wants(s, EBADF, irqs(s, fd, EVENTFD | TRIGGER, MSI, 0, 1, words(BEYOND)), "a bad one")
    wants(s, 0, irqs(s, fd, NONE | TRIGGER, MSI, 0, 1), "still configured")
    s.expect(s.signals(event) == 0, "but the signal went")
    wants(s, 0, irqs(s, fd, NONE | TRIGGER, MSI, 0, 0), "off")
    wants(s, EINVAL, irqs(s, fd, NONE | TRIGGER, MSI, 0, 0), "it is off")


@check("devices 11 interrupts", needs="vtd")
def the_interrupt_line(s: Subject) -> None:
    fd, _ = bound(s, ALONE, s.open())
    event, other = s.eventfd(), s.eventfd()
    for flags in (NONE | MASK, NONE | UNMASK, NONE | TRIGGER):
        wants(s, EINVAL, irqs(s, fd, flags, INTX, 0, 1), "not configured")
    wants(s, EINVAL, irqs(s, fd, EVENTFD | TRIGGER, INTX, 0, 0), "configured for no line")
    wants(s, 0, irqs(s, fd, EVENTFD | TRIGGER, INTX, 0, 1, words(event)), "configured")
    for flags in (NONE | MASK, NONE | TRIGGER, NONE | UNMASK, BOOL | MASK, BOOL | TRIGGER, BOOL | UNMASK):
        wants(s, 0, irqs(s, fd, flags, INTX, 0, 1, b"\1"), f"flags {flags:#x}")
    s.expect(s.signals(event) == 2, "masked or not")
    wants(s, ENOTTY, irqs(s, fd, EVENTFD | MASK, INTX, 0, 1, words(other)), "not masked by an eventfd")
    wants(s, 0, irqs(s, fd, EVENTFD | UNMASK, INTX, 0, 1, words(other)), "unmasked by an eventfd")
    for number, errno in ((other, EBUSY), (event, EBUSY), (BEYOND, EBADF), (s.memfd(PAGE), EINVAL), (-2, 0), (-1, 0)):
        wants(s, errno, irqs(s, fd, EVENTFD | UNMASK, INTX, 0, 1, words(number)), "unmasked by another eventfd")
    wants(s, 0, irqs(s, fd, EVENTFD | UNMASK, INTX, 0, 1, words(other)), "the first was given up")
    wants(s, EINVAL, irqs(s, fd, EVENTFD | TRIGGER, MSI, 0, 1, words(other)), "one of them at a time")
    wants(s, EBADF, irqs(s, fd, EVENTFD | TRIGGER, INTX, 0, 1, words(BEYOND)), "a bad one")
    wants(s, 0, irqs(s, fd, NONE | TRIGGER, INTX, 0, 1), "triggered")
    s.expect(s.signals(event) == 1, "the old one stays")
    wants(s, 0, irqs(s, fd, NONE | TRIGGER, INTX, 0, 0), "off")
    wants(s, EINVAL, irqs(s, fd, NONE | TRIGGER, INTX, 0, 0), "it is off")


@check("devices 11 interrupts", needs="vtd")
def a_line_that_is_switched_off(s: Subject) -> None:
    """Interrupt Disable of the command register: nothing is heard, not even what the owner triggers."""
    fd, _ = bound(s, ALONE, s.open())
    event = s.eventfd()
    for before in (0, 0x400):
        s.write(fd, words(before)[:2], CONFIG + 4)
        wants(s, 0, irqs(s, fd, EVENTFD | TRIGGER, INTX, 0, 1, words(event)), "configured")
        for command in (before, 0x400, 0, 0x400, 0x406):
            s.write(fd, words(command)[:2], CONFIG + 4)
            wants(s, 0, irqs(s, fd, NONE | TRIGGER, INTX, 0, 1), "triggered")
            s.expect(s.signals(event) == (not command), f"with {command:#x} in the command register")
        for flags in (NONE | UNMASK, NONE | MASK, NONE | UNMASK, BOOL | TRIGGER):
            wants(s, 0, irqs(s, fd, flags, INTX, 0, 1, b"\1"), "masked and unmasked")
            wants(s, 0, irqs(s, fd, NONE | TRIGGER, INTX, 0, 1), "triggered")
            s.expect(s.signals(event) == 0, "still off")
        s.write(fd, words(6)[:2], CONFIG + 4)
        wants(s, 0, irqs(s, fd, NONE | TRIGGER, INTX, 0, 1), "triggered")
        s.expect(s.signals(event) == 1, "on")
        wants(s, 0, irqs(s, fd, NONE | TRIGGER, INTX, 0, 0), "off")


@check("devices 11 feature", needs="vtd")
def features(s: Subject) -> None:
    """Every number and every operation, with room for a payload and without."""
    fd, _ = bound(s, ALONE, s.open())
    for number in (*range(14), 255, 0xFFFF):
        for operation in (0, GET, SET, GET | SET, PROBE, PROBE | GET, PROBE | SET, PROBE | GET | SET):
            for payload in (b"", words(BEYOND, 0)):
                feature(s, fd, operation | number, payload)
        feature(s, fd, SET | EXIT)
    for bit in range(19, 32):
        wants(s, EINVAL, feature(s, fd, 1 << bit | PROBE | SET | ENTRY), f"flag {1 << bit:#x}")
    for argsz in (0, 7):
        wants(s, EINVAL, feature(s, fd, PROBE | SET | ENTRY, argsz=argsz), f"argsz {argsz}")
    wants(s, 0, read_only(s, fd, FEATURE, words(8, PROBE | SET | ENTRY)).errno, "nothing is written")
    wants(s, EFAULT, at_the_edge(s, fd, FEATURE, words(8, PROBE | SET | ENTRY), 7).errno, "seven bytes")


@check("devices 11 feature", needs="vtd")
def low_power(s: Subject) -> None:
    fd, _ = bound(s, ALONE, s.open())
    event = s.eventfd()
    wants(s, 0, feature(s, fd, SET | ENTRY), "in")
    for flags, payload in ((SET | ENTRY, b""), (SET | ENTRY_WITH_WAKEUP, words(event, 0))):
        wants(s, EINVAL, feature(s, fd, flags, payload), "it is in")
    for _ in range(2):
        wants(s, 0, feature(s, fd, SET | EXIT), "out")
    entry = SET | ENTRY_WITH_WAKEUP
    for number, errno in ((BEYOND, EBADF), (-1, EINVAL), (s.memfd(PAGE), EINVAL), (fd, EINVAL)):
        wants(s, errno, feature(s, fd, entry, words(number, 0)), "no eventfd")
    wants(s, EINVAL, feature(s, fd, entry, words(event, 0), argsz=15), "half of it")
    wants(s, 0, feature(s, fd, entry, words(event, 0)), "in")
    wants(s, 0, feature(s, fd, SET | EXIT), "out")


@check("devices 11.8", needs="vtd")
def reset_of_a_bus(s: Subject) -> None:
    iommufd = s.open()
    alone, _ = bound(s, ALONE, iommufd)
    first, _ = bound(s, FIRST, iommufd)
    wants(s, EINVAL, s.ioctl(alone, RESET, at=0, poke=False).errno, "it has no reset of its own")
    wants(s, ENODEV, s.ioctl(alone, HOT_RESET_INFO, words(44, 0, 0).ljust(44, b"\0")).errno, "a root bus")
    wants(s, ENODEV, s.ioctl(alone, HOT_RESET, words(12, 0, 0)).errno, "a root bus")
    for argsz, errno in ((0, EINVAL), (11, EINVAL), (12, ENOSPC), (20, ENOSPC), (27, ENOSPC), (28, 0), (100, 0)):
        data = words(argsz, 2**32 - 1, 2**32 - 1).ljust(44, b"\x05")
        wants(s, errno, s.ioctl(first, HOT_RESET_INFO, data).errno, f"argsz {argsz}")
    data = words(28, 0, 0).ljust(28, b"\0")
    for mapped, errno in ((28, 0), (27, EFAULT), (20, EFAULT), (12, EFAULT), (11, EFAULT)):
        wants(s, errno, at_the_edge(s, first, HOT_RESET_INFO, data, mapped).errno, f"{mapped} bytes")
    wants(s, EFAULT, read_only(s, first, HOT_RESET_INFO, data).errno, "read-only memory")
    for argsz, flags, count in ((11, 0, 0), (12, 1, 0), (12, 1 << 31, 0), (16, 0, 1), (16, 0, 2**32 - 1)):
        asked = words(argsz, flags, count, first)
        wants(s, EINVAL, s.ioctl(first, HOT_RESET, asked).errno, f"argsz {argsz}, flags {flags:#x}, {count} groups")


@check("devices 11.8", needs="vtd")
def reset_of_a_bus_by_groups(s: Subject) -> None:
    group, iommufd = joined(s, FIRST)
    fd = device_fd(s, group, FIRST)
    device_fd(s, group, SECOND)
    other = s.memfd(PAGE)
    for count, given, errno in (
        (0, (group,), EINVAL),
        (1, (BEYOND,), EBADF),
        (1, (-1,), EBADF),
        (1, (other,), EINVAL),
        (1, (iommufd,), EINVAL),
        (1, (fd,), EINVAL),
        (2, (group, BEYOND), EBADF),
        (3, (group, group), EINVAL),
        (2**32 - 1, (group,), EINVAL),
    ):
        asked = words(12 + 4 * len(given), 0, count, *given)
        wants(s, errno, s.ioctl(fd, HOT_RESET, asked).errno, f"{count} of {len(given)} groups")
    s.poke(EDGE + PAGE - 12, words(16, 0, 1))
    s.munmap(EDGE + PAGE, PAGE)
    wants(s, EFAULT, s.ioctl(fd, HOT_RESET, at=EDGE + PAGE - 12, poke=False).errno, "no group there")


@check("devices 11 regions", needs="vtd")
def configuration_space(s: Subject) -> None:
    fd, _ = bound(s, ALONE, s.open())
    for offset in range(12):
        for count in range(5):
            if offset + count <= 12:
                s.expect(s.read(fd, count, CONFIG + offset).result == count, f"{count} bytes at {offset}")
    for offset, count, errno in (
        (255, 2, EFAULT),
        (256, 1, EFAULT),
        (256, 0, 0),
        (PAGE, 1, EFAULT),
        (2**39, 8, EFAULT),
    ):
        wants(s, errno, s.read(fd, count, CONFIG + offset).errno, f"{count} bytes at {offset}")
        wants(s, errno, s.write(fd, bytes(count), CONFIG + offset).errno, f"{count} bytes to {offset}")
    for offset, data in (
        *((at, b"\xff" * 4) for at in (0, 8, 12, 0x14, 0x28, 0x2C, 0x34, 0x38, 0x3C)),
        (4, b"\0\0"),
        (4, b"\xff\xff"),
        (6, b"\xff\xff"),
        (0x10, b"\xff" * 4),
        (0x10, b"\0" * 4),
        (0x10, b"\x34\x12"),
        (0x12, b"\x34\x12"),
        (0x11, b"\xff"),
        (0x30, b"\xff" * 4),
        (0x0B, b"\xff" * 3),
    ):
        s.expect(s.write(fd, data, CONFIG + offset).result == len(data), f"a write to {offset:#x}")
        s.read(fd, 4, CONFIG + (offset & ~3))


@check("devices 11 regions", needs="vtd")
def base_addresses(s: Subject) -> None:
    fd, _ = bound(s, ALONE, s.open())
    size = 1 << 20
    for index in (*range(1, 7), 8, 9, 255):
        wants(s, EINVAL, s.read(fd, 4, index << 40).errno, f"region {index}")
        wants(s, EINVAL, s.write(fd, bytes(4), index << 40).errno, f"region {index}")
    for index in (1, 8):
        wants(s, 0, s.read(fd, 0, index << 40).errno, f"nothing of region {index}")
    for offset, count, moved in ((size - 1, 4, 1), (size - 4, 8, 4), (size - 3, 3, 3)):
        s.expect(s.write(fd, bytes(count), offset).result == moved, f"{count} bytes to {offset:#x}")
    for offset in (size, size + 4, 2 * size):
        wants(s, EINVAL, s.write(fd, bytes(4), offset).errno, f"{offset:#x}")
        wants(s, EINVAL, s.read(fd, 4, offset).errno, f"{offset:#x}")
    s.write(fd, b"\0\0", CONFIG + 4)
    wants(s, EIO, s.write(fd, bytes(4), 0).errno, "memory is disabled")
    wants(s, EIO, s.read(fd, 4, 0).errno, "memory is disabled")


@check("devices 11 open", needs="vtd")
def how_it_is_opened(s: Subject) -> None:
    """The VFS asks the mode before it asks the device, and for O_DIRECT after."""
    path = f"/dev/vfio/devices/{ALONE}"
    s.open_fails(EINVAL, path, os.O_RDWR | os.O_DIRECT)
    s.open_fails(EINVAL, "/dev/iommu", os.O_RDWR | os.O_DIRECT)
    iommufd = s.open()
    for mode in (os.O_RDONLY, os.O_WRONLY):
        fd = s.open(path, mode)
        answer = s.ioctl(fd, 0x3B76, struct.pack("<IIiI", 16, 0, iommufd, 0))
        wants(s, 0, answer.errno, "BIND_IOMMUFD asks for no mode")
        wants(s, EBADF if mode == os.O_WRONLY else 0, s.read(fd, 2, CONFIG).errno, "read")
        wants(s, EBADF if mode == os.O_RDONLY else 0, s.write(fd, b"", CONFIG).errno, "write")
        for flags in (mmap.MAP_SHARED, mmap.MAP_PRIVATE):
            s.expect(s.mmap_device(fd, PAGE, mmap.PROT_WRITE, flags, CONFIG) is None, "configuration space")
        s.close(fd)
    fd = cdev(s, ALONE)
    s.expect(s.mmap_device(fd, PAGE, mmap.PROT_READ, mmap.MAP_SHARED, 0) is None, "it is not bound")
