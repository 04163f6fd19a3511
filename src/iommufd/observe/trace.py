"""``--trace FILE``: one JSON object per line and call, in the schema of docs/trace.md, written here and read back here.

The first line is the header. A line has both forms of a struct: decoded for people and ``jq``, raw bytes
(hexadecimal) so that a trace can be replayed and decoded again by a later version. Addresses and 64-bit values are
text ("0x1000"), because JSON numbers lose bits in some readers. Keys that would be zero or empty are left out.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO, TypeAlias

from iommufd.engine.instrument import Instrument
from iommufd.errors import errno_name
from iommufd.observe import capture
from iommufd.observe.events import record_event
from iommufd.observe.format import command_of, decoded, struct_of
from iommufd.observe.record import KINDS, Memory, NewFile, Record
from iommufd.uapi.declare import show_release

if TYPE_CHECKING:
    from iommufd.engine.dispatch import Call
    from iommufd.errors import KernelError

SCHEMA = "iommufd-trace"
VERSION = 1
FLUSH_EVERY = 0.5  # seconds; what a supervisor that is killed may lose


class TraceError(ValueError):
    """The file is not a trace this version can read; the message says which line and why."""


Line: TypeAlias = dict[str, Any]
"""A line of a trace as :mod:`json` has it: what its members are, the key says."""


def to_json(record: Record) -> Line:
    """The object of one line (docs/trace.md)."""
    line: Line = {"t": round(record.time, 6), "pid": record.pid, "tid": record.tid, "call": record.call}
    if record.file is not None:
        line["file"] = record.file
        line["kind"] = record.kind
    if record.fd is not None:
        line["fd"] = record.fd
    if record.call == "ioctl":
        _ioctl_to_json(record, line)
    elif record.call == "open":
        line["path"] = record.path
        line["flags"] = record.flags
    elif record.call in ("read", "write"):
        line["arg"] = hex(record.arg)
        line["size"] = record.size
        if record.raw:
            line["raw"] = record.raw.hex()
    elif record.call == "mmap":
        line["offset"] = hex(record.offset)
        line["size"] = record.size
        line["flags"] = record.flags
    line["result"] = record.result
    if record.errno:
        line["errno"] = errno_name(record.errno)
        line["error"] = record.errno
    if record.why:
        line["why"] = record.why
    if record.us is not None:
        line["us"] = round(record.us, 1)
    return line


def _ioctl_to_json(record: Record, line: Line) -> None:
    name = command_of(record.number, record.kind)[0]
    if name:
        line["cmd"] = name
    line["number"] = hex(record.number)
    line["arg"] = hex(record.arg)
    if record.size:
        line["size"] = record.size
    if record.raw:
        line["raw"] = record.raw.hex()
        cls = struct_of(record.number, record.kind, record.raw)
        if cls is not None:
            line["in"] = decoded(cls.unpack(record.raw))
            if record.out:
                line["out"] = decoded(cls.unpack(record.out))
        if record.out:
            line["out_raw"] = record.out.hex()
    if record.memory:
        line["memory"] = [_memory_to_json(m) for m in record.memory]
    if record.page_size:
        line["page_size"] = record.page_size
    if record.out_memory:
        line["out_memory"] = [_memory_to_json(m) for m in record.out_memory]
    if record.files:
        line["files"] = [f._asdict() for f in record.files]


def _memory_to_json(memory: Memory) -> Line:
    return {"field": memory.field, "addr": hex(memory.addr), "size": memory.size, "data": memory.data.hex()}


def from_json(line: Line) -> Record:
    """The record of one line; keys this version does not know are ignored. KeyError, TypeError or ValueError if
    unfit."""
    call = line["call"]
    if call not in KINDS:
        raise ValueError(f"call {call!r} is none of {', '.join(KINDS)}")
    record = Record(call)
    record.time = float(line["t"])
    record.pid, record.tid = int(line["pid"]), int(line["tid"])
    record.file = line.get("file")
    record.fd = line.get("fd")
    record.kind = line.get("kind", "iommu")
    record.number = int(line.get("number", "0x0"), 16)
    record.arg = int(line.get("arg", "0x0"), 16)
    record.offset = int(line.get("offset", "0x0"), 16)
    record.size = int(line.get("size", 0))
    record.flags = int(line.get("flags", 0))
    record.path = line.get("path", "")
    record.raw = bytes.fromhex(line.get("raw", ""))
    record.out = bytes.fromhex(line.get("out_raw", ""))
    record.page_size = int(line.get("page_size", 0))
    record.memory = tuple(_memory_from_json(m) for m in line.get("memory", ()))
    record.out_memory = tuple(_memory_from_json(m) for m in line.get("out_memory", ()))
    record.files = tuple(NewFile(f["fd"], f["file"], f["kind"]) for f in line.get("files", ()))
    record.result = None if line["result"] is None else int(line["result"])
    record.errno = int(line.get("error", 0))
    record.why = line.get("why", "")
    record.us = line.get("us")
    return record


def _memory_from_json(m: Line) -> Memory:
    return Memory(m["field"], int(m["addr"], 16), int(m["size"]), bytes.fromhex(m["data"]))


def header(machine: str, kernel: Sequence[int], program: Sequence[str] = ()) -> Line:
    """The first line: schema and version, the wall-clock time ``t`` counts from, machine, release shown, program."""
    from iommufd import __version__

    return {
        "schema": SCHEMA,
        "version": VERSION,
        "iommufd": __version__,
        "started": round(time.time(), 6),
        "machine": machine,
        "kernel": show_release(tuple(kernel)),
        "program": list(program),
    }


def read_trace(lines: Iterable[str]) -> tuple[Line, Iterator[Record]]:
    """Header and records of a trace. TraceError when it is not one, is of a newer version, or a line is broken.

    A last line that is cut off (the supervisor was killed) ends the trace without an error."""
    numbered = enumerate(lines, 1)
    first = next(numbered, (1, ""))[1]
    try:
        head = json.loads(first)
        schema, version = head["schema"], head["version"]
    except (ValueError, KeyError, TypeError):
        raise TraceError(f"line 1: not the header of a trace: {first[:60]!r}") from None
    if schema != SCHEMA or not isinstance(version, int):
        raise TraceError(f"line 1: schema {schema!r} version {version!r} is not {SCHEMA!r}")
    if version > VERSION:
        raise TraceError(f"line 1: trace version {version} is newer than {VERSION}, which this program reads")
    return head, _records(numbered)


def _records(numbered: Iterator[tuple[int, str]]) -> Iterator[Record]:
    for number, text in numbered:
        if not text.strip():
            continue
        try:
            record = from_json(json.loads(text))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if not text.endswith("\n"):
                return
            raise TraceError(f"line {number}: {error}") from None
        yield record


class TraceWriter(Instrument):
    """Writes every call to ``stream``, which it closes at the end; complete lines reach it at least every half second
    of activity. ``dropped`` says why writing stopped early (a full disk), None as long as all is well."""

    def __init__(self, stream: TextIO, head: Line) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._files = capture.Files()
        self._begun: dict[int, Record] = {}  # by id of the Call, from enter to exit
        self._zero = time.perf_counter()
        self._flushed = self._zero
        self.dropped: str | None = None
        self._emit(head, self._zero)

    def ioctl_enter(self, call: Call) -> None:
        record = capture.start_ioctl(call, self._files)
        cls = struct_of(call.number, record.kind, call.raw)
        if cls is not None:
            value = cls.unpack(call.raw)
            record.memory = capture.read_memory(call.task, value, written=False)
            record.page_size = capture.huge_page_size(call.task, value)
        record.time = time.perf_counter() - self._zero
        self._begun[id(call)] = record

    def ioctl_exit(self, call: Call, result: int, error: KernelError | None) -> None:
        now = time.perf_counter()
        record = self._begun.pop(id(call), None)
        if record is None:  # refused before the handler: there is no beginning to measure from
            record = capture.start_ioctl(call, self._files)
            record.time = now - self._zero
        else:
            record.us = (now - self._zero - record.time) * 1e6
        capture.finish_ioctl(record, call, result, error, self._files)
        if record.out:
            cls = struct_of(call.number, record.kind, record.raw)
            if cls is not None:
                given = capture.told_where(cls.unpack(record.raw), cls.unpack(record.out))
                record.out_memory = capture.read_memory(call.task, given, written=True)
        self._emit(to_json(record), now)

    # Any: as in events.Fields
    def event(self, name: str, **fields: Any) -> None:
        record = record_event(name, fields, self._files)
        if record is not None:
            now = time.perf_counter()
            record.time = now - self._zero - (record.us or 0.0) / 1e6
            self._emit(to_json(record), now)

    def _emit(self, line: Line, now: float) -> None:
        text = json.dumps(line, separators=(",", ":")) + "\n"
        with self._lock:
            if self.dropped is not None:
                return
            try:
                self._stream.write(text)
                if now - self._flushed > FLUSH_EVERY:
                    self._stream.flush()
                    self._flushed = now
            except (OSError, ValueError) as error:
                self.dropped = str(error)

    def close(self) -> str | None:
        """Everything written reaches the file; later calls are not recorded. Returns why the trace is not whole."""
        with self._lock:
            try:
                self._stream.close()
            except OSError as error:
                self.dropped = self.dropped or str(error)
            failed = self.dropped
            self.dropped = failed or "closed"
            return failed
