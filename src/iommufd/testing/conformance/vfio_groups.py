"""vfio 9, devices 11: the older way to a device, through its group, with an iommufd as the container."""

from __future__ import annotations

import struct
from errno import EADDRINUSE, EBADF, EBADFD, EBUSY, EFAULT, EINVAL, ENODEV, ENOTTY, EPERM

from iommufd.testing.conformance import check
from iommufd.testing.conformance.common import ioas_alloc, map_fixed, unmap
from iommufd.testing.conformance.vfio_devices import (
    ALONE,
    ATTACH,
    BIND,
    CONFIG,
    DETACH,
    FIRST,
    GET_INFO,
    MSI,
    SECOND,
    bind,
    cdev,
    wants,
    window_is,
)
from iommufd.testing.subject import PAGE, Subject
from iommufd.uapi import iommufd as u

GET_STATUS, SET_CONTAINER, UNSET_CONTAINER, GET_DEVICE_FD = 0x3B67, 0x3B68, 0x3B69, 0x3B6A
ADDRESS = {ALONE: b"0000:00:03.0\0", FIRST: b"0000:01:01.0\0", SECOND: b"0000:01:02.0\0"}


def set_container(s: Subject, group: int, fd: int, errno: int = 0) -> None:
    wants(s, errno, s.ioctl(group, SET_CONTAINER, struct.pack("<i", fd)).errno, "SET_CONTAINER")


def device_fd(s: Subject, group: int, name: str, errno: int = 0) -> int:
    answer = s.ioctl(group, GET_DEVICE_FD, ADDRESS[name])
    wants(s, errno, answer.errno, f"GET_DEVICE_FD of {name}")
    return answer.result


def status(s: Subject, group: int, flags: int) -> None:
    answer = s.ioctl(group, GET_STATUS, struct.pack("<II", 8, 0))
    s.expect(struct.unpack("<II", answer.out) == (8, flags), f"status {answer.out.hex()}, expected {flags}")


def compat(s: Subject, iommufd: int) -> int:
    """The id of the compatibility IOAS."""
    return s.do(iommufd, u.iommu_vfio_ioas(op=0)).ioas_id


def joined(s: Subject, name: str) -> tuple[int, int]:
    """(group, iommufd) with the container set."""
    group, iommufd = s.open_group(name), s.open()
    set_container(s, group, iommufd)
    return group, iommufd


@check("vfio 9.1 row 1", "vfio 9.1 row 2", "vfio 9.1 row 3", "vfio 9.1 row 10", "vfio 9.1 row 11", needs="vtd")
def set_container_refuses(s: Subject) -> None:
    group, iommufd = s.open_group(ALONE), s.open()
    wants(s, EFAULT, s.ioctl(group, SET_CONTAINER, at=16, poke=False).errno, "a bad address")
    for number in (-1, 9999):
        set_container(s, group, number, EBADF)
    for other in (s.memfd(PAGE), group):
        set_container(s, group, other, EBADFD)
    s.refuses(ENODEV, iommufd, u.iommu_vfio_ioas(op=0))
    set_container(s, group, iommufd)
    s.expect(compat(s, iommufd) == 1, "an IOAS was made")
    for number in (iommufd, s.open()):
        set_container(s, group, number, EINVAL)
    set_container(s, group, 9999, EBADF)


@check("vfio 9.1 row 9", "vfio 9.1 row 10", needs="vtd")
def the_compat_ioas_is_made_or_reused(s: Subject) -> None:
    iommufd = s.open()
    own = ioas_alloc(s, iommufd)
    s.do(iommufd, u.iommu_vfio_ioas(op=1, ioas_id=own))
    group, other = s.open_group(ALONE), s.open_group(FIRST)
    set_container(s, group, iommufd)
    s.expect(compat(s, iommufd) == own, "the one that was set")
    s.expect(ioas_alloc(s, iommufd) == own + 1, "no id was used up")
    s.do(iommufd, u.iommu_destroy(id=own))
    s.refuses(ENODEV, iommufd, u.iommu_vfio_ioas(op=0))
    set_container(s, other, iommufd)
    s.expect(compat(s, iommufd) == own, "a new one, with the lowest id")
    wants(s, 0, s.ioctl(other, UNSET_CONTAINER).errno, "UNSET_CONTAINER")
    wants(s, EINVAL, s.ioctl(other, UNSET_CONTAINER).errno, "UNSET_CONTAINER again")
    s.expect(compat(s, iommufd) == own, "which stays")


@check("vfio 9.2 open", needs="vtd")
def a_group_is_opened_once(s: Subject) -> None:
    group = s.open_group(FIRST)
    s.open_group(SECOND, EBUSY)
    for cmd in (0x3B64, 0x3B65, 0x3B70, 0x3B80, BIND):
        wants(s, ENOTTY, s.ioctl(group, cmd, bytes(64)).errno, f"{cmd:#x}")
    s.close(group)
    s.close(s.open_group(SECOND))


