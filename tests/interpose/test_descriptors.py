"""Every way a program can hold, copy, pass on and give up a descriptor of the machine (interposition 1; core 1)."""

from __future__ import annotations

import resource

import pytest

from tests.interpose.harness import Supervised

pytestmark = pytest.mark.interposed


def test_open_ioctl_close(supervised: Supervised) -> None:
    done = supervised.python("""
        fd = os.open("/dev/iommu", os.O_RDWR)
        buffer = bytearray(range(40))
        assert fcntl.ioctl(fd, REVERSE, buffer) == 7
        assert buffer == bytes(reversed(range(40)))
        assert fcntl.ioctl(fd, COUNT) == 1
        fails(errno.ENOTTY, fcntl.ioctl, fd, 0x3BFF)
        other = os.open("/dev/iommu", os.O_RDONLY | os.O_CLOEXEC)
        assert fcntl.ioctl(other, COUNT) == 1  # a context of its own
        os.close(fd)
        fails(errno.EBADF, fcntl.ioctl, fd, COUNT)
        assert fcntl.ioctl(other, COUNT) == 2
    """)
    assert done.log == ["opened", "opened", "released 1", "released 2"]


def test_a_release_is_done_before_the_next_call_of_its_process(supervised: Supervised) -> None:
    done = supervised.python(
        """
        import re
        log = sys.argv[1]
        for _ in range(50):
            fd = os.open("/dev/iommu", os.O_RDWR)
            os.close(fd)
            os.stat("/")  # any trapped call
            lines = open(log).read().split()
            assert lines.count("opened") == lines.count("released"), lines
    """,
        str(supervised.next_log()),
    )
    assert len(done.log) == 100


def test_system_calls_on_a_context_answer_as_the_kernel(supervised: Supervised) -> None:
    """core 1.2"""
    supervised.python("""
        fd = os.open("/dev/iommu", os.O_RDWR)
        fails(errno.EINVAL, os.read, fd, 8)
        fails(errno.EINVAL, os.write, fd, b"x")
        fails(errno.EINVAL, os.pread, fd, 8, 0)
        fails(errno.EINVAL, os.pwrite, fd, b"x", 4096)
        fails(errno.EINVAL, os.readv, fd, [bytearray(8)])
        fails(errno.EINVAL, os.writev, fd, [b"x"])
        fails(errno.EINVAL, os.preadv, fd, [bytearray(8)], 0)
        fails(errno.EINVAL, os.pread, fd, 8, -2)
        fails(errno.ESPIPE, os.lseek, fd, 0, os.SEEK_SET)
        fails(errno.ESPIPE, os.lseek, fd, 0, os.SEEK_HOLE)
        fails(errno.EINVAL, os.lseek, fd, 0, 5)
        fails(errno.EINVAL, fcntl.fcntl, fd, fcntl.F_SETFL, os.O_DIRECT)
        fails(errno.ENOTTY, fcntl.ioctl, fd, 0x5460)  # FIOQSIZE
        for cmd in (0xC0045877, 0xC0045878):  # FIFREEZE, FITHAW
            fails(errno.EPERM if os.geteuid() else errno.EOPNOTSUPP, fcntl.ioctl, fd, cmd)
        fails(errno.EINVAL, os.ftruncate, fd, 4096)
        fails(errno.EINVAL, os.fsync, fd)
        fails(errno.ENOTDIR, os.listdir, fd)
        fails(errno.EINVAL, os.sendfile, 1, fd, 0, 8)
        fails(errno.ENODEV, os.posix_fallocate, fd, 0, 8)
        poller = select.poll()
        poller.register(fd)
        assert poller.poll(0) == [(fd, select.POLLIN | select.POLLOUT | select.POLLRDNORM | select.POLLWRNORM)] or \\
            poller.poll(0) == [(fd, select.POLLIN | select.POLLOUT)], poller.poll(0)
        assert select.select([fd], [fd], [fd], 0) == ([fd], [fd], [])
        fails(errno.EPERM, select.epoll().register, fd)
        reader, writer = os.open("/dev/iommu", os.O_RDONLY), os.open("/dev/iommu", os.O_WRONLY)
        fails(errno.EBADF, os.write, reader, b"x")
        fails(errno.EBADF, os.read, writer, 1)
        fails(errno.EINVAL, os.read, reader, 1)
        assert fcntl.ioctl(reader, COUNT) == 1
    """)


