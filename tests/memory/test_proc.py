"""ProcHost and AddressSpace over real processes: this one, and a child that does as it is told."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from iommufd.errors import KernelError
from iommufd.memory import proc
from iommufd.memory.extents import pfn_at, read_extents, runs, same_frames, unpin_extents, write_extents
from iommufd.memory.hostfile import HostFile
from iommufd.memory.physical import Physical
from iommufd.memory.proc import ProcHost
from iommufd.memory.space import AddressSpace
from iommufd.memory.vma import READ, SHARED, WRITE

P = 4096

SERVER = r"""
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
for name in ("mmap", "mremap", "shmat"):
    getattr(libc, name).restype = ctypes.c_void_p
R, W, X, SHARED, PRIVATE, FIXED, ANON, HUGETLB = 1, 2, 4, 1, 2, 0x10, 0x20, 0x40000
def mmap(size, prot=R | W, flags=PRIVATE | ANON, fd=-1, offset=0, at=0):
    va = libc.mmap(ctypes.c_void_p(at), ctypes.c_size_t(size), prot, flags, fd, ctypes.c_long(offset))
    return -ctypes.get_errno() if va == 2**64 - 1 else va
def munmap(va, size): return libc.munmap(ctypes.c_void_p(va), ctypes.c_size_t(size))
def mprotect(va, size, prot): return libc.mprotect(ctypes.c_void_p(va), ctypes.c_size_t(size), prot)
def put(va, data): ctypes.memmove(va, data, len(data))
def get(va, n): return ctypes.string_at(va, n)
for line in sys.stdin:
    try:
        print(repr(eval(line)), flush=True)
    except SyntaxError:
        exec(line)
        print(None, flush=True)
