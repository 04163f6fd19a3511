"""The supervisor's loop: receives each trapped call, finds who answers it, sends the answer (kernel: the system call
entry).

Invariants:

* One thread, the leader, receives at a time, because back-to-back calls are fastest on one thread. When a call keeps
  it for more than a tick, another thread becomes the leader; the old one sends its answer and ends. So no call,
  however long, stops another program.
* Releases reported by then are performed before a call is looked at: what a process closed is gone before its next
  call.
* One Supervisor a tree, with a listener of its own; what trees share is their :class:`~.realm.Realm`.
* Every call is answered, whatever happens here: an exception that is no KernelError is reported in one line and
  answered EIO. (A supervisor that is gone makes every trapped call ENOSYS.)
* An answer that is not there yet is a Pending; it is sent when it completes and dropped when its caller is killed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from iommufd.engine.file import Pending
from iommufd.errors import KernelError
from iommufd.interpose.calltable import PATH_CALLS, handlers
from iommufd.interpose.carriers import FIONREAD
from iommufd.interpose.children import descendants
from iommufd.interpose.credentials import Credentials
from iommufd.interpose.descriptors import Descriptors
from iommufd.interpose.filecalls import FileCalls
from iommufd.interpose.notify import NOTIF, NOTIF_SIZE, RECV, RESP, RESP_SIZE, SEND, Gone, Listener
from iommufd.interpose.pathcalls import PathCalls
from iommufd.interpose.paths import Resolver
from iommufd.interpose.processes import Processes, ThreadGroup
from iommufd.interpose.syscalls import HOST, name_of
from iommufd.interpose.trap import ANSWERED, PROCEED, Trap, fd_of
from iommufd.interpose.unmaps import Unmaps

if TYPE_CHECKING:
    from iommufd.interpose.realm import Realm
    from iommufd.interpose.trap import Answered, Proceed
    from iommufd.machine.machine import Machine
    from iommufd.memory.physical import Physical
    from iommufd.memory.space import AddressSpace

TICK_SECONDS = 0.02
JOIN_SECONDS = 0.5
TICKS_PER_ACTIVITY = 25
DORMANT_TICKS = 25
PENDING_TICKS = 5
MANY_THREADS = 512


class Worker:
    """A thread that receives or has received. ``call``: the notification it serves, negative when it has served it."""

    __slots__ = ("call", "thread")

    def __init__(self) -> None:
        self.call = 0
        self.thread: threading.Thread | None = None


class Supervisor:
    """Serves one tree of processes on one machine. ``listener`` becomes the supervisor's; ``base, top`` are the
    filter's.

    ``roots`` are the processes from which the tree descends, or ``()`` once they are gone; ``ours`` says that the tree
    ends with the realm. ``over`` is set when nobody is left under the filter."""

    def __init__(
        self,
        machine: Machine,
        listener: int,
        base: int,
        top: int,
        *,
        realm: Realm,
        roots: Iterable[int],
        ours: bool = False,
        make_space: Callable[[int, Physical], AddressSpace] | None = None,
    ) -> None:
        self.machine = machine
        self.realm = realm
        self.roots = tuple(roots)
        self.ours = ours
        self.over = threading.Event()
        self.listener = Listener(listener)
        self.listener.set_sync_wake_up()
        physical = machine.world.physical
        self.processes = Processes(physical, make_space or new_space)
        self.carriers = realm.carriers
        self.descriptors = Descriptors(self.listener, self.carriers, physical, base, top, machine.world.granted)
        self.processes.descriptors = self.descriptors
        self.processes.on_new_group = self._watch_group
        self.resolver = Resolver(machine, self.descriptors)
        self.unmaps = Unmaps(self.processes, self.listener, realm.members)
        self._handlers = handlers(
            FileCalls(machine.world, self.processes, self.descriptors, self.resolver, realm.mappings),
            PathCalls(machine, self.processes, self.descriptors, self.carriers, self.resolver),
            Credentials(self.processes, self.resolver),
            self.unmaps,
        )
        self._leader = Worker()
        self._pendings: dict[int, Pending] = {}
        self._new_groups: list[ThreadGroup] = []
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._dormant = False
        self._done = False
        self._finishing = threading.Lock()
        self._finished = False
        self._clock_thread: threading.Thread | None = None
        realm.join(self)

    # ---- life

    def start(self) -> None:
        """Begins to answer, in threads of its own."""
        self._clock_thread = threading.Thread(target=self._clock, name="clock", daemon=True)
        self._clock_thread.start()
        self._start_leader(self._leader)

    def finish(self) -> None:
        """Call it when no process of the tree is left: performs the last releases and gives everything back."""
        with self._finishing:
            if not self._finished:
                self._end()
                self._finished = True

    def _end(self) -> None:
        self._done = True
        self._kick()
        leader = self._leader.thread
        for thread in (leader, self._clock_thread):
            if thread is not None:
                thread.join(JOIN_SECONDS)
        if leader is not None and leader.is_alive():
            interrupt(leader)  # before some Linux 6.x, RECV waits on when nobody is left
            leader.join(JOIN_SECONDS)
        for thread in threading.enumerate():
            if thread.name == "aside":
                thread.join(JOIN_SECONDS)
        for pending in list(self._pendings.values()):
            pending.drop()
        if self.listener.over():
            self._await_exits()
        self._drain()
        for group in list(self.processes.groups.values()):
            self.processes.group_ended(group)
            close_pidfd(group)
        if leader is None or not leader.is_alive():
            self.listener.close()
        os.close(self._wake)
        self.realm.leave(self)

    def _await_exits(self) -> None:
        """A task leaves its filter early in its exit, before it closes its files; a pidfd tells when it has."""
        deadline = time.monotonic() + JOIN_SECONDS
        for group in list(self.processes.groups.values()):
            if group.pidfd >= 0:
                poller = select.poll()
                poller.register(group.pidfd, select.POLLIN)
                poller.poll(max(deadline - time.monotonic(), 0) * 1000)

    def members(self) -> list[int]:
        """Every living process that may be in the tree, and some that are not."""
        own = {*self.roots, *self.processes.groups}
        return [pid for pid in {*own, *descendants(own)} if pid != os.getpid()] if own else []

    def kill(self) -> None:
        """SIGKILL for every process of the tree."""
        for _ in range(2):  # once more for those forked meanwhile
            for pid in self.members():
                with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended, or is not ours
                    os.kill(pid, signal.SIGKILL)

    def _start_leader(self, worker: Worker) -> None:
        worker.thread = threading.Thread(target=self._lead, args=(worker,), name="leader", daemon=True)
        worker.thread.start()

    def _lead(self, worker: Worker) -> None:
        """The loop, again and again should it fail outside what it catches by itself."""
        while True:
            try:
                self._serve(worker)
                return
            except Exception as error:
                report("internal error in the supervisor's loop", error)
                if worker.call > 0:
                    self._send(worker.call, -errno.EIO)

    # ---- the loop

    def _serve(self, worker: Worker) -> None:
        ioctl = fcntl.ioctl
        carriers = self.carriers
        fd, inotify = self.listener.fd, carriers.inotify
        buffer, zeroes = bytearray(NOTIF_SIZE), bytes(NOTIF_SIZE)
        queued, nothing = bytearray(4), bytes(4)
        response = bytearray(RESP_SIZE)
        unpack, pack_into = NOTIF.unpack, RESP.pack_into
        processes, unmaps = self.processes, self.unmaps
        threads = processes.threads
        instruments = self.machine.world.instruments
        nr_ioctl = HOST.numbers["ioctl"]
        while True:
            buffer[:] = zeroes
            try:
                ioctl(fd, RECV, buffer)
            except OSError as error:
                if self._stop_after(error):
                    return
                continue
            number, tid, _, nr, _, _, a0, a1, a2, a3, a4, a5 = unpack(buffer)
            worker.call = number
            if self._dormant:
                self._kick()
            ioctl(inotify, FIONREAD, queued)
            if queued != nothing or carriers.draining:
                self._drain()
            if unmaps.moving:
                unmaps.settle()
            if nr == nr_ioctl and a1 >> 8 == 0x3B:  # the way of nearly all calls, in one piece
                thread = threads.get(tid)
                if thread is not None and thread.age == processes.activity:
                    carrier = thread.files.get(a0)
                    if carrier is not None and not carrier.mapped and not instruments:
                        task = thread.task
                        task.notification = number
                        try:
                            result = carrier.file.ioctl(task, a1, a2)
                            if result.__class__ is int:
                                pack_into(response, 0, number, result, 0, 0)
                                ioctl(fd, SEND, response)
                            else:
                                self._finish(number, result)
                        except KernelError as error:
                            self._send(number, -error.errno)
                        except OSError as error:
                            self._sent_or_failed(error, number, tid, nr)
                        except Exception as error:
                            self._broken(error, number, tid, nr)
                        worker.call = -number
                        if self._leader is not worker:
                            return
                        continue
            self._handle(Trap(number, tid, nr, (a0, a1, a2, a3, a4, a5)))
            worker.call = -number
            if self._leader is not worker:
                return

    def _stop_after(self, error: OSError) -> bool:
        """Whether a failed RECV is the end; a caller killed meanwhile (ENOENT) and a signal (EINTR) are not."""
        if self._done or error.errno not in (errno.ENOENT, errno.EINTR):
            return True
        return error.errno == errno.ENOENT and self.listener.over()

    def _handle(self, trap: Trap) -> None:
        """Any call but the hot one: finds the handler and sends what it says."""
        if self.processes.closing:  # what that thread closed has been released by now, or is not going to be
            self.processes.closing.pop(trap.tid, None)
        try:
            handler = self._handlers.get(trap.nr)
            result = PROCEED if handler is None else handler(trap)
            if result is not ANSWERED:
                self._finish(trap.number, result)
        except KernelError as error:
            if self.machine.world.instruments and not error.told:
                self._tell_refused(trap, error)
            self._send(trap.number, -error.errno)
        except Gone:  # killed: nobody waits for the answer
            pass
        except OSError as error:
            self._sent_or_failed(error, trap.number, trap.tid, trap.nr)
        except Exception as error:
            self._broken(error, trap.number, trap.tid, trap.nr)

    def _tell_refused(self, trap: Trap, error: KernelError) -> None:
        """A call that fails without having reached a File: lseek, access, a read of what is open for writing."""
        name = name_of(trap.nr)
        task = self.processes.thread(trap.tid).task
        task.fd = None if name in PATH_CALLS and name != "fstat" else fd_of(trap.args[0])
        self.machine.world.event("refused", task=task, call=name, error=error)

    def _finish(self, number: int, result: int | Pending | Proceed | Answered) -> None:
        try:
            if isinstance(result, Pending):
                self._pendings[number] = result
                result.then(lambda pending: self._completed(number, pending))
            elif result is PROCEED:
                self.listener.proceed(number)
            else:
                assert isinstance(result, int)
                self.listener.answer(number, result)
        except Gone:  # killed, as above
            pass

    def _completed(self, number: int, pending: Pending) -> None:
        self._pendings.pop(number, None)
        if pending.error is not None:
            self._send(number, -pending.error.errno)
        else:
            self._send(number, pending.result or 0)

    def _send(self, number: int, value: int) -> None:
        with contextlib.suppress(Gone, OSError):  # the caller may have been killed
            self.listener.answer(number, value)

    def _sent_or_failed(self, error: OSError, number: int, tid: int, nr: int) -> None:
        """An OSError in the middle of a call: its caller was killed, or it is a fault of ours."""
        if self.listener.valid(number):
            self._broken(error, number, tid, nr)

    def _broken(self, error: Exception, number: int, tid: int, nr: int) -> None:
        report(f"internal error in {name_of(nr)} of process {tid}, answered EIO", error)
        self._send(number, -errno.EIO)

    def _drain(self) -> None:
        try:
            self.carriers.drain()
        except Exception as error:
            report("internal error while a file was released", error)

    # ---- the clock: everything that is not an answer

    def _kick(self) -> None:
        self._dormant = False
        with contextlib.suppress(OSError):  # full, so it is awake; or closed, so it has ended
            os.eventfd_write(self._wake, 1)

    def _watch_group(self, group: ThreadGroup) -> None:
        self._new_groups.append(group)
        self._kick()

    def _clock(self) -> None:
        poller = select.poll()
        poller.register(self.listener.fd, 0)
        poller.register(self._wake, select.POLLIN)
        groups: dict[int, ThreadGroup] = {}
        ticks, quiet, last = 0, 0, 0
        last_tick = time.monotonic()
        inotify = self.carriers.inotify
        while not self._done:
            dormant = self._dormant
            if dormant:
                poller.register(inotify, select.POLLIN)
            events = poller.poll(None if dormant else TICK_SECONDS * 1000)
            if dormant:
                poller.unregister(inotify)
            for fd, event in events:
                if fd == self._wake:
                    with contextlib.suppress(BlockingIOError):  # its end took it meanwhile
                        os.eventfd_read(self._wake)
                    if dormant:
                        self.processes.activity += 1
                        ticks = quiet = 0
                elif fd == inotify:
                    self._dormant = False
                    self._aside(self._drain)
                elif fd in groups:
                    poller.unregister(fd)
                    self._aside(self._group_ended, groups.pop(fd))
                elif event & select.POLLHUP:  # nobody is left under the filter
                    poller.unregister(fd)
                    self.over.set()
            while self._new_groups:
                group = self._new_groups.pop()
                if group.pidfd >= 0:
                    groups[group.pidfd] = group
                    poller.register(group.pidfd, select.POLLIN)
            if self._dormant or (events and time.monotonic() - last_tick < TICK_SECONDS):
                continue
            last_tick = time.monotonic()
            ticks += 1
            call = self._leader.call
            if call > 0 and call == last:
                self._hand_over()
            quiet = quiet + 1 if abs(call) == abs(last) else 0
            last = call
            try:
                self._tick(ticks)
            except Exception as error:
                report("internal error in the clock", error)
            if quiet >= DORMANT_TICKS and call <= 0 and not self._pendings and not self.carriers.doubtful:
                self._dormant = True
                if self._leader.call != call:  # a call came between: its thread may not have seen that we sleep
                    self._dormant = False

    def _tick(self, ticks: int) -> None:
        if self.carriers.doubtful:
            self._aside(self._drain)
        if self._pendings and ticks % PENDING_TICKS == 0:
            for number, pending in list(self._pendings.items()):
                if not self.listener.valid(number) and self._pendings.pop(number, None) is not None:
                    pending.drop()
        if ticks % TICKS_PER_ACTIVITY == 0:
            self.processes.activity += 1
            self.resolver.refresh()
            if len(self.processes.threads) > MANY_THREADS:
                self.processes.prune()

    def _aside(self, work: Callable[..., None], *args: object) -> None:
        """Work that may take long is not the clock's, who must see when a call does."""
        threading.Thread(target=work, args=args, name="aside", daemon=True).start()

    def _hand_over(self) -> None:
        worker = Worker()
        self._leader = worker
        self._start_leader(worker)

    def _group_ended(self, group: ThreadGroup) -> None:
        self._drain()
        try:
            self.processes.group_ended(group)
        except Exception as error:
            report(f"internal error at the end of process {group.tgid}", error)
        close_pidfd(group)


def new_space(tgid: int, physical: Physical) -> AddressSpace:
    """The AddressSpace of a living process."""
    from iommufd.memory.proc import ProcHost
    from iommufd.memory.space import AddressSpace

    return AddressSpace(physical, ProcHost(tgid), f"process {tgid}")


def close_pidfd(group: ThreadGroup) -> None:
    if group.pidfd >= 0:
        os.close(group.pidfd)
        group.pidfd = -1


def interrupt(thread: threading.Thread) -> None:
    """Makes a system call that the thread waits in fail with EINTR. Only the main thread can."""
    if thread.ident is None or threading.current_thread() is not threading.main_thread():
        return
    before = signal.signal(signal.SIGURG, lambda *_: None)
    try:
        signal.pthread_kill(thread.ident, signal.SIGURG)
        thread.join(JOIN_SECONDS)
    finally:
        signal.signal(signal.SIGURG, before)


def report(what: str, error: Exception) -> None:
    """One line for the person who runs us; the traceback too when IOMMUFD_DEBUG is set."""
    with contextlib.suppress(OSError, ValueError):  # standard error may be closed
        print(f"iommufd: {what}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        if os.environ.get("IOMMUFD_DEBUG"):
            import traceback

            traceback.print_exception(error)
