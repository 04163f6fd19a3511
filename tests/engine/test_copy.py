"""core 4.11: IOAS_COPY."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from iommufd.uapi import iommufd as u
from iommufd.uapi.declare import Struct
from tests.engine.fakes import BUFFER, ULMAX, Caller, copy_struct, each, frames_of, map_struct

R, W = u.IOMMU_IOAS_MAP_READABLE, u.IOMMU_IOAS_MAP_WRITEABLE
P = 4096


def syz(dst: int, src: int, n: int, offset: int = 0, flags: int = R) -> u.iommu_ioas_copy:
    return copy_struct(dst, src, offset << 32 | n, P, flags=flags | 1 << 16)


# s: the source, with areas [0x1000, 0x2fff] and [0x3000, 0x3fff] that touch, and [0x5000, 0x5fff], read-only;
# d: the destination, with an area [0x10000, 0x10fff]
REFUSED: list[tuple[Any, ...]] = [
    ("core-4.11-0-not-a-test-build", errno.EOPNOTSUPP, lambda s, d: syz(d, s, 0)),
    ("core-4.11-1", errno.EOPNOTSUPP, lambda s, d: copy_struct(9, 9, ULMAX, 0, flags=8)),
    ("core-4.11-2-src", errno.EOVERFLOW, lambda s, d: copy_struct(9, 9, ULMAX, P, flags=0)),
    ("core-4.11-2-length", errno.EOVERFLOW, lambda s, d: copy_struct(9, 9, 0, ULMAX, flags=0)),
    ("core-4.11-2-dst", errno.EOVERFLOW, lambda s, d: copy_struct(9, 9, 0, P, ULMAX, flags=0)),
    ("core-4.11-3", errno.EINVAL, lambda s, d: copy_struct(9, 9, 0, 0, flags=0)),
    ("core-4.11-4", errno.ENOENT, lambda s, d: copy_struct(d, 9, 0, 0)),
    ("core-4.11-5", errno.EINVAL, lambda s, d: copy_struct(9, s, ULMAX - 1, 0)),
    ("core-4.11-6", errno.EOVERFLOW, lambda s, d: copy_struct(9, s, ULMAX - 1, P)),
    ("core-4.11-7-start", errno.ENOENT, lambda s, d: copy_struct(9, s, 0xFFF, P)),
    ("core-4.11-7-gap", errno.ENOENT, lambda s, d: copy_struct(9, s, 0x3000, 0x3000)),
    ("core-4.11-7-end", errno.ENOENT, lambda s, d: copy_struct(9, s, 0x1000, 0x3001)),
    ("core-4.11-8", errno.ENOENT, lambda s, d: copy_struct(9, s, 0x1000, P)),
    ("core-4.11-9-eexist", errno.EEXIST, lambda s, d: copy_struct(d, s, 0x5000, P, 0x10000, flags=W)),
    ("core-4.7-4", errno.EPERM, lambda s, d: copy_struct(d, s, 0x5000, P, flags=R | W)),
]


@pytest.mark.parametrize(("number", "row"), each(REFUSED))
def test_refused(c: Caller, number: int, row: Callable[[int, int], Struct]) -> None:
    s, d = c.ioas(), c.ioas()
    c.map(s, 0x1000, 2 * P)
    c.map(s, 0x3000, P)
    c.map(s, 0x5000, P, flags=R)
    c.map(d, 0x10000, P)
    c.refuses(number, row(s, d))
    assert c.areas(d) == [(0x10000, 0x10FFF)]


class TestSyz:
    """core 4.11 row 0, mock-device 7."""

    def test_n_th_area(self, c: Caller) -> None:
        c.world.top_nr = 0xA0
        s, d = c.ioas(), c.ioas()
        c.map(s, 0x1000, P)
        c.map(s, 0x8000, 4 * P)
        out = c.do(syz(d, s, 1, P))
        assert (out.src_iova, out.flags) == (0x9000, R)

    def test_no_such_area_is_iova_0(self, c: Caller) -> None:
        c.world.top_nr = 0xA0
        s = c.ioas()
        c.map(s, 0, P)
        assert c.do(syz(s, s, 7, P)).src_iova == 0

    def test_no_such_ioas_leaves_it(self, c: Caller) -> None:
        c.world.top_nr = 0xA0
        c.refuses(errno.ENOENT, syz(1, 9, 5))


def test_core_4_11_10(c: Caller) -> None:  # core-4.11-10
    s, d = c.ioas(), c.ioas()
    c.map(s, 0x1000, P)
    assert c.copy(d, s, 0x1000, P) == 0x1000
    assert c.copy(d, s, 0x1000, P) == 0x2000
    assert c.copy(d, s, 0x1000, P, 0x7000) == 0x7000


def test_any_subrange_and_one_area_per_source_area(c: Caller) -> None:
    s = c.ioas()
    c.map(s, 0x1000, 2 * P)
    c.map(s, 0x3000, 2 * P)
    c.copy(s, s, 0x1800, 0x2000, 0x10000)  # source and destination may be the same
    assert c.areas(s)[2:] == [(0x10000, 0x117FF), (0x11800, 0x11FFF)]
    c.refuses(errno.ENOENT, u.iommu_ioas_unmap(ioas_id=s, iova=0x11000, length=P))
    assert c.unmap(s, 0x10000, 0x1800) == 0x1800


def test_two_areas_of_one_pages_object_stay_two(c: Caller) -> None:
    s, d = c.ioas(), c.ioas()
    c.map(s, 0x1000, 2 * P)
    c.copy(d, s, 0x1000, P, 0x1000)
    c.copy(d, s, 0x2000, P, 0x2000)
    c.copy(s, d, 0x1000, 2 * P, 0x8000)
    assert c.areas(s) == [(0x1000, 0x2FFF), (0x8000, 0x8FFF), (0x9000, 0x9FFF)]


def test_write_permission_is_the_pages_objects(c: Caller) -> None:
    """MAP R|W, COPY R, COPY of that R|W; READABLE is never checked."""
    s, d = c.ioas(), c.ioas()
    c.map(s, 0x1000, P, flags=W)
    c.copy(d, s, 0x1000, P, 0x1000, flags=R)
    c.copy(d, d, 0x1000, P, 0x2000, flags=R | W)


def test_pages_are_shared(c: Caller) -> None:
    """No new pin, no new charge; the source may go, and the frames stay what they were."""
    s, d = c.ioas(), c.ioas()
    one, two = c.add_domain(s), c.add_domain(d)
    c.map(s, 0x10000, 4 * P)
    frames = frames_of(one, 0x10000, 4 * P)
    c.copy(d, s, 0x11000, 2 * P, 0x20000)
    assert frames_of(two, 0x20000, 2 * P) == frames[1:3]
    assert (c.pinned_vm, c.user_pages) == (4, 4)
    c.unmap(s, 0x10000, 4 * P)
    assert (c.pinned_vm, c.user_pages) == (2, 2)
    c.proc.unmap(BUFFER, 4)
    c.host.map(BUFFER, 4)  # the process has other pages there now
    c.copy(s, d, 0x20000, 2 * P, 0x30000)
    assert frames_of(one, 0x30000, 2 * P) == frames[1:3]
    c.unmap(s, 0, 2**30)
    c.unmap(d, 0, 2**30)
    c.quiet()


def test_automatic_iova_from_the_first_piece(c: Caller) -> None:
    """core 4.8: the address of the memory is the pages object's base plus the slice's start."""
    s, d = c.ioas(), c.ioas()
    c.map(s, 0x100000, 0x10000, BUFFER)
    assert c.copy(d, s, 0x104000, 0x4000) == 0x4000
    assert c.copy(d, s, 0x101000, 0x4000) == 0x1000 + 0x7000  # aligned to 4 KiB: the lowest hole of 16 KiB


def test_a_failing_piece_undoes_the_earlier(c: Caller) -> None:
    """core 4.7: all or nothing, over pieces with different pages objects."""
    s, d = c.ioas(), c.ioas()
    domain = c.add_domain(d)
    c.map(s, 0x1000, P)
    c.map(s, 0x2000, P, 0x2000_0000)  # nothing there
    c.refuses(errno.EFAULT, copy_struct(d, s, 0x1000, 2 * P))
    assert c.areas(d) == []
    assert list(domain.segments(0, 2**40)) == []
    c.quiet()


def test_alignment_of_the_destination(c: Caller) -> None:
    """core 4.7: only the first IOVA, the total length and each memory offset are checked, not the inner boundaries."""
    s, d = c.ioas(), c.ioas()
    c.map(s, 0x1800, 0x800, BUFFER)
    c.map(s, 0x2000, 0x800, BUFFER)
    c.access(d)  # alignment 4096
    c.refuses(errno.EINVAL, copy_struct(d, s, 0x1800, 0x800, 0x10000))
    c.refuses(errno.EINVAL, copy_struct(d, s, 0x1900, 0x1000 - 0x100, 0x10000))
    c.copy(d, s, 0x1800, 0x1000, 0x10000)
    assert c.areas(d) == [(0x10000, 0x107FF), (0x10800, 0x10FFF)]
    c.refuses(errno.EINVAL, map_struct(d, 0x20000, 0x800))