"""


class Child:
    """A process with a space of its own; ``child("expression")`` is evaluated there."""

    def __init__(self, physical: Physical) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self.process.pid
        self("1 + 1")  # it is up: no exec to come
        self.host = ProcHost(self.pid)
        self.space = AddressSpace(physical, self.host, f"pid {self.pid}")

    def __call__(self, line: str) -> object:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return eval(self.process.stdout.readline())

    def number(self, line: str) -> int:
        value = self(line)
        assert isinstance(value, int)
        return value

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # it has been killed
                pipe.close()
        self.space.gone(rescue=False)


@pytest.fixture
def physical() -> Physical:
    return Physical()


@pytest.fixture
def child(physical: Physical) -> Iterator[Child]:
    child = Child(physical)
    yield child
    child.end()


class Own:
    """This process, with 8 anonymous pages at ``va``, and a hole and a read-only page after them."""

    def __init__(self, physical: Physical) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
        libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self.libc = libc
        self.va: int = libc.mmap(None, 11 * P, 3, 0x22, -1, 0)
        libc.munmap(self.va + 8 * P, P)
        libc.mprotect(self.va + 9 * P, P, mmap.PROT_READ)
        libc.mprotect(self.va + 10 * P, P, 0)
        self.host = ProcHost(os.getpid())
        self.space = AddressSpace(physical, self.host, "this process")

    def end(self) -> None:
        self.libc.munmap(self.va, 8 * P)
        self.libc.munmap(self.va + 9 * P, 2 * P)
        self.host.close()


@pytest.fixture
def own(physical: Physical) -> Iterator[Own]:
    own = Own(physical)
    yield own
    own.end()


def fails(number: int, space: AddressSpace, va: int, npages: int = 1, write: bool = True) -> str:
    with pytest.raises(KernelError) as caught:
        space.pin(va, npages, write)
    assert caught.value.errno == number
    return caught.value.why


# ---------------------------------------------------------------------------------------------------------- own process


def test_copies_honour_protections_and_never_crash(own: Own) -> None:
    host, va = own.host, own.va
    assert host.write(va, b"hello") == 5
    assert host.read(va, 5) == b"hello"
    assert ctypes.string_at(va, 5) == b"hello"
    assert host.read(va + 8 * P - 3, 10) == bytes(3)  # a hole follows
    assert host.write(va + 8 * P - 3, b"1234567890") == 3
    assert host.read(va + 9 * P, 4) == bytes(4)
    assert host.write(va + 9 * P, b"no") == 0  # PROT_READ
    assert host.read(va + 10 * P, 4) == b""  # PROT_NONE
    assert host.peek(va + 10 * P, 4) == bytes(4)
    for addr in (0, 8 * P + va, 2**63, 2**64 - 1, 2**64, 0xFFFF_8000_0000_0000):
        assert host.read(addr, 8) == b""
        assert host.write(addr, b"x") == 0
        assert host.peek(addr, 8) == b""
        assert host.poke(addr, b"x") == 0
    assert host.read(va, 0) == b""


def test_large_copies(own: Own) -> None:
    size = 3 << 20
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    va = ctypes.addressof(ctypes.c_char.from_buffer(area))
    data = bytes(range(256)) * (size // 256)
    assert own.host.write(va, data) == size
    assert own.host.read(va, size) == data
    extents = own.space.pin(va, size // P, True)
    assert read_extents(extents, 0, size) == data
    unpin_extents(extents)


def test_query(own: Own) -> None:
    vma = own.host.query(own.va + P)
    assert vma is not None
    assert (vma.flags, vma.kind, vma.page_size, vma.ino) == (READ | WRITE, "anon", P, 0)
    assert vma.end == own.va + 8 * P
    again = own.host.query(own.va)
    assert again is vma  # nothing changed: the same answer
    above = own.host.query(own.va + 8 * P)
    assert above is not None
    assert (above.start, above.flags) == (own.va + 9 * P, READ)
    assert own.host.query(2**63) is None
    assert own.host.query(0xFFFF_FFFF_FF60_0000) is None  # [vsyscall] is no VMA
    code = own.host.query(ctypes.cast(own.libc.mmap, ctypes.c_void_p).value or 0)
    assert code is not None
    assert code.kind in ("other", "ramfs", "shmem")
    assert "libc" in code.name


def test_query_without_procmap_query(own: Own, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [own.host.query(own.va + page * P) for page in range(11)]
    monkeypatch.setattr(proc, "PROCMAP_QUERY", 0xC068_6612)  # no kernel knows that one
    for page, vma in enumerate(wanted):
        parsed = own.host.query(own.va + page * P)
        assert repr(parsed) == repr(vma)
    assert own.host.query(2**63 - 1) is None
    extents = own.space.pin(own.va, 8, True)
    unpin_extents(extents)
    fails(errno.EFAULT, own.space, own.va + 8 * P)


def test_device_pages_cannot_be_pinned(own: Own) -> None:
    """core 5.5 row 2: [vvar] is VM_PFNMAP."""
    with open("/proc/self/maps") as maps:
        found = [line for line in maps if "[vvar]" in line]
    if not found:
        pytest.skip("this kernel has no [vvar]")
    fails(errno.EFAULT, own.space, int(found[0].split("-")[0], 16), write=False)


def test_core_5_5_rows_1_and_3(own: Own) -> None:
    space, va = own.space, own.va
    unpin_extents(space.pin(va, 8, True))
    fails(errno.EFAULT, space, va, 9)
    fails(errno.EFAULT, space, va + 9 * P, write=True)
    unpin_extents(space.pin(va + 9 * P, 1, False))
    fails(errno.EFAULT, space, va + 10 * P, write=False)


def test_device_and_processor_see_the_same_bytes(own: Own) -> None:
    extents = own.space.pin(own.va, 8, True)
    ctypes.memmove(own.va + 5000, b"processor", 9)
    assert read_extents(extents, 5000, 9) == b"processor"
    write_extents(extents, P - 2, b"device")
    assert ctypes.string_at(own.va + P - 2, 6) == b"device"
    unpin_extents(extents)


# ------------------------------------------------------------------------------------------------------ another process


def test_contents_outlive_munmap_in_another_process(child: Child) -> None:
    va = child.number("mmap(64 << 20)")
    child(f"put({va} + (33 << 20), b'device memory')")
    extents = child.space.pin(va, 64 << 8, True)
    assert len(extents) == 1
    position = len(os.listdir("/proc/self/fd"))
    child.space.unmap(va, va + (64 << 20))
    assert child(f"munmap({va}, 64 << 20)") == 0
    assert child(f"mmap(64 << 20, flags=PRIVATE|ANON|FIXED, at={va})") == va
    child(f"put({va} + (33 << 20), b'other contents')")
    assert read_extents(extents, 33 << 20, 13) == b"device memory"
    assert read_extents(extents, 0, 1 << 20) == bytes(1 << 20)
    new = child.space.pin(va, 64 << 8, True)
    assert not same_frames(new, extents)
    assert read_extents(new, 33 << 20, 14) == b"other contents"
    assert len(os.listdir("/proc/self/fd")) <= position + 1  # the store
    unpin_extents(extents)
    unpin_extents(new)


def test_only_touched_pages_are_scanned(child: Child) -> None:
    va = child.number("mmap(1 << 30)")
    child(f"put({va} + 12345678, b'x')")
    touched = child.host.touched(va, va + (1 << 30))
    assert sum(end - start for start, end in touched) < 64 << 20
    assert any(start <= va + 12345678 < end for start, end in touched)
    assert child.host.touched(va + (1 << 29), va + (1 << 30)) == []


def test_memfd_and_two_mappings(child: Child, physical: Physical) -> None:
    child(f"fd = os.memfd_create('x'); os.ftruncate(fd, {8 * P})")
    va = child.number(f"mmap({8 * P}, flags=SHARED, fd=fd)")
    second = child.number(f"mmap({4 * P}, flags=SHARED, fd=fd, offset={2 * P})")
    a, b = child.space.pin(va, 8, True), child.space.pin(second, 4, True)
    assert [pfn_at(b, i) for i in range(4)] == [pfn_at(a, i) for i in range(2, 6)]
    with open(f"/proc/{child.pid}/fd/{child.number('fd')}", "r+b") as file:
        by_file = HostFile(physical, os.dup(file.fileno()))
    c = by_file.pin(0, 8)
    assert same_frames(a, c)
    child(f"put({second}, b'by the program')")
    assert read_extents(a, 2 * P, 14) == b"by the program"
    write_extents(c, 5 * P, b"by the device")
    assert child(f"get({va + 5 * P}, 13)") == b"by the device"
    by_file.close()
    child.end()  # SIGKILL: shared contents are not lost
    assert read_extents(a, 2 * P, 14) == b"by the program"
    for extents in (a, b, c):
        unpin_extents(extents)
    assert physical.files == {}
    assert len(physical.frames) == 0


def test_beyond_the_end_of_a_file(child: Child) -> None:
    child(f"fd = os.memfd_create('x'); os.ftruncate(fd, {2 * P + 1})")
    for flags in ("SHARED", "PRIVATE"):
        va = child.number(f"mmap({8 * P}, flags={flags}, fd=fd)")
        unpin_extents(child.space.pin(va, 3, True))
        assert "beyond the end" in fails(errno.EFAULT, child.space, va, 4)


def test_shared_anonymous_memory_after_fork(child: Child, physical: Physical) -> None:
    """Parent and child agree; the contents stay while one of them lives, and afterwards too."""
    va = child.number(f"mmap({4 * P}, flags=SHARED|ANON)")
    child("import signal")
    pid = child.number("os.fork() or (signal.pause(), os._exit(0))")
    forked = AddressSpace(physical, ProcHost(pid), "forked")
    try:
        a, b = child.space.pin(va, 4, True), forked.pin(va, 4, True)
        assert same_frames(a, b)
        child(f"put({va}, b'shared')")
        assert read_extents(b, 0, 6) == b"shared"
        child.space.unmap(va, va + 4 * P)
        child(f"munmap({va}, {4 * P})")
        write_extents(a, 1, b"HARED")
        assert forked.read(va, 6) == b"sHARED"
        forked.unmap(va, va + 4 * P)
    finally:
        os.kill(pid, signal.SIGKILL)
        child(f"os.waitpid({pid}, 0)[0]")
        forked.gone()
    assert read_extents(a, 0, 6) == b"sHARED"
    unpin_extents(a)
    unpin_extents(b)
    assert physical.files == {}


def test_shared_anonymous_memory_without_any_descriptor(
    child: Child, physical: Physical, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An ordinary user may not open map_files: the bytes are where they are mapped, then in the store."""
    monkeypatch.setattr(ProcHost, "open_file", lambda self, vma: None)
    va = child.number(f"mmap({4 * P}, flags=SHARED|ANON)")
    extents = child.space.pin(va, 4, True)
    child(f"put({va + P}, b'program')")
    assert read_extents(extents, P, 7) == b"program"
    write_extents(extents, 2 * P - 3, b"device")
    assert child(f"get({va + 2 * P - 3}, 6)") == b"device"
    child.space.unmap(va, va + 4 * P)
    child(f"munmap({va}, {4 * P})")
    assert read_extents(extents, P, 7) == b"program"
    write_extents(extents, 0, b"still here")
    assert read_extents(extents, 0, 10) == b"still here"
    unpin_extents(extents)
    assert len(physical.store._used) == 0


