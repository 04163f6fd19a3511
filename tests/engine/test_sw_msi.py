"""Software MSI windows (devices.md 1.6)."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from iommufd.engine.sw_msi import sw_msi
from iommufd.iommu.driver import RegionType, ReservedRegion
from iommufd.uapi import iommufd as u
from tests.engine.flat_task import expect
from tests.engine.hardware import Bench

WINDOW = 0x8000000
DOORBELL = 0x0802_0040
PAGE = 4096


@pytest.fixture
def bench() -> Bench:
    bench = Bench()
    bench.driver.regions = {n: [ReservedRegion(WINDOW, 0x100000, RegionType.SW_MSI)] for n in "ab"}
    return bench


def doorbells(bench: Bench, hwpt: int) -> list[int]:
    domain: Any = bench.obj(hwpt).paging.domain
    return [domain.iova_to_phys(WINDOW + n * PAGE) for n in range(3)]


def test_nothing_is_translated_without_an_attach_or_a_window(bench: Bench) -> None:  # devices 1.6 steps 1, 2
    idev, plain = bench.bound("a"), bench.bound("c")
    assert sw_msi(bench.context, idev.device, DOORBELL) == DOORBELL
    plain.attach(bench.ioas())
    assert sw_msi(bench.context, plain.device, DOORBELL) == DOORBELL


def test_a_doorbell_page_gets_an_address_in_the_window(bench: Bench) -> None:  # devices 1.6 steps 3-5
    a, b = bench.bound("a"), bench.bound("b")
    one, two = a.attach(bench.ioas()), b.attach(bench.ioas())
    assert sw_msi(bench.context, a.device, DOORBELL) == WINDOW + 0x40
    assert sw_msi(bench.context, a.device, DOORBELL + 4) == WINDOW + 0x44
    assert sw_msi(bench.context, b.device, DOORBELL + PAGE) == WINDOW + PAGE + 0x40
    assert sw_msi(bench.context, b.device, DOORBELL) == WINDOW + 0x40  # the same page, the same address
    assert doorbells(bench, one) == [DOORBELL & -PAGE, 0, 0]
    assert doorbells(bench, two) == [DOORBELL & -PAGE, (DOORBELL & -PAGE) + PAGE, 0]


def test_used_doorbells_follow_the_device(bench: Bench) -> None:  # devices 3.2 step 5, 3.6 step 5
    idev = bench.bound("a")
    first = idev.attach(bench.ioas())
    sw_msi(bench.context, idev.device, DOORBELL)
    hwpt = bench.hwpt(idev, bench.ioas(), u.IOMMU_HWPT_ALLOC_NEST_PARENT)
    idev.replace(bench.nested(idev, hwpt))
    assert first not in bench.ids()
    assert doorbells(bench, hwpt) == [DOORBELL & -PAGE, 0, 0]  # into the nesting parent
    idev.detach()
    assert doorbells(bench, hwpt) == [DOORBELL & -PAGE, 0, 0]  # until the HWPT is freed
    other = idev.attach(bench.ioas())
    assert doorbells(bench, other) == [DOORBELL & -PAGE, 0, 0]


def test_a_context_has_64(bench: Bench) -> None:  # devices 1.6 step 3
    idev = bench.bound("a")
    idev.attach(bench.ioas())
    for n in range(64):
        assert sw_msi(bench.context, idev.device, DOORBELL + n * PAGE) == WINDOW + 0x40 + n * PAGE
    with expect(errno.EOVERFLOW):
        sw_msi(bench.context, idev.device, DOORBELL + 64 * PAGE)
    assert sw_msi(bench.context, idev.device, DOORBELL) == WINDOW + 0x40
