"""devices 1-3 and 11: real device files, two of them in one IOMMU group, behind an IOMMU with an interrupt window.

What a vendor's IOMMU says of itself (GET_HW_INFO, nested page tables) is not asked here.
"""

from __future__ import annotations

import struct
from errno import E2BIG, EADDRINUSE, EBADF, EBADFD, EBUSY, EFAULT, EINVAL, ENOENT, ENOSPC, EPERM

from iommufd.errors import errno_name
from iommufd.testing.conformance import check
from iommufd.testing.conformance.common import allow, free_ranges, ioas_alloc, map_fixed, open_ioas, unmap
from iommufd.testing.conformance.devices import device
from iommufd.testing.subject import PAGE, SCRATCH, Subject
from iommufd.uapi import iommufd as u
from iommufd.uapi import iommufd_test as t

BIND, ATTACH, DETACH, GET_INFO = 0x3B76, 0x3B77, 0x3B78, 0x3B6B
ALONE, FIRST, SECOND = "vfio0", "vfio1", "vfio2"
CONFIG = 7 << 40
MSI = 0xFEE00000
EDGE = SCRATCH + 12 * PAGE  # a page that is made read-only, or whose successor is missing


def cdev(s: Subject, name: str) -> int:
    return s.open(f"/dev/vfio/devices/{name}")


def wants(s: Subject, errno: int, got: int, what: str) -> None:
    s.expect(got == errno, f"{what}: {errno_name(got)}, expected {errno_name(errno)}")


def bind(s: Subject, fd: int, iommufd: int, errno: int = 0, *, argsz: int = 16, flags: int = 0) -> int:
    """The DEVICE id."""
    answer = s.ioctl(fd, BIND, struct.pack("<IIiIQ", argsz, flags, iommufd, 0, 0)[: max(argsz, 16)])
    wants(s, errno, answer.errno, "BIND_IOMMUFD")
    return int.from_bytes(answer.out[12:16], "little")


def attach(s: Subject, fd: int, pt: int, errno: int = 0, *, pasid: int | None = None) -> int:
    """The HWPT id."""
    data = struct.pack("<III", 12, 0, pt) if pasid is None else struct.pack("<IIII", 16, 1, pt, pasid)
    answer = s.ioctl(fd, ATTACH, data)
    wants(s, errno, answer.errno, f"ATTACH_IOMMUFD_PT to {pt}")
    return int.from_bytes(answer.out[8:12], "little")


def detach(s: Subject, fd: int, *, pasid: int | None = None) -> None:
    data = struct.pack("<II", 8, 0) if pasid is None else struct.pack("<III", 12, 1, pasid)
    wants(s, 0, s.ioctl(fd, DETACH, data).errno, "DETACH_IOMMUFD_PT")


def bound(s: Subject, name: str, iommufd: int) -> tuple[int, int]:
    """(device file, DEVICE id)."""
    fd = cdev(s, name)
    return fd, bind(s, fd, iommufd)


def hwpt(s: Subject, iommufd: int, dev: int, pt: int) -> int:
    return s.do(iommufd, u.iommu_hwpt_alloc(dev_id=dev, pt_id=pt)).out_hwpt_id


def window_is(s: Subject, iommufd: int, ioas: int, reserved: bool) -> None:
    """Whether the interrupt window is reserved, found by mapping over it (apertures differ between IOMMUs)."""
    asked = u.iommu_ioas_map(flags=7, ioas_id=ioas, user_va=s.page(0), length=PAGE, iova=MSI)
    if reserved:
        s.refuses(EINVAL, iommufd, asked)
    else:
        s.do(iommufd, asked)
        unmap(s, iommufd, ioas, MSI, PAGE)


@check("devices 11.1", needs="vtd")
def nothing_but_bind_before_bind(s: Subject) -> None:
    fd = cdev(s, ALONE)
    for cmd in (*(c for c in range(0x3B64, 0x3B7B) if c != BIND), 0x3B80, 0x1234):
        wants(s, EINVAL, s.ioctl(fd, cmd, bytes(64)).errno, f"{cmd:#x}")
    wants(s, EINVAL, s.read(fd, 4, CONFIG).errno, "a read")