def test_a_sysv_segment(child: Child) -> None:
    child("shmid = libc.shmget(0, 8192, 0o1600)")
    va = child.number("libc.shmat(shmid, None, 0)")
    child("libc.shmctl(shmid, 0, None)")
    vma = child.host.query(va)
    assert vma is not None
    assert vma.name.startswith("/SYSV")
    assert vma.kind == "shmem"
    extents = child.space.pin(va, 2, True)
    child(f"put({va}, b'segment')")
    assert read_extents(extents, 0, 7) == b"segment"
    write_extents(extents, 0, b"SEG")
    assert child(f"get({va}, 7)") == b"SEGment"
    unpin_extents(extents)


def test_file_system_mappings(child: Child, tmp_path: Path) -> None:
    """core 5.5 row 4, with the file system at hand: one that writes back refuses devices that write."""
    with open(tmp_path / "file", "w+b") as file:
        file.write(b"contents" * 1024)
        file.flush()
        child(f"fd = os.open({file.name!r}, os.O_RDWR)")
        shared, private = (child.number(f"mmap(8192, flags={flags}, fd=fd)") for flags in ("SHARED", "PRIVATE"))
        vma = child.host.query(shared)
        assert vma is not None
        assert vma.flags == READ | WRITE | SHARED
        if vma.kind == "other":
            fails(errno.EFAULT, child.space, shared, write=True)
        else:
            unpin_extents(child.space.pin(shared, 2, True))
        extents = child.space.pin(shared, 2, False)
        assert read_extents(extents, 0, 8) == b"contents"
        unpin_extents(extents)
        extents = child.space.pin(private, 2, True)
        child.space.unmap(private, private + 8192)  # untouched pages of a file are not zeroes
        child(f"munmap({private}, 8192)")
        assert read_extents(extents, 4096, 16) == b"contentscontents"
        unpin_extents(extents)


