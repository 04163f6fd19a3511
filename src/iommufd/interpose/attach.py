"""Other process trees on a running machine: a socket at which they ask, and the asking.

``iommufd run --listen SOCKET`` (or ``machine.listen(path)``) opens a :class:`Door`; ``iommufd run --attach SOCKET``
starts a program under a filter of its own and hands the filter's listener over, so that the machine's supervisor serves
both trees. Invariants:

* One connection a tree. The asker sends one message (JSON, with the listener beside it as SCM_RIGHTS) and gets one
  answer, ``{"machine": NAME}`` or ``{"error": SENTENCE}``; then the connection only tells that the other end is alive.
* The socket is open to its owner only, and the door checks who asks: the user we are, unless we are root.
* The machine goes with the process it lives in. The askers then end their programs, whose calls nobody can answer.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import select
import signal
import socket
import stat
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeAlias

from iommufd.interpose.children import GRACE_SECONDS, Children, signal_all
from iommufd.interpose.filter import compile_filter
from iommufd.interpose.launch import EXIT_SUPERVISOR, LaunchError, start
from iommufd.interpose.notify import ID_VALID
from iommufd.interpose.realm import Realm, realm_of
from iommufd.interpose.session import check_host, own_range
from iommufd.interpose.supervisor import Supervisor
from iommufd.interpose.syscalls import HOST

if TYPE_CHECKING:
    from iommufd.machine.machine import Machine

PROTOCOL = 1
MESSAGE = 1 << 16
LONGEST_PATH = 107
ASK_SECONDS = 10.0
PTRACE_SCOPE = Path("/proc/sys/kernel/yama/ptrace_scope")

Message: TypeAlias = dict[str, Any]
"""What one end tells the other, as :mod:`json` has it; neither end believes that members are there."""

_CREDENTIALS = struct.Struct("=iII")  # struct ucred: pid, uid, gid


# ------------------------------------------------------------------------------------------------------- the machine's


class Door:
    """The socket ``path``, at which other trees join ``machine``; see :meth:`~iommufd.machine.machine.Machine.listen`.

    :meth:`close` (or the end of a ``with`` block) removes the socket; trees that have joined stay until the machine is
    closed. OSError EADDRINUSE when somebody listens there, or there is something that is no socket."""

    def __init__(self, machine: Machine, path: str | os.PathLike[str], *, realm: Realm | None = None) -> None:
        self.path = os.path.abspath(os.fspath(path))
        self.machine = machine
        self._realm = realm if realm is not None else realm_of(machine)
        self._connections: set[socket.socket] = set()
        self._closed = False
        self._socket = _bind(self.path)
        self._inode = os.stat(self.path).st_ino
        threading.Thread(target=self._accept, name="door", daemon=True).start()
        machine.on_close(self.close)

    def refuse_more(self) -> None:
        """Removes the socket: nobody else can join; those who have, stay."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(OSError):  # somebody else has removed it
            if os.stat(self.path).st_ino == self._inode:
                os.unlink(self.path)
        with contextlib.suppress(OSError):  # nobody was connecting
            self._socket.shutdown(socket.SHUT_RDWR)  # ends accept
        self._socket.close()

    def close(self) -> None:
        """Removes the socket and takes leave of everybody who joined through it."""
        self.refuse_more()
        for connection in list(self._connections):
            with contextlib.suppress(OSError):  # the other end was faster
                connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                connection = self._socket.accept()[0]
            except OSError:
                return
            self._connections.add(connection)
            threading.Thread(target=self._serve, args=(connection,), name="tree", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        """One tree, from its asking to its end."""
        try:
            with connection:
                try:
                    tree = self._admit(connection)
                except _Refused as refused:
                    _send(connection, {"error": str(refused)})
                    return
                connection.settimeout(None)
                with contextlib.suppress(OSError):  # it is gone already
                    _send(connection, {"machine": self.machine.name})
                with contextlib.suppress(OSError):  # an end all the same
                    connection.recv(1)  # until the other end is gone
                tree.roots = ()
                while not self._realm.closed and not tree.over.wait(0.2) and not tree.listener.over():
                    pass  # a killed launcher's program may live on for a moment, its orphans for longer
                tree.finish()
        except OSError:  # the other end is gone, and with it what there was to tell
            pass
        finally:
            self._connections.discard(connection)

    def _admit(self, connection: socket.socket) -> Supervisor:
        pid, uid, _ = _CREDENTIALS.unpack(
            connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        )
        connection.settimeout(ASK_SECONDS)
        message, listener = _receive(connection)  # read in any case: an answer with something unread would be lost
        try:
            if uid != os.geteuid() and os.geteuid() != 0:
                raise _Refused(f"the machine belongs to user {os.geteuid()}; user {uid} cannot join it")
            if pid == 0:
                raise _Refused("you are in another PID namespace; the machine cannot see your processes")
            if message.get("protocol") != PROTOCOL:
                theirs = message.get("protocol")
                raise _Refused(f"the machine speaks version {PROTOCOL} of this protocol, you {theirs!r}")
            if message.get("arch") != HOST.name:
                raise _Refused("your program's architecture is not the machine's")
            base, top = message.get("base"), message.get("top")
            if not isinstance(base, int) or not isinstance(top, int) or not 0 <= base <= top <= 1 << 20:
                raise _Refused("the message names no descriptors")
            if not _is_listener(listener):
                raise _Refused("what came with the message is no seccomp listener")
            if self._realm.closed or self._closed:
                raise _Refused("the machine is about to end")
            tree = Supervisor(self.machine, listener, base, top, realm=self._realm, roots=(pid,))
        except OSError as error:
            os.close(listener)
            raise _Refused(f"the machine can serve no further program: {error.strerror}") from None
        except _Refused:
            if listener >= 0:
                os.close(listener)
            raise
        tree.start()
        return tree


class _Refused(Exception):
    """The asker is told this sentence."""


def _bind(path: str) -> socket.socket:
    _check_length(path)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        os.fchmod(made.fileno(), 0o600)  # before anybody can see it
        try:
            made.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not _is_stale(path):
                raise
            os.unlink(path)
            made.bind(path)
        made.listen(16)
    except BaseException as error:
        made.close()
        if isinstance(error, OSError):
            raise type(error)(error.errno, _why_not_bound(path, error), path) from None
        raise
    return made


def _why_not_bound(path: str, error: OSError) -> str:
    if error.errno != errno.EADDRINUSE:
        return error.strerror or "no reason given"
    if stat.S_ISSOCK(os.lstat(path).st_mode):
        return "a machine listens there already"
    return "there is a file of that name, and it is no socket"


def _is_stale(path: str) -> bool:
    """Whether ``path`` is a socket that nobody serves any more."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
            probe.connect(path)
    except OSError as error:
        return error.errno == errno.ECONNREFUSED
    return False


def _check_length(path: str) -> None:
    if len(os.fsencode(path)) > LONGEST_PATH:
        raise OSError(errno.ENAMETOOLONG, f"the path of a socket has at most {LONGEST_PATH} bytes", path)


def _is_listener(fd: int) -> bool:
    """Whether ``fd`` is the descriptor of a seccomp filter with user notification."""
    try:
        fcntl.ioctl(fd, ID_VALID, bytes(8))
    except (OSError, ValueError) as error:
        return isinstance(error, OSError) and error.errno == errno.ENOENT
    return True


def _send(connection: socket.socket, message: Message, descriptors: Sequence[int] = ()) -> None:
    data = json.dumps(message).encode()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"={len(descriptors)}i", *descriptors))]
    connection.sendmsg([data], rights if descriptors else [], socket.MSG_NOSIGNAL)


def _receive(connection: socket.socket) -> tuple[Message, int]:
    """The message and the descriptor beside it (-1: none); what is no message is refused."""
    try:
        data, descriptors, _, _ = socket.recv_fds(connection, MESSAGE, 4)
    except TimeoutError:
        raise _Refused(f"no message came within {ASK_SECONDS:.0f} seconds") from None
    for fd in descriptors[1:]:
        os.close(fd)
    fd = descriptors[0] if descriptors else -1
    if fd >= 0:
        os.set_inheritable(fd, False)
    try:
        message = json.loads(data)
    except ValueError:
        message = None
    if not isinstance(message, dict):
        if fd >= 0:
            os.close(fd)
        raise _Refused("that is no message of `iommufd run --attach`")
    return message, fd


# --------------------------------------------------------------------------------------------------------- the asker's


def attach(path: str, argv: Sequence[str], *, pin_tracking: bool = True, env: Mapping[str, str] | None = None) -> int:
    """Runs ``argv`` on the machine that listens at ``path``; its wait status when nobody of its tree is left.

    Call it in the main thread. LaunchError with the exit code and one sentence when that cannot be."""
    check_host()
    base, top = own_range()
    program = compile_filter(base, top, pin_tracking=pin_tracking)
    connection = _connect(path)
    children = Children()
    try:
        launched = start(
            argv, program, env=env, signal_mask=children.mask_before, die_with_parent=True, traceable=_yama() == 1
        )
        ask = {"protocol": PROTOCOL, "arch": HOST.name, "base": base, "top": top}
        try:
            _send(connection, ask, [launched.listener])
            answer = _answer(connection, path)
        except (OSError, LaunchError) as error:
            launched.cancel()
            children.wait(launched.pid)
            if isinstance(error, LaunchError):
                raise
            raise LaunchError(EXIT_SUPERVISOR, f"the machine at {path!r} does not answer: {error.strerror}") from None
        os.close(launched.listener)  # a copy of ours would keep calls waiting when the machine is gone
        _warn_of_yama(answer)
        over = threading.Event()
        watch = threading.Thread(target=_watch, args=(connection, path, over), name="watch", daemon=True)
        watch.start()
        try:
            launched.go()
        except BaseException:
            children.wait(launched.pid)
            raise
        status = children.wait(launched.pid)
        over.set()
        return status
    finally:
        connection.close()
        children.restore()


def _connect(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        _check_length(path)
        connection.connect(path)
    except OSError as error:
        connection.close()
        raise LaunchError(EXIT_SUPERVISOR, _why_not_connected(path, error)) from None
    return connection


def _why_not_connected(path: str, error: OSError) -> str:
    with contextlib.suppress(OSError):  # then `error` says why
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return f"{path!r} is no socket"
    if error.errno in (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTDIR):
        return f"no machine listens at {path!r} (any more); start one with `iommufd run --listen {path} -- PROGRAM`"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"the machine at {path!r} belongs to another user"
    if error.errno == errno.EPROTOTYPE:
        return f"{path!r} is the socket of something else"
    return f"{path!r} cannot be reached: {error.strerror}"


def _answer(connection: socket.socket, path: str) -> Message:
    connection.settimeout(2 * ASK_SECONDS)
    data = connection.recv(MESSAGE)
    connection.settimeout(None)
    if not data:
        raise LaunchError(EXIT_SUPERVISOR, f"the machine at {path!r} went away")
    try:
        answer = json.loads(data)
        error = answer.get("error")
    except (ValueError, AttributeError):
        raise LaunchError(EXIT_SUPERVISOR, f"what listens at {path!r} is no machine") from None
    if error is not None:
        raise LaunchError(EXIT_SUPERVISOR, f"the machine at {path!r} refuses: {error}")
    assert isinstance(answer, dict)
    return answer


def _watch(connection: socket.socket, path: str, over: threading.Event) -> None:
    """Ends the program when the machine is gone: nobody could answer its calls any more."""
    poller = select.poll()
    poller.register(connection.fileno(), select.POLLIN)
    poller.poll()
    if over.is_set():
        return
    _say(f"the machine at {path!r} is gone; the program ends with it")
    signal_all(signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    if not over.is_set():
        signal_all(signal.SIGKILL)


def _yama() -> int:
    """kernel.yama.ptrace_scope; 0 where there is none, or we are root."""
    with contextlib.suppress(OSError, ValueError):  # a kernel without Yama
        return int(PTRACE_SCOPE.read_text()) if os.geteuid() else 0
    return 0


def _warn_of_yama(answer: Message) -> None:
    """From 1 on, the machine may not look into processes that are not its descendants and did not ask for it."""
    scope = _yama()
    if scope:
        who = "processes that this program starts" if scope == 1 else "this program"
        _say(
            f"kernel.yama.ptrace_scope is {scope}: machine {answer.get('machine')!r} may not read the memory of {who}, "
            "whose calls will fail with EFAULT; set it to 0, or run the machine as root"
        )


def _say(sentence: str) -> None:
    import sys

    with contextlib.suppress(OSError, ValueError):  # standard error may be closed
        print(f"iommufd: {sentence}", file=sys.stderr, flush=True)
