"""ExtentDomain: a page table as an extent map, against a dict of pages; dirty state against a set of entries."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iommufd.iommu.bits import each_set
from iommufd.iommu.dirty import FEW
from iommufd.iommu.extent_domain import ExtentDomain
from iommufd.memory.frames import PAGE_SIZE, Chunk, Extent, FrameAllocator
from tests.engine.flat_task import expect

DEFAULT = 0x1FFFFFF800
BASE = 0x1000000
PAGES = 2048


def chunk(order: int = 0, npages: int = PAGES) -> Chunk:
    return FrameAllocator().chunk("test", npages, order)


def domain(sizes: int = DEFAULT, *, dirty: bool = False) -> ExtentDomain:
    return ExtentDomain(sizes, BASE, 2**40, dirty=dirty)


class Sink:
    """Every dirty entry reported, bulk reports taken apart."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, int]] = []
        self.bulk = 0

    def record(self, iova: int, length: int) -> None:
        self.entries.append((iova, length))

    def record_bits(self, iova: int, size: int, bits: memoryview, count: int) -> None:
        self.bulk += 1
        self.entries += [(iova + n * size, size) for n in each_set(bytes(bits), 0, count)]


def dirty(d: ExtentDomain, iova: int = 0, length: int = 2**41, *, clear: bool = True) -> list[tuple[int, int]]:
    sink = Sink()
    d.read_and_clear_dirty(iova, length, clear=clear, sink=sink)
    return sink.entries


# ------------------------------------------------------------------------------------------------------------- mapping


def test_translation_is_exact_to_the_byte() -> None:
    d, c = domain(), chunk()
    d.map(BASE, (Extent(c, 5, 2),), 0x800, 0x1000, 3, False)
    assert d.iova_to_phys(BASE) == c.pfn(5) * PAGE_SIZE + 0x800
    assert d.iova_to_phys(BASE + 0x7FF) == c.pfn(5) * PAGE_SIZE + 0xFFF
    assert d.iova_to_phys(BASE + 0x800) == c.pfn(6) * PAGE_SIZE
    assert d.iova_to_phys(BASE + 0x1000) == 0
    assert d.iova_to_phys(BASE - 1) == 0


@pytest.mark.parametrize(
    ("number", "iova", "offset", "length", "prot"),
    [
        (errno.EINVAL, BASE, 0, 0x1000, 4),  # neither READ nor WRITE
        (errno.EINVAL, 0, 0, 0x1000, 0),  # before the range
        (errno.ERANGE, BASE - 0x1000, 0, 0x1000, 3),
        (errno.ERANGE, 2**40, 0, 0x1000, 3),
        (errno.ENXIO, BASE + 0x400, 0, 0x1000, 3),  # no page size fits
        (errno.ENXIO, BASE, 0x400, 0xC00, 3),
        (errno.ENXIO, BASE, 0, 0xC00, 3),
    ],
)
def test_what_a_table_refuses(number: int, iova: int, offset: int, length: int, prot: int) -> None:  # mock-device 2.6
    d = domain()
    with expect(number):
        d.map(iova, (Extent(chunk(), 0, 2),), offset, length, prot, False)
    assert d.empty


def test_frames_beyond_the_output_address_size() -> None:  # mock-device 2.6
    d = ExtentDomain(DEFAULT, output_bits=32)
    with expect(errno.ERANGE):
        d.map(BASE, (Extent(chunk(), 0, 1),), 0, 0x1000, 3, False)


def test_what_is_mapped_already() -> None:  # mock-device 2.6
    d, c = domain(), chunk()
    d.map(BASE, (Extent(c, 0, 4),), 0, 0x4000, 3, False)
    for iova, length in ((BASE, 0x1000), (BASE + 0x3800, 0x1000), (BASE + 0x1000, 0x800)):
        with expect(errno.EADDRINUSE):
            d.map(iova, (Extent(c, 9, 2),), 0, length, 3, False)
    d.unmap(BASE, 0x4000)
    d.map(BASE, (Extent(c, 9, 1),), 0, 0x1000, 3, False)


