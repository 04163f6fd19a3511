"""Sets of IOVA intervals: merged, sorted, immutable. Pure; inclusive ``[first, last]`` throughout."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

ULMAX = 2**64 - 1

Range = tuple[int, int]


class Ranges:
    """A union of intervals. Overlapping and touching intervals are one."""

    __slots__ = ("firsts", "lasts")

    def __init__(self, intervals: Iterable[Range] = ()) -> None:
        self.firsts: list[int] = []
        self.lasts: list[int] = []
        for first, last in sorted(intervals):
            if self.lasts and first <= self.lasts[-1] + 1:
                self.lasts[-1] = max(self.lasts[-1], last)
            else:
                self.firsts.append(first)
                self.lasts.append(last)

    def __len__(self) -> int:
        return len(self.firsts)

    def __iter__(self) -> Iterator[Range]:
        return zip(self.firsts, self.lasts, strict=True)

    def __repr__(self) -> str:
        return "Ranges(" + ", ".join(f"[{first:#x}, {last:#x}]" for first, last in self) + ")"

    def overlap(self, first: int, last: int) -> Range | None:
        """The highest member that intersects ``[first, last]``, or None."""
        at = bisect_right(self.firsts, last) - 1
        if at >= 0 and self.lasts[at] >= first:
            return self.firsts[at], self.lasts[at]
        return None

    def within(self, first: int, last: int) -> Iterator[Range]:
        """The members clipped to ``[first, last]``, ascending."""
        at = bisect_left(self.lasts, first)
        while at < len(self.firsts) and self.firsts[at] <= last:
            yield max(first, self.firsts[at]), min(last, self.lasts[at])
            at += 1

    def gaps(self, first: int, last: int) -> Iterator[Range]:
        """What of ``[first, last]`` is in no member, ascending."""
        for used_first, used_last in self.within(first, last):
            if first < used_first:
                yield first, used_first - 1
            first = used_last + 1
        if first <= last:
            yield first, last


EMPTY = Ranges()
