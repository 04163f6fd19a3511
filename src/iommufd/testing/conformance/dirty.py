"""core 8, devices 6, mock 2.7 and 5.4: dirty tracking."""

from __future__ import annotations

from errno import EFAULT, EINVAL, ENOENT, EOPNOTSUPP, EOVERFLOW

from iommufd.testing.conformance import check
from iommufd.testing.conformance.common import APERTURE, ULMAX, map_fixed, mock_domain, open_ioas, unmap
from iommufd.testing.conformance.devices import DIRTY, NEST, hwpt_alloc
from iommufd.testing.subject import PAGE, SCRATCH, Subject
from iommufd.uapi import iommufd as u
from iommufd.uapi import iommufd_test as t

BITS = SCRATCH + 16 * PAGE  # the bitmap the kernel fills
MARK = SCRATCH + 32 * PAGE  # the bitmap of what to mark
UNIT = 2048


def dirty_hwpt(s: Subject, pages: int = 4) -> tuple[int, int, int]:
    """A context whose HWPT tracks dirt and has ``pages`` ordinary pages at APERTURE: (fd, ioas, hwpt).

    Every page is an area of its own: an entry never reaches over an area's end, so it is 4 KiB wherever the pages
    are."""
    fd, ioas = open_ioas(s)
    _, _, dev = mock_domain(s, fd, ioas)
    hwpt = hwpt_alloc(s, fd, dev, ioas, DIRTY)
    s.poke(s.page(0), b"x" * pages * PAGE)
    for i in range(pages):
        map_fixed(s, fd, ioas, s.page(i), PAGE, APERTURE + i * PAGE)
    s.do(fd, u.iommu_hwpt_set_dirty_tracking(flags=1, hwpt_id=hwpt))
    return fd, ioas, hwpt


