"""Checks of what a program passes in: a clear sentence before any call is made. No kernel object."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, SupportsIndex, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable

FOREVER = 1_000_000.0  # seconds; poll(2) counts milliseconds in an int
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
        raise TypeError(f"{what} is {_a(kind.__name__)}, not {type(value).__name__}")
    return value


def _a(noun: str) -> str:
    if noun == "bytes":
        return noun
    return f"an {noun}" if noun[0] in "AEIOaeio" else f"a {noun}"


def items(values: Iterable[T], what: str) -> list[T]:
    """``values`` as a list; TypeError when they are none."""
    try:
        each = iter(values)
    except (TypeError, SystemError):  # the latter is CPython 3.11's word for a released memoryview
        raise TypeError(f"{what} are a list or another iterable, not {type(values).__name__}") from None
    return list(each)


def pair(value: tuple[int, int], what: str, first: str, second: str) -> tuple[int, int]:
    """Two whole numbers of 64 bits, called ``first`` and ``second``; TypeError for what is no pair."""
    try:
        one, other = value
    except (TypeError, ValueError):
        raise TypeError(f"{what} is ({first}, {second}), not {value!r}") from None
    return number(one, first), number(other, second)


def seconds(timeout: float | None) -> float | None:
    """A timeout: None (forever, and what is too long to be told from it), or seconds, 0 for those below.

    TypeError for what is no number, ValueError for NaN."""
    if timeout is None:
        return None
    try:
        found = timeout * 1.0  # float() would take a text as well
    except TypeError:
        raise TypeError(f"a timeout is a number of seconds or None, not {type(timeout).__name__}") from None
    except OverflowError:
        return None if timeout > 0 else 0.0
    if found != found:
        raise ValueError(f"a timeout is a number of seconds or None, not {found}")
    return None if found > FOREVER else max(found, 0.0)


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