@check(
    "devices 11.2 row 1",
    "devices 11.2 row 2",
    "devices 11.2 row 3",
    "devices 11.2 row 4",
    "devices 11.2 row 9",
    needs="vtd",
)
def bind_arguments(s: Subject) -> None:
    iommufd, fd = s.open(), cdev(s, ALONE)
    wants(s, EFAULT, s.ioctl(fd, BIND, at=16, poke=False).errno, "a bad address")
    for argsz in (0, 11, 12, 15):
        bind(s, fd, iommufd, EINVAL, argsz=argsz)
    answer = s.ioctl(fd, BIND, struct.pack("<IIiIQQ", 32, 0, iommufd, 0, 0, 1 << 56))
    wants(s, E2BIG, answer.errno, "something behind the struct")
    for flags, number in ((2, iommufd), (3, iommufd), (1 << 31, iommufd), (0, -1), (0, -(2**31))):
        bind(s, fd, number, EINVAL, argsz=24, flags=flags)
    bind(s, fd, 9999, EBADF)
    for other in (fd, s.memfd(PAGE)):
        bind(s, fd, other, EBADFD)
    bind(s, fd, iommufd, argsz=24)


@check("devices 11.2 row 8", needs="vtd")
def bind_with_a_token(s: Subject) -> None:
    iommufd, fd = s.open(), cdev(s, ALONE)
    for pointer, errno in ((s.page(0), EINVAL), (16, EFAULT)):
        for number in (iommufd, 9999):
            answer = s.ioctl(fd, BIND, struct.pack("<IIiIQ", 24, 1, number, 0, pointer))
            wants(s, errno, answer.errno, "a token for a device that has none")


@check("devices 11.2 row 6", "devices 11.2 row 7", "devices 11.2 row 10", "devices 11.2 row 15", needs="vtd")
def bound_once_and_not_beside_the_group(s: Subject) -> None:
    iommufd, group = s.open(), s.open_group(ALONE)
    fd, other = cdev(s, ALONE), cdev(s, ALONE)
    bind(s, fd, iommufd, EBUSY)
    s.close(group)
    s.expect(bind(s, fd, iommufd) == 1, "the first object")
    bind(s, fd, iommufd, EINVAL)
    bind(s, other, iommufd, EINVAL)
    s.open_group(ALONE, EBUSY)
    s.close(fd)
    s.expect(bind(s, other, iommufd) == 1, "its id is free again")
    s.close(other)
    s.close(s.open_group(ALONE))


@check("devices 11.2 row 14", "devices 2.3 row 3", needs="vtd")
def a_device_id_that_cannot_be_told(s: Subject) -> None:
    iommufd, fd = s.open(), cdev(s, ALONE)
    s.poke(EDGE, struct.pack("<IIiI", 16, 0, 0, 0))
    s.poke_fd(EDGE + 8, iommufd)
    s.mprotect(EDGE, PAGE, 1)
    wants(s, EFAULT, s.ioctl(fd, BIND, at=EDGE, poke=False).errno, "out_devid cannot be written")
    wants(s, EINVAL, s.ioctl(fd, GET_INFO, bytes(24)).errno, "it is not bound")
    s.expect(bind(s, fd, iommufd) == 1, "and its id is free")


@check(
    "devices 1.3 row 2",
    "devices 1.3 row 3",
    "devices 1.3 row 7",
    "devices 1.4",
    "devices 2.1 row 7",
    "devices 11.2 row 12",
    needs="vtd",
)
def a_group_has_one_owner(s: Subject) -> None:
    mine, yours = s.open(), s.open()
    first, second, alone = cdev(s, FIRST), cdev(s, SECOND), cdev(s, ALONE)
    bind(s, first, mine)
    bind(s, second, yours, EPERM)
    bind(s, alone, yours)
    bind(s, second, mine)
    s.close(first)
    again = cdev(s, FIRST)
    bind(s, again, yours, EPERM)
    s.close(second)
    bind(s, again, yours)


@check("devices 11.3 row 1", "devices 11.3 row 2", "devices 11.3 row 3", "devices 11.3 row 5", needs="vtd")
def attach_arguments(s: Subject) -> None:
    iommufd, ioas = open_ioas(s)
    fd, _ = bound(s, ALONE, iommufd)
    wants(s, EFAULT, s.ioctl(fd, ATTACH, at=16, poke=False).errno, "a bad address")
    for data in ((0, 0, ioas), (11, 0, ioas), (12, 2, ioas), (12, 3, ioas), (12, 1, ioas), (15, 1, ioas)):
        wants(s, EINVAL, s.ioctl(fd, ATTACH, struct.pack("<III", *data)).errno, f"{data}")
    s.munmap(EDGE + PAGE, PAGE)
    s.poke(EDGE + PAGE - 12, struct.pack("<III", 16, 1, ioas))
    wants(s, EFAULT, s.ioctl(fd, ATTACH, at=EDGE + PAGE - 12, poke=False).errno, "no PASID there")
    answer = s.ioctl(fd, ATTACH, struct.pack("<IIIQ", 4096, 0, ioas, 2**64 - 1))
    wants(s, 0, answer.errno, "what follows is not looked at")


