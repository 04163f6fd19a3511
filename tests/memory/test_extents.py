"""Pure functions on extents against plain lists of frame numbers and bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iommufd.errors import KernelError
from iommufd.memory import extents as ex
from iommufd.memory.frames import PAGE_SIZE, Extent, Extents, FrameAllocator
from iommufd.memory.physical import Physical


@st.composite
def some_extents(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Extents:
    """A few extents of chunks of several orders, neighbours in one chunk among them."""
    allocator = FrameAllocator()
    chunks = [allocator.chunk(order, 40, order) for order in (0, 0, 2, 9)]
    found: list[Extent] = []
    for _ in range(draw(st.integers(1, 5))):
        chunk = draw(st.sampled_from(chunks))
        index = draw(st.integers(0, 38))
        if found and draw(st.booleans()):
            before = found[-1]
            if before.index + before.count < 40:
                chunk, index = before.chunk, before.index + before.count
        found.append(Extent(chunk, index, draw(st.integers(1, 40 - index))))
    return tuple(found)


def numbers(extents: Extents) -> list[int]:
    return [e.chunk.pfn(e.index + i) for e in extents for i in range(e.count)]


@given(some_extents(), st.data())
def test_slices_and_lookups(extents: Extents, data: st.DataObject) -> None:
    pages = numbers(extents)
    assert ex.total(extents) == len(pages)
    start = data.draw(st.integers(0, len(pages)))
    count = data.draw(st.integers(0, len(pages) - start))
    part = ex.slice_extents(extents, start, count)
    assert numbers(part) == pages[start : start + count]
    page = data.draw(st.integers(0, len(pages) - 1))
    assert ex.pfn_at(extents, page) == pages[page]
    chunk, index = ex.frame_at(extents, page)
    assert chunk.pfn(index) == pages[page]
    with pytest.raises(IndexError):
        ex.frame_at(extents, len(pages))
    with pytest.raises(ValueError, match="pages"):
        ex.slice_extents(extents, start, len(pages) + 1 - start)


@given(some_extents())
def test_join_keeps_the_frames(extents: Extents) -> None:
    joined = ex.join(extents)
    assert numbers(joined) == numbers(extents)
    assert ex.join(joined) == joined
    assert ex.same_frames(extents, joined)
    assert not ex.same_frames(extents, (*joined, joined[0]))


@given(some_extents(), st.data())
def test_runs_are_the_maximal_contiguous_ones(extents: Extents, data: st.DataObject) -> None:
    pages = numbers(extents)
    size = len(pages) * PAGE_SIZE
    offset = data.draw(st.integers(0, size - 1))
    length = data.draw(st.integers(1, size - offset))
    expected: list[tuple[int, int, int]] = []  # offset, paddr, nbytes
    at = offset
    while at < offset + length:
        n = min(PAGE_SIZE - at % PAGE_SIZE, offset + length - at)
        paddr = pages[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE
        if expected and expected[-1][1] + expected[-1][2] == paddr:
            last = expected[-1]
            expected[-1] = last[0], last[1], last[2] + n
        else:
            expected.append((at - offset, paddr, n))
        at += n
    runs = list(ex.runs(extents, offset, length))
    assert len(runs) <= 3 * len(extents)
    assert all((run.stride == 0) == (run.repeat == 1) for run in runs)
    assert [
        (run.offset + k * run.nbytes, run.paddr + k * run.stride, run.nbytes) for run in runs for k in range(run.repeat)
    ] == expected


def test_runs_of_a_terabyte_are_one() -> None:
    chunk = FrameAllocator().chunk("huge", 1 << 28)
    (run,) = ex.runs((Extent(chunk, 0, 1 << 28),), 0, 1 << 40)
    assert (run.repeat, run.nbytes, run.stride) == (1 << 28, 4096, 8192)


def test_runs_beyond_the_end() -> None:
    chunk = FrameAllocator().chunk("test", 2)
    with pytest.raises(ValueError, match="more than"):
        list(ex.runs((Extent(chunk, 0, 2),), 4096, 8192))


def test_pins_come_and_go_together() -> None:
    chunk = FrameAllocator().chunk("test", 10)
    extents = (Extent(chunk, 2, 3), Extent(chunk, 7, 1))
    for extent in extents * 2:
        extent.chunk.pin(extent.index, extent.count)
    ex.unpin_extents(extents)
    assert chunk.pinned_in(0, 10) == [(2, 3), (7, 1)]
    ex.unpin_extents(extents)
    assert chunk.pinned == 0


@given(st.data())
def test_reading_and_writing_across_extents(data: st.DataObject) -> None:
    physical = Physical()
    chunks = [physical.buffer(name, 4) for name in "ab"]
    extents = (Extent(chunks[0], 3, 1), Extent(chunks[1], 0, 2), Extent(chunks[0], 0, 1))
    memory = bytearray(4 * PAGE_SIZE)
    for _ in range(4):
        at = data.draw(st.integers(0, len(memory) - 1))
        text = data.draw(st.binary(max_size=40)) * data.draw(st.sampled_from([1, 300]))
        text = text[: len(memory) - at]
        ex.write_extents(extents, at, text)
        memory[at : at + len(text)] = text
    assert ex.read_extents(extents, 0, len(memory)) == memory
    with pytest.raises(KernelError):
        ex.read_extents(extents, len(memory) - 1, 2)
    physical.store.close()
