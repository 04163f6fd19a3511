"""A sequence of calls as data, and the file the player reads.

A :class:`Program` is a list of steps over fixed memory (the player's arena) and descriptor slots. :func:`encode` writes
programs for ``player.c``; ``str`` of a step shows it as a person would write it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field

from iommufd.testing.subject import struct_of

ARENA = 0x1000_0000_0000
PAGES = 256
PAGE = 4096
MAGIC = b"IOMMUFZ2"
IOCTL, OPEN, CLOSE, READ, WRITE, POLL, POKE, PEEK, MMAP, MUNMAP, MPROTECT, MEMFD, LIMIT, FORK, EXIT, STATUS = range(16)
SECOND = 16  # before the kind of a step that the second process takes
NAMES = (
    "ioctl",
    "open",
    "close",
    "read",
    "write",
    "poll",
    "poke",
    "peek",
    "mmap",
    "munmap",
    "mprotect",
    "memfd",
    "limit",
    "fork",
    "exit",
    "status",
)
NEW = 255  # instead of an offset: the descriptor is the one that was not there before the call


@dataclass(frozen=True)
class Step:
    """One step: its kind, the slot it is about, numbers and bytes by kind.

    An ioctl has ``cmd``, ``data`` (the struct), ``patches`` [(offset, slot)] of descriptors given in it, and ``out``
    (slot, offset) of one handed out (offset :data:`NEW`: told nowhere). With ``read_only`` the struct lies in memory
    that cannot be written. ``address`` set instead of data: a bare argument. ``second``: the second process takes the
    step, with its own memory and with the descriptors it got when it was forked."""

    kind: int
    slot: int = 0
    numbers: tuple[int, ...] = ()
    data: bytes = b""
    cmd: int = 0
    patches: tuple[tuple[int, int], ...] = ()
    out: tuple[int, int] | None = None
    address: int | None = None
    read_only: bool = False
    second: bool = False

    def encode(self) -> bytes:
        own = bytes([self.kind]) + self._body()
        return bytes([SECOND]) + struct.pack("<H", len(own)) + own if self.second else own

    def _body(self) -> bytes:
        if self.kind == IOCTL:
            slot, offset = self.out or (255, 0)
            body = struct.pack("<BBBBI", self.slot, slot, offset, len(self.patches), self.cmd)
            body += b"".join(struct.pack("<H", at | which << 8) for at, which in self.patches)
            if self.address is not None:
                return body + struct.pack("<HQ", 0xFFFF, self.address)
            return body + struct.pack("<H", len(self.data) | self.read_only << 15) + self.data
        if self.kind in (OPEN, CLOSE, POLL):
            return bytes([self.slot])
        if self.kind == READ:
            return struct.pack("<BH", self.slot, self.numbers[0])
        if self.kind == WRITE:
            return struct.pack("<BH", self.slot, len(self.data)) + self.data
        if self.kind == POKE:
            return struct.pack("<QH", self.numbers[0], len(self.data)) + self.data
        if self.kind == PEEK:
            return struct.pack("<QH", *self.numbers)
        if self.kind == MEMFD:
            return struct.pack("<BH", self.slot, self.numbers[0])
        if self.kind == LIMIT:
            return struct.pack("<H", self.numbers[0])
        return bytes(self.numbers)

    def __str__(self) -> str:
        who = "second process: " if self.second else ""
        if self.kind == IOCTL and self.address is None:
            where = " in read-only memory" if self.read_only else ""
            return f"{who}fd{self.slot} {struct_of(self.cmd, self.data)!r}{self.patches or ''}{where}"
        shown = self.data.hex() if len(self.data) <= 32 else f"{len(self.data)} bytes"
        return f"{who}{NAMES[self.kind]} fd{self.slot} {self.cmd:#x} {self.numbers} {shown} {self.address}"


@dataclass
class Program:
    seed: int
    steps: list[Step] = field(default_factory=list)

    @property
    def grant(self) -> str:
        """What the program's process must be granted to begin as root does on the kernel: this host's root may have
        less. A process that gives its capabilities up on its way must not keep what it was granted, but for the one
        that is asked for before."""
        if not any(step.kind == LIMIT for step in self.steps):
            return "all"
        return "" if self.steps[0].kind == LIMIT else "sys_resource"

    def encode(self) -> bytes:
        body = b"".join(step.encode() for step in self.steps)
        return struct.pack("<III", self.seed, len(body), len(self.steps)) + body


def encode(programs: Iterable[Program]) -> bytes:
    """The player's file."""
    encoded = [program.encode() for program in programs]
    return MAGIC + struct.pack("<I", len(encoded)) + b"".join(encoded)


def answers(output: str) -> dict[int, list[str]]:
    """The player's output: seed -> one answer a step (a sequence that died has fewer)."""
    found: dict[int, list[str]] = {}
    lines: list[str] = []
    for line in output.splitlines():
        if line.startswith("sequence "):
            lines = found[int(line.split()[1])] = []
        else:
            lines.append(line.partition(": ")[2] if ": " in line else line)
    return found
