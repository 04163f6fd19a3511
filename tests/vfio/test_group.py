"""VFIO groups with an iommufd as container: vfio-compat.md 9 and 10.1, devices.md 11.7."""

from __future__ import annotations

import errno
import mmap
import os
import struct
from collections.abc import Iterator

import pytest

from iommufd.engine.task import CAP_SYS_RAWIO
from iommufd.iommu.group import Group
from iommufd.machine.machine import Machine
from tests.vfio.conftest import ALONE, EDU, FIRST, NETWORK, SECOND, Edu
from tests.vfio.program import (
    ATTACH,
    BAD,
    BIND,
    CONFIG,
    DETACH,
    GET_DEVICE_FD,
    GET_STATUS,
    SET_CONTAINER,
    UNSET_CONTAINER,
    Program,
)

VIABLE, SET = 1, 2


def set_container(p: Program, group: int, fd: int) -> object:
    return p.call(group, SET_CONTAINER, bytearray(struct.pack("<i", fd)))


def device_fd(p: Program, group: int, name: str) -> object:
    return p.call(group, GET_DEVICE_FD, bytearray(name.encode() + b"\0"))


def core_group(p: Program, name: str) -> Group:
    found = p.machine.pci[name].device.group
    assert found is not None
    return found


def status(p: Program, group: int) -> object:
    answer = p.ask(group, GET_STATUS, "II", 8, 99)
    return answer[1] if isinstance(answer, tuple) else answer


@pytest.fixture
def group(p: Program) -> int:
    return int(p.group(FIRST))


@pytest.fixture
def iommufd(p: Program) -> int:
    return p.iommufd()


def test_open_is_exclusive(p: Program, group: int) -> None:
    assert p.group(FIRST) == "EBUSY"
    assert p.open("/dev/vfio/1", os.O_RDONLY) == "EBUSY"
    p.close(group)
    assert isinstance(p.group(FIRST), int)


def test_what_a_group_is_not(p: Program, group: int) -> None:
    for cmd in (0x3B64, 0x3B65, 0x3B6B, BIND, 0x3B80, 0x1234):
        assert p.call(group, cmd, bytearray(8)) == "ENOTTY"
    with pytest.raises(OSError, match="Invalid"):
        p.backend.read(group, 1)
    with pytest.raises(OSError, match="No such device"):
        p.backend.mmap(group, 4096, mmap.PROT_READ, mmap.MAP_SHARED, 0)


# --- 9.1


def test_vfio_9_1_rows_1_2_3_11(p: Program, group: int, iommufd: int) -> None:
    assert p.call(group, SET_CONTAINER, BAD) == "EFAULT"
    assert set_container(p, group, -1) == "EBADF"
    assert set_container(p, group, 9999) == "EBADF"
    assert set_container(p, group, 0) == "EBADFD"
    assert set_container(p, group, group) == "EBADFD"
    assert set_container(p, group, iommufd) == 0
    assert set_container(p, group, iommufd) == "EINVAL"
    assert set_container(p, group, 0) == "EINVAL"


def test_vfio_9_1_rows_9_and_10_the_compat_ioas(p: Program, group: int, iommufd: int) -> None:
    context = p.context(iommufd)
    assert set_container(p, group, iommufd) == 0
    (ioas,) = context.objects
    assert context.compat_ioas is ioas
    other = p.group(ALONE)
    assert set_container(p, other, iommufd) == 0
    assert len(context.objects) == 1
    assert core_group(p, FIRST).owner_cnt == 0
    assert p.call(group, UNSET_CONTAINER) == 0
    assert p.call(other, UNSET_CONTAINER) == 0
    assert list(context.objects) == [ioas]  # it stays
    assert p.destroy(iommufd, ioas.id) == 0


def test_vfio_9_1_the_group_keeps_the_context(p: Program, group: int, iommufd: int) -> None:
    context = p.context(iommufd)
    set_container(p, group, iommufd)
    p.close(iommufd)
    assert context.references == 1
    assert isinstance(device_fd(p, group, FIRST), int)
    assert context.references == 2
    p.close(group)
    assert context.references == 1


def test_vfio_9_1_a_container_is_an_iommufd_too(p: Program, group: int) -> None:
    container = p.open("/dev/vfio/vfio")
    assert set_container(p, group, container) == 0
    assert p.call(container, 0x3B66, 3) == 0  # SET_IOMMU type 1 v2
    assert isinstance(device_fd(p, group, FIRST), int)


# --- 9.2