def test_secret_memory_cannot_be_pinned(child: Child) -> None:
    fd = child.number("libc.syscall(447, 0)")
    if fd < 0:
        pytest.skip("this kernel has no memfd_secret")
    child(f"os.ftruncate({fd}, 4096)")
    va = child.number(f"mmap(4096, flags=SHARED, fd={fd})")
    fails(errno.EFAULT, child.space, va)


def test_huge_pages(child: Child, physical: Physical) -> None:
    size = 2 << 20
    va = child.number(f"mmap({2 * size}, flags=PRIVATE|ANON|HUGETLB)")
    if va < 0:
        pytest.skip("no huge pages are configured: sysctl vm.nr_hugepages=4")
    extents = child.space.pin(va, 1024, True)
    assert [(run.nbytes, run.repeat) for run in runs(extents, 0, 2 * size)] == [(size, 2)]
    child(f"put({va + size - 3}, b'across')")
    child.space.unmap(va, va + 2 * size)
    child(f"munmap({va}, {2 * size})")
    assert read_extents(extents, size - 3, 6) == b"across"
    unpin_extents(extents)
    child(f"fd = os.memfd_create('huge', 4); os.ftruncate(fd, {2 * size})")
    va = child.number(f"mmap({2 * size}, flags=SHARED, fd=fd)")
    extents = child.space.pin(va, 1024, True)
    file = HostFile(physical, os.open(f"/proc/{child.pid}/fd/{child.number('fd')}", os.O_RDWR))
    assert (file.kind, file.order) == ("hugetlbfs", 9)
    by_file = file.pin(0, 1024)
    assert same_frames(extents, by_file)
    write_extents(extents, size - 3, b"ACROSS")
    assert child(f"get({va + size - 3}, 6)") == b"ACROSS"
    assert read_extents(by_file, size, 3) == b"OSS"
    unpin_extents(extents)
    unpin_extents(by_file)
    file.close()


