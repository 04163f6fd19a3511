"""Packed bit arrays: bit n is bit ``n % 8`` of byte ``n // 8``, as in every bitmap of the uAPI.

The bulk functions are NumPy's (imported on the first call) and work on ``uint8`` arrays; what lies beyond the last bit
of an array's last byte is zero.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Bits = NDArray[np.uint8]

_NONZERO = re.compile(rb"[^\0]")
_PIECE = 1 << 20  # bits unpacked at a time


def each_set(bits: bytes, low: int, high: int) -> Iterator[int]:
    """The numbers of the set bits in ``[low, high)``, ascending."""
    for match in _NONZERO.finditer(bits, low >> 3, (high + 7) >> 3):
        byte = match.start()
        value = bits[byte]
        while value:
            lowest = value & -value
            number = byte * 8 + lowest.bit_length() - 1
            if low <= number < high:
                yield number
            value ^= lowest


def count_set(bits: bytes, count: int) -> int:
    """How many of the first ``count`` bits are set."""
    whole, rest = divmod(count, 8)
    pieces = (bits[at : min(at + 65536, whole)] for at in range(0, whole, 65536))
    total = sum(int.from_bytes(piece, "little").bit_count() for piece in pieces)
    return total + (bits[whole] & ((1 << rest) - 1)).bit_count() if rest else total


def empty(count: int) -> Bits:
    """``count`` clear bits."""
    import numpy as np

    return np.zeros((count + 7) >> 3, np.uint8)


def of(buffer: bytes | bytearray | memoryview) -> Bits:
    """The bits of a buffer; writable when it is."""
    import numpy as np

    return np.frombuffer(buffer, np.uint8)


def any_set(bits: Bits) -> bool:
    """Whether any bit is set; eight bytes at a time, which is twice as fast as NumPy's own test of bytes."""
    whole = len(bits) & ~7
    return bool(bits[:whole].view("u8").any()) or bool(bits[whole:].any())


def extract(bits: Bits, first: int, count: int) -> Bits:
    """A copy of bits ``[first, first + count)``, from bit 0 on."""
    byte, shift = first >> 3, first & 7
    size = (count + 7) >> 3
    if shift == 0:
        out = bits[byte : byte + size].copy()
    else:
        part = bits[byte : byte + size + 1]
        out = (part[:size] >> shift).astype("u1", copy=False)
        upper = part[1 : size + 1] << (8 - shift)
        out[: len(upper)] |= upper
    if count & 7:
        out[-1] &= (1 << (count & 7)) - 1
    return out


def or_into(target: Bits, at: int, source: Bits, count: int) -> None:
    """Sets bit ``at + n`` of ``target`` for every set bit n < ``count`` of ``source``, whose bits beyond are clear."""
    byte, shift = at >> 3, at & 7
    size = (count + 7) >> 3
    source = source[:size]
    if shift == 0:
        target[byte : byte + size] |= source
        return
    target[byte : byte + size] |= source << shift
    upper = source >> (8 - shift)
    room = min(size, len(target) - byte - 1)
    target[byte + 1 : byte + 1 + room] |= upper[:room]


def clear(bits: Bits, first: int, count: int) -> None:
    """Clears bits ``[first, first + count)``."""
    if not count:
        return
    last = first + count - 1
    low, high = first >> 3, last >> 3
    keep_low, keep_high = (1 << (first & 7)) - 1, 0xFF & ~((2 << (last & 7)) - 1)
    if low == high:
        bits[low] &= keep_low | keep_high
        return
    bits[low] &= keep_low
    bits[high] &= keep_high
    bits[low + 1 : high] = 0


def get(bits: Bits, number: int) -> bool:
    """Whether bit ``number`` is set."""
    return bool(int(bits[number >> 3]) >> (number & 7) & 1)


def put(bits: Bits, number: int) -> None:
    """Sets bit ``number``."""
    bits[number >> 3] |= 1 << (number & 7)


def scatter(target: Bits, source: Bits, first: int, count: int, step: int, base: int, size: int) -> None:
    """Sets bit ``(base + n * step) // size`` of ``target`` for every set bit n of ``[first, first + count)`` of
    ``source``."""
    import numpy as np

    for start in range(first, first + count, _PIECE):
        part = extract(source, start, min(_PIECE, first + count - start))
        if not part.any():
            continue
        numbers = np.flatnonzero(np.unpackbits(part, bitorder="little"))
        hits = (base + (numbers + start) * step) // size
        lowest = int(hits[0]) & ~7
        flags = np.zeros(int(hits[-1]) - lowest + 1, bool)
        flags[hits - lowest] = True
        packed = np.packbits(flags, bitorder="little")
        target[lowest >> 3 : (lowest >> 3) + len(packed)] |= packed


def widen(bits: Bits, count: int, by: int) -> Bits:
    """Every one of ``count`` bits repeated ``by`` times."""
    import numpy as np

    flags = np.unpackbits(bits, count=count, bitorder="little")
    return np.packbits(np.repeat(flags, by), bitorder="little")


def narrow(bits: Bits, count: int, skip: int, by: int) -> Bits:
    """One bit per ``by`` bits, set when any of them is; the first group lacks its ``skip`` leading members."""
    import numpy as np

    flags = np.unpackbits(bits, count=count, bitorder="little")
    groups = -(-(skip + count) // by)
    padded = np.zeros(groups * by, np.uint8)
    padded[skip : skip + count] = flags
    return np.packbits(padded.reshape(groups, by).any(axis=1), bitorder="little")
