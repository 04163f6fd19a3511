"""What most checks begin with: an IOAS, a mapping, a mock domain."""

from __future__ import annotations

import struct
from errno import EFAULT

from iommufd.errors import errno_name
from iommufd.testing.subject import PAGE, SCRATCH, Subject, filled, number_of
from iommufd.uapi import iommufd as u
from iommufd.uapi import iommufd_test as t
from iommufd.uapi.declare import Struct

ULMAX = 2**64 - 1
FIXED, WRITE, READ = u.IOMMU_IOAS_MAP_FIXED_IOVA, u.IOMMU_IOAS_MAP_WRITEABLE, u.IOMMU_IOAS_MAP_READABLE
RW = READ | WRITE
RANGES = SCRATCH + PAGE  # where arrays of ranges are put
ANSWER = SCRATCH + 2 * PAGE  # a page that is made read-only
APERTURE = t.MOCK_APERTURE_START


def open_ioas(s: Subject) -> tuple[int, int]:
    """A fresh context with one IOAS."""
    fd = s.open()
    return fd, ioas_alloc(s, fd)


def ioas_alloc(s: Subject, fd: int) -> int:
    return s.do(fd, u.iommu_ioas_alloc()).out_ioas_id


def map_fixed(s: Subject, fd: int, ioas: int, va: int, length: int, iova: int, flags: int = RW) -> None:
    s.do(fd, u.iommu_ioas_map(flags=flags | FIXED, ioas_id=ioas, user_va=va, length=length, iova=iova))


def map_auto(s: Subject, fd: int, ioas: int, va: int, length: int, flags: int = RW) -> int:
    return s.do(fd, u.iommu_ioas_map(flags=flags, ioas_id=ioas, user_va=va, length=length)).iova


def unmap(s: Subject, fd: int, ioas: int, iova: int, length: int) -> int:
    """Unmaps and returns the bytes that went."""
    return s.do(fd, u.iommu_ioas_unmap(ioas_id=ioas, iova=iova, length=length)).length


def mock_domain(s: Subject, fd: int, pt: int) -> tuple[int, int, int]:
    """A mock device attached to ``pt``: (stdev, hwpt, device) ids."""
    out = s.do(fd, t.test_mock_domain(id=pt))
    return out.out_stdev_id, out.out_hwpt_id, out.out_idev_id


def reserve(s: Subject, fd: int, ioas: int, start: int, length: int) -> None:
    """A reserved range added by the test command."""
    s.do(fd, t.test_add_reserved(id=ioas, start=start, length=length))


def put_ranges(s: Subject, ranges: list[tuple[int, int]], at: int = RANGES) -> int:
    """An array of struct iommu_iova_range; its address."""
    s.poke(at, b"".join(struct.pack("<QQ", *r) for r in ranges))
    return at


def allow(s: Subject, fd: int, ioas: int, ranges: list[tuple[int, int]]) -> None:
    at = put_ranges(s, ranges) if ranges else 0
    s.do(fd, u.iommu_ioas_allow_iovas(ioas_id=ioas, num_iovas=len(ranges), allowed_iovas=at))


def free_ranges(s: Subject, fd: int, ioas: int, room: int = 16) -> tuple[list[tuple[int, int]], int]:
    """The ranges IOVA_RANGES reports, and the alignment."""
    out = s.do(fd, u.iommu_ioas_iova_ranges(ioas_id=ioas, num_iovas=room, allowed_iovas=RANGES))
    data = s.peek(RANGES, 16 * out.num_iovas)
    return [struct.unpack_from("<QQ", data, 16 * i) for i in range(out.num_iovas)], out.out_iova_alignment


def unwritable(s: Subject, fd: int, struct: Struct) -> None:
    """An ioctl whose work succeeds and whose answer cannot be written: EFAULT."""
    s.poke(ANSWER, filled(struct).pack())
    s.mprotect(ANSWER, PAGE, 1)
    answer = s.ioctl(fd, number_of(struct), at=ANSWER, poke=False)
    s.expect(answer.errno == EFAULT, f"{struct!r} into read-only memory: {errno_name(answer.errno)}")
    s.mprotect(ANSWER, PAGE, 3)
