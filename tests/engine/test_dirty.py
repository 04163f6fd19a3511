"""IOMMU_HWPT_SET_DIRTY_TRACKING and GET_DIRTY_BITMAP (devices.md 6, core 8), by row."""

from __future__ import annotations

import errno

import pytest

from iommufd.engine.fail import fail_rule
from iommufd.errors import KernelError
from iommufd.iommu.bits import each_set
from iommufd.iommu.extent_domain import ExtentDomain
from iommufd.uapi import iommufd as u
from tests.engine.fakes import ARRAY, BUFFER
from tests.engine.hardware import Bench

PAGE = 4096
IOVA = 0x1000000
DIRTY = u.IOMMU_HWPT_ALLOC_DIRTY_TRACKING


class Rig(Bench):
    """16 pages in two touching areas, a gap, one page more; a HWPT that tracks."""

    def __init__(self) -> None:
        super().__init__()
        self.idev, self.io = self.bound(), self.ioas()
        self.number = self.hwpt(self.idev, self.io, DIRTY)
        domain = self.paging(self.number).domain
        assert isinstance(domain, ExtentDomain)
        self.domain = domain
        self.map(self.io, IOVA, 8 * PAGE)
        self.map(self.io, IOVA + 8 * PAGE, 8 * PAGE, va=BUFFER + 8 * PAGE)
        self.map(self.io, IOVA + 20 * PAGE, PAGE, va=BUFFER + 20 * PAGE)

    def tracking(self) -> bool:
        return self.domain.dirty_tracking

    def track(self, flags: int = 1, **fields: int) -> u.iommu_hwpt_set_dirty_tracking:
        return u.iommu_hwpt_set_dirty_tracking(flags=flags, **{"hwpt_id": self.number, **fields})

    def get(self, **fields: int) -> u.iommu_hwpt_get_dirty_bitmap:
        wanted = {"hwpt_id": self.number, "iova": IOVA, "length": 16 * PAGE, "page_size": PAGE, "data": ARRAY, **fields}
        return u.iommu_hwpt_get_dirty_bitmap(**wanted)

    def bits(self, **fields: int) -> list[int]:
        self.host.poke(ARRAY, bytes(64))
        self.do(self.get(**fields))
        return list(each_set(bytes(self.host.peek(ARRAY, 64)), 0, 512))


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_set_refuses(rig: Rig) -> None:  # core 8.1
    rig.refuses(errno.EOPNOTSUPP, rig.track(2, hwpt_id=99))
    rig.refuses(errno.ENOENT, rig.track(hwpt_id=99))
    rig.refuses(errno.ENOENT, rig.track(hwpt_id=rig.io))
    rig.refuses(errno.EOPNOTSUPP, rig.track(hwpt_id=rig.hwpt(rig.idev, rig.io)))
    rig.do(rig.track(reserved=7))  # never checked


def test_enabling_starts_clean_disabling_keeps(rig: Rig) -> None:  # core 8.1 row 4
    rig.do(rig.track())
    assert rig.tracking()
    rig.domain.mark_dirty(IOVA + PAGE)
    rig.domain.mark_dirty(IOVA + 20 * PAGE)
    rig.do(rig.track(0))
    assert not rig.tracking()
    assert rig.bits(flags=1) == [1]
    rig.do(rig.track())
    assert rig.bits() == []
    assert rig.bits(iova=IOVA + 20 * PAGE, length=PAGE) == []  # areas behind a gap too


def test_a_driver_that_cannot_read_its_state(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:  # devices 6.1 step 4
    def broken(*_: object, **__: object) -> None:
        raise KernelError(errno.EIO, "broken")

    monkeypatch.setattr(ExtentDomain, "read_and_clear_dirty", broken)
    rig.refuses(errno.EIO, rig.track())
    assert not rig.domain.dirty_tracking
    rig.do(rig.get())  # devices 6.2 step 10: errors are ignored


@pytest.mark.parametrize(
    ("number", "fields"),
    [
        (errno.EOPNOTSUPP, {"flags": 2, "hwpt_id": 99}),
        (errno.EOPNOTSUPP, {"reserved": 1, "hwpt_id": 99}),
        (errno.ENOENT, {"hwpt_id": 99, "length": 0}),
        (errno.EINVAL, {"length": 0, "iova": 1}),
        (errno.EOVERFLOW, {"iova": 2**64 - PAGE, "length": 2 * PAGE}),
        (errno.EINVAL, {"iova": IOVA + 0x800}),
        (errno.EINVAL, {"length": 0x800}),
        (errno.EINVAL, {"page_size": 0}),
        (errno.EINVAL, {"page_size": 2 * PAGE, "iova": IOVA + PAGE}),
        (errno.EINVAL, {"page_size": 2 * PAGE, "length": PAGE}),
    ],
)
def test_get_refuses(rig: Rig, number: int, fields: dict[str, int]) -> None:  # core 8.2
    rig.refuses(number, rig.get(**fields))


def test_range_errors_beat_a_hwpt_without_tracking(rig: Rig) -> None:  # core 8.2 row 8
    plain = rig.hwpt(rig.idev, rig.io)
    rig.refuses(errno.EINVAL, rig.get(hwpt_id=plain, page_size=0))
    rig.refuses(errno.EOPNOTSUPP, rig.get(hwpt_id=plain))


def test_no_memory_leaves_dirty_what_was(rig: Rig) -> None:
    rig.domain.mark_dirty(IOVA)
    with fail_rule(rig.world, "HWPT_GET_DIRTY_BITMAP:nth=1:ENOMEM"):
        rig.refuses(errno.ENOMEM, rig.get())
    assert rig.bits() == [0]


def test_bits_are_reported_and_cleaned(rig: Rig) -> None:  # core 8.2
    for page in (0, 3, 8, 15):
        rig.domain.mark_dirty(IOVA + page * PAGE)
    assert rig.bits(flags=1) == [0, 3, 8, 15]
    assert rig.bits(iova=IOVA + 2 * PAGE, length=4 * PAGE) == [1]
    assert rig.bits(page_size=2 * PAGE, flags=1) == [0, 4, 7]
    assert rig.bits(page_size=0x800, flags=1) == [0, 1, 16, 17, 30, 31]
    assert rig.bits() == [0, 8, 15]
    assert rig.bits() == []


def test_collection_stops_at_the_first_gap(rig: Rig) -> None:  # core 8.2 step 10
    rig.domain.mark_dirty(IOVA + 15 * PAGE)
    rig.domain.mark_dirty(IOVA + 20 * PAGE)
    assert rig.bits(length=32 * PAGE) == [15]
    assert rig.bits(iova=IOVA + 16 * PAGE, length=16 * PAGE) == []
    assert rig.bits(iova=IOVA + 20 * PAGE, length=PAGE) == [0]


def test_the_end_of_the_address_space(rig: Rig) -> None:  # core 8.2 row 5: end + 1 may wrap to 0
    rig.do(rig.get(iova=2**64 - PAGE, length=PAGE))


def test_unmapping_drops_the_state(rig: Rig) -> None:  # core 8.2, clearing
    rig.domain.mark_dirty(IOVA)
    rig.unmap(rig.io, IOVA, 8 * PAGE)
    rig.map(rig.io, IOVA, 8 * PAGE)
    assert rig.bits() == []


def test_a_bad_bitmap_is_no_error(rig: Rig) -> None:  # core 8.2 step 10
    rig.domain.mark_dirty(IOVA)
    rig.do(rig.get(data=0))
    assert rig.bits() == []  # cleaned all the same
