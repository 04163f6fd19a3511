"""core 4.4-4.6, 4.16: IOAS_ALLOC, IOVA_RANGES, ALLOW_IOVAS, VFIO_IOAS."""

from __future__ import annotations

from errno import EADDRINUSE, EFAULT, EINVAL, EMSGSIZE, ENODEV, ENOENT, ENOSPC, EOPNOTSUPP

from iommufd.testing.conformance import check
from iommufd.testing.conformance.common import (
    APERTURE,
    RANGES,
    RW,
    ULMAX,
    allow,
    free_ranges,
    ioas_alloc,
    map_auto,
    map_fixed,
    mock_domain,
    open_ioas,
    put_ranges,
    reserve,
)
from iommufd.testing.subject import PAGE, Subject
from iommufd.uapi import iommufd as u
from iommufd.uapi import iommufd_test as t


@check("core 4.4 row 1", "core 4.4 row 2", "core 4.4 row 4")
def ioas_alloc_makes_an_empty_space(s: Subject) -> None:
    fd = s.open()
    s.refuses(EOPNOTSUPP, fd, u.iommu_ioas_alloc(flags=2**31))
    ioas = ioas_alloc(s, fd)
    s.expect(free_ranges(s, fd, ioas) == ([(0, ULMAX)], 1), "one range, alignment 1")


@check("core 4.5 row 1", "core 4.5 row 2")
def iova_ranges_refuses(s: Subject) -> None:
    fd = s.open()
    s.refuses(EOPNOTSUPP, fd, u.iommu_ioas_iova_ranges(ioas_id=9, reserved=1))
    s.refuses(ENOENT, fd, u.iommu_ioas_iova_ranges(ioas_id=9))


@check("core 4.5 row 3", "core 4.5 row 4")
def iova_ranges_are_the_holes_of_the_reserved(s: Subject) -> None:
    """Overlapping and touching reservations merge; areas and the allowed list do not matter."""
    fd, ioas = open_ioas(s)
    reserve(s, fd, ioas, 0x1000, 0x1000)
    reserve(s, fd, ioas, 0x2000, 0x1000)
    reserve(s, fd, ioas, 0x2800, 0x1800)
    reserve(s, fd, ioas, 0x10000, 1)
    allow(s, fd, ioas, [(0x20000, 0x2FFFF)])
    map_fixed(s, fd, ioas, s.page(0), PAGE, 0x40000)
    expected = [(0, 0xFFF), (0x4000, 0xFFFF), (0x10001, ULMAX)]
    s.expect(free_ranges(s, fd, ioas) == (expected, 1), "three holes")
    reserve(s, fd, ioas, 0, 1)
    reserve(s, fd, ioas, ULMAX, 1)
    s.expect(free_ranges(s, fd, ioas)[0] == [(1, 0xFFF), (0x4000, 0xFFFF), (0x10001, ULMAX - 1)], "the ends too")