def test_fstat_shows_a_device(supervised: Supervised) -> None:
    supervised.python("""
        fd = os.open("/dev/iommu", os.O_RDWR)
        for status in (os.fstat(fd), os.stat("/dev/iommu"), os.stat(f"/proc/self/fd/{fd}"), os.stat(f"/dev/fd/{fd}")):
            assert stat.S_ISCHR(status.st_mode) and status.st_rdev == os.makedev(10, 125), status
            assert status == os.fstat(fd)
        assert os.readlink(f"/proc/self/fd/{fd}") == "/dev/iommu"
        assert os.readlink(f"/proc/{os.getpid()}/fd/{fd}") == "/dev/iommu"
        assert os.readlink(f"/proc/thread-self/fd/{fd}") == "/dev/iommu"
        opaque = file_of(OPAQUE, fd)
        assert os.readlink(f"/proc/self/fd/{opaque}") == "anon_inode:[opaque]"
        assert stat.S_IMODE(os.fstat(opaque).st_mode) == 0o600 and not stat.S_ISCHR(os.fstat(opaque).st_mode)
    """)


def test_flags_and_close_on_exec(supervised: Supervised) -> None:
    supervised.python("""
        fd = os.open("/dev/iommu", os.O_RDWR | os.O_CLOEXEC)
        assert fcntl.fcntl(fd, fcntl.F_GETFD) == fcntl.FD_CLOEXEC
        libc.ioctl(fd, 0x5450)  # FIONCLEX
        assert fcntl.fcntl(fd, fcntl.F_GETFD) == 0
        libc.ioctl(fd, 0x5451)  # FIOCLEX
        assert fcntl.fcntl(fd, fcntl.F_GETFD) == fcntl.FD_CLOEXEC
        assert fcntl.fcntl(fd, fcntl.F_GETFL) == os.O_RDWR | 0o100000
        assert fcntl.fcntl(os.open("/dev/iommu", os.O_RDONLY), fcntl.F_GETFL) == os.O_RDONLY | 0o100000
        os.set_blocking(fd, False)
        assert fcntl.fcntl(fd, fcntl.F_GETFL) == os.O_RDWR | 0o100000 | os.O_NONBLOCK
        queue = file_of(QUEUE, fd)
        assert fcntl.fcntl(queue, fcntl.F_GETFL) == os.O_RDWR
        fails(errno.EINVAL, fcntl.fcntl, fd, 1034)  # F_GET_SEALS
        fails(errno.EBADF, fcntl.fcntl, queue, 1032)  # F_GETPIPE_SZ
        fails(errno.ENOTTY, fcntl.ioctl, fd, 0x541B, bytearray(4))  # FIONREAD
        block = bytearray(4)
        fcntl.ioctl(fd, 2, block)  # FIGETBSZ
        assert block == (4096).to_bytes(4, "little")
    """)


def test_duplicates_are_the_same_context(supervised: Supervised) -> None:
    done = supervised.python(
        """
        fd = os.open("/dev/iommu", os.O_RDWR)
        copies = [os.dup(fd), fcntl.fcntl(fd, fcntl.F_DUPFD, 5), fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 5)]
        low = os.dup2(fd, 30)
        high = os.dup2(fd, 1000)
        libc.dup3(fd, 31, os.O_CLOEXEC)
        assert len({fd, *copies, low, high, 31}) == 7
        for number, copy in enumerate([fd, *copies, low, high, 31], 1):
            assert fcntl.ioctl(copy, COUNT) == number
        assert not os.get_inheritable(copies[2]) and not os.get_inheritable(31) and os.get_inheritable(low)
        for copy in [*copies, high]:
            fails(errno.EINVAL, os.read, copy, 8)
        os.close(fd)
        assert fcntl.ioctl(low, COUNT) == 8
        os.dup2(1, 1000)  # the duplicate at 1000 goes, what is there now is no file of the machine
        fails(errno.ENOTTY, fcntl.ioctl, 1000, COUNT)
        for copy in [*copies, low]:
            os.close(copy)
        assert "released" not in open(sys.argv[1]).read()
        os.close(31)
        os.stat("/")
        assert "released 8" in open(sys.argv[1]).read()
    """,
        str(supervised.next_log()),
    )
    assert done.log == ["opened", "released 8"]


