"""AddressSpace over a process that is not real: identity, the rows of core 5.5, and what happens to pinned contents."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iommufd.errors import KernelError
from iommufd.memory.extents import pfn_at, read_extents, runs, same_frames, total, unpin_extents, write_extents
from iommufd.memory.frames import Extents, FrameAllocator
from iommufd.memory.hostfile import HostFile
from iommufd.memory.physical import Physical
from iommufd.memory.space import AddressSpace
from iommufd.memory.vma import READ, SHARED, WRITE
from tests.memory.fake_host import FakeHost

P = 4096
VA = 0x7F00_0000_0000


class Rig:
    """One machine, one process with 16 anonymous pages at VA."""

    def __init__(self) -> None:
        self.physical = Physical()
        self.host = FakeHost()
        self.host.map(VA, 16)
        self.space = AddressSpace(self.physical, self.host, "test")

    def other(self) -> tuple[FakeHost, AddressSpace]:
        host = FakeHost(self.host.shared)
        host.sizes = self.host.sizes
        return host, AddressSpace(self.physical, host, "other")

    def munmap(self, va: int, npages: int) -> None:
        self.space.unmap(va, va + npages * P)
        self.host.forget(va, npages)

    def fails(self, number: int, va: int, npages: int = 1, write: bool = True, **more: bool) -> str:
        chunks = len(self.physical.frames), sum(chunk.pinned for chunk in self.physical.frames)
        with pytest.raises(KernelError) as caught:
            self.space.pin(va, npages, write, **more)
        assert caught.value.errno == number
        assert sum(chunk.pinned for chunk in self.physical.frames) == chunks[1]
        return caught.value.why


@pytest.fixture
def rig() -> Rig:
    return Rig()


def pins(extents: Extents) -> list[int]:
    return [e.chunk.pins(e.index + i) for e in extents for i in range(e.count)]


# ------------------------------------------------------------------------------------------------------------- identity


def test_the_same_page_has_the_same_frame(rig: Rig) -> None:
    a, b = rig.space.pin(VA + 3 * P, 2, True), rig.space.pin(VA + 4 * P + 5, 1, False)
    assert pfn_at(a, 1) == pfn_at(b, 0)
    assert pins(a) == [1, 2]
    assert same_frames(rig.space.look(VA + 3 * P, 2), a)


def test_one_vma_is_one_chunk_whatever_is_pinned_first(rig: Rig) -> None:
    parts = [rig.space.pin(VA + page * P, 1, True) for page in (7, 0, 15, 8)]
    assert len({e.chunk for part in parts for e in part}) == 1
    assert len(rig.physical.frames) == 1
    assert total(rig.space.pin(VA, 16, True)) == 16


def test_a_range_over_two_vmas(rig: Rig) -> None:
    rig.host.map(VA + 16 * P, 4, READ | WRITE)
    extents = rig.space.pin(VA + 15 * P, 2, True)
    assert len(extents) == 2
    assert pins(extents) == [1, 1]


def test_mprotect_does_not_change_identity(rig: Rig) -> None:
    before = rig.space.pin(VA, 16, True)
    data = dict(rig.host.private)
    rig.host.map(VA + 4 * P, 4, READ)  # a VMA of its own now
    rig.host.private = data
    assert same_frames(rig.space.look(VA, 16), before)
    assert len(rig.space.look(VA, 16)) == 1


def test_a_growing_vma_keeps_its_frames_and_adds_some(rig: Rig) -> None:
    before = rig.space.pin(VA, 16, True)
    rig.host.map(VA - 2 * P, 20)
    after = rig.space.look(VA - 2 * P, 20)
    assert same_frames(after[1:2], before)
    assert total(after) == 20


def test_a_terabyte_is_one_extent_and_four_are_a_few(rig: Rig) -> None:
    rig.host.map(1 << 40, 1 << 30)
    rig.space.pin((1 << 40) + (1 << 39), 1, True)  # what is pinned first covers up to 1 TiB around it
    extents = rig.space.pin(1 << 40, 1 << 30, True)
    assert len(extents) == 2
    assert total(extents) == 1 << 30
    assert len(rig.space.look(1 << 40, 1 << 28)) == 1


def test_when_frames_get_scarce_a_chunk_is_what_was_asked_for(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig.physical, "frames", FrameAllocator(first=0, end=1 << 20))
    rig.host.map(1 << 40, 1 << 24)
    extents = rig.space.pin((1 << 40) + 5 * P, 3, True)
    assert extents[0].chunk.npages == 3
    rig.fails(errno.ENOMEM, 1 << 40, 1 << 23)


def test_huge_pages_are_contiguous(rig: Rig) -> None:
    size = 2 << 20
    rig.host.map(VA & -size, 1024, kind="hugetlbfs", ino=9, page_size=size)
    rig.host.sizes[9] = 4 << 20
    extents = rig.space.pin((VA & -size) + 5 * P, 1000, True)
    assert [run.nbytes for run in runs(extents, 0, 1000 * P)] == [(512 - 5) * P, (1000 - 507) * P]


def test_shared_memory_has_one_identity_in_all_processes(rig: Rig) -> None:
    rig.host.share(VA + 64 * P, 8, ino=5)
    rig.host.share(VA + 128 * P, 4, ino=5, offset=2 * P)
    host, space = rig.other()
    host.share(VA, 6, ino=5, offset=P)
    a = rig.space.pin(VA + 64 * P, 8, True)
    b = rig.space.pin(VA + 128 * P, 4, True)
    c = space.pin(VA, 6, True)
    assert [pfn_at(b, i) for i in range(4)] == [pfn_at(a, 2 + i) for i in range(4)]
    assert [pfn_at(c, i) for i in range(6)] == [pfn_at(a, 1 + i) for i in range(6)]
    assert pins(a) == [1, 2, 3, 3, 3, 3, 2, 1]


def test_private_mappings_of_a_file_are_the_processes_own(rig: Rig) -> None:
    rig.host.map(VA + 64 * P, 4, ino=5, dev=1, kind="shmem")
    rig.host.sizes[5] = 4 * P
    host, space = rig.other()
    host.map(VA + 64 * P, 4, ino=5, dev=1, kind="shmem")
    assert pfn_at(rig.space.look(VA + 64 * P, 1), 0) != pfn_at(space.look(VA + 64 * P, 1), 0)


def test_a_sysv_segment_is_not_a_memfd_with_the_same_number(rig: Rig) -> None:
    rig.host.sizes[0] = P
    rig.host.shared[0] = bytearray(P)
    rig.host.map(VA + 64 * P, 1, READ | WRITE | SHARED, kind="shmem", dev=1, ino=0, name="/SYSV00000000 (deleted)")
    rig.host.map(VA + 65 * P, 1, READ | WRITE | SHARED, kind="shmem", dev=1, ino=0, name="/memfd:x (deleted)")
    a, b = rig.space.pin(VA + 64 * P, 1, True), rig.space.pin(VA + 65 * P, 1, True)
    assert not same_frames(a, b)


def test_by_address_and_by_file_is_the_same_frame(rig: Rig) -> None:
    fd = os.memfd_create("test")
    os.ftruncate(fd, 8 * P)
    file = HostFile(rig.physical, fd)
    rig.host.sizes[file.ino] = 8 * P
    rig.host.shared[file.ino] = bytearray(8 * P)
    rig.host.map(VA + 64 * P, 8, READ | WRITE | SHARED, kind="shmem", dev=file.dev, ino=file.ino)
    a, b = rig.space.pin(VA + 64 * P, 8, True), file.pin(2, 3)
    assert [pfn_at(b, i) for i in range(3)] == [pfn_at(a, 2 + i) for i in range(3)]
    assert pins(a)[1:6] == [1, 2, 2, 2, 1]
    unpin_extents(b)
    file.close()
    assert pins(a) == [1] * 8


def test_a_reused_address_gets_fresh_frames(rig: Rig) -> None:
    old = rig.space.pin(VA, 1, True)
    rig.munmap(VA, 16)
    rig.host.map(VA, 16)
    new = rig.space.pin(VA, 1, True)
    assert pfn_at(new, 0) != pfn_at(old, 0)
    assert pins(old) == [1]


def test_an_address_reused_otherwise_without_a_word(rig: Rig) -> None:
    """Nobody announced the munmap: a mapping of another kind is noticed, and what was pinned is lost, not mixed up."""
    old = rig.space.pin(VA, 2, True)
    rig.host.forget(VA, 16)
    rig.host.share(VA, 16, ino=5)
    new = rig.space.pin(VA, 2, True)
    assert not same_frames(old, new)
    write_extents(new, 0, b"new")
    with pytest.raises(KernelError) as caught:
        read_extents(old, 0, 3)
    assert caught.value.errno == errno.EFAULT


def test_a_fork_starts_without_intervals(rig: Rig) -> None:
    host, child = rig.other()
    host.map(VA, 16)
    assert not same_frames(rig.space.look(VA, 1), child.look(VA, 1))


# ---------------------------------------------------------------------------------------------------- core 5.5, by rows


def test_core_5_5_row_1_no_vma(rig: Rig) -> None:
    assert "nothing is mapped at 0x7f0000010000" in rig.fails(errno.EFAULT, VA + 15 * P, 2)
    rig.fails(errno.EFAULT, VA - P, 1)
    rig.fails(errno.EFAULT, 0)


def test_core_5_5_row_1_prot_none(rig: Rig) -> None:
    rig.host.map(VA + 8 * P, 1, 0)
    rig.fails(errno.EFAULT, VA + 8 * P, write=True)
    rig.fails(errno.EFAULT, VA + 8 * P, write=False)
    rig.fails(errno.EFAULT, VA, 16)


def test_core_5_5_row_1_guard_region(rig: Rig) -> None:
    rig.space.guard_check = lambda start, end: start <= VA + 3 * P < end
    rig.fails(errno.EFAULT, VA, 4)
    rig.space.pin(VA, 3, True)


def test_core_5_5_row_1_beyond_the_end_of_the_file(rig: Rig) -> None:
    rig.host.share(VA + 64 * P, 8, ino=5)
    rig.host.sizes[5] = 3 * P
    rig.space.pin(VA + 64 * P, 3, True)
    rig.fails(errno.EFAULT, VA + 64 * P, 4)
    rig.fails(errno.EFAULT, VA + 67 * P)


def test_core_5_5_row_1_kernel_addresses(rig: Rig) -> None:
    rig.fails(errno.EFAULT, 0xFFFF_8000_0000_0000)
    rig.fails(errno.EFAULT, 0x8000_0000_0000)


def test_core_5_5_row_2_io_memory(rig: Rig) -> None:
    rig.host.map(VA + 64 * P, 1, READ | WRITE, kind="special")
    rig.fails(errno.EFAULT, VA + 64 * P, write=False)


def test_core_5_5_row_3_read_only_memory(rig: Rig) -> None:
    rig.host.map(VA + 64 * P, 1, READ)
    rig.fails(errno.EFAULT, VA + 64 * P, write=True)
    rig.space.pin(VA + 64 * P, 1, False)


def test_write_only_memory_can_be_pinned_for_writing_only(rig: Rig) -> None:
    rig.host.map(VA + 64 * P, 1, WRITE)
    rig.fails(errno.EFAULT, VA + 64 * P, write=False)
    rig.space.pin(VA + 64 * P, 1, True)


@pytest.mark.parametrize("kind", ["other", "shmem", "hugetlbfs", "ramfs"])
def test_core_5_5_row_4_shared_mapping_of_a_file_system(rig: Rig, kind: str) -> None:
    rig.host.sizes[6] = 8 * P
    rig.host.shared[6] = bytearray(8 * P)
    rig.host.map(VA + 64 * P, 8, READ | WRITE | SHARED, kind=kind, dev=8, ino=6)
    rig.host.map(VA + 80 * P, 8, READ | WRITE, kind=kind, dev=8, ino=6)
    if kind == "other":
        rig.fails(errno.EFAULT, VA + 64 * P, write=True)
        rig.space.look(VA + 64 * P, 1, True)  # an ordinary fault-in may
    else:
        rig.space.pin(VA + 64 * P, 1, True)
    rig.space.pin(VA + 64 * P, 1, False)
    rig.space.pin(VA + 80 * P, 1, True)


def test_core_5_5_row_6_the_range_wraps(rig: Rig) -> None:
    rig.fails(errno.EOVERFLOW, 2**64 - P)
    rig.fails(errno.EOVERFLOW, VA, 1 << 52)
    rig.fails(errno.EFAULT, 2**64 - P, current=False)
    rig.fails(errno.EFAULT, 2**64 - 2 * P)


def test_core_5_5_row_7_the_process_is_gone(rig: Rig) -> None:
    rig.space.gone()
    assert not rig.space.alive
    assert "gone" in rig.fails(errno.EFAULT, VA)


def test_core_5_5_row_7_the_process_is_gone_without_a_word(rig: Rig) -> None:
    rig.host.dead = True
    rig.fails(errno.EFAULT, VA)
    assert not rig.space.alive


def test_partial_progress_is_undone(rig: Rig) -> None:
    rig.host.map(VA + 16 * P, 1, READ)
    rig.fails(errno.EFAULT, VA, 17)
    assert rig.physical.frames and all(chunk.pinned == 0 for chunk in rig.physical.frames)


def test_pinning_touches_no_anonymous_page(rig: Rig) -> None:
    rig.space.pin(VA, 16, True)
    assert rig.host.peeks == 0
    rig.host.share(VA + 64 * P, 200, ino=5)
    rig.space.pin(VA + 64 * P, 200, True)
    assert rig.host.peeks == 1


def test_cpu_writes_after_a_read_only_pin_are_seen(rig: Rig) -> None:
    extents = rig.space.pin(VA, 1, False)
    rig.space.write(VA + 7, b"later")
    assert read_extents(extents, 7, 5) == b"later"


def test_user_copies_honour_protections(rig: Rig) -> None:
    rig.host.map(VA + 16 * P, 1, READ)
    rig.space.write(VA + 5, b"abc")
    assert rig.space.read(VA + 4, 5) == b"\0abc\0"
    for call in (
        lambda: rig.space.write(VA + 16 * P - 2, b"abc"),
        lambda: rig.space.read(VA + 17 * P - 1, 2),
        lambda: rig.space.read(0, 1),
    ):
        with pytest.raises(KernelError) as caught:
            call()
        assert caught.value.errno == errno.EFAULT


# ------------------------------------------------------------------------------------------ what outlives its addresses


def test_pinned_contents_outlive_munmap(rig: Rig) -> None:
    extents = rig.space.pin(VA + 2 * P, 3, True)
    rig.space.write(VA + 2 * P, b"x" * (3 * P))
    assert rig.space.has_pins(VA, VA + 3 * P)
    assert not rig.space.has_pins(VA, VA + 2 * P)
    rig.munmap(VA, 16)
    rig.host.map(VA, 16)
    rig.space.write(VA + 2 * P, b"y" * P)
    assert read_extents(extents, 0, 3 * P) == b"x" * (3 * P)
    write_extents(extents, P, b"device")
    assert read_extents(extents, P - 1, 8) == b"xdevicex"
    assert rig.space.read(VA + 3 * P, 6) == bytes(6)
    unpin_extents(extents)
    assert len(rig.physical.frames) == 0


def test_munmap_of_a_part(rig: Rig) -> None:
    extents = rig.space.pin(VA, 16, True)
    for page in range(16):
        rig.space.write(VA + page * P, bytes([page]))
    rig.munmap(VA + 4 * P, 4)
    rig.space.write(VA + 3 * P, b"A")
    rig.space.write(VA + 8 * P, b"B")
    assert [read_extents(extents, page * P, 1) for page in (3, 4, 7, 8)] == [b"A", b"\4", b"\7", b"B"]
    assert read_extents(extents, 3 * P, 6 * P)[P] == 4  # across live and rescued pages
    assert pfn_at(rig.space.look(VA + 8 * P, 1), 0) == pfn_at(extents, 8)
    rig.fails(errno.EFAULT, VA + 4 * P)


def test_unpinned_pages_are_not_copied(rig: Rig) -> None:
    unpin_extents(rig.space.pin(VA, 16, True))
    peeks = rig.host.peeks
    rig.munmap(VA, 16)
    assert rig.host.peeks == peeks
    assert len(rig.physical.frames) == 0


def test_untouched_pages_are_not_copied(rig: Rig) -> None:
    extents = rig.space.pin(VA, 16, True)
    rig.space.write(VA + 5 * P, b"!")
    rig.host.peeks = 0
    rig.munmap(VA, 16)
    assert rig.host.peeks == 1
    assert read_extents(extents, 5 * P, 2) == b"!\0"
    assert read_extents(extents, 0, 5 * P) == bytes(5 * P)


def test_exit_and_exec(rig: Rig) -> None:
    extents = rig.space.pin(VA, 2, True)
    rig.space.write(VA, b"left behind")
    rig.space.gone()
    assert read_extents(extents, 0, 11) == b"left behind"
    unpin_extents(extents)
    assert len(rig.physical.frames) == 0


def test_exit_when_nobody_else_holds_a_pin(rig: Rig) -> None:
    extents = rig.space.pin(VA, 2, True)
    rig.host.peeks = 0
    rig.space.gone(rescue=False)
    assert rig.host.peeks == 0
    unpin_extents(extents)
    assert len(rig.physical.frames) == 0


def test_killed_without_a_word(rig: Rig) -> None:
    """interposition 6: private pages of a process killed by SIGKILL are lost. Said, not invented."""
    extents = rig.space.pin(VA, 2, True)
    rig.host.dead = True
    rig.space.gone()
    with pytest.raises(KernelError) as caught:
        read_extents(extents, 0, 1)
    assert caught.value.errno == errno.EFAULT
    with pytest.raises(KernelError):
        write_extents(extents, 0, b"x")
    unpin_extents(extents)
    assert len(rig.physical.frames) == 0


def test_an_exec_that_happens(rig: Rig) -> None:
    extents = rig.space.pin(VA + P, 2, True)
    rig.space.write(VA + P, b"before exec")
    rig.space.save()
    unpin_extents(rig.space.pin(VA + 5 * P, 1, True))
    rig.host.dead = True
    rig.space.gone()
    assert read_extents(extents, 0, 11) == b"before exec"


def test_an_exec_that_fails(rig: Rig) -> None:
    extents = rig.space.pin(VA, 1, True)
    rig.space.write(VA, b"before")
    rig.space.save()
    rig.space.write(VA, b"after!")
    assert read_extents(extents, 0, 6) == b"after!"
    rig.space.save()
    rig.host.dead = True
    rig.space.gone()
    assert read_extents(extents, 0, 6) == b"after!"
    unpin_extents(extents)
    assert len(rig.physical.store._used) == 0


def test_mremap_takes_the_frames_along(rig: Rig) -> None:
    extents = rig.space.pin(VA, 16, True)
    new = VA + 0x100_0000
    rig.space.write(VA + 5 * P, b"moving")
    data = {page + 0x1000 - 4: content for page, content in rig.host.private.items()}
    rig.space.move(VA + 4 * P, new, 4 * P)
    rig.host.forget(VA + 4 * P, 4)
    rig.host.map(new, 4)
    rig.host.private.update(data)
    assert pfn_at(rig.space.look(new + P, 1), 0) == pfn_at(extents, 5)
    assert read_extents(extents, 5 * P, 6) == b"moving"
    rig.space.write(new + P, b"MOVED!")
    assert read_extents(extents, 5 * P, 6) == b"MOVED!"
    assert pfn_at(rig.space.look(VA + 3 * P, 1), 0) == pfn_at(extents, 3)
    rig.fails(errno.EFAULT, VA + 4 * P)
    rig.host.map(VA + 4 * P, 4)
    assert pfn_at(rig.space.look(VA + 4 * P, 1), 0) not in [pfn_at(extents, i) for i in range(16)]


def test_mremap_of_shared_memory(rig: Rig) -> None:
    rig.host.share(VA + 64 * P, 8, ino=5)
    extents = rig.space.pin(VA + 64 * P, 8, True)
    rig.space.move(VA + 66 * P, VA + 96 * P, 2 * P)
    rig.host.forget(VA + 66 * P, 2)
    rig.host.share(VA + 96 * P, 2, ino=5, offset=2 * P)
    rig.space.write(VA + 96 * P, b"there")
    assert read_extents(extents, 2 * P, 5) == b"there"
    assert pfn_at(rig.space.look(VA + 96 * P, 1), 0) == pfn_at(extents, 2)
    assert read_extents(extents, 0, 8 * P)[2 * P : 2 * P + 5] == b"there"


def test_mremap_onto_forgotten_intervals(rig: Rig) -> None:
    """Intervals without pins are not announced when they go; they are no obstacle."""
    unpin_extents(rig.space.pin(VA + 8 * P, 1, True))
    extents = rig.space.pin(VA, 2, True)
    rig.space.move(VA, VA + 9 * P, 2 * P)
    rig.host.forget(VA, 2)
    assert pfn_at(rig.space.look(VA + 10 * P, 1), 0) == pfn_at(extents, 1)


# ------------------------------------------------------------------------------------------------------ shared contents


def test_shared_contents_through_another_process(rig: Rig) -> None:
    """Anonymous shared memory has no descriptor: while anybody we know maps it, that is where it is."""
    rig.host.share(VA + 64 * P, 8, ino=5)
    host, space = rig.other()
    host.share(VA, 8, ino=5)
    extents = rig.space.pin(VA + 64 * P, 8, True)
    space.look(VA, 1)
    rig.munmap(VA + 64 * P, 8)
    assert len(rig.physical.store._used) == 0
    space.write(VA + 3, b"other")
    assert read_extents(extents, 3, 5) == b"other"
    write_extents(extents, 4 * P - 2, b"back")
    assert space.read(VA + 4 * P - 2, 4) == b"back"


def test_shared_contents_when_the_last_mapping_goes(rig: Rig) -> None:
    rig.host.share(VA + 64 * P, 8, ino=5)
    extents = rig.space.pin(VA + 66 * P, 2, True)
    rig.space.write(VA + 66 * P, b"shared")
    rig.munmap(VA + 64 * P, 8)
    assert read_extents(extents, 0, 6) == b"shared"
    unpin_extents(extents)
    assert rig.physical.files == {}
    assert len(rig.physical.frames) == 0


def test_shared_contents_by_descriptor(rig: Rig) -> None:
    fd = os.memfd_create("test")
    os.ftruncate(fd, 8 * P)
    status = os.fstat(fd)
    rig.host.sizes[status.st_ino] = 8 * P
    rig.host.shared[status.st_ino] = bytearray(8 * P)
    rig.host.files[status.st_ino] = fd
    rig.host.map(VA + 64 * P, 8, READ | WRITE | SHARED, kind="shmem", dev=status.st_dev, ino=status.st_ino)
    extents = rig.space.pin(VA + 64 * P, 8, True)
    os.close(fd)
    del rig.host.files[status.st_ino]
    rig.munmap(VA + 64 * P, 8)
    write_extents(extents, P, b"kept")
    assert read_extents(extents, P, 4) == b"kept"
    file = rig.physical.files[status.st_dev, status.st_ino, ""]
    kept = file.fd
    os.fstat(kept)
    unpin_extents(extents)
    assert rig.physical.files == {}
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(kept)


def test_a_file_is_forgotten_with_its_last_mapping(rig: Rig) -> None:
    rig.host.share(VA + 64 * P, 8, ino=5)
    unpin_extents(rig.space.pin(VA + 64 * P, 8, True))
    assert len(rig.physical.files) == 1
    rig.munmap(VA + 64 * P, 4)
    assert len(rig.physical.files) == 1
    rig.munmap(VA + 68 * P, 4)
    assert rig.physical.files == {}
    assert len(rig.physical.frames) == 0


def test_one_unmap_over_everything(rig: Rig) -> None:
    rig.host.share(VA + 16 * P, 8, ino=5)
    rig.host.map(VA + 24 * P, 4)
    extents = rig.space.pin(VA, 28, True)
    assert len(extents) == 3
    rig.space.write(VA + 15 * P, b"p" * 2 * P)
    rig.space.write(VA + 27 * P, b"end")
    rig.munmap(VA, 28)
    assert read_extents(extents, 15 * P, 2 * P) == b"p" * 2 * P
    assert read_extents(extents, 27 * P, 3) == b"end"
    unpin_extents(extents)
    assert len(rig.physical.frames) == 0
    assert len(rig.physical.store._used) == 0


# ---------------------------------------------------------------------------------------------------------- all at once


@given(
    st.lists(
        st.tuples(st.sampled_from(["pin", "pin", "unpin", "munmap", "write"]), st.integers(0, 23), st.integers(1, 8)),
        max_size=40,
    )
)
def test_pinned_pages_keep_frame_and_contents(steps: list[tuple[str, int, int]]) -> None:
    """core 5.7: what is pinned keeps its frame and bytes, whatever happens at its addresses."""
    rig = Rig()
    rig.host.map(VA, 24)
    model: dict[int, int] = {}  # page of VA -> what was last written there by the CPU
    standing: list[tuple[Extents, list[int | None], list[int]]] = []  # extents, page of VA or None, contents
    stamp = 0
    for action, page, count in steps:
        count = min(count, 24 - page)
        if action == "pin":
            extents = rig.space.pin(VA + page * P, count, True)
            where: list[int | None] = list(range(page, page + count))
            standing.append((extents, where, [0] * count))
        elif action == "unpin" and standing:
            unpin_extents(standing.pop(page % len(standing))[0])
        elif action == "munmap":
            rig.munmap(VA + page * P, count)
            rig.host.map(VA + page * P, count)
            for _, where, contents in standing:
                for i, at in enumerate(where):
                    if at is not None and page <= at < page + count:
                        where[i] = None
                        contents[i] = model.get(at, 0)
            for at in range(page, page + count):
                model.pop(at, None)
        elif action == "write":
            stamp = stamp % 250 + 1
            rig.space.write(VA + page * P, bytes([stamp]))
            model[page] = stamp
        for extents, where, contents in standing:
            for i, at in enumerate(where):
                expected = contents[i] if at is None else model.get(at, 0)
                assert read_extents(extents, i * P, 1) == bytes([expected])
                if at is not None:
                    assert pfn_at(rig.space.look(VA + at * P, 1), 0) == pfn_at(extents, i)
    for extents, _, _ in standing:
        unpin_extents(extents)
    rig.space.gone()
    assert len(rig.physical.frames) == 0
    assert len(rig.physical.store._used) == 0


def test_device_writes_during_a_rescue_are_not_lost(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write to the frames while they are being copied out waits, and lands in the copy."""
    extents = rig.space.pin(VA, 4, True)
    rig.space.write(VA, b"old!" * P)
    in_copy, written = threading.Event(), threading.Event()
    peek = rig.host.peek

    def slow_peek(va: int, count: int) -> bytes:
        data = peek(va, count)
        in_copy.set()
        assert not written.wait(0.05)
        return data

    def device() -> None:
        in_copy.wait()
        write_extents(extents, 100, b"new!")
        written.set()

    monkeypatch.setattr(rig.host, "peek", slow_peek)
    thread = threading.Thread(target=device)
    thread.start()
    rig.munmap(VA, 16)
    thread.join()
    assert read_extents(extents, 96, 12) == b"old!new!old!"


