"""core 7, mock 8: dma-bufs of the test exporter."""

from __future__ import annotations

from errno import EBADF, EINVAL, EMFILE, ENODEV

from iommufd.testing.conformance import check
from iommufd.testing.conformance.access import access_on
from iommufd.testing.conformance.common import APERTURE, READ, ULMAX, WRITE, ioas_alloc, mock_domain, open_ioas, unmap
from iommufd.testing.conformance.devices import DIRTY, hwpt_alloc
from iommufd.testing.conformance.dirty import bitmap, mark
from iommufd.testing.subject import PAGE, Subject
from iommufd.uapi import iommufd as u
from iommufd.uapi import iommufd_test as t

RW = READ | WRITE


def mapping(ioas: int, fd: int, length: int, iova: int = APERTURE, start: int = 0) -> u.iommu_ioas_map_file:
    return u.iommu_ioas_map_file(flags=RW | 1, ioas_id=ioas, fd=fd, start=start, length=length, iova=iova)


@check("mock 8.1 row 2", "mock 8.1 row 1", "mock 8.1 row 3", "mock 8.2 row 1", "mock 8.2 row 2", "mock 8.2 row 4")
def getting_and_revoking(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    for length in (0, (2 << 20) + 1, 2**32 - 1):
        s.refuses(EINVAL, fd, t.test_dmabuf_get(length=length, open_flags=2))
    s.close(s.dma_buf(fd, PAGE))
    with s.no_free_descriptors():
        s.refuses(EMFILE, fd, t.test_dmabuf_get(length=1, open_flags=2))
    s.refuses(EBADF, fd, t.test_dmabuf_revoke(dmabuf_fd=9999, revoked=1))
    for other in (fd, s.memfd(PAGE)):
        s.refuses(EINVAL, fd, t.test_dmabuf_revoke(dmabuf_fd=other, revoked=1))
    for length in (1, 2 << 20):
        buffer = s.dma_buf(fd, length)
        for revoked in (1, 1, 0, 7, 0):
            s.do(fd, t.test_dmabuf_revoke(dmabuf_fd=buffer, revoked=revoked))
            expected = ENODEV if revoked else 0
            answer = s.ask(fd, mapping(ioas, buffer, PAGE))
            s.expect(answer.errno == expected, f"revoked {revoked}: errno {answer.errno}")
            if not revoked:
                unmap(s, fd, ioas, APERTURE, PAGE)
        s.close(buffer)


@check("core 4.10 row 7", "core 7 row 1", "core 7 row 6", "core 7 row 7")
def mapping_a_buffer(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    buffer = s.dma_buf(fd, 4 * PAGE)
    for length, start in ((4 * PAGE + 1, 0), (1, 4 * PAGE), (PAGE, 3 * PAGE + 1), (ULMAX - 1, 0), (1, ULMAX - 1)):
        s.refuses(EINVAL, fd, mapping(ioas, buffer, length, start=start))
    s.refuses(EINVAL, fd, mapping(ioas, buffer, 0))
    s.do(fd, mapping(ioas, buffer, 1, iova=0x1003, start=4 * PAGE - 1))
    out = s.do(fd, u.iommu_ioas_map_file(flags=RW, ioas_id=ioas, fd=buffer, start=PAGE, length=2 * PAGE))
    s.expect(out.iova == 0x2000, "the offset in the buffer chooses the IOVA")
    s.do(fd, t.test_dmabuf_revoke(dmabuf_fd=buffer, revoked=1))
    s.refuses(ENODEV, fd, mapping(ioas, buffer, PAGE))
    s.close(buffer)
    s.expect(unmap(s, fd, ioas, 0, ULMAX) == 2 * PAGE + 1, "the maps outlive the descriptor")


@check("core 5.6 row 5", "mock 6.2 row 10", "devices 8.4 row 5d", "devices 8.7 copy row 2")
def accesses_to_a_buffer(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    buffer = s.dma_buf(fd, 2 * PAGE)
    s.do(fd, mapping(ioas, buffer, 2 * PAGE))
    access = access_on(s, fd, ioas)
    for flags in (0, 1):
        s.refuses(EINVAL, fd, t.test_access_pages(id=access, iova=APERTURE, length=PAGE, flags=flags))
        s.refuses(EINVAL, fd, t.test_access_rw(id=access, iova=APERTURE, length=1, uptr=s.page(9), flags=flags))


@check("core 4.13 row 4")
def a_buffer_does_not_change_its_process(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    buffer = s.dma_buf(fd, PAGE)
    s.do(fd, u.iommu_ioas_change_process())
    s.do(fd, mapping(ioas, buffer, PAGE))
    s.refuses(EINVAL, fd, u.iommu_ioas_change_process())
    unmap(s, fd, ioas, APERTURE, PAGE)
    s.do(fd, u.iommu_ioas_change_process())


@check("mock 8.2 row 4", "core 7 revoke")
def revoking_empties_page_tables_for_good(s: Subject) -> None:
    """Seen through dirty marks: only what is mapped can be marked and read back."""
    fd, ioas = open_ioas(s)
    _, _, dev = mock_domain(s, fd, ioas)
    hwpt = hwpt_alloc(s, fd, dev, ioas, DIRTY)
    s.do(fd, u.iommu_hwpt_set_dirty_tracking(flags=1, hwpt_id=hwpt))
    buffer = s.dma_buf(fd, PAGE)

    def is_mapped(iova: int = APERTURE) -> bool:
        mark(s, fd, hwpt, [0], iova)
        return bitmap(s, fd, hwpt, PAGE, iova=iova)[0] == 3

    s.do(fd, mapping(ioas, buffer, PAGE))
    s.expect(is_mapped(), "alive")
    s.do(fd, t.test_dmabuf_revoke(dmabuf_fd=buffer, revoked=1))
    s.expect(not is_mapped(), "revoked")
    s.do(fd, t.test_dmabuf_revoke(dmabuf_fd=buffer, revoked=0))
    s.expect(not is_mapped(), "and not restored")
    other = APERTURE + 16 * PAGE
    s.do(fd, mapping(ioas, buffer, PAGE, other))
    s.expect(is_mapped(other), "a new map works")
    s.do(fd, t.test_dmabuf_revoke(dmabuf_fd=buffer, revoked=0))
    s.expect(not is_mapped(other), "revoking in either direction kills")
    copy = ioas_alloc(s, fd)
    s.do(
        fd,
        u.iommu_ioas_copy(
            flags=RW | 1, dst_ioas_id=copy, src_ioas_id=ioas, length=PAGE, src_iova=other, dst_iova=other
        ),
    )
    mock_domain(s, fd, copy)
    s.expect(unmap(s, fd, ioas, 0, ULMAX) == 2 * PAGE, "the areas stayed")
