"""core 4.1-4.3, 5.2-5.4: domains of an IOAS, its alignment, who holds pages, who is charged when."""

from __future__ import annotations

import errno

import pytest

from iommufd.engine.task import CAP_IPC_LOCK, CAP_SYS_RESOURCE
from iommufd.iommu.extent_domain import ExtentDomain
from iommufd.memory.space import READ
from iommufd.uapi import iommufd as u
from tests.engine.fakes import BUFFER, ULMAX, Caller, FakeFile, copy_struct, fails, frames_of, map_struct, pinned_frames

P = 4096
R = u.IOMMU_IOAS_MAP_READABLE


class TestAlignment:
    """core 4.2."""

    def test_maximum_of_all(self, c: Caller) -> None:
        ioas = c.ioas()
        table = c.table(ioas)
        small = c.add_domain(ioas, ExtentDomain(0xFFFFF800))
        assert table.iova_alignment == 2048
        big = c.add_domain(ioas, ExtentDomain(0xFFFFF000))
        assert table.iova_alignment == 4096
        table.remove_domain(big)
        assert table.iova_alignment == 2048
        plain = c.access(ioas, pins=False)
        assert table.iova_alignment == 2048
        pins = c.access(ioas)
        assert table.iova_alignment == 4096
        pins.destroy_access()
        assert table.iova_alignment == 2048
        table.disable_large_pages()
        assert table.iova_alignment == 4096
        table.enable_large_pages()
        table.remove_domain(small)
        assert table.iova_alignment == 1
        plain.destroy_access()

    @pytest.mark.parametrize(("iova", "offset", "length"), [(0x400, 0, 0x800), (0, 0x400, 0x800), (0, 0, 0x400)])
    def test_areas_must_conform(self, c: Caller, iova: int, offset: int, length: int) -> None:  # devices-3.8-domain-2
        ioas = c.ioas()
        c.map(ioas, 0x10000 + iova, length, BUFFER + offset)
        assert "0x800" in fails(errno.EADDRINUSE, lambda: c.add_domain(ioas, ExtentDomain(0xFFFFF800)))
        fails(errno.EADDRINUSE, lambda: c.access(ioas))
        c.access(ioas, pins=False)
        c.quiet()


class TestAdd:
    """core 4.3, "domain added"."""

    def test_core_4_3_1(self, c: Caller) -> None:  # core-4.3-1, devices-3.8-domain-1
        fails(errno.EINVAL, lambda: c.add_domain(c.ioas(), ExtentDomain(0xFFFF2000)))

    def test_core_4_3_2(self, c: Caller) -> None:  # core-4.3-2, devices-3.8-domain-3
        ioas = c.ioas()
        c.map(ioas, 0xFFF000, P)
        fails(errno.EADDRINUSE, lambda: c.add_domain(ioas, ExtentDomain(0xFFFFF000, 0x1000000)))
        assert c.table(ioas).reserved == []
        assert c.table(ioas).iova_alignment == 1

    def test_core_4_3_3(self, c: Caller) -> None:  # core-4.3-3, devices-3.8-domain-3
        ioas = c.ioas()
        c.map(ioas, 0x80000000, P)
        fails(errno.EADDRINUSE, lambda: c.add_domain(ioas, ExtentDomain(0xFFFFF000, 0x1000000, 0x7FFFFFFF)))
        assert c.table(ioas).reserved == []

    def test_core_4_3_4(self, c: Caller) -> None:  # core-4.3-4, devices-3.8-domain-4
        """Any failure restores reservations, pins, accounting and domain content."""
        ioas = c.ioas()
        c.map(ioas, 0x1000000, 2 * P)
        c.map(ioas, 0x1002000, P, 0x2000_0000)  # nothing there
        c.map(ioas, 0x1003000, P)
        domain = ExtentDomain(0xFFFFF000, 0x1000000, 0x7FFFFFFF)
        fails(errno.EFAULT, lambda: c.add_domain(ioas, domain))
        assert c.table(ioas).reserved == []
        assert c.table(ioas).domains == []
        assert list(domain.segments(0, 2**40)) == []
        c.quiet()

    def test_core_4_3_5(self, c: Caller) -> None:  # core-4.3-5, devices-3.8-domain-5
        ioas = c.ioas()
        c.map(ioas, 0x10000, 2 * P)
        c.map(ioas, 0x20000, P, BUFFER + 4 * P)
        domain = c.add_domain(ioas)
        assert 0 not in frames_of(domain, 0x10000, 2 * P) + frames_of(domain, 0x20000, P)
        assert (c.pinned_vm, c.user_pages) == (3, 3)

    def test_further_domain_pins_nothing(self, c: Caller) -> None:
        """core 5.4: it copies what the first has, wherever the process's memory is by now."""
        ioas = c.ioas()
        c.map(ioas, 0x10000, 2 * P)
        first = c.add_domain(ioas)
        c.proc.unmap(BUFFER, 2)
        second = c.add_domain(ioas)
        assert frames_of(second, 0x10000, 2 * P) == frames_of(first, 0x10000, 2 * P)
        assert (c.pinned_vm, c.user_pages) == (2, 2)


