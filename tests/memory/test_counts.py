"""Pin counts of a chunk against an array of counts."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iommufd.memory import counts
from iommufd.memory.frames import Chunk, FrameAllocator

N = 40

ranges = st.tuples(st.integers(0, N - 1), st.integers(1, N)).map(lambda r: (r[0], min(r[1], N - r[0])))


def naive_runs(pins: list[int], start: int, end: int) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for index in range(start, end):
        if not pins[index]:
            continue
        if runs and sum(runs[-1]) == index:
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((index, 1))
    return runs


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counts, "LOAD", 4)


def compare(chunk: Chunk, pins: list[int], start: int, end: int) -> None:
    assert [chunk.pins(index) for index in range(N)] == pins
    assert chunk.pinned == sum(pins)
    assert chunk.pinned_in(start, end) == naive_runs(pins, start, end)
    assert chunk.has_pins(start, end) == any(pins[start:end])


@given(st.lists(st.tuples(ranges, st.booleans(), st.integers(0, 1000)), max_size=60), ranges)
def test_against_an_array(steps: list[tuple[tuple[int, int], bool, int]], window: tuple[int, int]) -> None:
    counts.LOAD = 4
    chunk = FrameAllocator().chunk("test", N)
    chunk.hold()
    pins = [0] * N
    standing: list[tuple[int, int]] = []
    for (start, count), add, pick in steps:
        if add or not standing:
            chunk.pin(start, count)
            standing.append((start, count))
            by = 1
        else:
            start, count = standing.pop(pick % len(standing))
            if count > 1 and pick % 3 == 0:  # unpinned in two parts, as two areas that shared one pin would be
                standing.append((start + 1, count - 1))
                count = 1
            chunk.unpin(start, count)
            by = -1
        for index in range(start, start + count):
            pins[index] += by
        compare(chunk, pins, window[0], window[0] + window[1])


def test_sequential_pins_melt_into_one_step() -> None:
    chunk = FrameAllocator().chunk("test", 1000)
    for index in range(10, 900):
        chunk.pin(index, 1)
    assert chunk._steps is not None
    assert len(chunk._steps) == 2
    assert chunk.pinned_in(0, 1000) == [(10, 890)]


def test_a_whole_chunk_needs_no_steps() -> None:
    chunk = FrameAllocator().chunk("test", 1 << 28)
    chunk.hold()
    for _ in range(3):
        chunk.pin(0, 1 << 28)
    assert chunk._steps is None
    assert chunk.pins(12345) == 3
    chunk.unpin(0, 1 << 27)
    assert chunk.pins(0) == 2
    assert chunk.pins(1 << 27) == 3


def test_random_order() -> None:
    chunk = FrameAllocator().chunk("test", 3000)
    chunk.hold()
    order = random.Random(5).sample(range(3000), 3000)
    for index in order[:1500]:
        chunk.pin(index, 1)
    assert sorted(order[:1500]) == [i for start, n in chunk.pinned_in(0, 3000) for i in range(start, start + n)]
    for index in order[1500:]:
        chunk.pin(index, 1)
    assert chunk.pinned_in(0, 3000) == [(0, 3000)]
    for index in order:
        chunk.unpin(index, 1)
    assert chunk.pinned_in(0, 3000) == []
    assert chunk._steps is not None
    assert len(chunk._steps) == 0


def test_more_unpins_than_pins_are_refused() -> None:
    chunk = FrameAllocator().chunk("test", 4)
    chunk.pin(0, 2)
    with pytest.raises(ValueError, match="unpin"):
        chunk.unpin(0, 3)
