"""vfio 8: UNMAP_DMA where it fails half-way, and where it cuts areas (type 1 v1)."""

from __future__ import annotations

import struct
from errno import EDEADLK, EFAULT, EINVAL, EOPNOTSUPP, EOVERFLOW

from iommufd.testing.conformance import check
from iommufd.testing.conformance.common import APERTURE, ULMAX, free_ranges, mock_domain
from iommufd.testing.conformance.vfio_compat import SET_IOMMU, UNMAP_DMA, compat, map_dma, ok, unmap_dma, value
from iommufd.testing.subject import PAGE, Subject
from iommufd.uapi import iommufd as u
from iommufd.uapi import iommufd_test as t

A = APERTURE


def v1(s: Subject, pages: int = 8) -> tuple[int, int]:
    """A context in v1 mode with one area of ``pages`` at A: (fd, ioas)."""
    fd, ioas = compat(s)
    ok(s, value(s, fd, SET_IOMMU, 1))
    s.poke(s.page(0), b"x" * pages * PAGE)
    ok(s, map_dma(s, fd, s.page(0), A, pages * PAGE))
    return fd, ioas


def pinning(s: Subject, fd: int, ioas: int, iova: int, length: int = PAGE) -> int:
    """An access that has ``length`` bytes pinned."""
    access = s.do(fd, t.test_create_access(id=ioas, flags=1)).out_access_fd
    s.do(fd, t.test_access_pages(id=access, iova=iova, length=length))
    return access


@check("vfio 8 row 6", "vfio 8 row 7", "vfio 8.2")
def cuts_come_before_the_range_is_judged(s: Subject) -> None:
    """A request of size 0 cuts at its start and then fails."""
    fd, _ioas = v1(s)
    s.expect(unmap_dma(s, fd, A + 3 * PAGE, 0) == (EINVAL, 0), "size 0")
    s.expect(unmap_dma(s, fd, A, 3 * PAGE) == (0, 3 * PAGE), "the left part is an area of its own")
    s.expect(unmap_dma(s, fd, A + 5 * PAGE, ULMAX) == (EINVAL, ULMAX), "an end that overflows to inside a page")
    s.expect(unmap_dma(s, fd, A + 5 * PAGE, ULMAX - 0xFFF) == (EOVERFLOW, 0), "to the end of a page")
    s.expect(unmap_dma(s, fd, A + 6 * PAGE, 100) == (EINVAL, 100), "a cut inside a page")
    s.expect(unmap_dma(s, fd, A + 3 * PAGE, 2 * PAGE) == (0, 2 * PAGE), "cut where the overflowing one began")
    s.expect(unmap_dma(s, fd, 0, A + 8 * PAGE) == (0, 3 * PAGE), "from 0: there is no cut before it")


@check("vfio 8.1 row 1", "vfio 8.1 row 2", "vfio 8.1 row 8", "core 4.15 row 1", "core 4.15 row 8")
def where_nothing_is_cut(s: Subject) -> None:
    fd, ioas = v1(s)
    mock_domain(s, fd, ioas)
    s.do(fd, t.test_md_check_refs(length=8 * PAGE, uptr=s.page(0), refs=1))
    s.expect(unmap_dma(s, fd, A + 8 * PAGE, PAGE) == (0, 0), "no area there")
    s.expect(unmap_dma(s, fd, A + 1, 2) == (EINVAL, 2), "a cut after the third byte cannot be")
    s.expect(unmap_dma(s, fd, A, 1)[1] == 0, "a cut after the first byte is none, so the area does not fit")
    s.expect(unmap_dma(s, fd, A + 2 * PAGE, 3 * PAGE) == (0, 3 * PAGE), "out of the middle")
    for page, refs in ((0, 1), (1, 1), (2, 0), (4, 0), (5, 1), (7, 1)):
        s.do(fd, t.test_md_check_refs(length=PAGE, uptr=s.page(page), refs=refs))
    s.expect(unmap_dma(s, fd, A, 8 * PAGE) == (0, 5 * PAGE), "the rest")


