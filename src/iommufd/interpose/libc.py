"""The few system calls Python has no function for, each with the errno raised as OSError.

Nothing here knows about iommufd. Numbers of calls without a libc wrapper come from :mod:`iommufd.interpose.syscalls`.
"""

from __future__ import annotations

import ctypes
import os

from iommufd.interpose.syscalls import HOST

libc = ctypes.CDLL(None, use_errno=True)
_syscall = libc.syscall
_syscall.restype = ctypes.c_long

PR_SET_NO_NEW_PRIVS, PR_SET_CHILD_SUBREAPER, PR_SET_PDEATHSIG = 38, 36, 1
PR_SET_PTRACER, PR_SET_PTRACER_ANY = 0x59616D61, 2**64 - 1
KCMP_VM = 1
IN_CLOSE_WRITE, IN_CLOSE_NOWRITE = 0x8, 0x10


def _checked(result: int) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def syscall(name: str, *args: int | ctypes.Array[ctypes.c_char] | None) -> int:
    """The system call ``name`` of this architecture; integers are passed as unsigned long."""
    raw = [ctypes.c_ulong(a & 0xFFFFFFFFFFFFFFFF) if isinstance(a, int) else a for a in args]
    return _checked(_syscall(ctypes.c_long(HOST.numbers[name]), *raw))


def prctl(option: int, arg2: int = 0) -> int:
    """prctl(2) with one argument; the unused ones are zero, as the kernel insists for some options."""
    zero = ctypes.c_ulong(0)
    return _checked(libc.prctl(option, ctypes.c_ulong(arg2), zero, zero, zero))


def pidfd_open(pid: int) -> int:
    """A close-on-exec descriptor of the process ``pid`` (a thread-group leader)."""
    return os.pidfd_open(pid)


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """A close-on-exec duplicate of descriptor ``fd`` of the process behind ``pidfd``."""
    return syscall("pidfd_getfd", pidfd, fd, 0)


def same_vm(pid1: int, pid2: int) -> bool | None:
    """Whether two tasks share one address space; None when the host refuses to say (kcmp filtered or not built in)."""
    try:
        return syscall("kcmp", pid1, pid2, KCMP_VM, 0, 0) == 0
    except OSError:
        return None


def inotify_init() -> int:
    """A close-on-exec, non-blocking inotify descriptor."""
    return _checked(libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK))


def inotify_add_watch(fd: int, path: str, mask: int) -> int:
    return _checked(libc.inotify_add_watch(fd, path.encode(), ctypes.c_uint32(mask)))


def inotify_rm_watch(fd: int, watch: int) -> None:
    _checked(libc.inotify_rm_watch(fd, watch))
