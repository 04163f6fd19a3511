"""core 4.14: IOAS_NOIOMMU_GET_PA."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from iommufd.engine.task import CAP_SYS_RAWIO
from iommufd.iommu.drivers.noiommu import NoiommuDriver
from iommufd.iommu.extent_domain import ExtentDomain
from iommufd.uapi import iommufd as u
from iommufd.uapi.declare import Struct
from tests.engine.fakes import ULMAX, Caller, TestDmaBuf, each

P = 4096


def get(ioas: int, iova: int, length: int = P, **more: int) -> u.iommu_ioas_noiommu_get_pa:
    return u.iommu_ioas_noiommu_get_pa(ioas_id=ioas, iova=iova, length=length, **more)


DRIVER = NoiommuDriver()


def noiommu() -> ExtentDomain:
    return ExtentDomain(0xFFFFFFFFFFFFF000, owner=DRIVER)


@pytest.fixture
def c() -> Caller:
    caller = Caller(caps=[CAP_SYS_RAWIO])
    caller.world.noiommu_driver = DRIVER
    return caller


def test_not_built() -> None:  # devices-9.3-0
    c = Caller()
    c.refuses(errno.EOPNOTSUPP, get(9, ULMAX, 0, flags=1))


def test_core_4_14_1(c: Caller) -> None:  # core-4.14-1, devices-9.3-1
    c.proc.caps.clear()
    c.refuses(errno.EPERM, get(9, ULMAX, 0, flags=1))


REFUSED: list[tuple[Any, ...]] = [
    ("core-4.14-2 devices-9.3-2-flags", errno.EOPNOTSUPP, lambda i: get(9, ULMAX, 0, flags=1)),
    ("core-4.14-2 devices-9.3-2-reserved", errno.EOPNOTSUPP, lambda i: get(9, ULMAX, 0, reserved=1)),
    ("core-4.14-3 devices-9.3-3", errno.EINVAL, lambda i: get(9, ULMAX, 0)),
    ("core-4.14-4 devices-9.3-4", errno.EOVERFLOW, lambda i: get(9, ULMAX)),
    ("core-4.14-5 devices-9.3-5", errno.ENOENT, lambda i: get(9, 0)),
    ("core-4.14-6 devices-9.3-6", errno.ENOENT, lambda i: get(i, 0)),
    ("core-4.14-8 devices-9.3-8-no-domain", errno.EOPNOTSUPP, lambda i: get(i, 0x1000)),
]


@pytest.mark.parametrize(("number", "row"), each(REFUSED))
def test_refused(c: Caller, number: int, row: Callable[[int], Struct]) -> None:
    ioas = c.ioas()
    c.map(ioas, 0x1000, P)
    c.refuses(number, row(ioas))


def test_core_4_14_8_is_about_the_storage_domain(c: Caller) -> None:  # core-4.14-8, devices-9.3-8
    """The first domain of the IOAS; another kind there refuses even if a no-IOMMU one is present."""
    ioas = c.ioas()
    other = c.add_domain(ioas)
    c.add_domain(ioas, noiommu())
    c.map(ioas, 0x1000, P)
    c.refuses(errno.EOPNOTSUPP, get(ioas, 0x1000))
    c.table(ioas).remove_domain(other)
    c.do(get(ioas, 0x1000))


def test_core_4_14_7(c: Caller) -> None:  # core-4.14-7, devices-9.3-7
    ioas = c.ioas()
    c.add_domain(ioas, noiommu())
    buffer = TestDmaBuf(c.world, 4)
    c.proc.files[5] = lambda: buffer
    c.do(u.iommu_ioas_map_file(flags=7, ioas_id=ioas, fd=5, length=4 * P, iova=0x1000))
    out = c.do(get(ioas, 0x1004, 4 * P))
    assert out.length == 4 * P - 4
    buffer.revoke()
    c.refuses(errno.EINVAL, get(ioas, 0x1000))


def test_core_4_14_9(c: Caller) -> None:  # core-4.14-9, devices-9.3-9
    """Ordinary pages are never contiguous; the rest of the page, cut to what was asked."""
    ioas = c.ioas()
    domain = c.add_domain(ioas, noiommu())
    c.map(ioas, 0x10000, 4 * P)
    for at, asked, given in ((0x10000, ULMAX, P), (0x11234, P, P - 0x234), (0x11234, 8, 8), (0x13FFF, P, 1)):
        out = c.do(get(ioas, at, asked))
        assert (out.out_phys, out.length) == (domain.iova_to_phys(at), given)


def test_huge_pages_are_contiguous(c: Caller) -> None:
    c.host.map(0x4000_0000, 1024, kind="hugetlbfs", page_size=2 << 20)
    ioas = c.ioas()
    domain = c.add_domain(ioas, noiommu())
    c.map(ioas, 0x1000_0000, 4 << 20, 0x4000_0000)
    out = c.do(get(ioas, 0x1000_1000, ULMAX))
    assert (out.out_phys, out.length) == (domain.iova_to_phys(0x1000_1000), (2 << 20) - P)


def test_never_beyond_the_area(c: Caller) -> None:
    c.host.map(0x4000_0000, 1024, kind="hugetlbfs", page_size=2 << 20)
    ioas = c.ioas()
    c.add_domain(ioas, noiommu())
    c.map(ioas, 0x1000_0000, 2 * P, 0x4000_0000)
    c.map(ioas, 0x1000_2000, 2 * P, 0x4000_2000)
    assert c.do(get(ioas, 0x1000_0000, ULMAX)).length == 2 * P