def test_cutting_a_mapping_leaves_the_rest() -> None:
    d, c = domain(), chunk()
    d.map(BASE, (Extent(c, 0, 8),), 0, 0x8000, 3, True)
    d.mark_dirty(BASE, 0x8000)
    d.unmap(BASE + 0x2000, 0x3000)
    assert [d.iova_to_phys(BASE + i * PAGE_SIZE) // PAGE_SIZE for i in range(8)] == [
        c.pfn(0), c.pfn(1), 0, 0, 0, c.pfn(5), c.pfn(6), c.pfn(7),
    ]  # fmt: skip
    assert dirty(d) == [(BASE + i * PAGE_SIZE, PAGE_SIZE) for i in (0, 1, 5, 6, 7)]


def test_unmapping_takes_unions_of_maps() -> None:
    d, c = domain(), chunk()
    for i in range(4):
        d.map(BASE + i * PAGE_SIZE, (Extent(c, i, 1),), 0, PAGE_SIZE, 3, False)
    d.unmap(BASE, 4 * PAGE_SIZE)
    assert d.empty


def test_segments_are_what_is_mapped() -> None:
    d, c = domain(), chunk()
    d.map(BASE, (Extent(c, 0, 2),), 0, 0x2000, 3, False)
    d.map(BASE + 0x4000, (Extent(c, 7, 1),), 0x800, 0x800, 1, False)
    found = [(iova, offset, n, prot) for iova, _, offset, n, prot in d.segments(BASE + 0x800, 0x10000)]
    assert found == [(BASE + 0x800, 0x800, 0x1800, 3), (BASE + 0x4000, 0x800, 0x800, 1)]


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40), st.integers(1, 8)), max_size=40))
def test_maps_and_unmaps_against_a_dict(steps: list[tuple[bool, int, int]]) -> None:
    d, c = domain(), chunk()
    model: dict[int, int] = {}
    for number, (mapping, page, count) in enumerate(steps):
        span = range(page, page + count)
        if mapping:
            index = number * 8
            if any(p in model for p in span):
                with expect(errno.EADDRINUSE):
                    d.map(BASE + page * PAGE_SIZE, (Extent(c, index, count),), 0, count * PAGE_SIZE, 3, True)
            else:
                d.map(BASE + page * PAGE_SIZE, (Extent(c, index, count),), 0, count * PAGE_SIZE, 3, True)
                model.update({p: c.pfn(index + i) for i, p in enumerate(span)})
        else:
            d.unmap(BASE + page * PAGE_SIZE, count * PAGE_SIZE)
            for p in span:
                model.pop(p, None)
    for p in range(50):
        assert d.iova_to_phys(BASE + p * PAGE_SIZE) // PAGE_SIZE == model.get(p, 0)


# --------------------------------------------------------------------------------------------------------- dirty state


def test_one_state_per_entry() -> None:  # mock-device 2.7
    d = domain(dirty=True)
    d.map(BASE, (Extent(chunk(9), 0, 512),), 0, 0x200000, 3, False)
    d.mark_dirty(BASE + 0x12345)
    assert dirty(d, clear=False) == [(BASE, 0x200000)]
    assert dirty(d, BASE + 0x1000, 0x1000) == [(BASE, 0x200000)]  # a part of the entry cleans all of it
    assert dirty(d) == []


def test_unmapped_addresses_are_ignored() -> None:  # mock-device 5.4
    d = domain(dirty=True)
    d.map(BASE, (Extent(chunk(), 0, 1),), 0, PAGE_SIZE, 3, False)
    d.mark_dirty_bits(BASE - PAGE_SIZE, PAGE_SIZE, b"\xff", 8)
    assert dirty(d) == [(BASE, PAGE_SIZE)]


