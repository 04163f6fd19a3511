"""What happens in the middle of calls: signals, death, long and deferred calls, faults of ours (interposition 7)."""

from __future__ import annotations

import subprocess
import time

import pytest

from tests.interpose.harness import Compile, Supervised

pytestmark = pytest.mark.interposed


STORM = r"""
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <errno.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <unistd.h>
static volatile long handled;
static void handler(int n) { handled++; }
int main(int argc, char **argv)
{
    struct sigaction action = { .sa_handler = handler, .sa_flags = argc > 1 ? SA_RESTART : 0 };
    long wanted = 10000, calls = 0, interrupted = 0, count = 0;
    int fd = open("/dev/iommu", O_RDWR), sync[2];
    char byte;
    pid_t child, self = getpid();
    pipe(sync);
    sigaction(SIGUSR1, &action, NULL);
    child = fork();
    if (child == 0) {
        for (long i = 0; i < wanted; i++) {
            kill(self, SIGUSR1);
            if (i % 64 == 0)
                usleep(200);
        }
        write(sync[1], "x", 1);
        _exit(0);
    }
    fcntl(sync[0], F_SETFL, O_NONBLOCK);
    while (read(sync[0], &byte, 1) != 1) {
        long now = ioctl(fd, 0x3b81, 0);
        if (now < 0) {
            if (errno != EINTR) { perror("ioctl"); return 1; }
            interrupted++;  /* before the call began: nothing was done */
            continue;
        }
        calls++;
        if (now != ++count) { printf("call %ld ran as %ld\n", count, now); return 1; }
    }
    while (waitpid(child, NULL, 0) < 0 && errno == EINTR);
    printf("%s\n", handled > 100 && calls > 100 ? "once each" : "too few");
    fprintf(stderr, "%ld calls, %ld handled, %ld interrupted\n", calls, handled, interrupted);
    return 0;
}
"""


@pytest.mark.parametrize("restart", [False, True], ids=["plain", "SA_RESTART"])
def test_ten_thousand_signals_run_no_call_twice(supervised: Supervised, compiled: Compile, restart: bool) -> None:
    done = supervised.run([compiled(STORM), *(["restart"] if restart else [])])
    assert done.out == "once each\n", done


def test_a_signal_waits_for_the_answer(supervised: Supervised) -> None:
    """The handler runs after the call, which returns its normal result."""
    supervised.python("""
        fd = os.open("/dev/iommu", os.O_RDWR)
        times = []
        signal.signal(signal.SIGALRM, lambda *_: times.append(time.monotonic()))
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        start = time.monotonic()
        assert fcntl.ioctl(fd, SLEEP, 150) == 1
        assert times and times[0] - start > 0.14
    """)


def test_a_long_call_stops_nobody_else(supervised: Supervised) -> None:
    supervised.python("""
        fd = os.open("/dev/iommu", os.O_RDWR)
        other = os.open("/dev/iommu", os.O_RDWR)
        slow = [threading.Thread(target=fcntl.ioctl, args=(fd, SLEEP, 700)) for _ in range(3)]
        begun = time.monotonic()
        [t.start() for t in slow]
        time.sleep(0.2)
        for number in range(1, 51):
            assert fcntl.ioctl(other, COUNT) == number
        assert time.monotonic() - begun < 0.6
        [t.join() for t in slow]
        assert time.monotonic() - begun < 1.5  # and they ran side by side
        assert fcntl.ioctl(fd, COUNT) == 4
    """)


def test_a_deferred_answer(supervised: Supervised) -> None:
    supervised.python("""
        fd = os.open("/dev/iommu", os.O_RDWR)
        begun = time.monotonic()
        assert fcntl.ioctl(fd, LATER, 77) == 77
        assert time.monotonic() - begun > 0.09
    """)


