"""Page tables: dirty tracking, and a guest's tables on top."""

from __future__ import annotations

import errno
import mmap

import numpy as np
import pytest

import iommufd
from iommufd.testing.mock import APERTURE, MockDevice, invalidate_iotlb, iotlb_is, maps, mark_dirty, nested_data

PAGE = 4096


@pytest.fixture
def tracked(context: iommufd.Context, ioas: iommufd.IOAS, memory: mmap.mmap) -> iommufd.HWPT:
    """A HWPT that tracks; 8 mappings of a page each, then a hole of a page, then 4 more."""
    device = MockDevice(context, ioas)
    for i in [*range(8), *range(9, 13)]:
        ioas.map(memory, APERTURE + i * PAGE, PAGE, i * PAGE)
    table = ioas.alloc_hwpt(device, dirty_tracking=True)
    table.set_dirty_tracking(True)
    return table


def pages(dirty: object) -> list[int]:
    return [int(n) for n in np.flatnonzero(np.asarray(dirty))]


def test_dirty_pages(tracked: iommufd.HWPT) -> None:
    mark_dirty(tracked, APERTURE, [0, 3, 4, 7])
    seen = tracked.dirty_pages(APERTURE, 8 * PAGE, clear=False)
    assert seen.dtype == np.bool_ and seen.shape == (8,)
    assert pages(seen) == [0, 3, 4, 7]
    assert pages(tracked.dirty_pages(APERTURE + 2 * PAGE, 3 * PAGE, clear=False)) == [1, 2]
    assert pages(tracked.dirty_pages(APERTURE, 8 * PAGE, page_size=4 * PAGE, clear=False)) == [0, 1]
    assert pages(tracked.dirty_pages(APERTURE, PAGE, page_size=2048, clear=False)) == [0, 1]
    assert pages(tracked.dirty_pages(APERTURE, 8 * PAGE)) == [0, 3, 4, 7]
    assert pages(tracked.dirty_pages(APERTURE, 8 * PAGE)) == []


def test_dirty_ranges(tracked: iommufd.HWPT) -> None:
    mark_dirty(tracked, APERTURE, [0, 3, 4, 7])
    assert tracked.dirty_ranges(APERTURE, 8 * PAGE) == [
        (APERTURE, PAGE),
        (APERTURE + 3 * PAGE, 2 * PAGE),
        (APERTURE + 7 * PAGE, PAGE),
    ]
    assert tracked.dirty_ranges(APERTURE, 8 * PAGE) == []


def test_of_a_mapping(tracked: iommufd.HWPT) -> None:
    assert tracked.ioas is not None
    mapping = tracked.ioas.mappings[2]
    mark_dirty(tracked, mapping, [0])
    assert tracked.dirty_ranges(mapping, clear=False) == [(mapping.iova, PAGE)]
    assert pages(tracked.dirty_pages(mapping)) == [0]


def test_holes_are_clean_and_what_follows_is_not_lost(tracked: iommufd.HWPT) -> None:
    """The kernel alone would stop at the hole (core 8.2 row 10)."""
    mark_dirty(tracked, APERTURE, [7, 9, 12])
    assert pages(tracked.dirty_pages(APERTURE - 4 * PAGE, 32 * PAGE, clear=False)) == [11, 13, 16]
    assert pages(tracked.dirty_pages(APERTURE, 16 * PAGE, page_size=8 * PAGE, clear=False)) == [0, 1]
    assert pages(tracked.dirty_pages(APERTURE, 16 * PAGE)) == [7, 9, 12]
    assert pages(tracked.dirty_pages(APERTURE, 16 * PAGE)) == []


def test_starting_again_forgets(tracked: iommufd.HWPT) -> None:
    mark_dirty(tracked, APERTURE, [0])
    tracked.set_dirty_tracking(False)
    assert pages(tracked.dirty_pages(APERTURE, PAGE, clear=False)) == [0]
    tracked.set_dirty_tracking(True)
    assert pages(tracked.dirty_pages(APERTURE, PAGE)) == []


