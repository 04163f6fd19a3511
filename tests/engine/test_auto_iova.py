"""core 4.8: the automatic choice of an IOVA, by the table of worked values and against an exhaustive search."""

from __future__ import annotations

import errno
from typing import TypedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iommufd.engine.auto_iova import HPAGE_SIZE, choose, fit, natural_alignment
from iommufd.engine.ranges import ULMAX, Range, Ranges
from iommufd.errors import KernelError
from iommufd.memory.intervals import IntervalIndex


def index(areas: list[Range]) -> IntervalIndex[None]:
    made: IntervalIndex[None] = IntervalIndex()
    for first, last in areas:
        made.insert(first, last, None)
    return made


class More(TypedDict, total=False):
    alignment: int
    areas: list[Range]
    reserved: list[Range]
    allowed: list[Range]


def chosen(
    addr: int,
    length: int,
    alignment: int = 1,
    areas: list[Range] | None = None,
    reserved: list[Range] | None = None,
    allowed: list[Range] | None = None,
    cap: int = HPAGE_SIZE,
) -> int | str:
    """The IOVA, or the name of the errno."""
    try:
        return choose(
            addr, length, alignment, Ranges(allowed or ()), Ranges(reserved or ()), index(areas or []).holes, cap
        )
    except KernelError as error:
        return errno.errorcode[error.errno]


MOCK = [(0, 0xFFFFFF), (0x80000000, ULMAX)]


@pytest.mark.parametrize(
    ("addr", "length", "more", "iova"),
    [
        (0x7F0000200000, 0x200000, {}, 0x200000),
        (0x7F0040000000, 0x40000000, {}, 0x200000),
        (0x7F0000001000, 0x1000, {}, 0x1000),
        (0x7F0000001000, 0x1000, {"areas": [(0x1000, 0x1FFF)]}, 0x2000),
        (0x7F0000004000, 0x3000, {}, 0x4000),
        (0, 0x3000, {}, 0x4000),
        (0x7F0000001800, 0x800, {}, 0x1800),
        (0x7F0000001003, 1, {}, 0x1003),
        (0x7F0000001801, 0x800, {"alignment": 0x800}, "EINVAL"),
        (0x7F0000001000, 0x1000, {"reserved": MOCK, "alignment": 0x800}, 0x1000000),
        (0x7F0000001000, 0x1000, {"allowed": [(0x10000, 0x10FFF)]}, 0x10000),
        (0x7F0000001000, 0x1000, {"allowed": [(0x10000, 0x10FFE)]}, "ENOSPC"),
    ],
)
def test_worked_values(addr: int, length: int, more: More, iova: int | str) -> None:
    assert chosen(addr, length, **more) == iova


@pytest.mark.parametrize(("length", "iova"), [(0, "EOVERFLOW"), (2**63 - 1, "EOVERFLOW"), (2**63 - 2, 0x200000)])
def test_length_limit(length: int, iova: int | str) -> None:
    """Step 1."""
    assert chosen(0, length) == iova


@pytest.mark.parametrize(
    ("addr", "length", "cap", "align"),
    [
        (0, 1, HPAGE_SIZE, 1),
        (0, 3, HPAGE_SIZE, 4),
        (0, 0x1001, HPAGE_SIZE, 0x2000),
        (0x3000, 0x4000, HPAGE_SIZE, 0x1000),
        (0, 1 << 40, HPAGE_SIZE, HPAGE_SIZE),
        (0, 1 << 40, 4096, 4096),
    ],
)
def test_natural_alignment(addr: int, length: int, cap: int, align: int) -> None:
    """Step 3: with and without transparent huge pages."""
    assert natural_alignment(addr, length, cap) == align


