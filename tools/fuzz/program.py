"""A sequence of calls as data, and the file the player reads.

A :class:`Program` is a list of steps over fixed memory (the player's arena) and descriptor slots. :func:`encode` writes
programs for ``player.c``; :func:`describe` shows one as a person would write it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field

from iommufd.testing.subject import struct_of

ARENA = 0x1000_0000_0000
PAGES = 256
PAGE = 4096
MAGIC = b"IOMMUFZ1"
IOCTL, OPEN, CLOSE, READ, WRITE, POLL, POKE, PEEK, MMAP, MUNMAP, MPROTECT, MEMFD, LIMIT = range(13)
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
)


@dataclass(frozen=True)
class Step:
    """One step: its kind, the slot it is about, numbers and bytes by kind.

    An ioctl has ``cmd``, ``data`` (the struct), ``patches`` [(offset, slot)] of descriptors given in it, and ``out``
    (slot, offset) of one handed out (offset 255: the return value). ``address`` set instead of data: a bare
    argument."""

    kind: int
    slot: int = 0
    numbers: tuple[int, ...] = ()
    data: bytes = b""
    cmd: int = 0
    patches: tuple[tuple[int, int], ...] = ()
    out: tuple[int, int] | None = None
    address: int | None = None

    def encode(self) -> bytes:
        head = bytes([self.kind])
        if self.kind == IOCTL:
            slot, offset = self.out or (255, 0)
            body = struct.pack("<BBBBI", self.slot, slot, offset, len(self.patches), self.cmd)
            body += b"".join(struct.pack("<H", at | which << 8) for at, which in self.patches)
            if self.address is not None:
                return head + body + struct.pack("<HQ", 0xFFFF, self.address)
            return head + body + struct.pack("<H", len(self.data)) + self.data
        if self.kind in (OPEN, CLOSE, POLL):
            return head + bytes([self.slot])
        if self.kind == READ:
            return head + struct.pack("<BH", self.slot, self.numbers[0])
        if self.kind == WRITE:
            return head + struct.pack("<BH", self.slot, len(self.data)) + self.data
        if self.kind == POKE:
            return head + struct.pack("<QH", self.numbers[0], len(self.data)) + self.data
        if self.kind == PEEK:
            return head + struct.pack("<QH", *self.numbers)
        if self.kind == MEMFD:
            return head + struct.pack("<BH", self.slot, self.numbers[0])
        if self.kind == LIMIT:
            return head + struct.pack("<H", self.numbers[0])
        return head + bytes(self.numbers)

    def __str__(self) -> str:
        if self.kind == IOCTL and self.address is None:
            return f"fd{self.slot} {struct_of(self.cmd, self.data)!r}{self.patches or ''}"
        shown = self.data.hex() if len(self.data) <= 32 else f"{len(self.data)} bytes"
        return f"{NAMES[self.kind]} fd{self.slot} {self.cmd:#x} {self.numbers} {shown} {self.address}"


@dataclass
class Program:
    seed: int
    steps: list[Step] = field(default_factory=list)

    @property
    def limited(self) -> bool:
        """Whether it is an ordinary user's: it begins with LIMIT."""
        return bool(self.steps) and self.steps[0].kind == LIMIT

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
