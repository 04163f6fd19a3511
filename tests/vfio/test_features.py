"""VFIO_DEVICE_FEATURE and the hot reset of a bus, as Linux 7.3.4 answered them."""

from __future__ import annotations

import os
import struct

import pytest

from tests.vfio.conftest import ALONE, FIRST, NETWORK, SECOND
from tests.vfio.program import BAD, FEATURE, HOT_RESET, HOT_RESET_INFO, Program
from tests.vfio.test_group import device_fd, set_container

GET, SET, PROBE = 1 << 16, 1 << 17, 1 << 18


@pytest.fixture
def iommufd(p: Program) -> int:
    return p.iommufd()


# --- features


def ask(p: Program, fd: int, flags: int, argsz: int = 64) -> object:
    return p.call(fd, FEATURE, bytearray(struct.pack("<II", argsz, flags) + bytes(56)))


def test_arguments(p: Program, iommufd: int) -> None:
    fd, _ = p.bound(ALONE, iommufd)
    assert p.call(fd, FEATURE, BAD) == "EFAULT"
    for argsz, answer in ((0, "EINVAL"), (7, "EINVAL"), (8, "ENOTTY"), (9, "ENOTTY")):
        assert ask(p, fd, PROBE, argsz) == answer
    for feature in range(16):
        assert ask(p, fd, feature | GET | SET) == "EINVAL"
        assert ask(p, fd, feature | PROBE | 1 << 19) == "EINVAL"


def test_what_there_is(p: Program, iommufd: int) -> None:
    fd, _ = p.bound(ALONE, iommufd)
    for feature in range(16):
        answers = [ask(p, fd, feature | ops) for ops in (0, PROBE, PROBE | GET, PROBE | SET, PROBE | GET | SET, GET)]
        if feature in (3, 4, 5):
            assert answers == ["EINVAL", 0, "EINVAL", 0, "EINVAL", "EINVAL"]
        elif feature == 12:
            assert answers == ["EINVAL"] * 6
        else:
            assert answers == ["ENOTTY"] * 6


def test_low_power(p: Program, iommufd: int) -> None:
    fd, _ = p.bound(ALONE, iommufd)
    enter, leave = SET | 3, SET | 5
    assert [ask(p, fd, f, 8) for f in (enter, enter, leave, leave, enter)] == [0, "EINVAL", 0, 0, 0]
    assert p.read(fd, 7 << 40, 2) == b"\x34\x12"  # every access wakes it
    p.close(fd)
    fd, _ = p.bound(ALONE, iommufd)
    assert ask(p, fd, enter, 8) == 0


def test_low_power_with_a_wake_up(p: Program, iommufd: int) -> None:
    fd, _ = p.bound(ALONE, iommufd)
    event = os.eventfd(0)

    def enter(number: int, argsz: int = 16) -> object:
        return p.call(fd, FEATURE, bytearray(struct.pack("<IIiI", argsz, SET | 4, number, 0)))

    assert [enter(n) for n in (-1, 9999, 0, fd)] == ["EINVAL", "EBADF", "EINVAL", "EINVAL"]
    assert enter(event, 15) == "EINVAL"
    assert [enter(event), enter(event)] == [0, "EINVAL"]
    os.close(event)


# --- hot reset


def info(p: Program, fd: int, argsz: int = 28) -> object:
    """(flags, [(id, segment, bus, devfn)]), or the errno's name."""
    buffer = bytearray(struct.pack("<III", argsz, 7, 7) + bytes(24))
    result = p.call(fd, HOT_RESET_INFO, buffer)
    size, flags, count = struct.unpack_from("<III", buffer)
    if result != 0:
        return result, flags, count
    assert size == argsz
    return flags, [struct.unpack_from("<iHBB", buffer, 12 + 8 * n) for n in range(count)]


def reset(p: Program, fd: int, *groups: int, argsz: int | None = None, flags: int = 0) -> object:
    size = 12 + 4 * len(groups) if argsz is None else argsz
    return p.call(fd, HOT_RESET, bytearray(struct.pack(f"<III{len(groups)}i", size, flags, len(groups), *groups)))


def test_a_root_bus_cannot_be_reset(p: Program, iommufd: int) -> None:
    fd, _ = p.bound(ALONE, iommufd)
    assert [info(p, fd, argsz) for argsz in (0, 11)] == [("EINVAL", 7, 7)] * 2
    assert info(p, fd, 12) == ("ENODEV", 7, 7)
    assert reset(p, fd) == "ENODEV"
    assert reset(p, fd, argsz=11) == "EINVAL"
    assert reset(p, fd, flags=1) == "EINVAL"


def test_who_is_affected(p: Program, iommufd: int) -> None:
    fd, dev = p.bound(FIRST, iommufd)
    assert info(p, fd, 12) == ("ENOSPC", 0, 2)
    assert info(p, fd, 27) == ("ENOSPC", 0, 2)
    assert info(p, fd) == (3, [(dev, 0, 1, 8), (0, 0, 1, 16)])  # the other's group is ours: owned
    _, other = p.bound(SECOND, iommufd)
    assert info(p, fd) == (3, [(dev, 0, 1, 8), (other, 0, 1, 16)])


def test_devices_11_8_a_bus_of_several_owners(p: Program, iommufd: int) -> None:
    p.machine.pci.add("0000:02:01.0")  # its own group, on the bus of the network function
    fd, dev = p.bound(NETWORK, iommufd)
    assert info(p, fd) == (1, [(dev, 0, 2, 0), (-1, 0, 2, 8)])  # DEV_ID, but not all owned
    assert reset(p, fd) == "EINVAL"
    strange, _ = p.bound("0000:02:01.0", p.iommufd())
    assert reset(p, fd) == "EINVAL"
    p.close(strange)
    p.bound("0000:02:01.0", iommufd)
    assert reset(p, fd) == 0


def test_a_hot_reset_resets_the_bus(p: Program, iommufd: int) -> None:
    fd, _ = p.bound(NETWORK, iommufd)
    p.write(fd, 0x40, b"gone")
    assert reset(p, fd) == 0
    assert p.read(fd, 0x40, 4) == bytes(4)
    assert reset(p, fd, 5) == "EINVAL"  # groups are for devices opened through one


def test_through_groups(p: Program, iommufd: int) -> None:
    group = p.group(FIRST)
    set_container(p, group, iommufd)
    fd = device_fd(p, group, FIRST)
    assert isinstance(fd, int)
    number = p.machine.pci[FIRST].group.number
    assert info(p, fd) == (0, [(number, 0, 1, 8), (number, 0, 1, 16)])
    assert info(p, fd, 12) == ("ENOSPC", 0, 2)
    assert [reset(p, fd), reset(p, fd, iommufd), reset(p, fd, 9999), reset(p, fd, fd)] == [
        "EINVAL",
        "EINVAL",
        "EBADF",
        "EINVAL",
    ]
    assert [reset(p, fd, group), reset(p, fd, group, group), reset(p, fd, group, argsz=12)] == [0, 0, 0]
    assert reset(p, fd, group, group, group) == "EINVAL"  # more than there are devices
    assert reset(p, fd, p.group(ALONE)) == "EINVAL"
