"""Rows of intervals, many blocks of them together: how :mod:`.intervals` stores what it indexes.

A *block* holds up to a few dozen intervals in three rows: where each begins, how long the hole before it is, and its
value. Where an interval ends follows from the next one and the hole between (``ends`` has it for the last of a block),
so an entry costs 24 bytes, keys included, and the hole rows are what a hole search reads. A *group* holds blocks, in
ascending order, none of them empty but for a moment.

``tops`` has for each block an *upper bound* of the longest hole before any interval in it.
"""

from __future__ import annotations

from array import array
from typing import Generic, TypeVar

V = TypeVar("V")


class Group(Generic[V]):
    """Some blocks; index b of every row is block b."""

    __slots__ = ("ends", "firsts", "gaps", "mins", "tops", "values")

    def __init__(self) -> None:
        self.mins = array("Q")  # first address of the block
        self.ends = array("Q")  # last address of the block
        self.tops: list[int] = []
        self.firsts: list[array[int]] = []
        self.gaps: list[array[int]] = []
        self.values: list[list[V]] = []

    def last_of(self, b: int, i: int) -> int:
        """The last address of interval ``i`` of block ``b``."""
        firsts = self.firsts[b]
        i += 1
        return firsts[i] - self.gaps[b][i] - 1 if i < len(firsts) else self.ends[b]

    def insert_block(self, b: int, firsts: array[int], gaps: array[int], values: list[V], end: int, top: int) -> None:
        self.mins.insert(b, firsts[0])
        self.ends.insert(b, end)
        self.tops.insert(b, top)
        self.firsts.insert(b, firsts)
        self.gaps.insert(b, gaps)
        self.values.insert(b, values)

    def delete_block(self, b: int) -> None:
        del self.mins[b], self.ends[b], self.tops[b], self.firsts[b], self.gaps[b], self.values[b]

    def split_block(self, b: int) -> None:
        half = len(self.firsts[b]) // 2
        firsts, gaps, values = self.firsts[b], self.gaps[b], self.values[b]
        self.insert_block(b + 1, firsts[half:], gaps[half:], values[half:], self.ends[b], self.tops[b])
        self.firsts[b], self.gaps[b], self.values[b] = firsts[:half], gaps[:half], values[:half]
        self.ends[b] = firsts[half] - gaps[half] - 1

    def join_block(self, b: int) -> None:
        """Block ``b`` swallows the next one."""
        self.firsts[b] += self.firsts[b + 1]
        self.gaps[b] += self.gaps[b + 1]
        self.values[b] += self.values[b + 1]
        self.ends[b] = self.ends[b + 1]
        self.tops[b] = max(self.tops[b], self.tops[b + 1])
        self.delete_block(b + 1)

    def cut(self, b: int) -> Group[V]:
        """Takes the blocks from ``b`` on away, as a new group."""
        other: Group[V] = Group()
        other.take(self, b)
        del self.mins[b:], self.ends[b:], self.tops[b:], self.firsts[b:], self.gaps[b:], self.values[b:]
        return other

    def take(self, other: Group[V], b: int = 0) -> None:
        """Appends the blocks of ``other`` from ``b`` on."""
        self.mins += other.mins[b:]
        self.ends += other.ends[b:]
        self.tops += other.tops[b:]
        self.firsts += other.firsts[b:]
        self.gaps += other.gaps[b:]
        self.values += other.values[b:]
