"""core 4.7, 4.9, 4.10: MAP and MAP_FILE."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

import pytest

from iommufd.iommu.extent_domain import ExtentDomain
from iommufd.memory.hostfile import HostFile
from iommufd.uapi import iommufd as u
from iommufd.uapi.declare import Struct
from tests.engine.fakes import BUFFER, BUFFER_PAGES, ULMAX, Caller, FakeFile, copy_struct, each, frames_of, map_struct

R, W, FIXED = u.IOMMU_IOAS_MAP_READABLE, u.IOMMU_IOAS_MAP_WRITEABLE, u.IOMMU_IOAS_MAP_FIXED_IOVA
P = 4096
NOWHERE = 0x2000_0000  # no VMA here
MEMFD, NOT_MEMFD = 10, 11


@pytest.fixture
def c() -> Caller:
    caller = Caller()
    caller.proc.files[MEMFD] = lambda: FakeFile(caller.world, 16)
    caller.proc.files[NOT_MEMFD] = lambda: FakeFile(caller.world, 16, "other")
    return caller


MapFile = u.iommu_ioas_map_file


def map_file(ioas: int, iova: int | None, length: int, start: int = 0, fd: int = MEMFD, flags: int = R | W) -> MapFile:
    if iova is not None:
        flags |= FIXED
    return u.iommu_ioas_map_file(flags=flags, ioas_id=ioas, fd=fd, start=start, length=length, iova=iova or 0)


Row = Callable[[int], Struct]

REFUSED: list[tuple[Any, ...]] = [
    # 4.9; the IOAS under test has an area at [0x10000, 0x10fff] and [0x20000, 0x20fff] reserved
    ("core-4.9-1-flag", errno.EOPNOTSUPP, lambda i: map_struct(99, ULMAX, 0, flags=8)),
    ("core-4.9-1-reserved", errno.EOPNOTSUPP, lambda i: map_struct(99, ULMAX, 0, reserved=1)),
    ("core-4.9-2-iova", errno.EOVERFLOW, lambda i: u.iommu_ioas_map(ioas_id=99, iova=ULMAX, length=P, user_va=BUFFER)),
    ("core-4.9-2-length", errno.EOVERFLOW, lambda i: map_struct(99, None, ULMAX, flags=0)),
    ("core-4.9-3", errno.EINVAL, lambda i: map_struct(99, None, P, flags=0)),
    ("core-4.9-4", errno.ENOENT, lambda i: map_struct(99, None, 0, ULMAX)),
    ("core-4.9-5", errno.EOVERFLOW, lambda i: map_struct(i, None, P, ULMAX - P + 1)),
    ("core-4.9-5-length-0", errno.EINVAL, lambda i: map_struct(i, None, 0, ULMAX)),
    ("core-4.9-6-zero", errno.EINVAL, lambda i: map_struct(i, None, 0)),
    ("core-4.9-6-huge", errno.EINVAL, lambda i: map_struct(i, None, ULMAX - P + 1, 0)),
    # 4.7
    ("core-4.7-3a-length", errno.EOVERFLOW, lambda i: map_struct(i, None, 2**63 - 1, 0)),
    ("core-4.7-3b-overflow", errno.EOVERFLOW, lambda i: map_struct(i, ULMAX - P, 2 * P)),
    ("core-4.7-3b-reserved", errno.EINVAL, lambda i: map_struct(i, 0x1F000, 2 * P)),
    ("core-4.7-3b-reserved-before-area", errno.EINVAL, lambda i: map_struct(i, 0x10000, 0x20000)),
    ("core-4.7-3b-area", errno.EEXIST, lambda i: map_struct(i, 0xF001, P)),
    # 4.10
    ("core-4.10-1", errno.EOPNOTSUPP, lambda i: map_file(99, ULMAX, 0, flags=8)),
    ("core-4.10-2-iova", errno.EOVERFLOW, lambda i: map_file(99, ULMAX, P, flags=0)),
    ("core-4.10-2-length", errno.EOVERFLOW, lambda i: map_file(99, None, ULMAX, flags=0)),
    ("core-4.10-3", errno.EINVAL, lambda i: map_file(99, None, P, flags=0)),
    ("core-4.10-4", errno.ENOENT, lambda i: map_file(99, None, 0)),
    ("core-4.10-5", errno.EINVAL, lambda i: map_file(i, None, 0, ULMAX, fd=-1)),
    ("core-4.10-6", errno.EOVERFLOW, lambda i: map_file(i, None, P, ULMAX - P + 2, fd=-1)),
    ("core-4.10-8-negative", errno.EBADF, lambda i: map_file(i, None, ULMAX - 1, fd=-1)),
    ("core-4.10-8-closed", errno.EBADF, lambda i: map_file(i, None, P, fd=12)),
    ("core-4.10-9", errno.EINVAL, lambda i: map_file(i, None, ULMAX - P + 1)),
]


@pytest.mark.parametrize(("number", "row"), each(REFUSED))
def test_refused(c: Caller, number: int, row: Row) -> None:
    ioas = c.ioas()
    c.map(ioas, 0x10000, P)
    c.table(ioas).reserve(0x20000, 0x20FFF, None)
    c.refuses(number, row(ioas))
    assert c.areas(ioas) == [(0x10000, 0x10FFF)]


ALIGNED: list[tuple[Any, ...]] = [
    # the IOAS under test has an alignment of 2048, an area at [0x10000, 0x10fff], and a domain
    ("core-4.7-2", errno.EINVAL, lambda i: map_struct(i, 0x10001, 0x801)),
    ("core-4.7-2-before-3a", errno.EINVAL, lambda i: map_struct(i, None, 2**63 - 1, 0)),
    ("core-4.7-3a-align", errno.EINVAL, lambda i: map_struct(i, None, 0x800, BUFFER + 1)),
    ("core-4.7-3b-align", errno.EINVAL, lambda i: map_struct(i, 0x10400, 0x800)),
    ("core-4.7-3b-area-before-5", errno.EEXIST, lambda i: map_struct(i, 0x10000, 0x800, BUFFER + 1)),
    ("core-4.7-5", errno.EINVAL, lambda i: map_struct(i, 0x11000, 0x800, BUFFER + 1)),
    ("core-4.7-5-before-7", errno.EINVAL, lambda i: map_struct(i, 0x11000, 0x800, NOWHERE + 1)),
    ("core-4.7-7-fault", errno.EFAULT, lambda i: map_struct(i, 0x11000, 0x800, NOWHERE)),
    ("core-4.7-7-domain", errno.ERANGE, lambda i: map_struct(i, 2**40, P)),
    ("core-4.10-pin-kind", errno.EINVAL, lambda i: map_file(i, 0x11000, P, fd=NOT_MEMFD)),
    ("core-4.10-pin-size", errno.EINVAL, lambda i: map_file(i, 0x11000, 2 * P, 15 * P)),
    ("core-4.10-pin-last-page", errno.EINVAL, lambda i: map_file(i, 0x11000, P, 16 * P - 0x800)),
    ("core-4.10-pin-offset", errno.EINVAL, lambda i: map_file(i, 0x11000, P, 2**63)),
]


@pytest.mark.parametrize(("number", "row"), each(ALIGNED))
def test_refused_with_a_domain(c: Caller, number: int, row: Row) -> None:
    ioas = c.ioas()
    domain = c.add_domain(ioas, ExtentDomain(0xFFFFF800, 0, 2**40 - 1))
    table = c.table(ioas)
    table.remove_reserved(domain)  # so that a map can reach beyond the aperture, and the driver refuses
    c.map(ioas, 0x10000, P)
    before = c.pinned_vm
    c.refuses(number, row(ioas))
    assert c.areas(ioas) == [(0x10000, 0x10FFF)]
    assert c.pinned_vm == before == 1
    assert list(domain.segments(0, 2**40))[1:] == []


def test_nothing_is_touched_without_a_domain(c: Caller) -> None:
    """core 4.7: absurd addresses map; the fault comes with the domain."""
    ioas = c.ioas()
    c.map(ioas, 0x1000, P, NOWHERE)
    c.map(ioas, 0x3000, 0x1800, ULMAX - 0x5000)
    c.proc.space.before_pin = lambda va: pytest.fail("the address space was asked")
    c.map(ioas, 0x6000, 64 * P)
    c.quiet()


def test_any_byte_maps_any_byte(c: Caller) -> None:
    """core 4.7: with an alignment of 1, IOVA and memory need not be congruent."""
    ioas = c.ioas()
    assert c.map(ioas, 3, 5, BUFFER + 4093) == 3
    assert c.areas(ioas) == [(3, 7)]
    assert c.pages_at(ioas, 3).npages == 2


def test_iova_0_and_the_last_page_are_legal(c: Caller) -> None:
    ioas = c.ioas()
    c.map(ioas, 0, P)
    c.map(ioas, ULMAX - P + 1, P)


def test_write_only_is_legal(c: Caller) -> None:
    c.map(c.ioas(), 0, P, flags=W)


def test_core_4_9_9_the_chosen_iova_goes_back(c: Caller) -> None:  # core-4.9-9
    ioas = c.ioas()
    assert c.map(ioas, None, P) == 0x1000
    assert c.map(ioas, None, P) == 0x2000
    assert c.map(ioas, 0x3000, P) == 0x3000
    assert c.map(ioas, None, P, BUFFER + 0x800) == 0x4800


def test_pages_are_pinned_once_and_mapped(c: Caller) -> None:  # core-4.9-8, core-4.7-7, core-4.7-8
    ioas = c.ioas()
    domain = c.add_domain(ioas)
    c.map(ioas, 0x10000, 3 * P, BUFFER)
    found = frames_of(domain, 0x10000, 4 * P)
    assert len(set(found)) == 4
    assert found[3] == 0
    assert (c.pinned_vm, c.user_pages) == (3, 3)
    c.map(ioas, 0x20000, P, BUFFER + P)  # a pages object of its own: pinned again, the same frame
    assert domain.iova_to_phys(0x20000) == found[1]
    assert c.pinned_vm == 4
    assert c.unmap(ioas, 0, 2**40) == 4 * P
    c.quiet()


def test_part_of_a_page(c: Caller) -> None:
    """core 5.4: sub-page areas map only the covered part."""
    ioas = c.ioas()
    domain = c.add_domain(ioas, ExtentDomain(0xFFFFF800))
    c.map(ioas, 0x10800, 0x1000, BUFFER + 0x800)
    base = domain.iova_to_phys(0x10800)
    assert base & 0xFFF == 0x800
    assert domain.iova_to_phys(0x10000) == 0
    assert domain.iova_to_phys(0x11800) == 0
    assert c.pinned_vm == 2


def test_a_failure_in_the_second_domain_undoes_the_first(c: Caller) -> None:
    ioas = c.ioas()
    first = c.add_domain(ioas)
    second = c.add_domain(ioas, ExtentDomain(0xFFFFF000, 0, 0xFFFF))
    c.table(ioas).remove_reserved(second)
    c.refuses(errno.ERANGE, map_struct(ioas, 0x10000, P))
    assert list(first.segments(0, 2**40)) == []
    c.quiet()


class TestPermissions:
    """core 5.5 as far as the core decides: a writable map pins for writing."""

    @pytest.mark.parametrize(("flags", "works"), [(R, True), (W, False), (R | W, False)])
    def test_read_only_memory(self, c: Caller, flags: int, works: bool) -> None:
        ioas = c.ioas()
        c.add_domain(ioas)
        c.host.protect(BUFFER, 1, 1)
        if works:
            c.map(ioas, 0x10000, P, flags=flags)
        else:
            c.refuses(errno.EFAULT, map_struct(ioas, 0x10000, P, flags=flags))

    def test_domain_permissions(self, c: Caller) -> None:
        ioas = c.ioas()
        domain = c.add_domain(ioas)
        for i, flags in enumerate((R, W, R | W)):
            c.map(ioas, i * P, P, flags=flags)
        assert [segment[4] & 3 for segment in domain.segments(0, 3 * P)] == [1, 2, 3]

    def test_wrapping_range(self, c: Caller) -> None:
        """EOVERFLOW for the current process, EFAULT for another."""
        ioas = c.ioas()
        c.add_domain(ioas, ExtentDomain(0xFFFFF800))
        c.refuses(errno.EOVERFLOW, map_struct(ioas, 0x10000, 0x800, ULMAX - P + 1))
        other = Caller(c.world, context=c.context)
        empty = c.ioas()
        c.map(empty, 0x10000, 0x800, ULMAX - P + 1)
        other.refuses(errno.EFAULT, copy_struct(ioas, empty, 0x10000, 0x800))


class TestFile:
    def test_no_domain_accepts_any_descriptor(self, c: Caller) -> None:
        """core 4.10: no file-type, size or mode check happens here."""
        ioas = c.ioas()
        c.do(map_file(ioas, 0, P, fd=NOT_MEMFD))
        c.do(map_file(ioas, P, P, start=2**63, fd=MEMFD))
        c.proc.files[12] = lambda: c.context  # one of our own files
        references = c.context.references
        c.do(map_file(ioas, 2 * P, P, fd=12))
        assert c.context.references == references + 1
        c.unmap(ioas, 0, 2**30)
        assert c.context.references == references

    def test_own_file_cannot_be_pinned(self, c: Caller) -> None:
        ioas = c.ioas()
        c.add_domain(ioas)
        c.proc.files[12] = lambda: c.context
        references = c.context.references
        c.refuses(errno.EINVAL, map_file(ioas, 0, P, fd=12))
        assert c.context.references == references

    def test_automatic_iova_follows_the_offset(self, c: Caller) -> None:
        ioas = c.ioas()
        assert c.do(map_file(ioas, None, 0x3000, 0)).iova == 0x4000
        assert c.do(map_file(ioas, None, 0x800, 0x1800)).iova == 0x1800

    def test_the_file_lives_as_long_as_an_area(self, c: Caller) -> None:
        file = FakeFile(c.world, 4)
        c.proc.files[12] = lambda: file
        a, b = c.ioas(), c.ioas()
        c.do(map_file(a, 0, 4 * P, fd=12))
        c.copy(b, a, P, P, 0)
        c.do(u.iommu_destroy(id=a))
        assert file.closed == 0
        c.unmap(b, 0, P)
        assert file.closed == 1

    def test_failed_maps_close_the_file(self, c: Caller) -> None:
        file = FakeFile(c.world, 4)
        c.proc.files[12] = lambda: file
        ioas = c.ioas()
        c.map(ioas, 0, P)
        c.refuses(errno.EEXIST, map_file(ioas, 0, P, fd=12))
        assert file.closed == 1
        c.refuses(errno.EINVAL, map_file(ioas, None, ULMAX - 1, fd=12))
        assert file.closed == 2

    def test_pins_and_charges(self, c: Caller) -> None:
        ioas = c.ioas()
        domain = c.add_domain(ioas)
        c.do(map_file(ioas, 0x10000, 2 * P, P))
        assert len(set(frames_of(domain, 0x10000, 2 * P))) == 2
        assert (c.pinned_vm, c.user_pages) == (2, 2)
        c.unmap(ioas, 0x10000, 2 * P)
        c.quiet()

    def test_a_real_memfd(self, c: Caller) -> None:
        fd = os.memfd_create("test")
        try:
            os.ftruncate(fd, 4 * P)
            c.proc.files[12] = lambda: HostFile(c.world.physical, os.dup(fd))
            ioas = c.ioas()
            c.add_domain(ioas)
            c.do(map_file(ioas, 0, 4 * P, fd=12))
            c.refuses(errno.EINVAL, map_file(ioas, 0x10000, P, 4 * P, fd=12))
            c.unmap(ioas, 0, 4 * P)
            c.quiet()
        finally:
            os.close(fd)


def test_mapping_a_lot_costs_a_constant_number_of_extents(c: Caller) -> None:
    """1 GiB is one extent, whatever number of pages."""
    c.host.map(2**40, 2**18)
    ioas = c.ioas()
    domain = c.add_domain(ioas)
    c.map(ioas, 0x4000_0000, 2**30, 2**40)
    assert len(list(domain.segments(0, 2**40))) == 1
    assert len(c.pages_at(ioas, 0x4000_0000).extents) == 1
    assert c.pinned_vm == 2**18
    assert BUFFER_PAGES < 2**18