def test_window() -> None:
    """Step 5: neither the first nor the last page."""
    assert chosen(0, 0x1000, reserved=[(0x1000, ULMAX - 0x1000)]) == "ENOSPC"
    assert chosen(0, 0x1000, reserved=[(0x1000, ULMAX - 0x2000)]) == ULMAX - 0x1FFF
    assert chosen(0, 0x1000, allowed=[(0, 0x1FFF)]) == 0x1000
    assert chosen(0, 0x1000, allowed=[(0, 0xFFF)]) == "ENOSPC"


def test_touching_allowed_ranges_merge() -> None:
    """Step 6."""
    assert chosen(0, 0x2000, allowed=[(0x10000, 0x10FFF), (0x11000, 0x11FFF)]) == 0x10000
    assert chosen(0, 0x2000, allowed=[(0x10000, 0x10FFE), (0x11000, 0x11FFF)]) == "ENOSPC"


def test_a_one_byte_hole_never_fits() -> None:
    """Step 7: the inequality is strict."""
    assert fit(0x2000, 0x2000, 1, 1, 0) is None
    assert fit(0x2000, 0x2001, 1, 1, 0) == 0x2000
    assert chosen(1, 1, allowed=[(0x1001, 0x1002)], areas=[(0x1002, 0x1002)]) == "ENOSPC"


def test_offset_is_ored_in_after_rounding() -> None:
    """Step 7: with an alignment below the page, the result need not be congruent to the address."""
    assert fit(0x2100, 0x2FFF, 0x100, 0x100, 0x700) == 0x2700
    assert fit(0x2300, 0x2FFF, 0x100, 0x100, 0x700) == 0x2700
    assert fit(0x2800, 0x2FFF, 0x100, 0x100, 0x700) == 0x2F00
    assert fit(ULMAX - 5, ULMAX, 1, 0x1000, 0) is None


def test_the_search_begins_where_the_span_fits() -> None:
    """Step 8: holes are taken from the aligned start on, so an area before it does not matter."""
    assert chosen(0, 0x4000, areas=[(0x1000, 0x1FFF)]) == 0x4000
    assert chosen(0, 0x4000, areas=[(0x4000, 0x4FFF), (0x8000, 0x8FFF)]) == 0xC000
    assert chosen(0, 0x2000, reserved=[(0x3000, 0x4FFF)], areas=[(0x6000, 0x6FFF)]) == 0x8000


SMALL = 64  # addresses [4096, 4096 + SMALL) are the whole world of the exhaustive search


@given(
    st.sets(st.integers(0, SMALL - 1)),
    st.sets(st.integers(0, SMALL - 1)),
    st.integers(1, 20),
    st.integers(0, 9000),
    st.sampled_from([1, 2, 4]),
)
def test_against_an_exhaustive_search(
    area_bytes: set[int], reserved_bytes: set[int], length: int, addr: int, alignment: int
) -> None:
    """Every byte a thing of its own; the answer is the first start that fits a maximal hole from the first fit on."""
    low = 4096
    areas = [(low + b, low + b) for b in sorted(area_bytes)]
    reserved = [(low + b, low + b) for b in reserved_bytes]
    expected = naive(addr, length, alignment, {a for a, _ in areas} | {r for r, _ in reserved}, low, low + SMALL - 1)
    assert chosen(addr, length, alignment, areas, reserved, [(low, low + SMALL - 1)]) == expected


def naive(addr: int, length: int, alignment: int, used: set[int], first: int, last: int) -> int | str:
    align = 1
    while align < length:
        align *= 2
    if addr:
        align = min(align, addr & -addr)
    if align < alignment:
        return "EINVAL"
    offset = addr % 4096

    def place(start: int, end: int) -> int | None:
        at = (start + align - 1) // align * align | offset
        return at if at < end and end - at >= length - 1 else None

    start = place(first, last)
    if start is None:
        return "ENOSPC"
    at = start
    while at <= last:
        if at in used:
            at += 1
            continue
        end = at
        while end + 1 <= last and end + 1 not in used:
            end += 1
        found = place(at, end)
        if found is not None:
            return found
        at = end + 1
    return "ENOSPC"