@check("vfio 9.2 status", needs="vtd")
def get_status(s: Subject) -> None:
    group = s.open_group(ALONE)
    wants(s, EFAULT, s.ioctl(group, GET_STATUS, at=16, poke=False).errno, "a bad address")
    wants(s, EINVAL, s.ioctl(group, GET_STATUS, struct.pack("<II", 7, 9)).errno, "argsz")
    status(s, group, 1)
    iommufd = s.open()
    set_container(s, group, iommufd)
    status(s, group, 3)
    wants(s, 0, s.ioctl(group, UNSET_CONTAINER).errno, "UNSET_CONTAINER")
    status(s, group, 1)


@check("vfio 9.2 device", "devices 11.7", "devices 11.2 row 5", needs="vtd")
def the_first_open_binds_and_attaches(s: Subject) -> None:
    group = s.open_group(ALONE)
    device_fd(s, group, ALONE, EINVAL)
    iommufd = s.open()
    set_container(s, group, iommufd)
    wants(s, ENODEV, s.ioctl(group, GET_DEVICE_FD, b"0000:01:01.0\0").errno, "a device of another group")
    ioas = compat(s, iommufd)
    window_is(s, iommufd, ioas, False)
    fd = device_fd(s, group, ALONE)
    window_is(s, iommufd, ioas, True)
    s.expect(ioas_alloc(s, iommufd) == 4, "a DEVICE and an automatic HWPT")
    s.expect(s.read(fd, 4, CONFIG).out == b"\x34\x12\xe8\x11", "it is open")
    bind(s, fd, iommufd, EINVAL)
    for cmd in (ATTACH, DETACH):
        wants(s, ENOTTY, s.ioctl(fd, cmd, struct.pack("<III", 12, 0, ioas)).errno, f"{cmd:#x}")
    again = device_fd(s, group, ALONE)
    s.close(fd)
    window_is(s, iommufd, ioas, True)
    s.close(again)
    window_is(s, iommufd, ioas, False)


@check("vfio 9.2 members", needs="vtd")
def members_share_the_page_table(s: Subject) -> None:
    group, iommufd = joined(s, FIRST)
    first, second = device_fd(s, group, FIRST), device_fd(s, group, SECOND)
    s.expect(ioas_alloc(s, iommufd) == 5, "two devices, one HWPT")
    ioas = compat(s, iommufd)
    s.do(iommufd, u.iommu_vfio_ioas(op=2))
    window_is(s, iommufd, ioas, True)
    s.close(first)
    window_is(s, iommufd, ioas, True)
    device_fd(s, group, FIRST, ENODEV)
    s.close(second)
    window_is(s, iommufd, ioas, False)


@check("vfio 9.2 attach fails", needs="vtd")
def an_open_that_cannot_attach(s: Subject) -> None:
    group, iommufd = joined(s, ALONE)
    ioas = compat(s, iommufd)
    map_fixed(s, iommufd, ioas, s.page(0), PAGE, MSI)
    device_fd(s, group, ALONE, EADDRINUSE)
    s.expect(ioas_alloc(s, iommufd) == 2, "nothing is left of it")
    unmap(s, iommufd, ioas, MSI, PAGE)
    device_fd(s, group, ALONE)
    s.do(iommufd, u.iommu_destroy(id=2))


@check("vfio 9.2 owner", "devices 1.3 row 2", needs="vtd")
def devices_are_claimed_when_they_are_opened(s: Subject) -> None:
    """Setting a container claims nothing; two ways to one group exclude each other."""
    group, iommufd = joined(s, FIRST)
    fd = cdev(s, SECOND)
    bind(s, fd, s.open(), EBUSY)
    device = device_fd(s, group, FIRST)
    s.close(group)
    bind(s, fd, s.open(), EPERM)
    s.expect(bind(s, fd, iommufd) > 0, "in the same context")
    s.open_group(FIRST, EBUSY)
    s.close(device)
    s.close(fd)
    s.close(s.open_group(FIRST))


@check("vfio 9.1 keeps", needs="vtd")
def the_group_keeps_the_context(s: Subject) -> None:
    group, iommufd = joined(s, ALONE)
    s.close(iommufd)
    fd = device_fd(s, group, ALONE)
    s.close(group)
    wants(s, 0, s.ioctl(fd, GET_INFO, struct.pack("<IIII", 16, 0, 0, 0)).errno, "GET_INFO")
    s.expect(s.read(fd, 2, CONFIG).out == b"\x34\x12", "the device stays open")
    s.open_group(ALONE)