def test_a_deferred_call_of_a_killed_program_is_dropped(supervised: Supervised) -> None:
    done = supervised.python(
        """
        fd = os.open("/dev/iommu", os.O_RDWR)
        pid = os.fork()
        if pid == 0:
            fcntl.ioctl(fd, NEVER)
        while "waiting" not in open(sys.argv[1]).read():
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.wait()[1]) == -9
        for _ in range(200):
            if "dropped" in open(sys.argv[1]).read():
                break
            time.sleep(0.02)
        assert fcntl.ioctl(fd, COUNT) == 1
    """,
        str(supervised.next_log()),
    )
    assert done.log == ["opened", "waiting", "dropped", "released 1"]


def test_killed_in_the_middle_of_a_call(supervised: Supervised) -> None:
    """The call takes effect, the supervisor goes on, the file is released."""
    done = supervised.python(
        """
        keep = os.open("/dev/iommu", os.O_RDWR)
        for _ in range(5):
            pid = os.fork()
            if pid == 0:
                fd = os.open("/dev/iommu", os.O_RDWR)
                fcntl.ioctl(fd, SLEEP, 60)
            while open(sys.argv[1]).read().count("opened") < 2 + _:
                time.sleep(0.01)
            os.kill(pid, signal.SIGKILL)
            os.wait()
        assert fcntl.ioctl(keep, COUNT) == 1
    """,
        str(supervised.next_log()),
    )
    assert done.log.count("opened") == 6
    assert sum(line.startswith("released") for line in done.log) == 6


def test_a_fault_of_ours_is_eio_and_one_line(supervised: Supervised) -> None:
    done = supervised.python("""
        fd = os.open("/dev/iommu", os.O_RDWR)
        fails(errno.EIO, fcntl.ioctl, fd, BUG)
        fails(errno.EIO, fcntl.ioctl, fd, BUG)
        assert fcntl.ioctl(fd, COUNT) == 1
    """)
    lines = done.err.splitlines()
    assert len(lines) == 2
    assert "internal error in ioctl" in lines[0]
    assert "the device is broken" in lines[0]


def test_bad_pointers(supervised: Supervised) -> None:
    """interposition 4: exactly what the kernel's own copies do, whatever the page protections."""
    supervised.python("""
        fd = os.open("/dev/iommu", os.O_RDWR)
        def ioctl(addr):
            result = libc.ioctl(fd, REVERSE, ctypes.c_void_p(addr))
            return result if result >= 0 else -ctypes.get_errno()
        page = 4096
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        base = libc.mmap(None, 3 * page, 3, 0x22, -1, 0)
        assert ioctl(base) == 7
        libc.munmap(base + 2 * page, page)
        assert ioctl(base + 2 * page - 40) == 7
        assert ioctl(base + 2 * page - 39) == -errno.EFAULT
        assert ioctl(base + 2 * page) == -errno.EFAULT
        libc.mprotect(base + page, page, 1)
        assert ioctl(base + page) == -errno.EFAULT  # read-only: the result cannot be written
        libc.mprotect(base + page, page, 0)
        assert ioctl(base + page) == -errno.EFAULT
        for addr in (0, 8, 2**47, 2**63, 2**64 - 1, 2**64 - 40, -page % 2**64):
            assert ioctl(addr) == -errno.EFAULT, hex(addr)
        assert fcntl.ioctl(fd, COUNT) == 1
    """)


