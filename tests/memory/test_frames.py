"""Chunks and the PFN ranges behind them (design 4)."""

from __future__ import annotations

import errno
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iommufd.errors import KernelError
from iommufd.memory.frames import PFN_END, FrameAllocator
from iommufd.memory.physical import Physical


def pfns(allocator: FrameAllocator, npages: int, order: int) -> list[int]:
    chunk = allocator.chunk("test", npages, order)
    return [chunk.pfn(index) for index in range(npages)]


def test_ordinary_pages_are_never_adjacent() -> None:
    allocator = FrameAllocator()
    numbers = pfns(allocator, 50, 0) + pfns(allocator, 50, 0)
    assert len(set(numbers)) == 100
    assert all(number + 1 not in numbers for number in numbers)


def test_a_huge_page_is_contiguous_and_aligned_and_its_neighbour_is_not_adjacent() -> None:
    numbers = pfns(FrameAllocator(), 1024, 9)
    assert numbers[0] % 512 == 0
    assert numbers[512] % 512 == 0
    assert numbers[:512] == list(range(numbers[0], numbers[0] + 512))
    assert numbers[512] != numbers[511] + 1


@given(st.lists(st.tuples(st.integers(1, 2000), st.sampled_from([0, 0, 1, 9])), min_size=1, max_size=12))
def test_frames_of_different_blocks_are_never_adjacent(sizes: list[tuple[int, int]]) -> None:
    allocator = FrameAllocator()
    blocks: list[tuple[int, int]] = []
    for npages, order in sizes:
        chunk = allocator.chunk("test", npages, order)
        for index in range(0, npages, 1 << order):
            blocks.append((chunk.pfn(index), chunk.pfn(min(index + (1 << order), npages) - 1)))
            assert chunk.pfn(index) % (1 << order) == 0
        assert chunk.index_of(chunk.pfn(npages - 1)) == npages - 1
        assert chunk.index_of(chunk.pfn(npages - 1) + 1) is None
    blocks.sort()
    assert all(high + 1 < low for (_, high), (low, _) in itertools.pairwise(blocks))


def test_a_buffer_is_one_block() -> None:
    chunk = FrameAllocator().contiguous("dma-buf", 5)
    assert [chunk.pfn(i) - chunk.base_pfn for i in range(5)] == [0, 1, 2, 3, 4]
    assert chunk.base_pfn % 8 == 0


def test_physical_addresses_stay_below_two_to_the_51() -> None:
    allocator = FrameAllocator(first=PFN_END - 64, end=PFN_END)
    chunk = allocator.chunk("last", 32)
    assert chunk.pfn(31) < 1 << 39
    with pytest.raises(KernelError) as caught:
        allocator.chunk("too much", 1)
    assert caught.value.errno == errno.ENOMEM


def test_a_range_is_used_again_only_when_nobody_counts_on_it() -> None:
    allocator = FrameAllocator(first=16, end=24)
    chunk = allocator.chunk("first", 4)
    chunk.resolve_from(1)
    chunk.pin(0, 2)
    chunk.hold()

    def full() -> bool:
        try:
            allocator.chunk("next", 4)
        except KernelError:
            return True
        return False

    assert full()
    chunk.resolve_from(-1)  # no VA interval any more
    assert full()
    chunk.unpin(0, 2)  # not pinned
    assert full()
    chunk.drop()  # not in a domain
    assert not full()


def test_untouched_ranges_are_preferred() -> None:
    allocator = FrameAllocator()
    first = allocator.chunk("first", 4)
    first.pin(0, 1)
    first.unpin(0, 1)
    assert len(allocator) == 0
    assert allocator.chunk("second", 4).base_pfn > first.pfn(3)


def test_a_frame_number_leads_back_to_its_page() -> None:
    allocator = FrameAllocator()
    allocator.chunk("other", 7)
    chunk = allocator.chunk("test", 7)
    assert allocator.frame(chunk.pfn(5)) == (chunk, 5)
    assert allocator.frame(chunk.pfn(5) + 1) is None
    assert allocator.frame(1) is None


def test_a_buffer_holds_bytes_and_gives_them_back() -> None:
    physical = Physical()
    chunk = physical.buffer("dma-buf", 3)
    assert chunk.read(0, 3 * 4096) == bytes(3 * 4096)
    chunk.write(4090, b"across pages")
    assert chunk.read(4090, 12) == b"across pages"
    view = chunk.view(4096, 8192)
    assert view is not None
    assert bytes(view[:6]) == b" pages"
    view[0:2] = b"PA"
    assert chunk.read(4096, 2) == b"PA"
    with pytest.raises(KernelError) as caught:
        chunk.read(3 * 4096 - 1, 2)
    assert caught.value.errno == errno.EFAULT
    chunk.drop()
    assert len(physical.frames) == 0
    again = physical.buffer("next", 3)
    assert again.read(4090, 12) == bytes(12)  # what was there is gone


def test_physical_addresses() -> None:
    physical = Physical()
    chunk = physical.buffer("dma-buf", 2)
    address = chunk.base_pfn << 12
    assert physical.write(address + 4094, b"abcd")
    assert physical.read(address + 4094, 4) == b"abcd"
    assert physical.read(address + 8190, 4) is None  # reaches beyond the block
    assert physical.read(0x1000, 1) is None
    assert not physical.write(0x1000, b"x")


def test_users_are_one_object_per_uid() -> None:
    physical = Physical()
    assert physical.user(7) is physical.user(7)
    assert physical.user(7) is not physical.user(8)