def test_a_number_that_was_closed_is_not_remembered(supervised: Supervised) -> None:
    """The caches of the interposer follow close, close_range, dup2 and dup3."""
    supervised.python("""
        for close in (os.close, lambda fd: libc.close_range(fd, fd, 0), lambda fd: os.dup2(null, fd)):
            null = os.open("/dev/null", os.O_RDWR)
            first = os.open("/dev/iommu", os.O_RDWR)
            for _ in range(3):
                fcntl.ioctl(first, COUNT)
            close(first)
            fails(errno.EBADF if close is not None and os.path.exists(f"/proc/self/fd/{first}") is False
                  else errno.ENOTTY, fcntl.ioctl, first, COUNT)
            os.dup2(null, first)
            os.read(first, 1)
            fails(errno.ENOTTY, fcntl.ioctl, first, COUNT)
            os.close(first)
            second = os.open("/dev/iommu", os.O_RDWR)
            assert fcntl.ioctl(second, COUNT) == 1
            os.close(second)
    """)


def test_fork_shares_and_exec_keeps(supervised: Supervised) -> None:
    done = supervised.python(
        """
        fd = os.open("/dev/iommu", os.O_RDWR)
        os.set_inheritable(fd, True)
        secret = os.open("/dev/iommu", os.O_RDWR | os.O_CLOEXEC)
        assert fcntl.ioctl(fd, COUNT) == 1
        if os.fork() == 0:
            assert fcntl.ioctl(fd, COUNT) == 2
            os._exit(0)
        assert os.wait()[1] == 0
        code = "import fcntl, sys; fd = int(sys.argv[1]); "
        code += "sys.exit(fcntl.ioctl(fd, 0x3b81) * 10 + fcntl.ioctl(fd, 0x3b81))"
        child = subprocess.Popen([sys.executable, "-S", "-E", "-c", code, str(fd)], close_fds=False)
        assert child.wait() == 34
        pid = os.posix_spawn(sys.executable, [sys.executable, "-S", "-E", "-c", code, str(fd)], os.environ)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 56
        os.close(secret)
        os.execv(sys.executable, [sys.executable, "-S", "-E", "-c", code, str(fd)])
    """,
        code=78,
    )
    assert done.log == ["opened", "opened", "released 0", "released 8"]


def test_exec_drops_what_is_close_on_exec(supervised: Supervised) -> None:
    done = supervised.python(
        """
        fd = os.open("/dev/iommu", os.O_RDWR | os.O_CLOEXEC)
        fcntl.ioctl(fd, COUNT)
        code = "import ctypes, sys; c = ctypes.CDLL(None, use_errno=True); "
        code += "c.ioctl(int(sys.argv[1]), 0x3b81) == -1 and sys.exit(ctypes.get_errno())"
        os.execv(sys.executable, [sys.executable, "-S", "-E", "-c", code, str(fd)])
    """,
        code=9,
    )
    assert done.log == ["opened", "released 1"]


def test_a_failed_exec_changes_nothing(supervised: Supervised) -> None:
    supervised.python("""
        fd = os.open("/dev/iommu", os.O_RDWR | os.O_CLOEXEC)
        assert fcntl.ioctl(fd, COUNT) == 1
        fails(errno.ENOENT, os.execv, "/nowhere", ["x"])
        assert fcntl.ioctl(fd, COUNT) == 2
        assert fcntl.ioctl(fd, COUNT) == 3
    """)


def test_threads_share(supervised: Supervised) -> None:
    supervised.python("""
        fd = os.open("/dev/iommu", os.O_RDWR)
        def work():
            for _ in range(200):
                fcntl.ioctl(fd, COUNT)
        threads = [threading.Thread(target=work) for _ in range(4)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert fcntl.ioctl(fd, COUNT) == 801
    """)


def test_passing_a_descriptor_in_a_message(supervised: Supervised) -> None:
    """SCM_RIGHTS: a message in flight holds the file; the receiver's number is a low one."""
    done = supervised.python(
        """
        log = sys.argv[1]
        ours, theirs = socket.socketpair()
        fd = os.open("/dev/iommu", os.O_RDWR)
        fcntl.ioctl(fd, COUNT)
        if os.fork() == 0:
            os.close(fd)
            _, fds, _, _ = socket.recv_fds(theirs, 1, 1)
            assert fcntl.ioctl(fds[0], COUNT) == 2
            again = os.dup(fds[0])
            assert fcntl.ioctl(again, COUNT) == 3
            os._exit(0)
        theirs.close()
        socket.send_fds(ours, [b"x"], [fd])
        os.close(fd)
        assert os.wait()[1] == 0
        os.stat("/")
        assert "released 3" in open(log).read()
        a, b = socket.socketpair()
        fd = os.open("/dev/iommu", os.O_RDWR)
        socket.send_fds(a, [b"x"], [fd])
        os.close(fd)
        os.stat("/")
        assert open(log).read().count("released") == 1  # in flight
        a.close(), b.close()
        os.stat("/")
        assert open(log).read().count("released") == 2
    """,
        str(supervised.next_log()),
    )
    assert done.log == ["opened", "released 3", "opened", "released 0"]


