"""core 4.7, 4.9: IOAS_MAP and the mapping core."""

from __future__ import annotations

from errno import EEXIST, EFAULT, EINVAL, ENOENT, EOPNOTSUPP, EOVERFLOW
from mmap import PROT_READ

from iommufd.testing.conformance import check
from iommufd.testing.conformance.common import (
    APERTURE,
    FIXED,
    READ,
    RW,
    ULMAX,
    WRITE,
    map_auto,
    map_fixed,
    mock_domain,
    open_ioas,
    reserve,
    unmap,
)
from iommufd.testing.subject import PAGE, Subject
from iommufd.uapi import iommufd as u
from iommufd.uapi import iommufd_test as t


def request(ioas: int, **fields: int) -> u.iommu_ioas_map:
    values = {"flags": RW | FIXED, "user_va": 0x1000_0000_0000, "length": PAGE, "iova": 0x10000, **fields}
    return u.iommu_ioas_map(ioas_id=ioas, **values)


@check("core 4.9 row 1")
def unknown_flags_and_reserved_first(s: Subject) -> None:
    fd = s.open()
    for bad in (request(9, flags=8), request(9, flags=2**31 | RW), request(9, reserved=1, flags=0, iova=ULMAX)):
        s.refuses(EOPNOTSUPP, fd, bad)


@check("core 4.9 row 2")
def the_last_iova_is_refused_even_without_fixed(s: Subject) -> None:
    fd = s.open()
    s.refuses(EOVERFLOW, fd, request(9, iova=ULMAX, flags=0))
    s.refuses(EOVERFLOW, fd, request(9, length=ULMAX, flags=0))


@check("core 4.9 row 3", "core 4.9 row 4")
def a_mapping_needs_a_direction_and_an_ioas(s: Subject) -> None:
    fd = s.open()
    s.refuses(EINVAL, fd, request(9, flags=FIXED))
    s.refuses(ENOENT, fd, request(9, user_va=ULMAX, length=0))


