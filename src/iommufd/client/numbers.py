"""Checks of what a program passes in: a clear sentence before any call is made. No kernel object."""

from __future__ import annotations

import operator
from typing import SupportsIndex, TypeVar

U32, U64 = 2**32 - 1, 2**64 - 1

T = TypeVar("T")


def number(value: SupportsIndex, what: str, most: int = U64) -> int:
    """``value`` as an int in [0, most]. TypeError when it is none, ValueError when it is negative or too large."""
    try:
        found = operator.index(value)
    except TypeError:
        raise TypeError(f"{what} is a whole number, not {type(value).__name__}") from None
    if not 0 <= found <= most:
        shown = "" if most < 1 << 16 else "#x"
        raise ValueError(f"{what} {found:{'' if found < 0 else shown}} is not between 0 and {most:{shown}}")
    return found


def instance(value: object, kind: type[T], what: str) -> T:
    """``value`` if it is a ``kind``; TypeError otherwise."""
    if not isinstance(value, kind):
        raise TypeError(f"{what} is a {kind.__name__}, not {type(value).__name__}")
    return value


def size(count: int) -> str:
    """A number of bytes for people: ``"4 KiB"``, ``"1.5 GiB"``, ``"100 bytes"``."""
    if count < 1024:
        return f"{count} byte{'s' if count != 1 else ''}"
    value, unit = count / 1024, "KiB"
    for larger in ("MiB", "GiB", "TiB", "PiB", "EiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.4g} {unit}"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def part(total: int, length: int | None, offset: int, what: str) -> tuple[int, int]:
    """The part of ``total`` bytes that ``length`` and ``offset`` mean: (length, offset)."""
    offset = number(offset, "offset")
    length = max(total - offset, 0) if length is None else number(length, "length")
    if not length or offset + length > total:
        raise ValueError(f"{length} bytes from offset {offset}: this {what} has {total}")
    return length, offset
