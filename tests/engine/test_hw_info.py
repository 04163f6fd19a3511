"""IOMMU_GET_HW_INFO (devices.md 5), by step."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from iommufd.iommu.driver import Capability, HwInfo
from iommufd.uapi import iommufd as u
from tests.engine.fakes import BUFFER
from tests.engine.hardware import Bench, PlainDriver

INFO = b"hardware"


@pytest.fixture
def bench() -> Bench:
    return Bench()


def info(dev_id: int, **fields: Any) -> u.iommu_hw_info:
    return u.iommu_hw_info(dev_id=dev_id, **fields)


def test_what_is_checked_first(bench: Bench) -> None:  # devices 5 steps 1-5
    idev = bench.bound()
    bench.refuses(errno.EOPNOTSUPP, info(99, flags=2))
    bench.refuses(errno.EOPNOTSUPP, info(99, reserved=b"\0\0\1"))
    bench.refuses(errno.ENOENT, info(99))
    bench.refuses(errno.ENOENT, info(bench.ioas()))
    bench.refuses(errno.EOPNOTSUPP, info(bench.noiommu().id))
    bench.do(info(idev.id))


def test_the_requested_type(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:  # devices 5 steps 3, 6, 7
    asked: list[int] = []

    def answers(device: object, requested: int) -> HwInfo:
        asked.append(requested)
        return HwInfo(0x99, INFO)

    monkeypatch.setattr(bench.driver, "hw_info", answers)
    idev = bench.bound()
    bench.do(info(idev.id, in_data_type=7))
    out = bench.do(info(idev.id, in_data_type=7, flags=u.IOMMU_HW_INFO_FLAG_INPUT_TYPE))
    assert (asked, out.out_data_type) == ([0, 7], 0x99)
    monkeypatch.setattr(bench.driver, "hw_info", lambda device, requested: HwInfo(0, INFO))
    bench.refuses(errno.EOPNOTSUPP, info(idev.id))


@pytest.mark.parametrize(("room", "wanted"), [(0, b""), (3, INFO[:3]), (8, INFO), (20, INFO + bytes(12))])
def test_the_copy(bench: Bench, room: int, wanted: bytes) -> None:  # devices 5 steps 9-11
    bench.host.poke(BUFFER, b"\xff" * 64)
    out = bench.do(info(bench.bound().id, data_len=room, data_uptr=BUFFER if room else 1))
    assert (out.data_len, bytes(bench.host.peek(BUFFER, 64))) == (8, wanted + b"\xff" * (64 - len(wanted)))


def test_a_buffer_that_is_not_there(bench: Bench) -> None:  # devices 5 steps 9, 10
    idev = bench.bound()
    bench.refuses(errno.EFAULT, info(idev.id, data_len=8, data_uptr=1))
    end = BUFFER + 0x400 * 4096
    bench.refuses(errno.EFAULT, info(idev.id, data_len=20, data_uptr=end - 12))
    assert bytes(bench.host.peek(end - 12, 8)) == INFO  # the information is there, the rest could not be zeroed
    bench.refuses(errno.EFAULT, info(idev.id, data_len=2**32 - 1, data_uptr=BUFFER))


def test_a_driver_without_information(bench: Bench) -> None:  # devices 5 step 8
    idev = bench.bound(driver=PlainDriver(bench.log))
    out = bench.do(info(idev.id, flags=1, in_data_type=0x1234, data_len=4, data_uptr=BUFFER))
    assert (out.data_len, out.out_data_type) == (0, 0)


def test_capabilities(bench: Bench) -> None:  # devices 5, output table
    idev = bench.bound(pasids=20)
    out = bench.do(info(idev.id))
    assert (out.out_capabilities, out.out_max_pasid_log2) == (1 | 8, 4)
    device = idev.device
    device.pasid_exec = device.pasid_priv = True
    assert bench.do(info(idev.id)).out_capabilities == 9  # not a PCI device
    device.pci = True
    bench.driver.capabilities.add(Capability.PCI_ATS_SUPPORTED)
    bench.driver.capabilities.discard(Capability.DIRTY_TRACKING)
    assert bench.do(info(idev.id)).out_capabilities == 2 | 4
    device.pasid_limit = 0
    out = bench.do(info(idev.id))
    assert (out.out_capabilities, out.out_max_pasid_log2) == (0, 0)


def test_the_shorter_struct(bench: Bench) -> None:  # devices 5
    bench.do(info(bench.bound().id, size=32))