# -------------------------------------------------------------------------------------------------------- exec and exit


def test_exec(child: Child) -> None:
    va = child.number(f"mmap({4 * P})")
    child(f"put({va}, b'old program')")
    extents = child.space.pin(va, 4, True)
    child.space.save()
    child(f"os.execv({sys.executable!r}, [{sys.executable!r}, '-S', '-c', 'print(7, flush=True); input()'])")
    assert not child.host.alive()
    fails(errno.EFAULT, child.space, va)
    child.space.gone()
    assert read_extents(extents, 0, 11) == b"old program"
    assert child.host.peek(va, 4) == b""
    unpin_extents(extents)


def test_exit(child: Child, physical: Physical) -> None:
    va = child.number(f"mmap({4 * P})")
    child(f"put({va}, b'last words')")
    extents = child.space.pin(va, 4, True)
    child.space.gone()
    child.end()
    assert read_extents(extents, 0, 10) == b"last words"
    unpin_extents(extents)
    assert len(physical.frames) == 0


def test_killed(child: Child) -> None:
    va = child.number(f"mmap({4 * P})")
    extents = child.space.pin(va, 4, True)
    child.process.kill()
    child.process.wait()
    assert not child.host.alive()
    assert child.host.read(va, 4) == b""
    assert child.host.write(va, b"x") == 0
    fails(errno.EFAULT, child.space, va)
    assert not child.space.alive
    with pytest.raises(KernelError):
        read_extents(extents, 0, 1)
    unpin_extents(extents)


def test_no_such_process() -> None:
    script = "import os; print(os.getpid())"
    done = subprocess.run([sys.executable, "-S", "-c", script], capture_output=True, check=True)
    with pytest.raises(ProcessLookupError):
        ProcHost(int(done.stdout))


def test_a_first_thread_that_has_gone(child: Child) -> None:
    """The mm lives on in the other threads; process_vm does not find it by the first thread's number any more."""
    va = child.number(f"mmap({4 * P})")
    child("import threading, time")
    child(f"mprotect({va} + {3 * P}, {P}, R)")
    child(f"threading.Thread(target=lambda: [time.sleep(0.3), put({va}, b'thread'), time.sleep(60)]).start()")
    assert child.process.stdin is not None
    child.process.stdin.write("libc.syscall(60, 0)\n")
    child.process.stdin.flush()
    deadline = 200
    while child.host.read(va, 6) != b"thread" and deadline:
        deadline -= 1
        os.sched_yield()
        ctypes.CDLL(None).usleep(10000)
    assert child.host.read(va, 6) == b"thread"
    assert child.host.write(va + 3 * P - 2, b"abcd") == 2
    extents = child.space.pin(va, 3, True)
    assert read_extents(extents, 3 * P - 2, 2) == b"ab"
    unpin_extents(extents)


def test_locked_pages(child: Child) -> None:
    before = child.host.mlocked_pages()
    va = child.number(f"mmap({4 * P})")
    if child(f"libc.mlock(ctypes.c_void_p({va}), ctypes.c_size_t({4 * P}))") != 0:
        pytest.skip("mlock is not allowed here")
    assert child.host.mlocked_pages() == before + 4


def test_guard_regions(child: Child) -> None:
    """core 5.5 row 1, once somebody has seen MADV_GUARD_INSTALL."""
    va = child.number(f"mmap({8 * P})")
    child(f"put({va}, bytes({8 * P}))")
    if child(f"libc.madvise(ctypes.c_void_p({va + 5 * P}), ctypes.c_size_t({P}), 102)") != 0:
        pytest.skip("this kernel has no guard regions")
    child.space.guard_check = lambda start, end: len(child.host.peek(start, end - start)) < end - start
    unpin_extents(child.space.pin(va, 5, True))
    fails(errno.EFAULT, child.space, va, 6)
    unpin_extents(child.space.pin(va + 6 * P, 2, True))


