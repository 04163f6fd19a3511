"""Which translation entries a page table has, computed from what is mapped (mock-device 2.6; kernel: generic_pt map).

Invariants: mapping a physically contiguous run makes entries greedily from low to high, each of the largest page size
that divides both IOVA and physical address and fits what remains. Page sizes are powers of two, so aligned blocks
nest, and the greedy entry over an address is simply the largest aligned block of an allowed size that contains it and
lies inside the run. Hence no entry depends on another one and none is stored.

A run ends where frames are not consecutive (the end of a chunk's block), at the ends of the mapping, and at every page
when large pages are disabled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from iommufd.memory.extents import join
from iommufd.memory.frames import PAGE_SHIFT, PAGE_SIZE

if TYPE_CHECKING:
    from iommufd.memory.frames import Extents

_PAGED = 0x100
_U64 = 2**64 - 1


class Uniform(NamedTuple):
    """``[start, end)`` of a mapping is tiled with entries of ``size`` bytes; only its ends may be otherwise."""

    size: int
    start: int
    end: int


class Mapping:
    """What one map call put into a table; where it lies (``first``, ``last``) its index knows.

    ``offset``: bytes from the start of ``extents`` to the mapping's first byte, any number of pages in.
    """

    __slots__ = ("_flags", "extents", "offset")

    def __init__(self, extents: Extents, offset: int, prot: int, page_by_page: bool) -> None:
        self.extents = extents if len(extents) == 1 else join(extents)
        self.offset = offset
        self._flags = prot | _PAGED if page_by_page else prot

    @property
    def prot(self) -> int:
        return self._flags & ~_PAGED

    @property
    def page_by_page(self) -> bool:
        return bool(self._flags & _PAGED)

    def moved(self, by: int) -> Mapping:
        """The same mapping without its first ``by`` bytes."""
        return Mapping(self.extents, self.offset + by, self.prot, self.page_by_page)

    def run(self, first: int, last: int, iova: int) -> tuple[int, int, int]:
        """The physically contiguous run over ``iova`` as [low, high) in IOVA, and the physical address of ``iova``."""
        at = self.offset + iova - first
        start = 0  # of the extent, in bytes of the extents
        for extent in self.extents:
            size = extent.count << PAGE_SHIFT
            if at < start + size:
                break
            start += size
        else:
            raise IndexError(at)
        chunk = extent.chunk
        block = PAGE_SIZE if self._flags & _PAGED else PAGE_SIZE << chunk.order
        in_chunk = (extent.index << PAGE_SHIFT) + at - start
        before = in_chunk & (block - 1)
        low = max(start, at - before, self.offset)
        high = min(start + size, at - before + block, self.offset + last - first + 1)
        paddr = chunk.pfn(in_chunk >> PAGE_SHIFT) << PAGE_SHIFT | in_chunk & (PAGE_SIZE - 1)
        return iova - (at - low), iova + (high - at), paddr

    def entry(self, first: int, last: int, iova: int, pgsize_bitmap: int) -> tuple[int, int]:
        """The entry over ``iova``: its first IOVA and its size in bytes."""
        low, high, paddr = self.run(first, last, iova)
        apart = (iova - paddr) & _U64
        limit = high - low
        if apart:
            limit = min(limit, apart & -apart)
        sizes = pgsize_bitmap & ((1 << limit.bit_length()) - 1)
        while sizes:
            size = 1 << (sizes.bit_length() - 1)
            start = iova & -size
            if size <= limit and low <= start and start + size <= high:
                return start, size
            sizes ^= size
        raise AssertionError(f"no page size of {pgsize_bitmap:#x} fits at {iova:#x}")

    def uniform(self, first: int, last: int, pgsize_bitmap: int) -> Uniform | None:
        """The part of the mapping whose entries are all of one size, where that is (nearly) all of it; else None.

        The common cases: ordinary pages, and large pages whose blocks are mapped whole."""
        paged = bool(self._flags & _PAGED)
        order = 0 if paged else self.extents[0].chunk.order
        block = PAGE_SIZE << order
        phase = -(self.extents[0].index << PAGE_SHIFT) & (block - 1)  # where blocks begin, in bytes of the extents
        start, final = 0, len(self.extents) - 1
        if not paged:
            for position, extent in enumerate(self.extents):
                index_mask = (1 << order) - 1
                if extent.chunk.order != order or (position and extent.index & index_mask):
                    return None
                if (start - (extent.index << PAGE_SHIFT) - phase) & (block - 1):
                    return None
                if position < final and (extent.index + extent.count) & index_mask:
                    return None
                start += extent.count << PAGE_SHIFT
        apart = (first - self.offset + phase) & (block - 1)
        sizes = pgsize_bitmap & ((((apart & -apart) or block) << 1) - 1)
        if not sizes:
            return None
        end = self.offset + last - first + 1
        low = self.offset + ((phase - self.offset) & (block - 1))
        high = end - ((end - phase) & (block - 1))
        if high <= low:
            return None
        return Uniform(1 << (sizes.bit_length() - 1), first + low - self.offset, first + high - self.offset)