def test_pins_from_many_threads(rig: Rig) -> None:
    rig.host.share(VA + 64 * P, 64, ino=5)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for i in range(150):
                base = VA if seed % 2 else VA + 64 * P
                unpin_extents(rig.space.pin(base + (i * seed) % 12 * P, 4, True))
                if i % 50 == 49:
                    rig.space.unmap(base, base + 8 * P)
        except BaseException as error:  # the test looks at it
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    rig.space.gone()
    assert len(rig.physical.frames) == 0
    assert rig.physical.files == {}


def test_nothing_is_left_for_the_cyclic_collector(garbage: Callable[[], list[str]]) -> None:
    """design 7: the supervisor runs without it."""

    def life() -> None:
        rig = Rig()
        rig.host.share(VA + 64 * P, 8, ino=5)
        fd = os.memfd_create("test")
        os.ftruncate(fd, 8 * P)
        file = HostFile(rig.physical, fd)
        held = [rig.space.pin(VA, 16, True), rig.space.pin(VA + 64 * P, 8, True), file.pin(0, 8)]
        rig.munmap(VA + 4 * P, 4)
        rig.munmap(VA + 64 * P, 4)
        rig.space.gone()
        file.close()
        for extents in held:
            read_extents(extents, 0, P)
            unpin_extents(extents)
        assert len(rig.physical.frames) == 0

    life()  # what is made once, such as caches, is made
    garbage()
    life()
    assert garbage() == []
