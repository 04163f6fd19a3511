"""vfio: the container ioctls on an iommufd."""

from __future__ import annotations

import struct
from errno import EADDRINUSE, EEXIST, EFAULT, EINVAL, ENODEV, ENOENT, ENOTTY, EOPNOTSUPP, EOVERFLOW, EPERM

from iommufd.testing.conformance import check
from iommufd.testing.conformance.common import APERTURE, ULMAX, map_fixed, mock_domain, open_ioas, reserve, unwritable
from iommufd.testing.subject import PAGE, SCRATCH, Answer, Subject
from iommufd.uapi import iommufd as u
from iommufd.uapi import iommufd_test as t

GET_API_VERSION, CHECK_EXTENSION, SET_IOMMU = 0x3B64, 0x3B65, 0x3B66
GET_INFO, MAP_DMA, UNMAP_DMA, ENABLE, DISABLE, DIRTY_PAGES = 0x3B70, 0x3B71, 0x3B72, 0x3B73, 0x3B74, 0x3B75
BUFFER = SCRATCH + 8 * PAGE


def compat(s: Subject) -> tuple[int, int]:
    """A context with a compatibility IOAS."""
    fd, ioas = open_ioas(s)
    s.do(fd, u.iommu_vfio_ioas(op=1, ioas_id=ioas))
    return fd, ioas


def value(s: Subject, fd: int, cmd: int, number: int = 0) -> Answer:
    """An ioctl whose argument is a number."""
    return s.ioctl(fd, cmd, at=number, poke=False)


def map_dma(s: Subject, fd: int, vaddr: int, iova: int, size: int, flags: int = 3, argsz: int = 32) -> Answer:
    return s.ioctl(fd, MAP_DMA, struct.pack("<IIQQQ", argsz, flags, vaddr, iova, size))


def unmap_dma(s: Subject, fd: int, iova: int, size: int, flags: int = 0, argsz: int = 24) -> tuple[int, int]:
    """(errno, size afterwards)."""
    answer = s.ioctl(fd, UNMAP_DMA, struct.pack("<IIQQ", argsz, flags, iova, size))
    return answer.errno, struct.unpack_from("<Q", answer.out, 16)[0]


def ok(s: Subject, answer: Answer) -> None:
    s.expect(answer.result >= 0, f"failed with errno {answer.errno}")


@check("vfio 3", "vfio 4")
def without_a_compat_ioas(s: Subject) -> None:
    fd = s.open()
    s.expect(value(s, fd, GET_API_VERSION).result == 0, "API version 0")
    for cmd, size in ((GET_INFO, 16), (MAP_DMA, 32), (UNMAP_DMA, 24)):
        answer = s.ioctl(fd, cmd, size.to_bytes(4, "little") + bytes(size - 4))
        s.expect(answer.errno == ENODEV, f"{cmd:#x} is ENODEV")
    for extension in range(12):
        value(s, fd, CHECK_EXTENSION, extension)
    for kind in range(12):
        value(s, fd, SET_IOMMU, kind)
    for cmd in (ENABLE, DISABLE, DIRTY_PAGES, 0x3B67, 0x3B68, 0x3B6F, 0x3B7A):
        s.expect(value(s, fd, cmd).errno == ENOTTY, f"{cmd:#x} is ENOTTY")


@check("vfio 4", "vfio 5 row 4", "vfio 5 row 8")
def extensions_and_set_iommu(s: Subject) -> None:
    fd, ioas = compat(s)
    for extension in (*range(16), 2**31, 2**32 + 1):
        value(s, fd, CHECK_EXTENSION, extension)
    for kind in (0, 1, 3, 1, 3, 2, 4, 8, 2**32 + 3):
        value(s, fd, SET_IOMMU, kind)
    s.expect(s.do(fd, u.iommu_option(option_id=1, op=1, object_id=ioas)).val64 == 0, "type 1 v1 takes large pages away")


@check("vfio 5 row 6", "vfio 5 row 7")
def v1_is_refused_where_large_pages_cannot_go(s: Subject) -> None:
    fd, ioas = compat(s)
    map_fixed(s, fd, ioas, s.page(0) + 0x800, 0x800, APERTURE)
    s.expect(value(s, fd, SET_IOMMU, 1).errno == EADDRINUSE, "an area is not page aligned")
    mock_domain(s, fd, ioas)
    s.expect(value(s, fd, SET_IOMMU, 1).errno == EINVAL, "a domain with an area")
    ok(s, value(s, fd, SET_IOMMU, 3))


