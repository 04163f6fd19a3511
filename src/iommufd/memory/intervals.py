"""Disjoint intervals in address order, and the holes between them: what the kernel keeps in an interval tree.

Invariants: intervals are inclusive ``[first, last]``, 0 <= first <= last < 2**64, never overlap, and stand in ascending
order in blocks of at most ``LOAD``, blocks in groups of at most ``GROUP`` (:mod:`.blocks`).

``tops`` of a group (per block), ``_tops`` (per group) and ``_peaks`` (per ``FAN`` groups) are *upper bounds* of the
longest hole before any interval there. Inserting only makes holes shorter, so bounds stay true without work; removing
raises them; a search that was led astray by one lowers it. So a search for a long hole does not look at short ones, and
neither direction ever rebuilds more than one group, but for the few peaks.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from itertools import islice
from typing import Generic

from iommufd.memory.blocks import Group, V

LOAD = 64  # intervals in a block
GROUP = 64  # blocks in a group
FAN = 16  # groups under one peak

ADDRESS_LAST = 2**64 - 1


class IntervalIndex(Generic[V]):
    """Disjoint inclusive intervals of addresses, each with a value. Every operation is O(log n) but ``nth``.

    Not locked: the owner serialises. An iterator must not be used any more once the index was changed.
    """

    __slots__ = ("_groups", "_heads", "_peaks", "_size", "_spare", "_tops")

    def __init__(self) -> None:
        self._groups: list[Group[V]] = []
        self._heads = array("Q")  # first address of each group
        self._tops: list[int] = []
        self._peaks: list[int] | None = None  # made when needed
        self._size = 0
        self._spare: Group[V] | None = None  # of the last interval that went: one block, without an interval

    # ---------------------------------------------------------------------------------------------------- looking up

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[tuple[int, int, V]]:
        return self.items()

    def values(self) -> Iterator[V]:
        """Values in address order."""
        for group in self._groups:
            for values in group.values:
                yield from values

    def find(self, addr: int) -> tuple[int, int, V] | None:
        """The interval ``(first, last, value)`` that contains ``addr``, or None."""
        g = bisect_right(self._heads, addr) - 1
        if g < 0:
            return None
        group = self._groups[g]
        b = bisect_right(group.mins, addr) - 1
        firsts = group.firsts[b]
        i = bisect_right(firsts, addr)
        last = firsts[i] - group.gaps[b][i] - 1 if i < len(firsts) else group.ends[b]
        if last < addr:
            return None
        return firsts[i - 1], last, group.values[b][i - 1]

    def first_in(self, first: int, last: int) -> tuple[int, int, V] | None:
        """The lowest interval that intersects ``[first, last]``, or None."""
        g = bisect_right(self._heads, first) - 1
        if g < 0:
            return next(self.items(first, last), None)
        group = self._groups[g]
        b = bisect_right(group.mins, first) - 1
        firsts = group.firsts[b]
        i = bisect_right(firsts, first)
        end = firsts[i] - group.gaps[b][i] - 1 if i < len(firsts) else group.ends[b]
        if end >= first:
            return firsts[i - 1], end, group.values[b][i - 1]
        if i == len(firsts):
            return next(self.items(end + 1, last), None)
        start = firsts[i]
        return (start, group.last_of(b, i), group.values[b][i]) if start <= last else None

    def overlaps(self, first: int, last: int) -> bool:
        """Whether any interval intersects ``[first, last]``."""
        g = bisect_right(self._heads, last) - 1
        if g < 0:
            return False
        group = self._groups[g]
        b = bisect_right(group.mins, last) - 1
        return group.last_of(b, bisect_right(group.firsts[b], last) - 1) >= first

    def neighbours(self, first: int, last: int) -> tuple[tuple[int, int, V] | None, tuple[int, int, V] | None]:
        """The nearest intervals wholly below ``first`` and wholly above ``last`` (None where there is none)."""
        below = above = None
        g, b, i = self._position(first)
        if g >= 0:
            group = self._groups[g]
            if group.last_of(b, i) >= first:
                i -= 1
                if i < 0:
                    b -= 1
                    if b < 0:
                        g -= 1
                        group = self._groups[g]
                        b = len(group.mins) - 1
                    i = len(group.firsts[b]) - 1
            if g >= 0:
                below = (group.firsts[b][i], group.last_of(b, i), group.values[b][i])
        g, b, i = self._next(*self._position(last))
        if g < len(self._groups):
            group = self._groups[g]
            above = (group.firsts[b][i], group.last_of(b, i), group.values[b][i])
        return below, above

    def nth(self, n: int) -> tuple[int, int, V]:
        """The n-th interval in address order, from 0. IndexError when there are not so many. O(blocks)."""
        if not 0 <= n < self._size:
            raise IndexError(n)
        g = b = 0
        while n >= (count := sum(map(len, self._groups[g].firsts))):
            n -= count
            g += 1
        group = self._groups[g]
        while n >= len(group.firsts[b]):
            n -= len(group.firsts[b])
            b += 1
        return group.firsts[b][n], group.last_of(b, n), group.values[b][n]

    def items(self, first: int = 0, last: int = ADDRESS_LAST) -> Iterator[tuple[int, int, V]]:
        """The intervals that intersect ``[first, last]``, ascending."""
        g, from_b, from_i = self._position(first)
        if g < 0 or self._groups[g].last_of(from_b, from_i) < first:
            g, from_b, from_i = self._next(g, from_b, from_i)
        for at in range(g, len(self._groups)):
            group = self._groups[at]
            for b in range(from_b, len(group.firsts)):
                firsts, gaps, values = group.firsts[b], group.gaps[b], group.values[b]
                end = len(firsts) - 1
                for i in range(from_i, end + 1):
                    start = firsts[i]
                    if start > last:
                        return
                    yield start, firsts[i + 1] - gaps[i + 1] - 1 if i < end else group.ends[b], values[i]
                from_i = 0
            from_b = 0

    def _position(self, addr: int) -> tuple[int, int, int]:
        """Group, block and place of the last interval that begins at or below ``addr``; (-1, 0, 0) without one."""
        g = bisect_right(self._heads, addr) - 1
        if g < 0:
            return -1, 0, 0
        group = self._groups[g]
        b = bisect_right(group.mins, addr) - 1
        return g, b, bisect_right(group.firsts[b], addr) - 1

    def _next(self, g: int, b: int, i: int) -> tuple[int, int, int]:
        """The position after (g, b, i); (number of groups, 0, 0) at the end."""
        if g < 0:
            return 0, 0, 0
        group = self._groups[g]
        if i + 1 < len(group.firsts[b]):
            return g, b, i + 1
        if b + 1 < len(group.firsts):
            return g, b + 1, 0
        return g + 1, 0, 0

    # ------------------------------------------------------------------------------------------------------ changing

    def insert(self, first: int, last: int, value: V) -> None:
        """Adds ``[first, last]``. ValueError when it is empty or intersects an interval that is there."""
        heads = self._heads
        g = bisect_right(heads, first) - 1
        if g < 0:
            if last < first or (heads and heads[0] <= last):
                raise ValueError(f"[{first:#x}, {last:#x}] is empty or overlaps")
            if not heads:
                self._insert_only(first, last, value)
                return
            g, b, i, gap = 0, 0, 0, first
            group: Group[V] = self._groups[0]
            firsts, gaps = group.firsts[0], group.gaps[0]
            gaps[0] = firsts[0] - last - 1
            group.mins[0] = heads[0] = first
        else:
            group = self._groups[g]
            b = bisect_right(group.mins, first) - 1
            firsts, gaps = group.firsts[b], group.gaps[b]
            i = bisect_right(firsts, first)
            if i < len(firsts):
                after = firsts[i]
                gap = first - (after - gaps[i])  # the hole ends where `after` begins: what of it lies below
                if gap < 0 or not first <= last < after:
                    raise ValueError(f"[{first:#x}, {last:#x}] is empty or overlaps")
                gaps[i] = after - last - 1
            else:
                gap = first - group.ends[b] - 1
                if gap < 0 or last < first or not self._shorten_after(g, b, last):
                    raise ValueError(f"[{first:#x}, {last:#x}] is empty or overlaps")
                if i >= LOAD and b + 1 == len(group.mins) and g + 1 == len(heads):
                    # An ascending fill leaves full blocks and groups behind.
                    if b + 1 == GROUP:
                        group = Group()
                        self._insert_group(g + 1, group, first)
                        g, b = g + 1, -1
                    group.insert_block(b + 1, array("Q", (first,)), array("Q", (gap,)), [value], last, gap)
                    self._raise(g, gap)
                    self._size += 1
                    return
                group.ends[b] = last
                if gap > group.tops[b]:  # until now this hole counted in the next block, or in the endless tail
                    group.tops[b] = gap
                    self._raise(g, gap)
        firsts.insert(i, first)
        gaps.insert(i, gap)
        group.values[b].insert(i, value)
        self._size += 1
        if len(firsts) > LOAD:
            group.split_block(b)
            if len(group.mins) > GROUP:
                other = group.cut(GROUP // 2)
                self._insert_group(g + 1, other, other.mins[0])

    def remove(self, first: int) -> V:
        """Removes the interval that begins at ``first`` and returns its value. KeyError when there is none."""
        g = bisect_right(self._heads, first) - 1
        if g < 0:
            raise KeyError(first)
        group = self._groups[g]
        b = bisect_right(group.mins, first) - 1
        firsts, gaps = group.firsts[b], group.gaps[b]
        i = bisect_left(firsts, first)
        if i == len(firsts) or firsts[i] != first:
            raise KeyError(first)
        # The hole that opens ends at the next interval, and counts where that one lives.
        below = first - gaps[i]  # where the hole before this interval begins
        if i + 1 < len(firsts):
            hole = gaps[i + 1] = firsts[i + 1] - below
            if hole > group.tops[b]:
                group.tops[b] = hole
                self._raise(g, hole)
        else:
            self._lengthen_after(g, b, below)
            if i:
                group.ends[b] = below - 1
        del firsts[i], gaps[i]
        value = group.values[b].pop(i)
        self._size -= 1
        if i == 0 and firsts:
            group.mins[b] = firsts[0]
            if b == 0:
                self._heads[g] = firsts[0]
        if not self._size:
            self._spare = group
            self._groups.clear()
            self._tops.clear()
            del self._heads[:]
            self._peaks = None
        elif len(firsts) < LOAD // 4:
            self._shrink(g, b)
        return value

    def _insert_only(self, first: int, last: int, value: V) -> None:
        """The first interval of an empty index. One that comes and goes alone finds its rows where it left them."""
        group = self._spare
        if group is None:
            group = Group()
            group.insert_block(0, array("Q", (first,)), array("Q", (first,)), [value], last, first)
        else:
            self._spare = None
            group.mins[0] = group.tops[0] = first
            group.ends[0] = last
            group.firsts[0].append(first)
            group.gaps[0].append(first)
            group.values[0].append(value)
        self._groups.append(group)
        self._heads.append(first)
        self._tops.append(first)
        self._size = 1

    def clear(self) -> None:
        """Removes everything."""
        self._groups.clear()
        self._tops.clear()
        del self._heads[:]
        self._peaks = None
        self._size = 0

    def _shorten_after(self, g: int, b: int, last: int) -> bool:
        """The hole after block ``b`` begins after ``last`` now. False, and nothing done, if that overlaps."""
        group = self._groups[g]
        b += 1
        if b == len(group.mins):
            g, b = g + 1, 0
            if g == len(self._groups):
                return True
            group = self._groups[g]
        if group.mins[b] <= last:
            return False
        group.gaps[b][0] = group.mins[b] - last - 1
        return True

    def _lengthen_after(self, g: int, b: int, start: int) -> None:
        """The hole after block ``b`` begins at ``start`` now."""
        group = self._groups[g]
        b += 1
        if b == len(group.mins):
            g, b = g + 1, 0
            if g == len(self._groups):
                return
            group = self._groups[g]
        hole = group.gaps[b][0] = group.mins[b] - start
        if hole > group.tops[b]:
            group.tops[b] = hole
            self._raise(g, hole)

    def _shrink(self, g: int, b: int) -> None:
        """Drops block ``b`` when it is empty, joins it with its successor when both are small; the same for groups."""
        group = self._groups[g]
        if not group.firsts[b]:
            group.delete_block(b)
            if not group.mins:
                self._delete_group(g)
                return
            if b == 0:
                self._heads[g] = group.mins[0]
        elif b + 1 < len(group.mins) and len(group.firsts[b]) + len(group.firsts[b + 1]) <= LOAD // 2:
            group.join_block(b)
        else:
            return
        if g + 1 < len(self._groups) and len(group.mins) + len(self._groups[g + 1].mins) <= GROUP // 2:
            group.take(self._groups[g + 1])
            self._tops[g] = max(self._tops[g], self._tops[g + 1])
            self._delete_group(g + 1)

    def _insert_group(self, g: int, group: Group[V], head: int) -> None:
        self._groups.insert(g, group)
        self._heads.insert(g, head)
        self._tops.insert(g, max(group.tops, default=0))
        self._peaks = None

    def _delete_group(self, g: int) -> None:
        del self._groups[g], self._heads[g], self._tops[g]
        self._peaks = None

    # --------------------------------------------------------------------------------------------------------- holes

    def holes(self, first: int, last: int, at_least: int = 1) -> Iterator[tuple[int, int]]:
        """The maximal holes within ``[first, last]`` of ``at_least`` addresses or more, ascending, inclusive.

        Holes are clipped to the window before they are measured.
        """
        at_least = max(at_least, 1)
        if at_least > last - first + 1:
            return
        g, from_b, i = self._next(*self._position(first))
        if g < len(self._groups):
            # The hole at the window's start is the only one that may begin below it.
            group = self._groups[g]
            start = group.firsts[from_b][i]
            low, high = max(first, start - group.gaps[from_b][i]), min(start - 1, last)
            if high - low + 1 >= at_least:
                yield low, high
            if start >= last:
                return
            i += 1
        while g < len(self._groups):
            group = self._groups[g]
            if self._tops[g] >= at_least:
                tops = group.tops
                whole, found = from_b == 0, False
                for b in range(from_b, len(tops)):
                    if tops[b] >= at_least:
                        gaps = group.gaps[b]
                        found_here = False
                        for gap in islice(gaps, i, None) if i else gaps:
                            if gap >= at_least:
                                found_here = True
                                start = group.firsts[b][i]
                                if start - gap > last:
                                    return
                                if start <= last:
                                    yield start - gap, start - 1
                                else:
                                    if last - (start - gap) + 1 >= at_least:
                                        yield start - gap, last
                                    return
                            i += 1
                        if found_here:
                            found = True
                        else:
                            tops[b] = max(gaps)
                    i = 0
                if whole and not found:
                    self._tops[g] = max(tops)
            g, from_b, i = self._next_group(g + 1, at_least), 0, 0
        low = first
        if self._groups:
            low = max(first, self._groups[-1].ends[-1] + 1)
        if last - low + 1 >= at_least:
            yield low, last

    def _next_group(self, g: int, at_least: int) -> int:
        """The first group from ``g`` on whose bound admits a hole of ``at_least``."""
        tops, count = self._tops, len(self._tops)
        peaks = self._peaks
        if peaks is None:
            peaks = self._peaks = [max(tops[k : k + FAN]) for k in range(0, count, FAN)]
        while g < count:
            peak = g // FAN
            if peaks[peak] < at_least:
                g = (peak + 1) * FAN
                continue
            end = min((peak + 1) * FAN, count)
            for k in range(g, end):
                if tops[k] >= at_least:
                    return k
            if g % FAN == 0:
                peaks[peak] = max(tops[g:end])
            g = end
        return count

    def _raise(self, g: int, hole: int) -> None:
        """Group ``g`` has a hole of that length."""
        if hole > self._tops[g]:
            self._tops[g] = hole
            if self._peaks is not None and hole > self._peaks[g // FAN]:
                self._peaks[g // FAN] = hole
