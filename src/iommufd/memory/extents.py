"""Pure functions on tuples of extents: the ordered pages behind a range of IOVA or VA.

Invariants: an ``Extents`` tuple is read in order; page numbers and offsets count from its start; extents hold at least
one page. :func:`join` gives the shortest form, in which neighbouring pages of one chunk stand in one extent; everything
here takes any form.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from iommufd.errors import KernelError
from iommufd.memory.frames import PAGE_SHIFT, PAGE_SIZE, Chunk, Extent, Extents


class Run(NamedTuple):
    """``repeat`` physically contiguous pieces of ``nbytes``, each ``stride`` bytes of physical address after the one
    before.

    Piece k covers the range's bytes ``[offset + k*nbytes, offset + (k+1)*nbytes)`` at ``paddr + k*stride``. No two
    pieces, of one Run or of consecutive ones, are physically adjacent.
    """

    offset: int
    paddr: int
    nbytes: int
    repeat: int = 1
    stride: int = 0


def total(extents: Extents) -> int:
    """The number of pages."""
    if len(extents) == 1:
        return extents[0].count
    return sum(extent.count for extent in extents)


def join(extents: Iterable[Extent]) -> Extents:
    """The same pages in the fewest extents."""
    joined: list[Extent] = []
    for extent in extents:
        if joined:
            before = joined[-1]
            if before.chunk is extent.chunk and before.index + before.count == extent.index:
                joined[-1] = Extent(before.chunk, before.index, before.count + extent.count)
                continue
        joined.append(extent)
    return tuple(joined)


def slice_extents(extents: Extents, start_page: int, count: int) -> Extents:
    """Pages ``[start_page, start_page + count)``, all of which must be there."""
    if len(extents) == 1:
        whole = extents[0]
        if start_page < 0 or start_page + count > whole.count:
            raise ValueError(f"pages [{start_page}, {start_page + count}) of {whole.count}")
        if count == whole.count:
            return extents
        return (Extent(whole.chunk, whole.index + start_page, count),) if count else ()
    found: list[Extent] = []
    skip, wanted = start_page, count
    for extent in extents:
        if not wanted:
            break
        if skip >= extent.count:
            skip -= extent.count
            continue
        n = min(extent.count - skip, wanted)
        found.append(extent if n == extent.count else Extent(extent.chunk, extent.index + skip, n))
        skip, wanted = 0, wanted - n
    if wanted or start_page < 0:
        raise ValueError(f"pages [{start_page}, {start_page + count}) of {total(extents)}")
    return tuple(found)


def frame_at(extents: Extents, page: int) -> tuple[Chunk, int]:
    """The chunk and page index of page ``page``."""
    for extent in extents:
        if page < extent.count:
            return extent.chunk, extent.index + page
        page -= extent.count
    raise IndexError(page)


def pfn_at(extents: Extents, page: int) -> int:
    """The frame number of page ``page``."""
    chunk, index = frame_at(extents, page)
    return chunk.pfn(index)


def same_frames(a: Extents, b: Extents) -> bool:
    """Whether both are the same pages in the same order."""
    return a == b or join(a) == join(b)


def unpin_extents(extents: Extents) -> None:
    """Takes a pin from every page; the address space they came from need not exist any more."""
    for extent in extents:
        extent.chunk.unpin(extent.index, extent.count)


def runs(extents: Extents, first_offset: int, length: int) -> Iterator[Run]:
    """The physically contiguous runs of bytes ``[first_offset, first_offset + length)``, maximal, in order.

    ``Run.offset`` counts from ``first_offset``. An extent gives at most three: a partial block, all its whole blocks as
    one strided Run, and another partial block.
    """
    offset, skip = 0, first_offset
    for extent in join(extents) if len(extents) > 1 else extents:
        size = extent.count << PAGE_SHIFT
        if skip >= size:
            skip -= size
            continue
        if not length:
            return
        here = min(size - skip, length)
        chunk = extent.chunk
        begin = (extent.index << PAGE_SHIFT) + skip
        block = PAGE_SIZE << chunk.order
        base = chunk.base_pfn << PAGE_SHIFT
        length -= here
        skip = 0
        head = begin & (block - 1)
        if head:
            n = min(block - head, here)
            yield Run(offset, base + (begin - head) * 2 + head, n)
            offset, begin, here = offset + n, begin + n, here - n
        whole, tail = divmod(here, block)
        if whole:
            yield Run(offset, base + begin * 2, block, whole, 2 * block if whole > 1 else 0)
            offset, begin = offset + whole * block, begin + whole * block
        if tail:
            yield Run(offset, base + begin * 2, tail)
            offset += tail
    if length:
        raise ValueError(f"{length} bytes more than the extents hold")


def _spans(extents: Extents, offset: int, count: int) -> Iterator[tuple[Chunk, int, int]]:
    for extent in extents:
        size = extent.count << PAGE_SHIFT
        if offset < size:
            n = min(size - offset, count)
            yield extent.chunk, (extent.index << PAGE_SHIFT) + offset, n
            count -= n
            if not count:
                return
            offset = 0
        else:
            offset -= size
    if count:
        raise KernelError(errno.EFAULT, f"{count} bytes beyond the end of the pinned pages")


def read_extents(extents: Extents, offset: int, count: int) -> bytes:
    """``count`` bytes from byte ``offset`` on. KernelError(EFAULT) where contents are lost."""
    parts = [chunk.read(at, n) for chunk, at, n in _spans(extents, offset, count)]
    return parts[0] if len(parts) == 1 else b"".join(parts)


def write_extents(extents: Extents, offset: int, data: bytes | bytearray | memoryview) -> None:
    """Writes ``data`` from byte ``offset`` on. KernelError(EFAULT) where contents are lost."""
    rest = memoryview(data)
    for chunk, at, n in _spans(extents, offset, len(data)):
        chunk.write(at, rest[:n])
        rest = rest[n:]
