"""core 4.10, 7, 5.5 (FILE): IOAS_MAP_FILE, dma-bufs and their revocation."""

from __future__ import annotations

from errno import EBADF, EINVAL, ENODEV, ENOENT, EOPNOTSUPP, EOVERFLOW

from iommufd.testing.conformance import check
from iommufd.testing.conformance.common import APERTURE, FIXED, RW, ULMAX, ioas_alloc, mock_domain, open_ioas, unmap
from iommufd.testing.subject import PAGE, Subject
from iommufd.uapi import iommufd as u
from iommufd.uapi import iommufd_test as t


def request(ioas: int, fd: int, **fields: int) -> u.iommu_ioas_map_file:
    values = {"flags": RW | FIXED, "start": 0, "length": PAGE, "iova": APERTURE, **fields}
    return u.iommu_ioas_map_file(ioas_id=ioas, fd=fd, **values)


@check("core 4.10 row 1", "core 4.10 row 2", "core 4.10 row 3", "core 4.10 row 4")
def map_file_checks_before_the_file(s: Subject) -> None:
    fd = s.open()
    s.refuses(EOPNOTSUPP, fd, request(9, -1, flags=8, iova=ULMAX))
    s.refuses(EOVERFLOW, fd, request(9, -1, flags=0, iova=ULMAX))
    s.refuses(EOVERFLOW, fd, request(9, -1, flags=0, length=ULMAX))
    s.refuses(EINVAL, fd, request(9, -1, flags=0))
    s.refuses(ENOENT, fd, request(9, -1, length=0))