class TestRemove:
    def test_last_one_unpins(self, c: Caller) -> None:
        ioas = c.ioas()
        first, second = c.add_domain(ioas), c.add_domain(ioas)
        c.map(ioas, 0x10000, 2 * P)
        c.table(ioas).remove_domain(first)
        assert frames_of(first, 0x10000, 2 * P) == [0, 0]
        assert 0 not in frames_of(second, 0x10000, 2 * P)
        assert c.pinned_vm == 2
        c.table(ioas).remove_domain(second)
        assert c.areas(ioas) == [(0x10000, 0x11FFF)]
        c.quiet()

    def test_the_last_entry_moves_into_the_hole(self, c: Caller) -> None:
        """core 4.1."""
        ioas = c.ioas()
        domains = [c.add_domain(ioas) for _ in range(4)]
        c.table(ioas).remove_domain(domains[1])
        assert c.table(ioas).domains == [domains[0], domains[3], domains[2]]
        c.table(ioas).remove_domain(domains[2])
        assert c.table(ioas).domains == [domains[0], domains[3]]

    def test_reservations_go_with_it(self, c: Caller) -> None:
        ioas = c.ioas()
        domain = c.add_domain(ioas, ExtentDomain(0xFFFFF000, 0x1000000, 0x7FFFFFFF))
        c.refuses(errno.EINVAL, map_struct(ioas, 0, P))
        c.table(ioas).remove_domain(domain)
        c.map(ioas, 0, P)

    def test_pages_held_by_an_access_stay(self, c: Caller) -> None:
        ioas = c.ioas()
        domain = c.add_domain(ioas)
        c.map(ioas, 0x10000, 4 * P)
        access = c.access(ioas)
        access.pin_pages(0x11000, 2 * P, write=True)
        assert c.pinned_vm == 4
        c.table(ioas).remove_domain(domain)
        assert (c.pinned_vm, c.user_pages) == (2, 2)
        access.unpin_pages(0x11000, 2 * P)
        c.quiet()

    def test_pages_held_by_a_copy_stay(self, c: Caller) -> None:
        a, b = c.ioas(), c.ioas()
        first, second = c.add_domain(a), c.add_domain(b)
        c.map(a, 0x10000, 4 * P)
        frames = frames_of(first, 0x10000, 4 * P)
        c.copy(b, a, 0x11000, P, 0x50000)
        c.table(a).remove_domain(first)
        assert (c.pinned_vm, c.user_pages) == (1, 1)
        assert frames_of(second, 0x50000, P) == frames[1:2]
        third = c.add_domain(a)  # pins the other three again, and takes the second page from where it is held
        assert frames_of(third, 0x10000, 4 * P)[1] == frames[1]
        assert c.pinned_vm == 4


class TestLargePages:
    def test_large_pages_off_is_page_by_page(self, c: Caller) -> None:
        ioas = c.ioas()
        c.table(ioas).disable_large_pages()
        domain = c.add_domain(ioas, ExtentDomain(0xFFFFF800))
        c.map(ioas, 0x10000, 4 * P)
        assert domain.entry(0x10000) == (0x10000, P)

    def test_a_later_domain_too(self, c: Caller) -> None:
        ioas = c.ioas()
        c.table(ioas).disable_large_pages()
        c.map(ioas, 0x10000, 4 * P)
        assert c.add_domain(ioas, ExtentDomain(0xFFFFF800)).entry(0x10000) == (0x10000, P)


