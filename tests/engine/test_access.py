"""devices 8, core 5.6: accesses."""

from __future__ import annotations

import errno
import os
from functools import partial

import pytest

from iommufd.engine.access import ACCESS_RW_KTHREAD, ACCESS_RW_SLOW_PATH, ACCESS_RW_WRITE, Access, AccessOps
from iommufd.memory.extents import pfn_at, read_extents, total
from iommufd.memory.hostfile import HostFile
from iommufd.memory.space import READ
from iommufd.uapi import iommufd as u
from tests.engine.fakes import (
    BUFFER,
    ULMAX,
    Background,
    Caller,
    Gate,
    TestDmaBuf,
    fails,
    map_struct,
    pinned_frames,
)

P = 4096
R, W = u.IOMMU_IOAS_MAP_READABLE, u.IOMMU_IOAS_MAP_WRITEABLE


class TestLife:
    """devices 8.2, 8.3."""

    def test_takes_an_id_and_keeps_the_context(self, c: Caller) -> None:
        references = c.context.references
        access = c.access()
        assert access.id == 1
        assert c.context.references == references + 1
        access.destroy_access()
        assert c.context.references == references
        assert c.ioas() == 1

    def test_attach_precondition(self, c: Caller) -> None:
        ioas = c.ioas()
        access = c.access(ioas)
        fails(errno.EINVAL, lambda: access.attach(ioas))

    def test_replace_precondition(self, c: Caller) -> None:
        access = c.access()
        fails(errno.ENOENT, lambda: access.replace(c.ioas()))

    def test_devices_8_3_1(self, c: Caller) -> None:  # devices-8.3-1
        access = c.access()
        fails(errno.ENOENT, lambda: access.attach(99))
        fails(errno.ENOENT, lambda: access.attach(access.id))

    def test_devices_8_3_3_same_ioas(self, c: Caller) -> None:  # devices-8.3-3, devices-8.3-8
        calls: list[tuple[int, int]] = []
        ioas = c.ioas()
        access = c.access(ioas, unmap=lambda *a: calls.append(a))
        access.replace(ioas)
        assert calls == []
        access.destroy_access()
        c.do(u.iommu_destroy(id=ioas))

    def test_devices_8_3_5_keeps_the_old_attachment(self, c: Caller) -> None:  # devices-8.3-5
        calls: list[tuple[int, int]] = []
        a, b = c.ioas(), c.ioas()
        c.map(a, 0x1000, P)
        c.map(b, 1, 1)
        access = c.access(a, unmap=lambda *x: calls.append(x))
        access.pin_pages(0x1000, P, write=False)
        fails(errno.EADDRINUSE, lambda: access.replace(b))
        assert calls == []
        access.unpin_pages(0x1000, P)
        c.do(u.iommu_destroy(id=b))

    def test_devices_8_3_5_slots(self, c: Caller) -> None:  # devices-8.3-5
        ioas = c.ioas()
        first, second = c.access(ioas), c.access(ioas)
        first.detach()
        third = c.access(ioas)
        assert sorted(c.table(ioas).accesses) == [0, 1]
        assert c.table(ioas).accesses[0] is third
        assert second.slot == 1

    def test_devices_8_3_6_callback_runs_unlocked_and_may_unpin(
        self, c: Caller
    ) -> None:  # devices-8.3-2, devices-8.3-6
        a, b = c.ioas(), c.ioas()
        c.map(a, 0x1000, P)
        calls: list[tuple[int, int]] = []

        def unmap(iova: int, length: int) -> None:
            assert not c.world.lock.locked()
            calls.append((iova, length))
            fails(errno.ENOENT, lambda: access.pin_pages(0x1000, P, write=False))  # devices-8.3-4
            fails(errno.EBUSY, lambda: access.attach(b))  # step 2
            fails(errno.ENOENT, lambda: access.replace(b))
            access.detach()  # not attached: nothing
            access.unpin_pages(0x1000, P)

        access = c.access(a, unmap=unmap)
        access.pin_pages(0x1000, P, write=False)
        access.replace(b)
        assert calls == [(0, ULMAX)]
        c.quiet()
        c.do(u.iommu_destroy(id=a))  # step 7: the count is gone
        c.refuses(errno.EBUSY, u.iommu_destroy(id=b))

    def test_destroy_detaches_with_a_last_callback(self, c: Caller) -> None:  # devices-8.3-7
        ioas = c.ioas()
        c.map(ioas, 0x1000, P)
        calls: list[tuple[int, int]] = []

        def unmap(iova: int, length: int) -> None:
            calls.append((iova, length))
            access.unpin_pages(0x1000, P)

        access = c.access(ioas, unmap=unmap)
        access.pin_pages(0x1000, P, write=False)
        access.destroy_access()
        assert calls == [(0, ULMAX)]
        assert c.table(ioas).iova_alignment == 1
        c.quiet()
        c.do(u.iommu_destroy(id=ioas))

    def test_no_callback_once_destroy_has_begun(self, c: Caller) -> None:
        ioas = c.ioas()
        c.map(ioas, 0x1000, P)
        calls: list[int] = []
        watcher = c.access(ioas, pins=False, unmap=lambda iova, length: calls.append(iova))
        pinner: Access = c.access(ioas, unmap=lambda iova, length: pinner.unpin_pages(0x1000, P))
        pinner.pin_pages(0x1000, P, write=False)
        with c.world.lock:
            watcher.wait -= 1  # as its destruction does first
        c.unmap(ioas, 0, ULMAX)
        assert calls == []
        with c.world.lock:
            watcher.wait += 1

    def test_internal_access(self, c: Caller) -> None:
        """Consumes an ID, has alignment 4096, cannot be destroyed by the user, no callbacks."""
        ioas = c.ioas()
        c.map(ioas, 0x1000, P)
        references = c.context.references
        access = Access.create_internal(c.context)
        assert c.context.references == references
        access.attach(ioas)
        assert c.table(ioas).iova_alignment == P
        c.refuses(errno.EBUSY, u.iommu_destroy(id=access.id))
        access.pin_pages(0x1000, P, write=False)
        access.unpin_pages(0x1000, P)
        access.destroy_access()
        assert c.table(ioas).iova_alignment == 1