@check("vfio 8.1 row 3", "core 4.15 row 2")
def an_area_that_refuses_accesses_is_not_cut(s: Subject) -> None:
    """The 101st of touching pinned areas is left refusing accesses; a cut in it is EBUSY."""
    fd, ioas = compat(s)
    ok(s, value(s, fd, SET_IOMMU, 1))
    access = s.do(fd, t.test_create_access(id=ioas, flags=1)).out_access_fd
    for i in range(102):
        ok(s, map_dma(s, fd, s.page(2 * i), 0x100000 + 2 * i * PAGE, 2 * PAGE))
        s.do(fd, t.test_access_pages(id=access, iova=0x100000 + 2 * i * PAGE, length=2 * PAGE))
    left = 0x100000 + 200 * PAGE
    s.expect(unmap_dma(s, fd, 0x100000, 204 * PAGE) == (EDEADLK, 200 * PAGE), "a hundred went and are counted")
    s.expect(unmap_dma(s, fd, left, PAGE) == (16, PAGE), "EBUSY, and nothing is counted")
    s.expect(unmap_dma(s, fd, left + 2 * PAGE, PAGE) == (EINVAL, PAGE), "its neighbour is only pinned")


@check("vfio 8.1 row 4", "core 4.15 row 3")
def a_dma_buf_is_not_cut(s: Subject) -> None:
    fd, ioas = v1(s)
    buffer = s.dma_buf(fd, 4 * PAGE)
    s.do(fd, u.iommu_ioas_map_file(flags=7, ioas_id=ioas, fd=buffer, length=4 * PAGE, iova=A + 16 * PAGE))
    s.expect(unmap_dma(s, fd, A + 16 * PAGE, PAGE) == (EOPNOTSUPP, PAGE), "a cut in it")
    s.expect(unmap_dma(s, fd, A + 16 * PAGE, 4 * PAGE) == (0, 4 * PAGE), "whole")


@check("vfio 8.1 row 5", "core 4.15 row 4")
def cuts_are_aligned_in_iova_and_memory(s: Subject) -> None:
    fd, _ = v1(s)
    for iova, size in ((A, 2048), (A + 2048, 6 * PAGE), (A + PAGE, 2048 + PAGE)):
        s.expect(unmap_dma(s, fd, iova, size) == (EINVAL, size), "half a page: not rewritten")
    s.expect(unmap_dma(s, fd, A + PAGE, 7 * PAGE) == (0, 7 * PAGE), "the first cut of the last one stayed")
    s.expect(unmap_dma(s, fd, A, PAGE) == (0, PAGE), "the first page is whole")


@check("vfio 8.1 row 6", "core 4.15 row 6")
def a_pinned_area_is_not_cut(s: Subject) -> None:
    fd, ioas = v1(s)
    pinning(s, fd, ioas, A + 7 * PAGE)
    s.expect(unmap_dma(s, fd, A, PAGE) == (EINVAL, PAGE), "pinned at the other end of the area")
    s.expect(unmap_dma(s, fd, A, 8 * PAGE) == (0, 8 * PAGE), "whole: the access lets go")


@check("vfio 8 row 9", "vfio 8 row 8", "vfio 8 row 5")
def the_answer_faults_and_the_areas_are_gone(s: Subject) -> None:
    fd, ioas = v1(s)
    s.poke(s.page(50), struct.pack("<IIQQ", 24, 0, A, 8 * PAGE))
    s.mprotect(s.page(50), PAGE, 1)
    s.expect(s.ioctl(fd, UNMAP_DMA, at=s.page(50), poke=False).errno == EFAULT, "size cannot be written")
    s.expect(unmap_dma(s, fd, 0, 0, flags=2) == (0, 0), "nothing is left")
    s.expect(free_ranges(s, fd, ioas)[1] == PAGE, "v1 keeps the alignment")
