"""Classic BPF as the kernel's seccomp reads it: an assembler with labels (kernel: struct sock_filter, sock_fprog).

A program is a list of lines; jumps name labels, :func:`assemble` turns them into the eight-byte instructions.
Conditional jumps reach 255 instructions, so a label that is further away is a programming error and raises ValueError.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

LD_W_ABS = 0x20
JA = 0x05
JEQ_K, JGT_K, JGE_K, JSET_K = 0x15, 0x25, 0x35, 0x45
AND_K = 0x54
RET_K = 0x06

SECCOMP_RET_USER_NOTIF = 0x7FC00000
SECCOMP_RET_ALLOW = 0x7FFF0000

# struct seccomp_data: nr s32, arch u32, instruction_pointer u64, args[6] u64; little endian on both architectures
OFFSET_NR, OFFSET_ARCH, OFFSET_ARGS = 0, 4, 16


def offset_of_low_word(argument: int) -> int:
    """Where seccomp_data keeps the low 32 bits of an argument."""
    return OFFSET_ARGS + 8 * argument


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line: ``yes`` and ``no`` are labels of conditional jumps ("" is the next line)."""

    code: int
    k: int = 0
    yes: str = ""
    no: str = ""


@dataclass(frozen=True, slots=True)
class Label:
    name: str


Line = Instruction | Label


def assemble(lines: list[Line]) -> bytes:
    """The program as an array of struct sock_filter {u16 code; u8 jt; u8 jf; u32 k}."""
    where: dict[str, int] = {}
    at = 0
    for line in lines:
        if isinstance(line, Label):
            if line.name in where:
                raise ValueError(f"label {line.name} is defined twice")
            where[line.name] = at
        else:
            at += 1
    out = bytearray()
    at = 0
    for line in lines:
        if isinstance(line, Label):
            continue
        at += 1
        if line.code == JA:
            out += struct.pack("=HBBI", JA, 0, 0, _distance(where, line.yes, at, 2**32 - 1))
            continue
        yes, no = _distance(where, line.yes, at, 255), _distance(where, line.no, at, 255)
        out += struct.pack("=HBBI", line.code, yes, no, line.k & 0xFFFFFFFF)
    return bytes(out)


def _distance(where: dict[str, int], label: str, here: int, furthest: int) -> int:
    if not label:
        return 0
    distance = where[label] - here
    if not 0 <= distance <= furthest:
        raise ValueError(f"label {label} is {distance} instructions away")
    return distance
