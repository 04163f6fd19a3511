"""IntervalIndex against a list of pairs, with blocks and groups so small that every seam between them is crossed."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from iommufd.memory import intervals
from iommufd.memory.intervals import ADDRESS_LAST, IntervalIndex

Entry = tuple[int, int, int]


class Naive:
    """The same thing as one sorted list."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def inside(self, first: int, last: int) -> list[Entry]:
        return [entry for entry in self.entries if entry[0] <= last and entry[1] >= first]

    def holes(self, first: int, last: int, at_least: int) -> Iterator[tuple[int, int]]:
        cursor = first
        for start, end, _ in self.inside(first, last):
            if start - cursor >= at_least:
                yield cursor, start - 1
            cursor = end + 1
        if last - cursor + 1 >= at_least:
            yield cursor, last


SPACE = 4000
points = st.one_of(st.integers(0, SPACE), st.integers(ADDRESS_LAST - 50, ADDRESS_LAST))
lengths = st.integers(1, 40)


class Comparison(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index: IntervalIndex[int] = IntervalIndex()
        self.naive = Naive()
        self.count = 0

    @rule(first=points, length=lengths)
    def insert(self, first: int, length: int) -> None:
        last = min(first + length - 1, ADDRESS_LAST)
        if self.naive.inside(first, last):
            with pytest.raises(ValueError, match="overlaps"):
                self.index.insert(first, last, -1)
            return
        self.count += 1
        self.index.insert(first, last, self.count)
        self.naive.entries.append((first, last, self.count))
        self.naive.entries.sort()

    @rule(seed=st.integers(0, 1000), number=st.integers(1, 60), step=st.sampled_from([8, 10, 13]))
    def insert_many(self, seed: int, number: int, step: int) -> None:
        chosen = random.Random(seed)
        places = list(range(chosen.randrange(40), SPACE, step))
        for first in chosen.sample(places, number) if seed % 2 else places[:number]:
            self.insert(first, 8)

    @precondition(lambda self: self.naive.entries)
    @rule(data=st.data(), number=st.integers(1, 40))
    def remove(self, data: st.DataObject, number: int) -> None:
        at = data.draw(st.integers(0, len(self.naive.entries) - 1))
        for first, _, value in self.naive.entries[at : at + number]:
            assert self.index.remove(first) == value
        del self.naive.entries[at : at + number]

    @rule(first=points)
    def remove_what_is_not_there(self, first: int) -> None:
        if all(entry[0] != first for entry in self.naive.entries):
            with pytest.raises(KeyError):
                self.index.remove(first)

    @rule(a=points, b=points)
    def look(self, a: int, b: int) -> None:
        first, last = min(a, b), max(a, b)
        inside = self.naive.inside(first, last)
        assert list(self.index.items(first, last)) == inside
        assert self.index.first_in(first, last) == (inside[0] if inside else None)
        assert self.index.overlaps(first, last) == bool(inside)
        at = self.naive.inside(a, a)
        assert self.index.find(a) == (at[0] if at else None)
        below = [entry for entry in self.naive.entries if entry[1] < first]
        above = [entry for entry in self.naive.entries if entry[0] > last]
        assert self.index.neighbours(first, last) == (below[-1] if below else None, above[0] if above else None)

    @rule(a=points, b=points, at_least=st.one_of(st.integers(0, 60), st.just(3000)))
    def holes(self, a: int, b: int, at_least: int) -> None:
        first, last = min(a, b), max(a, b)
        expected = list(self.naive.holes(first, last, max(at_least, 1)))
        assert next(self.index.holes(first, last, at_least), None) == (expected[0] if expected else None)
        assert list(self.index.holes(first, last, at_least)) == expected

    @precondition(lambda self: self.naive.entries)
    @rule(data=st.data())
    def nth(self, data: st.DataObject) -> None:
        n = data.draw(st.integers(0, len(self.naive.entries) - 1))
        assert self.index.nth(n) == self.naive.entries[n]

    @invariant()
    def same(self) -> None:
        assert list(self.index) == self.naive.entries
        assert list(self.index.values()) == [entry[2] for entry in self.naive.entries]
        assert len(self.index) == len(self.naive.entries)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "LOAD", 4)
    monkeypatch.setattr(intervals, "GROUP", 4)
    monkeypatch.setattr(intervals, "FAN", 2)


def test_against_a_naive_model() -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(Comparison, settings=settings(max_examples=60, stateful_step_count=30, deadline=None))


def test_empty() -> None:
    index: IntervalIndex[None] = IntervalIndex()
    assert len(index) == 0
    assert index.find(0) is None
    assert index.first_in(0, ADDRESS_LAST) is None
    assert not index.overlaps(0, ADDRESS_LAST)
    assert index.neighbours(5, 5) == (None, None)
    assert list(index.holes(0, ADDRESS_LAST)) == [(0, ADDRESS_LAST)]
    assert list(index.holes(7, 9, 4)) == []
    with pytest.raises(IndexError):
        index.nth(0)
    with pytest.raises(KeyError):
        index.remove(0)


def test_the_whole_address_range() -> None:
    index: IntervalIndex[str] = IntervalIndex()
    index.insert(0, ADDRESS_LAST, "all")
    assert index.find(ADDRESS_LAST) == (0, ADDRESS_LAST, "all")
    assert list(index.holes(0, ADDRESS_LAST)) == []
    with pytest.raises(ValueError, match="overlaps"):
        index.insert(ADDRESS_LAST, ADDRESS_LAST, "more")
    index.clear()
    assert list(index.holes(0, 9)) == [(0, 9)]


def test_a_hole_search_that_was_led_astray_learns() -> None:
    """Bounds that inserts left too high are put right by the search that met them, not met again by the next."""
    index: IntervalIndex[None] = IntervalIndex()
    for k in range(64):
        index.insert(k * 0x4000, k * 0x4000 + 0xFFF, None)
    for k in range(64):
        index.insert(k * 0x4000 + 0x2000, k * 0x4000 + 0x2FFF, None)  # every hole of 0x3000 becomes two of 0x1000
    high = sum(top > 0x1000 for group in index._groups for top in group.tops)
    assert high
    assert next(index.holes(0, ADDRESS_LAST, 0x2000)) == (63 * 0x4000 + 0x3000, ADDRESS_LAST)
    assert not any(top > 0x1000 for group in index._groups for top in group.tops)
    assert next(index.holes(0, ADDRESS_LAST, 0x2000)) == (63 * 0x4000 + 0x3000, ADDRESS_LAST)
    assert max(index._tops) == 0x1000