class TestPin:
    """devices 8.4, core 5.6."""

    def test_devices_8_4_1(self, c: Caller) -> None:  # devices-8.4-1
        ioas = c.ioas()
        fails(errno.EINVAL, lambda: c.access(ioas, pins=False).pin_pages(0, P, write=False))
        fails(errno.EINVAL, lambda: c.access(ioas, unmap=None).pin_pages(0, P, write=False))

    @pytest.mark.parametrize(
        ("iova", "length", "number"),
        [
            pytest.param(0, 0, errno.EINVAL, id="core-5.6-1 devices-8.4-2 zero"),
            pytest.param(ULMAX, 2, errno.EOVERFLOW, id="core-5.6-1 devices-8.4-3 overflow"),
            pytest.param(0x1000, P, errno.ENOENT, id="core-5.6-1 devices-8.4-4 not-attached"),
        ],
    )
    def test_core_5_6_1(self, c: Caller, iova: int, length: int, number: int) -> None:  # core-5.6-1
        fails(number, lambda: c.access().pin_pages(iova, length, write=False))

    def test_core_5_6_2_page_offset(self, c: Caller) -> None:  # core-5.6-2, devices-8.4-5b
        ioas = c.ioas()
        access = c.access(ioas)
        c.map(ioas, 0x1000, 2 * P)
        fails(errno.EINVAL, lambda: access.pin_pages(0x1010, 8, write=False))
        access.unpin_pages(0x1010, 8)
        c.quiet()

    def test_core_5_6_2_memory_not_iova(self, c: Caller) -> None:  # core-5.6-2
        """A page-aligned IOVA over sub-page memory; the area appeared before the access raised the alignment."""
        ioas = c.ioas()
        c.map(ioas, 0x1800, 0x800, BUFFER)
        c.map(ioas, 0x2000, 0x1000, BUFFER + P)
        access = Access.create(c.context, AccessOps(True, lambda iova, length: None))
        fails(errno.EADDRINUSE, lambda: access.attach(ioas))
        access.iova_alignment = 1
        access.attach(ioas)
        access.iova_alignment = P
        assert total(access.pin_pages(0x1800, 0x800, write=False)) == 1
        fails(errno.EINVAL, lambda: access.pin_pages(0x1800, 0x900, write=False))  # ends mid-page and goes on
        assert pinned_frames(c.world) == 1

    def test_core_5_6_3(self, c: Caller) -> None:  # core-5.6-3, devices-8.4-5c
        ioas = c.ioas()
        access = c.access(ioas)
        c.map(ioas, 0x1000, P, flags=R)
        c.map(ioas, 0x2000, P, flags=W)
        fails(errno.EPERM, lambda: access.pin_pages(0x1000, P, write=True))
        fails(errno.EPERM, lambda: access.pin_pages(0x2000, P, write=False))
        access.pin_pages(0x2000, P, write=True)  # WRITE alone is enough
        fails(errno.EPERM, lambda: access.pin_pages(0x1000, 2 * P, write=False))
        assert pinned_frames(c.world) == 1

    def test_core_5_6_5(self, c: Caller) -> None:  # core-5.6-5, devices-8.4-5
        ioas = c.ioas()
        access = c.access(ioas)
        buffer = TestDmaBuf(c.world, 2)
        c.proc.files[9] = lambda: buffer
        c.do(u.iommu_ioas_map_file(flags=1 | R, ioas_id=ioas, fd=9, length=2 * P, iova=0x1000))
        fails(errno.EPERM, lambda: access.pin_pages(0x1000, P, write=True))
        fails(errno.EINVAL, lambda: access.pin_pages(0x1000, P, write=False))
        assert next(c.table(ioas).areas.values()).accesses == 0

    def test_core_5_6_6(self, c: Caller) -> None:  # core-5.6-6, devices-8.4-5d
        ioas = c.ioas()
        access = c.access(ioas)
        c.map(ioas, 0x1000, P)
        c.map(ioas, 0x2000, P, 0x2000_0000)
        fails(errno.EFAULT, lambda: access.pin_pages(0x1000, 2 * P, write=False))
        c.quiet()
        assert [area.accesses for area in c.table(ioas).areas.values()] == [0, 0]
        assert c.unmap(ioas, 0, ULMAX) == 2 * P

    @pytest.mark.parametrize(("iova", "length"), [(0x0, P), (0x1000, 2 * P), (0x1000, P + 1), (0x3000, 2 * P)])
    def test_core_5_6_7(self, c: Caller, iova: int, length: int) -> None:  # core-5.6-7, devices-8.4-6
        ioas = c.ioas()
        access = c.access(ioas)
        c.map(ioas, 0x1000, P)
        c.map(ioas, 0x3000, P)
        fails(errno.ENOENT, lambda: access.pin_pages(iova, length, write=False))
        c.quiet()

    def test_over_several_areas(self, c: Caller) -> None:  # devices-8.4-7
        ioas = c.ioas()
        access = c.access(ioas)
        c.map(ioas, 0x1000, 2 * P, BUFFER)
        c.map(ioas, 0x3000, 2 * P, BUFFER + 8 * P)
        c.host.poke(BUFFER + P, b"one")
        c.host.poke(BUFFER + 8 * P, b"two")
        extents = access.pin_pages(0x2000, P + 5, write=True)
        assert total(extents) == 2
        assert (read_extents(extents, 0, 3), read_extents(extents, P, 3)) == (b"one", b"two")
        assert [area.accesses for area in c.table(ioas).areas.values()] == [1, 1]
        access.unpin_pages(0x2000, P + 5)
        assert [area.accesses for area in c.table(ioas).areas.values()] == [0, 0]
        c.quiet()

    def test_identical_ranges_nest_and_others_coexist(self, c: Caller) -> None:
        ioas = c.ioas()
        access = c.access(ioas)
        c.map(ioas, 0x1000, 8 * P)
        for _ in range(2):
            access.pin_pages(0x1000, 4 * P, write=False)
        access.pin_pages(0x3000, 4 * P, write=False)
        assert pinned_frames(c.world) == 6
        for left in (6, 4):
            access.unpin_pages(0x1000, 4 * P)
            assert pinned_frames(c.world) == left
        access.unpin_pages(0x3000, 4 * P)
        c.quiet()

    def test_wrong_unpins_are_ignored(self, c: Caller) -> None:
        ioas = c.ioas()
        access = c.access(ioas)
        c.map(ioas, 0x1000, 8 * P)
        access.unpin_pages(0x1000, P)
        access.pin_pages(0x1000, 4 * P, write=False)
        for iova, length in ((0x1000, P), (0x2000, 4 * P), (0, 0), (ULMAX, 2), (0x9000, P)):
            access.unpin_pages(iova, length)
        assert pinned_frames(c.world) == 4
        c.access().unpin_pages(0x1000, 4 * P)
        assert pinned_frames(c.world) == 4

    def test_pinned_pages_are_the_domains(self, c: Caller) -> None:
        ioas = c.ioas()
        domain = c.add_domain(ioas)
        access = c.access(ioas)
        c.map(ioas, 0x1000, 4 * P)
        c.proc.unmap(BUFFER, 4)
        extents = access.pin_pages(0x2000, P, write=True)
        assert pfn_at(extents, 0) << 12 == domain.iova_to_phys(0x2000)


