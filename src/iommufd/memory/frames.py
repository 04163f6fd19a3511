"""Frames: the identity of physical pages, without a list of pages anywhere.

A *chunk* is a run of frames that came into being together (one VMA at its first pin, one stretch of a file, one
dma-buf). It has an *order*: ``1 << order`` frames form a physically contiguous, naturally aligned block, and frames of
different blocks are never adjacent, so hardware formats cannot see contiguity that is not there. An *extent* is a
slice of a chunk; whatever is pinned or mapped is a short tuple of extents, so 1 TiB costs what 4 KiB costs.

Invariants. A chunk's PFN range belongs to it until three counts are all zero: ``pinned`` (pages pinned, each as often
as it is pinned), ``maps`` (holders other than pins; a domain need not hold one, what it maps is pinned or a dma-buf)
and ``holders`` (VA or file intervals that resolve to it). Then, and only then, the range returns to the allocator,
which hands out untouched ranges as long as there are any. All counts and ``pieces`` are guarded by
``FrameAllocator.lock``, which is re-entrant, taken last and never held while bytes are copied; a copy raises ``busy``
instead, and whoever moves contents elsewhere raises ``moving`` and waits until nobody is busy.

The kernel object is ``struct page`` / ``struct folio`` with its FOLL_PIN count.
"""

from __future__ import annotations

import errno
import threading
from bisect import bisect_right
from collections.abc import Iterator
from typing import Protocol

from iommufd.errors import KernelError
from iommufd.memory.counts import Steps
from iommufd.memory.intervals import IntervalIndex

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
PAGE_MASK = ~(PAGE_SIZE - 1)

PFN_FIRST = 1 << 20  # nothing below 4 GiB: that is where platforms keep MSI doorbells and other devices
PFN_END = 1 << 39  # so every physical address is below 2**51, within any table format


class Source(Protocol):
    """Where the bytes of frames are: a process, a file, a store of our own. Positions are bytes in its own terms."""

    def load(self, position: int, count: int) -> bytes:
        """Exactly ``count`` bytes; KernelError(EFAULT) when they cannot be had."""
        ...

    def save(self, position: int, data: bytes | bytearray | memoryview) -> None:
        """Stores all of ``data``; KernelError(EFAULT) when it cannot be."""
        ...

    def view(self, position: int, count: int) -> memoryview | None:
        """The bytes themselves, writable, where that is safe for as long as they are pinned; else None."""
        ...

    def forget(self, position: int, count: int) -> None:
        """Nobody will ask for these bytes again. Called with the allocator's lock held; cannot fail."""
        ...


class FileUse(Protocol):
    """The file a chunk belongs to, told when the first pin in a chunk of it appears and when the last one goes.

    ``fresh`` until its first pin has called ``obtain``."""

    fresh: bool

    def pins_began(self) -> None: ...

    def pins_ended(self) -> None: ...

    def obtain(self) -> bool: ...


# (first page index, pages, source, position in the source of the first byte); ascending, disjoint.
Piece = tuple[int, int, Source, int]


