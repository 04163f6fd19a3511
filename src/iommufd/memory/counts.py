"""A step function over page indexes, kept as the places where it changes: how often each page of a chunk is pinned.

Invariants: ``_at`` holds, in blocks, the ascending positions where the count differs from the page before; ``_by`` the
differences, never zero; ``_sums`` their sum per block. The count of a page is the sum of the differences up to it. So a
pin of any length is two point updates, sequential pins melt into one step, and what costs is the number of steps, not
of pages.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right

LOAD = 256  # positions in a block


class Steps:
    """Sum of ranges ``[start, end)``, each with a weight. Not locked: the owner serialises."""

    __slots__ = ("_at", "_by", "_mins", "_sums")

    def __init__(self) -> None:
        self._at: list[array[int]] = []
        self._by: list[list[int]] = []
        self._mins: list[int] = []
        self._sums: list[int] = []

    def __len__(self) -> int:
        """The number of steps kept."""
        return sum(map(len, self._at))

    def step(self, at: int, by: int) -> None:
        """Raises the count of every page from ``at`` on by ``by``."""
        mins = self._mins
        b = bisect_right(mins, at) - 1
        if b < 0:
            if not mins:
                self._at.append(array("q", (at,)))
                self._by.append([by])
                mins.append(at)
                self._sums.append(by)
                return
            b, i = 0, 0
            mins[0] = at
        else:
            i = bisect_left(self._at[b], at)
        positions, steps = self._at[b], self._by[b]
        self._sums[b] += by
        if i < len(positions) and positions[i] == at:
            by += steps[i]
            if by:
                steps[i] = by
                return
            del positions[i], steps[i]
            if not positions:
                del self._at[b], self._by[b], mins[b], self._sums[b]
            elif i == 0:
                mins[b] = positions[0]
            return
        positions.insert(i, at)
        steps.insert(i, by)
        if len(positions) > LOAD:
            half = LOAD // 2
            self._at[b : b + 1] = [positions[:half], positions[half:]]
            self._by[b : b + 1] = [steps[:half], steps[half:]]
            self._sums[b : b + 1] = [sum(steps[:half]), sum(steps[half:])]
            mins.insert(b + 1, positions[half])

    def shift(self, start: int, end: int, by: int) -> bool:
        """``step(start, by)`` and ``step(end, -by)`` at once where that only moves one step from ``start`` to ``end``,
        as when pages are pinned or let go one after the other; False (and nothing done) elsewhere."""
        b = bisect_right(self._mins, start) - 1
        if b < 0:
            return False
        positions = self._at[b]
        i = bisect_left(positions, start)
        if i == len(positions) or positions[i] != start or self._by[b][i] != -by:
            return False
        if i + 1 < len(positions):
            if positions[i + 1] <= end:
                return False
        elif b + 1 < len(self._mins) and self._mins[b + 1] <= end:
            return False
        positions[i] = end
        if i == 0:
            self._mins[b] = end
        return True

    def value(self, index: int) -> int:
        """The count of page ``index``."""
        b = bisect_right(self._mins, index) - 1
        if b < 0:
            return 0
        return sum(self._sums[:b]) + sum(self._by[b][: bisect_right(self._at[b], index)])

    def changes(self, start: int, end: int) -> list[tuple[int, int]]:
        """The steps ``(position, difference)`` with ``start < position < end``, ascending."""
        found: list[tuple[int, int]] = []
        for b in range(max(bisect_right(self._mins, start) - 1, 0), bisect_left(self._mins, end)):
            low, high = bisect_right(self._at[b], start), bisect_left(self._at[b], end)
            found += zip(self._at[b][low:high], self._by[b][low:high], strict=True)
        return found

    def changes_within(self, start: int, end: int) -> bool:
        """Whether there is a step at a position with ``start < position < end``."""
        b = bisect_left(self._mins, end) - 1
        return b >= 0 and self._at[b][bisect_left(self._at[b], end) - 1] > start
