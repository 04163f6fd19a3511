"""Pinned pages outlive the addresses they were pinned by (core 5.7; interposition 6), on the real engine."""

from __future__ import annotations

import pytest

from tests.interpose.harness import Supervised

pytestmark = pytest.mark.interposed


def test_munmap_and_what_is_mapped_there_next(supervised: Supervised) -> None:
    supervised.mock("""
        s = Setup()
        va = private(4)
        fill(va, b"old", 4)
        s.map(va, 4)
        assert s.is_page(va, 4) and s.read(5) == b"old 0"
        s.write(b"dma", WINDOW + page)
        assert seen(va + page, 5) == b"dma 1"
        libc.munmap(va + page, page)
        assert s.read(5, WINDOW + page) == b"dma 1"
        assert libc.mmap(va + page, page, 3, 0x32, -1, 0) == va + page
        fill(va + page, b"new")
        assert s.read(5, WINDOW + page) == b"dma 1" and s.is_page(va) and not s.is_page(va + page, 1, WINDOW + page)
        libc.munmap(va, 4 * page)
        assert [s.read(5, WINDOW + n * page) for n in range(4)] == [b"old 0", b"dma 1", b"old 2", b"old 3"]
        s.write(b"still", WINDOW + 3 * page)
        assert s.read(5, WINDOW + 3 * page) == b"still"
        again = private(4)
        s.unmap(4)
        s.map(again, 4)
        assert s.read(5) == bytes(5) and s.is_page(again, 4)
    """)


def test_mapping_over(supervised: Supervised) -> None:
    supervised.mock("""
        s = Setup()
        va = private(2)
        fill(va, b"old", 2)
        s.map(va, 2)
        assert libc.mmap(va, page, 3, 0x32, -1, 0) == va
        assert seen(va, 3) == bytes(3) and s.read(3) == b"old" and seen(va + page, 3) == b"old"
        fill(va, b"new")
        assert s.read(3) == b"old"
        fill(va + page, b"own")
        assert s.read(3, WINDOW + page) == b"own"
    """)


def test_advice_that_takes_pages_away(supervised: Supervised) -> None:
    supervised.mock("""
        s = Setup()
        va = private(2)
        fill(va, b"old", 2)
        s.map(va, 2)
        assert libc.madvise(va, page, 4) == 0  # MADV_DONTNEED
        assert seen(va, 3) == bytes(3) and s.read(3) == b"old" and not s.is_page(va)
        assert libc.madvise(va + page, page, 8) == 0  # MADV_FREE of a pinned page frees nothing
        assert seen(va + page, 3) == b"old" and s.is_page(va + page, 1, WINDOW + page)
        assert libc.madvise(va + 1, page, 4) == -1 and ctypes.get_errno() == errno.EINVAL
        assert s.is_page(va + page, 1, WINDOW + page)
    """)


def test_guard_regions_cannot_be_pinned(supervised: Supervised) -> None:
    """core 5.5 row 1; Linux 6.13"""
    supervised.mock("""
        s = Setup()
        va = private(4)
        fill(va, b"old", 4)
        if libc.madvise(va + page, page, 102):
            assert ctypes.get_errno() == errno.EINVAL  # a kernel without guard regions
            sys.exit()
        fails(errno.EFAULT, s.map, va, 2)
        s.map(va + 2 * page, 2)
        assert s.read(3) == b"old"
        s.unmap(2)
        assert libc.madvise(va + page, page, 103) == 0
        s.map(va, 2)
        assert s.read(3) == b"old" and s.read(3, WINDOW + page) == bytes(3)
        assert libc.madvise(va, 2 * page, 102) == 0  # what was pinned stays with the device
        assert s.read(3) == b"old"
    """)


@pytest.mark.parametrize("how", ["grows and moves", "fixed", "shrinks", "grows in place"])
def test_mremap_takes_the_frames_along(supervised: Supervised, how: str) -> None:
    supervised.mock(
        """
        s, how = Setup(), sys.argv[1]
        area = private(64)
        va = area + 16 * page
        fill(va, b"old", 2)
        s.map(va, 2)
        if how == "grows and moves":
            new = libc.mremap(va, 2 * page, 8 * page, 1, None)
            assert new != va
        elif how == "fixed":
            new = area + 32 * page
            assert libc.mremap(va, 2 * page, 2 * page, 3, new) == new
        elif how == "grows in place":
            libc.munmap(va + 2 * page, 8 * page)
            new = libc.mremap(va, 2 * page, 4 * page, 1, None)
            assert new == va
        else:
            new = libc.mremap(va, 2 * page, page, 1, None)
            assert new == va
            fill(va, b"own")
            assert s.read(3) == b"own" and s.read(3, WINDOW + page) == b"old"
            sys.exit()
        assert s.read(3) == b"old" and s.is_page(new, 2)
        fill(new, b"cpu", 2)
        assert s.read(3) == b"cpu" and s.read(3, WINDOW + page) == b"cpu"
        s.write(b"dma")
        assert seen(new, 3) == b"dma"
    """,
        how,
    )