@check(
    "devices 11.4 row 1",
    "devices 11.4 row 2",
    "devices 11.4 row 3",
    "devices 11.4 row 5",
    "devices 11.4 row 6",
    "devices 3.7 row 1",
    needs="vtd",
)
def detach_arguments(s: Subject) -> None:
    iommufd, _ = open_ioas(s)
    fd, _ = bound(s, ALONE, iommufd)
    wants(s, EFAULT, s.ioctl(fd, DETACH, at=16, poke=False).errno, "a bad address")
    for data in ((0, 0), (7, 0), (8, 2), (12, 3), (8, 1), (11, 1)):
        wants(s, EINVAL, s.ioctl(fd, DETACH, struct.pack("<II", *data)).errno, f"{data}")
    s.munmap(EDGE + PAGE, PAGE)
    s.poke(EDGE + PAGE - 8, struct.pack("<II", 12, 1))
    wants(s, EFAULT, s.ioctl(fd, DETACH, at=EDGE + PAGE - 8, poke=False).errno, "no PASID there")
    detach(s, fd)
    for pasid in (0, 1, 2**32 - 1):
        detach(s, fd, pasid=pasid)


@check(
    "devices 11.3 row 6",
    "devices 3.1 row 1",
    "devices 3.1 row 2",
    "devices 3.1 row 3",
    "devices 3.1 row 4",
    needs="vtd",
)
def attaching_again_is_replacing(s: Subject) -> None:
    iommufd, ioas = open_ioas(s)
    fd, dev = bound(s, ALONE, iommufd)
    attach(s, fd, 99, ENOENT)
    attach(s, fd, dev, EINVAL)
    auto = attach(s, fd, ioas)
    s.expect(attach(s, fd, ioas) == auto, "the same again")
    manual = hwpt(s, iommufd, dev, ioas)
    s.expect(attach(s, fd, manual) == manual, "a HWPT id stays")
    s.refuses(ENOENT, iommufd, u.iommu_destroy(id=auto))
    s.refuses(EBUSY, iommufd, u.iommu_destroy(id=manual))
    s.refuses(EBUSY, iommufd, u.iommu_destroy(id=dev))
    detach(s, fd)
    detach(s, fd)
    s.do(iommufd, u.iommu_destroy(id=manual))


@check("devices 11.3 row 7", needs="vtd")
def a_failed_answer_detaches_the_rid(s: Subject) -> None:
    iommufd, ioas = open_ioas(s)
    fd, dev = bound(s, ALONE, iommufd)
    manual = hwpt(s, iommufd, dev, ioas)
    for already in (False, True):
        if already:
            attach(s, fd, ioas)
        s.poke(EDGE, struct.pack("<III", 12, 0, manual))
        s.mprotect(EDGE, PAGE, 1)
        wants(s, EFAULT, s.ioctl(fd, ATTACH, at=EDGE, poke=False).errno, "pt_id cannot be written")
        s.mprotect(EDGE, PAGE, 3)
        window_is(s, iommufd, ioas, False)
    s.do(iommufd, u.iommu_destroy(id=manual))


@check("devices 11.3 pasid", "devices 3.4b row 4", needs="vtd")
def pasid_numbers(s: Subject) -> None:
    iommufd, ioas = open_ioas(s)
    fd, dev = bound(s, ALONE, iommufd)
    manual = hwpt(s, iommufd, dev, ioas)
    for pasid, errno in ((2**31, ENOSPC), (2**32 - 1, ENOSPC), (0xFFFFFFEA, EINVAL), (1, EINVAL), (2**31 - 1, EINVAL)):
        for pt in (manual, ioas):
            attach(s, fd, pt, errno, pasid=pasid)
    attach(s, fd, 99, ENOENT, pasid=1)
    attach(s, fd, manual, pasid=0)
    attach(s, fd, manual, EBUSY)
    detach(s, fd)
    s.refuses(EBUSY, iommufd, u.iommu_destroy(id=manual))
    detach(s, fd, pasid=0)
    s.do(iommufd, u.iommu_destroy(id=manual))


