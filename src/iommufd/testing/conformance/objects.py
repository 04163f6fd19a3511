"""core 2: ids, lookups, counts, destruction."""

from __future__ import annotations

from errno import EBUSY, EINVAL, ENOENT

from iommufd.testing.conformance import check
from iommufd.testing.conformance.common import (
    APERTURE,
    RW,
    free_ranges,
    ioas_alloc,
    map_fixed,
    mock_domain,
    open_ioas,
    reserve,
    unwritable,
)
from iommufd.testing.subject import PAGE, Subject
from iommufd.uapi import iommufd as u
from iommufd.uapi import iommufd_test as t


@check("core 2.1 lowest")
def the_lowest_free_id_is_taken(s: Subject) -> None:
    fd = s.open()
    s.expect([ioas_alloc(s, fd) for _ in range(5)] == [1, 2, 3, 4, 5], "ids ascend from 1")
    for number in (4, 2):
        s.do(fd, u.iommu_destroy(id=number))
    s.expect([ioas_alloc(s, fd) for _ in range(3)] == [2, 4, 6], "freed ids are handed out again, lowest first")


@check("core 1.3 row 8", "core 1.3 row 9", "core 2.1 failed")
def a_failed_creation_returns_its_id(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    s.refuses(EINVAL, fd, t.test_mock_domain_flags(id=ioas, dev_flags=2))
    s.refuses(ENOENT, fd, t.test_mock_domain(id=99))
    s.expect(ioas_alloc(s, fd) == 2, "no gap is left")


@check("core 2.1 program order", "core 2.4 DEVICE", "core 2.4 SELFTEST", "core 2.4 HWPT_PAGING", "core 2.7")
def a_mock_domain_takes_three_ids(s: Subject) -> None:
    """Test device, DEVICE, automatic HWPT; all go with the test device."""
    fd, ioas = open_ioas(s)
    s.expect(mock_domain(s, fd, ioas) == (2, 4, 3), "stdev 2, hwpt 4, device 3")
    for number in (1, 3, 4):
        s.refuses(EBUSY, fd, u.iommu_destroy(id=number))
    s.do(fd, u.iommu_destroy(id=2))
    for number in (2, 3, 4):
        s.refuses(ENOENT, fd, u.iommu_destroy(id=number))
    s.do(fd, u.iommu_destroy(id=ioas))


@check("core 2.2 wrong type", "core 2.5 row 1")
def a_wrong_type_is_as_good_as_absent(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    _, hwpt, device = mock_domain(s, fd, ioas)
    for number in (0, 99, 2**31 - 1, 2**32 - 1, hwpt, device):
        s.refuses(ENOENT, fd, u.iommu_ioas_iova_ranges(ioas_id=number))
    for number in (0, 99, 2**32 - 1):
        s.refuses(ENOENT, fd, u.iommu_destroy(id=number))


@check("core 2.4 IOAS", "core 2.5 row 2")
def mappings_do_not_block_destroy(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    map_fixed(s, fd, ioas, s.page(0), PAGE, 0x10000)
    s.do(fd, u.iommu_destroy(id=ioas))
    s.expect(ioas_alloc(s, fd) == ioas, "the id is reusable at once")


@check("core 2.4 ACCESS", "core 2.4 IOAS")
def an_access_blocks_its_ioas_and_itself(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    access = s.do(fd, t.test_create_access(id=ioas)).out_access_fd
    s.refuses(EBUSY, fd, u.iommu_destroy(id=ioas))
    s.refuses(EBUSY, fd, u.iommu_destroy(id=2))
    s.expect(ioas_alloc(s, fd) == 3, "the ACCESS took id 2")
    s.close(access)
    s.do(fd, u.iommu_destroy(id=ioas))


@check("core 2.4 HWPT_PAGING")
def a_manual_hwpt_is_destroyable_when_idle(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    stdev, _, device = mock_domain(s, fd, ioas)
    hwpt = s.do(fd, u.iommu_hwpt_alloc(dev_id=device, pt_id=ioas)).out_hwpt_id
    s.do(fd, t.test_mock_domain_replace(id=stdev, pt_id=hwpt))
    s.refuses(EBUSY, fd, u.iommu_destroy(id=hwpt))
    s.do(fd, t.test_mock_domain_replace(id=stdev, pt_id=ioas))
    s.do(fd, u.iommu_destroy(id=hwpt))


@check("core 2.5 row 3", "core 4.16")
def destroying_the_compat_ioas_unsets_it(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    s.do(fd, u.iommu_vfio_ioas(ioas_id=ioas, op=1))
    s.do(fd, u.iommu_destroy(id=ioas))
    s.refuses(19, fd, u.iommu_vfio_ioas(op=0))


@check("core 2.8")
def closing_with_everything_alive(s: Subject) -> None:
    """Pinned pages, devices and mappings go with the last reference to the file."""
    fd, ioas = open_ioas(s)
    mock_domain(s, fd, ioas)
    map_fixed(s, fd, ioas, s.page(0), 4 * PAGE, APERTURE, RW)
    s.poke(s.page(0), b"x" * PAGE * 4)
    s.do(fd, t.test_md_check_refs(length=4 * PAGE, uptr=s.page(0), refs=1))
    s.close(fd)
    other = s.open()
    s.do(other, t.test_md_check_refs(length=4 * PAGE, uptr=s.page(0), refs=0))


@check("core 4.4 row 3", "core 1.5 rule 3")
def an_ioas_that_cannot_be_told(s: Subject) -> None:
    fd = s.open()
    unwritable(s, fd, u.iommu_ioas_alloc())
    s.expect(ioas_alloc(s, fd) == 1, "its id is free again")


@check("core 2.5 row 5")
def destroying_undoes_what_an_object_did(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    s.poke(s.page(0), b"x" * PAGE)
    map_fixed(s, fd, ioas, s.page(0), PAGE, APERTURE)
    stdev, _, device = mock_domain(s, fd, ioas)
    hwpt = s.do(fd, u.iommu_hwpt_alloc(dev_id=device, pt_id=ioas)).out_hwpt_id
    s.do(fd, u.iommu_destroy(id=stdev))
    s.do(fd, t.test_md_check_refs(length=PAGE, uptr=s.page(0), refs=1))
    s.refuses(EBUSY, fd, u.iommu_destroy(id=ioas))
    s.do(fd, u.iommu_destroy(id=hwpt))
    s.do(fd, t.test_md_check_refs(length=PAGE, uptr=s.page(0), refs=0))
    s.expect(free_ranges(s, fd, ioas) == ([(0, 2**64 - 1)], 1), "the page table's ranges and alignment went")
    reserve(s, fd, ioas, 0, 0x1000)
    s.do(fd, u.iommu_destroy(id=ioas))
    s.expect(free_ranges(s, fd, ioas_alloc(s, fd))[0] == [(0, 2**64 - 1)], "a fresh one")
