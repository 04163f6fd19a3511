"""Disjoint intervals in address order, and the holes between them: what the kernel keeps in an interval tree.

Invariants: intervals are inclusive ``[first, last]``, never overlap, and stand in ascending order. The three parallel
lists of a *block* hold at most ``LOAD`` intervals; ``_mins[b]`` is the first address of block ``b``. The caller's own int
objects are kept, so an entry costs three list slots. ``_gaps[b]`` is an upper bound of the largest hole before any
interval of block ``b`` (the hole before its first interval included): inserting only makes holes smaller, so the bound
stays true without work; removing raises it; a search that finds it too high lowers it. Above ``_gaps`` stand two levels
of maxima over ``FAN`` entries each, rebuilt from the first changed block on, and only when somebody looks for a hole.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import Generic, TypeVar

V = TypeVar("V")

LOAD = 96  # intervals in a block: an insert moves three lists of this length, a hole search walks one
FAN = 32  # blocks under one maximum, and maxima under one maximum of the next level

ADDRESS_LAST = 2**64 - 1


class IntervalIndex(Generic[V]):
    """Disjoint inclusive intervals of non-negative ints, each with a value; any operation O(log n) but ``nth``.

    Not locked: the owner serialises. An iterator must not be used after the index was changed.
    """

    __slots__ = ("_clean", "_firsts", "_gap2", "_gap3", "_gaps", "_lasts", "_mins", "_size", "_values")

    def __init__(self) -> None:
        self._firsts: list[list[int]] = []
        self._lasts: list[list[int]] = []
        self._values: list[list[V]] = []
        self._mins: list[int] = []
        self._size = 0
        self._gaps: list[int] = []
        self._gap2: list[int] = []
        self._gap3: list[int] = []
        self._clean = 0  # blocks below this one are summed up correctly in _gap2 and _gap3

    # ---------------------------------------------------------------------------------------------------- looking up

    def __len__(self) -> int:
        return self._size

    def __bool__(self) -> bool:
        return self._size > 0

    def __iter__(self) -> Iterator[tuple[int, int, V]]:
        for firsts, lasts, values in zip(self._firsts, self._lasts, self._values, strict=True):
            yield from zip(firsts, lasts, values, strict=True)

    def values(self) -> Iterator[V]:
        """Values in address order."""
        for values in self._values:
            yield from values

    def find(self, addr: int) -> tuple[int, int, V] | None:
        """The interval ``(first, last, value)`` that contains ``addr``, or None."""
        b = bisect_right(self._mins, addr) - 1
        if b < 0:
            return None
        firsts = self._firsts[b]
        i = bisect_right(firsts, addr) - 1
        last = self._lasts[b][i]
        if last < addr:
            return None
        return firsts[i], last, self._values[b][i]

    def first_in(self, first: int, last: int) -> tuple[int, int, V] | None:
        """The lowest interval that intersects ``[first, last]``, or None."""
        b = bisect_right(self._mins, first) - 1
        if b >= 0:
            firsts = self._firsts[b]
            i = bisect_right(firsts, first) - 1
            if self._lasts[b][i] < first:
                i += 1
            if i < len(firsts):
                return (firsts[i], self._lasts[b][i], self._values[b][i]) if firsts[i] <= last else None
        b += 1
        if b < len(self._mins) and self._mins[b] <= last:
            return self._firsts[b][0], self._lasts[b][0], self._values[b][0]
        return None

    def overlaps(self, first: int, last: int) -> bool:
        """Whether any interval intersects ``[first, last]``."""
        b = bisect_right(self._mins, last) - 1
        if b < 0:
            return False
        return self._lasts[b][bisect_right(self._firsts[b], last) - 1] >= first

    def neighbours(self, first: int, last: int) -> tuple[tuple[int, int, V] | None, tuple[int, int, V] | None]:
        """The nearest intervals wholly below ``first`` and wholly above ``last`` (None where there is none)."""
        below = above = None
        b = bisect_right(self._mins, first) - 1
        if b >= 0:
            i = bisect_right(self._firsts[b], first) - 1
            if self._lasts[b][i] >= first:
                i -= 1
            if i < 0:
                b, i = b - 1, -1
            if b >= 0:
                below = (self._firsts[b][i], self._lasts[b][i], self._values[b][i])
        b = max(bisect_right(self._mins, last) - 1, 0)
        if b < len(self._mins):
            i = bisect_right(self._firsts[b], last)
            if i == len(self._firsts[b]):
                b, i = b + 1, 0
            if b < len(self._mins):
                above = (self._firsts[b][i], self._lasts[b][i], self._values[b][i])
        return below, above

    def nth(self, n: int) -> tuple[int, int, V]:
        """The n-th interval in address order, from 0. IndexError when there are not so many. O(blocks)."""
        if not 0 <= n < self._size:
            raise IndexError(n)
        ends = list(accumulate(map(len, self._firsts)))
        b = bisect_right(ends, n)
        i = n - (ends[b - 1] if b else 0)
        return self._firsts[b][i], self._lasts[b][i], self._values[b][i]

    def items(self, first: int = 0, last: int = ADDRESS_LAST) -> Iterator[tuple[int, int, V]]:
        """The intervals that intersect ``[first, last]``, ascending."""
        b = max(bisect_right(self._mins, first) - 1, 0)
        if b >= len(self._mins):
            return
        i = max(bisect_right(self._firsts[b], first) - 1, 0)
        if self._lasts[b][i] < first:
            i += 1
        while b < len(self._mins):
            firsts, lasts, values = self._firsts[b], self._lasts[b], self._values[b]
            for i in range(i, len(firsts)):  # noqa: B020 - starts where the previous step left off
                if firsts[i] > last:
                    return
                yield firsts[i], lasts[i], values[i]
            b, i = b + 1, 0

    # ------------------------------------------------------------------------------------------------------ changing

    def insert(self, first: int, last: int, value: V) -> None:
        """Adds ``[first, last]``. ValueError when it is empty or intersects an interval that is there."""
        mins = self._mins
        b = bisect_right(mins, first) - 1
        if b < 0:
            if last < first or (mins and mins[0] <= last):
                raise ValueError(f"[{first:#x}, {last:#x}] is empty or overlaps")
            if not mins:
                self._firsts.append([first])
                self._lasts.append([last])
                self._values.append([value])
                mins.append(first)
                self._gaps.append(first)
                self._size = 1
                self._clean = 0
                return
            b, i = 0, 0
            firsts = self._firsts[0]
            mins[0] = first
        else:
            firsts = self._firsts[b]
            i = bisect_right(firsts, first)
            if last < first or self._lasts[b][i - 1] >= first:
                raise ValueError(f"[{first:#x}, {last:#x}] is empty or overlaps")
            if i < len(firsts):
                if firsts[i] <= last:
                    raise ValueError(f"[{first:#x}, {last:#x}] overlaps [{firsts[i]:#x}, ...]")
            elif b + 1 < len(mins):
                if mins[b + 1] <= last:
                    raise ValueError(f"[{first:#x}, {last:#x}] overlaps [{mins[b + 1]:#x}, ...]")
            hole = 0
            if i == len(firsts):
                # The new hole before this interval was part of the next block's, or of the endless tail.
                hole = first - self._lasts[b][-1] - 1
                if len(firsts) >= LOAD and b + 1 == len(mins):  # ascending fill: leave full blocks behind
                    self._firsts.append([first])
                    self._lasts.append([last])
                    self._values.append([value])
                    mins.append(first)
                    self._gaps.append(hole)
                    self._clean = min(self._clean, b)
                    self._size += 1
                    return
                if hole > self._gaps[b]:
                    self._raise_gap(b, hole)
        firsts.insert(i, first)
        self._lasts[b].insert(i, last)
        self._values[b].insert(i, value)
        self._size += 1
        if len(firsts) > LOAD:
            self._split(b)

    def remove(self, first: int) -> V:
        """Removes the interval that begins at ``first`` and returns its value. KeyError when there is none."""
        b = bisect_right(self._mins, first) - 1
        if b < 0:
            raise KeyError(first)
        firsts = self._firsts[b]
        i = bisect_left(firsts, first)
        if i == len(firsts) or firsts[i] != first:
            raise KeyError(first)
        lasts = self._lasts[b]
        del firsts[i], lasts[i]
        value = self._values[b].pop(i)
        self._size -= 1
        # The hole that opens lies before the next interval, and counts where that one lives.
        if i:
            below = lasts[i - 1]
        else:
            below = self._lasts[b - 1][-1] if b else -1
            if firsts:
                self._mins[b] = firsts[0]
        if i < len(firsts):
            hole = firsts[i] - below - 1
            if hole > self._gaps[b]:
                self._raise_gap(b, hole)
        elif b + 1 < len(self._mins):
            hole = self._mins[b + 1] - below - 1
            if hole > self._gaps[b + 1]:
                self._raise_gap(b + 1, hole)
        if len(firsts) < LOAD // 4:
            self._shrink(b)
        return value

    def replace(self, first: int, value: V) -> None:
        """Gives the interval that begins at ``first`` another value. KeyError when there is none."""
        b = bisect_right(self._mins, first) - 1
        if b >= 0:
            i = bisect_left(self._firsts[b], first)
            if i < len(self._firsts[b]) and self._firsts[b][i] == first:
                self._values[b][i] = value
                return
        raise KeyError(first)

    def clear(self) -> None:
        """Removes everything."""
        self.__init__()  # type: ignore[misc]

    def _split(self, b: int) -> None:
        half = len(self._firsts[b]) // 2
        for column in (self._firsts, self._lasts, self._values):
            block: list[object] = column[b]  # type: ignore[assignment]
            column[b : b + 1] = [block[:half], block[half:]]  # type: ignore[list-item]
        self._mins.insert(b + 1, self._firsts[b + 1][0])
        self._gaps.insert(b + 1, self._gaps[b])
        self._clean = min(self._clean, b)

    def _shrink(self, b: int) -> None:
        """Drops an empty block, or joins a small one with its successor."""
        if not self._firsts[b]:
            into = None
        elif b + 1 < len(self._mins) and len(self._firsts[b]) + len(self._firsts[b + 1]) <= LOAD // 2:
            into, b = b, b + 1
        else:
            return
        if into is not None:
            self._firsts[into] += self._firsts[b]
            self._lasts[into] += self._lasts[b]
            self._values[into] += self._values[b]
            self._gaps[into] = max(self._gaps[into], self._gaps[b])
        del self._firsts[b], self._lasts[b], self._values[b], self._mins[b], self._gaps[b]
        self._clean = min(self._clean, b if into is None else into)

    # --------------------------------------------------------------------------------------------------------- holes

    def holes(self, first: int, last: int, at_least: int = 1) -> Iterator[tuple[int, int]]:
        """The maximal holes within ``[first, last]`` of ``at_least`` addresses or more, ascending, inclusive.

        Holes are clipped to the window before they are measured.
        """
        if last < first or at_least > last - first + 1:
            return
        at_least = max(at_least, 1)
        b = bisect_right(self._mins, first) - 1
        cursor, i = first, 0  # the lowest address not yet known to be covered; the interval that may end the hole
        if b < 0:
            b = 0
        else:
            i = bisect_right(self._firsts[b], first)
            cursor = max(first, self._lasts[b][i - 1] + 1)
        while b < len(self._mins):
            firsts, lasts = self._firsts[b], self._lasts[b]
            whole, largest = False, 0
            if i == 0:
                below = self._lasts[b - 1][-1] + 1 if b else 0
                cursor = max(first, below)
                whole = cursor == below
            for i in range(i, len(firsts)):  # noqa: B020 - starts inside the block the first time
                hole = firsts[i] - cursor
                if hole >= at_least:
                    end = min(firsts[i] - 1, last)
                    if end - cursor + 1 >= at_least:
                        yield cursor, end
                if hole > largest:
                    largest = hole
                cursor = lasts[i] + 1
                if cursor > last:
                    return
            if whole and largest < self._gaps[b]:
                self._lower_gap(b, largest)
            b, i = self._next_block(b + 1, at_least), 0
        if self._mins:
            cursor = max(first, self._lasts[-1][-1] + 1)
        if last - cursor + 1 >= at_least:
            yield cursor, last

    def _next_block(self, b: int, at_least: int) -> int:
        """The first block from ``b`` on that may have a hole of ``at_least`` before one of its intervals."""
        gaps, count = self._gaps, len(self._gaps)
        if b >= count:
            return count
        if self._clean < count:
            self._sum_up()
        while b % FAN:
            if gaps[b] >= at_least:
                return b
            b += 1
            if b == count:
                return b
        gap2, group = self._gap2, b // FAN
        while group % FAN:
            if gap2[group] >= at_least:
                return self._first_of(gaps, group, at_least)
            group += 1
            if group == len(gap2):
                return count
        for above in range(group // FAN, len(self._gap3)):
            if self._gap3[above] >= at_least:
                return self._first_of(gaps, self._first_of(gap2, above, at_least), at_least)
        return count

    @staticmethod
    def _first_of(level: list[int], group: int, at_least: int) -> int:
        for position in range(group * FAN, min(group * FAN + FAN, len(level))):
            if level[position] >= at_least:
                return position
        raise AssertionError("a maximum above its group")

    def _sum_up(self) -> None:
        group = self._clean // FAN
        gaps, gap2, gap3 = self._gaps, self._gap2, self._gap3
        gap2[group:] = [max(gaps[k : k + FAN]) for k in range(group * FAN, len(gaps), FAN)]
        group //= FAN
        gap3[group:] = [max(gap2[k : k + FAN]) for k in range(group * FAN, len(gap2), FAN)]
        self._clean = len(gaps)

    def _raise_gap(self, b: int, hole: int) -> None:
        self._gaps[b] = hole
        if b < self._clean:
            group = b // FAN
            if hole > self._gap2[group]:
                self._gap2[group] = hole
                if hole > self._gap3[group // FAN]:
                    self._gap3[group // FAN] = hole

    def _lower_gap(self, b: int, hole: int) -> None:
        self._gaps[b] = hole
        if self._clean < len(self._gaps):
            self._clean = min(self._clean, b)
        else:
            group = b // FAN
            self._gap2[group] = max(self._gaps[group * FAN : group * FAN + FAN])
            group //= FAN
            self._gap3[group] = max(self._gap2[group * FAN : group * FAN + FAN])
