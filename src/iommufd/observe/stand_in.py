"""Stand-ins for the processes of a trace: memory, descriptors and capabilities as far as the trace shows them.

A trace has what calls read and wrote, not what else a program did. So a stand-in's memory is private, ordinary, and
zero until a call of the trace says otherwise; every address is there unless a recorded EFAULT tells that it was not.
Addresses are the recorded ones: nothing has to be exchanged in the structs.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from iommufd.errors import KernelError
from iommufd.memory.accounting import Process
from iommufd.memory.frames import PAGE_SHIFT, PAGE_SIZE
from iommufd.memory.hostfile import HostFile
from iommufd.memory.space import AddressSpace
from iommufd.memory.vma import READ, WRITE, Vma

if TYPE_CHECKING:
    from iommufd.engine.file import File
    from iommufd.memory.physical import Physical
    from iommufd.observe.record import Record

USER_END = 1 << 47
FIRST_SPARE_FD = 1 << 20


class Memory:
    """The memory of one process (see :class:`iommufd.memory.vma.Host`). ``absent`` and ``read_only`` hold for one
    call: ranges ``[start, end)`` that cannot be touched, or not be written. ``huge`` are mappings in huge pages,
    (start, end, page size)."""

    def __init__(self) -> None:
        self.pages: dict[int, bytearray] = {}
        self.absent: list[tuple[int, int]] = []
        self.read_only: list[tuple[int, int]] = []
        self.huge: list[tuple[int, int, int]] = []

    def query(self, va: int) -> Vma | None:
        """One mapping up to the next range of the other sort."""
        if va >= USER_END:
            return None
        here = next(((s, e) for s, e in self.absent if s <= va < e), None)
        if here is not None:
            return self.query(here[1])
        start = max((e for _, e in self.absent if e <= va), default=0)
        end = min((s for s, _ in self.absent if s > va), default=USER_END)
        for first, last in self.read_only:
            if first <= va < last:
                return Vma(max(start, first), min(end, last), READ)
            start, end = max(start, last if last <= va else 0), min(end, first if first > va else USER_END)
        for first, last, size in self.huge:
            if first <= va < last:
                return Vma(first, last, READ | WRITE, page_size=size)
            start, end = max(start, last if last <= va else 0), min(end, first if first > va else USER_END)
        return Vma(start & -PAGE_SIZE, -(-end // PAGE_SIZE) * PAGE_SIZE, READ | WRITE)

    def set_page_size(self, va: int, length: int, page_size: int) -> None:
        """A mapping call named ``[va, va + length)``, in pages of ``page_size`` (0: ordinary ones)."""
        end = va + length
        self.huge = [(s, e, size) for s, e, size in self.huge if e <= va or s >= end or size == page_size]
        if page_size and length and not any(s <= va and end <= e for s, e, _ in self.huge):
            start, end = va & -page_size, -(-end // page_size) * page_size
            touching = [(s, e) for s, e, _ in self.huge if s <= end and start <= e]
            self.huge = [h for h in self.huge if h[:2] not in touching]
            start, end = min([start, *(s for s, _ in touching)]), max([end, *(e for _, e in touching)])
            self.huge.append((start, end, page_size))

    def _reach(self, va: int, count: int, ranges: list[tuple[int, int]]) -> int:
        """How many of ``count`` bytes from ``va`` on can be touched."""
        limits = [max(start, va) for start, stop in ranges if start < va + count and stop > va]
        return max(min([va + count, USER_END, *limits]) - va, 0)

    def peek(self, va: int, count: int) -> bytes:
        count = self._reach(va, count, self.absent)
        parts = []
        while count > 0:
            page, offset = divmod(va, PAGE_SIZE)
            size = min(count, PAGE_SIZE - offset)
            held = self.pages.get(page)
            parts.append(bytes(size) if held is None else bytes(held[offset : offset + size]))
            va, count = va + size, count - size
        return b"".join(parts)

    def poke(self, va: int, data: bytes | bytearray | memoryview) -> int:
        count = self._reach(va, len(data), self.absent)
        return self._store(va, memoryview(data)[:count])

    def _store(self, va: int, data: memoryview) -> int:
        done = 0
        while done < len(data):
            page, offset = divmod(va + done, PAGE_SIZE)
            size = min(len(data) - done, PAGE_SIZE - offset)
            self.pages.setdefault(page, bytearray(PAGE_SIZE))[offset : offset + size] = data[done : done + size]
            done += size
        return done

    def read(self, va: int, count: int) -> bytes:
        return self.peek(va, count)

    def write(self, va: int, data: bytes | bytearray | memoryview) -> int:
        return self.poke(va, memoryview(data)[: self._reach(va, len(data), self.read_only)])

    def put(self, va: int, data: bytes) -> None:
        """What the program itself had written there."""
        if va < USER_END:
            self._store(va, memoryview(data))

    def touched(self, va: int, end: int) -> list[tuple[int, int]]:
        first, last = va >> PAGE_SHIFT, (end - 1) >> PAGE_SHIFT
        return [(page << PAGE_SHIFT, (page + 1) << PAGE_SHIFT) for page in sorted(self.pages) if first <= page <= last]

    def open_file(self, vma: Vma) -> int | None:
        return None

    def mlocked_pages(self) -> int:
        return 0

    def exec_coming(self) -> None:
        """A trace shows no exec."""

    def alive(self) -> bool:
        return True

    def close(self) -> None:
        """Nothing to give back."""


class Caller:
    """One process of the trace. ``files`` are its descriptors as far as known, ``stand_ins`` files of the host."""

    def __init__(self, pid: int, physical: Physical) -> None:
        self.pid = pid
        self.physical = physical
        self.memory = Memory()
        self.space = AddressSpace(physical, self.memory, f"process {pid} of the trace")
        self.limit: int | None = None
        self.process = Process(pid, physical.user(0), self.space, limit=lambda _: self.limit)
        self.files: dict[int, File] = {}
        self.stand_ins: dict[int, int] = {}

    def close(self) -> None:
        for fd in self.stand_ins.values():
            os.close(fd)
        self.stand_ins.clear()


class StandInTask:
    """The thread that makes ``record``'s call (see :class:`iommufd.engine.task.Task`).

    ``made`` are the descriptors the call made, in order; ``used_stand_in``: it was given a file the trace does not
    have."""

    def __init__(self, caller: Caller, record: Record, others: dict[int, Caller]) -> None:
        self.caller = caller
        self.record = record
        self.tid = record.tid
        self.space = caller.space
        self.process = caller.process
        self.privileged = True
        self.made: list[tuple[int, File]] = []
        self.used_stand_in = False
        self._others = others
        self._numbers = [new.fd for new in record.files]
        self._spare = FIRST_SPARE_FD

    def read_upto(self, addr: int, count: int) -> bytes:
        return self.caller.memory.read(addr, count) if count > 0 else b""

    def read(self, addr: int, count: int) -> bytes:
        data = self.read_upto(addr, count)
        if len(data) != count:
            raise KernelError(errno.EFAULT, f"only {len(data)} of {count} bytes at {addr:#x} can be read")
        return data

    def read_into(self, addr: int, buffer: bytearray | memoryview) -> None:
        buffer[:] = self.read(addr, len(buffer))

    def write_upto(self, addr: int, data: bytes | bytearray | memoryview) -> int:
        return self.caller.memory.write(addr, data)

    def write(self, addr: int, data: bytes | bytearray | memoryview) -> None:
        done = self.write_upto(addr, data)
        if done != len(data):
            raise KernelError(errno.EFAULT, f"only {done} of {len(data)} bytes at {addr:#x} can be written")

    def capable(self, capability: int) -> bool:
        return self.privileged

    def file(self, fd: int) -> File | HostFile:
        found = self.caller.files.get(fd)
        if found is None:  # inherited by a fork that the trace does not show
            found = next((other.files[fd] for other in self._others.values() if fd in other.files), None)
        if found is not None:
            return found
        if fd < 0 or self.record.errno == errno.EBADF:
            raise KernelError(errno.EBADF, f"descriptor {fd} is not open")
        self.used_stand_in = True
        held = self.caller.stand_ins.get(fd)
        if held is None:
            held = self.caller.stand_ins[fd] = os.memfd_create("replay", os.MFD_CLOEXEC)
        return HostFile(self.caller.physical, os.dup(held))

    def size_stand_in(self, fd: int, size: int) -> None:
        """Makes the file that stands for the host's ``fd`` at least ``size`` bytes long."""
        if fd in self.caller.files or fd < 0 or size >= 1 << 60:
            return
        held = self.caller.stand_ins.get(fd)
        if held is None:
            held = self.caller.stand_ins[fd] = os.memfd_create("replay", os.MFD_CLOEXEC)
        if os.fstat(held).st_size < size:
            os.ftruncate(held, size)

    def reserve_fd(self, cloexec: bool) -> int:
        if self._numbers:
            return self._numbers.pop(0)
        result = self.record.result
        if self.record.kind == "group" and result is not None and result >= 0:
            return result
        self._spare += 1
        return self._spare

    def install_fd(self, fd: int, file: File) -> None:
        self.caller.files[fd] = file
        self.made.append((fd, file))

    def release_fd(self, fd: int) -> None:
        self._numbers.insert(0, fd)
