"""Files of the host for MAP_FILE: the rows of core 4.10 and 5.5 FILE, with real files."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from iommufd.errors import KernelError
from iommufd.memory.extents import pfn_at, read_extents, runs, same_frames, unpin_extents, write_extents
from iommufd.memory.hostfile import HostFile
from iommufd.memory.kinds import file_kind
from iommufd.memory.physical import Physical

P = 4096


@pytest.fixture
def physical() -> Physical:
    return Physical()


@pytest.fixture
def memfd() -> Iterator[int]:
    """A memfd of eight pages, each filled with its number."""
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, b"".join(bytes([page]) * P for page in range(8)))
    yield fd
    os.close(fd)


def fails(file: HostFile, first: int, count: int, number: int = errno.EINVAL) -> str:
    with pytest.raises(KernelError) as caught:
        file.pin(first, count)
    assert caught.value.errno == number
    return caught.value.why


def test_contents_are_the_files(physical: Physical, memfd: int) -> None:
    file = HostFile(physical, os.dup(memfd))
    assert (file.kind, file.order, file.size()) == ("shmem", 0, 8 * P)
    extents = file.pin(2, 3)
    assert read_extents(extents, P - 1, 2) == b"\2\3"
    write_extents(extents, P - 1, b"device")
    assert os.pread(memfd, 6, 3 * P - 1) == b"device"
    os.pwrite(memfd, b"program", 4 * P)
    assert read_extents(extents, 2 * P, 7) == b"program"
    unpin_extents(extents)
    file.close()
    assert physical.files == {}
    assert len(physical.frames) == 0


def test_two_descriptors_of_one_file_are_the_same_frames(physical: Physical, memfd: int) -> None:
    a, b = HostFile(physical, os.dup(memfd)), HostFile(physical, os.open(f"/proc/self/fd/{memfd}", os.O_RDONLY))
    one, two = a.pin(0, 8), b.pin(4, 1)
    assert pfn_at(two, 0) == pfn_at(one, 4)
    a.close()
    b.close()
    assert read_extents(one, 7 * P, 1) == b"\7"  # closing the descriptors is harmless
    unpin_extents(one)
    again = HostFile(physical, os.dup(memfd))
    three = again.pin(4, 1)
    assert same_frames(two, three)
    for extents in (two, three):
        unpin_extents(extents)
    again.close()
    assert physical.files == {}


def test_a_read_only_descriptor_and_a_device_that_writes(physical: Physical, memfd: int) -> None:
    """core 4.10: a read-only fd can be mapped WRITEABLE."""
    file = HostFile(physical, os.open(f"/proc/self/fd/{memfd}", os.O_RDONLY))
    extents = file.pin(0, 1)
    write_extents(extents, 10, b"written")
    assert os.pread(memfd, 7, 10) == b"written"
    unpin_extents(extents)
    file.close()


def test_a_write_sealed_memfd_can_be_pinned_and_read(physical: Physical, memfd: int) -> None:
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    file = HostFile(physical, os.dup(memfd))
    extents = file.pin(3, 1)
    assert read_extents(extents, 0, 2) == b"\3\3"
    with pytest.raises(KernelError) as caught:  # docs/deviations: the host does not let anybody write there
        write_extents(extents, 0, b"x")
    assert caught.value.errno == errno.EFAULT
    unpin_extents(extents)
    file.close()


def test_core_4_10_pin_a_file_of_another_kind(physical: Physical, tmp_path: Path) -> None:
    for path in ("/proc/self/maps", "/dev/null"):
        file = HostFile(physical, os.open(path, os.O_RDONLY))
        assert file.kind == "other"
        assert "neither shmem" in fails(file, 0, 1)
        file.close()
    with open(tmp_path / "plain", "w+b") as plain:
        if file_kind(plain.fileno())[0] == "shmem":
            pytest.skip("the folder for temporary files is on tmpfs")
        plain.write(bytes(P))
        plain.flush()
        file = HostFile(physical, os.dup(plain.fileno()))
        fails(file, 0, 1)
        file.close()


def test_core_4_10_pin_beyond_the_end(physical: Physical, memfd: int) -> None:
    """The last byte of the last page must be inside the file."""
    file = HostFile(physical, os.dup(memfd))
    unpin_extents(file.pin(7, 1))
    fails(file, 7, 2)
    fails(file, 8, 1)
    os.ftruncate(memfd, 8 * P - 1)
    assert "0x7fff bytes" in fails(file, 7, 1)
    unpin_extents(file.pin(0, 7))
    os.ftruncate(memfd, 0)
    fails(file, 0, 1)
    file.close()


def test_core_4_10_pin_at_an_offset_of_two_to_the_63(physical: Physical, memfd: int) -> None:
    file = HostFile(physical, os.dup(memfd))
    assert "2**63" in fails(file, 2**51, 1)
    fails(file, 2**51 - 1, 2)
    fails(file, 2**52 - 1, 1)
    file.close()


def test_a_growing_file_keeps_its_frames(physical: Physical, memfd: int) -> None:
    file = HostFile(physical, os.dup(memfd))
    before = file.pin(0, 8)
    os.ftruncate(memfd, 12 * P)
    after = file.pin(4, 8)
    assert [pfn_at(after, i) for i in range(4)] == [pfn_at(before, i) for i in range(4, 8)]
    assert len(after) == 2
    assert read_extents(after, 4 * P, P) == bytes(P)  # holes read as zeroes
    unpin_extents(before)
    unpin_extents(after)
    file.close()


def test_contents_that_were_cut_off_are_lost(physical: Physical, memfd: int) -> None:
    """docs/deviations: a kernel keeps pages that a truncate took out of a file while they are pinned."""
    file = HostFile(physical, os.dup(memfd))
    extents = file.pin(0, 8)
    os.ftruncate(memfd, P)
    assert read_extents(extents, 0, 1) == b"\0"
    for call in (lambda: read_extents(extents, P, 1), lambda: write_extents(extents, P, b"x")):
        with pytest.raises(KernelError) as caught:
            call()
        assert caught.value.errno == errno.EFAULT
    assert os.fstat(memfd).st_size == P
    unpin_extents(extents)
    file.close()


def test_a_very_large_sparse_file(physical: Physical) -> None:
    fd = os.memfd_create("huge")
    os.ftruncate(fd, 1 << 45)
    file = HostFile(physical, fd)
    (extent,) = file.pin(1 << 32, 1 << 24)
    assert extent.count == 1 << 24
    write_extents((extent,), (1 << 36) - 4, b"last")
    assert os.fstat(fd).st_blocks * 512 <= 4096
    unpin_extents((extent,))
    file.close()


def test_a_chunk_covers_the_window_around_its_first_pin(physical: Physical) -> None:
    fd = os.memfd_create("large")
    os.ftruncate(fd, (5 << 36) + 3 * P)  # five windows of 64 GiB and three pages
    file = HostFile(physical, fd)
    window = 1 << 24
    for page, first, npages in ((7, 0, window), (3 * window - 1, 2 * window, window), (5 * window, 5 * window, 3)):
        (extent,) = file.pin(page, 1)
        assert (extent.index, extent.chunk.npages) == (page - first, npages)
    (extent,) = file.pin(3 * window + 9, 2 * window - 9)  # between two chunks, and more than a window
    assert (extent.index, extent.chunk.npages) == (9, 2 * window)
    file.close()


def test_a_cut_huge_page_file(physical: Physical) -> None:
    size = 2 << 20
    fd = os.memfd_create("huge", os.MFD_CLOEXEC | os.MFD_HUGETLB)
    os.ftruncate(fd, size)
    file = HostFile(physical, fd)
    try:
        extents = file.pin(0, 512)
    except KernelError:
        pytest.skip("no huge pages are configured: sysctl vm.nr_hugepages=4")
    os.ftruncate(fd, 0)
    with pytest.raises(KernelError):
        write_extents(extents, 0, b"x")
    unpin_extents(extents)
    file.close()


def test_huge_pages(physical: Physical) -> None:
    size = 2 << 20
    fd = os.memfd_create("huge", os.MFD_CLOEXEC | os.MFD_HUGETLB)
    os.ftruncate(fd, 2 * size)
    try:
        mmap.mmap(fd, 2 * size).close()
    except OSError:
        os.close(fd)
        pytest.skip("no huge pages are configured: sysctl vm.nr_hugepages=4")
    file = HostFile(physical, fd)
    assert (file.kind, file.order) == ("hugetlbfs", 9)
    extents = file.pin(256, 512)
    assert [run.nbytes for run in runs(extents, 0, size)] == [1 << 20, 1 << 20]
    write_extents(extents, (1 << 20) - 2, b"across")
    assert read_extents(extents, (1 << 20) - 2, 6) == b"across"
    fails(file, 1000, 512)
    unpin_extents(extents)
    file.close()


def test_no_huge_pages_left(physical: Physical) -> None:
    """core 4.10: allocation failure is ENOMEM."""
    fd = os.memfd_create("huge", os.MFD_CLOEXEC | os.MFD_HUGETLB)
    os.ftruncate(fd, 1 << 40)
    file = HostFile(physical, fd)
    fails(file, 0, 1 << 28, errno.ENOMEM)
    assert len(physical.frames) == 0
    file.close()