@check("core 4.10 row 5", "core 4.10 row 6", "core 4.10 row 8", "core 4.10 row 9")
def map_file_checks_the_file(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    memfd = s.memfd(4 * PAGE)
    s.refuses(EINVAL, fd, request(ioas, -1, length=0))
    s.refuses(EOVERFLOW, fd, request(ioas, -1, start=ULMAX, length=2))
    s.refuses(EBADF, fd, request(ioas, -1))
    s.refuses(EBADF, fd, request(ioas, 9999))
    s.refuses(EBADF, fd, request(ioas, 9999, length=ULMAX - PAGE + 1))
    s.refuses(EINVAL, fd, request(ioas, memfd, length=ULMAX - PAGE + 1))


@check("core 4.10 row 10", "core 5.5 file")
def without_a_domain_any_file_maps(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    reader, _ = s.pipe()
    s.do(fd, request(ioas, reader))
    memfd = s.memfd(PAGE)
    s.do(fd, request(ioas, memfd, start=5 * PAGE, iova=APERTURE + PAGE))
    s.refuses(EINVAL, fd, t.test_mock_domain(id=ioas))
    unmap(s, fd, ioas, APERTURE, PAGE)
    s.refuses(EINVAL, fd, t.test_mock_domain(id=ioas))
    s.ftruncate(memfd, 6 * PAGE)
    mock_domain(s, fd, ioas)


@check("core 4.10 pinning", "core 5.5 file")
def a_file_is_pinned_inside_its_size(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    mock_domain(s, fd, ioas)
    memfd = s.memfd(2 * PAGE + 100)
    reader, _ = s.pipe()
    s.refuses(EINVAL, fd, request(ioas, reader))
    s.do(fd, request(ioas, memfd, length=2 * PAGE))
    s.refuses(EINVAL, fd, request(ioas, memfd, start=2 * PAGE, length=2048, iova=APERTURE + 0x10000))
    s.refuses(EINVAL, fd, request(ioas, memfd, length=3 * PAGE, iova=APERTURE + 0x10000))
    s.refuses(EINVAL, fd, request(ioas, memfd, start=2**63, iova=APERTURE + 0x10000))


@check("core 4.8 file", "core 4.10 row 10")
def the_automatic_iova_of_a_file_follows_its_offset(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    memfd = s.memfd(16 * PAGE)
    out = s.do(fd, request(ioas, memfd, flags=RW, start=0, length=3 * PAGE))
    s.expect(out.iova == 0x4000, "offset 0 aligns to the length")
    out = s.do(fd, request(ioas, memfd, flags=RW, start=PAGE, length=PAGE))
    s.expect(out.iova == 0x1000, "offset 0x1000 aligns to a page")
    out = s.do(fd, request(ioas, memfd, flags=RW, start=0x800, length=0x800))
    s.expect(out.iova == 0x2800, "the offset in the page is kept")


@check("core 4.10 reference", "core 5.7 fd closed", "core 5.7 truncated")
def the_mapping_keeps_the_file(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    mock_domain(s, fd, ioas)
    access = s.do(fd, t.test_create_access(id=ioas)).out_access_fd
    memfd = s.memfd(4 * PAGE)
    s.mmap(s.page(64), 4 * PAGE, fd=memfd, shared=True)
    s.poke(s.page(64), b"file" * PAGE)
    s.do(fd, request(ioas, memfd, length=4 * PAGE))
    s.do(fd, t.test_md_check_refs(length=4 * PAGE, uptr=s.page(64), refs=1))
    s.close(memfd)
    s.do(fd, t.test_access_rw(id=access, iova=APERTURE + 3, length=8, uptr=s.page(0)))
    s.expect(s.peek(s.page(0), 8) == b"efilefil", "read through the file")
    s.poke(s.page(0), b"DEVICE")
    s.do(fd, t.test_access_rw(id=access, iova=APERTURE + PAGE - 3, length=6, uptr=s.page(0), flags=1))
    s.expect(s.peek(s.page(64) + PAGE - 3, 6) == b"DEVICE", "written through the file")


@check("core 5.3", "mock 5.2 row 5")
def a_page_of_a_file_has_one_frame(s: Subject) -> None:
    """Reached by descriptor or by address, it is the same physical page."""
    fd, ioas = open_ioas(s)
    _, hwpt, _ = mock_domain(s, fd, ioas)
    memfd = s.memfd(4 * PAGE)
    s.mmap(s.page(64), 4 * PAGE, fd=memfd, shared=True)
    s.mmap(s.page(80), 2 * PAGE, fd=memfd, offset=PAGE, shared=True)
    s.do(fd, request(ioas, memfd, length=4 * PAGE))
    s.do(fd, t.test_md_check_map(id=hwpt, iova=APERTURE, length=4 * PAGE, uptr=s.page(64)))
    s.do(fd, t.test_md_check_map(id=hwpt, iova=APERTURE + PAGE, length=2 * PAGE, uptr=s.page(80)))
    s.refuses(EINVAL, fd, t.test_md_check_map(id=hwpt, iova=APERTURE, length=2 * PAGE, uptr=s.page(80)))


@check("core 7 row 1", "core 7 row 4", "mock 8.1 row 1", "mock 8.1 row 3", "mock 8.2 row 1", "mock 8.2 row 2")
def the_test_dmabuf(s: Subject) -> None:
    fd = s.open()
    s.refuses(EINVAL, fd, t.test_dmabuf_get(length=0))
    s.refuses(EINVAL, fd, t.test_dmabuf_get(length=(2 << 20) + 1))
    s.refuses(EBADF, fd, t.test_dmabuf_revoke(dmabuf_fd=-1, revoked=1))
    s.refuses(EINVAL, fd, t.test_dmabuf_revoke(dmabuf_fd=s.memfd(PAGE), revoked=1))


@check("core 4.3 row 4", "core 5.4 domain attach")
def a_later_domain_is_filled(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    memfd = s.memfd(2 * PAGE)
    s.mmap(s.page(64), 2 * PAGE, fd=memfd, shared=True)
    s.do(fd, request(ioas, memfd, length=2 * PAGE))
    _, first, device = mock_domain(s, fd, ioas)
    s.do(fd, t.test_md_check_map(id=first, iova=APERTURE, length=2 * PAGE, uptr=s.page(64)))
    second = s.do(fd, u.iommu_hwpt_alloc(dev_id=device, pt_id=ioas)).out_hwpt_id
    s.do(fd, t.test_md_check_map(id=second, iova=APERTURE, length=2 * PAGE, uptr=s.page(64)))
    s.do(fd, u.iommu_destroy(id=second))
    s.do(fd, t.test_md_check_map(id=first, iova=APERTURE, length=2 * PAGE, uptr=s.page(64)))


@check("core 4.13 row 1", "core 4.13 row 4", "core 4.13 rules")
def change_process(s: Subject) -> None:
    fd = s.open()
    s.refuses(EOPNOTSUPP, fd, u.iommu_ioas_change_process(reserved=1))
    s.do(fd, u.iommu_ioas_change_process())
    ioas = ioas_alloc(s, fd)
    s.do(fd, request(ioas, s.memfd(PAGE)))
    s.do(fd, u.iommu_ioas_change_process())
    s.do(fd, u.iommu_ioas_map(flags=RW | FIXED, ioas_id=ioas, user_va=s.page(0), length=PAGE, iova=0x10000))
    s.refuses(EINVAL, fd, u.iommu_ioas_change_process())


@check("core 4.14 row 2", "core 4.14 row 3", "core 4.14 row 4", "core 4.14 row 5", "core 4.14 row 6", needs="root")
def noiommu_get_pa_refuses(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    pa = u.iommu_ioas_noiommu_get_pa
    s.refuses(EOPNOTSUPP, fd, pa(flags=1, ioas_id=9))
    s.refuses(EOPNOTSUPP, fd, pa(reserved=1, ioas_id=9))
    s.refuses(EINVAL, fd, pa(ioas_id=9, iova=ULMAX))
    s.refuses(EOVERFLOW, fd, pa(ioas_id=9, iova=ULMAX, length=1))
    s.refuses(ENOENT, fd, pa(ioas_id=9, iova=0, length=1))
    s.refuses(ENOENT, fd, pa(ioas_id=ioas, iova=0, length=1))
    s.do(fd, u.iommu_ioas_map(flags=RW | FIXED, ioas_id=ioas, user_va=s.page(0), length=PAGE, iova=APERTURE))
    s.refuses(EOPNOTSUPP, fd, pa(ioas_id=ioas, iova=APERTURE, length=1))
    mock_domain(s, fd, ioas)
    s.refuses(EOPNOTSUPP, fd, pa(ioas_id=ioas, iova=APERTURE, length=1))


@check("core 4.16")
def compat_ioas_without_one(s: Subject) -> None:
    fd = s.open()
    s.refuses(ENODEV, fd, u.iommu_vfio_ioas(op=0))
