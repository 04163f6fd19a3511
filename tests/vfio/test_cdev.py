"""VFIO device files through their cdev: devices.md 11.1-11.5, and the driver's calls as Linux 7.3.4 answers them."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct

import pytest

from iommufd.engine.ioas import IOAS
from iommufd.engine.task import CAP_SYS_RAWIO
from iommufd.errors import KernelError
from iommufd.iommu.drivers.pci_basic import PciBasicDriver
from iommufd.iommu.extent_domain import ExtentDomain
from iommufd.machine.machine import Machine
from tests.vfio.conftest import ALONE, EDU, FIRST, NETWORK, NIC, SECOND, Edu
from tests.vfio.program import (
    ATTACH,
    BAD,
    BIND,
    CONFIG,
    DETACH,
    GET_INFO,
    IRQ_INFO,
    REGION_INFO,
    RESET,
    Program,
)

# --- 11.1


def test_devices_11_1_nothing_but_bind_before_bind(p: Program) -> None:
    fd = p.cdev(ALONE)
    for cmd in (*(c for c in range(0x3B64, 0x3B7B) if c != BIND), 0x3B80, 0x1234):
        assert p.call(fd, cmd, bytearray(64)) == "EINVAL", hex(cmd)
    assert p.read(fd, CONFIG, 4) == "EINVAL"
    assert p.write(fd, CONFIG, b"1234") == "EINVAL"
    with pytest.raises(OSError, match="not bound"):
        p.backend.mmap(fd, 4096, mmap.PROT_READ, mmap.MAP_SHARED, 0)


def test_devices_11_1_a_function_without_iommu_needs_raw_io(p: Program) -> None:
    p.machine.pci.add("0000:00:09.0", noiommu=True)
    p.backend.owner.pretended = 0
    assert p.open("/dev/vfio/devices/noiommu-vfio4") == "EPERM"
    p.backend.owner.pretended = 1 << CAP_SYS_RAWIO
    fd = p.open("/dev/vfio/devices/noiommu-vfio4")
    iommufd = p.iommufd()
    assert p.bind(fd, iommufd) == 1
    ioas = p.ioas(iommufd)
    assert p.attach(fd, ioas) == 3


def test_devices_11_1_a_device_that_left(p: Program) -> None:
    device = p.machine.pci[ALONE]
    fd = p.cdev(ALONE)
    p.machine.pci.remove(ALONE)
    assert p.open("/dev/vfio/devices/vfio0") == "ENOENT"
    assert not device.registered
    assert p.bind(fd, p.iommufd()) == "ENODEV"  # devices 11.2 row 11


# --- 11.2


def test_devices_11_2_rows_1_to_4(p: Program) -> None:
    fd, iommufd = p.cdev(ALONE), p.iommufd()
    assert p.call(fd, BIND, BAD) == "EFAULT"  # row 1
    for argsz in (0, 11, 12, 15):  # row 2
        assert p.ask(fd, BIND, "IIiIQ", argsz, 0, iommufd, 0, 0) == "EINVAL"
    assert p.ask(fd, BIND, "IIiIQQ", 32, 0, iommufd, 0, 0, 1 << 56) == "E2BIG"  # row 3
    assert p.ask(fd, BIND, "IIiIQ", 32, 0, iommufd, 0, 0) == "EFAULT"
    for flags, number in ((2, iommufd), (3, iommufd), (1 << 31, iommufd), (0, -1), (0, -(2**31))):  # row 4
        assert p.ask(fd, BIND, "IIiIQ", 24, flags, number, 0, 0) == "EINVAL"
    assert p.ask(fd, BIND, "IIiIQQ", 32, 0, iommufd, 0, 0, 0) == (32, 0, iommufd, 1, 0, 0)


def test_devices_11_2_rows_6_and_15_group_and_cdev_exclude_each_other(p: Program) -> None:
    iommufd, group = p.iommufd(), p.group(FIRST)
    fd = p.cdev(FIRST)
    assert p.bind(fd, iommufd) == "EBUSY"
    p.close(group)
    assert p.bind(fd, iommufd) == 1
    assert p.group(FIRST) == "EBUSY"
    assert p.group(SECOND) == "EBUSY"  # it is one group
    p.close(fd)
    assert isinstance(p.group(FIRST), int)


def test_devices_11_2_rows_7_and_10_bound_once(p: Program) -> None:
    iommufd = p.iommufd()
    fd, other = p.cdev(ALONE), p.cdev(ALONE)
    assert p.bind(fd, iommufd) == 1
    assert p.bind(fd, iommufd) == "EINVAL"
    assert p.bind(other, iommufd) == "EINVAL"
    p.close(fd)
    assert p.bind(other, iommufd) == 1


def test_devices_11_2_row_8_tokens(p: Program) -> None:
    fd, iommufd = p.cdev(ALONE), p.iommufd()
    token = ctypes.create_string_buffer(b"\x11" * 16)
    assert p.ask(fd, BIND, "IIiIQ", 24, 1, iommufd, 0, ctypes.addressof(token)) == "EINVAL"
    assert p.ask(fd, BIND, "IIiIQ", 24, 1, iommufd, 0, BAD) == "EFAULT"
    assert p.ask(fd, BIND, "IIiIQ", 16, 1, iommufd, 0, ctypes.addressof(token)) == "EFAULT"  # it is not looked at
    assert p.ask(fd, BIND, "IIiIQ", 24, 1, 9999, 0, ctypes.addressof(token)) == "EINVAL"  # before row 9


def test_devices_11_2_row_9_the_descriptor(p: Program) -> None:
    fd = p.cdev(ALONE)
    assert p.bind(fd, 9999) == "EBADF"
    assert p.bind(fd, 0) == "EBADFD"
    assert p.bind(fd, fd) == "EBADFD"
    container = p.open("/dev/vfio/vfio")
    assert p.bind(fd, container) == 1  # an iommufd like any other


def test_devices_11_2_row_12_the_binds_own_errors(p: Program) -> None:
    mine, yours = p.iommufd(), p.iommufd()
    first, _ = p.bound(FIRST, mine)
    second = p.cdev(SECOND)
    assert p.bind(second, yours) == "EPERM"  # the group is owned
    assert p.bind(second, mine) == 2
    p.close(first)
    p.close(second)
    second = p.cdev(SECOND)
    assert p.bind(second, yours) == 1
    unsafe = p.machine.pci.add("0000:03:00.0", isolated_msi=False)
    fd = p.cdev(unsafe.name)
    assert p.bind(fd, mine) == "EPERM"
    p.machine.world.allow_unsafe_interrupts = True
    assert p.bind(fd, mine) == 1


def test_devices_11_2_row_13_a_model_that_refuses(p: Program) -> None:
    class Refuses(Edu):
        def opened(self) -> None:
            raise KernelError(errno.EIO, "not today")

    p.machine.pci.add("0000:03:00.0", EDU, model=Refuses)
    fd, iommufd = p.cdev("0000:03:00.0"), p.iommufd()
    assert p.bind(fd, iommufd) == "EIO"
    assert len(p.context(iommufd).objects) == 0
    assert p.context(iommufd).references == 1
    assert isinstance(p.group("0000:03:00.0"), int)


def test_devices_11_2_row_14_an_answer_that_cannot_be_written_unbinds(p: Program) -> None:
    page = mmap.mmap(-1, 4096)
    iommufd = p.iommufd()
    page.write(struct.pack("<IIiI", 16, 0, iommufd, 0))
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), 4096, mmap.PROT_READ)
    fd = p.cdev(ALONE)
    assert p.call(fd, BIND, address) == "EFAULT"
    assert len(p.context(iommufd).objects) == 0
    assert p.call(fd, GET_INFO, bytearray(24)) == "EINVAL"  # no access
    group = p.group(ALONE)
    assert isinstance(group, int)  # and the group is free
    p.backend.close(group)
    assert p.bind(fd, iommufd) == 1


def test_devices_11_2_before_tokens(p: Program) -> None:
    machine = Machine("old", kernel=(6, 12))
    machine.pci.add(ALONE, EDU, model=Edu)
    old = Program(machine)
    fd, iommufd = old.cdev(ALONE), old.iommufd()
    assert old.ask(fd, BIND, "IIiIQ", 24, 1, iommufd, 0, 0) == "EINVAL"
    assert old.ask(fd, BIND, "IIiIQ", 4096, 0, iommufd, 0, 5)[3] == 1  # what is behind the struct is not looked at
    assert old.ask(fd, ATTACH, "IIII", 16, 1, 2, 5) == "EINVAL"  # nor are there PASIDs
    old.close_all()


def test_devices_11_before_cdevs() -> None:
    machine = Machine("older", kernel=(6, 5))
    machine.pci.add(ALONE, EDU, model=Edu)
    assert not any(path.startswith("/dev/vfio/devices") for path in machine.paths())
    assert "/dev/vfio/0" in machine.paths()
    machine.close()


# --- 11.3, 11.4


@pytest.fixture
def iommufd(p: Program) -> int:
    return p.iommufd()


@pytest.fixture
def ioas(p: Program, iommufd: int) -> int:
    return p.ioas(iommufd)


def test_devices_11_3_rows_1_to_3_and_5(p: Program, iommufd: int, ioas: int) -> None:
    fd, _ = p.bound(ALONE, iommufd)
    assert p.call(fd, ATTACH, BAD) == "EFAULT"
    for argsz, flags, answer in (
        (0, 0, "EINVAL"),
        (8, 0, "EINVAL"),
        (11, 0, "EINVAL"),
        (16, 2, "EINVAL"),
        (12, 1, "EINVAL"),
    ):
        assert p.ask(fd, ATTACH, "IIII", argsz, flags, ioas, 5) == answer
    assert p.ask(fd, ATTACH, "III", 16, 1, ioas) == "EFAULT"  # the PASID cannot be read
    for argsz in (12, 13, 16, 1000):
        assert p.ask(fd, ATTACH, "III", argsz, 0, ioas)[2] == 3


def test_devices_11_3_row_6_attach_and_replace(p: Program, iommufd: int, ioas: int) -> None:
    fd, dev = p.bound(ALONE, iommufd)
    assert p.attach(fd, 99) == "ENOENT"
    assert p.attach(fd, dev) == "EINVAL"
    automatic = p.attach(fd, ioas)
    assert p.attach(fd, ioas) == automatic  # a replace that changes nothing
    mine = p.hwpt(iommufd, dev, ioas)
    assert p.attach(fd, mine) == mine
    assert p.destroy(iommufd, automatic) == "ENOENT"  # it went with its last user
    assert p.destroy(iommufd, mine) == "EBUSY"
    assert p.detach(fd) == 0
    assert p.detach(fd) == 0  # devices 11.4 row 6
    assert p.destroy(iommufd, mine) == 0


def test_devices_11_3_what_the_hardware_uses(p: Program, iommufd: int, ioas: int) -> None:
    """Blocked from bind to attach and after detach; the page table of the HWPT in between; identity when unbound."""
    device = p.machine.pci[ALONE].device
    driver = p.machine.pci.driver
    assert driver.domain_of(device) is driver.identity_domain
    fd, dev = p.bound(ALONE, iommufd)
    assert driver.domain_of(device) is driver.blocked_domain
    memory = mmap.mmap(-1, 1 << 16)
    va = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert p.map(iommufd, ioas, va, 1 << 16, 0x100000) == 0
    p.attach(fd, p.hwpt(iommufd, dev, ioas))
    domain = driver.domain_of(device)
    memory[0x1234:0x1238] = b"here"
    assert isinstance(domain, ExtentDomain)
    phys = domain.iova_to_phys(0x101234)
    assert p.machine.world.physical.read(phys, 4) == b"here"
    p.detach(fd)
    assert driver.domain_of(device) is driver.blocked_domain
    p.close(fd)
    assert driver.domain_of(device) is driver.identity_domain


def test_devices_3_8_the_interrupt_window_is_reserved_while_attached(p: Program, iommufd: int, ioas: int) -> None:
    fd, _ = p.bound(ALONE, iommufd)
    (table,) = (o.io_pagetable for o in p.context(iommufd).objects if isinstance(o, IOAS) and o.id == ioas)
    p.attach(fd, ioas)
    assert table.usable() == ([(0, 0xFEDFFFFF), (0xFEF00000, 2**48 - 1)], 4096)
    p.detach(fd)
    assert table.usable() == ([(0, 2**64 - 1)], 1)


def test_devices_11_3_pasid_numbers(p: Program, iommufd: int, ioas: int) -> None:
    fd, dev = p.bound(NETWORK, iommufd)
    hwpt = p.hwpt(iommufd, dev, ioas, 8)
    assert p.attach(fd, hwpt, 2**31) == "ENOSPC"
    assert p.attach(fd, hwpt, 2**32 - 1) == "ENOSPC"
    assert p.attach(fd, hwpt, 2**32 - 22) == "EINVAL"
    assert p.attach(fd, hwpt, 1 << 16) == "EINVAL"  # the device has no more
    assert p.attach(fd, hwpt, (1 << 16) - 1) == hwpt


def test_devices_11_3_pasids_attach_replace_detach(p: Program, iommufd: int, ioas: int) -> None:
    fd, dev = p.bound(NETWORK, iommufd)
    core, driver = p.machine.pci[NETWORK].device, p.machine.pci.driver
    plain, one, two = p.hwpt(iommufd, dev, ioas), p.hwpt(iommufd, dev, ioas, 8), p.hwpt(iommufd, dev, ioas, 8)
    assert p.attach(fd, plain, 5) == "EINVAL"  # not made for PASIDs (3.9)
    assert p.attach(fd, one, 5) == one
    assert p.attach(fd, two, 5) == two
    assert p.attach(fd, one, 6) == one
    assert driver.domain_of(core, 5) is not driver.domain_of(core, 6)
    assert p.attach(fd, plain) == "EINVAL"  # nor may the RID use such a one beside PASIDs
    assert p.attach(fd, one) == one
    assert p.detach(fd, 5) == 0
    assert p.detach(fd, 5) == 0
    assert driver.domain_of(core, 5) is driver.blocked_domain
    assert p.destroy(iommufd, two) == 0
    assert p.destroy(iommufd, one) == "EBUSY"


def test_devices_11_3_pasid_0_is_the_rid_under_another_name(p: Program, iommufd: int, ioas: int) -> None:
    fd, dev = p.bound(NETWORK, iommufd)
    hwpt = p.hwpt(iommufd, dev, ioas, 8)
    assert p.attach(fd, hwpt) == hwpt
    assert p.attach(fd, hwpt, 0) == "EBUSY"
    p.detach(fd)
    assert p.attach(fd, hwpt, 0) == hwpt
    assert p.detach(fd) == 0  # it is not the RID that VFIO remembers
    assert p.destroy(iommufd, hwpt) == "EBUSY"
    assert p.detach(fd, 0) == 0
    assert p.destroy(iommufd, hwpt) == 0


def test_devices_11_3_row_7_a_failed_answer_detaches_the_rid(p: Program, iommufd: int, ioas: int) -> None:
    fd, dev = p.bound(NETWORK, iommufd)
    rid, other = p.hwpt(iommufd, dev, ioas, 8), p.hwpt(iommufd, dev, ioas, 8)
    p.attach(fd, rid)
    page = mmap.mmap(-1, 4096)
    page.write(struct.pack("<IIII", 16, 1, other, 9))
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), 4096, mmap.PROT_READ)
    assert p.call(fd, ATTACH, address) == "EFAULT"
    assert p.destroy(iommufd, rid) == 0  # the RID, though a PASID was meant
    assert p.destroy(iommufd, other) == "EBUSY"  # which stays attached


def test_devices_11_4_rows_1_to_3_and_5(p: Program, iommufd: int) -> None:
    fd, _ = p.bound(ALONE, iommufd)
    assert p.call(fd, DETACH, BAD) == "EFAULT"
    for argsz, flags, answer in (
        (0, 0, "EINVAL"),
        (7, 0, "EINVAL"),
        (8, 2, "EINVAL"),
        (8, 1, "EINVAL"),
        (11, 1, "EINVAL"),
    ):
        assert p.ask(fd, DETACH, "III", argsz, flags, 5) == answer
    assert p.ask(fd, DETACH, "II", 12, 1) == "EFAULT"
    for argsz in (8, 9, 100):
        assert p.ask(fd, DETACH, "II", argsz, 0) == (argsz, 0)


# --- 11.5


def test_devices_11_5_close_gives_everything_back(p: Program, iommufd: int, ioas: int) -> None:
    fd, dev = p.bound(NETWORK, iommufd)
    hwpt = p.hwpt(iommufd, dev, ioas, 8)
    p.attach(fd, hwpt)
    for pasid in (7, 3, 9):
        p.attach(fd, hwpt, pasid)
    p.set_config(fd, 0x10, 0x12340000, 4)
    p.close(fd)
    context = p.context(iommufd)
    assert [o.kind for o in context.objects] == ["IOAS", "HWPT_PAGING"]
    assert context.references == 1
    core = p.machine.pci[NETWORK].device
    assert core.group is not None
    assert (core.group.owner_cnt, core.group.handles) == (0, {})
    assert p.destroy(iommufd, hwpt) == 0
    fd, _ = p.bound(NETWORK, iommufd)
    assert p.config(fd, 0x10, 4) == p.machine.pci[NETWORK].function.addresses[0]


def test_devices_1_5_a_bound_device_keeps_the_context(p: Program, iommufd: int, ioas: int) -> None:
    fd, _ = p.bound(ALONE, iommufd)
    context = p.context(iommufd)
    p.close(iommufd)
    assert isinstance(p.attach(fd, ioas), int)
    assert len(context.objects) == 3
    p.close(fd)
    assert context.references == 0
    assert len(context.objects) == 0


# --- what the driver answers


def test_get_info(p: Program, iommufd: int) -> None:
    for address, flags in ((ALONE, 2), (NETWORK, 3)):
        fd, _ = p.bound(address, iommufd)
        for argsz in (0, 15):
            assert p.ask(fd, GET_INFO, "IIIIII", argsz, 1, 2, 3, 4, 5) == "EINVAL"
        assert p.ask(fd, GET_INFO, "IIIIII", 16, 1, 2, 3, 4, 5) == (16, flags, 9, 5, 4, 5)
        assert p.ask(fd, GET_INFO, "IIIIII", 20, 1, 2, 3, 4, 5) == (20, flags, 9, 5, 0, 5)
        assert p.ask(fd, GET_INFO, "IIIIII", 24, 1, 2, 3, 4, 5) == (24, flags, 9, 5, 0, 0)
        assert p.ask(fd, GET_INFO, "IIIIIII", 100, 1, 2, 3, 4, 5, 6) == (100, flags, 9, 5, 0, 0, 6)
        assert p.call(fd, GET_INFO, BAD) == "EFAULT"


def test_region_info(p: Program, iommufd: int) -> None:
    def info(fd: int, index: int) -> object:
        answer = p.ask(fd, REGION_INFO, "IIIIQQ", 32, 0xAA, index, 0xBB, 0xCC, 0xDD)
        if not isinstance(answer, tuple):
            return answer
        assert answer[5] == index << 40
        return answer[:2] + answer[3:5]

    fd, _ = p.bound(ALONE, iommufd)
    assert info(fd, 0) == (32, 3, 0xBB, 1 << 20)  # registers of a model cannot be mapped
    for index in range(1, 7):
        assert info(fd, index) == (32, 0, 0xBB, 0)
    assert info(fd, 7) == (32, 3, 0xBB, 256)
    fd, _ = p.bound(NETWORK, iommufd)
    assert [info(fd, index) for index in range(8)] == [
        (32, 7, 0xBB, 1 << 17),
        (32, 3, 0xBB, 1 << 17),
        (32, 3, 0xBB, 32),
        (40, 15, 0, 1 << 14),  # has a capability, for which there is no room
        (32, 0, 0xBB, 0),
        (32, 0, 0xBB, 0),
        (32, 1, 0xBB, 1 << 18),
        (32, 3, 0xBB, 4096),
    ]
    assert [info(fd, index) for index in (8, 9, 2**32 - 1)] == ["EINVAL"] * 3
    assert p.ask(fd, REGION_INFO, "IIIIQQ", 31, 0, 0, 0, 0, 0) == "EINVAL"


def test_region_info_says_that_the_msix_bar_can_be_mapped(p: Program, iommufd: int) -> None:
    fd, _ = p.bound(NETWORK, iommufd)
    short = p.ask(fd, REGION_INFO, "IIIIQQQ", 39, 0, 3, 7, 0, 0, 0xEE)
    assert short == (40, 15, 3, 0, 1 << 14, 3 << 40, 0xEE)
    whole = p.ask(fd, REGION_INFO, "IIIIQQHHIQ", 48, 0, 3, 7, 0, 0, 0, 0, 0, 0xEE)
    assert whole == (48, 15, 3, 32, 1 << 14, 3 << 40, 3, 1, 0, 0xEE)


def test_irq_info(p: Program, iommufd: int) -> None:
    def info(fd: int, index: int) -> object:
        answer = p.ask(fd, IRQ_INFO, "IIII", 16, 0xAA, index, 0xBB)
        return answer[1::2] if isinstance(answer, tuple) else answer

    fd, _ = p.bound(ALONE, iommufd)
    assert [info(fd, i) for i in range(6)] == [(7, 1), (9, 1), (9, 0), (9, 1), (9, 1), "EINVAL"]
    fd, _ = p.bound(NETWORK, iommufd)
    assert [info(fd, i) for i in range(6)] == [(7, 1), (9, 1), (1, 5), (9, 1), (9, 1), "EINVAL"]
    assert p.ask(fd, IRQ_INFO, "IIII", 15, 0, 0, 0) == "EINVAL"


def test_unknown_commands(p: Program, iommufd: int) -> None:
    fd, _ = p.bound(ALONE, iommufd)
    for cmd in (0x3B64, 0x3B65, 0x3B67, 0x3B6A, 0x3B72, 0x3B73, 0x3B74, 0x3B79, 0x3B80, 0x1234):
        assert p.call(fd, cmd, bytearray(64)) == "ENOTTY", hex(cmd)


def test_configuration_space_is_a_region(p: Program, iommufd: int) -> None:
    fd, _ = p.bound(ALONE, iommufd)
    assert p.read(fd, CONFIG, 4) == bytes.fromhex("3412e811")
    assert p.read(fd, CONFIG + 1, 2) == bytes.fromhex("12e8")
    assert len(p.read(fd, CONFIG, 256)) == 256
    for at, count in ((252, 8), (256, 1), (0, 257), (2**40 - 1, 1)):
        assert p.read(fd, CONFIG + at, count) == "EFAULT"
        assert p.write(fd, CONFIG + at, bytes(count)) == "EFAULT"
    assert p.read(fd, CONFIG + 256, 0) == b""
    assert p.write(fd, CONFIG, b"\xff" * 8) == 8
    assert p.config(fd, 0, 8) == 0x00100507_11E81234


def test_bars_are_regions(p: Program, iommufd: int) -> None:
    fd, _ = p.bound(ALONE, iommufd)
    size = 1 << 20
    for at, count, answer in (
        (0, 4, "ed000001"),
        (0, 8, "ff" * 8),
        (1, 4, "00000000"),
        (size - 4, 8, "00000000"),  # short
    ):
        assert p.read(fd, at, count).hex() == answer
    for at in (size, size + 4096, 1 << 40, 6 << 40, 8 << 40, 9 << 40, 1 << 62):
        assert p.read(fd, at, 4) == "EINVAL"
        assert p.write(fd, at, b"1234") == "EINVAL"
    assert p.read(fd, size, 0) == b""
    assert p.write(fd, size - 4, bytes(8)) == 4


def test_memory_does_not_answer_when_it_is_disabled(p: Program, iommufd: int) -> None:
    fd, _ = p.bound(NETWORK, iommufd)
    p.set_config(fd, 4, 0, 2)
    for region in (0, 1, 6):
        assert p.read(fd, region << 40, 4) == "EIO"
    assert p.write(fd, 0, b"1234") == "EIO"
    table = 3 << 40  # 80 bytes that are VFIO's: no access to the device
    assert (p.read(fd, table, 80), p.read(fd, table + 72, 8)) == (b"\xff" * 80, b"\xff" * 8)
    assert [p.read(fd, table + 76, 8), p.read(fd, table + 80, 4), p.write(fd, table + 80, b"1234")] == ["EIO"] * 3
    assert p.write(fd, table, b"1234") == 4
    assert p.read(fd, 2 << 40, 4) == b"\xff" * 4  # ports are something else
    p.set_config(fd, 4, 2, 2)
    assert p.read(fd, 6 << 40, 4) == b"\x55\xaa\0\0"
    assert p.write(fd, 6 << 40, b"1") == "EINVAL"
    p.set_config(fd, p.machine.pci[NETWORK].function.config.pm_at + 4, 3, 2)
    assert p.read(fd, 0, 4) == "EIO"  # asleep


def test_memory_can_be_mapped(p: Program, iommufd: int) -> None:
    fd, _ = p.bound(NETWORK, iommufd)
    shared, both = mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE
    assert p.write(fd, 0x100, b"before") == 6
    view = p.backend.mmap(fd, 1 << 17, both, shared, 0)
    assert bytes(view[0x100:0x106]) == b"before"
    view[0x2000:0x2005] = b"after"
    assert p.read(fd, 0x2000, 5) == b"after"
    part = p.backend.mmap(fd, 4096, both, shared, 0x2000)
    assert bytes(part[:5]) == b"after"
    for length, flags, offset in (
        (4096, mmap.MAP_PRIVATE, 0),
        (8192, shared, (1 << 17) - 4096),
        (4096, shared, 1 << 17),
        (4096, shared, 1 << 40),  # registers
        (4096, shared, 2 << 40),  # ports
        (4096, shared, 6 << 40),
        (4096, shared, CONFIG),
        (4096, shared, 9 << 40),
    ):
        with pytest.raises(OSError, match="cannot be mapped") as caught:
            p.backend.mmap(fd, length, both, flags, offset)
        assert caught.value.errno == 22


def test_a_mapping_holds_the_device(p: Program, iommufd: int) -> None:
    fd, _ = p.bound(NETWORK, iommufd)
    view = p.backend.mmap(fd, 4096, mmap.PROT_READ, mmap.MAP_SHARED, 0)
    p.close(fd)
    other = p.cdev(NETWORK)
    assert p.bind(other, iommufd) == "EINVAL"
    view.release()
    del view
    assert isinstance(p.bind(other, iommufd), int)


def test_the_msix_table_is_not_the_owners(p: Program, iommufd: int) -> None:
    fd, _ = p.bound(NETWORK, iommufd)
    assert p.write(fd, 3 << 40, b"\x11" * 0x58) == 0x58
    assert p.read(fd, 3 << 40, 0x58) == b"\xff" * 0x50 + b"\x11" * 8


@pytest.mark.parametrize("by", ["ioctl", "express"])
def test_reset(p: Program, iommufd: int, by: str) -> None:
    fd, _ = p.bound(NETWORK, iommufd)
    p.write(fd, 0x40, b"gone")
    p.set_config(fd, 0x10, 0x12340000, 4)
    p.set_config(fd, 0x3C, 0x55, 1)
    if by == "ioctl":
        assert p.call(fd, RESET) == 0
    else:
        p.set_config(fd, p.machine.pci[NETWORK].function.config.express_at + 8, 0x8000, 2)
    assert p.read(fd, 0x40, 4) == bytes(4)
    assert (p.config(fd, 0x10, 4), p.config(fd, 0x3C, 1)) == (0x12340000, 0x55)  # those are put back


def test_reset_wakes(p: Program, iommufd: int) -> None:
    fd, _ = p.bound(NETWORK, iommufd)
    config = p.machine.pci[NETWORK].function.config
    p.set_config(fd, config.pm_at + 4, 3, 2)
    assert config.power_state == 3
    assert p.call(fd, RESET) == 0
    assert config.power_state == 0


def test_reset_of_what_cannot_be_reset(p: Program, iommufd: int) -> None:
    fd, _ = p.bound(ALONE, iommufd)
    assert p.call(fd, RESET) == "EINVAL"


def test_open_modes(p: Program, iommufd: int) -> None:
    fd = p.open("/dev/vfio/devices/vfio3", os.O_RDONLY)
    assert isinstance(p.bind(fd, iommufd), int)
    for prot, number in ((mmap.PROT_READ, 22), (mmap.PROT_READ | mmap.PROT_WRITE, 13)):
        with pytest.raises(OSError, match=r"mapped|O_RDONLY") as caught:
            p.backend.mmap(fd, 4096, prot, mmap.MAP_SHARED, 0)
        assert caught.value.errno == number


def test_what_the_vfs_decides(p: Program, iommufd: int) -> None:
    """Before the device is asked, bound or not."""
    writer, both = p.open("/dev/vfio/devices/vfio3", os.O_WRONLY), p.cdev(NETWORK)
    for fd, offset, flags, number in (
        (writer, 0, mmap.MAP_SHARED, errno.EACCES),
        (writer, 0, mmap.MAP_PRIVATE, errno.EACCES),
        (writer, 2**64 - 4096, mmap.MAP_SHARED, errno.EOVERFLOW),
        (both, 2**64 - 4096, mmap.MAP_SHARED, errno.EOVERFLOW),
        (both, 2**64 - 8192, mmap.MAP_SHARED, errno.EINVAL),
    ):
        with pytest.raises(OSError, match=r"map|offset|bound") as caught:
            p.backend.mmap(fd, 4096, mmap.PROT_READ, flags, offset)
        assert caught.value.errno == number
    assert p.open("/dev/vfio/devices/vfio3", os.O_RDWR | os.O_DIRECT) == "EINVAL"
    p.bind(writer, iommufd)
    with pytest.raises(OSError, match="reading"):
        p.backend.read(writer, 4, CONFIG)
    p.close(writer)
    reader = p.open("/dev/vfio/devices/vfio3", os.O_RDONLY)
    with pytest.raises(OSError, match="writing"):
        p.backend.write(reader, b"", CONFIG)
    group = p.group(NETWORK)
    assert p.open(f"/dev/vfio/{p.machine.pci[NETWORK].group.node}", os.O_RDWR | os.O_DIRECT) == "EBUSY"
    p.close(group)


def test_links_and_positions(p: Program, iommufd: int) -> None:
    fd, _ = p.bound(ALONE, iommufd)
    assert p.file(fd).link == "/dev/vfio/devices/vfio0"
    assert [p.backend.read(fd, 4) for _ in range(2)] == [b"\xed\0\0\1", bytes(4)]


def test_another_iommu(p: Program, iommufd: int, ioas: int) -> None:
    """An IOMMU that tracks dirty pages and has no PASIDs, beside the machine's own."""
    driver = PciBasicDriver(dirty=True, max_pasids=0, enforces_coherency=False)
    p.machine.pci.add("0000:04:00.0", NIC, driver=driver, pasids=16)
    fd, dev = p.bound("0000:04:00.0", iommufd)
    assert isinstance(p.hwpt(iommufd, dev, ioas, 2), int)
    assert p.hwpt(iommufd, dev, ioas, 8) == "EOPNOTSUPP"
    fd, dev = p.bound(NETWORK, iommufd)
    assert p.hwpt(iommufd, dev, ioas, 2) == "EOPNOTSUPP"
    assert p.hwpt(iommufd, dev, ioas, 1) == "EOPNOTSUPP"
    p.close(fd)