def test_kinds_of_mappings(child: Child, tmp_path: Path) -> None:
    child("zero = os.open('/dev/zero', os.O_RDWR)")
    shared = child.host.query(child.number("mmap(4096, flags=SHARED, fd=zero)"))
    private = child.host.query(child.number("mmap(4096, flags=PRIVATE, fd=zero)"))
    anonymous = child.host.query(child.number("mmap(4096, flags=SHARED|ANON)"))
    assert shared is not None
    assert private is not None
    assert anonymous is not None
    assert (shared.kind, anonymous.kind) == ("shmem", "shmem")
    assert private.kind != "special"
    assert shared.file_key != anonymous.file_key
    if os.path.isdir("/dev/shm"):
        with open("/dev/shm/iommufd-test", "w+b") as file:
            os.unlink(file.name)
            file.truncate(P)
            child(f"fd = os.open('/proc/{os.getpid()}/fd/{file.fileno()}', os.O_RDWR)")
            vma = child.host.query(child.number("mmap(4096, flags=SHARED, fd=fd)"))
            assert vma is not None
            status = os.fstat(file.fileno())
            assert (vma.dev, vma.ino) == (status.st_dev, status.st_ino)
            unpin_extents(child.space.pin(vma.start, 1, True))


def test_reading_never_reaches_the_next_program(child: Child) -> None:
    """After exec the process number names another mm; the AddressSpace does not."""
    va = child.number(f"mmap({P}, at=0x10000000, flags=PRIVATE|ANON|FIXED)")
    child(f"put({va}, b'old')")
    assert child.space.read(va, 3) == b"old"
    script = f"import mmap; {SERVER}\n"
    child(f"os.execv({sys.executable!r}, [{sys.executable!r}, '-S', '-c', 'print(7, flush=True)\\n' + {script!r}])")
    child(f"mmap({P}, at=0x10000000, flags=PRIVATE|ANON|FIXED)")
    for call in (lambda: child.space.read(va, 3), lambda: child.space.write(va, b"x")):
        with pytest.raises(KernelError):
            call()
    assert not child.space.alive


def test_large_device_copies(child: Child) -> None:
    """By process number where that comes to the same; protections do not count, and neither does an announced exec."""
    size = 64 * P
    va = child.number(f"mmap({size})")
    data = os.urandom(size)
    for announced in (False, True):
        if announced:
            child.space.save()
        assert child.host.poke(va, memoryview(data)[:-1]) == size - 1
        assert child(f"get({va}, {size})") == data[:-1] + bytes(1)
        assert child.host.peek(va, size) == data[:-1] + bytes(1)
        child(f"mprotect({va}, {size}, 0)")
        assert child.host.peek(va, size) == data[:-1] + bytes(1)
        assert child.host.poke(va, bytearray(size)) == size
        child(f"mprotect({va}, {size}, R | W)")
        assert child(f"get({va}, {size})") == bytes(size)
    assert len(child.host.peek(va + P, size)) < size or child.host.query(va + size)
    old = child.host
    with contextlib.suppress(Exception):  # no answer comes from a program that is gone: whatever that looks like
        child("os.execv(sys.executable, [sys.executable, '-c', ''])")
    child.process.wait()
    assert old.peek(va, size) == b""
    assert old.poke(va, data) == 0


def test_nothing_is_left_for_the_cyclic_collector(own: Own, garbage: Callable[[], list[str]]) -> None:
    """design 7: the supervisor runs without it. (Each length of a ctypes array is a type, and a type is a cycle.)"""

    def life() -> None:
        host = ProcHost(os.getpid())
        space = AddressSpace(Physical(), host, "this process")
        for count in (1, 40, 70001, 70002):
            host.read(own.va, count)
            host.write(own.va, bytes(count))
        host.touched(own.va, own.va + 9 * P)
        host.query(own.va)
        extents = space.pin(own.va, 8, True)
        space.gone()
        read_extents(extents, 0, P)
        unpin_extents(extents)

    life()  # what is made once, such as caches, is made
    garbage()
    life()
    assert garbage() == []
