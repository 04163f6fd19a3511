"""core 5.6, mock 6: software accesses, pinning and copying."""

from __future__ import annotations

from errno import EADDRINUSE, EBADFD, EFAULT, EINVAL, ENOENT, ENOMEM, EOPNOTSUPP, EOVERFLOW, EPERM

from iommufd.testing.conformance import check
from iommufd.testing.conformance.common import (
    APERTURE,
    READ,
    ULMAX,
    WRITE,
    free_ranges,
    ioas_alloc,
    map_fixed,
    mock_domain,
    open_ioas,
    unmap,
    unwritable,
)
from iommufd.testing.subject import PAGE, Subject
from iommufd.uapi import iommufd as u
from iommufd.uapi import iommufd_test as t

EBADE = 52
PINS = t.MOCK_FLAGS_ACCESS_CREATE_NEEDS_PIN_PAGES


def access_on(s: Subject, fd: int, ioas: int, flags: int = PINS) -> int:
    return s.do(fd, t.test_create_access(id=ioas, flags=flags)).out_access_fd


@check("devices 8.3 row 5", "mock 6.1 row 1", "mock 6.1 row 5", "mock 6.1 row 6", "core 4.2 access attached")
def create_access(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    s.refuses(EOPNOTSUPP, fd, t.test_create_access(id=9, flags=2))
    s.refuses(ENOENT, fd, t.test_create_access(id=9))
    map_fixed(s, fd, ioas, s.page(0) + 0x800, 0x800, 0x800)
    s.refuses(EADDRINUSE, fd, t.test_create_access(id=ioas, flags=PINS))
    plain = access_on(s, fd, ioas, 0)
    s.expect(free_ranges(s, fd, ioas)[1] == 1, "an access that does not pin has no alignment")
    unmap(s, fd, ioas, 0x800, 0x800)
    pinning = access_on(s, fd, ioas)
    s.expect(free_ranges(s, fd, ioas)[1] == PAGE, "one that pins has a page's")
    s.close(pinning)
    s.expect(free_ranges(s, fd, ioas)[1] == 1, "and it goes with it")
    s.close(plain)


@check("mock 6.2 row 3", "mock 6.1 file")
def the_access_file(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    access = access_on(s, fd, ioas)
    s.expect(s.read(access, 8).errno == EINVAL, "read is EINVAL")
    s.expect(s.write(access, b"x").errno == EINVAL, "write is EINVAL")
    s.expect(s.poll(access, wrnorm=True) == 0x145, "always ready")
    s.expect(s.ioctl(access, 0x3B81, bytes(12)).errno == 25, "no ioctl")
    for bad in (fd, 9999):
        s.refuses(EBADFD, fd, t.test_access_pages(id=bad, iova=0, length=1))
    s.refuses(EBADFD, fd, t.test_access_rw(id=9999, length=1))
    s.refuses(EBADFD, fd, t.test_destroy_access_pages(id=9999))
    s.refuses(EBADFD, fd, t.test_access_replace_ioas(id=9999))


@check(
    "devices 8.4 row 2",
    "devices 8.4 row 3",
    "mock 6.2 row 1",
    "mock 6.2 row 2",
    "mock 6.2 row 4",
    "mock 6.2 row 6",
    "mock 6.2 row 7",
    "core 5.6 row 1",
)
def access_pages_refuses(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    access, plain = access_on(s, fd, ioas), access_on(s, fd, ioas, 0)
    s.refuses(ENOMEM, fd, t.test_access_pages(id=9999, length=(16 << 20) + 1, flags=2))
    s.refuses(EOPNOTSUPP, fd, t.test_access_pages(id=9999, flags=2))
    s.refuses(EOPNOTSUPP, fd, t.test_access_pages(id=plain))
    s.refuses(EINVAL, fd, t.test_access_pages(id=access, iova=5, length=0))
    s.refuses(EOVERFLOW, fd, t.test_access_pages(id=access, iova=ULMAX, length=2))


@check(
    "devices 8.4 row 5b",
    "devices 8.4 row 5c",
    "devices 8.4 row 5",
    "devices 8.4 row 6",
    "mock 6.2 row 8",
    "mock 6.2 row 9",
    "mock 6.2 row 11",
    "core 5.6 row 2",
    "core 5.6 row 3",
    "core 5.6 row 7",
)
def access_pages_and_the_areas(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    map_fixed(s, fd, ioas, s.page(0), 2 * PAGE, 0x10000)
    map_fixed(s, fd, ioas, s.page(2), PAGE, 0x12000, READ)
    map_fixed(s, fd, ioas, s.page(3), PAGE, 0x14000, WRITE)
    access = access_on(s, fd, ioas)
    pin = t.test_access_pages
    s.refuses(ENOENT, fd, pin(id=access, iova=0xF000, length=PAGE))
    s.refuses(ENOENT, fd, pin(id=access, iova=0x12000, length=2 * PAGE))
    s.refuses(EINVAL, fd, pin(id=access, iova=0x10010, length=16))
    s.refuses(EPERM, fd, pin(id=access, iova=0x12000, length=PAGE, flags=1))
    s.refuses(EPERM, fd, pin(id=access, iova=0x10000, length=3 * PAGE, flags=1))
    s.refuses(EPERM, fd, pin(id=access, iova=0x14000, length=PAGE))
    s.do(fd, pin(id=access, iova=0x14000, length=PAGE, flags=1))
    s.do(fd, pin(id=access, iova=0x10000, length=3 * PAGE))
    s.do(fd, pin(id=access, iova=0x11000, length=17))
    s.poke(s.page(0), b"x" * 3 * PAGE)
    s.do(fd, t.test_md_check_refs(length=2 * PAGE, uptr=s.page(0), refs=1))


@check("devices 8.4 row 7", "mock 6.2 row 12", "mock 6.2 row 13", "mock 6.3")
def pinned_pages_are_compared_and_counted(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    s.poke(s.page(0), b"x" * 4 * PAGE)
    map_fixed(s, fd, ioas, s.page(0), 2 * PAGE, 0x10000)
    access = access_on(s, fd, ioas)
    s.refuses(EBADE, fd, t.test_access_pages(id=access, iova=0x10000, length=PAGE, uptr=s.page(2)))
    s.do(fd, t.test_md_check_refs(length=2 * PAGE, uptr=s.page(0), refs=0))
    item = s.do(fd, t.test_access_pages(id=access, iova=0x10000, length=2 * PAGE, uptr=s.page(0))).out_access_pages_id
    again = s.do(fd, t.test_access_pages(id=access, iova=0x10000, length=2 * PAGE, uptr=s.page(0))).out_access_pages_id
    s.do(fd, t.test_md_check_refs(length=2 * PAGE, uptr=s.page(0), refs=1))
    s.do(fd, t.test_destroy_access_pages(id=access, access_pages_id=item))
    s.do(fd, t.test_md_check_refs(length=2 * PAGE, uptr=s.page(0), refs=1))
    s.refuses(ENOENT, fd, t.test_destroy_access_pages(id=access, access_pages_id=item))
    s.do(fd, t.test_destroy_access_pages(id=access, access_pages_id=again))
    s.do(fd, t.test_md_check_refs(length=2 * PAGE, uptr=s.page(0), refs=0))


@check("mock 6.2 row 12")
def pages_are_compared_upwards(s: Subject) -> None:
    """A page that is another beats a later one that is not there."""
    fd, ioas = open_ioas(s)
    s.poke(s.page(0), b"x" * 3 * PAGE)
    s.poke(s.page(10), b"x" * PAGE)
    map_fixed(s, fd, ioas, s.page(0), 3 * PAGE, 0x10000)
    access = access_on(s, fd, ioas)
    s.munmap(s.page(11), PAGE)
    s.refuses(EBADE, fd, t.test_access_pages(id=access, iova=0x10000, length=3 * PAGE, uptr=s.page(10)))
    s.mmap(s.page(11), PAGE)
    s.munmap(s.page(3), PAGE)
    s.refuses(EBADE, fd, t.test_access_pages(id=access, iova=0x10000, length=3 * PAGE, uptr=s.page(1)))
    s.munmap(s.page(0), PAGE)
    s.refuses(EFAULT, fd, t.test_access_pages(id=access, iova=0x11000, length=2 * PAGE, uptr=s.page(0)))


@check("mock 6.2 row 12")
def whole_pages_are_compared(s: Subject) -> None:
    """Wherever in the first page the address points."""
    fd, ioas = open_ioas(s)
    map_fixed(s, fd, ioas, s.page(0), 2 * PAGE, 0x10000)
    access = access_on(s, fd, ioas)
    for offset in (1, 0x800, PAGE - 1):
        s.do(fd, t.test_access_pages(id=access, iova=0x10000, length=PAGE + 1, uptr=s.page(0) + offset))
        s.refuses(EBADE, fd, t.test_access_pages(id=access, iova=0x10000, length=PAGE, uptr=s.page(1) + offset))


@check("mock 6.2 row 10", "core 5.6 row 6", "core 5.5 user")
def pinning_bad_memory(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    s.munmap(s.page(40), PAGE)
    map_fixed(s, fd, ioas, s.page(39), 2 * PAGE, 0x10000)
    access = access_on(s, fd, ioas)
    s.refuses(EFAULT, fd, t.test_access_pages(id=access, iova=0x10000, length=2 * PAGE))
    s.do(fd, t.test_access_pages(id=access, iova=0x10000, length=PAGE))
    s.mmap(s.page(40), PAGE)
    s.do(fd, t.test_access_pages(id=access, iova=0x10000, length=2 * PAGE, uptr=s.page(39)))


@check(
    "devices 8.3 row 1",
    "devices 8.3 row 3",
    "devices 8.3 row 5",
    "devices 8.3 row 6",
    "devices 8.3 row 7",
    "devices 8.3 row 8",
    "mock 6.5",
    "core 5.6 replace",
)
def replacing_the_ioas_of_an_access(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    other = ioas_alloc(s, fd)
    third = ioas_alloc(s, fd)
    s.poke(s.page(0), b"x" * PAGE)
    map_fixed(s, fd, ioas, s.page(0), PAGE, 0x10000)
    map_fixed(s, fd, third, s.page(0), 1, 0x10001)
    access = access_on(s, fd, ioas)
    item = s.do(fd, t.test_access_pages(id=access, iova=0x10000, length=PAGE)).out_access_pages_id
    _, hwpt, _ = mock_domain(s, fd, ioas_alloc(s, fd))
    for wrong in (99, hwpt):
        s.refuses(ENOENT, fd, t.test_access_replace_ioas(id=access, ioas_id=wrong))
    s.refuses(EADDRINUSE, fd, t.test_access_replace_ioas(id=access, ioas_id=third))
    s.do(fd, t.test_access_replace_ioas(id=access, ioas_id=ioas))
    s.do(fd, t.test_md_check_refs(length=PAGE, uptr=s.page(0), refs=1))
    s.do(fd, t.test_access_replace_ioas(id=access, ioas_id=other))
    s.do(fd, t.test_md_check_refs(length=PAGE, uptr=s.page(0), refs=0))
    s.refuses(ENOENT, fd, t.test_destroy_access_pages(id=access, access_pages_id=item))
    s.do(fd, u.iommu_destroy(id=ioas))


@check(
    "devices 8.7 row 1",
    "devices 8.7 row 2",
    "mock 6.6 row 1",
    "mock 6.6 row 2",
    "mock 6.6 row 3",
    "mock 6.6 row 4",
    "mock 6.6 row 6",
)
def access_rw_refuses(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    access = access_on(s, fd, ioas, 0)
    rw = t.test_access_rw
    s.refuses(ENOMEM, fd, rw(id=9999, length=(16 << 20) + 1, flags=8))
    s.refuses(EOPNOTSUPP, fd, rw(id=9999, length=1, flags=2))
    s.refuses(EOPNOTSUPP, fd, rw(id=9999, length=1, flags=8))
    s.refuses(EFAULT, fd, rw(id=access, length=1, flags=1))
    s.refuses(EINVAL, fd, rw(id=access, length=0, flags=1))
    s.refuses(EOVERFLOW, fd, rw(id=access, iova=ULMAX, length=2))
    s.refuses(ENOENT, fd, rw(id=access, iova=0x1000, length=2))


@check(
    "devices 8.7 row 5",
    "devices 8.7 row 6",
    "devices 8.7 row 7",
    "mock 6.6 row 7",
    "mock 6.6 row 8",
    "mock 6.6 row 9",
    "core 5.6 rw",
)
def access_rw_moves_bytes(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    map_fixed(s, fd, ioas, s.page(0) + 5, 100, 0x20003)
    map_fixed(s, fd, ioas, s.page(1), PAGE, 0x20003 + 100, READ)
    map_fixed(s, fd, ioas, s.page(2), PAGE, 0x30000, WRITE)
    access = access_on(s, fd, ioas, 0)
    s.poke(s.page(0), bytes(range(256)))
    s.poke(s.page(1), b"second area")
    rw = t.test_access_rw
    s.do(fd, rw(id=access, iova=0x20003 + 90, length=16, uptr=s.page(8)))
    s.expect(s.peek(s.page(8), 16) == bytes(range(95, 105)) + b"second", "over the seam of two areas")
    s.poke(s.page(8), b"0123456789abcdef")
    s.refuses(EPERM, fd, rw(id=access, iova=0x20003 + 90, length=16, uptr=s.page(8), flags=1))
    s.expect(s.peek(s.page(0) + 95, 10) == b"0123456789", "the first area had been written")
    s.refuses(EPERM, fd, rw(id=access, iova=0x30000, length=1, uptr=s.page(8)))
    s.do(fd, rw(id=access, iova=0x30000, length=16, uptr=s.page(8), flags=1))
    s.refuses(ENOENT, fd, rw(id=access, iova=0x30FF8, length=16, uptr=s.page(8), flags=1))
    s.expect(s.peek(s.page(2) + 0xFF8, 8) == b"01234567", "bytes before the hole stay written")
    s.poke(s.page(9), bytes(16))
    s.refuses(ENOENT, fd, rw(id=access, iova=0x20003 + 100 + PAGE - 8, length=16, uptr=s.page(9)))
    s.expect(s.peek(s.page(9), 16) == bytes(16), "a failing read copies nothing out")
    s.refuses(EFAULT, fd, rw(id=access, iova=0x20003, length=16, uptr=0))


@check("devices 8.7 copy row 6", "devices 8.7 copy row 4", "core 5.6 user same mm", "core 5.2 transient")
def the_plain_path_has_cpu_permissions(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    s.poke(s.page(0), b"x" * 3 * PAGE)
    map_fixed(s, fd, ioas, s.page(0), 3 * PAGE, 0x10000)
    access = access_on(s, fd, ioas, 0)
    s.mprotect(s.page(1), PAGE, 1)
    s.refuses(EFAULT, fd, t.test_access_rw(id=access, iova=0x10FFC, length=8, uptr=s.page(8), flags=1))
    s.do(fd, t.test_access_rw(id=access, iova=0x10FFC, length=8, uptr=s.page(8)))
    for flags in (4, 5):
        answer = s.ask(fd, t.test_access_rw(id=access, iova=0x10000, length=3 * PAGE, uptr=s.page(8), flags=flags))
        s.expect(answer.errno == EFAULT, "the slow path pins with write intent where the map is writable")
    s.do(fd, t.test_md_check_refs(length=PAGE, uptr=s.page(0), refs=0))


@check("core 5.4 access pin", "core 5.4 unpin", "core 5.3")
def accesses_and_domains_share_the_pin(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    s.poke(s.page(0), b"x" * 4 * PAGE)
    map_fixed(s, fd, ioas, s.page(0), 4 * PAGE, APERTURE)
    access = access_on(s, fd, ioas)
    item = s.do(fd, t.test_access_pages(id=access, iova=APERTURE + PAGE, length=PAGE)).out_access_pages_id
    for page, refs in ((0, 0), (1, 1), (2, 0)):
        s.do(fd, t.test_md_check_refs(length=PAGE, uptr=s.page(page), refs=refs))
    stdev, hwpt, _ = mock_domain(s, fd, ioas)
    s.do(fd, t.test_md_check_refs(length=4 * PAGE, uptr=s.page(0), refs=1))
    s.do(fd, u.iommu_destroy(id=stdev))
    for page, refs in ((0, 0), (1, 1), (2, 0)):
        s.do(fd, t.test_md_check_refs(length=PAGE, uptr=s.page(page), refs=refs))
    # the address now shows another page: a new domain takes the pinned one there, fresh ones elsewhere
    s.mmap(s.page(0), 4 * PAGE)
    s.poke(s.page(0), b"y" * 4 * PAGE)
    stdev, hwpt, _ = mock_domain(s, fd, ioas)
    s.do(fd, t.test_md_check_map(id=hwpt, iova=APERTURE, length=PAGE, uptr=s.page(0)))
    s.refuses(EINVAL, fd, t.test_md_check_map(id=hwpt, iova=APERTURE + PAGE, length=PAGE, uptr=s.page(1)))
    s.do(fd, t.test_destroy_access_pages(id=access, access_pages_id=item))
    s.refuses(EINVAL, fd, t.test_md_check_map(id=hwpt, iova=APERTURE + PAGE, length=PAGE, uptr=s.page(1)))


@check("mock 7", "mock 6.2 row 5", "mock 6.6 row 5")
def accesses_in_the_syzkaller_form(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    map_fixed(s, fd, ioas, s.page(0), PAGE, 0x5000)
    map_fixed(s, fd, ioas, s.page(1), 2 * PAGE, 0x8000)
    access = access_on(s, fd, ioas)
    s.poke(s.page(2), b"hello")
    s.do(fd, t.test_access_rw(id=access, iova=1 | PAGE << 32, length=5, uptr=s.page(8), flags=0x10000))
    s.expect(s.peek(s.page(8), 5) == b"hello", "the second area's second page")
    out = s.do(fd, t.test_access_pages(id=access, iova=0, length=PAGE, flags=0x10000))
    s.refuses(ENOENT, fd, t.test_access_pages(id=access, iova=2, length=PAGE, flags=0x10000))
    s.expect(out.iova == 0, "the converted value is not shown")


@check("mock 5.1 row 1", "mock 5.1 row 2", "mock 5.1 row 3", "mock 5.5", "mock 1 size", "mock 1 op")
def other_test_ops(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    s.refuses(EINVAL, fd, t.test_add_reserved(id=9, length=0))
    s.refuses(EOVERFLOW, fd, t.test_add_reserved(id=9, start=2, length=ULMAX))
    s.refuses(ENOENT, fd, t.test_add_reserved(id=9, start=2, length=1))
    s.refuses(EINVAL, fd, t.test_set_temp_memory_limit(limit=11))
    s.do(fd, t.test_set_temp_memory_limit(limit=65536))
    for op in (0, 24, 2**32 - 1):
        answer = s.ioctl(fd, 0x3BA0, (72).to_bytes(4, "little") + op.to_bytes(4, "little") + bytes(64))
        s.expect(answer.errno == EOPNOTSUPP, f"op {op} is unknown")
    answer = s.ioctl(fd, 0x3BA0, t.test_add_reserved(size=68, op=1, id=ioas, start=0, length=1).pack()[:68])
    s.expect(answer.result == 0, "68 bytes are enough")


@check("mock 5.2 row 1", "mock 5.2 row 3", "mock 5.2 row 4", "mock 5.3")
def the_checking_ops_check(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    _, hwpt, _ = mock_domain(s, fd, ioas)
    s.refuses(ENOENT, fd, t.test_md_check_map(id=ioas, iova=1))
    for bad in ({"iova": 1}, {"length": 1}, {"uptr": 1}, {"uptr": 2**64 - 2048, "length": 4096}):
        s.refuses(EINVAL, fd, t.test_md_check_map(id=hwpt, **bad))
    s.do(fd, t.test_md_check_map(id=hwpt))
    s.munmap(s.page(9), PAGE)
    s.refuses(EFAULT, fd, t.test_md_check_map(id=hwpt, iova=APERTURE, length=PAGE, uptr=s.page(9)))
    s.refuses(EINVAL, fd, t.test_md_check_map(id=hwpt, iova=APERTURE, length=PAGE, uptr=s.page(8)))
    s.refuses(EINVAL, fd, t.test_md_check_refs(length=1))
    s.refuses(EINVAL, fd, t.test_md_check_refs(length=PAGE, uptr=2048))
    s.refuses(EFAULT, fd, t.test_md_check_refs(length=PAGE, uptr=s.page(9)))
    s.poke(s.page(8), b"x")
    s.refuses(5, fd, t.test_md_check_refs(length=PAGE, uptr=s.page(8), refs=1))


@check("mock 6.1 row 3", "mock 6.1 row 7")
def an_access_without_descriptor_or_answer(s: Subject) -> None:
    """Every descriptor taken is ENOMEM here, not EMFILE; an answer that cannot be written undoes the access."""
    fd, ioas = open_ioas(s)
    with s.no_free_descriptors():
        s.refuses(ENOMEM, fd, t.test_create_access(id=99))
    unwritable(s, fd, t.test_create_access(id=ioas, flags=PINS))
    s.expect(free_ranges(s, fd, ioas)[1] == 1, "its alignment went with it")
    s.expect(ioas_alloc(s, fd) == ioas + 1, "and its id")
    s.do(fd, u.iommu_destroy(id=ioas))


@check("mock 5.1 row 4", "mock 5.1 row 5")
def reserving(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    map_fixed(s, fd, ioas, s.page(0), PAGE, 0x4000)
    for start, length in ((0x4FFF, 1), (0x3FFF, 2), (0, ULMAX)):
        s.refuses(EADDRINUSE, fd, t.test_add_reserved(id=ioas, start=start, length=length))
    for start, length in ((0x3FFF, 1), (0x5000, 3), (0x5001, 0x1000), (0x3FFF, 1)):
        s.do(fd, t.test_add_reserved(id=ioas, start=start, length=length))
    s.expect(free_ranges(s, fd, ioas)[0] == [(0, 0x3FFE), (0x4000, 0x4FFF), (0x6001, ULMAX)], "they may overlap")