@check("core 4.5 row 5", "core 4.5 row 3")
def iova_ranges_with_too_little_room(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    reserve(s, fd, ioas, 0x1000, 0x1000)
    s.poke(RANGES, bytes(64))
    out = s.refuses(EMSGSIZE, fd, u.iommu_ioas_iova_ranges(ioas_id=ioas, num_iovas=1, allowed_iovas=RANGES))
    s.expect(out.num_iovas == 2, "the total is told")
    s.peek(RANGES, 64)
    out = s.refuses(EMSGSIZE, fd, u.iommu_ioas_iova_ranges(ioas_id=ioas, num_iovas=0, allowed_iovas=1))
    s.expect(out.num_iovas == 2, "the pointer is not looked at")
    reserve(s, fd, ioas, 0, ULMAX)
    reserve(s, fd, ioas, ULMAX, 1)
    out = s.do(fd, u.iommu_ioas_iova_ranges(ioas_id=ioas))
    s.expect(out.num_iovas == 0, "no hole, no error")


@check("core 4.5 row 3")
def iova_ranges_into_bad_memory(s: Subject) -> None:
    """Entries before the hole stay written; the struct is not."""
    fd, ioas = open_ioas(s)
    reserve(s, fd, ioas, 0x1000, 0x1000)
    reserve(s, fd, ioas, 0x3000, 0x1000)
    end = s.page(50)
    s.munmap(end, PAGE)
    s.poke(end - 32, bytes(32))
    out = s.refuses(EFAULT, fd, u.iommu_ioas_iova_ranges(ioas_id=ioas, num_iovas=3, allowed_iovas=end - 24))
    s.expect((out.num_iovas, out.out_iova_alignment) == (3, 0), "untouched")
    s.peek(end - 32, 32)


@check("core 4.6 row 1", "core 4.6 row 2", "core 4.6 row 3")
def allow_iovas_refuses(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    s.refuses(EOPNOTSUPP, fd, u.iommu_ioas_allow_iovas(ioas_id=9, reserved=1))
    s.refuses(ENOENT, fd, u.iommu_ioas_allow_iovas(ioas_id=9, num_iovas=1))
    s.refuses(EFAULT, fd, u.iommu_ioas_allow_iovas(ioas_id=ioas, num_iovas=1))
    end = s.page(51)
    s.munmap(end, PAGE)
    put_ranges(s, [(5, 5)], end - 16)
    request = u.iommu_ioas_allow_iovas(ioas_id=ioas, num_iovas=2, allowed_iovas=end - 16)
    s.refuses(EINVAL, fd, request)
    put_ranges(s, [(5, 9)], end - 16)
    s.refuses(EFAULT, fd, request)


@check("core 4.6 row 4", "core 4.6 row 5")
def allowed_ranges_must_be_sane(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    for bad in ([(5, 5)], [(6, 5)], [(0, 9), (9, 12)], [(0x1000, 0x1FFF), (0, 0x1000)], [(0, ULMAX), (3, 4)]):
        at = put_ranges(s, bad)
        s.refuses(EINVAL, fd, u.iommu_ioas_allow_iovas(ioas_id=ioas, num_iovas=len(bad), allowed_iovas=at))
    allow(s, fd, ioas, [(0x2000, 0x2FFF), (0x1000, 0x1FFF), (0, 0xFFF)])


@check("core 4.6 row 7", "core 4.6 row 8", "mock 5.1 row 4")
def allowed_and_reserved_exclude_each_other(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    allow(s, fd, ioas, [(0x10000, 0x1FFFF)])
    reserve(s, fd, ioas, 0x30000, 0x1000)
    at = put_ranges(s, [(0x50000, 0x5FFFF), (0x30FFF, 0x31FFF)])
    s.refuses(EADDRINUSE, fd, u.iommu_ioas_allow_iovas(ioas_id=ioas, num_iovas=2, allowed_iovas=at))
    s.expect(map_auto(s, fd, ioas, s.page(0), PAGE) == 0x10000, "the old list is intact")
    s.refuses(EADDRINUSE, fd, t.test_add_reserved(id=ioas, start=0x1FFFF, length=1))
    reserve(s, fd, ioas, 0x20000, 1)
    allow(s, fd, ioas, [])
    s.refuses(EADDRINUSE, fd, t.test_add_reserved(id=ioas, start=0x10FFF, length=1))


@check("core 4.6 row 8", "core 4.3 interplay")
def the_allowed_list_binds_automatic_maps_only(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    map_fixed(s, fd, ioas, s.page(0), PAGE, 0x10000)
    allow(s, fd, ioas, [(0x10000, 0x11FFF)])
    map_fixed(s, fd, ioas, s.page(1), PAGE, 0x90000)
    s.expect(map_auto(s, fd, ioas, s.page(2), PAGE) == 0x11000, "the allowed page that is left")
    s.refuses(ENOSPC, fd, u.iommu_ioas_map(flags=RW, ioas_id=ioas, user_va=s.page(3), length=PAGE))
    allow(s, fd, ioas, [])
    s.expect(map_auto(s, fd, ioas, s.page(3), PAGE) == 0x1000, "an empty list allows everything")


@check(
    "core 4.3 row 5",
    "devices 3.8 domain row 3",
    "devices 3.8 domain row 5",
    "core 4.2 domain added",
    "core 4.3 row 2",
    "core 4.3 row 3",
)
def a_domain_reserves_what_is_outside_its_aperture(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    stdev, _, _ = mock_domain(s, fd, ioas)
    s.expect(free_ranges(s, fd, ioas) == ([(APERTURE, t.MOCK_APERTURE_LAST)], 2048), "the aperture")
    s.do(fd, u.iommu_destroy(id=stdev))
    s.expect(free_ranges(s, fd, ioas) == ([(0, ULMAX)], 1), "all of it again")


@check(
    "devices 3.8 domain row 1", "devices 3.8 domain row 2", "core 4.3 row 1", "core 4.3 row 2", "core 4.2 domain added"
)
def areas_may_refuse_a_domain(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    map_fixed(s, fd, ioas, s.page(0), PAGE, 0x10000)
    s.refuses(EADDRINUSE, fd, t.test_mock_domain(id=ioas))
    s.expect(free_ranges(s, fd, ioas) == ([(0, ULMAX)], 1), "nothing is left of the attempt")
    s.do(fd, u.iommu_ioas_unmap(ioas_id=ioas, iova=0x10000, length=PAGE))
    map_fixed(s, fd, ioas, s.page(0) + 1, 1, APERTURE)
    s.refuses(EADDRINUSE, fd, t.test_mock_domain(id=ioas))


@check("core 4.16")
def vfio_ioas(s: Subject) -> None:
    fd = s.open()
    s.refuses(ENODEV, fd, u.iommu_vfio_ioas(op=0))
    s.refuses(ENOENT, fd, u.iommu_vfio_ioas(op=1, ioas_id=1))
    s.refuses(EOPNOTSUPP, fd, u.iommu_vfio_ioas(op=3))
    s.refuses(EOPNOTSUPP, fd, u.iommu_vfio_ioas(op=9, reserved=1))
    ioas = ioas_alloc(s, fd)
    s.do(fd, u.iommu_vfio_ioas(op=1, ioas_id=ioas))
    s.expect(s.do(fd, u.iommu_vfio_ioas(op=0)).ioas_id == ioas, "GET")
    s.do(fd, u.iommu_vfio_ioas(op=2))
    s.do(fd, u.iommu_vfio_ioas(op=2))
    s.refuses(ENODEV, fd, u.iommu_vfio_ioas(op=0))
