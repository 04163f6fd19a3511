"""Who calls: threads, thread groups, and the address spaces behind them (kernel: task_struct, signal_struct,
mm_struct).

Invariants:

* A thread id is trusted for half a second of activity; then its start time is compared, so that a recycled id is never
  taken for its predecessor. Nobody is recorded who has not touched the machine.
* A thread group's descriptor cache is exact: every call that can change what a number means is trapped first. A
  number a program closed is not cached again until we give it out ourselves (the close itself comes after the trap).
* An AddressSpace belongs to an mm, not to a process: a vfork child shares its parent's, an exec makes a new one.
  Whether an announced exec really happened is told by the 16 random bytes the kernel gives every new program.
* Credentials are the thread's; what may change them drops them.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from iommufd.interpose.caller import INITIAL_USER_NAMESPACE, RemoteTask, memory_of
from iommufd.interpose.libc import pidfd_open, same_vm

if TYPE_CHECKING:
    from iommufd.interpose.carriers import Carrier
    from iommufd.interpose.descriptors import Descriptors
    from iommufd.interpose.listing import Listing
    from iommufd.memory.accounting import Process
    from iommufd.memory.physical import Physical
    from iommufd.memory.space import AddressSpace

AT_RANDOM = 25
MAX_STRANGERS = 4096
GUARD_PIECE = 1 << 20
_AUXV = struct.Struct("=QQ")


class ThreadGroup:
    """A process of the tree that has touched the machine.

    ``files`` maps descriptor numbers to carriers; None there means "look it up each time". ``reserved`` are numbers
    promised to a call in flight, with their close-on-exec flag. ``listings`` are the directories being listed, by
    descriptor. ``exec_marks`` are the random bytes seen when thread ``exec_by`` announced an exec. ``guards`` is where
    guard regions have been installed, whether or not they are there still.
    """

    __slots__ = (
        "_processes",
        "exec_by",
        "exec_marks",
        "exiting",
        "files",
        "guards",
        "listings",
        "pidfd",
        "private_files",
        "process",
        "reserved",
        "space",
        "start",
        "tgid",
        "threads",
    )

    def __init__(self, tgid: int, start: int, processes: Processes) -> None:
        self.tgid = tgid
        self.start = start
        self.files: dict[int, Carrier | None] = {}
        self.reserved: dict[int, bool] = {}
        self.private_files = False
        self.listings: dict[int, Listing] = {}
        self.guards: list[tuple[int, int]] = []
        self.exec_marks: bytes | None = None
        self.exec_by = 0
        self.exiting = False
        self.space: AddressSpace | None = None
        self.process: Process | None = None
        self.threads: dict[int, Thread] = {}
        self._processes = processes
        try:
            self.pidfd = pidfd_open(tgid)
        except OSError:
            self.pidfd = -1  # closed by whoever watches it

    def has_guards(self, start: int, end: int) -> bool:
        """Whether a guard region lies in ``[start, end)``: some was installed there, and the memory cannot be read."""
        space = self.space
        for first, last in self.guards:
            low, high = max(first, start), min(last, end)
            while low < high and space is not None:
                got = len(space.host.peek(low, min(high - low, GUARD_PIECE)))
                if not got:
                    return True
                low += got
        return False

    def need_space(self) -> AddressSpace:
        """The AddressSpace of the group's mm, made when first asked for."""
        space = self.space
        return self._processes.make_space(self) if space is None else space


class Thread:
    """One calling thread. ``files`` is its group's; ``age`` the activity count it was last verified at (-1: verify)."""

    __slots__ = ("_caps", "_euid", "_process", "_uid", "age", "files", "group", "start", "task", "tid")

    def __init__(self, tid: int, start: int, group: ThreadGroup, descriptors: Descriptors) -> None:
        self.tid = tid
        self.start = start
        self.group = group
        self.files = group.files
        self.age = -1
        self._caps = -1
        self._uid = self._euid = -1
        self._process: Process | None = None
        self.task = RemoteTask(self, descriptors)

    def forget_credentials(self) -> None:
        """The thread is about to change them; they are read again when next needed."""
        self._caps = -1
        self._process = None

    def _read_credentials(self) -> None:
        caps = 0
        for line in _read(f"/proc/{self.tid}/status").splitlines():
            if line.startswith(b"Uid:"):
                self._uid, self._euid = (int(word) for word in line.split()[1:3])
            elif line.startswith(b"CapEff:"):
                caps = int(line.split()[1], 16)
        if caps and not in_initial_user_namespace(self.tid):
            caps = 0
        self._caps = caps

    def effective_capabilities(self) -> int:
        """The effective set as a bit mask, empty outside the initial user namespace."""
        if self._caps < 0:
            self._read_credentials()
        return self._caps

    def real_uid(self) -> int:
        if self._caps < 0:
            self._read_credentials()
        return self._uid

    def effective_uid(self) -> int:
        if self._caps < 0:
            self._read_credentials()
        return self._euid

    def need_process(self) -> Process:
        """The accounting Process: the group's limit, the thread's real user."""
        process = self._process
        if process is None or process.space is not self.group.need_space():
            process = self._process = self.group._processes.process_of(self.group, self.real_uid())
        return process


