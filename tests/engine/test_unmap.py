"""core 4.12 and 4.15: UNMAP, its callbacks, and the cuts of the VFIO path."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from iommufd.engine.access import Access, AccessOps
from iommufd.engine.unmap import cut, unmap_range
from iommufd.errors import KernelError
from iommufd.iommu.extent_domain import ExtentDomain
from iommufd.uapi import iommufd as u
from iommufd.uapi.declare import Struct
from tests.engine.fakes import BUFFER, ULMAX, Caller, TestDmaBuf, each, frames_of

P = 4096


def unmap(ioas: int, iova: int, length: int) -> u.iommu_ioas_unmap:
    return u.iommu_ioas_unmap(ioas_id=ioas, iova=iova, length=length)


# the IOAS has areas [0x1000, 0x2fff], [0x5000, 0x5fff]
REFUSED: list[tuple[Any, ...]] = [
    ("core-4.12-1", errno.ENOENT, lambda i: unmap(9, ULMAX, 0)),
    ("core-4.12-3-iova", errno.EOVERFLOW, lambda i: unmap(i, ULMAX, 0)),
    ("core-4.12-3-length", errno.EOVERFLOW, lambda i: unmap(i, 1, ULMAX)),
    ("core-4.12-4", errno.EINVAL, lambda i: unmap(i, 0, 0)),
    ("core-4.12-5", errno.EOVERFLOW, lambda i: unmap(i, ULMAX - 1, 3)),
    ("core-4.12-c-left devices-8.6-3", errno.ENOENT, lambda i: unmap(i, 0x1001, 0x10000)),
    ("core-4.12-c-right", errno.ENOENT, lambda i: unmap(i, 0x0, 0x2FFF)),
    ("core-4.12-7", errno.ENOENT, lambda i: unmap(i, 0x3000, 0x2000)),
]


@pytest.mark.parametrize(("number", "row"), each(REFUSED))
@pytest.mark.parametrize("with_domain", [False, True])
def test_refused(c: Caller, number: int, row: Callable[[int], Struct], with_domain: bool) -> None:
    ioas = c.ioas()
    if with_domain:
        c.add_domain(ioas)
    c.map(ioas, 0x1000, 2 * P)
    c.map(ioas, 0x5000, P)
    c.refuses(number, row(ioas))
    assert c.areas(ioas) == [(0x1000, 0x2FFF), (0x5000, 0x5FFF)]


@pytest.mark.parametrize("with_domain", [False, True])
class TestRemoval:
    def test_core_4_12_2(self, c: Caller, with_domain: bool) -> None:  # core-4.12-2
        ioas = c.ioas()
        if with_domain:
            c.add_domain(ioas)
        assert c.unmap(ioas, 0, ULMAX) == 0
        c.map(ioas, 0x1000, P)
        c.map(ioas, 0x8000, 2 * P)
        assert c.unmap(ioas, 0, ULMAX) == 3 * P
        c.quiet()

    def test_core_4_12_8_gaps_do_not_count(self, c: Caller, with_domain: bool) -> None:  # core-4.12-8
        ioas = c.ioas()
        if with_domain:
            c.add_domain(ioas)
        for iova in (0x1000, 0x4000, 0x9000):
            c.map(ioas, iova, P)
        assert c.unmap(ioas, 0xFFF, 0x4801) == 2 * P
        assert c.areas(ioas) == [(0x9000, 0x9FFF)]

    def test_the_walk_is_not_atomic(self, c: Caller, with_domain: bool) -> None:
        """Areas below the one that stops it are gone; the struct is not updated."""
        ioas = c.ioas()
        if with_domain:
            c.add_domain(ioas)
        c.map(ioas, 0x1000, P)
        c.map(ioas, 0x4000, 2 * P)
        struct = unmap(ioas, 0, 0x5000)
        c.refuses(errno.ENOENT, struct)
        assert c.areas(ioas) == [(0x4000, 0x5FFF)]
        assert c.after(u.iommu_ioas_unmap) == struct

    def test_more_areas_than_one_batch(self, c: Caller, with_domain: bool) -> None:
        ioas = c.ioas()
        if with_domain:
            c.add_domain(ioas)
        for i in range(600):
            c.map(ioas, i * P, P, BUFFER + i * P)
        assert c.unmap(ioas, 0, 600 * P) == 600 * P
        c.quiet()


class Pinner:
    """An access that keeps a list of its pins and drops those that a callback asks for (as the mock access does)."""

    def __init__(self, c: Caller, ioas: int, *, stubborn: bool = False) -> None:
        self.calls: list[tuple[int, int]] = []
        self.pins: list[tuple[int, int]] = []
        self.stubborn = stubborn
        self.access = Access.create(c.context, AccessOps(True, self.unmap))
        self.access.attach(ioas)

    def pin(self, iova: int, length: int) -> None:
        self.access.pin_pages(iova, length, write=False)
        self.pins.append((iova, length))

    def unmap(self, iova: int, length: int) -> None:
        assert not self.access.context.world.lock.locked()
        self.calls.append((iova, length))
        if self.stubborn:
            return
        for pin in [p for p in self.pins if p[0] < iova + length and iova < p[0] + p[1]]:
            self.pins.remove(pin)
            self.access.unpin_pages(*pin)


class TestCallbacks:
    """core 4.12 row d, devices 8.6."""

    def test_core_4_12_b(self, c: Caller) -> None:  # core-4.12-b, devices-8.6-2
        """Locked by an internal access, which is tested before pins: no callback."""
        ioas = c.ioas()
        pinner = Pinner(c, ioas)
        queue = Access.create_internal(c.context)
        queue.attach(ioas)
        c.map(ioas, 0x1000, P)
        pinner.pin(0x1000, P)
        queue.pin_pages(0x1000, P, write=False)
        c.refuses(errno.EBUSY, unmap(ioas, 0, ULMAX))
        assert pinner.calls == []
        queue.unpin_pages(0x1000, P)
        c.unmap(ioas, 0, ULMAX)
        assert pinner.calls == [(0x1000, P)]

    def test_core_4_12_d(self, c: Caller) -> None:  # core-4.12-d, devices-8.6-4
        """The callback gets the whole area; every external access is told, pins or not, in order of attachment."""
        ioas = c.ioas()
        order: list[str] = []
        first = Pinner(c, ioas)
        plain = c.access(ioas, pins=False, unmap=lambda iova, length: order.append(f"plain {iova:#x}"))
        mute = c.access(ioas, pins=False, unmap=None)
        c.map(ioas, 0x1000, 4 * P)
        first.pin(0x2000, P)
        assert c.unmap(ioas, 0, ULMAX) == 4 * P
        assert first.calls == [(0x1000, 4 * P)]
        assert order == ["plain 0x1000"]
        for access in (first.access, plain, mute):
            access.destroy_access()
        c.quiet()

    def test_no_pins_no_callback(self, c: Caller) -> None:
        ioas = c.ioas()
        pinner = Pinner(c, ioas)
        c.map(ioas, 0x1000, P)
        c.unmap(ioas, 0x1000, P)
        assert pinner.calls == []

    def test_edeadlock(self, c: Caller) -> None:  # core-5.6-2, devices-8.4-5a
        ioas = c.ioas()
        pinner = Pinner(c, ioas, stubborn=True)
        c.map(ioas, 0x1000, P)
        pinner.pin(0x1000, P)
        assert "1 pin" in c.refuses(errno.EDEADLOCK, unmap(ioas, 0x1000, P))
        assert len(pinner.calls) == 101
        assert c.areas(ioas) == [(0x1000, 0x1FFF)]
        for call in (  # prevent_access is sticky
            lambda: pinner.access.pin_pages(0x1000, P, write=False),
            lambda: pinner.access.read(None, 0x1000, 1),
        ):
            with pytest.raises(KernelError) as caught:
                call()
            assert caught.value.errno == errno.EINVAL
        pinner.stubborn = False
        assert c.unmap(ioas, 0x1000, P) == P

    @pytest.mark.parametrize(("stride", "removed"), [(P, 100), (2 * P, 102)])
    def test_touching_areas_share_the_counter(self, c: Caller, stride: int, removed: int) -> None:
        # devices-8.6-5, devices-8.6-6
        """Of 102 touching areas each with a pin, 100 go; with gaps between them all do."""
        ioas = c.ioas()
        pinner = Pinner(c, ioas)
        for i in range(102):
            c.map(ioas, i * stride, P, BUFFER + i * P)
            pinner.pin(i * stride, P)
        if removed == 102:
            assert c.unmap(ioas, 0, 2**30) == 102 * P
            return
        c.refuses(errno.EDEADLOCK, unmap(ioas, 0, 2**30))
        assert c.areas(ioas) == [(100 * P, 101 * P - 1), (101 * P, 102 * P - 1)]
        assert len(pinner.calls) == 101
        flags = [area.prevent_access for area in c.table(ioas).areas.values()]
        assert flags == [True, False]

    def test_one_pin_over_several_areas_needs_one_callback(self, c: Caller) -> None:
        ioas = c.ioas()
        pinner = Pinner(c, ioas)
        for i in range(8):
            c.map(ioas, i * P, P, BUFFER + i * P)
        pinner.pin(0, 8 * P)
        assert c.unmap(ioas, 0, 8 * P) == 8 * P
        assert pinner.calls == [(0, P)]

    def test_removed_bytes_are_reported_to_the_vfio_path(self, c: Caller) -> None:
        ioas = c.ioas()
        pinner = Pinner(c, ioas, stubborn=True)
        c.map(ioas, 0, P)
        c.map(ioas, P, P)
        pinner.pin(P, P)
        removed, error = unmap_range(c.table(ioas), 0, ULMAX)
        assert removed == P
        assert error is not None
        assert error.errno == errno.EDEADLOCK

    def test_pins_and_domain_hold_the_same_page_once(self, c: Caller) -> None:
        ioas = c.ioas()
        c.add_domain(ioas)
        pinner = Pinner(c, ioas)
        c.map(ioas, 0x1000, 4 * P)
        pinner.pin(0x2000, 2 * P)
        assert c.pinned_vm == 4
        c.unmap(ioas, 0, ULMAX)
        c.quiet()


class TestCut:
    """core 4.15."""

    @pytest.fixture
    def ioas(self, c: Caller) -> int:
        ioas = c.ioas()
        c.table(ioas).disable_large_pages()
        c.map(ioas, 0x10000, 8 * P)
        return ioas

    def cut(self, c: Caller, ioas: int, position: int, number: int = 0) -> None:
        if not number:
            cut(c.table(ioas), position)
            return
        with pytest.raises(KernelError) as caught:
            cut(c.table(ioas), position)
        assert caught.value.errno == number
        assert c.areas(ioas) == [(0x10000, 0x17FFF)]

    def test_no_area(self, c: Caller, ioas: int) -> None:
        self.cut(c, ioas, 0xFFFF)
        self.cut(c, ioas, 0x18000)

    def test_core_4_15_1(self, c: Caller, ioas: int) -> None:  # core-4.15-1
        self.cut(c, ioas, 0x10000)
        self.cut(c, ioas, 0x17FFF)
        assert c.areas(ioas) == [(0x10000, 0x17FFF)]

    def test_core_4_15_2(self, c: Caller, ioas: int) -> None:  # core-4.15-2
        next(c.table(ioas).areas.values()).prevent_access = True
        self.cut(c, ioas, 0x10FFF, errno.EBUSY)

    def test_core_4_15_3(self, c: Caller) -> None:  # core-4.15-3
        ioas = c.ioas()
        buffer = TestDmaBuf(c.world, 8)
        c.proc.files[5] = lambda: buffer
        c.do(u.iommu_ioas_map_file(flags=7, ioas_id=ioas, fd=5, length=8 * P, iova=0x10000))
        self.cut(c, ioas, 0x10FFF, errno.EOPNOTSUPP)

    def test_core_4_15_4(self, c: Caller, ioas: int) -> None:  # core-4.15-4
        self.cut(c, ioas, 0x107FF, errno.EINVAL)

    def test_core_4_15_4_memory_offset(self, c: Caller) -> None:  # core-4.15-4
        """With an alignment below the page, IOVA and memory need not be congruent, and both count."""
        ioas = c.ioas()
        c.add_domain(ioas, ExtentDomain(0xFFFFF800))
        table = c.table(ioas)
        table.remove_domain(table.domains[0])
        c.map(ioas, 0x10000, 8 * P, BUFFER + 1)
        c.table(ioas).iova_alignment = 0x800
        self.cut(c, ioas, 0x107FF, errno.EINVAL)

    def test_core_4_15_6(self, c: Caller, ioas: int) -> None:  # core-4.15-6
        access = c.access(ioas)
        access.pin_pages(0x10000, P, write=False)
        self.cut(c, ioas, 0x10FFF, errno.EINVAL)

    def test_core_4_15_7(self, c: Caller) -> None:  # core-4.15-7
        ioas = c.ioas()
        c.add_domain(ioas)
        c.map(ioas, 0x10000, 8 * P)
        self.cut(c, ioas, 0x10FFF, errno.EINVAL)

    def test_core_4_15_8(self, c: Caller, ioas: int) -> None:  # core-4.15-8
        domain = c.add_domain(ioas)
        frames = frames_of(domain, 0x10000, 8 * P)
        self.cut(c, ioas, 0x11FFF)
        self.cut(c, ioas, 0x15FFF)
        assert c.areas(ioas) == [(0x10000, 0x11FFF), (0x12000, 0x15FFF), (0x16000, 0x17FFF)]
        assert frames_of(domain, 0x10000, 8 * P) == frames
        assert (c.pinned_vm, c.user_pages) == (8, 8)
        assert c.unmap(ioas, 0x12000, 4 * P) == 4 * P
        assert frames_of(domain, 0x10000, 8 * P) == [*frames[:2], 0, 0, 0, 0, *frames[6:]]
        assert (c.pinned_vm, c.user_pages) == (4, 4)
        c.table(ioas).remove_domain(domain)
        c.quiet()
        c.add_domain(ioas)
        assert c.pinned_vm == 4
        c.unmap(ioas, 0, ULMAX)
        c.quiet()

    def test_both_parts_share_the_file(self, c: Caller) -> None:
        from tests.engine.fakes import FakeFile

        ioas = c.ioas()
        c.table(ioas).disable_large_pages()
        file = FakeFile(c.world, 8)
        c.proc.files[5] = lambda: file
        c.do(u.iommu_ioas_map_file(flags=7, ioas_id=ioas, fd=5, length=8 * P, iova=0x10000))
        cut(c.table(ioas), 0x11FFF)
        c.unmap(ioas, 0x10000, 2 * P)
        assert file.closed == 0
        c.unmap(ioas, 0x12000, 6 * P)
        assert file.closed == 1