@check(
    "devices 3.2 row 3",
    "devices 3.2 row 4",
    "devices 3.2 row 10",
    "devices 3.3 row 4",
    "devices 3.5 consequences",
    needs="vtd",
)
def the_second_member_joins(s: Subject) -> None:
    iommufd, ioas = open_ioas(s)
    first, dev = bound(s, FIRST, iommufd)
    second, _ = bound(s, SECOND, iommufd)
    other = ioas_alloc(s, iommufd)
    manual = hwpt(s, iommufd, dev, ioas)
    auto = attach(s, first, ioas)
    for pt in (manual, other):
        attach(s, second, pt, EINVAL)
    s.expect(attach(s, second, ioas) == auto, "it joins the automatic one")
    detach(s, first)
    window_is(s, iommufd, ioas, True)
    s.refuses(EBUSY, iommufd, u.iommu_destroy(id=auto))
    attach(s, first, manual, EINVAL)
    detach(s, second)
    s.refuses(ENOENT, iommufd, u.iommu_destroy(id=auto))
    attach(s, first, manual)
    attach(s, second, ioas, EINVAL)
    attach(s, second, manual)


@check(
    "devices 3.6 row 2",
    "devices 3.6 row 4",
    "devices 3.6 row 8",
    "devices 3.6 row 10",
    "devices 3.6 row 11",
    needs="vtd",
)
def replacing_moves_the_group(s: Subject) -> None:
    iommufd, ioas = open_ioas(s)
    first, dev = bound(s, FIRST, iommufd)
    second, _ = bound(s, SECOND, iommufd)
    other = ioas_alloc(s, iommufd)
    manual = hwpt(s, iommufd, dev, other)
    auto = attach(s, first, ioas)
    attach(s, second, ioas)
    attach(s, first, manual)
    s.refuses(ENOENT, iommufd, u.iommu_destroy(id=auto))
    window_is(s, iommufd, ioas, False)
    window_is(s, iommufd, other, True)
    detach(s, first)
    window_is(s, iommufd, other, True)
    s.refuses(EBUSY, iommufd, u.iommu_destroy(id=manual))
    detach(s, second)
    s.do(iommufd, u.iommu_destroy(id=manual))
    window_is(s, iommufd, other, False)


@check("devices 3.6 row 4", "devices 3.6 undo", needs="vtd")
def a_replace_that_hits_a_mapping(s: Subject) -> None:
    iommufd, ioas = open_ioas(s)
    fd, dev = bound(s, ALONE, iommufd)
    other = ioas_alloc(s, iommufd)
    auto = attach(s, fd, ioas)
    manual = hwpt(s, iommufd, dev, other)
    map_fixed(s, iommufd, other, s.page(0), PAGE, MSI + 0xFF000)
    for pt in (manual, other):
        attach(s, fd, pt, EADDRINUSE)
    window_is(s, iommufd, ioas, True)
    unmap(s, iommufd, other, MSI + 0xFF000, PAGE)
    window_is(s, iommufd, other, False)
    s.refuses(EBUSY, iommufd, u.iommu_destroy(id=auto))
    s.expect(attach(s, fd, other) != manual, "an automatic one is made")


@check(
    "devices 3.8 region row 2",
    "devices 3.8 region row 3",
    "devices 3.8 region row 4",
    "devices 3.7 row 4",
    "devices 3.7 row 3",
    needs="vtd",
)
def the_interrupt_window(s: Subject) -> None:
    iommufd, ioas = open_ioas(s)
    fd, dev = bound(s, ALONE, iommufd)
    for iova, length in ((MSI - PAGE, 2 * PAGE), (MSI + 0xFF000, PAGE), (MSI + 0xFF000, 8 * PAGE)):
        map_fixed(s, iommufd, ioas, s.page(0), length, iova)
        attach(s, fd, ioas, EADDRINUSE)
        unmap(s, iommufd, ioas, iova, length)
    allow(s, iommufd, ioas, [(MSI + 0xFFFFE, MSI + 0x200000)])
    attach(s, fd, ioas, EADDRINUSE)
    allow(s, iommufd, ioas, [(MSI + 0x100000, MSI + 0x200000)])
    attach(s, fd, ioas)
    before = free_ranges(s, iommufd, ioas)[0]
    s.expect(before[0] == (0, MSI - 1) and before[1][0] == MSI + 0x100000, "a hole in what is free")
    allow(s, iommufd, ioas, [])
    manual = hwpt(s, iommufd, dev, ioas)
    detach(s, fd)
    s.expect(free_ranges(s, iommufd, ioas)[0] == [(0, before[1][1])], "the window went, the aperture of the HWPT stays")
    s.do(iommufd, u.iommu_destroy(id=manual))
    s.expect(free_ranges(s, iommufd, ioas)[0] == [(0, 2**64 - 1)], "now that has gone, too")


