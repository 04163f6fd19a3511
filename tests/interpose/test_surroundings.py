"""Namespaces, roots, tables of descriptors, tracers: what programs do to their surroundings (interposition 9)."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.interpose.harness import PREAMBLE, Compile, Supervised

pytestmark = pytest.mark.interposed

USE = """
fd = os.open("/dev/iommu", os.O_RDWR)
assert fcntl.ioctl(fd, COUNT) == 1
buffer = bytearray(range(40))
assert fcntl.ioctl(fd, REVERSE, buffer) == 7 and buffer[0] == 39
assert os.readlink(f"/proc/self/fd/{fd}") == "/dev/iommu"
again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
assert fcntl.ioctl(again, COUNT) == 1
assert stat.S_ISCHR(os.stat("/dev/iommu").st_mode)
print(fcntl.ioctl(fd, CAPS) >> 30)
"""


def can_unshare(*options: str) -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", *options, "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("options", [["-U"], ["-r"], ["-r", "-p", "-f", "--mount-proc"], ["-r", "-m"]], ids=" ".join)
def test_in_namespaces_of_its_own(supervised: Supervised, options: list[str]) -> None:
    """A user namespace has no capability in the initial one, whatever its uid looks like."""
    if not can_unshare(*options):
        pytest.skip(f"`unshare {' '.join(options)}` is not possible here")
    script = PREAMBLE + USE
    done = supervised.run(["unshare", *options, sys.executable, "-S", "-E", "-c", script])
    assert done.out == "0\n"
    assert done.log == ["opened", "opened", "released 1", "released 1"]


def test_inside_a_changed_root(supervised: Supervised, tmp_path: Path) -> None:
    """The machine's paths are there in every root; everything else is the root's own."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/hello").write_text("inside")
    (tmp_path / "device").symlink_to("/dev/iommu")
    (tmp_path / "loop").symlink_to("etc/hello")
    supervised.python(
        """
        try:
            os.chroot(sys.argv[1])
        except PermissionError:
            sys.exit(0)  # as an ordinary user
        os.chdir("/")
        assert open("/etc/hello").read() == "inside" and open("/loop").read() == "inside"
        fails(errno.ENOENT, os.stat, "/etc/passwd")
        for path in ("/dev/iommu", "/device", "device", "dev/iommu"):
            assert fcntl.ioctl(os.open(path, os.O_RDWR), COUNT) == 1
    """,
        str(tmp_path),
    )


def test_tables_of_descriptors_that_threads_do_not_share(supervised: Supervised) -> None:
    """unshare(CLONE_FILES): one number means two files in one process."""
    supervised.python("""
        shared = os.open("/dev/iommu", os.O_RDWR)
        fcntl.ioctl(shared, COUNT)
        go, done, wrong = threading.Event(), threading.Event(), []
        def alone():
            try:
                assert libc.unshare(0x400) == 0
                os.close(shared)
                mine = os.open("/dev/iommu", os.O_RDWR)
                assert mine == shared
                assert [fcntl.ioctl(mine, COUNT) for _ in range(5)] == [1, 2, 3, 4, 5]
                go.set()
                done.wait()
                assert fcntl.ioctl(mine, COUNT) == 6
            except BaseException as error:
                wrong.append(error)
                go.set()
        thread = threading.Thread(target=alone)
        thread.start()
        go.wait()
        assert fcntl.ioctl(shared, COUNT) == 2
        done.set()
        thread.join()
        assert not wrong, wrong
        assert fcntl.ioctl(shared, COUNT) == 3
    """)


def test_an_exec_by_another_thread_than_the_first(supervised: Supervised) -> None:
    done = supervised.python(
        """
        fd = os.open("/dev/iommu", os.O_RDWR)
        gone = os.open("/dev/iommu", os.O_RDWR | os.O_CLOEXEC)
        os.set_inheritable(fd, True)
        fcntl.ioctl(fd, COUNT)
        code = "import fcntl, sys; sys.exit(fcntl.ioctl(int(sys.argv[1]), 0x3b81))"
        args = [sys.executable, "-S", "-E", "-c", code, str(fd)]
        threading.Thread(target=os.execv, args=(sys.executable, args)).start()
        time.sleep(10)
    """,
        code=2,
    )
    assert done.log == ["opened", "opened", "released 0", "released 2"]


