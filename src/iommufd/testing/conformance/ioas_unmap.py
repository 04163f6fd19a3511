"""core 4.12: IOAS_UNMAP and the range walk."""

from __future__ import annotations

from errno import EDEADLK, EINVAL, ENOENT, EOVERFLOW

from iommufd.testing.conformance import check
from iommufd.testing.conformance.common import APERTURE, ULMAX, map_fixed, mock_domain, open_ioas, unmap
from iommufd.testing.subject import PAGE, Subject
from iommufd.uapi import iommufd as u
from iommufd.uapi import iommufd_test as t


def unmapping(ioas: int, iova: int, length: int) -> u.iommu_ioas_unmap:
    return u.iommu_ioas_unmap(ioas_id=ioas, iova=iova, length=length)


@check("core 4.12 row 1", "core 4.12 row 3", "core 4.12 row 4", "core 4.12 row 5")
def unmap_refuses(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    s.refuses(ENOENT, fd, unmapping(9, ULMAX, ULMAX))
    s.refuses(EOVERFLOW, fd, unmapping(ioas, ULMAX, 1))
    s.refuses(EOVERFLOW, fd, unmapping(ioas, 1, ULMAX))
    s.refuses(EINVAL, fd, unmapping(ioas, 5, 0))
    s.refuses(EOVERFLOW, fd, unmapping(ioas, ULMAX - 1, 3))


@check("core 4.12 row 2", "core 4.12 row 7")
def unmapping_everything_and_nothing(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    s.expect(unmap(s, fd, ioas, 0, ULMAX) == 0, "all of an empty space is nothing, successfully")
    s.refuses(ENOENT, fd, unmapping(ioas, 0x1000, PAGE))
    s.refuses(ENOENT, fd, unmapping(ioas, 0, ULMAX - 1))
    map_fixed(s, fd, ioas, s.page(0), PAGE, 0x1000)
    map_fixed(s, fd, ioas, s.page(0), PAGE, 0x8000)
    s.expect(unmap(s, fd, ioas, 0, ULMAX) == 2 * PAGE, "all of two areas")


@check(
    "devices 8.6 row 3", "devices 8.6 row 6", "core 4.12 row 6", "core 4.12 row c", "core 4.12 row e", "core 4.12 row 8"
)
def the_walk_ascends_and_is_not_atomic(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    for iova in (0x1000, 0x3000, 0x4000):
        map_fixed(s, fd, ioas, s.page(0), PAGE, iova)
    s.expect(unmap(s, fd, ioas, 0x0, 0x2800) == PAGE, "gaps do not count")
    map_fixed(s, fd, ioas, s.page(0), PAGE, 0x1000)
    s.refuses(ENOENT, fd, unmapping(ioas, 0x1000, 0x3800))
    for iova in (0x1000, 0x3000):
        s.refuses(ENOENT, fd, unmapping(ioas, iova, PAGE))
    s.expect(unmap(s, fd, ioas, 0x4000, PAGE) == PAGE, "the area that did not fit is still there")
    map_fixed(s, fd, ioas, s.page(0), 2 * PAGE, 0x1000)
    s.refuses(ENOENT, fd, unmapping(ioas, 0x2000, PAGE))
    s.refuses(ENOENT, fd, unmapping(ioas, 0x1001, PAGE))
    s.expect(unmap(s, fd, ioas, 0x1000, 2 * PAGE) == 2 * PAGE, "nothing had gone")


@check("devices 8.6 row 4", "devices 8.6 row 5", "devices 8.6 row 6", "core 4.12 row d", "mock 6.4", "core 5.2")
def an_access_lets_go_when_asked(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    s.poke(s.page(0), b"x" * 3 * PAGE)
    access = s.do(fd, t.test_create_access(id=ioas, flags=1)).out_access_fd
    map_fixed(s, fd, ioas, s.page(0), 2 * PAGE, 0x1000)
    map_fixed(s, fd, ioas, s.page(2), PAGE, 0x3000)
    first = s.do(fd, t.test_access_pages(id=access, iova=0x1000, length=3 * PAGE, uptr=s.page(0))).out_access_pages_id
    second = s.do(fd, t.test_access_pages(id=access, iova=0x3000, length=PAGE, uptr=s.page(2))).out_access_pages_id
    s.expect((first, second) == (0, 1), "item ids count up")
    s.do(fd, t.test_md_check_refs(length=3 * PAGE, uptr=s.page(0), refs=1))
    s.expect(unmap(s, fd, ioas, 0x1000, 2 * PAGE) == 2 * PAGE, "the unmap succeeds")
    s.refuses(ENOENT, fd, t.test_destroy_access_pages(id=access, access_pages_id=first))
    s.do(fd, t.test_md_check_refs(length=2 * PAGE, uptr=s.page(0), refs=0))
    s.do(fd, t.test_md_check_refs(length=PAGE, uptr=s.page(2), refs=1))
    s.do(fd, t.test_destroy_access_pages(id=access, access_pages_id=second))
    s.do(fd, t.test_md_check_refs(length=PAGE, uptr=s.page(2), refs=0))


@check("devices 8.4 row 5a", "devices 8.6 row 4", "devices 8.6 row 5", "devices 8.7 row 4", "core 4.12 retry")
def a_hundred_touching_pinned_areas(s: Subject) -> None:
    """The retry counter runs on over areas that touch: the 101st is left, refusing accesses ever after."""
    fd, ioas = open_ioas(s)
    access = s.do(fd, t.test_create_access(id=ioas, flags=1)).out_access_fd
    for i in range(102):
        map_fixed(s, fd, ioas, s.page(i), PAGE, 0x100000 + i * PAGE)
        s.do(fd, t.test_access_pages(id=access, iova=0x100000 + i * PAGE, length=PAGE))
    s.refuses(EDEADLK, fd, unmapping(ioas, 0x100000, 102 * PAGE))
    s.refuses(ENOENT, fd, unmapping(ioas, 0x100000, 100 * PAGE))
    s.refuses(EINVAL, fd, t.test_access_pages(id=access, iova=0x100000 + 100 * PAGE, length=PAGE))
    s.refuses(EINVAL, fd, t.test_access_rw(id=access, iova=0x100000 + 100 * PAGE, length=1, uptr=s.page(200)))
    s.do(fd, t.test_access_pages(id=access, iova=0x100000 + 101 * PAGE, length=PAGE))
    s.expect(unmap(s, fd, ioas, 0x100000, 102 * PAGE) == 2 * PAGE, "the rest goes next time")


@check("core 4.12 retry")
def a_hundred_and_two_areas_with_gaps(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    access = s.do(fd, t.test_create_access(id=ioas, flags=1)).out_access_fd
    for i in range(102):
        map_fixed(s, fd, ioas, s.page(i), PAGE, 0x100000 + i * 2 * PAGE)
        s.do(fd, t.test_access_pages(id=access, iova=0x100000 + i * 2 * PAGE, length=PAGE))
    s.expect(unmap(s, fd, ioas, 0x100000, 204 * PAGE) == 102 * PAGE, "gaps reset the counter")


@check("core 5.4 unpin", "core 4.12 row e")
def unmap_empties_every_domain(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    hwpts = [mock_domain(s, fd, ioas)[1], mock_domain(s, fd, ioas)[1]]
    s.expect(hwpts[0] == hwpts[1], "the second device joins the automatic HWPT")
    map_fixed(s, fd, ioas, s.page(0), PAGE, APERTURE)
    s.do(fd, t.test_md_check_map(id=hwpts[0], iova=APERTURE, length=PAGE, uptr=s.page(0)))
    unmap(s, fd, ioas, APERTURE, PAGE)
    s.refuses(EINVAL, fd, t.test_md_check_map(id=hwpts[0], iova=APERTURE, length=PAGE, uptr=s.page(0)))