@check("vfio 6 row 1", "vfio 6 row 2", "vfio 6 row 4", "vfio 6 row 5", "vfio 6 partial", "vfio 6 chain")
def get_info_byte_for_byte(s: Subject) -> None:
    for holes in (1, 0, 3):
        fd, ioas = compat(s)
        if holes == 0:
            reserve(s, fd, ioas, 0, ULMAX)
            reserve(s, fd, ioas, ULMAX, 1)
        if holes == 3:
            reserve(s, fd, ioas, 0x1000, 0x1000)
            reserve(s, fd, ioas, 0x10000, 0x1000)
        for argsz in (*range(26), *range(30, 110, 2), 149, 4096, 2**32 - 1):
            s.ioctl(fd, GET_INFO, struct.pack("<I", argsz) + b"\xaa" * 156)
        s.do(fd, u.iommu_vfio_ioas(op=2))
        s.expect(s.ioctl(fd, GET_INFO, struct.pack("<I", 15) + bytes(60)).errno == EINVAL, "argsz first")


@check("vfio 6 fields")
def page_sizes_follow_domains(s: Subject) -> None:
    fd, ioas = compat(s)
    s.ioctl(fd, GET_INFO, struct.pack("<I", 72) + bytes(68))
    _stdev, _, dev = mock_domain(s, fd, ioas)
    answer = s.ioctl(fd, GET_INFO, struct.pack("<I", 72) + bytes(68))
    s.expect(struct.unpack_from("<IIQI", answer.out) == (72, 3, 0x1FFFFFF000, 24), "the mock's page sizes")
    s.do(fd, u.iommu_option(option_id=1, op=0, object_id=ioas, val64=0))
    s.ioctl(fd, GET_INFO, struct.pack("<I", 72) + bytes(68))
    s.poke(BUFFER, bytes(4) + b"\1\0\0\0")
    s.do(
        fd,
        u.iommu_hwpt_alloc(dev_id=dev, pt_id=ioas, data_type=t.IOMMU_HWPT_DATA_SELFTEST, data_len=8, data_uptr=BUFFER),
    )
    answer = s.ioctl(fd, GET_INFO, struct.pack("<I", 72) + bytes(68))
    s.expect(struct.unpack_from("<Q", answer.out, 8)[0] == 0x101000, "with the huge format too")


@check(
    "vfio 7 row 1",
    "vfio 7 row 2",
    "vfio 7 row 4",
    "vfio 7 row 5",
    "vfio 7 row 6",
    "vfio 7 row 7",
    "vfio 7 row 8",
    "vfio 7 row 9",
    "vfio 7 row 10",
    "vfio 7 row 11",
    "vfio 7 row 12",
)
def map_dma_rows(s: Subject) -> None:
    fd, ioas = compat(s)
    s.expect(value(s, fd, MAP_DMA, 0).errno == EFAULT, "NULL")
    for answer, expected in (
        (map_dma(s, fd, s.page(0), 0, PAGE, argsz=31), EINVAL),
        (map_dma(s, fd, s.page(0), 0, PAGE, flags=4), EINVAL),
        (map_dma(s, fd, ULMAX, 0, 2), EOVERFLOW),
        (map_dma(s, fd, s.page(0), 0, 0), EINVAL),
        (map_dma(s, fd, 0, 0, ULMAX - 0xFFF), EINVAL),
        (map_dma(s, fd, s.page(0), ULMAX - 2, 8), EOVERFLOW),
        (map_dma(s, fd, s.page(0), ULMAX, 1), 0),
        (map_dma(s, fd, 0x123, 0x5001, 7, argsz=64), 0),
        (map_dma(s, fd, s.page(0), 0x5000, PAGE), EEXIST),
        (map_dma(s, fd, s.page(0), 0x10000, PAGE, flags=0), 0),
    ):
        s.expect(answer.errno == expected, f"errno {answer.errno}, expected {expected}")
    s.expect(unmap_dma(s, fd, 0, ULMAX) == (0, PAGE + 7), "an ordinary range, one byte short of all")
    s.expect(unmap_dma(s, fd, 0, 0, flags=2) == (0, 1), "all")
    mock_domain(s, fd, ioas)
    s.munmap(s.page(9), PAGE)
    for answer, expected in (
        (map_dma(s, fd, s.page(0), 0, PAGE), EINVAL),
        (map_dma(s, fd, s.page(0), APERTURE, 1), EINVAL),
        (map_dma(s, fd, s.page(0), APERTURE + 1, 2048), EINVAL),
        (map_dma(s, fd, s.page(0) + 1, APERTURE, 2048), EINVAL),
        (map_dma(s, fd, s.page(9), APERTURE, PAGE), EFAULT),
        (map_dma(s, fd, s.page(0), APERTURE, 2048), 0),
    ):
        s.expect(answer.errno == expected, f"errno {answer.errno}, expected {expected}")