@check("core 4.9 row 5", "core 4.9 row 6")
def memory_must_end_below_the_top(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    s.refuses(EOVERFLOW, fd, request(ioas, user_va=ULMAX - PAGE + 1))
    s.refuses(EOVERFLOW, fd, request(ioas, user_va=ULMAX, length=1))
    s.do(fd, request(ioas, user_va=ULMAX - PAGE, length=PAGE))
    s.refuses(EINVAL, fd, request(ioas, length=0))
    s.refuses(EINVAL, fd, request(ioas, user_va=0, length=ULMAX - PAGE + 1))


@check("core 4.7 row 2", "core 4.7 row 3b")
def alignment_of_length_and_iova(s: Subject) -> None:
    """With a mock domain the alignment is 2048."""
    fd, ioas = open_ioas(s)
    mock_domain(s, fd, ioas)
    s.refuses(EINVAL, fd, request(ioas, iova=APERTURE, length=1))
    s.refuses(EINVAL, fd, request(ioas, iova=APERTURE + 1))
    s.refuses(EINVAL, fd, request(ioas, flags=RW, length=2047))
    s.refuses(EINVAL, fd, request(ioas, iova=APERTURE, user_va=s.page(0) + 1024))
    s.do(fd, request(ioas, iova=APERTURE + 2048, user_va=s.page(0) + 2048, length=2048))


@check("core 4.7 row 3b")
def fixed_iova_checks_in_order(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    reserve(s, fd, ioas, 0x20000, 0x1000)
    s.do(fd, request(ioas))
    s.refuses(EOVERFLOW, fd, request(ioas, iova=ULMAX - 1, length=PAGE))
    s.refuses(EINVAL, fd, request(ioas, iova=0x1F001))
    s.refuses(EINVAL, fd, request(ioas, iova=0x20FFF, length=1))
    s.refuses(EEXIST, fd, request(ioas, iova=0x10FFF, length=1))
    s.refuses(EEXIST, fd, request(ioas, iova=0xF001))
    s.refuses(EINVAL, fd, request(ioas, iova=0x10000, length=0x11000))
    s.do(fd, request(ioas, iova=0xF000))
    s.do(fd, request(ioas, iova=0x11000))


@check("core 4.7 row 5", "core 4.7 consequences")
def an_overlap_beats_misaligned_memory(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    mock_domain(s, fd, ioas)
    map_fixed(s, fd, ioas, s.page(0), PAGE, APERTURE)
    s.refuses(EEXIST, fd, request(ioas, iova=APERTURE, user_va=s.page(0) + 1))
    s.refuses(EINVAL, fd, request(ioas, iova=APERTURE + PAGE, user_va=s.page(0) + 1))


@check("core 4.7 consequences")
def without_a_domain_memory_is_not_touched(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    s.do(fd, request(ioas, user_va=0x123456789123, length=0x777, iova=0x5555))
    s.do(fd, request(ioas, user_va=2**63, iova=0x10000))
    s.expect(unmap(s, fd, ioas, 0, ULMAX) == 0x777 + PAGE, "any byte may map any byte")


@check("core 4.7 row 7", "core 5.5 user")
def pinning_needs_memory_that_is_there(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    mock_domain(s, fd, ioas)
    hole, readonly, none = s.page(100), s.page(110), s.page(120)
    s.munmap(hole, PAGE)
    s.mprotect(readonly, PAGE, PROT_READ)
    s.mprotect(none, PAGE, 0)
    for va, length, flags, expected in (
        (hole, PAGE, RW, EFAULT),
        (hole - PAGE, 3 * PAGE, READ, EFAULT),
        (readonly, PAGE, RW, EFAULT),
        (readonly, PAGE, WRITE, EFAULT),
        (readonly, PAGE, READ, 0),
        (none, PAGE, READ, EFAULT),
        (2**47, PAGE, READ, EFAULT),
        (2**63, PAGE, READ, EFAULT),
    ):
        asked = request(ioas, user_va=va, length=length, flags=flags | FIXED, iova=APERTURE)
        if expected:
            s.refuses(expected, fd, asked)
        else:
            s.do(fd, asked)
            unmap(s, fd, ioas, APERTURE, length)
    s.do(fd, request(ioas, iova=APERTURE, user_va=s.page(0)))


@check("core 4.7 row 8", "core 5.2")
def a_failed_map_pins_nothing(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    mock_domain(s, fd, ioas)
    s.poke(s.page(0), b"x" * 4 * PAGE)
    s.munmap(s.page(4), PAGE)
    s.refuses(EFAULT, fd, request(ioas, iova=APERTURE, user_va=s.page(0), length=8 * PAGE))
    s.do(fd, t.test_md_check_refs(length=4 * PAGE, uptr=s.page(0), refs=0))
    s.do(fd, request(ioas, iova=APERTURE, user_va=s.page(0), length=4 * PAGE))
    s.do(fd, t.test_md_check_refs(length=4 * PAGE, uptr=s.page(0), refs=1))


@check("core 5.2", "core 4.9 row 7")
def two_maps_of_the_same_memory_pin_twice(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    mock_domain(s, fd, ioas)
    mock_domain(s, fd, ioas)
    s.poke(s.page(0), b"x" * 2 * PAGE)
    map_fixed(s, fd, ioas, s.page(0), 2 * PAGE, APERTURE)
    s.do(fd, t.test_md_check_refs(length=2 * PAGE, uptr=s.page(0), refs=1))
    map_fixed(s, fd, ioas, s.page(0), PAGE, APERTURE + 0x10000)
    s.do(fd, t.test_md_check_refs(length=PAGE, uptr=s.page(0), refs=2))
    s.do(fd, t.test_md_check_refs(length=PAGE, uptr=s.page(1), refs=1))
    unmap(s, fd, ioas, APERTURE, 2 * PAGE)
    s.do(fd, t.test_md_check_refs(length=PAGE, uptr=s.page(0), refs=1))


@check("core 4.9 row 8", "core 4.9 row 9", "core 1.5 rule 1")
def the_answer_echoes_and_tells_the_iova(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    out = s.do(fd, u.iommu_ioas_map(flags=RW, ioas_id=ioas, user_va=s.page(0), length=PAGE, iova=0x123))
    s.expect((out.size, out.flags, out.iova, out.length) == (40, RW, 0x1000, PAGE), "inputs echoed, IOVA chosen")
    s.expect(map_auto(s, fd, ioas, s.page(0), PAGE) == 0x2000, "the next one")


@check("core 5.7 munmap", "core 5.3", "mock 5.2 row 5")
def a_domain_keeps_the_frame_it_pinned(s: Subject) -> None:
    """After the page behind the address changed, the domain still has the old one; a new pin sees the new one."""
    fd, ioas = open_ioas(s)
    _, hwpt, _ = mock_domain(s, fd, ioas)
    s.poke(s.page(0), b"old!" * 1024)
    map_fixed(s, fd, ioas, s.page(0), PAGE, APERTURE)
    s.do(fd, t.test_md_check_map(id=hwpt, iova=APERTURE, length=PAGE, uptr=s.page(0)))
    s.mmap(s.page(0), PAGE)
    s.poke(s.page(0), b"new!" * 1024)
    s.refuses(EINVAL, fd, t.test_md_check_map(id=hwpt, iova=APERTURE, length=PAGE, uptr=s.page(0)))
    access = s.do(fd, t.test_create_access(id=ioas)).out_access_fd
    s.do(fd, t.test_access_rw(id=access, iova=APERTURE, length=8, uptr=s.page(1)))
    s.expect(s.peek(s.page(1), 8) == b"new!new!", "the plain path reads the address as it is now")
    # slow path inside one page: the source's address as it is now; longer than a page: frames already held
    s.do(fd, t.test_access_rw(id=access, iova=APERTURE, length=8, uptr=s.page(1), flags=4))
    s.expect(s.peek(s.page(1), 8) == b"new!new!", "one page of the slow path pins the address as it is now")
    unmap(s, fd, ioas, APERTURE, PAGE)
    map_fixed(s, fd, ioas, s.page(0), PAGE, APERTURE)
    s.do(fd, t.test_md_check_map(id=hwpt, iova=APERTURE, length=PAGE, uptr=s.page(0)))


@check("core 5.7 munmap", "core 5.6 slow path")
def pinned_bytes_outlive_munmap(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    mock_domain(s, fd, ioas)
    s.poke(s.page(0), b"A" * PAGE + b"B" * PAGE)
    map_fixed(s, fd, ioas, s.page(0), 2 * PAGE, APERTURE)
    access = s.do(fd, t.test_create_access(id=ioas)).out_access_fd
    s.munmap(s.page(0), 2 * PAGE)
    s.refuses(EFAULT, fd, t.test_access_rw(id=access, iova=APERTURE, length=2 * PAGE, uptr=s.page(8)))
    s.do(fd, t.test_access_rw(id=access, iova=APERTURE, length=2 * PAGE, uptr=s.page(8), flags=4))
    s.expect(s.peek(s.page(8), 2 * PAGE) == b"A" * PAGE + b"B" * PAGE, "the frames are still there")
    s.poke(s.page(12), b"C" * 2 * PAGE)
    s.do(fd, t.test_access_rw(id=access, iova=APERTURE, length=2 * PAGE, uptr=s.page(12), flags=5))
    s.do(fd, t.test_access_rw(id=access, iova=APERTURE, length=2 * PAGE, uptr=s.page(16), flags=4))
    s.expect(s.peek(s.page(16), 2 * PAGE) == b"C" * 2 * PAGE, "and can be written")