def test_files_that_a_call_returns(supervised: Supervised) -> None:
    """A descriptor inside a struct: reserved, written, installed; and nothing when the struct cannot be written."""
    done = supervised.python(
        """
        fd = os.open("/dev/iommu", os.O_RDWR)
        assert libc.ioctl(fd, QUEUE, ctypes.c_void_p(8)) == -1 and ctypes.get_errno() == errno.EFAULT
        before = os.listdir("/proc/self/fd")
        queue = file_of(QUEUE, fd)
        assert not os.get_inheritable(queue)
        fails(errno.EAGAIN, os.read, queue, 8)
        fails(errno.ESPIPE, os.lseek, queue, 0, 0)
        fails(errno.ESPIPE, os.pread, queue, 8, 0)
        fails(errno.EINVAL, os.write, queue, b"x")
        fails(errno.ENOTTY, fcntl.ioctl, queue, COUNT)
        fails(errno.ENODEV, mmap.mmap, queue, 4096)
        opaque = file_of(OPAQUE, fd)
        assert os.get_inheritable(opaque)
        fails(errno.EINVAL, os.read, opaque, 8)
        fails(errno.ENODEV, mmap.mmap, opaque, 4096)
        os.close(fd)
        os.stat("/")
        assert "released 0" not in open(sys.argv[1]).read()  # the queue holds its device
        os.close(queue)
        os.stat("/")
        assert open(sys.argv[1]).read().split("\\n")[1:3] == ["queue released", "released 0"]
    """,
        str(supervised.next_log()),
    )
    assert done.log == ["opened", "queue released", "released 0", "opaque released"]


def test_a_queue_wakes_who_polls(supervised: Supervised) -> None:
    """interposition 2: readable only when something was posted, each post a new edge."""
    supervised.python("""
        fd = os.open("/dev/iommu", os.O_RDWR)
        queue = file_of(QUEUE, fd)
        poller = select.poll()
        poller.register(queue, select.POLLIN | select.POLLOUT)
        assert poller.poll(0) == [(queue, select.POLLOUT)]
        edge = select.epoll()
        edge.register(queue, select.EPOLLIN | select.EPOLLET)
        assert edge.poll(0) == []
        assert fcntl.ioctl(fd, POST, 65) == 1
        assert poller.poll(0) == [(queue, select.POLLIN | select.POLLOUT)]
        assert edge.poll(0) == [(queue, select.EPOLLIN)] and edge.poll(0) == []
        fcntl.ioctl(fd, POST, 66)
        assert edge.poll(0) == [(queue, select.EPOLLIN)]
        assert os.read(queue, 100) == b"AB"
        assert poller.poll(0) == [(queue, select.POLLOUT)] and edge.poll(0) == []
        fails(errno.EAGAIN, os.read, queue, 1)
        woken = []
        waiter = threading.Thread(target=lambda: woken.append(select.select([queue], [], [], 10)[0]))
        waiter.start()
        time.sleep(0.05)
        fcntl.ioctl(fd, POST, 67)
        waiter.join(5)
        assert woken == [[queue]]
        parts = [bytearray(1), bytearray(4)]
        assert os.readv(queue, parts) == 1 and parts[0] == b"C"
        for value in range(20):
            fcntl.ioctl(fd, POST, value)
        assert os.read(queue, 8) + os.read(queue, 8) + os.read(queue, 8) == bytes(range(20))
        assert poller.poll(0) == [(queue, select.POLLOUT)]
        copy = os.dup(queue)
        fcntl.ioctl(fd, POST, 1)
        os.close(queue)
        assert os.read(copy, 8) == b"\\1"
    """)


def test_mappings_are_native_and_counted(supervised: Supervised) -> None:
    """core 1.7: each mapping, its copies by fork and its pieces hold the file, until all of it is unmapped."""
    done = supervised.python(
        """
        fd = os.open("/dev/iommu", os.O_RDWR)
        fails(errno.ENXIO, mmap.mmap, fd, 8192)
        memory = mmap.mmap(fd, 4096, offset=4096)
        assert memory[:] == b"m" * 4096
        fails(errno.ENXIO, lambda: mmap.mmap(fd, 4096, offset=8192))
        fcntl.ioctl(fd, COUNT)
        pid = os.fork()
        if pid == 0:
            fcntl.ioctl(fd, COUNT)
            os._exit(0)
        os.wait()
        fcntl.ioctl(fd, COUNT)
        again = mmap.mmap(fd, 4096, offset=4096)
        again[0] = 65
        assert memory[0] == 65
        again.close()
        fcntl.ioctl(fd, COUNT)
        os.close(fd)
        os.stat("/")
        assert "released" not in open(sys.argv[1]).read()
        memory.close()
        os.stat("/")
        assert "released 4" in open(sys.argv[1]).read()
    """,
        str(supervised.next_log()),
    )
    assert [line for line in done.log if line.startswith("mappings")] == [
        "mappings 1", "mappings 2", "mappings 1", "mappings 2", "mappings 1", "mappings 0",
    ]  # fmt: skip
    assert done.log[-1] == "released 4"


