"""core 10 seen from VFIO: whatever fails inside, the device, the context and the hardware are as they were."""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Callable

import pytest

from iommufd.engine.fail import fail_rule, sweep
from iommufd.engine.ledger import Ledger, difference, take
from tests.vfio.conftest import FIRST, NETWORK, SECOND
from tests.vfio.program import ATTACH, Program
from tests.vfio.test_group import device_fd, set_container

SIZE = 1 << 16


@pytest.fixture
def iommufd(p: Program) -> int:
    return p.iommufd()


@pytest.fixture
def memory() -> mmap.mmap:
    return mmap.mmap(-1, SIZE)


@pytest.fixture
def ioas(p: Program, iommufd: int, memory: mmap.mmap) -> int:
    """An IOAS that maps something, so that attaching has to pin it."""
    made = p.ioas(iommufd)
    va = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert p.map(iommufd, made, va, SIZE, 0x100000) == 0
    return made


def owed(p: Program) -> Ledger:
    """What the machine owes, and what VFIO remembers of its devices."""
    ledger = take(p.machine.world, p.machine.contexts, [p.backend.owner.process])
    for slot in p.machine.pci.slots.values():
        device = slot.vfio
        assert device is not None
        ledger[f"{slot.address}: VFIO"] = (
            device.users,
            device.idev is not None,
            device.rid_attached,
            sorted(device.pasids),
            device.group.cdev_opens,
        )
        ledger[f"{slot.address}: hardware"] = id(p.machine.pci.driver.domain_of(slot.core))
        group = slot.core.group
        assert group is not None
        ledger[f"{slot.address}: claims"] = (group.owner_cnt, sorted(group.handles))
    return ledger


def answers(p: Program, step: Callable[[], object]) -> list[object]:
    """What ``step`` answers when its first, second, ... point fails, until it succeeds; what fails changes nothing."""
    found: list[object] = []
    for shot in sweep(p.machine.world):
        before = owed(p)
        answer = step()
        if not shot.fired:
            assert not isinstance(answer, str), answer
            return found
        assert isinstance(answer, str), f"point {shot.nth} failed and nobody noticed"
        assert difference(before, owed(p)) == [], f"point {shot.nth}: {answer}"
        found.append(answer)
    return found


def test_bind(p: Program, iommufd: int) -> None:
    fd = p.cdev(NETWORK)
    assert answers(p, lambda: p.bind(fd, iommufd)) == []  # it looks nothing up


def test_attach_to_an_ioas(p: Program, iommufd: int, ioas: int) -> None:
    fd, _ = p.bound(NETWORK, iommufd)
    met = answers(p, lambda: p.attach(fd, ioas))
    assert met == ["ENOENT", "EINVAL", "ENOMEM", "ENOMEM", "EFAULT", "ENOMEM"]


def test_replace(p: Program, iommufd: int, ioas: int, memory: mmap.mmap) -> None:
    fd, dev = p.bound(NETWORK, iommufd)
    p.attach(fd, ioas)
    other = p.ioas(iommufd)
    p.map(iommufd, other, ctypes.addressof(ctypes.c_char.from_buffer(memory)), SIZE, 0x200000)
    assert answers(p, lambda: p.attach(fd, other)) == ["ENOENT", "ENOMEM", "ENOMEM", "EFAULT", "ENOMEM", "EINVAL"]
    hwpt = p.hwpt(iommufd, dev, ioas)
    assert answers(p, lambda: p.attach(fd, hwpt)) == ["ENOENT", "EINVAL"]


def test_attach_a_pasid(p: Program, iommufd: int, ioas: int) -> None:
    fd, dev = p.bound(NETWORK, iommufd)
    one, two = p.hwpt(iommufd, dev, ioas, 8), p.hwpt(iommufd, dev, ioas, 8)
    assert answers(p, lambda: p.attach(fd, one, 5)) == ["ENOENT"]
    assert answers(p, lambda: p.attach(fd, two, 5)) == ["ENOENT"]


def test_detach_and_close_never_fail(p: Program, iommufd: int, ioas: int) -> None:
    fd, _ = p.bound(NETWORK, iommufd)
    p.attach(fd, ioas)
    assert answers(p, lambda: p.detach(fd)) == []
    p.attach(fd, ioas)
    assert answers(p, lambda: p.close(fd)) == []


def test_the_group_path(p: Program, iommufd: int, ioas: int) -> None:
    p.set_compat(iommufd, ioas)
    group = p.group(FIRST)
    assert set_container(p, group, iommufd) == 0
    met = answers(p, lambda: device_fd(p, group, FIRST))
    assert set(met) == {"ENOENT", "EINVAL", "ENOMEM", "EFAULT"}
    assert answers(p, lambda: device_fd(p, group, SECOND)) == ["ENOENT", "EINVAL"]  # joins the page table there is


def test_a_rule_for_a_device_call(p: Program, iommufd: int, ioas: int) -> None:
    fd, _ = p.bound(NETWORK, iommufd)
    with fail_rule(p.machine.world, "VFIO_DEVICE_ATTACH_IOMMUFD_PT:nth=2:EBUSY") as rule:
        before = owed(p)
        p.attach(fd, ioas)
        p.detach(fd)
        assert p.attach(fd, ioas) == "EBUSY"
        assert difference(before, owed(p)) == []
    assert (rule.count, rule.hits) == (2, 1)
    with fail_rule(p.machine.world, "VFIO_DEVICE_ATTACH_IOMMUFD_PT:point=pin"):
        assert p.call(fd, ATTACH, bytearray(struct.pack("<III", 12, 0, ioas))) == "EFAULT"
