"""Starting a program under a filter: fork, no_new_privs, seccomp, the listener handed over, a go byte, execve.

The child installs the filter on itself and sends the listener by SCM_RIGHTS (``pidfd_getfd`` would need a capability in
some containers), then waits for one byte, so that the supervisor serves before the first trapped call: the child's own
``execve``. What the child does between fork and execve touches no lock another thread could hold.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import socket
import struct
from collections.abc import Mapping, Sequence
from typing import NoReturn

from iommufd.interpose import notify
from iommufd.interpose.libc import (
    PR_SET_NO_NEW_PRIVS,
    PR_SET_PDEATHSIG,
    PR_SET_PTRACER,
    PR_SET_PTRACER_ANY,
    prctl,
    syscall,
)

EXIT_SUPERVISOR = 125  # we failed
EXIT_NOT_EXECUTABLE = 126
EXIT_NOT_FOUND = 127

REPORT = struct.Struct("=ci")  # step, errno
STEP_READY, STEP_PRIVS, STEP_SECCOMP, STEP_EXEC = b"R", b"P", b"S", b"X"


class LaunchError(Exception):
    """The program could not be started; ``code`` is the exit code, the message one sentence."""

    def __init__(self, code: int, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


class Launched:
    """A child that waits for its go byte: ``pid``, and ``listener``, the notification descriptor (ours to close)."""

    __slots__ = ("_channel", "_program", "listener", "pid")

    def __init__(self, pid: int, listener: int, channel: socket.socket, program: str) -> None:
        self.pid = pid
        self.listener = listener
        self._channel = channel
        self._program = program

    def go(self) -> None:
        """Lets the child execute the program; the supervisor must be answering in another thread by now.

        Returns when the program has been executed (or the child was killed); LaunchError 126 or 127 when it cannot
        be."""
        self.begin()
        try:
            report = self._channel.recv(REPORT.size)
        except OSError:
            report = b""
        self._channel.close()
        if len(report) == REPORT.size:
            raise _exec_error(self._program, REPORT.unpack(report)[1])

    def begin(self) -> None:
        """The child goes on; nobody need wait for what comes of it (:meth:`forget`)."""
        with contextlib.suppress(OSError):  # it has died: what waits for it will see
            self._channel.send(b"g")

    def forget(self) -> None:
        """Closes our end of the talk with the child; the listener stays."""
        self._channel.close()

    def cancel(self) -> None:
        """Ends the child without running anything."""
        os.close(self.listener)
        self._channel.close()


def _exec_error(program: str, number: int) -> LaunchError:
    code = EXIT_NOT_FOUND if number == errno.ENOENT else EXIT_NOT_EXECUTABLE
    return LaunchError(code, f"cannot run {program!r}: {os.strerror(number)}")


def start(
    argv: Sequence[str],
    program_filter: bytes,
    *,
    env: Mapping[str, str] | None = None,
    signal_mask: set[int] | None = None,
    die_with_parent: bool = False,
    traceable: bool = False,
) -> Launched:
    """Forks a child that has installed ``program_filter`` and waits; LaunchError 125 when it cannot be installed.

    ``signal_mask`` is the mask the program starts with (default: the caller's). ``die_with_parent``: the program is
    killed should the calling thread end first. ``traceable``: under Yama's ptrace_scope 1, who is no ancestor may look
    into the program all the same."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        _child(argv, program_filter, env, signal_mask, parent if die_with_parent else 0, traceable, theirs)
    theirs.close()
    report, ancillary, _, _ = ours.recvmsg(REPORT.size, socket.CMSG_SPACE(4))
    listener = -1
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            listener = int.from_bytes(data[:4], "little")
    if listener >= 0 and report[:1] == STEP_READY:
        os.set_inheritable(listener, False)
        return Launched(pid, listener, ours, argv[0])
    ours.close()
    os.waitpid(pid, 0)
    step, number = REPORT.unpack(report) if len(report) == REPORT.size else (b"", 0)
    raise LaunchError(EXIT_SUPERVISOR, why_not(step, number))


def why_not(step: bytes, number: int) -> str:
    """Why the child could not install the filter, as a sentence."""
    if step == STEP_SECCOMP:
        if number == errno.EBUSY:
            return (
                "the seccomp filter cannot be installed: this process already runs under a supervisor of its own "
                "(a nested `iommufd run`, or a sandbox), and the kernel allows one"
            )
        if number == errno.EINVAL:
            return (
                "the seccomp filter cannot be installed: this kernel lacks user notification with WAIT_KILLABLE_RECV "
                "(Linux 5.19 or later is needed)"
            )
        return f"the seccomp filter cannot be installed: {os.strerror(number)} (try `iommufd doctor`)"
    if step == STEP_PRIVS:
        return f"no_new_privs cannot be set: {os.strerror(number)}"
    return "the child ended before the seccomp filter was installed"


class _FilterProgram(ctypes.Structure):
    """struct sock_fprog { unsigned short len; struct sock_filter *filter; }"""

    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def install(program_filter: bytes) -> int:
    """Installs the filter on the calling thread and returns the listener; OSError as seccomp(2) says."""
    code = ctypes.create_string_buffer(program_filter, len(program_filter))
    program = _FilterProgram(len(program_filter) // 8, ctypes.addressof(code))
    flags = notify.FILTER_FLAG_NEW_LISTENER | notify.FILTER_FLAG_WAIT_KILLABLE_RECV
    return syscall("seccomp", notify.SECCOMP_SET_MODE_FILTER, flags, ctypes.addressof(program))


def _child(
    argv: Sequence[str],
    program_filter: bytes,
    env: Mapping[str, str] | None,
    signal_mask: set[int] | None,
    parent: int,
    traceable: bool,
    channel: socket.socket,
) -> NoReturn:
    step = STEP_PRIVS
    try:
        if parent:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(EXIT_SUPERVISOR)
        if traceable:
            with contextlib.suppress(OSError):  # a kernel without Yama
                prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY)
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        step = STEP_SECCOMP
        listener = install(program_filter)
        step = b""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("=i", listener))]
        channel.sendmsg([REPORT.pack(STEP_READY, 0)], rights)
        os.close(listener)
        if channel.recv(1) != b"g":
            os._exit(EXIT_SUPERVISOR)
        step = STEP_EXEC
        for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them; a program expects the default
            signal.signal(ignored, signal.SIG_DFL)
        if signal_mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, signal_mask)
        _execute(argv, os.environ if env is None else env)
    except OSError as error:
        channel.send(REPORT.pack(step, error.errno or 0))
    except BaseException:  # whatever it was, a second one of us must not run on
        channel.send(REPORT.pack(step, errno.EINVAL))
    os._exit(EXIT_SUPERVISOR)


def _execute(argv: Sequence[str], env: Mapping[str, str]) -> None:
    """execvp(3): a name without a slash is looked up in PATH; a script without an interpreter line runs under sh."""
    program = argv[0]
    if not program:
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    if "/" in program:
        candidates = [program]
    else:
        candidates = [os.path.join(folder or ".", program) for folder in os.get_exec_path(dict(env))]
    refused: OSError | None = None
    for candidate in candidates:
        try:
            os.execve(candidate, list(argv), dict(env))
        except OSError as error:
            if error.errno == errno.ENOEXEC:
                os.execve("/bin/sh", ["sh", candidate, *argv[1:]], dict(env))
            if error.errno == errno.EACCES:
                refused = error
            elif error.errno not in (errno.ENOENT, errno.ENOTDIR) or "/" in program:
                raise
    raise refused or OSError(errno.ENOENT, os.strerror(errno.ENOENT))
