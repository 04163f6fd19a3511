"""Replay: the calls of a trace, made again on a machine of this process, and what it answers otherwise.

The trace (docs/trace.md) has each call's input and answer. A replay makes them in the order in which they ended, from
stand-ins of the processes (:mod:`.stand_in`), and holds result, errno, the struct and the memory given back against
what was recorded.

What cannot be replayed is said, never counted as equal: failures that were injected, calls on files that came from
before the trace, and answers that hang on something the trace does not hold (contents and kinds of the host's files,
memory that the program itself wrote, unmapped or shared between processes).
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from iommufd.engine.file import File, Pending
from iommufd.errors import KernelError, errno_name
from iommufd.observe.capture import read_memory, told_where
from iommufd.observe.format import command_of, decoded, show_bytes, show_call, struct_of
from iommufd.observe.pointers import POINTERS
from iommufd.observe.record import Memory, Record
from iommufd.observe.stand_in import Caller, StandInTask
from iommufd.uapi import iommufd as u
from iommufd.uapi import iommufd_test as t

if TYPE_CHECKING:
    from iommufd.machine.machine import Machine
    from iommufd.uapi.declare import Struct

INJECTED = "the failure was injected"
FOREIGN_FILE = "the file was open before the trace began, or came from elsewhere"
HOST_FILE = "the answer hangs on a file of the host, which the trace does not hold"
OWN_MEMORY = "the answer hangs on memory that the program itself wrote, mapped or shared"

FOLLOWS = "an earlier call on the file could not be replayed"

_MEMORY_OPS = (t.test_md_check_map, t.test_md_check_refs, t.test_access_rw, t.test_access_pages)
MAY_HOLD = 1 << 16
HUGE = 2 << 20


@dataclass(frozen=True, slots=True)
class Difference:
    """Call ``number`` of the trace (from 1) answered otherwise: ``what`` names it, recorded first."""

    number: int
    record: Record
    what: str

    def __str__(self) -> str:
        return f"call {self.number}: {show_call(self.record)}\n    now: {self.what}"


@dataclass(slots=True)
class Report:
    """What came of a replay. ``skipped`` counts the calls that could not be replayed or judged, by reason."""

    calls: int = 0
    equal: int = 0
    differences: list[Difference] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def ok(self) -> bool:
        """Whether every answer is the recorded one."""
        return not self.differences


def _filled(given: Struct, returned: Struct | None, kept: int) -> int:
    """How many of the ``kept`` bytes of an array the call has filled; what lies behind is the program's."""
    if isinstance(given, u.iommu_ioas_iova_ranges) and isinstance(returned, u.iommu_ioas_iova_ranges):
        return min(kept, 16 * min(given.num_iovas, returned.num_iovas))
    return kept


def replay(machine: Machine, records: Iterable[Record]) -> Report:
    """Makes the calls again on ``machine``, which should be fresh and of the trace's kind."""
    run = _Replay(machine)
    try:
        for record in records:
            run.step(record)
    finally:
        run.close()
    return run.report


class _Skip(Exception):
    """The call cannot be replayed; the message is the reason."""


