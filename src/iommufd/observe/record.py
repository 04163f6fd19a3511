"""Record: one system call as an observer keeps it: raw bytes, who made it, what came of it.

``--explain`` formats a record at once, ``--trace`` writes it down, ``iommufd decode`` reads it back; all three hand
the same record to :mod:`iommufd.observe.format`, so they say the same words. Nothing here interprets bytes.
"""

from __future__ import annotations

from typing import NamedTuple

KINDS = ("open", "ioctl", "read", "write", "mmap", "close")


class Memory(NamedTuple):
    """Bytes of the caller that a pointer in the struct leads to: member ``field`` pointed at ``addr``.

    ``size`` is what the call named; ``data`` may be shorter (the rest could not be read, or was too much to keep)."""

    field: str
    addr: int
    size: int
    data: bytes


class NewFile(NamedTuple):
    """A descriptor the call made: number in the caller, serial number and kind of the file behind it."""

    fd: int
    file: int
    kind: str


class Record:
    """One call. ``call`` is one of KINDS.

    Who: ``pid``, ``tid``; ``fd`` the descriptor when known; ``file`` the serial number of the open file and ``kind``
    what it is ("iommu", "container", "fault" and so on). ``time`` and ``us`` in seconds since the trace began and
    microseconds. Result: ``result`` (-1 on failure, None when nobody knows), ``errno`` (0 on success), ``why``.

    ioctl: ``number``, ``arg``; ``raw`` the struct's known bytes as copied in (empty when that failed), ``size`` what
    its first member said; ``memory`` what its pointers led to; ``out`` the struct as given back (empty when nothing
    was), and ``out_memory``; ``page_size`` of the memory behind ``user_va``
    where it is in huge pages, else 0. open: ``path``, ``flags``. read, write: ``arg`` the buffer, ``size`` bytes asked,
    ``raw`` bytes moved. mmap: ``offset``, ``size``, ``flags`` (PROT_*). ``files`` are descriptors the call made.
    """

    __slots__ = (
        "arg",
        "call",
        "errno",
        "fd",
        "file",
        "files",
        "flags",
        "kind",
        "memory",
        "number",
        "offset",
        "out",
        "out_memory",
        "page_size",
        "path",
        "pid",
        "raw",
        "result",
        "size",
        "tid",
        "time",
        "us",
        "why",
    )

    def __init__(self, call: str) -> None:
        self.call = call
        self.time = 0.0
        self.pid = self.tid = 0
        self.fd: int | None = None
        self.file: int | None = None
        self.kind = "iommu"
        self.number = self.arg = self.size = self.flags = self.offset = 0
        self.path = ""
        self.raw = b""
        self.memory: tuple[Memory, ...] = ()
        self.page_size = 0
        self.out = b""
        self.out_memory: tuple[Memory, ...] = ()
        self.files: tuple[NewFile, ...] = ()
        self.result: int | None = 0
        self.errno = 0
        self.why = ""
        self.us: float | None = None
