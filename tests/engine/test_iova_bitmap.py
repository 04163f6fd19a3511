"""The caller's dirty bitmap (core 8.3), record by record against the rules, and in bulk against records."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iommufd.engine.iova_bitmap import IovaBitmap
from iommufd.iommu import bits as packed
from iommufd.memory.frames import PAGE_SIZE
from iommufd.memory.space import READ
from tests.engine.fakes import FakeProcess, make_world

DATA = 0x1000_0000
IOVA = 0x4000_0000
K, M = 1024, 1024 * 1024


PAGES = 16


def process(pages: int = PAGES, holes: tuple[int, ...] = ()) -> FakeProcess:
    """Memory at DATA, without the pages ``holes``."""
    proc = FakeProcess(make_world())
    for page in range(pages):
        if page not in holes:
            proc.host.map(DATA + page * PAGE_SIZE, 1)
    return proc


def bits_of(proc: FakeProcess, start: int = DATA, pages: int = PAGES) -> set[int]:
    """The numbers of the set bits, counted from ``start``; unmapped memory has none."""
    found = set()
    for page in range(pages):
        content = proc.host.pages.get((DATA >> 12) + page, b"")
        base = (DATA + page * PAGE_SIZE - start) * 8
        found |= {base + n for n in packed.each_set(bytes(content), 0, len(content) * 8)}
    return found


def test_bits_count_from_the_requested_iova() -> None:  # core 8.3
    proc = process()
    bitmap = IovaBitmap(proc.task(), DATA, IOVA + 6 * K, M, 2 * K)
    bitmap.record(IOVA + 8 * K, 2 * K)
    bitmap.record(IOVA + 16 * K, 4 * K)
    bitmap.flush()
    assert bits_of(proc) == {1, 5, 6}


def test_bits_are_ored_at_any_byte() -> None:  # core 8.3
    proc = process()
    proc.host.poke(DATA + 3, b"\x81")
    bitmap = IovaBitmap(proc.task(), DATA + 3, IOVA, M, 4 * K)
    bitmap.record(IOVA + 4 * K, 8 * K)
    bitmap.flush()
    assert bytes(proc.host.peek(DATA, 6)) == b"\0\0\0\x87\0\0"


def test_a_page_size_that_is_no_power_of_two() -> None:  # core 8.2
    proc = process()
    bitmap = IovaBitmap(proc.task(), DATA, IOVA, 12 * M, 12 * K)  # g = 4 KiB
    bitmap.record(IOVA + 12 * K, 4 * K)
    bitmap.flush()
    assert bits_of(proc) == {3}


def test_entries_smaller_and_larger_than_a_bit() -> None:  # core 8.3
    proc = process()
    bitmap = IovaBitmap(proc.task(), DATA, IOVA, 64 * M, 8 * K)
    bitmap.record(IOVA + 4 * K, 4 * K)
    bitmap.record(IOVA + 2 * M, 2 * M)
    bitmap.flush()
    assert bits_of(proc) == {0, *range(256, 512)}


def test_an_entry_that_begins_below_sets_nothing() -> None:  # core 8.3
    proc = process()
    bitmap = IovaBitmap(proc.task(), DATA, IOVA, M, 4 * K)
    bitmap.record(IOVA - 4 * K, 8 * K)
    bitmap.flush()
    assert bits_of(proc) == set()


@pytest.mark.parametrize(("offset", "reach"), [(0, 4096), (0x10, 8176), (0xFFF, 4097)])
def test_how_far_an_entry_spills_over_the_end(offset: int, reach: int) -> None:  # core 8.3, observed on 7.3.4
    proc = process()
    bitmap = IovaBitmap(proc.task(), DATA + offset, IOVA, 8 * 4 * K, 4 * K)  # one byte of bitmap
    bitmap.record(IOVA, 2 * 1024 * M)
    bitmap.flush()
    assert bits_of(proc, DATA + offset) == set(range(reach * 8))


def test_the_window_begins_at_the_first_dirty_byte() -> None:
    proc = process()
    bitmap = IovaBitmap(proc.task(), DATA, IOVA, 8 * 4 * K * 16, 4 * K)  # 16 bytes of bitmap
    bitmap.record(IOVA + 8 * 4 * K * 8, 2 * 1024 * M)  # byte 8 of page 0: one more page is pinned
    bitmap.flush()
    assert bits_of(proc) == set(range(64, 8192 * 8))


def test_memory_that_is_not_there_loses_bits_silently() -> None:  # core 8.3
    proc = process(holes=(1,))
    proc.host.protect(DATA + 2 * PAGE_SIZE, 1, READ)
    bitmap = IovaBitmap(proc.task(), DATA, IOVA, 4096 * 8 * 8 * 4 * K, 4 * K)
    page = PAGE_SIZE * 8 * 4 * K
    for n in range(4):
        bitmap.record(IOVA + n * page + 40 * K, 4 * K)
    bitmap.flush()
    assert bits_of(proc) == {10, 3 * PAGE_SIZE * 8 + 10}


def test_an_entry_that_runs_into_a_hole_loses_the_rest_of_its_bits() -> None:  # core 8.3
    proc = process(holes=(1,))
    bitmap = IovaBitmap(proc.task(), DATA, IOVA, 4096 * 8 * 8 * 4 * K, 4 * K)
    page = PAGE_SIZE * 8 * 4 * K
    bitmap.record(IOVA + page - 8 * K, 2 * page)  # the last bits of page 0, the hole, nearly all of page 2
    bitmap.record(IOVA + 3 * page, 4 * K)
    bitmap.flush()
    assert bits_of(proc) == {PAGE_SIZE * 8 - 2, PAGE_SIZE * 8 - 1, 3 * PAGE_SIZE * 8}


@pytest.mark.parametrize("data", [0, 2**64 - 2 * PAGE_SIZE, 0x7777_0000])
def test_a_bitmap_nowhere(data: int) -> None:
    proc = process()
    bitmap = IovaBitmap(proc.task(), data, IOVA, M, 4 * K)
    bitmap.record(IOVA, 4 * K)
    bitmap.record_bits(IOVA, 4 * K, memoryview(b"\xff" * 16), 128)
    bitmap.flush()
    assert bits_of(proc) == set()


@given(
    bits=st.one_of(st.binary(min_size=1, max_size=100), st.integers(1, 200).map(lambda n: b"\xff" * n)),
    size=st.sampled_from([2 * K, 4 * K, 64 * K, 1 * M]),
    grain=st.sampled_from([2 * K, 4 * K, 16 * K, 64 * K]),
    first=st.integers(0, 40),
    offset=st.sampled_from([0, 1, 0x10, 0xFFF]),
    holes=st.sampled_from([(), (1,), (0, 2)]),
    short=st.integers(0, 7),
)
def test_bulk_reports_are_many_records(
    bits: bytes, size: int, grain: int, first: int, offset: int, holes: tuple[int, ...], short: int
) -> None:
    count = len(bits) * 8 - short
    bits = (int.from_bytes(bits, "little") & ((1 << count) - 1)).to_bytes(len(bits), "little")
    start = IOVA + first * size
    length = -(-(first + count) * size // grain) * grain
    results = []
    for bulk in (True, False):
        proc = process(holes=holes)
        bitmap = IovaBitmap(proc.task(), DATA + offset, IOVA, length, grain)
        if bulk:
            bitmap.record_bits(start, size, memoryview(bits), count)
        else:
            for n in packed.each_set(bits, 0, count):
                bitmap.record(start + n * size, size)
        bitmap.record(IOVA + length - grain, 3 * grain)  # spills: the window must be where records would have put it
        bitmap.flush()
        results.append(bits_of(proc))
    assert results[0] == results[1]
