"""The supervisor's place in the process tree: signals passed on, orphans reaped, nobody left behind.

Invariants:

* The main thread does nothing else: it blocks the signals it answers for and waits for them synchronously, so that no
  Python signal handler ever interrupts a thread that serves a call.
* A signal the terminal sends goes to the whole foreground group, so the program has it already; one that a process
  sends to us is passed on.
* We are the tree's subreaper; :meth:`Children.wait` returns when there is no child left, with the status of the
  first one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable

from iommufd.interpose.libc import PR_SET_CHILD_SUBREAPER, prctl

PASSED_ON = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGALRM,
    signal.SIGWINCH,
)
ENDING = frozenset((signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM))
SI_KERNEL = 0x80
GRACE_SECONDS = 1.0


class Children:
    """The tree of one supervised program. Make it before the fork, in the main thread."""

    def __init__(self) -> None:
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        self._watched = {*PASSED_ON, signal.SIGCHLD}
        self.mask_before: set[int] = set(signal.pthread_sigmask(signal.SIG_BLOCK, self._watched))

    def restore(self) -> None:
        """The signal mask as it was."""
        signal.pthread_sigmask(signal.SIG_SETMASK, self.mask_before)

    def wait(self, first: int, ended: Callable[[int], None] = lambda pid: None) -> int:
        """Waits until no child is left and returns the wait status of ``first``; ``ended(pid)`` is called for each
        child.

        Once ``first`` has ended, an ending signal (even one that came before) ends whoever is left: SIGTERM, then
        SIGKILL after a second."""
        status: int | None = None
        ending = False
        deadline = 0.0
        while True:
            while True:
                try:
                    pid, child_status = os.waitpid(-1, os.WNOHANG)
                except ChildProcessError:
                    return 0 if status is None else status
                if pid == 0:
                    break
                ended(pid)
                if pid == first:
                    status = child_status
            if ending and status is not None:
                if not deadline:
                    deadline = time.monotonic() + GRACE_SECONDS
                    signal_all(signal.SIGTERM)
                elif time.monotonic() >= deadline:
                    signal_all(signal.SIGKILL)
            info = signal.sigtimedwait(self._watched, 0.05 if deadline else 3600.0)
            if info is None or info.si_signo == signal.SIGCHLD:
                continue
            if info.si_signo in ENDING:
                ending = True
            if status is None and info.si_code != SI_KERNEL:
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(first, info.si_signo)


def descendants(roots: Iterable[int] = ()) -> list[int]:
    """Every living descendant of ``roots`` (default: of ours), parents before children; zombies included."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):  # it has just ended
                with open(f"/proc/{name}/stat", "rb") as stat:
                    fields = stat.read().rpartition(b")")[2].split()
                children.setdefault(int(fields[1]), []).append(int(name))
    found: list[int] = []
    front = list(roots) or [os.getpid()]
    while front:
        front = [child for parent in front for child in children.pop(parent, ())]
        found += front
    return found


def signal_all(number: int) -> None:
    """Sends a signal to every descendant; a second pass catches those forked meanwhile."""
    for _ in range(2):
        for pid in descendants():
            with contextlib.suppress(ProcessLookupError, PermissionError):  # ended, or not ours to signal
                os.kill(pid, number)


def end_like(status: int) -> int:
    """The exit code that passes ``status`` on; when the program died of a signal, dies of the same one (without a
    core)."""
    if not os.WIFSIGNALED(status):
        return os.WEXITSTATUS(status)
    number = os.WTERMSIG(status)
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError):  # SIGKILL, SIGSTOP: there is nothing to reset
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
    return 128 + number