@check("vfio 7 flags")
def a_mapping_without_permissions(s: Subject) -> None:
    fd, ioas = compat(s)
    ok(s, map_dma(s, fd, s.page(0), APERTURE, PAGE, flags=0))
    access = s.do(fd, t.test_create_access(id=ioas)).out_access_fd
    s.refuses(EPERM, fd, t.test_access_rw(id=access, iova=APERTURE, length=1, uptr=s.page(1)))
    s.refuses(EPERM, fd, t.test_access_rw(id=access, iova=APERTURE, length=1, uptr=s.page(1), flags=1))
    s.refuses(EINVAL, fd, t.test_mock_domain(id=ioas))


@check("vfio 8 row 1", "vfio 8 row 2", "vfio 8 row 3", "vfio 8 row 4", "vfio 8 row 5", "vfio 8 row 7", "vfio 8 row 8")
def unmap_dma_rows(s: Subject) -> None:
    fd, _ioas = compat(s)
    s.expect(value(s, fd, UNMAP_DMA, 0).errno == EFAULT, "NULL")
    s.expect(unmap_dma(s, fd, 5, 7, argsz=23) == (EINVAL, 7), "argsz")
    for flags in (1, 4, 8, 3):
        s.expect(unmap_dma(s, fd, 5, 7, flags=flags) == (EINVAL, 7), "flags")
    s.expect(unmap_dma(s, fd, 0, 7, flags=2) == (EINVAL, 7), "ALL with a size")
    s.expect(unmap_dma(s, fd, 5, 0, flags=2) == (EINVAL, 0), "ALL with an iova")
    s.expect(unmap_dma(s, fd, 5, 0) == (EINVAL, 0), "size 0")
    s.expect(unmap_dma(s, fd, 5, ULMAX) == (EOVERFLOW, 0), "overflow: size rewritten")
    s.expect(unmap_dma(s, fd, 0x1000, PAGE) == (0, 0), "an empty range is a success")
    for i in range(3):
        ok(s, map_dma(s, fd, s.page(0), 0x10000 + 2 * i * PAGE, 2 * PAGE))
    s.expect(unmap_dma(s, fd, 0x10000, 3 * PAGE) == (ENOENT, 2 * PAGE), "the first went and is counted")
    s.expect(unmap_dma(s, fd, 0x12800, 2 * PAGE) == (ENOENT, 0), "begins inside")
    s.expect(unmap_dma(s, fd, 0x11FFF, 4 * PAGE + 2) == (0, 4 * PAGE), "more than the areas")


@check("vfio 8.1", "vfio 8.2", "core 4.15")
def v1_cuts_areas(s: Subject) -> None:
    fd, ioas = compat(s)
    ok(s, value(s, fd, SET_IOMMU, 1))
    mock_domain(s, fd, ioas)
    s.poke(s.page(0), b"x" * 8 * PAGE)
    a = APERTURE
    ok(s, map_dma(s, fd, s.page(0), a, 8 * PAGE))
    s.expect(unmap_dma(s, fd, a + 2 * PAGE, 2 * PAGE) == (0, 2 * PAGE), "the middle")
    for page, refs in ((0, 1), (1, 1), (2, 0), (3, 0), (4, 1), (7, 1)):
        s.do(fd, t.test_md_check_refs(length=PAGE, uptr=s.page(page), refs=refs))
    s.expect(unmap_dma(s, fd, a, PAGE) == (0, PAGE), "the first page")
    s.expect(unmap_dma(s, fd, a + 4 * PAGE, 2048) == (EINVAL, 2048), "half a page: not rewritten")
    s.expect(unmap_dma(s, fd, a + PAGE, 4 * PAGE) == (0, 2 * PAGE), "parts of two areas over a hole")
    s.expect(unmap_dma(s, fd, a, ULMAX - a) == (0, 3 * PAGE), "the rest")


@check("vfio 1 row 1", "vfio 1 row 2")
def two_dialects_on_one_descriptor(s: Subject) -> None:
    """VFIO's commands are known by their whole value and need not point anywhere; iommufd's begin with a size."""
    fd = s.open()
    s.expect(value(s, fd, GET_API_VERSION, 1).result == 0, "the argument is not touched")
    for cmd in (GET_API_VERSION | 1 << 30, GET_API_VERSION & 0xFF, 0x3C64, 0x3BA1, 0x3BFF, 0x3B00, 0x3B7F):
        s.expect(value(s, fd, cmd, 1).errno == ENOTTY, f"{cmd:#x} at a bad address is ENOTTY")
    for cmd in (0x3B80, 0x3B96, 0x80, 0x3C81, 0x3BA0):
        s.expect(value(s, fd, cmd, 1).errno == EFAULT, f"{cmd:#x} reads a size first")
        wrong = s.ioctl(fd, cmd | 1 << 30, (4096).to_bytes(4, "little") + bytes(60))
        s.expect(wrong.errno == ENOTTY, f"{cmd:#x} with a direction is ENOTTY")
    readonly = s.open(flags=0)
    s.expect(value(s, readonly, GET_API_VERSION).result == 0, "on a descriptor opened for reading, too")


