"""Calls that take pages away from addresses, told to the AddressSpace before they happen (kernel: mm/mmap.c, exec,
exit).

Invariants:

* Nothing is done, and one look is all it costs, unless the range has pinned pages.
* Pinned bytes about to go are rescued before the call proceeds. A call the kernel will refuse (unaligned, empty)
  changes nothing. A call it refuses for a reason we cannot see leaves the bytes in the rescue: the device keeps
  them, though the program's page is then another one.
* Where mremap puts a range is known only afterwards: the old and the new map are compared, at once if the kernel is
  quick, else before the next call of anybody.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from iommufd.errors import KernelError
from iommufd.interpose.caller import memory_of
from iommufd.interpose.filter import (
    MADV_DONTNEED,
    MADV_DONTNEED_LOCKED,
    MADV_FREE,
    MADV_GUARD_INSTALL,
    MADV_REMOVE,
    MAP_FIXED,
)
from iommufd.interpose.paths import AT_FDCWD
from iommufd.interpose.trap import ANSWERED, PROCEED, Trap, fd_of

if TYPE_CHECKING:
    from iommufd.interpose.notify import Listener
    from iommufd.interpose.processes import Processes, Thread
    from iommufd.interpose.trap import Answered, Proceed
    from iommufd.memory.files import FileSpace
    from iommufd.memory.space import AddressSpace

PAGE = 4096
MREMAP_MAYMOVE, MREMAP_FIXED, MREMAP_DONTUNMAP = 1, 2, 4
END = 1 << 64
WAIT_SECONDS = 0.005

Ranges = list[tuple[int, int]]


def page_up(addr: int) -> int:
    return (addr + PAGE - 1) & ~(PAGE - 1)


class Moving:
    """An mremap under way whose target is not known: ``before`` is the map as it was."""

    __slots__ = ("before", "length", "new_length", "old", "space", "tid")

    def __init__(self, space: AddressSpace, tid: int, old: int, length: int, new_length: int, before: Ranges) -> None:
        self.space = space
        self.tid = tid
        self.old = old
        self.length = length
        self.new_length = new_length
        self.before = before


class Unmaps:
    """Handlers of the address-space calls."""

    def __init__(self, processes: Processes, listener: Listener, members: Callable[[], Iterable[int]]) -> None:
        self._processes = processes
        self._listener = listener
        self._members = members  # who may hold a file of the machine
        self.moving: list[Moving] = []

    def locate(self, file: FileSpace, members: Iterable[int]) -> None:
        """Lets the address spaces of those ``members`` (of this tree) that map ``file`` know of it: its last known
        mapping goes."""
        dev, inode, _ = file.key
        for pid in members:
            for start, end in shared_mappings(pid, dev, inode):
                with contextlib.suppress(OSError, KernelError):  # gone meanwhile, or unmapped: then it need not know
                    space = self._processes.thread(pid).group.need_space()
                    space.look(start, (end - start) // PAGE)

    def _thread(self, trap: Trap) -> Thread | None:
        """The caller, if its address space has anything pinned."""
        for group in list(self._processes.groups.values()):
            if group.space is not None and group.space.pinned_vm:
                break
        else:
            return None  # nobody's has
        try:
            thread = self._processes.known(trap.tid)
        except OSError:
            return None
        if thread is None or thread.group.space is None or not thread.group.space.pinned_vm:
            return None
        return thread

    def _unmap(self, thread: Thread, start: int, end: int) -> None:
        space = thread.group.space
        if space is not None and start < end <= END and space.has_pins(start, end):
            space.unmap(start, end)

    # ---- unmapping

    def munmap(self, trap: Trap) -> Proceed:
        start, length = trap.args[:2]
        thread = self._thread(trap)
        if thread is not None and not start % PAGE:
            self._unmap(thread, start, page_up(start + length))
        return PROCEED

    def mmap(self, trap: Trap) -> Proceed:
        """Only MAP_FIXED takes pages away."""
        if trap.args[3] & MAP_FIXED:
            return self.munmap(trap)
        return PROCEED

    def shmat(self, trap: Trap) -> Proceed:
        """SHM_REMAP maps over what is there; the segment's size is not known here, so everything from there on counts
        up to the end of what is mapped without a gap."""
        thread = self._thread(trap)
        if thread is not None:
            start = trap.args[1] & ~(PAGE - 1)
            end = start
            for first, last in mapped_ranges(trap.tid):
                if first <= end < last:
                    end = last
            self._unmap(thread, start, end)
        return PROCEED

    def shmdt(self, trap: Trap) -> Proceed:
        thread = self._thread(trap)
        if thread is not None and thread.group.space is not None:
            vma = thread.group.space.host.query(trap.args[0])
            if vma is not None and vma.start == trap.args[0]:
                self._unmap(thread, vma.start, vma.end)
        return PROCEED

    def brk(self, trap: Trap) -> Proceed:
        """A lower break unmaps the end of the heap; a higher one, or one that is only asked for, nothing."""
        thread = self._thread(trap)
        start = page_up(trap.args[0])
        if thread is None or not start or thread.group.space is None:
            return PROCEED
        end = start
        while (vma := thread.group.space.host.query(end)) is not None and vma.name == "[heap]":
            if end == start and vma.start > start:
                return PROCEED  # below the heap: refused
            end = vma.end
        self._unmap(thread, start, end)
        return PROCEED

    def madvise(self, trap: Trap) -> int | Proceed:
        start, length, advice = trap.args[0], trap.args[1], trap.args[2] & 0xFFFFFFFF
        if advice == MADV_GUARD_INSTALL:
            self._guard(trap, start, page_up(start + length))
        thread = self._thread(trap)
        if thread is None or start % PAGE:
            return PROCEED
        return self._advise(thread, start, page_up(start + length), advice)

    def _advise(self, thread: Thread, start: int, end: int, advice: int) -> int | Proceed:
        if advice in (MADV_DONTNEED, MADV_DONTNEED_LOCKED, MADV_REMOVE, MADV_GUARD_INSTALL):
            self._unmap(thread, start, end)
        elif advice == MADV_FREE and thread.group.space is not None and thread.group.space.has_pins(start, end):
            return 0  # a pinned page is never freed; the host's copy of it must not be either
        return PROCEED

    def process_madvise(self, trap: Trap) -> Proceed:
        """Of itself; the kernel lets nobody take another's pages away."""
        advice = trap.args[3] & 0xFFFFFFFF
        thread = self._thread(trap)
        if thread is None and advice != MADV_GUARD_INSTALL:
            return PROCEED
        raw = memory_of(trap.tid).read_upto(trap.args[1], 16 * min(trap.args[2], 1024))
        for at in range(0, len(raw) - 15, 16):
            start, length = (int.from_bytes(raw[at + i : at + i + 8], "little") for i in (0, 8))
            if start % PAGE:
                continue
            if advice == MADV_GUARD_INSTALL:
                self._guard(trap, start, page_up(start + length))
            if thread is not None:
                self._advise(thread, start, page_up(start + length), advice)
        return PROCEED

    def _guard(self, trap: Trap, start: int, end: int) -> None:
        """Guard regions cannot be pinned (core 5.5); where there may be some is remembered, for who looks closer."""
        with contextlib.suppress(OSError):  # the caller was killed
            guards = self._processes.thread(trap.tid).group.guards
            if start < end and (start, end) not in guards:
                guards.append((start, end))

    # ---- mremap

    def mremap(self, trap: Trap) -> Proceed | Answered:
        old, length, new_length, flags, new = trap.args[:5]
        thread = self._thread(trap)
        space = thread.group.space if thread is not None else None
        length, new_length = page_up(length), page_up(new_length)
        if thread is None or space is None or old % PAGE or not new_length or old + length > END:
            return PROCEED
        if flags & MREMAP_FIXED and not new % PAGE:
            self._unmap(thread, new, new + new_length)
        if new_length < length:
            self._unmap(thread, old + new_length, old + length)
            length = new_length
        if not length or not space.has_pins(old, old + length):
            return PROCEED
        if flags & MREMAP_FIXED:
            space.move(old, new, length)
            return PROCEED
        before = mapped_ranges(trap.tid)
        grows_here = new_length <= length or is_free(before, old + length, old + new_length)
        if not flags & MREMAP_MAYMOVE or (grows_here and not flags & MREMAP_DONTUNMAP):
            return PROCEED
        move = Moving(space, trap.tid, old, length, new_length, before)
        self._listener.proceed(trap.number)
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:
            if settle(move):
                return ANSWERED
        self.moving.append(move)
        return ANSWERED

    def settle(self) -> None:
        """Finds out about moves under way; call it when :attr:`moving` is not empty."""
        self.moving = [move for move in self.moving if not settle(move)]

    # ---- exec and exit

    def _known(self, trap: Trap) -> Thread | None:
        """The caller, if it has been met; None for a stranger, and for one that was killed this instant."""
        try:
            return self._processes.known(trap.tid)
        except OSError:
            return None

    def execve(self, trap: Trap) -> Proceed:
        return self._exec(trap, AT_FDCWD, trap.args[0])

    def execveat(self, trap: Trap) -> Proceed:
        return self._exec(trap, fd_of(trap.args[0]), trap.args[1])

    def _exec(self, trap: Trap, dirfd: int, addr: int) -> Proceed:
        thread = self._known(trap)
        if thread is None:
            return PROCEED
        self._processes.exec_announced(thread)
        space = thread.group.space
        if space is None or not space.pinned_vm or len(self._processes.sharers(space)) != 1:
            return PROCEED
        if looks_executable(trap.tid, dirfd, addr):  # a search through PATH fails often, and costs nothing here
            space.save()
        return PROCEED

    def exit_group(self, trap: Trap) -> Proceed:
        thread = self._known(trap)
        if thread is None:
            return PROCEED
        self._processes.exit_announced(thread)
        space = thread.group.space
        if space is not None and space.alive and not self._processes.sharers(space):
            space.gone(rescue=bool(space.pinned_vm) and not is_alone(thread.group.tgid, self._members()))
        return PROCEED