class Processes:
    """All recorded threads and groups. Look-ups of what is there take no lock."""

    def __init__(self, physical: Physical, make_space: Callable[[int, Physical], AddressSpace]) -> None:
        self.threads: dict[int, Thread] = {}
        self.groups: dict[int, ThreadGroup] = {}
        self.closing: dict[int, tuple[Carrier, RemoteTask]] = {}  # by thread; only while somebody watches
        self.activity = 0  # raised every half second of activity by the supervisor's clock
        self.descriptors: Descriptors | None = None
        self.on_new_group: Callable[[ThreadGroup], None] = lambda group: None
        self._strangers: dict[int, int] = {}
        self.physical = physical
        self._new_space = make_space
        self._lock = threading.RLock()

    # ---- looking up

    def thread(self, tid: int) -> Thread:
        """The record of thread ``tid``, made or verified as needed. OSError (ENOENT, ESRCH) when it is gone."""
        thread = self.threads.get(tid)
        if thread is not None:
            if thread.age == self.activity:
                return thread
            if thread.start == start_time(tid):
                thread.age = self.activity
                self._settle_exec(thread)
                return thread
            self._drop_thread(thread)
        return self._new_thread(tid)

    def _new_thread(self, tid: int) -> Thread:
        with self._lock:
            return self._make_thread(tid)

    def _make_thread(self, tid: int) -> Thread:
        tgid = tgid_of(tid)
        group_start = start_time(tgid)
        group = self.groups.get(tgid)
        if group is not None and group.start != group_start:
            self.group_ended(group)
            group = None
        if group is None:
            group = self.groups[tgid] = ThreadGroup(tgid, group_start, self)
            parent = self.groups.get(status_field(tgid, b"PPid"))
            if parent is not None:
                group.guards = list(parent.guards)
            self.on_new_group(group)
        assert self.descriptors is not None
        thread = Thread(tid, start_time(tid), group, self.descriptors)
        thread.age = self.activity
        self.threads[tid] = group.threads[tid] = thread
        self._settle_exec(thread)
        return thread

    def known(self, tid: int) -> Thread | None:
        """The record of ``tid`` if its address space may matter to us, None for a stranger (who stays unrecorded).

        A new thread of a recorded group and a process that shares a recorded address space are no strangers."""
        if tid in self.threads:
            return self.thread(tid)
        if not self.groups or self._strangers.get(tid) == self.activity:
            return None
        if tgid_of(tid) in self.groups:
            return self.thread(tid)
        for group in list(self.groups.values()):
            if group.space is not None and not group.exiting and same_vm(tid, group.tgid):
                thread = self.thread(tid)
                thread.group.space = group.space
                return thread
        if len(self._strangers) > MAX_STRANGERS:
            self._strangers.clear()
        self._strangers[tid] = self.activity
        return None

    def tgid_of(self, tid: int) -> int:
        """The thread group of ``tid``, recorded or not. OSError when it is gone."""
        thread = self.threads.get(tid)
        return thread.group.tgid if thread is not None and thread.age == self.activity else tgid_of(tid)

    def _drop_thread(self, thread: Thread) -> None:
        self.threads.pop(thread.tid, None)
        thread.group.threads.pop(thread.tid, None)

    def prune(self) -> None:
        """Drops the records of threads that have ended."""
        for tid, thread in list(self.threads.items()):
            if not os.access(f"/proc/{tid}", os.F_OK):
                self._drop_thread(thread)

    # ---- address spaces

    def make_space(self, group: ThreadGroup) -> AddressSpace:
        """Gives ``group`` the AddressSpace it shares with another recorded group, else a new one."""
        with self._lock:
            if group.space is not None:
                return group.space
            for other in self.groups.values():
                space = other.space
                if other is not group and space is not None and space.alive and same_vm(group.tgid, other.tgid):
                    group.space = space
                    return space
            made = group.space = self._new_space(group.tgid, self.physical)
            made.guard_check = group.has_guards
            return made

    def process_of(self, group: ThreadGroup, uid: int) -> Process:
        """The group's accounting Process for ``uid`` (one object while user and address space stay)."""
        from iommufd.memory.accounting import Process

        user, space = self.physical.user(uid), group.need_space()
        process = group.process
        if process is None or process.user is not user or process.space is not space:
            process = group.process = Process(group.tgid, user, space)
        return process

    def sharers(self, space: AddressSpace) -> list[ThreadGroup]:
        """The recorded groups that use ``space`` and are not on their way out."""
        return [g for g in list(self.groups.values()) if g.space is space and not g.exiting]

    # ---- exec and exit

    def exec_announced(self, thread: Thread) -> None:
        """The thread calls execve: nothing cached about its group's descriptors or threads is trusted any more."""
        group = thread.group
        if group.exec_marks is None:
            group.exec_marks = random_marks(thread.tid)
            group.exec_by = thread.tid
        group.files.clear()
        group.listings.clear()
        for other in list(group.threads.values()):
            other.age = -1

    def _settle_exec(self, thread: Thread) -> None:
        group = thread.group
        if group.exec_marks is None:
            return
        if random_marks(thread.tid) == group.exec_marks:
            # Not (yet): while another thread of the group is in execve the marks stay, and so does the doubt.
            if thread.tid == group.exec_by:
                group.exec_marks = None
            else:
                thread.age = -1
            return
        group.exec_marks = None
        group.guards.clear()
        self._leave_space(group)
        for other in list(group.threads.values()):
            if other is not thread:
                self._drop_thread(other)
        thread.forget_credentials()

    def _leave_space(self, group: ThreadGroup) -> None:
        space, group.space = group.space, None
        group.process = None
        if space is not None and not self.sharers(space):
            space.gone()

    def exit_announced(self, thread: Thread) -> None:
        """The thread calls exit_group: its group is on its way out."""
        thread.group.exiting = True

    def group_ended(self, group: ThreadGroup) -> None:
        """The process is gone (or its number is somebody else's): forgets it."""
        with self._lock:
            if self.groups.get(group.tgid) is group:
                del self.groups[group.tgid]
            group.exiting = True
        for thread in list(group.threads.values()):
            self._drop_thread(thread)
        self._leave_space(group)

    # ---- descriptors

    def number_closed(self, fd: int) -> None:
        """Some process closes, or puts something else at, number ``fd``; tables may be shared, so all forget it."""
        for group in list(self.groups.values()):
            if fd in group.files:
                group.files[fd] = None
            group.listings.pop(fd, None)

    def tables_unshared(self, tid: int) -> None:
        """A thread gets a descriptor table of its own: its group's numbers no longer mean one thing."""
        group = self.thread(tid).group
        group.private_files = True
        group.files.clear()

    def closer(self, carrier: Carrier) -> RemoteTask | None:
        """Who has just closed the descriptor that was the carrier's last; None when it went with its process."""
        return next((task for closed, task in list(self.closing.values()) if closed is carrier), None)

    def carrier_released(self, carrier: Carrier) -> None:
        """The carrier is gone: no number names it."""
        for group in list(self.groups.values()):
            for fd, cached in list(group.files.items()):
                if cached is carrier:
                    group.files[fd] = None


