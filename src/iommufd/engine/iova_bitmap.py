"""IovaBitmap: dirty IOVAs on their way into the caller's bitmap (kernel: struct iova_bitmap), core 8.3.

Invariants:

* Bit n stands for ``[iova + n*g, + g)`` with ``g`` the lowest set bit of the page size; bits are only ever set, bytes
  without a dirty bit are not touched, and memory that cannot be written loses its bits silently.
* The kernel pins the bitmap in *windows*: 512 pages at most, from the byte of the first dirty bit not yet covered to
  the bitmap's end, one page more when that byte is not at the start of a page. An entry that sticks out beyond the end
  of the request sets bits as far as its window reaches.
* An entry that runs into memory that cannot be written loses the rest of its bits, and only its own.

Bits of one user page are collected and written together by :meth:`flush`; bulk and straddling bits go out at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from iommufd.errors import KernelError
from iommufd.iommu import bits as packed
from iommufd.memory.frames import PAGE_SHIFT, PAGE_SIZE

if TYPE_CHECKING:
    from iommufd.engine.task import Task
    from iommufd.iommu.bits import Bits

WINDOW_PAGES = 512
_PIECE = 1 << 18  # bytes of the bitmap written at a time
_STEP = 1 << 22  # entries converted between granularities at a time


class IovaBitmap:
    """The bitmap at ``data`` in the memory of ``task`` for ``[iova, iova + length)``; a DirtySink."""

    __slots__ = ("_end", "_pages", "_scratch", "_shift", "_task", "_total", "_window", "data", "iova")

    def __init__(self, task: Task, data: int, iova: int, length: int, page_size: int) -> None:
        self._task = task
        self.data = data
        self.iova = iova
        self._shift = (page_size & -page_size).bit_length() - 1
        self._total = (-(-length >> self._shift) + 7) >> 3  # bytes of the bitmap
        self._window = self._end = 0  # [first, end) bytes of the window
        self._pages: dict[int, _Page] = {}
        self._scratch: Bits | None = None

    def record(self, iova: int, length: int) -> None:
        """The entry ``[iova, iova + length)`` is dirty; one that begins below the request sets nothing."""
        if iova < self.iova:
            return
        bit = (iova - self.iova) >> self._shift
        last = (iova + length - 1 - self.iova) >> self._shift
        while bit <= last:
            if not self._cover(bit >> 3):
                return
            stop = min(last + 1, self._end * 8)
            if not self._set(bit, stop):
                return
            bit = stop

    def record_bits(self, iova: int, size: int, bits: memoryview, count: int) -> None:
        """``count`` entries of ``size`` bytes from ``iova`` on; see :class:`~iommufd.iommu.domain.DirtySink`."""
        source = packed.of(bits)
        grain = 1 << self._shift
        at = iova - self.iova
        if size == grain:
            self._bulk(at >> self._shift, source, count)
            return
        for first in range(0, count, _STEP):
            part = packed.extract(source, first, min(_STEP, count - first))
            if not part.any():
                continue
            n = min(_STEP, count - first)
            begin = at + first * size
            if size < grain:
                skip, by = begin % grain // size, grain // size
                self._bulk(begin >> self._shift, packed.narrow(part, n, skip, by), -(-(skip + n) // by))
                continue
            by = size // grain
            if not self._bulk(begin >> self._shift, packed.widen(part, n, by), n * by, whole=True):
                for number in packed.each_set(part.tobytes(), 0, n):  # some entry may run into a hole
                    self.record(iova + (first + number) * size, size)

    def flush(self) -> None:
        """Writes what was collected. What cannot be written is lost."""
        for number, page in self._pages.items():
            self._merge((number << PAGE_SHIFT) + page.low, bytes(page.bits[page.low : page.high]))
        self._pages.clear()

    # ------------------------------------------------------------------------------------------------------- windows

    def _cover(self, byte: int) -> bool:
        """Makes the window cover ``byte`` of the bitmap; False when no window can begin there."""
        if self._window <= byte < self._end:
            return True
        if byte >= self._total:
            return False
        offset = (self.data + byte) & (PAGE_SIZE - 1)
        pages = -(-(self._total - byte) // PAGE_SIZE) + (1 if offset else 0)
        self._window = byte
        self._end = byte + min(pages, WINDOW_PAGES) * PAGE_SIZE - offset
        return True

    # ---------------------------------------------------------------------------------------------------------- bits

    def _set(self, bit: int, stop: int) -> bool:
        """Sets bits ``[bit, stop)``; False when memory in the way of a later one of them cannot be written."""
        first, last = self.data + (bit >> 3), self.data + ((stop - 1) >> 3)
        if first >> PAGE_SHIFT == last >> PAGE_SHIFT:
            page = self._pages.get(first >> PAGE_SHIFT)
            if page is None:
                page = self._pages[first >> PAGE_SHIFT] = _Page()
            page.set((first & (PAGE_SIZE - 1)) * 8 + (bit & 7), stop - bit)
            return True
        while bit < stop:
            address = self.data + (bit >> 3)
            room = (PAGE_SIZE - (address & (PAGE_SIZE - 1))) * 8 - (bit & 7)
            n = min(room, stop - bit)
            part = ((1 << n) - 1) << (bit & 7)
            if not self._merge(address, part.to_bytes(((bit & 7) + n + 7) >> 3, "little")):
                return False
            bit += n
        return True

    def _merge(self, address: int, add: bytes) -> bool:
        """ORs ``add`` into the caller's bytes at ``address``, all in one page; False when that cannot be done."""
        try:
            old = self._task.read(address, len(add))
            new = int.from_bytes(old, "little") | int.from_bytes(add, "little")
            self._task.write(address, new.to_bytes(len(add), "little"))
        except KernelError:
            return False
        return True

    def _bulk(self, bit: int, source: Bits, count: int, *, whole: bool = False) -> bool:
        """Sets bit ``bit + n`` for every set bit n < ``count`` of ``source``. What cannot be written is lost; with
        ``whole`` nothing is set behind it, and False returned."""
        shift, size = bit & 7, (count + 7) >> 3
        add = source[:size]
        if shift:
            add = packed.empty(shift + count)
            packed.or_into(add, shift, source, count)
        byte = bit >> 3
        self._advance(byte, add)
        for at in range(0, len(add), _PIECE):
            piece = add[at : at + _PIECE]
            if packed.any_set(piece) and not self._merge_bulk(self.data + byte + at, piece):
                if whole:
                    return False
                self._merge_pages(self.data + byte + at, piece)
        return True

    def _merge_bulk(self, address: int, add: Bits) -> bool:
        """One piece with some bit set; pages before the first and after the last such are not touched."""
        start, end = 0, len(add)
        while not add[start : start + PAGE_SIZE].any():
            start += PAGE_SIZE
        while not add[max(end - PAGE_SIZE, start) : end].any():
            end -= PAGE_SIZE
        address, add = address + start, add[start:end]
        if self._scratch is None:
            self._scratch = packed.empty(8 * _PIECE)
        merged = self._scratch[: len(add)]
        try:
            self._task.read_into(address, merged.data)
            merged |= add
            self._task.write(address, merged.data)
        except KernelError:
            return False
        return True

    def _merge_pages(self, address: int, add: Bits) -> None:
        """Page by page, what can be written."""
        at = 0
        while at < len(add):
            n = min(PAGE_SIZE - ((address + at) & (PAGE_SIZE - 1)), len(add) - at)
            part = add[at : at + n]
            if part.any():
                self._merge(address + at, part.tobytes())
            at += n

    def _advance(self, byte: int, add: Bits) -> None:
        """Moves the window on as bits set in order would have."""
        at = 0
        while True:
            if self._window <= byte + at < self._end:
                at = self._end - byte
            while at < len(add) and not add[at]:
                ahead = add[at : at + PAGE_SIZE]
                at += int((ahead != 0).argmax()) if ahead.any() else len(ahead)
            if at >= len(add) or not self._cover(byte + at):
                return


class _Page:
    """The bits to set in one page of the caller, and the bytes ``[low, high)`` they are in."""

    __slots__ = ("bits", "high", "low")

    def __init__(self) -> None:
        self.bits = bytearray(PAGE_SIZE)
        self.low, self.high = PAGE_SIZE, 0

    def set(self, bit: int, count: int) -> None:
        first, last = bit >> 3, (bit + count - 1) >> 3
        if first == last:
            self.bits[first] |= ((1 << count) - 1) << (bit & 7)
        else:
            self.bits[first] |= 0xFF & (0xFF << (bit & 7))
            self.bits[first + 1 : last] = b"\xff" * (last - first - 1)
            self.bits[last] |= (2 << ((bit + count - 1) & 7)) - 1
        self.low, self.high = min(self.low, first), max(self.high, last + 1)