def test_vfio_9_2_get_status(p: Program, group: int, iommufd: int) -> None:
    assert p.call(group, GET_STATUS, BAD) == "EFAULT"
    assert p.ask(group, GET_STATUS, "II", 7, 99) == "EINVAL"
    assert p.ask(group, GET_STATUS, "II", 100, 99) == (100, VIABLE)
    assert p.call(group, UNSET_CONTAINER) == "EINVAL"
    set_container(p, group, iommufd)
    assert status(p, group) == SET | VIABLE
    device_fd(p, group, FIRST)
    assert p.call(group, UNSET_CONTAINER) == 0  # although a device is open
    assert status(p, group) == 0  # somebody has its DMA
    core_group(p, ALONE).use_dma_api()
    other = p.group(ALONE)
    assert status(p, other) == 0  # a kernel driver has


def test_vfio_9_2_get_device_fd_names(p: Program, group: int, iommufd: int) -> None:
    assert device_fd(p, group, "0000:99:00.0") == "ENODEV"
    assert device_fd(p, group, FIRST) == "EINVAL"  # no container
    set_container(p, group, iommufd)
    assert p.call(group, GET_DEVICE_FD, BAD) == "EFAULT"
    assert p.call(group, GET_DEVICE_FD, bytearray(FIRST.encode())) == "EFAULT"  # its end cannot be read
    assert p.call(group, GET_DEVICE_FD, bytearray(b"0" * 5000)) == "EINVAL"
    for name, answer in (
        (ALONE, "ENODEV"),  # another group's
        ("", "ENODEV"),
        (FIRST + "x", "ENODEV"),
        (FIRST[:-1], "ENODEV"),
        (FIRST.replace("1", "A"), "ENODEV"),
        (FIRST + " vf_token=00000000-0000-0000-0000-000000000000", "EINVAL"),
        (FIRST + " foo=1", "EINVAL"),
    ):
        assert device_fd(p, group, name) == answer
    assert isinstance(device_fd(p, group, FIRST + " "), int)


def test_vfio_9_2_first_open_binds_and_attaches(p: Program, group: int, iommufd: int) -> None:
    context = p.context(iommufd)
    set_container(p, group, iommufd)
    fd = device_fd(p, group, FIRST)
    assert isinstance(fd, int)
    assert [o.kind for o in context.objects] == ["IOAS", "DEVICE", "HWPT_PAGING"]
    device = p.machine.pci[FIRST]
    assert device.rid_attached
    assert device.idev is not None
    assert device.idev.users == 3  # table, driver, attachment
    again = device_fd(p, group, FIRST)
    assert isinstance(again, int)
    assert device.idev.users == 3  # no second attach
    p.close(fd)
    assert p.read(again, CONFIG, 2) == b"\x34\x12"
    p.close(again)
    assert [o.kind for o in context.objects] == ["IOAS"]


def test_vfio_9_2_members_share_the_page_table(p: Program, group: int, iommufd: int) -> None:
    set_container(p, group, iommufd)
    device_fd(p, group, FIRST)
    device_fd(p, group, SECOND)
    kinds = [o.kind for o in p.context(iommufd).objects]
    assert kinds.count("HWPT_PAGING") == 1
    assert kinds.count("DEVICE") == 2


def test_vfio_9_2_no_compat_ioas_any_more(p: Program, group: int, iommufd: int) -> None:
    set_container(p, group, iommufd)
    p.set_compat(iommufd, 0, op=2)
    assert device_fd(p, group, FIRST) == "ENODEV"
    assert [o.kind for o in p.context(iommufd).objects] == ["IOAS"]  # bound, failed to attach, unbound
    assert p.machine.pci[FIRST].users == 0


def test_vfio_9_2_the_attach_fails(p: Program, group: int, iommufd: int) -> None:
    set_container(p, group, iommufd)
    compat = p.context(iommufd).compat_ioas
    assert compat is not None
    p.map(iommufd, compat.id, 0x1000, 0x1000, 0xFEE01000)  # in the way of the interrupt window
    assert device_fd(p, group, FIRST) == "EADDRINUSE"
    assert p.machine.pci[FIRST].users == 0
    assert p.context(iommufd).references == 2


def test_vfio_9_2_ownership_and_isolation(p: Program, group: int, iommufd: int) -> None:
    set_container(p, group, iommufd)
    core = p.machine.pci[FIRST].device
    core.isolated_msi = False
    assert device_fd(p, group, FIRST) == "EPERM"
    core.isolated_msi = True
    assert core.group is not None
    core.group.use_dma_api()
    assert device_fd(p, group, FIRST) == "EPERM"
    core.group.unuse_dma_api()
    assert isinstance(device_fd(p, group, FIRST), int)


def test_vfio_9_clearing_the_compat_ioas_moves_nobody(p: Program, group: int, iommufd: int) -> None:
    set_container(p, group, iommufd)
    device_fd(p, group, FIRST)
    p.set_compat(iommufd, 0, op=2)
    assert p.machine.pci[FIRST].rid_attached


