"""The small pure parts: struct layouts, listings, ranges, the status file."""

from __future__ import annotations

import itertools
import os
import stat
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iommufd.errors import KernelError
from iommufd.interpose import status, syscalls
from iommufd.interpose.caller import CallerMemory
from iommufd.interpose.libc import pidfd_getfd, pidfd_open, same_vm
from iommufd.interpose.listing import Listing
from iommufd.interpose.pathcalls import add_pinned
from iommufd.interpose.processes import random_marks, start_time, tgid_of
from iommufd.interpose.unmaps import is_free, mapped_ranges, subtract

DEVICE = status.of_node("/dev/iommu", stat.S_IFCHR | 0o666, (10, 125))


def test_struct_stat_of_x86_64() -> None:
    """st_nlink at 16, st_mode at 24, st_rdev at 40, st_size at 48, st_mtime at 88"""
    data = status.pack_stat(DEVICE, "x86_64")
    assert len(data) == 144
    assert struct.unpack_from("=QQQI", data) == (DEVICE.dev, DEVICE.ino, 1, DEVICE.mode)
    assert struct.unpack_from("=QqqqQ", data, 40) == (os.makedev(10, 125), 0, 4096, 0, DEVICE.seconds)
    assert struct.unpack_from("=Q", data, 88) == (DEVICE.seconds,)


def test_struct_stat_of_aarch64() -> None:
    """st_mode at 16, st_nlink at 20, st_rdev at 32, st_size at 48, st_blksize at 56, st_mtime at 88"""
    data = status.pack_stat(DEVICE, "aarch64")
    assert len(data) == 128
    assert struct.unpack_from("=QQII", data) == (DEVICE.dev, DEVICE.ino, DEVICE.mode, 1)
    assert struct.unpack_from("=Q", data, 32) == (os.makedev(10, 125),)
    assert struct.unpack_from("=qi", data, 48) == (0, 4096)
    assert struct.unpack_from("=Q", data, 88) == (DEVICE.seconds,)


def test_struct_statx() -> None:
    data = status.pack_statx(DEVICE)
    assert len(data) == 256
    assert struct.unpack_from("=H", data, 28) == (DEVICE.mode,)
    assert struct.unpack_from("=QQ", data, 32) == (DEVICE.ino, 0)
    assert struct.unpack_from("=IIII", data, 128) == (10, 125, os.major(DEVICE.dev), os.minor(DEVICE.dev))


@pytest.mark.parametrize(
    ("mode", "wanted", "uid", "expected"),
    [(0o666, 6, 1000, True), (0o660, 4, 1000, False), (0o660, 6, 0, True), (0o666, 1, 0, False), (0o755, 1, 0, True)],
)
def test_who_may(mode: int, wanted: int, uid: int, expected: bool) -> None:
    assert status.allows(stat.S_IFCHR | mode, wanted, uid) is expected


def records(data: bytes) -> list[tuple[str, int, int]]:
    found = []
    while data:
        inode, _, size, kind = struct.unpack_from("=QqHB", data)
        assert size % 8 == 0
        found.append((data[19:size].split(b"\0")[0].decode(), inode, kind))
        data = data[size:]
    return found


@given(st.lists(st.text("abcdefgh", min_size=1, max_size=40), unique=True), st.integers(64, 400))
def test_a_listing_gives_every_entry_once(names: list[str], room: int) -> None:
    listing = Listing("/dev", [(name, number + 5, 2) for number, name in enumerate(names)])
    found: list[tuple[str, int, int]] = []
    while data := listing.read(room):
        assert len(data) <= room
        found += records(data)
    assert [name for name, _, _ in found] == [".", "..", *names]
    assert listing.seek(0, 0) == 0
    assert len(records(listing.read(10**6))) == len(names) + 2


def test_a_listing_without_room() -> None:
    with pytest.raises(KernelError, match="EINVAL"):
        Listing("/dev", []).read(8)


def test_the_old_records_keep_the_type_in_the_last_byte() -> None:
    data = Listing("/dev", [("iommu", 7, 2)]).read(1000, old=True)
    sizes = []
    while data:
        (size,) = struct.unpack_from("=16xH", data)
        sizes.append((data[18:size].split(b"\0")[0], data[size - 1]))
        data = data[size:]
    assert sizes == [(b".", 4), (b"..", 4), (b"iommu", 2)]