class Chunk:
    """``npages`` frames of one order. Indexes are pages from 0, offsets bytes from the chunk's start.

    ``owner`` names whose memory it is, for humans. ``pieces`` say where the contents are; pages without a piece have
    lost theirs (their process was killed) and fault when touched.
    """

    __slots__ = (
        "_allocator",
        "_base",
        "_steps",
        "base_pfn",
        "busy",
        "file",
        "holders",
        "maps",
        "moving",
        "npages",
        "order",
        "owner",
        "pieces",
        "pinned",
    )

    def __init__(self, owner: object, order: int, npages: int, base_pfn: int, allocator: FrameAllocator) -> None:
        self.owner = owner
        self.order = order
        self.npages = npages
        self.base_pfn = base_pfn
        self.pieces: list[Piece] = []
        self.file: FileUse | None = None
        self.pinned = 0
        self.maps = 0
        self.holders = 0
        self.busy = 0
        self.moving = False
        self._allocator = allocator
        self._base = 0  # pins of page 0: the step at position 0
        self._steps: Steps | None = None  # the steps at positions 1..npages-1

    def __repr__(self) -> str:
        return (
            f"<Chunk {self.owner} pfn {self.base_pfn:#x} order {self.order} pages {self.npages} pinned {self.pinned}>"
        )

    # -------------------------------------------------------------------------------------------------------- identity

    def pfn(self, index: int) -> int:
        """The frame number of page ``index``."""
        order = self.order
        return self.base_pfn + ((index >> order) << (order + 1)) + (index & ((1 << order) - 1))

    def index_of(self, pfn: int) -> int | None:
        """The page whose frame number is ``pfn``, or None when it is none of this chunk."""
        block, rest = divmod(pfn - self.base_pfn, 2 << self.order)
        index = (block << self.order) + rest
        return index if block >= 0 and rest < 1 << self.order and index < self.npages else None

    # ------------------------------------------------------------------------------------------------------------ pins

    def pin(self, index: int, count: int) -> None:
        """Adds one pin to each of ``count`` pages from ``index`` on."""
        lock = self._allocator.lock
        lock.acquire()  # half the price of a with statement, on the way of every map
        try:
            if not self.pinned and self.file is not None:
                self.file.pins_began()
            self.pinned += count
            steps = self._steps
            end = index + count
            if steps is None or not index or end == self.npages or not steps.shift(index, end, 1):
                self._add(index, end, 1)
        finally:
            lock.release()

    def unpin(self, index: int, count: int) -> None:
        """Takes one pin from each of ``count`` pages from ``index`` on. They must be pinned."""
        lock = self._allocator.lock
        lock.acquire()
        try:
            if count > self.pinned:
                raise ValueError(f"{count} pages to unpin in {self!r}")
            self.pinned -= count
            steps = self._steps
            end = index + count
            if steps is None or not index or end == self.npages or not steps.shift(index, end, -1):
                self._add(index, end, -1)
            if not self.pinned:
                if self.file is not None:
                    self.file.pins_ended()
                else:
                    self._release_if_unused()
        finally:
            lock.release()

    def _add(self, start: int, end: int, by: int) -> None:
        """The steps at both ends; the one at position 0 is ``_base``, none is needed at the end of the chunk."""
        if start == 0:
            self._base += by
        else:
            if self._steps is None:
                self._steps = Steps()
            self._steps.step(start, by)
        if end != self.npages:
            if self._steps is None:
                self._steps = Steps()
            self._steps.step(end, -by)

    def pins(self, index: int) -> int:
        """How often page ``index`` is pinned."""
        with self._allocator.lock:
            return self._base + (self._steps.value(index) if self._steps is not None else 0)

    def has_pins(self, start: int, end: int) -> bool:
        """Whether any page in ``[start, end)`` is pinned."""
        with self._allocator.lock:
            if not self.pinned:
                return False
            if self._steps is None:
                return self._base > 0
            # Counts are never negative, so where the count changes somebody is pinned on one side.
            return self._steps.changes_within(start, end) or self._base + self._steps.value(start) > 0

    def pinned_in(self, start: int, end: int) -> list[tuple[int, int]]:
        """The maximal runs ``(index, count)`` of pinned pages in ``[start, end)``, ascending."""
        runs: list[tuple[int, int]] = []
        with self._allocator.lock:
            if not self.pinned or start >= end:
                return runs
            level, begin = self._base, start
            changes: list[tuple[int, int]] = []
            if self._steps is not None:
                level += self._steps.value(start)
                changes = self._steps.changes(start, end)
        for position, by in changes:
            if level and not level + by:
                runs.append((begin, position - begin))
            elif not level:
                begin = position
            level += by
        if level:
            runs.append((begin, end - begin))
        return runs

    # ----------------------------------------------------------------------------------------------------- usage counts

    def resolve_from(self, by: int) -> None:
        """``by`` more (or, negative, fewer) VA or file intervals resolve to the chunk."""
        with self._allocator.lock:
            self.holders += by
            self._release_if_unused()

    def hold(self) -> None:
        """Keeps the frames from being re-used without pinning them (counted in ``maps``)."""
        with self._allocator.lock:
            self.maps += 1

    def drop(self) -> None:
        """Undoes :meth:`hold`."""
        with self._allocator.lock:
            self.maps -= 1
            self._release_if_unused()

    def _release_if_unused(self) -> None:
        if not self.holders and not self.pinned and not self.maps:
            self._allocator.free(self)

    # -------------------------------------------------------------------------------------------------------- contents

    def read(self, offset: int, count: int) -> bytes:
        """``count`` bytes at byte ``offset``. KernelError(EFAULT) where contents are lost."""
        self._enter()
        try:
            parts = [source.load(position, n) for source, position, n in self._spans(offset, count)]
        finally:
            self._leave()
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Writes ``data`` at byte ``offset``. KernelError(EFAULT) where contents are lost."""
        count = len(data)
        self._enter()
        try:
            spans = self._spans(offset, count)
            if len(spans) == 1:
                spans[0][0].save(spans[0][1], data)
                return
            rest = memoryview(data)
            for source, position, n in spans:
                source.save(position, rest[:n])
                rest = rest[n:]
        finally:
            self._leave()

    def view(self, offset: int, count: int) -> memoryview | None:
        """The bytes ``[offset, offset+count)`` themselves, or None when they do not lie in one file of ours.

        Good for as long as the pages are pinned."""
        self._enter()
        try:
            spans = self._spans(offset, count)
            return spans[0][0].view(spans[0][1], count) if len(spans) == 1 else None
        finally:
            self._leave()

    def _spans(self, offset: int, count: int) -> list[tuple[Source, int, int]]:
        """The parts of ``[offset, offset+count)`` as (source, position, bytes). Called while busy or moving."""
        pieces = self.pieces
        if len(pieces) == 1:
            index, npages, source, position = pieces[0]
            begin = offset - (index << PAGE_SHIFT)
            if begin >= 0 and begin + count <= npages << PAGE_SHIFT:
                return [(source, position + begin, count)]
        spans: list[tuple[Source, int, int]] = []
        if offset < 0 or offset + count > self.npages << PAGE_SHIFT:
            raise KernelError(errno.EFAULT, f"bytes [{offset:#x}, {offset + count:#x}) lie outside {self!r}")
        i = max(bisect_right(pieces, offset >> PAGE_SHIFT, key=lambda piece: piece[0]) - 1, 0)
        while count:
            if i < len(pieces):
                index, npages, source, position = pieces[i]
                begin = offset - (index << PAGE_SHIFT)
                n = min(count, (npages << PAGE_SHIFT) - begin)
                if begin >= 0 and n > 0:
                    spans.append((source, position + begin, n))
                    offset, count, i = offset + n, count - n, i + 1
                    continue
            raise KernelError(errno.EFAULT, f"the contents of frame {self.pfn(offset >> PAGE_SHIFT):#x} are lost")
        return spans

    def _enter(self) -> None:
        with self._allocator.lock:
            while self.moving:
                self._allocator.changed.wait()
            self.busy += 1

    def _leave(self) -> None:
        with self._allocator.lock:
            self.busy -= 1
            if self.moving and not self.busy:
                self._allocator.changed.notify_all()

    def move_begin(self) -> None:
        """Stops reads and writes of the chunk and waits for those under way, so that contents can be moved."""
        changed = self._allocator.changed
        with changed:
            while self.moving:
                changed.wait()
            self.moving = True
            while self.busy:
                changed.wait()

    def move_end(self) -> None:
        """Lets reads and writes go on."""
        with self._allocator.changed:
            self.moving = False
            self._allocator.changed.notify_all()

    def in_source(self, index: int, count: int, source: Source) -> list[tuple[int, int]]:
        """The runs (index, count) within ``[index, index + count)`` whose contents are in ``source``."""
        with self._allocator.lock:
            runs = [(max(at, index), min(at + n, index + count)) for at, n, where, _ in self.pieces if where is source]
        return [(start, end - start) for start, end in runs if start < end]

    def place(self, index: int, count: int, source: Source | None, position: int = 0) -> None:
        """From now on the contents of pages ``[index, index+count)`` are in ``source`` (None: lost)."""
        end = index + count
        with self._allocator.lock:
            if not self.pieces or (len(self.pieces) == 1 and index == 0 and count == self.npages):
                self.pieces = [] if source is None else [(index, count, source, position)]
                return
            pieces: list[Piece] = []
            for piece in self.pieces:
                first, npages, old, at = piece
                if first + npages <= index or first >= end:
                    pieces.append(piece)
                    continue
                if first < index:
                    pieces.append((first, index - first, old, at))
                if first + npages > end:
                    pieces.append((end, first + npages - end, old, at + ((end - first) << PAGE_SHIFT)))
            if source is not None:
                pieces.append((index, count, source, position))
            pieces.sort(key=lambda piece: piece[0])
            self.pieces = pieces


class Extent:
    """``count`` pages of ``chunk`` from page ``index`` on. Never changed after construction."""

    __slots__ = ("chunk", "count", "index")

    def __init__(self, chunk: Chunk, index: int, count: int) -> None:
        self.chunk = chunk
        self.index = index
        self.count = count

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Extent):
            return NotImplemented
        return self.chunk is other.chunk and self.index == other.index and self.count == other.count

    def __hash__(self) -> int:
        return hash((id(self.chunk), self.index, self.count))

    def __repr__(self) -> str:
        return f"Extent(pfn {self.chunk.pfn(self.index):#x}, {self.count} pages of {self.chunk.owner})"


Extents = tuple[Extent, ...]


class FrameAllocator:
    """Gives out PFN ranges, one allocator a machine. ``lock`` guards all counts of all its chunks."""

    def __init__(self, first: int = PFN_FIRST, end: int = PFN_END) -> None:
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self._used: IntervalIndex[Chunk] = IntervalIndex()
        self._first, self._end = first, end
        self._next = first

    def __len__(self) -> int:
        """The number of chunks alive."""
        return len(self._used)

    def __iter__(self) -> Iterator[Chunk]:
        with self.lock:
            return iter(list(self._used.values()))

    def chunk(self, owner: object, npages: int, order: int = 0) -> Chunk:
        """A new chunk of ``npages`` in blocks of ``1 << order`` pages. KernelError(ENOMEM) when no range is left."""
        block = 1 << order
        size = -(-npages // block) * 2 * block  # every block is followed by a gap of its own size
        with self.lock:
            base = -(-self._next // block) * block
            if base + size <= self._end:
                self._next = base + size
            else:
                for first, last in self._used.holes(self._first, self._end - 1, size):
                    base = -(-first // block) * block
                    if base + size - 1 <= last:
                        break
                else:
                    raise KernelError(
                        errno.ENOMEM, f"no {npages} frames of order {order} left below PFN {self._end:#x}"
                    )
            chunk = Chunk(owner, order, npages, base, self)
            self._used.insert(base, base + size - 1, chunk)
        return chunk

    def contiguous(self, owner: object, npages: int) -> Chunk:
        """A new chunk that is one physically contiguous block (a dma-buf)."""
        return self.chunk(owner, npages, max(npages - 1, 0).bit_length())

    def free(self, chunk: Chunk) -> None:
        """Takes a chunk's range back. Called with ``lock`` held, when all its counts are zero."""
        self._used.remove(chunk.base_pfn)
        pieces, chunk.pieces = chunk.pieces, []
        for _, npages, source, position in pieces:
            source.forget(position, npages << PAGE_SHIFT)

    def frame(self, pfn: int) -> tuple[Chunk, int] | None:
        """The chunk and page index of a frame number, or None when there is no such frame."""
        with self.lock:
            found = self._used.find(pfn)
        if found is None:
            return None
        index = found[2].index_of(pfn)
        return None if index is None else (found[2], index)