def _read(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read()


def status_field(tid: int, name: bytes) -> int:
    """A number in /proc/TID/status. OSError when the thread is gone."""
    status = _read(f"/proc/{tid}/status")
    at = status.index(b"\n" + name + b":") + len(name) + 2
    return int(status[at : status.index(b"\n", at)])


def tgid_of(tid: int) -> int:
    """The thread group of a thread. OSError when it is gone."""
    return status_field(tid, b"Tgid")


def start_time(pid: int) -> int:
    """Field 22 of /proc/PID/stat: with the number itself it names one thread for ever. OSError when it is gone."""
    return int(_read(f"/proc/{pid}/stat").rpartition(b")")[2].split()[19])


def in_initial_user_namespace(tid: int) -> bool:
    """Whether the thread's capabilities count in the initial user namespace."""
    try:
        return os.stat(f"/proc/{tid}/ns/user").st_ino == INITIAL_USER_NAMESPACE
    except OSError:
        return False


def random_marks(tid: int) -> bytes:
    """The 16 random bytes of the thread's present program (auxv AT_RANDOM), b"" when they cannot be read."""
    with contextlib.suppress(OSError):  # gone, or closed to us
        auxv = _read(f"/proc/{tid}/auxv")
        for at in range(0, len(auxv) - 15, 16):
            key, value = _AUXV.unpack_from(auxv, at)
            if key == AT_RANDOM:
                return memory_of(tid).read_upto(value, 16)
    return b""
