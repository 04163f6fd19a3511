"""events 9, 9.1; core 1.7: queues in guest memory, and mapping memory of the iommufd descriptor."""

from __future__ import annotations

import mmap
import os
import struct
from errno import (
    EACCES,
    EADDRINUSE,
    EBUSY,
    EEXIST,
    EINVAL,
    EIO,
    ENOENT,
    ENOMEM,
    ENXIO,
    EOPNOTSUPP,
    EOVERFLOW,
    EPERM,
    ERANGE,
)

from iommufd.errors import errno_name
from iommufd.testing.conformance import check
from iommufd.testing.conformance.common import APERTURE, READ, WRITE, map_fixed, unmap, unwritable
from iommufd.testing.conformance.devices import DATA
from iommufd.testing.conformance.viommu import Guest
from iommufd.testing.subject import PAGE, Subject
from iommufd.uapi import iommufd as u
from iommufd.uapi import iommufd_test as t

KIND = t.IOMMU_HW_QUEUE_TYPE_SELFTEST


class Queues(Guest):
    """A guest with four pages of memory at the start of the aperture."""

    def __init__(self, s: Subject) -> None:
        super().__init__(s)
        map_fixed(s, self.fd, self.ioas, s.page(0), 4 * PAGE, APERTURE)

    def queue(self, index: int = 0, iova: int = APERTURE, length: int = PAGE, **fields: int) -> u.iommu_hw_queue_alloc:
        given = {"viommu_id": self.viommu, "type": KIND, **fields}
        return u.iommu_hw_queue_alloc(index=index, nesting_parent_iova=iova, length=length, **given)


@check(
    "events 9 row 1",
    "events 9 row 2",
    "events 9 row 3",
    "events 9 row 4",
    "events 9 row 5",
    "events 9 row 7",
    "events 9 row 8",
    "events 9 row 11",
)
def what_a_queue_needs(s: Subject) -> None:
    g = Queues(s)
    s.refuses(EOPNOTSUPP, g.fd, g.queue(length=0, flags=1))
    s.refuses(EOPNOTSUPP, g.fd, g.queue(length=0, type=0))
    s.refuses(EINVAL, g.fd, g.queue(iova=2**64 - 1, length=0))
    s.refuses(EOVERFLOW, g.fd, g.queue(iova=2, length=2**64 - 1, viommu_id=99))
    for bad in (99, g.parent):
        s.refuses(ENOENT, g.fd, g.queue(viommu_id=bad, type=1))
    s.refuses(EOPNOTSUPP, g.fd, g.queue(type=1, length=2**64 - 1, iova=0))
    for iova in (0, 1):
        s.refuses(ERANGE, g.fd, g.queue(iova=iova, length=2**64 - 1))
    s.refuses(ENOMEM, g.fd, g.queue(length=2**40))
    s.refuses(ENOENT, g.fd, g.queue(iova=0xFFFFFFFFFFFFF001, length=100))


@check("events 9 row 10", "events 9 row 13", "events 9 row 15")
def memory_of_a_queue(s: Subject) -> None:
    g = Queues(s)
    s.refuses(ENOENT, g.fd, g.queue(iova=APERTURE - PAGE))
    s.refuses(ENOENT, g.fd, g.queue(index=9, iova=APERTURE + 4 * PAGE))
    map_fixed(s, g.fd, g.ioas, s.page(8), PAGE, APERTURE + 8 * PAGE, WRITE)
    s.refuses(EPERM, g.fd, g.queue(iova=APERTURE + 8 * PAGE))
    map_fixed(s, g.fd, g.ioas, s.page(9), PAGE, APERTURE + 16 * PAGE, READ)
    out = s.do(g.fd, g.queue(iova=APERTURE + 16 * PAGE + 0x123, length=16))
    s.do(g.fd, u.iommu_destroy(id=out.out_hw_queue_id))
    map_fixed(s, g.fd, g.ioas, s.page(10), 2048, APERTURE + 32 * PAGE)
    s.refuses(EADDRINUSE, g.fd, g.queue())


@check("events 9 row 9", "events 9 row 17", "events 9 row 18", "events 9 dependency", "events 10")
def indexes_in_ascending_order(s: Subject) -> None:
    g = Queues(s)
    s.refuses(EINVAL, g.fd, g.queue(2))
    s.refuses(EIO, g.fd, g.queue(1))
    unwritable(s, g.fd, g.queue(0))
    first = s.do(g.fd, g.queue(0)).out_hw_queue_id
    g.busy(first + 1)  # its access
    s.refuses(EEXIST, g.fd, g.queue(0))
    second = s.do(g.fd, g.queue(1, APERTURE + PAGE)).out_hw_queue_id
    s.expect(second == first + 2, "two numbers each")
    g.busy(first)
    g.busy(g.viommu)
    g.destroy(second)
    g.destroy(first)
    s.expect(s.do(g.fd, g.queue(0)).out_hw_queue_id == first, "both numbers are free again")