@check("devices 4.3 row 9", "devices 2.2", "devices 2.1 row 8", "vfio 4", needs="vtd")
def coherency_is_enforced_when_it_can(s: Subject) -> None:
    iommufd, ioas = open_ioas(s)
    fd, dev = bound(s, ALONE, iommufd)
    s.do(iommufd, u.iommu_vfio_ioas(op=1, ioas_id=ioas))
    attach(s, fd, ioas)
    hwpt(s, iommufd, dev, ioas)
    s.expect(s.ioctl(iommufd, 0x3B65, at=4, poke=False).result == 1, "VFIO_DMA_CC_IOMMU")


@check("devices 11.5", "devices 1.5", "devices 2.3 row 3", needs="vtd")
def closing_gives_everything_back(s: Subject) -> None:
    """A bound device keeps the context; its close detaches and unbinds."""
    iommufd, ioas = open_ioas(s)
    fd, dev = bound(s, ALONE, iommufd)
    auto = attach(s, fd, ioas)
    s.close(fd)
    for number in (dev, auto):
        s.refuses(ENOENT, iommufd, u.iommu_destroy(id=number))
    window_is(s, iommufd, ioas, False)
    fd, dev = bound(s, ALONE, iommufd)
    s.close(iommufd)
    attach(s, fd, ioas)
    other = s.open()
    second = cdev(s, ALONE)
    bind(s, second, other, EINVAL)
    s.close(fd)
    s.expect(bind(s, second, other) == 1, "in a fresh context")


@check(
    "devices 4.5 row 1",
    "devices 3.3 row 3",
    "devices 3.4b row 2",
    "mock 5.2 row 2",
    "mock 5.4 row 3",
    "mock 4.5",
    "vfio 4",
    needs="vtd",
)
def another_drivers_page_table(s: Subject) -> None:
    """Two IOMMUs in one context: a page table of one is not for the other's devices.

    Replacing is not tried: 7.3.4 does not check there, and corrupts memory."""
    iommufd, ioas = open_ioas(s)
    fd, dev = bound(s, ALONE, iommufd)
    _, mock_auto, mock = device(s, iommufd, ioas, t.MOCK_FLAGS_DEVICE_PASID)
    mock_hwpt = hwpt(s, iommufd, mock, ioas)
    mock_pasids = s.do(iommufd, u.iommu_hwpt_alloc(flags=8, dev_id=mock, pt_id=ioas)).out_hwpt_id
    for pt in (mock_hwpt, mock_auto):
        attach(s, fd, pt, EINVAL)
    attach(s, fd, mock_pasids, EINVAL, pasid=1)
    own = attach(s, fd, ioas)
    s.expect(own not in (mock_auto, mock_hwpt), "an automatic one of its own")
    s.refuses(EINVAL, iommufd, t.test_mock_domain(id=own))
    detach(s, fd)
    own = hwpt(s, iommufd, dev, ioas)
    s.refuses(EINVAL, iommufd, t.test_md_check_map(id=own))
    s.refuses(EINVAL, iommufd, t.test_dirty(id=own, length=PAGE, page_size=PAGE, uptr=s.page(0)))
    s.refuses(EINVAL, iommufd, t.test_trigger_iopf(dev_id=dev))
    parent = s.do(iommufd, u.iommu_hwpt_alloc(flags=1, dev_id=mock, pt_id=ioas)).out_hwpt_id
    asked = u.iommu_viommu_alloc(type=t.IOMMU_VIOMMU_TYPE_SELFTEST, dev_id=mock, hwpt_id=parent)
    viommu = s.do(iommufd, asked).out_viommu_id
    s.refuses(EINVAL, iommufd, u.iommu_hwpt_alloc(dev_id=dev, pt_id=viommu, flags=16))
    s.do(iommufd, u.iommu_vfio_ioas(op=1, ioas_id=ioas))
    s.expect(s.ioctl(iommufd, 0x3B65, at=4, poke=False).result == 0, "coherency is not enforced by all of them")
