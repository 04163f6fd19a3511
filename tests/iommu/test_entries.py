"""Translation entries (mock-device 2.6) against the greedy rule walked byte range by byte range."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iommufd.iommu.entries import Mapping
from iommufd.memory.frames import PAGE_SIZE, Chunk, Extent, Extents, FrameAllocator

K, M = 1024, 1024 * 1024
DEFAULT = 0x1FFFFFF800  # 2 KiB .. 64 GiB
HUGE = 0x101000  # 4 KiB, 1 MiB


def chunk(order: int = 0, npages: int = 4096) -> Chunk:
    return FrameAllocator().chunk("test", npages, order)


def greedy(mapping: Mapping, first: int, last: int, sizes: int) -> list[tuple[int, int]]:
    """The rule as it is written: runs of consecutive bytes, each cut from low to high."""
    end = mapping.offset + last - first + 1
    frames = [e.chunk.pfn(e.index + i) for e in mapping.extents for i in range(e.count)]
    entries: list[tuple[int, int]] = []
    at = mapping.offset
    while at < end:
        page = at // PAGE_SIZE + 1
        while page * PAGE_SIZE < end and not mapping.page_by_page and frames[page] == frames[page - 1] + 1:
            page += 1
        stop = min(page * PAGE_SIZE, end)
        while at < stop:
            iova, paddr = first + at - mapping.offset, frames[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE
            fitting = (1 << b for b in range(64) if 1 << b & sizes and not (iova | paddr) % (1 << b))
            size = max(s for s in fitting if s <= stop - at)
            entries.append((iova, size))
            at += size
    return entries


def computed(mapping: Mapping, first: int, last: int, sizes: int) -> list[tuple[int, int]]:
    entries = []
    at = first
    while at <= last:
        entry = mapping.entry(first, last, at, sizes)
        entries.append(entry)
        at = entry[0] + entry[1]
    return entries


@pytest.mark.parametrize(
    ("order", "index", "iova", "length", "sizes", "wanted"),
    [
        (0, 0, 16 * M, 8 * K, DEFAULT, [4 * K, 4 * K]),  # ordinary pages: never consecutive
        (0, 0, 16 * M + 2 * K, 8 * K, DEFAULT, [2 * K] * 4),  # IOVA and PA apart by half a page
        (9, 0, 16 * M, 2 * M, DEFAULT, [2 * M]),
        (9, 0, 17 * M, 2 * M, DEFAULT, [1 * M, 1 * M]),
        (9, 0, 16 * M, 4 * M, DEFAULT, [2 * M, 2 * M]),  # two huge pages are not consecutive
        (10, 0, 16 * M, 4 * M, DEFAULT, [4 * M]),
        (9, 0, 16 * M, 2 * M, HUGE, [1 * M, 1 * M]),
        (9, 0, 16 * M + 4 * K, 2 * M - 8 * K, HUGE, [4 * K] * 510),
        (9, 1, 16 * M + 4 * K, 12 * K, DEFAULT, [4 * K, 8 * K]),
    ],
)
def test_entries_of_common_mappings(
    order: int, index: int, iova: int, length: int, sizes: int, wanted: list[int]
) -> None:
    pages = -(-length // PAGE_SIZE) + 1
    mapping = Mapping((Extent(chunk(order), index, pages),), 0, 3, False)
    assert [size for _, size in computed(mapping, iova, iova + length - 1, sizes)] == wanted


def test_without_large_pages_every_entry_is_a_page() -> None:
    mapping = Mapping((Extent(chunk(9), 0, 512),), 0, 3, True)
    assert computed(mapping, 16 * M, 18 * M - 1, DEFAULT) == [(16 * M + i * PAGE_SIZE, PAGE_SIZE) for i in range(512)]


@st.composite
def mappings(draw: st.DrawFn) -> tuple[Mapping, int, int, int]:
    """A mapping of a few extents at an IOVA that is not always congruent with the memory."""
    sizes = draw(st.sampled_from([DEFAULT, HUGE, 0x1800, 0x40201000]))
    smallest = sizes & -sizes
    grain = min(smallest, PAGE_SIZE)
    pieces: list[Extent] = []
    chunks = [chunk(draw(st.sampled_from([0, 0, 1, 3, 9])), 64) for _ in range(2)]
    for _ in range(draw(st.integers(1, 3))):
        source = draw(st.sampled_from(chunks))
        index = draw(st.integers(0, 40))
        pieces.append(Extent(source, index, draw(st.integers(1, 64 - index))))
    extents: Extents = tuple(pieces)
    total = sum(e.count for e in extents) * PAGE_SIZE
    offset = draw(st.integers(0, PAGE_SIZE // grain - 1)) * grain
    length = draw(st.integers(1, (total - offset) // grain)) * grain
    first = draw(st.integers(0, 4096)) * grain
    return Mapping(extents, offset, 3, draw(st.booleans())), first, first + length - 1, sizes


@given(mappings())
def test_entries_are_those_of_the_greedy_rule(case: tuple[Mapping, int, int, int]) -> None:
    mapping, first, last, sizes = case
    wanted = greedy(mapping, first, last, sizes)
    assert computed(mapping, first, last, sizes) == wanted
    for iova, size in wanted:  # whichever byte of an entry is asked for
        assert mapping.entry(first, last, iova + size - 1, sizes) == (iova, size)


@given(mappings())
def test_a_uniform_part_is_uniform(case: tuple[Mapping, int, int, int]) -> None:
    mapping, first, last, sizes = case
    found = mapping.uniform(first, last, sizes)
    if found is not None:
        inside = [e for e in greedy(mapping, first, last, sizes) if found.start <= e[0] < found.end]
        assert inside == [(at, found.size) for at in range(found.start, found.end, found.size)]
        assert (found.end - found.start) % found.size == 0


def test_ordinary_pages_are_uniform() -> None:
    mapping = Mapping((Extent(chunk(), 0, 100),), 0x800, 3, False)
    assert mapping.uniform(0x10800, 0x10800 + 100 * PAGE_SIZE - 0x1001, DEFAULT) == (PAGE_SIZE, 0x11000, 0x73000)