def shared_mappings(pid: int, dev: int, inode: int) -> Ranges:
    """Where a process maps the file ``(dev, inode)`` shared."""
    found: Ranges = []
    needle = f" {os.major(dev):02x}:{os.minor(dev):02x} {inode} ".encode()
    with contextlib.suppress(OSError), open(f"/proc/{pid}/maps", "rb") as maps:  # it is gone
        for line in maps:
            if needle in line:
                words = line.split(None, 2)
                if words[1].endswith(b"s"):
                    start, _, end = words[0].partition(b"-")
                    found.append((int(start, 16), int(end, 16)))
    return found


def settle(move: Moving) -> bool:
    """Whether it is known where the range went (or that it can no longer be known); tells the AddressSpace."""
    after = mapped_ranges(move.tid)
    if not after:
        return True
    for start, end in subtract(after, move.before):
        if end - start == move.new_length:
            move.space.move(move.old, start, move.length)
            return True
    return False


def mapped_ranges(tid: int) -> Ranges:
    """What is mapped, as ascending ranges that do not touch; empty when the thread is gone."""
    found: Ranges = []
    try:
        with open(f"/proc/{tid}/maps", "rb") as maps:
            for line in maps:
                start, _, end = line.partition(b" ")[0].partition(b"-")
                first, last = int(start, 16), int(end, 16)
                if found and found[-1][1] == first:
                    found[-1] = (found[-1][0], last)
                else:
                    found.append((first, last))
    except OSError:
        return []
    return found