def test_opening_a_descriptor_again(supervised: Supervised) -> None:
    """/proc/self/fd/N of a device opens the device: a new context; a file without a path cannot be opened again."""
    done = supervised.python("""
        fd = os.open("/dev/iommu", os.O_RDWR)
        fcntl.ioctl(fd, COUNT)
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        assert fcntl.ioctl(again, COUNT) == 1
        opaque = file_of(OPAQUE, fd)
        fails(errno.ENXIO, os.open, f"/proc/self/fd/{opaque}", os.O_RDWR)
        fails(errno.ENOTDIR, os.open, f"/proc/self/fd/{fd}/x", os.O_RDWR)
    """)
    assert done.log[:2] == ["opened", "opened"]


def test_o_path_names_and_does_nothing(supervised: Supervised) -> None:
    supervised.python("""
        fd = os.open("/dev/iommu", os.O_PATH)
        fails(errno.EBADF, fcntl.ioctl, fd, COUNT)
        fails(errno.EBADF, os.read, fd, 1)
        assert fcntl.fcntl(fd, fcntl.F_GETFL) == os.O_PATH
        assert os.fstat(fd).st_rdev == os.makedev(10, 125)
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        assert fcntl.ioctl(again, COUNT) == 1
    """)


def test_a_full_table_of_descriptors(supervised: Supervised) -> None:
    """EMFILE comes exactly when the program's own limit says so; before that, numbers may leave the usual range."""
    supervised.python("""
        import resource
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        fds = []
        while True:
            try:
                fds.append(os.open("/dev/iommu", os.O_RDWR))
            except OSError as error:
                assert error.errno == errno.EMFILE
                break
        assert max(fds) == 63 and len(set(fds)) == len(fds) > 50
        for fd in fds:
            assert fcntl.ioctl(fd, COUNT) == 1
        fails(errno.EMFILE, fcntl.ioctl, fds[0], QUEUE, bytearray(4))
        os.close(fds.pop())
        assert file_of(QUEUE, fds[0]) == 63
    """)


def test_more_contexts_than_the_usual_range_holds(supervised: Supervised) -> None:
    supervised.python("""
        fds = [os.open("/dev/iommu", os.O_RDWR) for _ in range(300)]
        assert len(set(fds)) == 300
        for fd in fds:
            assert fcntl.ioctl(fd, COUNT) == 1
    """)


def test_a_supervisor_out_of_descriptors(supervised: Supervised) -> None:
    """What it cannot carry it refuses; what is open goes on."""
    script = """
        fds = []
        while True:
            try:
                fds.append(os.open("/dev/iommu", os.O_RDWR))
            except OSError as error:
                assert error.errno in (errno.ENFILE, errno.EMFILE), error
                break
        assert len(fds) > 10
        for fd in fds:
            assert fcntl.ioctl(fd, COUNT) == 1
        fails(errno.ENFILE, fcntl.ioctl, fds[0], QUEUE, bytearray(4))
        for fd in fds[5:]:
            os.close(fd)
        assert file_of(QUEUE, fds[0]) > 2
    """

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))

    supervised.python(script, preexec_fn=few)


def test_the_container_path_is_a_device_too(supervised: Supervised) -> None:
    supervised.python("""
        fd = os.open("/dev/vfio/vfio", os.O_RDWR)
        assert fcntl.ioctl(fd, COUNT) == 1
        assert os.fstat(fd).st_rdev == os.makedev(10, 196)
    """)


def test_a_mode_that_excludes_others(supervised: Supervised) -> None:
    supervised.python("""
        if os.geteuid() == 0:
            os.open("/dev/private-iommu", os.O_RDWR)
            os.setresuid(1, 1, 1)
        fails(errno.EACCES, os.open, "/dev/private-iommu", os.O_RDWR)
        assert not os.access("/dev/private-iommu", os.R_OK) and os.access("/dev/private-iommu", os.F_OK)
    """)