class TestEquivalence:
    """core 5.7: what events in the source process do."""

    def test_remapped_memory(self, c: Caller) -> None:
        """Pinned pages are unaffected; a later pin sees the new page."""
        a, b = c.ioas(), c.ioas()
        first, second = c.add_domain(a), c.add_domain(b)
        c.map(a, 0x10000, P)
        old = first.iova_to_phys(0x10000)
        c.host.poke(BUFFER, b"old")
        c.proc.unmap(BUFFER, 1)
        c.host.map(BUFFER, 1)
        c.host.poke(BUFFER, b"new")
        c.map(b, 0x10000, P)
        assert second.iova_to_phys(0x10000) != old
        assert first.iova_to_phys(0x10000) == old
        access = c.access(a)
        other = Caller(c.world, context=c.context)
        assert access.read(other.proc.task(), 0x10000, 3, flags=4) == b"new"  # one page: the VA as it is now
        assert c.world.physical.read(old, 3) == b"old"  # what the device sees

    def test_unmapped_memory(self, c: Caller) -> None:
        ioas = c.ioas()
        c.map(ioas, 0x10000, P)
        c.proc.unmap(BUFFER, 1)
        fails(errno.EFAULT, lambda: c.add_domain(ioas))

    def test_protection(self, c: Caller) -> None:
        """A later pin is judged by the new protection."""
        ioas = c.ioas()
        c.map(ioas, 0x10000, P)
        c.host.protect(BUFFER, 1, READ)
        fails(errno.EFAULT, lambda: c.add_domain(ioas))

    def test_exit_of_the_mapper(self, c: Caller) -> None:
        """Frames stay; others may copy what is held; what is not held cannot be pinned by anyone."""
        a, b = c.ioas(), c.ioas()
        domain = c.add_domain(a)
        c.map(a, 0x10000, 2 * P)
        c.map(b, 0x10000, P, BUFFER + 8 * P)
        frames = frames_of(domain, 0x10000, 2 * P)
        c.proc.exit()
        other = Caller(c.world, context=c.context, uid=2000)
        third = other.ioas()
        copied = other.add_domain(third)
        other.copy(third, a, 0x10000, 2 * P, 0x40000)
        assert frames_of(copied, 0x40000, 2 * P) == frames
        other.refuses(errno.EFAULT, copy_struct(third, b, 0x10000, P))
        assert other.pinned_vm == 0
        assert c.user_pages == 2  # the charge survives the mapper's exit
        other.unmap(a, 0, ULMAX)
        other.unmap(third, 0, ULMAX)
        assert c.user_pages == 0
        assert pinned_frames(c.world) == 0

    def test_file_needs_no_mapper(self, c: Caller) -> None:
        file = FakeFile(c.world, 4)
        c.proc.files[5] = lambda: file
        ioas = c.ioas()
        c.do(u.iommu_ioas_map_file(flags=7, ioas_id=ioas, fd=5, length=P, iova=0x10000))
        del c.proc.files[5]
        c.proc.exit()
        other = Caller(c.world, context=c.context)
        domain = other.add_domain(ioas)
        assert domain.iova_to_phys(0x10000)