@check("vfio 5 row 2", "vfio 5 row 3", "vfio 5 row 5")
def set_iommu_and_its_order(s: Subject) -> None:
    fd = s.open()
    for kind in (0, 2, 4, 8, 2**32 + 1):
        s.expect(value(s, fd, SET_IOMMU, kind).errno == EINVAL, f"type {kind} beats the missing IOAS")
    for kind in (1, 3):
        s.expect(value(s, fd, SET_IOMMU, kind).errno == ENODEV, f"type {kind} without an IOAS")
    fd, ioas = compat(s)
    s.do(fd, u.iommu_option(option_id=1, op=0, object_id=ioas, val64=0))
    mock_domain(s, fd, ioas)
    map_fixed(s, fd, ioas, s.page(0), PAGE, APERTURE)
    ok(s, value(s, fd, SET_IOMMU, 1))  # nothing to take away, so the full domain does not matter


@check("vfio 6 row 3", "vfio 6 row 2", "vfio 6 row 4", "vfio 6 row 5")
def get_info_and_its_order(s: Subject) -> None:
    fd = s.open()
    s.expect(value(s, fd, GET_INFO, 0).errno == EFAULT, "NULL")
    s.expect(s.ioctl(fd, GET_INFO, (15).to_bytes(4, "little") + bytes(12)).errno == EINVAL, "argsz first")
    s.expect(s.ioctl(fd, GET_INFO, (16).to_bytes(4, "little") + bytes(12)).errno == ENODEV, "then the IOAS")
    fd, _ = compat(s)
    s.munmap(s.page(41), PAGE)
    edge = s.page(41) - 24
    s.poke(edge, (72).to_bytes(4, "little") + b"\xaa" * 20)
    s.expect(s.ioctl(fd, GET_INFO, at=edge, poke=False).errno == EFAULT, "the capabilities cannot be written")
    s.expect(s.peek(edge + 4, 20) == b"\xaa" * 20, "and the header was not")
    s.poke(edge, (24).to_bytes(4, "little"))
    ok(s, s.ioctl(fd, GET_INFO, at=edge, poke=False))
    s.poke(s.page(40), (16).to_bytes(4, "little"))
    s.mprotect(s.page(40), PAGE, 1)
    s.expect(s.ioctl(fd, GET_INFO, at=s.page(40), poke=False).errno == EFAULT, "nor here")


@check("vfio 7 row 3", "vfio 7 row 2", "vfio 7 row 4")
def map_dma_and_its_order(s: Subject) -> None:
    fd = s.open()
    s.expect(map_dma(s, fd, ULMAX, 0, 2, flags=8).errno == EINVAL, "flags first")
    s.expect(map_dma(s, fd, ULMAX, 0, 2).errno == ENODEV, "then the IOAS")
    s.do(fd, u.iommu_vfio_ioas(op=1, ioas_id=s.do(fd, u.iommu_ioas_alloc()).out_ioas_id))
    s.expect(map_dma(s, fd, ULMAX, ULMAX, 2).errno == EOVERFLOW, "then the memory")


@check(*(f"vfio 10 row {n}" for n in range(1, 8)))
def vfio_ioas(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    _, hwpt, _ = mock_domain(s, fd, ioas)
    s.refuses(EOPNOTSUPP, fd, u.iommu_vfio_ioas(reserved=1, op=9))
    s.refuses(ENODEV, fd, u.iommu_vfio_ioas(op=0))
    for wrong in (0, 99, hwpt):
        s.refuses(ENOENT, fd, u.iommu_vfio_ioas(op=1, ioas_id=wrong))
    s.do(fd, u.iommu_vfio_ioas(op=2))
    s.do(fd, u.iommu_vfio_ioas(op=1, ioas_id=ioas))
    s.expect(s.do(fd, u.iommu_vfio_ioas(op=0, ioas_id=77)).ioas_id == ioas, "its id")
    unwritable(s, fd, u.iommu_vfio_ioas(op=0))
    other = s.do(fd, u.iommu_ioas_alloc()).out_ioas_id
    s.do(fd, u.iommu_vfio_ioas(op=1, ioas_id=other))
    s.expect(s.do(fd, u.iommu_vfio_ioas(op=0)).ioas_id == other, "the newer one")
    s.do(fd, u.iommu_vfio_ioas(op=2, ioas_id=99))
    s.refuses(ENODEV, fd, u.iommu_vfio_ioas(op=0))
    s.do(fd, u.iommu_destroy(id=other))
    for op in (3, 2**16 - 1):
        s.refuses(EOPNOTSUPP, fd, u.iommu_vfio_ioas(op=op))