class TestCopy:
    """devices 8.7, core 5.6."""

    @pytest.fixture
    def ioas(self, c: Caller) -> int:
        ioas = c.ioas()
        c.map(ioas, 0x1000, 4 * P)
        c.host.poke(BUFFER, bytes(range(256)) * 64)
        return ioas

    @pytest.mark.parametrize(
        ("iova", "length", "number"),
        [
            pytest.param(0x1000, 0, errno.EINVAL, id="devices-8.7-1"),
            pytest.param(ULMAX, 2, errno.EOVERFLOW, id="devices-8.7-2"),
            pytest.param(0x1000, 4, errno.ENOENT, id="devices-8.7-3"),
        ],
    )
    def test_not_attached(self, c: Caller, iova: int, length: int, number: int) -> None:
        access = c.access(pins=False)
        fails(number, lambda: access.read(c.proc.task(), iova, length))

    def test_devices_8_7_4(self, c: Caller, ioas: int) -> None:  # devices-8.7-4
        access = c.access(ioas, pins=False)
        next(c.table(ioas).areas.values()).prevent_access = True
        fails(errno.EINVAL, lambda: access.read(c.proc.task(), 0x1000, 1))

    def test_devices_8_7_5(self, c: Caller) -> None:  # devices-8.7-5
        ioas = c.ioas()
        c.map(ioas, 0x1000, P, flags=R)
        c.map(ioas, 0x2000, P, flags=W)
        access = c.access(ioas, pins=False)
        fails(errno.EPERM, lambda: access.write(c.proc.task(), 0x1000, b"x"))
        fails(errno.EPERM, lambda: access.read(c.proc.task(), 0x2000, 1))
        access.write(c.proc.task(), 0x2000, b"x")

    def test_devices_8_7_copy_1(self, c: Caller) -> None:  # core-5.6-4, devices-8.7-copy-1
        """A writable area over a backing that is not: only COPY could make one, and refuses to."""
        ioas = c.ioas()
        c.map(ioas, 0x1000, P, flags=R)
        next(c.table(ioas).areas.values()).prot = 3
        access = c.access(ioas, pins=False)
        fails(errno.EPERM, lambda: access.write(c.proc.task(), 0x1000, b"x"))

    def test_devices_8_7_7(self, c: Caller, ioas: int) -> None:  # devices-8.7-7
        """Areas before the gap stay copied."""
        access = c.access(ioas, pins=False)
        fails(errno.ENOENT, lambda: access.write(c.proc.task(), 0x4FFE, b"abcd"))
        assert c.host.peek(BUFFER + 4 * P - 2, 2) == b"ab"
        fails(errno.ENOENT, lambda: access.read(c.proc.task(), 0xFFF, 2))

    @pytest.mark.parametrize("flags", [0, ACCESS_RW_SLOW_PATH, ACCESS_RW_KTHREAD])
    @pytest.mark.parametrize(("iova", "length"), [(0x1000, 1), (0x1FF0, 32), (0x1003, 3 * P), (0x1000, 4 * P)])
    def test_reads_and_writes_any_bytes(self, c: Caller, ioas: int, flags: int, iova: int, length: int) -> None:
        # devices-8.7-6
        access = c.access(ioas, pins=False)
        task = c.proc.task()
        at = BUFFER + iova - 0x1000
        assert access.read(task, iova, length, flags) == c.host.peek(at, length)
        data = os.urandom(length)
        access.write(task, iova, data, flags | ACCESS_RW_WRITE)
        assert c.host.peek(at, length) == data
        c.quiet()

    def test_direct_copy_ignores_pinned_frames(self, c: Caller, ioas: int) -> None:  # devices-8.7-copy-6
        c.add_domain(ioas)
        access = c.access(ioas, pins=False)
        c.proc.unmap(BUFFER, 4)
        fails(errno.EFAULT, lambda: access.read(c.proc.task(), 0x1000, 4))
        c.host.map(BUFFER, 4)
        assert access.read(c.proc.task(), 0x1000, 4) == bytes(4)
        assert access.read(c.proc.task(), 0x1000, 2 * P, ACCESS_RW_SLOW_PATH)[:4] == b"\0\1\2\3"

    def test_direct_copy_honours_protections(self, c: Caller, ioas: int) -> None:
        access = c.access(ioas, pins=False)
        c.host.protect(BUFFER, 1, READ)
        fails(errno.EFAULT, lambda: access.write(c.proc.task(), 0x1000, b"x"))
        access.read(c.proc.task(), 0x1000, 1)

    def test_one_page_of_another_process(self, c: Caller, ioas: int) -> None:  # devices-8.7-copy-4
        """The source's VA as it is now, even if a domain holds another frame."""
        c.add_domain(ioas)
        access = c.access(ioas, pins=False)
        other = Caller(c.world, context=c.context).proc.task()
        c.proc.unmap(BUFFER, 4)
        c.host.map(BUFFER, 4)
        c.host.poke(BUFFER, b"new!")
        assert access.read(other, 0x1000, 4) == b"new!"
        assert access.read(other, 0x1000, 2 * P)[:4] == b"\0\1\2\3"  # several pages: frames held first

    def test_source_is_gone(self, c: Caller, ioas: int) -> None:  # devices-8.7-copy-5
        access = c.access(ioas, pins=False)
        other = Caller(c.world, context=c.context).proc.task()
        second = c.ioas()
        c.add_domain(second)
        c.copy(second, ioas, 0x1000, 2 * P, 0x1000)  # holds the first two pages
        c.proc.exit()
        for task, flags in ((other, 0), (None, 0), (other, ACCESS_RW_KTHREAD)):
            assert access.read(task, 0x1001, 3, flags) == b"\1\2\3"
            assert len(access.read(task, 0x1001, P, flags)) == P
            fails(errno.EFAULT, partial(access.read, task, 0x3000, 1, flags))

    def test_file_is_always_the_slow_path(self, c: Caller) -> None:  # devices-8.7-copy-3
        fd = os.memfd_create("test")
        try:
            os.ftruncate(fd, 2 * P)
            os.pwrite(fd, b"hello", P - 2)
            c.proc.files[5] = lambda: HostFile(c.world.physical, os.dup(fd))
            ioas = c.ioas()
            c.do(u.iommu_ioas_map_file(flags=7, ioas_id=ioas, fd=5, length=4 * P, iova=0x1000))
            access = c.access(ioas, pins=False)
            assert access.read(c.proc.task(), 0x1000 + P - 2, 5) == b"hello"
            access.write(None, 0x1000 + P - 2, b"HELLO")
            assert os.pread(fd, 5, P - 2) == b"HELLO"
            fails(errno.EINVAL, lambda: access.read(None, 0x3000, 1))  # beyond the end
            c.quiet()
        finally:
            os.close(fd)

    def test_dma_buf(self, c: Caller) -> None:  # devices-8.7-copy-2
        ioas = c.ioas()
        buffer = TestDmaBuf(c.world, 2)
        c.proc.files[9] = lambda: buffer
        c.do(u.iommu_ioas_map_file(flags=7, ioas_id=ioas, fd=9, length=2 * P, iova=0x1000))
        access = c.access(ioas, pins=False)
        fails(errno.EINVAL, lambda: access.read(None, 0x1000, 1))
        fails(errno.EINVAL, lambda: access.write(None, 0x1000, b"x"))


def test_an_area_in_progress_is_a_gap(c: Caller) -> None:
    """core 9."""
    ioas = c.ioas()
    c.add_domain(ioas)
    access = c.access(ioas)
    gate = Gate(c.proc, BUFFER)
    job = Background(lambda: c.map(ioas, 0x1000, P))
    assert gate.reached.wait(10)
    fails(errno.ENOENT, lambda: access.pin_pages(0x1000, P, write=False))
    fails(errno.ENOENT, lambda: access.read(None, 0x1000, 1))
    gate.open()
    job.result()
    access.pin_pages(0x1000, P, write=False)


def test_access_limit(c: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    """devices 8.3 step 5."""
    monkeypatch.setattr("iommufd.engine.io_pagetable.MAX_ACCESSES", 2)
    ioas = c.ioas()
    c.access(ioas)
    c.access(ioas)
    fails(errno.EBUSY, lambda: c.access(ioas))
    assert len(c.table(ioas).accesses) == 2
    c.map(ioas, 0x1000, P)
    c.refuses(errno.EINVAL, map_struct(ioas, 0x8001, P))