def test_a_large_entry_does_not_write_over_the_program(context: iommufd.Context, ioas: iommufd.IOAS) -> None:
    """The kernel may set bits behind the end of the bitmap; ours has room for them."""
    device = MockDevice(context, ioas)
    table = ioas.alloc_hwpt(device, dirty_tracking=True)
    table.set_dirty_tracking(True)
    ioas.map(mmap.mmap(-1, 1 << 20), APERTURE)
    mark_dirty(table, APERTURE, range(256))
    assert table.dirty_pages(APERTURE, PAGE, page_size=2048).tolist() == [True, True]


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((APERTURE,), TypeError, "an IOVA needs a length"),
        ((APERTURE, -1), ValueError, "length -1"),
        ((-APERTURE, 4096), ValueError, "iova -16777216"),
        (("0x1000", 4096), TypeError, "iova is a whole number, not str"),
    ],
)
def test_bad_ranges(tracked: iommufd.HWPT, arguments: tuple[int, ...], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        tracked.dirty_pages(*arguments)


def test_bad_sizes(tracked: iommufd.HWPT) -> None:
    for bad in (0, 3000):
        with pytest.raises(ValueError, match="not a power of two"):
            tracked.dirty_pages(APERTURE, PAGE, page_size=bad)
    for iova, length in ((APERTURE + 2048, PAGE), (APERTURE, 2048), (APERTURE, 0)):
        with pytest.raises(iommufd.IommufdError) as at:
            tracked.dirty_pages(iova, length)
        assert at.value.errno == errno.EINVAL


def test_without_dirty_tracking(context: iommufd.Context, ioas: iommufd.IOAS) -> None:
    table = ioas.alloc_hwpt(MockDevice(context, ioas))
    for call in (lambda: table.set_dirty_tracking(True), lambda: table.dirty_pages(APERTURE, PAGE)):
        with pytest.raises(iommufd.IommufdError) as at:
            call()
        assert at.value.errno == errno.EOPNOTSUPP
    with pytest.raises(iommufd.IommufdError) as at:
        ioas.alloc_hwpt(MockDevice(context, ioas, dirty=False), dirty_tracking=True)
    assert at.value.errno == errno.EOPNOTSUPP


# ------------------------------------------------------------------------------------------------------------- nesting


def test_nested(context: iommufd.Context, ioas: iommufd.IOAS, memory: mmap.mmap) -> None:
    mapping = ioas.map(memory, APERTURE)
    device = MockDevice(context, ioas)
    parent = ioas.alloc_hwpt(device, nest_parent=True)
    assert maps(parent, mapping, memory)
    assert not maps(parent, mapping, mmap.mmap(-1, len(memory)))
    nested = parent.alloc_nested(device, nested_data(0x55))
    assert nested.parent is parent
    assert device.replace(nested) is nested
    assert nested.invalidate([invalidate_iotlb(0), invalidate_iotlb(3)]) == 2
    assert [iotlb_is(nested, i, 0x55) for i in range(4)] == [False, True, True, False]
    assert nested.invalidate([]) == 0
    with pytest.raises(iommufd.IommufdError) as at:
        ioas.alloc_hwpt(device).alloc_nested(device, nested_data())
    assert at.value.errno == errno.EINVAL


def test_an_invalidation_that_stops_says_how_far_it_came(context: iommufd.Context, ioas: iommufd.IOAS) -> None:
    device = MockDevice(context, ioas)
    nested = ioas.alloc_hwpt(device, nest_parent=True).alloc_nested(device, nested_data(0x55))
    with pytest.raises(iommufd.InvalidationError) as at:
        nested.invalidate([invalidate_iotlb(1), invalidate_iotlb(2), invalidate_iotlb(4), invalidate_iotlb(3)])
    assert (at.value.errno, at.value.handled) == (errno.EINVAL, 2)
    assert [iotlb_is(nested, i, 0x55) for i in range(4)] == [True, False, False, True]
    with pytest.raises(iommufd.InvalidationError) as at:
        nested.invalidate([iommufd.VTDInvalidation()])
    assert (at.value.errno, at.value.handled) == (errno.EINVAL, 0)
    with pytest.raises(ValueError, match="of one kind"):
        nested.invalidate([invalidate_iotlb(1), iommufd.VTDInvalidation()])
    nested.close()
    with pytest.raises(iommufd.IommufdError, match="is gone"):
        nested.invalidate([invalidate_iotlb(0)])