class TestAccounting:
    """core 6."""

    def test_user_mode(self, c: Caller) -> None:
        ioas = c.ioas()
        c.add_domain(ioas)
        c.map(ioas, 0x10000, 3 * P)
        assert (c.pinned_vm, c.locked_vm, c.user_pages) == (3, 0, 3)

    def test_mm_mode(self) -> None:
        c = Caller(caps=[CAP_SYS_RESOURCE])
        c.do(u.iommu_option(option_id=0, op=0, val64=1))
        ioas = c.ioas()
        c.add_domain(ioas)
        c.map(ioas, 0x10000, 3 * P)
        assert (c.pinned_vm, c.locked_vm, c.user_pages) == (3, 3, 0)
        c.unmap(ioas, 0x10000, 3 * P)
        c.quiet()

    def test_no_accounting_with_cap_ipc_lock(self) -> None:
        c = Caller(caps=[CAP_IPC_LOCK], limit=0)
        ioas = c.ioas()
        c.add_domain(ioas)
        c.map(ioas, 0x10000, 3 * P)
        assert (c.pinned_vm, c.locked_vm, c.user_pages) == (3, 0, 0)

    def test_the_mode_is_chosen_at_map_time(self) -> None:
        c = Caller(caps=[CAP_IPC_LOCK], limit=0)
        ioas = c.ioas()
        c.map(ioas, 0x10000, P)
        c.proc.caps.clear()
        c.add_domain(ioas)
        c.refuses(errno.ENOMEM, map_struct(ioas, 0x20000, P))

    def test_limit(self) -> None:
        """Rounded down to pages, read at that moment, over all processes of the user."""
        c = Caller(limit=4 * P + 100)
        ioas = c.ioas()
        c.add_domain(ioas)
        c.map(ioas, 0x10000, 3 * P)
        assert "4 pages" in c.refuses(errno.ENOMEM, map_struct(ioas, 0x20000, 2 * P))
        assert c.areas(ioas) == [(0x10000, 0x12FFF)]
        assert (c.pinned_vm, c.user_pages) == (3, 3)
        twin = Caller(c.world, limit=4 * P)
        other = twin.ioas()
        twin.add_domain(other)
        twin.refuses(errno.ENOMEM, map_struct(other, 0x20000, 2 * P))
        twin.map(other, 0x20000, P)
        c.proc.limit = None
        c.map(ioas, 0x20000, 20 * P)

    def test_without_a_domain_nothing_is_charged(self) -> None:
        c = Caller(limit=0)
        ioas = c.ioas()
        c.map(ioas, 0x10000, 64 * P)
        fails(errno.ENOMEM, lambda: c.add_domain(ioas))
        c.quiet()
        c.proc.limit = 64 * P
        c.add_domain(ioas)

    def test_attach_charges_area_by_area_and_unwinds_all(self) -> None:
        c = Caller(limit=3 * P)
        ioas = c.ioas()
        for i in range(4):
            c.map(ioas, 0x10000 + i * P, P, BUFFER + i * P)
        fails(errno.ENOMEM, lambda: c.add_domain(ioas))
        c.quiet()

    def test_access_pins_are_charged_once(self) -> None:
        c = Caller(limit=2 * P)
        ioas = c.ioas()
        c.map(ioas, 0x10000, 8 * P)
        access = c.access(ioas)
        access.pin_pages(0x10000, 2 * P, write=False)
        access.pin_pages(0x10000, P, write=False)
        access.pin_pages(0x11000, P, write=False)
        assert c.user_pages == 2
        fails(errno.ENOMEM, lambda: access.pin_pages(0x11000, 2 * P, write=False))
        assert (c.user_pages, pinned_frames(c.world)) == (2, 2)
        access.unpin_pages(0x10000, 2 * P)
        assert c.user_pages == 2
        access.unpin_pages(0x10000, P)
        access.unpin_pages(0x11000, P)
        c.quiet()

    def test_mm_mode_after_exit_is_silently_skipped(self) -> None:
        c = Caller(caps=[CAP_SYS_RESOURCE])
        c.do(u.iommu_option(option_id=0, op=0, val64=1))
        ioas = c.ioas()
        c.add_domain(ioas)
        c.map(ioas, 0x10000, 3 * P)
        c.proc.exit()
        other = Caller(c.world, context=c.context)
        other.unmap(ioas, 0, ULMAX)
        assert pinned_frames(c.world) == 0


class TestDirtySlices:
    """core 8.2 step 10: areas live and gap-free from iova on."""

    def test_up_to_the_first_gap(self, c: Caller) -> None:
        ioas = c.ioas()
        for iova in (0x1000, 0x2000, 0x4000):
            c.map(ioas, iova, P)
        table = c.table(ioas)
        with table.reading():
            assert list(table.dirty_slices(0x1800, 0x9000)) == [(0x1800, 0x1FFF), (0x2000, 0x2FFF)]
            assert list(table.dirty_slices(0x2000, 0x27FF)) == [(0x2000, 0x27FF)]
            assert list(table.dirty_slices(0x3000, 0x9000)) == []