RANGES = st.lists(st.integers(0, 200), unique=True, max_size=20).map(
    lambda points: list(zip(*[iter(sorted(points)[: len(points) // 2 * 2])] * 2, strict=True))
)


@given(RANGES, RANGES)
def test_subtracting_ranges(ranges: list[tuple[int, int]], without: list[tuple[int, int]]) -> None:
    def points(of: list[tuple[int, int]]) -> set[int]:
        return {p for start, end in of for p in range(start, end)}

    left = subtract(ranges, without)
    assert points(left) == points(ranges) - points(without)
    assert all(start < end for start, end in left)


def test_free_ranges() -> None:
    assert is_free([(0, 4), (8, 12)], 4, 8)
    assert not is_free([(0, 4), (8, 12)], 4, 9)
    assert not is_free([(0, 4)], 3, 4)


def test_what_is_mapped_here() -> None:
    ranges = mapped_ranges(os.getpid())
    assert all(a[1] < b[0] for a, b in itertools.pairwise(ranges))
    assert mapped_ranges(2**22 + 1) == []


def test_adding_pages_to_a_status_file() -> None:
    text = b"Name:\tx\nVmLck:\t      12 kB\nVmPin:\t       0 kB\nVmHWM:\t    3 kB\n"
    assert add_pinned(text, 2, 0) == b"Name:\tx\nVmLck:\t      12 kB\nVmPin:\t       8 kB\nVmHWM:\t    3 kB\n"
    assert b"VmLck:\t      20 kB\n" in add_pinned(text, 2, 2)
    assert add_pinned(text, -1, 0).split(b"\n")[2] == b"VmPin:\t18446744073709551612 kB"  # as an unsigned long shows


def test_reading_and_writing_another_thread_by_number() -> None:
    import ctypes

    data = bytearray(b"x" * 5000)
    addr = ctypes.addressof((ctypes.c_char * 5000).from_buffer(data))
    memory = CallerMemory(os.getpid())
    for count in (1, 40, 512, 513, 5000):
        assert memory.read_upto(addr, count) == b"x" * count
        assert memory.write_upto(addr, b"y" * count) == count
        assert data == b"y" * count + b"x" * (5000 - count)
        data[:] = b"x" * 5000
    assert memory.write_upto(addr, memoryview(b"z" * 600)) == 600
    assert memory.write_upto(addr, bytearray(b"w" * 600)) == 600
    assert memory.read_upto(8, 40) == b""
    assert memory.read_upto(2**64 - 20, 40) == b""
    data[:4] = b"abc\0"
    assert memory.read_string(addr) == b"abc"
    with pytest.raises(KernelError, match="ENAMETOOLONG"):
        memory.read_string(addr + 4)
    with pytest.raises(KernelError, match="EFAULT"):
        memory.read_string(8)


def test_who_is_who() -> None:
    pid = os.getpid()
    assert tgid_of(pid) == pid
    assert start_time(pid) > 0
    assert len(random_marks(pid)) == 16
    assert random_marks(pid) == random_marks(pid)
    assert same_vm(pid, pid) is not False
    with pytest.raises(OSError, match="No such"):
        tgid_of(2**22 + 1)


def test_duplicates_of_descriptors() -> None:
    pidfd = pidfd_open(os.getpid())
    memory = os.memfd_create("x")
    copy = pidfd_getfd(pidfd, memory)
    assert os.fstat(copy).st_ino == os.fstat(memory).st_ino
    for fd in (pidfd, memory, copy):
        os.close(fd)


@pytest.mark.parametrize("arch", [syscalls.X86_64, syscalls.AARCH64], ids=lambda arch: arch.name)
def test_system_call_numbers(arch: syscalls.Arch) -> None:
    """A few that everybody knows, from the kernel's own tables."""
    known = {
        "x86_64": {"read": 0, "ioctl": 16, "openat": 257, "execve": 59, "exit_group": 231, "seccomp": 317, "mmap": 9},
        "aarch64": {"read": 63, "ioctl": 29, "openat": 56, "execve": 221, "exit_group": 94, "seccomp": 277},
    }[arch.name]
    assert {name: arch.numbers[name] for name in known} == known
    later = {"close_range": 436, "openat2": 437, "pidfd_getfd": 438, "faccessat2": 439, "process_madvise": 440}
    assert {name: arch.numbers[name] for name in later} == later  # the same everywhere since 5.1