def test_a_lower_break(supervised: Supervised) -> None:
    supervised.mock("""
        s = Setup()
        libc.sbrk(-libc.sbrk(0) % page)
        va = libc.sbrk(4 * page)
        fill(va, b"old", 4)
        s.map(va + 2 * page, 2)
        libc.sbrk(-page)
        assert s.read(5, WINDOW + page) == b"old 3" and s.read(5) == b"old 2"
        fill(va + 2 * page, b"own")
        assert s.read(3) == b"own"
        libc.sbrk(page)
        assert seen(va + 3 * page, 3) == bytes(3) and s.read(5, WINDOW + page) == b"old 3"
    """)


def test_system_v_memory(supervised: Supervised) -> None:
    supervised.mock("""
        s = Setup()
        id = libc.shmget(0, 2 * page, 0o600)
        va = libc.shmat(id, None, 0)
        fill(va, b"shm", 2)
        s.map(va, 2)
        assert s.read(5) == b"shm 0"
        fill(va, b"cpu")
        assert s.read(3) == b"cpu" and s.is_page(va, 2)
        libc.shmctl(id, 0, None)  # IPC_RMID
        libc.shmdt(va)
        assert s.read(5) == b"cpu 0" and s.read(5, WINDOW + page) == b"shm 1"
    """)


SECOND = """
s = Setup(fd=int(sys.argv[1]), ioas=int(sys.argv[2]), access=int(sys.argv[3]))
assert s.read(5) == b"old 0", s.read(5)
s.write(b"new")
assert s.read(5) == b"new 0"
"""


def test_exec_keeps_what_was_pinned(supervised: Supervised) -> None:
    supervised.mock(
        """
        s = Setup()
        os.set_inheritable(s.fd, True)
        os.set_inheritable(s.access, True)
        va = private(2)
        fill(va, b"old", 2)
        s.map(va, 2)
        for failing in ("/nowhere", "/etc/passwd", "/"):
            try:
                os.execv(failing, ["x"])
            except OSError:
                pass
        fill(va, b"cpu", 2)
        assert s.read(5) == b"cpu 0" and s.is_page(va, 2)  # a failed exec changes nothing
        fill(va, b"old", 2)
        numbers = [str(n) for n in (s.fd, s.ioas, s.access)]
        os.execv(sys.executable, [sys.executable, "-S", "-E", "-c", sys.argv[1], *numbers])
    """,
        script_of(SECOND),
    )


def script_of(text: str) -> str:
    from tests.interpose.harness import MOCK, PREAMBLE

    return PREAMBLE + MOCK.replace("\\\\0", "\\0") + text


@pytest.mark.parametrize("spawn", ["subprocess", "posix_spawn", "system"])
def test_a_child_that_shares_the_memory_until_it_execs(supervised: Supervised, spawn: str) -> None:
    """vfork and posix_spawn: the child's exec and exit are not the parent's."""
    supervised.mock(
        """
        s = Setup()
        va = private(2)
        fill(va, b"old", 2)
        s.map(va, 2)
        if sys.argv[1] == "subprocess":
            subprocess.run(["/bin/true"], check=True)
            subprocess.run(["sh", "-c", "exit 0"], check=True, close_fds=False)
        elif sys.argv[1] == "posix_spawn":
            pid = os.posix_spawnp("true", ["true"], os.environ)
            assert os.waitpid(pid, 0)[1] == 0
        else:
            assert libc.system(b"true; exit 3") == 3 << 8
        fill(va, b"cpu", 2)
        assert s.read(5) == b"cpu 0" and s.is_page(va, 2)
    """,
        spawn,
    )


def test_a_child_exits_and_its_frames_stay(supervised: Supervised) -> None:
    supervised.mock("""
        s = Setup()
        shared = private(2, 0x21)
        pid = os.fork()
        if pid == 0:
            va = private(2)
            fill(va, b"kid", 2)
            s.map(va, 2)
            fill(shared, b"both")
            s.map(shared, 2, WINDOW + 16 * page)
            os._exit(0)
        assert os.wait()[1] == 0
        assert s.read(5, WINDOW + page) == b"kid 1"
        assert s.read(4, WINDOW + 16 * page) == b"both"
        s.write(b"dma", WINDOW + 16 * page)
        assert seen(shared, 4) == b"dmah"  # shared memory is shared still
        s.unmap(2)
        fails(errno.ENOENT, s.read, 5)
    """)