@check("devices 8.6 row 2", "events 9 locks", "core 4.12 row b")
def its_memory_stays(s: Subject) -> None:
    g = Queues(s)
    queue = s.do(g.fd, g.queue(0, APERTURE + PAGE)).out_hw_queue_id
    s.refuses(EBUSY, g.fd, u.iommu_ioas_unmap(ioas_id=g.ioas, iova=APERTURE, length=4 * PAGE))
    s.refuses(EBUSY, g.fd, u.iommu_ioas_unmap(ioas_id=g.ioas, iova=0, length=2**64 - 1))
    g.destroy(queue)
    s.expect(unmap(s, g.fd, g.ioas, APERTURE, 4 * PAGE) == 4 * PAGE, "and then it goes")


def region(g: Guest, word: int = 1) -> tuple[int, int]:
    """A vIOMMU with mappable memory: (its id, the offset)."""
    g.s.poke(DATA, struct.pack("<IIQQ", word, 0, 0, 0))
    number = g.new_viommu(data_len=24, data_uptr=DATA)
    return number, struct.unpack("<Q", g.s.peek(DATA + 8, 8))[0]


@check(
    "events 9.1 row 0",
    "events 9.1 row 1",
    "events 9.1 row 2",
    "events 9.1 row 3",
    "events 9.1 row 4",
    "events 9.1 row 5",
    "core 1.7 row 2",
    "core 1.7 row 3",
    "core 1.7 row 4",
    "core 1.7 row 5",
)
def mapping_the_descriptor(s: Subject) -> None:
    g = Guest(s)
    _, at = region(g)
    rw, shared, private = 3, mmap.MAP_SHARED, mmap.MAP_PRIVATE

    def fails(number: int, pages: int, prot: int, flags: int, page: int) -> None:
        view = s.mmap_device(g.fd, pages * PAGE, prot, flags, page * PAGE)
        s.expect(view is None and s.transcript[-1][-1] == errno_name(number), f"{s.transcript[-1][-1]}")

    fails(EINVAL, 2, rw, private, 0)  # before the offset
    fails(EPERM, 2, rw | mmap.PROT_EXEC, shared, 0)
    for offset, length in ((0, 2), (3, 2), (2, 1), (2, 2), (1, 1), (1, 3)):  # not the whole region
        fails(ENXIO, length, rw, shared, offset)
    view = s.mmap_device(g.fd, 2 * PAGE, rw, shared, at)
    s.expect(view is not None, "the region")
    readable = s.mmap_device(g.fd, 2 * PAGE - 1, 1, shared, at)
    s.expect(readable is not None, "lengths are rounded up")
    assert view is not None
    assert readable is not None
    view[PAGE] = 0x5A
    s.expect(readable[PAGE] == 0x5A, "one memory")


@check("events 9.1 row 0", "core 1.7 row 2")
def mapping_a_descriptor_opened_otherwise(s: Subject) -> None:
    for flags, prot, kind, number in (
        (os.O_RDONLY, 1, mmap.MAP_SHARED, EINVAL),
        (os.O_RDONLY, 3, mmap.MAP_SHARED, EACCES),
        (os.O_RDONLY, 3, mmap.MAP_PRIVATE, EINVAL),
        (os.O_WRONLY, 1, mmap.MAP_SHARED, EACCES),
        (os.O_WRONLY, 2, mmap.MAP_PRIVATE, EACCES),
    ):
        fd = s.open(flags=flags)
        s.expect(s.mmap_device(fd, PAGE, prot, kind, PAGE) is None, "refused")
        s.expect(s.transcript[-1][-1] == errno_name(number), f"{s.transcript[-1][-1]}")


@check("events 9.1 regions", "events 9.1 references")
def regions_come_and_go(s: Subject) -> None:
    g = Guest(s)
    made = [region(g, word) for word in (1, 2, 3)]
    s.expect([at for _, at in made] == [PAGE, 3 * PAGE, 5 * PAGE], "first fit from one page on")
    g.destroy(made[1][0])
    again, at = region(g, 9)
    s.expect(at == 3 * PAGE, "freed ranges are used again")
    view = s.mmap_device(g.fd, 2 * PAGE, 3, mmap.MAP_SHARED, at)
    s.expect(view is not None and bytes(view[:8]) == struct.pack("<II", 9, 0), "and begin as zeroes")
    g.busy(again)
    assert view is not None
    s.unmap_device(view)
    g.destroy(again)
    s.expect(s.mmap_device(g.fd, 2 * PAGE, 3, mmap.MAP_SHARED, at) is None, "gone with its owner")