SHARED_TABLE = r"""
#define _GNU_SOURCE
#include <signal.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <unistd.h>
static int fd, null;
static int child(void *arg)
{
    /* our number goes, and another file takes it: the parent's table is the same table */
    if (ioctl(fd, 0x3b81, 0) != 2)
        return 1;
    dup2(null, fd);
    return 0;
}
int main(void)
{
    char *stack = malloc(1 << 16);
    int status, again;
    fd = open("/dev/iommu", O_RDWR);
    null = open("/dev/null", O_RDWR);
    if (ioctl(fd, 0x3b81, 0) != 1)
        return 1;
    clone(child, stack + (1 << 16), CLONE_FILES | CLONE_VM | SIGCHLD, NULL);
    wait(&status);
    if (status)
        return 2;
    if (ioctl(fd, 0x3b81, 0) != -1)  /* /dev/null now */
        return 3;
    close(fd);
    again = open("/dev/iommu", O_RDWR);
    if (ioctl(again, 0x3b81, 0) != 1)
        return 4;
    puts("shared");
    return 0;
}
"""


def test_processes_that_share_a_table(supervised: Supervised, compiled: Compile) -> None:
    done = supervised.run([compiled(SHARED_TABLE)])
    assert done.out == "shared\n"
    assert done.log == ["opened", "released 2", "opened", "released 1"]


@pytest.mark.parametrize("tracer", ["strace", pytest.param("gdb", marks=pytest.mark.slow)])
def test_under_a_tracer_inside(supervised: Supervised, tracer: str) -> None:
    if shutil.which(tracer) is None:
        pytest.skip(f"there is no {tracer} here")
    script = PREAMBLE + USE
    program = [sys.executable, "-S", "-E", "-c", script]
    command = ["strace", "-f", "-o", "/dev/null"] if tracer == "strace" else ["gdb", "-batch", "-ex", "run", "--args"]
    done = supervised.run([*command, *program])
    assert done.log[:1] == ["opened"]


def test_any_bytes_in_any_call(supervised: Supervised, tmp_path: Path) -> None:
    """Nothing a program passes makes the supervisor fail: it says nothing, and the program ends by itself."""
    script = """
        import random
        os.chdir(sys.argv[2])  # an open may make files, with any name
        rng = random.Random(int(sys.argv[1]))
        memory = mmap.mmap(-1, 16 * page)
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        half = private(2)
        libc.munmap(half + page, page)
        libc.syscall.restype = ctypes.c_long
        sizes = (0, 4, 8, 12, 16, 24, 28, 32, 40, 48, 72, 80, 4000, 2**32 - 1)
        fds = [os.open("/dev/iommu", os.O_RDWR)]
        files = (0, 1, 5, 8, 17, 18, 19, 20, 72, 77, 217, 257, 262, 267, 332, 437, 439)
        paths = (4, 6, 21, 89, 257, 262, 267, 269, 332, 437, 439)
        def u64():
            return ctypes.c_ulong(rng.getrandbits(64) >> rng.randrange(64))
        def pointer():
            kind = rng.randrange(8)
            if kind == 0:
                return ctypes.c_void_p(half + page - rng.randrange(80))
            if kind == 1:
                return ctypes.c_void_p(rng.getrandbits(rng.choice((12, 47, 64))))
            at = rng.randrange(64) * 8
            words = [rng.choice((0, 0, 1, 2, base, 4096, 0x1000000, rng.getrandbits(64))) for _ in range(12)]
            memory[at : at + 96] = struct.pack("=12Q", *words)
            memory[at : at + 4] = struct.pack("=I", rng.choice(sizes))
            memory[at + 4 : at + 12] = struct.pack("=II", rng.randrange(8), rng.randrange(26))
            return ctypes.c_void_p(base + at)
        for _ in range(1500):
            fd, kind = rng.choice(fds), rng.randrange(20)
            if kind < 13:
                libc.ioctl(fd, ctypes.c_ulong(0x3B00 | rng.randrange(0x80, 0xA1)), pointer())
            elif kind == 13:
                libc.ioctl(fd, u64(), pointer())
            elif kind == 14 and len(fds) < 30:
                fds.append(os.open("/dev/iommu", rng.randrange(3)))
            elif kind == 15:
                libc.syscall(ctypes.c_long(rng.choice(files)), ctypes.c_long(fd), pointer(), u64(), u64(), u64())
            elif kind == 16:
                libc.syscall(ctypes.c_long(rng.choice(paths)), ctypes.c_long(-100), pointer(), pointer(), u64(), u64())
            elif kind == 17:
                libc.madvise(base + page * rng.randrange(16), page * rng.randrange(3), rng.randrange(30))
            elif kind == 18:
                length, offset = page * rng.randrange(4), page * rng.randrange(4)
                libc.mmap(None, length, rng.randrange(8), rng.randrange(4), fd, offset)
            elif len(fds) > 1:
                os.close(fds.pop(rng.randrange(1, len(fds))))
        os._exit(0)
    """
    for seed in "123":
        done = supervised.mock(textwrap.dedent(script), seed, str(tmp_path))
        assert done.err == ""