class _Replay:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.report = Report()
        self.callers: dict[int, Caller] = {}
        self.files: dict[int, File] = {}  # by serial number
        self.mapped: dict[int, list[int]] = {}  # offsets mapped, by serial number
        self.failed_otherwise = False
        self.tainted: set[int | None] = set()  # files in another state than the trace's, by serial number

    def close(self) -> None:
        for number in list(self.files):
            self._close(number)
        for caller in self.callers.values():
            caller.close()

    # ---- one call

    def step(self, record: Record) -> None:
        report = self.report
        report.calls += 1
        caller = self.callers.get(record.pid)
        if caller is None and record.call != "close":
            caller = self.callers[record.pid] = Caller(record.pid, self.machine.world.physical)
        try:
            if record.why.startswith("fault injection"):
                raise _Skip(INJECTED)
            if record.call == "close":
                if record.file not in self.files:
                    raise _Skip(FOREIGN_FILE)
                self._close(record.file)
                report.equal += 1
                return
            assert caller is not None
            task = StandInTask(caller, record, self.callers)
            difference = self._call(task, record)
        except _Skip as skip:
            report.skipped[str(skip)] += 1
            return
        if difference is None:
            report.equal += 1
            return
        reason = self._excuse(task, record)
        if reason is not None:
            report.skipped[reason] += 1
            if self.failed_otherwise:
                self.tainted.add(record.file)
        else:
            report.differences.append(Difference(report.calls, record, difference))

    def _call(self, task: StandInTask, record: Record) -> str | None:
        """Makes the call; what is different, or None."""
        file = None if record.call == "open" else self._file(task, record)
        memory = task.caller.memory
        try:
            self._prepare(task, record)
            result, error = self._perform(task, record, file)
            memory.absent, memory.read_only = [], []  # to look at the results
            return self._compare(task, record, result, error)
        finally:
            memory.absent, memory.read_only = [], []
            task.caller.limit = None

    def _file(self, task: StandInTask, record: Record) -> File:
        assert record.file is not None
        found = self.files.get(record.file)
        if found is None and record.fd is not None and record.fd in task.caller.files:
            candidate = task.caller.files[record.fd]
            if candidate not in self.files.values():  # made by a call whose record does not name it
                found = candidate
                self._know(record.file, found)
        if found is None:
            raise _Skip(FOREIGN_FILE)
        if record.fd is not None:
            task.caller.files[record.fd] = found
        return found

    def _know(self, number: int, file: File) -> None:
        self.files[number] = file
        if file.mappable and file.memory_fd < 0:
            file.memory_fd = os.memfd_create("replay", os.MFD_CLOEXEC)

    def _close(self, number: int) -> None:
        """The last reference of the program goes."""
        file = self.files.pop(number)
        for caller in self.callers.values():
            for fd in [fd for fd, held in caller.files.items() if held is file]:
                del caller.files[fd]
        for offset in self.mapped.pop(number, ()):
            file.mapping_closed(offset)
        file.put()
        if file.memory_fd >= 0 and file.references == 0:
            os.close(file.memory_fd)
            file.memory_fd = -1

    # ---- before: memory, capabilities and limits as the recorded answer implies them

    def _prepare(self, task: StandInTask, record: Record) -> None:
        memory = task.caller.memory
        if record.errno == errno.EPERM:
            task.privileged = False
        if record.errno == errno.ENOMEM and "lock" in record.why.lower():
            task.privileged, task.caller.limit = False, 0
        if record.call == "write":
            memory.put(record.arg, record.raw)
        if record.call in ("read", "write") and record.errno == errno.EFAULT:
            memory.absent.append((record.arg, record.arg + max(record.size, 1)))
        if record.call != "ioctl":
            return
        if not record.raw:
            if record.errno == errno.EFAULT:
                memory.absent.append((record.arg, record.arg + 4))
            elif record.size:
                memory.put(record.arg, record.size.to_bytes(4, "little"))
            return
        memory.put(record.arg, record.raw)
        rest = min(max(record.size - len(record.raw), 0), MAY_HOLD)
        if rest:
            memory.put(record.arg + len(record.raw), b"\1" if record.errno == errno.E2BIG else bytes(rest))
        for piece in record.memory:
            memory.put(piece.addr, piece.data)
        value = self._struct(record)
        if isinstance(value, u.iommu_ioas_map_file):
            task.size_stand_in(value.fd, -(-(value.start + value.length) // HUGE) * HUGE)
        if isinstance(value, u.iommu_ioas_map):
            task.caller.memory.set_page_size(value.user_va, value.length, record.page_size)
        if record.errno == errno.EFAULT:
            self._take_away(task, record, value)

    def _take_away(self, task: StandInTask, record: Record, value: Struct | None) -> None:
        """The memory whose lack explains a recorded EFAULT."""
        memory = task.caller.memory
        pointer = POINTERS.get(type(value)) if value is not None else None
        known = command_of(record.number, record.kind)[1]
        if value is None or (known is not None and record.size > len(record.raw) and not record.memory):
            memory.absent.append((record.arg + len(record.raw), record.arg + max(record.size, len(record.raw) + 1)))
        elif isinstance(value, u.iommu_ioas_map):
            memory.absent.append((value.user_va, value.user_va + max(value.length, 1)))
        elif isinstance(value, t.test_md_check_map):
            memory.absent.append((value.uptr, value.uptr + max(value.length, 1)))
        elif pointer is not None:
            start, size = getattr(value, pointer.field), max(pointer.size(value), 1)
            held = next((len(m.data) for m in record.memory if m.field == pointer.field), 0)
            if held < size:
                memory.absent.append((start + held, start + size))
            else:
                memory.read_only.append((start, start + size))
        else:
            memory.read_only.append((record.arg, record.arg + len(record.raw)))

    def _struct(self, record: Record) -> Struct | None:
        cls = struct_of(record.number, record.kind, record.raw) if record.raw else None
        return cls.unpack(record.raw) if cls is not None else None

    # ---- the call

    def _perform(self, task: StandInTask, record: Record, file: File | None) -> tuple[int | None, KernelError | None]:
        try:
            if record.call == "open":
                return self._open(task, record), None
            assert file is not None
            if record.call == "mmap":
                assert record.file is not None
                file.mmap(task, record.offset, record.size, record.flags, True)
                self.mapped.setdefault(record.file, []).append(record.offset)
                return None, None
            if record.call == "ioctl":
                result = file.ioctl(task, record.number, record.arg)
            elif record.call == "read":
                result = file.read(task, record.arg, record.size)
            else:
                result = file.write(task, record.arg, record.size)
        except KernelError as error:
            return -1, error
        if isinstance(result, Pending):
            answered: list[Pending] = []
            result.then(answered.append)
            if not answered:
                result.drop()
                return -1, KernelError(errno.EINTR, "the call waits for something that does not come")
            return (-1, result.error) if result.error is not None else (result.result, None)
        return result, None

    def _open(self, task: StandInTask, record: Record) -> int:
        file = self.machine.open(record.path, task, record.flags)
        if file is None:
            raise KernelError(errno.ENOENT, f"machine {self.machine.name} has no {record.path}")
        if record.file is None:
            file.put()
            return 0
        self._know(record.file, file)
        fd = record.result if record.result is not None else -1
        task.caller.files[fd] = file
        return fd

    # ---- after

    def _compare(self, task: StandInTask, record: Record, result: int | None, error: KernelError | None) -> str | None:
        for (fd, file), new in zip(task.made, record.files, strict=False):
            if fd == new.fd:
                self._know(new.file, file)
        self.failed_otherwise = (error.errno if error is not None else 0) != record.errno
        if self.failed_otherwise:
            return f"{errno_name(error.errno)} ({error.why})" if error is not None else f"{result}"
        if error is None and record.result is not None and result != record.result:
            return f"{result}"
        if len(task.made) != len(record.files) and record.files:
            return f"{len(task.made)} descriptors instead of {len(record.files)}"
        if record.call == "read" and error is None:
            data = task.caller.memory.peek(record.arg, len(record.raw))
            return None if data == record.raw else f"read {data.hex()}"
        if record.call != "ioctl" or not record.raw:
            return None
        now = task.caller.memory.peek(record.arg, len(record.raw))
        expected = record.out or record.raw
        if now != expected:
            return self._members(record, expected, now)
        return self._memory(task, record)

    def _members(self, record: Record, expected: bytes, now: bytes) -> str:
        cls = struct_of(record.number, record.kind, record.raw)
        if cls is None:
            return f"{now.hex()} instead of {expected.hex()}"
        was, is_ = decoded(cls.unpack(expected)), decoded(cls.unpack(now))
        return ", ".join(f"{key}={is_[key]} instead of {was[key]}" for key in is_ if is_[key] != was.get(key))

    def _memory(self, task: StandInTask, record: Record) -> str | None:
        """The memory the call filled, where the trace kept it."""
        if not record.out_memory:
            return None
        given, returned = self._struct(record), self._struct_of(record, record.out)
        if given is None:
            return None
        if returned is not None:
            given = told_where(given, returned)
        now: dict[str, Memory] = {m.field: m for m in read_memory(task, given, written=True)}
        for was in record.out_memory:
            is_ = now.get(was.field)
            filled = _filled(given, returned, len(was.data))
            if is_ is not None and is_.data[:filled] != was.data[:filled]:
                task.caller.memory.put(was.addr, was.data)
                expected, found = show_bytes(was.data[:filled]), show_bytes(is_.data[:filled])
                return f"{was.field} leads to {found} instead of {expected}"
        return None

    def _struct_of(self, record: Record, data: bytes) -> Struct | None:
        cls = struct_of(record.number, record.kind, record.raw) if data else None
        return cls.unpack(data) if cls is not None else None

    def _excuse(self, task: StandInTask, record: Record) -> str | None:
        """Why a different answer tells nothing; None when it does."""
        if task.used_stand_in:
            return HOST_FILE
        value = self._struct(record) if record.call == "ioctl" else None
        if isinstance(value, _MEMORY_OPS):
            return OWN_MEMORY
        return FOLLOWS if record.file in self.tainted else None