def test_handing_over_a_file_of_the_host(supervised: Supervised) -> None:
    supervised.python("""
        fd = os.open("/dev/iommu", os.O_RDWR)
        def size_of(number):
            buffer = bytearray(struct.pack("=i", number))
            return fcntl.ioctl(fd, LISTEN, buffer), int.from_bytes(buffer, "little")
        memory = os.memfd_create("x")
        os.write(memory, b"12345")
        assert size_of(memory) == (0, 5)
        assert size_of(fd)[0] == 1
        for number in (-1, 99, 2**31 - 1):
            fails(errno.EBADF, size_of, number)
        fails(errno.EBADF, size_of, os.open("/", os.O_PATH))
    """)


def test_credentials_are_the_threads_present_ones(supervised: Supervised) -> None:
    supervised.python("""
        fd = os.open("/dev/iommu", os.O_RDWR)
        lock = 1 << 30
        if os.getuid():
            assert fcntl.ioctl(fd, CAPS) == os.getuid()
        else:
            assert fcntl.ioctl(fd, CAPS) == lock
            if os.fork() == 0:
                os.setresuid(7, 0, 0)
                assert fcntl.ioctl(fd, CAPS) == lock | 7
                os.setresuid(7, 7, 0)
                assert fcntl.ioctl(fd, CAPS) == 7
                os.setresuid(7, 0, 0)
                assert fcntl.ioctl(fd, CAPS) == lock | 7
                header, data = struct.pack("=Ii", 0x20080522, 0), bytes(24)
                assert libc.capset(header, data) == 0
                assert fcntl.ioctl(fd, CAPS) == 7
                os._exit(0)
            assert os.wait()[1] == 0
            assert fcntl.ioctl(fd, CAPS) == lock
    """)


def test_a_tree_of_many_short_processes(supervised: Supervised) -> None:
    supervised.python("""
        fd = os.open("/dev/iommu", os.O_RDWR)
        for number in range(1, 101):
            pid = os.fork()
            if pid == 0:
                assert fcntl.ioctl(fd, COUNT) == number
                assert fcntl.ioctl(fd, WHOSE) == os.getpid() % 2**31
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0
        for _ in range(50):
            t = threading.Thread(target=fcntl.ioctl, args=(fd, COUNT))
            t.start()
            t.join()
        assert fcntl.ioctl(fd, COUNT) == 151
    """)


def test_after_a_long_silence(supervised: Supervised) -> None:
    """The supervisor sleeps when nothing happens; a release and a call wake it."""
    done = supervised.python(
        """
        fd, other = os.open("/dev/iommu", os.O_RDWR), os.open("/dev/iommu", os.O_RDWR)
        assert fcntl.ioctl(fd, COUNT) == 1
        time.sleep(1.2)
        os.close(other)
        for _ in range(100):
            if "released" in os.read(log := os.open(sys.argv[1], os.O_RDONLY), 100).decode():
                break
            os.close(log)
            time.sleep(0.01)
        time.sleep(1.2)
        assert fcntl.ioctl(fd, COUNT) == 2
    """,
        str(supervised.next_log()),
    )
    assert done.log == ["opened", "opened", "released 0", "released 2"]


def test_an_idle_supervisor_uses_no_processor(supervised: Supervised) -> None:
    command, _ = supervised.command(["/bin/sleep", "4"])
    process = subprocess.Popen(command)
    time.sleep(2.0)

    def used() -> int:
        with open(f"/proc/{process.pid}/stat") as text:
            fields = text.read().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    before = used()
    time.sleep(1.5)
    assert used() - before <= 1  # hundredths of a second
    assert process.wait() == 0