def test_devices_11_1_a_groups_file_cannot_be_bound_or_attached(p: Program, group: int, iommufd: int) -> None:
    set_container(p, group, iommufd)
    fd = device_fd(p, group, FIRST)
    assert isinstance(fd, int)
    assert p.file(fd).link == "anon_inode:[vfio-device]"
    assert p.bind(fd, iommufd) == "EINVAL"  # devices 11.2 row 5
    assert p.call(fd, ATTACH, bytearray(16)) == "ENOTTY"
    assert p.call(fd, DETACH, bytearray(16)) == "ENOTTY"


def test_devices_stay_open_without_their_group(p: Program, group: int, iommufd: int) -> None:
    set_container(p, group, iommufd)
    fd = device_fd(p, group, FIRST)
    p.close(group)
    assert isinstance(fd, int)
    assert p.read(fd, CONFIG, 2) == b"\x34\x12"
    cdev = p.cdev(FIRST)
    assert p.bind(cdev, iommufd) == "EINVAL"  # 11.2 row 10
    group = p.group(FIRST)
    assert status(p, group) == 0
    assert p.bind(cdev, iommufd) == "EBUSY"
    set_container(p, group, iommufd)
    assert isinstance(device_fd(p, group, FIRST), int)


def test_no_descriptor_left(p: Program, group: int, iommufd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from iommufd.errors import KernelError

    def full(_self: object, cloexec: bool) -> int:
        raise KernelError(errno.EMFILE, "none left")

    set_container(p, group, iommufd)
    monkeypatch.setattr(type(p.backend.descriptors), "reserve", full)
    assert device_fd(p, group, FIRST) == "EMFILE"
    assert p.machine.pci[FIRST].users == 0


# --- without an IOMMU


BARE = "0000:00:07.0"


@pytest.fixture
def bare() -> Iterator[Program]:
    machine = Machine("bare")
    machine.pci.add(BARE, EDU, model=Edu, noiommu=True)
    program = Program(machine)
    program.backend.owner.pretended = 1 << CAP_SYS_RAWIO
    yield program
    program.close_all()


def test_vfio_9_a_group_without_iommu(bare: Program) -> None:
    assert {"/dev/vfio/noiommu-0", "/dev/vfio/devices/noiommu-vfio0"} <= set(bare.machine.paths())
    group = bare.open("/dev/vfio/noiommu-0")
    assert status(bare, group) == VIABLE
    assert device_fd(bare, group, BARE) == "EINVAL"
    with_ioas = bare.iommufd()
    bare.set_compat(with_ioas, bare.ioas(with_ioas))
    assert set_container(bare, group, with_ioas) == "EINVAL"  # vfio 9.1 row 6
    iommufd = bare.iommufd()
    assert set_container(bare, group, iommufd) == 0  # vfio 9.1 row 7
    context = bare.context(iommufd)
    assert context.no_iommu_mode
    assert len(context.objects) == 0
    assert status(bare, group) == SET | VIABLE
    fd = device_fd(bare, group, BARE)
    assert isinstance(fd, int)
    assert len(context.objects) == 0  # no bind, no attach
    assert bare.read(fd, CONFIG, 2) == b"\x34\x12"
    bare.close(fd)
    bare.set_compat(iommufd, bare.ioas(iommufd))
    assert device_fd(bare, group, BARE) == "EPERM"
    bare.set_compat(iommufd, 0, op=2)
    bare.backend.owner.pretended = 0
    assert device_fd(bare, group, BARE) == "EPERM"
    bare.close(group)
    assert bare.open("/dev/vfio/noiommu-0") == "EPERM"


def test_vfio_9_1_row_8_a_normal_group_after_one_without(bare: Program) -> None:
    bare.machine.pci.add(ALONE, EDU, model=Edu)
    iommufd = bare.iommufd()
    assert set_container(bare, bare.open("/dev/vfio/noiommu-0"), iommufd) == 0
    assert set_container(bare, bare.group(ALONE), iommufd) == "EINVAL"
    assert len(bare.context(iommufd).objects) == 0


def test_vfio_9_1_row_4_a_group_without_devices(p: Program, iommufd: int) -> None:
    group = p.group(ALONE)
    p.machine.pci.remove(ALONE)
    assert set_container(p, group, iommufd) == "ENODEV"
    assert status(p, group) == "ENODEV"


def test_a_device_of_a_group_is_an_anonymous_inode(p: Program) -> None:
    """From which no code is mapped; a device file has no such rule."""
    group, iommufd = p.group(NETWORK), p.iommufd()
    set_container(p, group, iommufd)
    fd = device_fd(p, group, NETWORK)
    assert isinstance(fd, int)
    with pytest.raises(OSError, match="PROT_EXEC") as caught:
        p.backend.mmap(fd, 4096, mmap.PROT_EXEC, mmap.MAP_SHARED, 0)
    assert caught.value.errno == errno.EPERM
    p.backend.mmap(fd, 4096, mmap.PROT_READ, mmap.MAP_SHARED, 0).release()