def is_free(ranges: Ranges, start: int, end: int) -> bool:
    return not any(first < end and start < last for first, last in ranges)


def subtract(ranges: Ranges, without: Ranges) -> Ranges:
    """What is in ``ranges`` and not in ``without``."""
    left: Ranges = []
    for start, end in ranges:
        for first, last in without:
            if last <= start or first >= end:
                continue
            if first > start:
                left.append((start, first))
            start = max(start, last)
        if start < end:
            left.append((start, end))
    return left


def looks_executable(tid: int, dirfd: int, addr: int) -> bool:
    """Whether the path at ``addr`` is an executable file as far as we can see."""
    try:
        path = memory_of(tid).read_string(addr)
    except KernelError:
        return False
    if path[:1] != b"/":
        path = (b"/proc/%d/cwd/" % tid if dirfd == AT_FDCWD else b"/proc/%d/fd/%d/" % (tid, dirfd)) + path
    return os.access(path.rstrip(b"/"), os.X_OK)


def is_alone(tgid: int, members: Iterable[int]) -> bool:
    """Whether none of the ``members`` but ``tgid`` is alive, so that nobody can hold a file of ours when it is gone."""
    for pid in members:
        if pid != tgid:
            try:
                with open(f"/proc/{pid}/stat", "rb") as stat:
                    if stat.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X"):
                        return False
            except OSError:  # gone
                continue
    return True
