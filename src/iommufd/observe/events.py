"""From an engine event to a Record: the calls that are not table ioctls.

Whoever serves a file to a program tells the World after the call, with ``world.event(name, ...)``, and only behind
``if world.instruments``:

========  ==================================================================================================
name      fields
========  ==================================================================================================
open      task, path, flags, file (None when it failed), result (the descriptor, -1), error
read      task, file, arg (the buffer), size (bytes asked for), data (bytes delivered), result, error
write     task, file, arg, size, data (bytes taken or offered), result, error
mmap      task, file, offset, size, prot, result (the address, None when unknown), error
ioctl     task, file, number, arg, raw (bytes copied in), out (bytes given back), result, error: an ioctl that did not
          go through the command table (VFIO, devices)
close     file; the last reference is gone; task is who closed it, None when it went with its process
========  ==================================================================================================

``error`` is a KernelError or None; ``us`` (a float) may be added to each; missing fields count as zero or empty. Other
names are events of the engine, not calls, and give no record. ``refused`` (task, call, error) is a call that failed
without having reached a file: it is explained and not traced.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from iommufd.observe.capture import Files, kind_of, outcome, who
from iommufd.observe.record import KINDS, Record

Fields: TypeAlias = dict[str, Any]
"""What an event tells, by name: of which type, its teller says (engine/instrument.py)."""


def record_event(name: str, fields: Fields, files: Files) -> Record | None:
    """The record of a call told as an event; None for events that are no calls."""
    if name not in KINDS:
        return None
    record = Record(name)
    who(record, fields.get("task"))
    if name == "open":
        record.fd = None
    file = fields.get("file")
    if file is not None:
        record.file = files.number(file)
        record.kind = kind_of(file)
    record.path = fields.get("path", "")
    record.flags = fields.get("prot" if name == "mmap" else "flags", 0)
    record.number = fields.get("number", 0)
    record.arg = fields.get("arg", 0)
    record.offset = fields.get("offset", 0)
    record.raw = bytes(fields["raw"] if "raw" in fields else fields.get("data", b""))
    record.size = fields.get("size", len(record.raw))
    record.out = bytes(fields.get("out", b""))
    record.us = fields.get("us")
    outcome(record, fields.get("result", 0), fields.get("error"))
    return record