def test_a_forked_child_has_copies(supervised: Supervised) -> None:
    supervised.mock("""
        s = Setup()
        va = private(2)
        fill(va, b"old")
        s.map(va, 2)
        if os.fork() == 0:
            assert seen(va, 3) == b"old" and not s.is_page(va)
            fill(va, b"kid")
            assert s.read(3) == b"old"
            os._exit(0)
        assert os.wait()[1] == 0
        assert seen(va, 3) == b"old" and s.is_page(va)
        fill(va, b"cpu")
        assert s.read(3) == b"cpu"
    """)


def test_a_killed_child_loses_its_own_pages_and_nobody_elses(supervised: Supervised) -> None:
    """Private memory of a process killed by SIGKILL cannot be saved (deviation); shared memory is there still."""
    supervised.mock("""
        s = Setup()
        shared = private(2, 0x21)
        theirs = private(2)
        fill(theirs, b"mine")
        s.map(theirs, 2, WINDOW + 32 * page)
        r, w = os.pipe()
        pid = os.fork()
        if pid == 0:
            va = private(2)
            fill(va, b"kid")
            s.map(va, 2)
            fill(shared, b"both")
            s.map(shared, 2, WINDOW + 16 * page)
            os.write(w, b"x")
            time.sleep(60)
        os.read(r, 1)
        os.kill(pid, signal.SIGKILL)
        os.wait()
        fails(errno.EFAULT, s.read, 3)
        assert s.read(4, WINDOW + 32 * page) == b"mine"
        s.unmap(2)
        s.unmap(2, WINDOW + 16 * page)
        s.map(theirs, 2)
        assert s.read(4) == b"mine"
    """)


def test_without_pin_tracking_contents_go_with_the_address(supervised: Supervised) -> None:
    supervised.mock(
        """
        s = Setup()
        va = private(2)
        fill(va, b"old", 2)
        s.map(va, 2)
        libc.munmap(va, page)
        fails(errno.EFAULT, s.read, 5)
        s.unmap(2)
        va = private(2)
        fill(va, b"new")
        s.map(va, 2)
        assert s.read(3) == b"new"
    """,
        options=["--no-pin-tracking"],
    )


def test_the_status_file_shows_what_is_pinned(supervised: Supervised) -> None:
    """core 6.1: VmPin in every mode, VmLck in MM mode; in the caller's own file, its threads', and others'."""
    supervised.mock("""
        def status(path):
            values = dict(line.split(":", 1) for line in open(path).read().splitlines() if ":" in line)
            return int(values["VmPin"].split()[0]), int(values["VmLck"].split()[0])
        paths = ["/proc/self/status", "/proc/thread-self/status", f"/proc/{os.getpid()}/status",
                 f"/proc/self/task/{os.getpid()}/status"]
        assert [status(path) for path in paths] == [(0, 0)] * 4
        s = Setup()
        va = private(8)
        s.map(va, 8)
        assert [status(path) for path in paths] == [(32, 0)] * 4
        text = open("/proc/self/status").read()
        assert text.startswith("Name:\\t") and "VmPin:\\t      32 kB\\n" in text and "\\nThreads:\\t1\\n" in text
        parent = os.getpid()
        if os.fork() == 0:
            assert status("/proc/self/status") == (0, 0) and status(f"/proc/{parent}/status") == (32, 0)
            os._exit(0)
        assert os.wait()[1] == 0
        s.unmap(8)
        assert status("/proc/self/status") == (0, 0)
        if os.getuid() == 0:
            header, data = struct.pack("=Ii", 0x20080522, 0), bytearray(24)
            assert libc.capget(header, (ctypes.c_char * 24).from_buffer(data)) == 0
            effective, = struct.unpack_from("=I", data)
            struct.pack_into("=I", data, 0, effective & ~(1 << 14))  # CAP_IPC_LOCK
            assert libc.capset(header, bytes(data)) == 0
        t = Setup("/dev/vfio/vfio")
        t.map(va, 8)
        assert status("/proc/self/status") == (32, 32)
        os.close(t.access)
        os.close(t.fd)
        assert status("/proc/self/status") == (0, 0)
    """)