def mark(s: Subject, fd: int, hwpt: int, units: list[int], iova: int = APERTURE) -> int:
    """Marks 2 KiB units counted from ``iova`` dirty; how many the hardware says."""
    bitmap = bytearray(64)
    for unit in units:
        bitmap[unit // 8] |= 1 << unit % 8
    s.poke(MARK, bytes(bitmap))
    return s.do(fd, t.test_dirty(id=hwpt, iova=iova, length=512 * UNIT, page_size=UNIT, uptr=MARK)).out_nr_dirty


def bitmap(
    s: Subject, fd: int, hwpt: int, length: int, *, flags: int = 0, iova: int = APERTURE, page: int = UNIT
) -> bytes:
    """GET_DIRTY_BITMAP into zeroed memory; the 16 bytes there afterwards."""
    s.poke(BITS, bytes(16))
    s.do(fd, get(hwpt, length, flags=flags, iova=iova, page_size=page))
    return s.peek(BITS, 16)


def get(hwpt: int, length: int, **fields: int) -> u.iommu_hwpt_get_dirty_bitmap:
    values = {"iova": APERTURE, "page_size": UNIT, "data": BITS, **fields}
    return u.iommu_hwpt_get_dirty_bitmap(hwpt_id=hwpt, length=length, **values)


@check(
    "core 8.1 row 1", "core 8.1 row 2", "core 8.1 row 3", "devices 6.1 row 1", "devices 6.1 row 2", "devices 6.1 row 3"
)
def set_dirty_tracking_refuses(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    _, auto, dev = mock_domain(s, fd, ioas)
    parent = hwpt_alloc(s, fd, dev, ioas, NEST)
    nested = hwpt_alloc(s, fd, dev, parent, 0, bytes(4))
    s.refuses(EOPNOTSUPP, fd, u.iommu_hwpt_set_dirty_tracking(flags=2, hwpt_id=99))
    s.refuses(ENOENT, fd, u.iommu_hwpt_set_dirty_tracking(hwpt_id=99, reserved=1))
    s.refuses(ENOENT, fd, u.iommu_hwpt_set_dirty_tracking(hwpt_id=nested))
    s.refuses(EOPNOTSUPP, fd, u.iommu_hwpt_set_dirty_tracking(hwpt_id=auto))


@check(
    "core 8.2 row 1",
    "core 8.2 row 2",
    "core 8.2 row 3",
    "core 8.2 row 4",
    "core 8.2 row 5",
    "core 8.2 row 6",
    "core 8.2 row 7",
    "core 8.2 row 8",
    *(f"devices 6.2 row {n}" for n in range(1, 9)),
)
def get_dirty_bitmap_refuses(s: Subject) -> None:
    fd, ioas, hwpt = dirty_hwpt(s)
    s.refuses(EOPNOTSUPP, fd, get(99, 0, flags=2))
    s.refuses(EOPNOTSUPP, fd, get(99, 0, reserved=1))
    s.refuses(ENOENT, fd, get(99, 0))
    s.refuses(EINVAL, fd, get(hwpt, 0))
    s.refuses(EOVERFLOW, fd, get(hwpt, 2, iova=ULMAX))
    s.refuses(EINVAL, fd, get(hwpt, PAGE, iova=APERTURE + 1))
    s.refuses(EINVAL, fd, get(hwpt, PAGE + 1))
    s.refuses(EINVAL, fd, get(hwpt, PAGE, page_size=0))
    s.refuses(EINVAL, fd, get(hwpt, PAGE, page_size=8192))
    s.refuses(EINVAL, fd, get(hwpt, PAGE, page_size=4096, iova=APERTURE + 2048))
    _, plain, _ = mock_domain(s, fd, ioas)
    s.refuses(EINVAL, fd, get(plain, PAGE, page_size=0))
    s.refuses(EOPNOTSUPP, fd, get(plain, PAGE))


@check(
    "core 8.2 row 10",
    "core 8.3 bits",
    "mock 2.7 entries",
    "mock 5.4 row 6",
    "mock 5.4 row 7",
    "devices 6.2 row 10",
    "devices 6.2 row 11",
    "devices 6.2 row 12",
)
def entries_are_reported_and_cleaned(s: Subject) -> None:
    """An ordinary page is one entry of two 2 KiB units."""
    fd, _, hwpt = dirty_hwpt(s)
    s.expect(mark(s, fd, hwpt, [0, 5, 300]) == 3, "marks on unmapped units are counted")
    s.expect(bitmap(s, fd, hwpt, 4 * PAGE, flags=1)[:2] == b"\x33\0", "NO_CLEAR: units 0, 1, 4, 5")
    s.expect(bitmap(s, fd, hwpt, 4 * PAGE)[:2] == b"\x33\0", "still there")
    s.expect(bitmap(s, fd, hwpt, 4 * PAGE)[:2] == b"\0\0", "and now clean")


@check("core 8.3 relative", "core 8.3 granularity")
def bits_count_from_the_requested_iova(s: Subject) -> None:
    fd, _, hwpt = dirty_hwpt(s)
    mark(s, fd, hwpt, [2, 6])
    s.expect(bitmap(s, fd, hwpt, 3 * PAGE, flags=1, iova=APERTURE + PAGE)[0] == 0x33, "relative to the second page")
    s.expect(bitmap(s, fd, hwpt, 4 * PAGE, flags=1, page=PAGE)[0] == 0x0A, "one bit a page")
    s.expect(bitmap(s, fd, hwpt, 4 * PAGE, flags=1, page=2 * PAGE)[0] == 0x03, "one bit two pages")
    s.expect(bitmap(s, fd, hwpt, 4 * PAGE, flags=1, page=6144 - 2048)[0] == 0x0A, "again")


@check("core 8.3 relative", "mock 2.7 entry before")
def an_entry_that_begins_below_is_cleaned_unseen(s: Subject) -> None:
    fd, _, hwpt = dirty_hwpt(s)
    mark(s, fd, hwpt, [0])
    s.expect(bitmap(s, fd, hwpt, PAGE, iova=APERTURE + UNIT)[0] == 0, "no bit")
    s.expect(bitmap(s, fd, hwpt, 4 * PAGE)[0] == 0, "yet it is clean")


@check("core 8.3 or", "core 8.3 alignment")
def bits_are_ored_at_any_byte(s: Subject) -> None:
    fd, _, hwpt = dirty_hwpt(s)
    mark(s, fd, hwpt, [2])
    s.poke(BITS, b"\xf0\x80" + bytes(14))
    s.do(fd, get(hwpt, 4 * PAGE, flags=1))
    s.expect(s.peek(BITS, 2) == b"\xfc\x80", "bits that were set stay")
    s.poke(BITS, bytes(16))
    s.do(fd, get(hwpt, 4 * PAGE, data=BITS + 3))
    s.expect(s.peek(BITS, 5) == b"\0\0\0\x0c\0", "a byte address will do")


@check("core 8.2 row 10 memory")
def a_bad_bitmap_loses_bits_silently(s: Subject) -> None:
    fd, _, hwpt = dirty_hwpt(s)
    mark(s, fd, hwpt, [2])
    s.do(fd, get(hwpt, 4 * PAGE, data=0))
    s.expect(bitmap(s, fd, hwpt, 4 * PAGE)[0] == 0, "the state was cleared all the same")


@check("core 8.2 row 10 gap")
def collection_stops_at_a_gap(s: Subject) -> None:
    fd, ioas, hwpt = dirty_hwpt(s)
    map_fixed(s, fd, ioas, s.page(0), PAGE, APERTURE + 5 * PAGE)
    mark(s, fd, hwpt, [0, 10])
    s.expect(bitmap(s, fd, hwpt, 8 * PAGE)[:2] == b"\x03\0", "the area behind the gap is not reported")
    s.expect(bitmap(s, fd, hwpt, PAGE, iova=APERTURE + 5 * PAGE)[0] == 0x03, "nor was it cleaned")
    mark(s, fd, hwpt, [10])
    s.expect(bitmap(s, fd, hwpt, 2 * PAGE, iova=APERTURE + 4 * PAGE)[0] == 0, "nothing is mapped at the start")


@check(
    "core 8.1 row 4", "core 8.1 row 5", "mock 2.7 enable", "mock 5.4 row 4", "devices 6.1 row 4", "devices 6.1 row 5"
)
def enabling_cleans_disabling_keeps(s: Subject) -> None:
    fd, ioas, hwpt = dirty_hwpt(s)
    mark(s, fd, hwpt, [0])
    s.do(fd, u.iommu_hwpt_set_dirty_tracking(hwpt_id=hwpt))
    s.do(fd, u.iommu_hwpt_set_dirty_tracking(hwpt_id=hwpt))
    s.refuses(EINVAL, fd, t.test_dirty(id=hwpt, iova=APERTURE, length=UNIT, page_size=UNIT, uptr=MARK))
    s.expect(bitmap(s, fd, hwpt, PAGE, flags=1)[0] == 3, "disabled, still readable")
    s.do(fd, u.iommu_hwpt_set_dirty_tracking(flags=1, hwpt_id=hwpt))
    s.expect(bitmap(s, fd, hwpt, PAGE, flags=1)[0] == 0, "enabled: clean")
    mark(s, fd, hwpt, [0])
    s.do(fd, u.iommu_hwpt_set_dirty_tracking(flags=1, hwpt_id=hwpt))
    s.expect(bitmap(s, fd, hwpt, PAGE, flags=1)[0] == 0, "enabled again: clean again")
    mark(s, fd, hwpt, [0])
    unmap(s, fd, ioas, APERTURE, 4 * PAGE)
    map_fixed(s, fd, ioas, s.page(0), PAGE, APERTURE)
    s.expect(bitmap(s, fd, hwpt, PAGE)[0] == 0, "unmapping drops the state")


@check("mock 5.4 row 1", "mock 5.4 row 2", "mock 5.4 row 3", "mock 5.4 row 5")
def marking_refuses(s: Subject) -> None:
    fd, _ioas, hwpt = dirty_hwpt(s)
    ok = {"id": 99, "iova": APERTURE, "length": UNIT, "page_size": UNIT, "uptr": MARK}
    for bad in ({"page_size": 0}, {"length": 0}, {"iova": 1}, {"length": 1}, {"uptr": 0}):
        s.refuses(EINVAL, fd, t.test_dirty(**{**ok, **bad}))
    s.refuses(EOVERFLOW, fd, t.test_dirty(**{**ok, "length": ((16 << 20) * 8 + 1) * UNIT}))
    s.refuses(ENOENT, fd, t.test_dirty(**ok))
    s.munmap(s.page(20), PAGE)
    s.refuses(EFAULT, fd, t.test_dirty(**{**ok, "id": hwpt, "uptr": s.page(20)}))
    s.do(fd, t.test_dirty(**{**ok, "id": hwpt, "length": 3 * 1000, "page_size": 1000, "iova": 1000 * 16778}))


@check("mock 2.6 large entries", "mock 2.7 entries", needs="hugepages")
def a_huge_page_is_one_entry(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    _, _, dev = mock_domain(s, fd, ioas)
    hwpt = hwpt_alloc(s, fd, dev, ioas, DIRTY)
    memfd = s.memfd(4 << 20, flags=4)  # MFD_HUGETLB
    for at in (0, 2 << 20):  # an area each: whether the two are neighbours is up to the system
        s.do(fd, u.iommu_ioas_map_file(flags=7, ioas_id=ioas, fd=memfd, start=at, length=2 << 20, iova=APERTURE + at))
    s.do(fd, u.iommu_hwpt_set_dirty_tracking(flags=1, hwpt_id=hwpt))
    mark(s, fd, hwpt, [1])
    s.poke(BITS, bytes(1024))
    s.do(fd, get(hwpt, 4 << 20))
    seen = s.peek(BITS, 256)
    s.expect(seen == b"\xff" * 128 + bytes(128), "one large entry, whole")