def test_the_state_goes_with_the_mapping() -> None:
    d, c = domain(dirty=True), chunk()
    d.map(BASE, (Extent(c, 0, 4),), 0, 4 * PAGE_SIZE, 3, False)
    d.mark_dirty(BASE, 4 * PAGE_SIZE)
    d.unmap(BASE, 4 * PAGE_SIZE)
    d.map(BASE, (Extent(c, 0, 4),), 0, 4 * PAGE_SIZE, 3, False)
    assert dirty(d) == []


def test_many_dirty_entries_are_one_report() -> None:
    d = domain(dirty=True)
    d.map(BASE, (Extent(chunk(), 0, PAGES),), 0, PAGES * PAGE_SIZE, 3, False)
    d.mark_dirty_bits(BASE, PAGE_SIZE, b"\x55" * (PAGES // 8), PAGES)
    sink = Sink()
    d.read_and_clear_dirty(BASE, PAGES * PAGE_SIZE, clear=True, sink=sink)
    assert sink.bulk == 1
    assert sink.entries == [(BASE + i * PAGE_SIZE, PAGE_SIZE) for i in range(0, PAGES, 2)]


@st.composite
def tables(draw: st.DrawFn) -> tuple[ExtentDomain, list[tuple[int, int]]]:
    """A table of one or two mappings of every kind, and all its entries."""
    d = domain(draw(st.sampled_from([DEFAULT, 0x101000])), dirty=True)
    grain = max(0x800, d.pgsize_bitmap & -d.pgsize_bitmap)
    at = BASE
    for _ in range(draw(st.integers(1, 2))):
        c = chunk(draw(st.sampled_from([0, 0, 2, 9])))
        offset = draw(st.integers(0, PAGE_SIZE // grain - 1)) * grain
        pages = draw(st.sampled_from([3, FEW, 3 * FEW]))
        length = pages * PAGE_SIZE - offset - draw(st.integers(0, 1)) * grain
        at += draw(st.integers(0, 3)) * grain
        d.map(at, (Extent(c, draw(st.integers(0, 9)), pages),), offset, length, 3, draw(st.booleans()))
        at += length
    return d, list(entries_of(d, BASE, at))


def entries_of(d: ExtentDomain, at: int, end: int) -> Iterator[tuple[int, int]]:
    while at < end:
        entry = d.entry(at)
        if entry is not None:
            yield entry
            at = sum(entry)
        else:
            at += 0x800


@given(tables(), st.data())
def test_dirty_state_against_a_set_of_entries(
    case: tuple[ExtentDomain, list[tuple[int, int]]], data: st.DataObject
) -> None:
    d, entries = case
    last = sum(entries[-1])
    span = last - BASE
    model: set[tuple[int, int]] = set()
    for _ in range(data.draw(st.integers(1, 6))):
        kind = data.draw(st.sampled_from(["mark", "bits", "read", "clear", "unmap"]))
        start = BASE + data.draw(st.integers(0, span // 0x800)) * 0x800
        length = data.draw(st.integers(1, span // 0x800)) * 0x800
        hit = [e for e in entries if e[0] < start + length and start < sum(e)]
        if kind == "mark":
            d.mark_dirty(start, length)
            model.update(hit)
        elif kind == "bits":
            step = data.draw(st.sampled_from([0x800, 0x1000, 0x1800, 0x4000]))
            bits = data.draw(st.one_of(st.binary(max_size=200), st.integers(0, 200).map(lambda n: b"\xff" * n)))
            d.mark_dirty_bits(start, step, bits, len(bits) * 8)
            touched = {start + n * step for n in each_set(bits, 0, len(bits) * 8)}
            model.update(e for e in entries if any(a in touched for a in range(e[0], sum(e), 0x800)))
            model.update(e for e in entries for t in touched if e[0] <= t < sum(e))
        elif kind == "unmap":
            whole = [e for e in hit if start <= e[0] and sum(e) <= start + length]
            for at, size in whole:
                d.unmap(at, size)
            model.difference_update(whole)
            entries = [e for e in entries if e not in whole]
        else:
            assert dirty(d, start, length, clear=kind == "clear") == sorted(model.intersection(hit))
            if kind == "clear":
                model.difference_update(hit)
    assert dirty(d) == sorted(model)
