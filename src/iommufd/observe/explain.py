"""``--explain``: each failing call as a line on a stream, with the decoded struct and the sentence why.

One call is one write, so lines of several threads never mix. A stream that breaks (a closed pipe) ends the
explaining, never the program.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, TextIO

from iommufd.engine.instrument import Instrument
from iommufd.observe import capture
from iommufd.observe.events import record_event
from iommufd.observe.format import show_call, struct_of
from iommufd.observe.record import Record

if TYPE_CHECKING:
    from iommufd.engine.dispatch import Call
    from iommufd.errors import KernelError

PREFIX = "iommufd: "


class Explain(Instrument):
    """Writes to ``stream``; lines name the process from the second one on that fails a call."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._files = capture.Files()
        self._first_pid: int | None = None
        self._broken = False
        self.count = 0

    def ioctl_exit(self, call: Call, result: int, error: KernelError | None) -> None:
        if error is None or self._broken:
            return
        record = capture.start_ioctl(call, self._files)
        cls = struct_of(call.number, record.kind, call.raw) if call.raw else None
        if cls is not None:
            record.memory = capture.read_memory(call.task, cls.unpack(call.raw), written=False)
        capture.finish_ioctl(record, call, result, error, self._files)
        self._write(record)

    # Any: what an event tells is of the types its teller says, by name
    def event(self, name: str, **fields: Any) -> None:
        error = fields.get("error")
        if error is None or self._broken:
            return
        if name == "refused":
            refused = Record(fields["call"])
            capture.who(refused, fields["task"])
            capture.outcome(refused, -1, error)
            self._write(refused)
        elif (record := record_event(name, fields, self._files)) is not None:
            self._write(record)

    def _write(self, record: Record) -> None:
        line = show_call(record)
        with self._lock:
            self.count += 1
            if self._first_pid is None:
                self._first_pid = record.pid
            process = "" if record.pid == self._first_pid else f"[pid {record.pid}] "
            try:
                self._stream.write(f"{PREFIX}{process}{line}\n")
                self._stream.flush()
            except (OSError, ValueError):  # nobody listens any more
                self._broken = True
