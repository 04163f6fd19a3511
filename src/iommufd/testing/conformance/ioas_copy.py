"""core 4.11: IOAS_COPY."""

from __future__ import annotations

from errno import EEXIST, EINVAL, ENOENT, EOPNOTSUPP, EOVERFLOW, EPERM

from iommufd.testing.conformance import check
from iommufd.testing.conformance.common import (
    APERTURE,
    FIXED,
    READ,
    RW,
    ULMAX,
    WRITE,
    ioas_alloc,
    map_fixed,
    mock_domain,
    open_ioas,
    unmap,
)
from iommufd.testing.subject import PAGE, Subject
from iommufd.uapi import iommufd as u
from iommufd.uapi import iommufd_test as t


def copy(
    dst: int, src: int, src_iova: int, length: int, dst_iova: int = 0, flags: int = RW | FIXED
) -> u.iommu_ioas_copy:
    return u.iommu_ioas_copy(
        flags=flags, dst_ioas_id=dst, src_ioas_id=src, length=length, dst_iova=dst_iova, src_iova=src_iova
    )


@check("core 4.11 row 1", "core 4.11 row 2", "core 4.11 row 3", "core 4.11 row 4")
def copy_checks_before_the_source(s: Subject) -> None:
    fd = s.open()
    s.refuses(EOPNOTSUPP, fd, copy(9, 9, 0, 0, flags=8))
    for field in ("length", "src_iova", "dst_iova"):
        bad = copy(9, 9, 0, PAGE, flags=0)
        setattr(bad, field, ULMAX)
        s.refuses(EOVERFLOW, fd, bad)
    s.refuses(EINVAL, fd, copy(9, 9, 0, PAGE, flags=FIXED))
    s.refuses(ENOENT, fd, copy(9, 9, 0, 0))


@check("core 4.11 row 5", "core 4.11 row 6", "core 4.11 row 7", "core 4.11 row 8")
def the_source_range_must_be_covered(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    s.refuses(EINVAL, fd, copy(9, ioas, 0, 0))
    s.refuses(EOVERFLOW, fd, copy(9, ioas, ULMAX - 1, 3))
    s.refuses(ENOENT, fd, copy(9, ioas, 0x1000, PAGE))
    map_fixed(s, fd, ioas, s.page(0), PAGE, 0x1000)
    map_fixed(s, fd, ioas, s.page(1), PAGE, 0x3000)
    s.refuses(ENOENT, fd, copy(ioas, ioas, 0x1000, 3 * PAGE, 0x10000))
    s.refuses(ENOENT, fd, copy(ioas, ioas, 0x0FFF, 2, 0x10000))
    s.refuses(ENOENT, fd, copy(ioas, ioas, 0x1FFF, 2, 0x10000))
    s.refuses(ENOENT, fd, copy(9, ioas, 0x1000, PAGE))


@check("core 4.11 row 9", "core 4.11 row 10", "core 4.7 row 4")
def any_part_may_be_copied_and_each_area_stays_one(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    map_fixed(s, fd, ioas, s.page(0), 2 * PAGE, 0x1000)
    map_fixed(s, fd, ioas, s.page(2), 2 * PAGE, 0x3000)
    out = s.do(fd, copy(ioas, ioas, 0x2000, 2 * PAGE, 0x10000))
    s.expect(out.dst_iova == 0x10000, "where it went")
    s.refuses(ENOENT, fd, u.iommu_ioas_unmap(ioas_id=ioas, iova=0x10000, length=0x1800))
    s.refuses(ENOENT, fd, u.iommu_ioas_unmap(ioas_id=ioas, iova=0x10000, length=PAGE))
    s.expect(unmap(s, fd, ioas, 0x11000, PAGE) == PAGE, "two areas; the first went with the call that failed")
    s.refuses(EEXIST, fd, copy(ioas, ioas, 0x2000, PAGE, 0x1000))


@check("core 4.7 row 4", "core 4.11 permissions")
def write_permission_comes_from_the_original_map(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    map_fixed(s, fd, ioas, s.page(0), PAGE, 0x1000, READ)
    s.refuses(EPERM, fd, copy(ioas, ioas, 0x1000, PAGE, 0x10000))
    s.refuses(EPERM, fd, copy(ioas, ioas, 0x1000, PAGE, 0x10000, WRITE | FIXED))
    s.refuses(EEXIST, fd, copy(ioas, ioas, 0x1000, PAGE, 0x1000))
    map_fixed(s, fd, ioas, s.page(1), PAGE, 0x2000, WRITE)
    s.do(fd, copy(ioas, ioas, 0x2000, PAGE, 0x20000, READ | FIXED))
    s.do(fd, copy(ioas, ioas, 0x20000, PAGE, 0x30000, RW | FIXED))


@check("core 4.11 shared", "core 5.2", "core 5.3")
def copies_share_pins(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    other = ioas_alloc(s, fd)
    mock_domain(s, fd, ioas)
    mock_domain(s, fd, other)
    s.poke(s.page(0), b"x" * 4 * PAGE)
    map_fixed(s, fd, ioas, s.page(0), 4 * PAGE, APERTURE)
    s.do(fd, copy(other, ioas, APERTURE + PAGE, 2 * PAGE, APERTURE))
    s.do(fd, t.test_md_check_refs(length=4 * PAGE, uptr=s.page(0), refs=1))
    unmap(s, fd, ioas, APERTURE, 4 * PAGE)
    for page, refs in ((0, 0), (1, 1), (2, 1), (3, 0)):
        s.do(fd, t.test_md_check_refs(length=PAGE, uptr=s.page(page), refs=refs))
    unmap(s, fd, other, APERTURE, 2 * PAGE)
    s.do(fd, t.test_md_check_refs(length=4 * PAGE, uptr=s.page(0), refs=0))


@check("core 4.11 row 0", "mock 7")
def the_syzkaller_form(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    map_fixed(s, fd, ioas, s.page(0), PAGE, 0x5000)
    map_fixed(s, fd, ioas, s.page(1), 2 * PAGE, 0x8000)
    out = s.do(fd, copy(ioas, ioas, 1 | PAGE << 32, PAGE, 0x20000, RW | FIXED | 0x10000))
    s.expect((out.src_iova, out.flags) == (0x9000, RW | FIXED), "the second area's second page")
    s.refuses(ENOENT, fd, copy(ioas, ioas, 7, PAGE, 0x30000, RW | FIXED | 0x10000))
