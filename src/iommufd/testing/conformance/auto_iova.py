"""core 4.8: the automatic choice of an IOVA, value for value."""

from __future__ import annotations

from errno import EINVAL, ENOSPC, EOVERFLOW

from iommufd.testing.conformance import check
from iommufd.testing.conformance.common import (
    APERTURE,
    RW,
    ULMAX,
    allow,
    map_auto,
    map_fixed,
    mock_domain,
    open_ioas,
    reserve,
)
from iommufd.testing.subject import PAGE, Subject
from iommufd.uapi import iommufd as u


def chosen(s: Subject, va: int, length: int, expected: int) -> None:
    fd, ioas = open_ioas(s)
    got = map_auto(s, fd, ioas, va, length)
    s.expect(got == expected, f"{length:#x} bytes at {va:#x} went to {got:#x}, expected {expected:#x}")


@check("core 4.8 step 3", "core 4.8 worked")
def worked_values(s: Subject) -> None:
    for va, length, expected in (
        (0x7F0000200000, 0x200000, 0x200000),
        (0x7F0040000000, 0x40000000, 0x200000),
        (0x7F0000001000, 0x1000, 0x1000),
        (0x7F0000004000, 0x3000, 0x4000),
        (0, 0x3000, 0x4000),
        (0x7F0000001800, 0x800, 0x1800),
        (0x7F0000001003, 1, 0x1003),
        (0x7F0000001003, 0x2000, 0x1003),
        (0x7F0000002001, 2, 0x1001),
        (1, 1, 0x1001),
        (0x10, 0x10, 0x1010),
        (0x7F0000100000, 0x80000, 0x80000),
        (0x7F0000100000, 0x80001, 0x100000),
        (0, 2**40, 0x200000),
    ):
        chosen(s, va, length, expected)


@check("core 4.8 step 1", "core 4.8 step 5")
def lengths_at_the_limits(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    s.refuses(EOVERFLOW, fd, u.iommu_ioas_map(flags=RW, ioas_id=ioas, length=2**63 - 1))
    s.expect(map_auto(s, fd, ioas, 0, 2**63 - 2) == 0x200000, "just below half")
    s.refuses(ENOSPC, fd, u.iommu_ioas_map(flags=RW, ioas_id=ioas, length=2**63 - 2))


@check("core 4.8 step 4")
def alignment_above_the_memorys_is_refused(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    mock_domain(s, fd, ioas)
    s.refuses(EINVAL, fd, u.iommu_ioas_map(flags=RW, ioas_id=ioas, user_va=s.page(0) + 1, length=0x800))
    s.expect(map_auto(s, fd, ioas, s.page(1), PAGE) == APERTURE, "the aperture's first page")
    s.expect(map_auto(s, fd, ioas, s.page(2) + 0x800, 0x800) == APERTURE + 0x1800, "the offset in the page is kept")
    s.expect(map_auto(s, fd, ioas, s.page(3), 0x800) == APERTURE + 0x1000, "the hole before it")


@check("core 4.7 row 3a", "core 4.8 step 7", "core 4.8 step 8")
def first_fit_in_holes(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    map_fixed(s, fd, ioas, s.page(0), PAGE, 0x1000)
    s.expect(map_auto(s, fd, ioas, s.page(1), PAGE) == 0x2000, "behind the area")
    map_fixed(s, fd, ioas, s.page(0), PAGE, 0x5000)
    s.expect(map_auto(s, fd, ioas, s.page(1), 2 * PAGE) == 0x3000, "exactly between")
    s.expect(map_auto(s, fd, ioas, s.page(2), 2 * PAGE) == 0x6000, "behind both")
    reserve(s, fd, ioas, 0x9001, 1)
    s.expect(map_auto(s, fd, ioas, s.page(1), PAGE) == 0x8000, "up to a reserved byte")
    s.expect(map_auto(s, fd, ioas, s.page(1), PAGE) == 0xA000, "a hole that begins inside a page")
    s.expect(map_auto(s, fd, ioas, s.page(1), 0x100) == 0x9100, "a smaller one fits into its rest")
    s.expect(map_auto(s, fd, ioas, s.page(1) + 2, 2) == 0x9002, "right behind the reserved byte")


@check("core 4.8 step 7 or")
def the_offset_is_ored_after_rounding(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    reserve(s, fd, ioas, 0, 0x1900)
    s.expect(map_auto(s, fd, ioas, s.page(0) + 0x800, 0x800) == 0x2800, "a hole that begins mid-page")
    s.expect(map_auto(s, fd, ioas, s.page(0) + 0x80, 0x40) == 0x1980, "the offset's bits are set")
    s.expect(map_auto(s, fd, ioas, s.page(0) + 0x80, 0x40) == 0x19C0, "not congruent, but as the kernel does")


@check("core 4.8 step 6")
def spans_of_the_allowed_list(s: Subject) -> None:
    for ranges, va, length, expected in (
        ([(0x10000, 0x10FFF)], 0x1000, PAGE, 0x10000),
        ([(0x10000, 0x10FFE)], 0x1000, PAGE, None),
        ([(0x11000, 0x11FFF), (0x10000, 0x10FFF)], 0x1000, 2 * PAGE, 0x10000),
        ([(0x11000, 0x11FFF), (0x10000, 0x10FFF)], 0x2000, 2 * PAGE, 0x10000),
        ([(0x10000, 0x10FFF), (0x12000, 0x13FFF)], 0x2000, 2 * PAGE, 0x12000),
        ([(0, 0xFFF)], 0x1000, PAGE, None),
        ([(0, 0x1FFF)], 0x1000, PAGE, 0x1000),
        ([(ULMAX - 0x1FFF, ULMAX)], 0x1000, PAGE, ULMAX - 0x1FFF),
        ([(ULMAX - 0xFFF, ULMAX)], 0x1000, PAGE, None),
        ([(0x10000, 0x10001)], 1, 1, None),
        ([(0x10000, 0x10002)], 1, 1, 0x10001),
    ):
        fd, ioas = open_ioas(s)
        allow(s, fd, ioas, ranges)
        answer = s.ask(fd, u.iommu_ioas_map(flags=RW, ioas_id=ioas, user_va=va, length=length))
        got = u.iommu_ioas_map.unpack(answer.out).iova if answer.result == 0 else None
        if expected is None:
            s.expect(answer.errno == ENOSPC, f"{ranges} has no room, got {got}")
        else:
            s.expect(got == expected, f"{length:#x} bytes in {ranges} went to {got}, expected {expected:#x}")


@check("core 4.7 row 3a", "core 4.8 step 9")
def nothing_left(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    reserve(s, fd, ioas, 0x3000, ULMAX - 0x3000)
    s.expect(map_auto(s, fd, ioas, s.page(0), PAGE) == 0x1000, "one")
    s.expect(map_auto(s, fd, ioas, s.page(0), PAGE) == 0x2000, "two")
    s.refuses(ENOSPC, fd, u.iommu_ioas_map(flags=RW, ioas_id=ioas, user_va=s.page(0), length=PAGE))
