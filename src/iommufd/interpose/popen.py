"""Programs run on a machine of this very process: ``machine.popen([...])`` (kernel: one of its processes).

A :class:`Program` is a :class:`subprocess.Popen`; the supervisor that answers its calls is a few threads of this
process. Invariants:

* ``pid``, exit status, pipes, signals and groups are the program's own; nothing stands in between.
* Once :meth:`Program.wait` or :meth:`Program.poll` has told the end, everything the program's exit released on the
  machine has been released. Processes it left behind are served on, until they end or the machine is closed.
* Whatever fails before the program runs leaves no process, no descriptor and no tree behind.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import iommufd
from iommufd.interpose.launch import EXIT_SUPERVISOR, REPORT, STEP_READY, LaunchError, why_not
from iommufd.interpose.realm import realm_of
from iommufd.interpose.session import check_host
from iommufd.interpose.supervisor import Supervisor
from iommufd.interpose.trampoline import FLAGS, READY

if TYPE_CHECKING:
    from iommufd.machine.machine import Machine

Argument = str | bytes | os.PathLike[str]

_CODE = (
    f"import sys; sys.path.insert(0, {str(Path(iommufd.__file__).parent.parent)!r}); "
    "from iommufd.interpose.trampoline import main; main()"
)


def argv_of(args: Argument | Sequence[Argument], shell: bool) -> list[Argument]:
    """The arguments as subprocess understands them. ValueError when there is no program."""
    argv: list[Argument] = [args] if isinstance(args, (str, bytes, os.PathLike)) else list(args)
    if shell:
        argv = ["/bin/sh", "-c", *argv]
    if not argv or not os.fspath(argv[0]):
        raise ValueError("there is no program to run")
    return argv


class Program(subprocess.Popen[Any]):  # Any: text or bytes, as the options say; which they are is subprocess's
    """One program on ``machine``. See :meth:`~iommufd.machine.machine.Machine.popen`."""

    def __init__(
        self,
        machine: Machine,
        args: Argument | Sequence[Argument],
        *,
        pin_tracking: bool = True,
        **options: Any,  # subprocess's own
    ) -> None:
        self._tree: Supervisor | None = None
        self._seen = False
        self.machine = machine
        check_host()
        self._realm = realm_of(machine)
        shell, executable = options.pop("shell", False), options.pop("executable", None)
        argv = argv_of(args, shell)
        if shell and executable is not None:
            argv[0] = executable
        chosen = {
            "pin_tracking": pin_tracking,
            "die_with_parent": threading.current_thread() is threading.main_thread(),  # it is the thread that counts
            "restore_signals": options.get("restore_signals", True),
        }
        flags = "-" + "".join(letter for name, letter in FLAGS.items() if chosen[name])
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            with theirs:
                number = theirs.fileno()
                if options.get("close_fds", True):
                    options["pass_fds"] = (*options.get("pass_fds", ()), number)
                else:
                    theirs.set_inheritable(True)
                program = executable if executable is not None else argv[0]
                command = [sys.executable, "-I", "-S", "-c", _CODE, str(number), flags, program, *argv]
                super().__init__(command, **options)
            self.args = args
            try:
                self._take_over(ours, os.fsdecode(program))
            except BaseException:
                self._abandon()
                raise
        machine.programs.append(self)

    def _take_over(self, channel: socket.socket, program: str) -> None:
        """Receives the filter's listener, serves it, and lets the program begin."""
        message, descriptors, _, _ = socket.recv_fds(channel, READY.size, 1)
        if len(message) != READY.size or not descriptors:
            step, number = REPORT.unpack(message) if len(message) == REPORT.size else (b"", 0)
            raise LaunchError(EXIT_SUPERVISOR, why_not(step, number))
        listener = descriptors[0]
        os.set_inheritable(listener, False)
        step, base, top = READY.unpack(message)
        assert step == STEP_READY
        try:
            tree = Supervisor(self.machine, listener, base, top, realm=self._realm, roots=(self.pid,), ours=True)
        except BaseException as error:
            os.close(listener)
            if isinstance(error, OSError):
                raise LaunchError(EXIT_SUPERVISOR, f"the supervisor cannot be set up: {error}") from None
            raise
        tree.start()
        self._tree = tree
        with contextlib.suppress(OSError):  # it has died: there will be no report
            channel.send(b"g")
        try:
            report = channel.recv(REPORT.size)
        except OSError:
            report = b""
        if len(report) == REPORT.size:
            number = REPORT.unpack(report)[1]
            raise OSError(number, os.strerror(number), program)

    def _abandon(self) -> None:
        with contextlib.suppress(OSError):  # it has ended
            self.kill()
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                stream.close()
        super().wait()
        self._ended()

    # ---- the end

    def wait(self, timeout: float | None = None) -> int:
        code = super().wait(timeout)
        self._ended()
        return code

    def poll(self) -> int | None:
        code = super().poll()
        if code is not None:
            self._ended()
        return code

    def _ended(self) -> None:
        """The program is gone: its releases are performed, and the tree's end when nobody else is in it."""
        if self._seen:
            return
        self._seen = True
        if self in self.machine.programs:
            self.machine.programs.remove(self)
        tree = self._tree
        if tree is None:
            return
        self._realm.settle()
        tree.roots = ()
        if tree.listener.over():
            tree.finish()
        else:
            threading.Thread(target=_finish_when_over, args=(tree,), name="last", daemon=True).start()

    def kill_tree(self) -> None:
        """SIGKILL for the program and every process it started; then waits for the program."""
        if self._tree is not None:
            self._tree.kill()
        self.kill()
        self.wait()


def _finish_when_over(tree: Supervisor) -> None:
    tree.over.wait()
    tree.finish()
