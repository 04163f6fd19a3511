"""ExtentDomain: a kernel-managed I/O page table as an extent map (kernel: a generic_pt page table and its
iommu_domain).

Invariants:

* A mapping is one entry of an interval index, whatever its size: the memory's extents, where in them it begins, and its
  permissions. Translation entries (the leaves a real table would have) are not stored; they follow from the rule in
  :mod:`iommufd.iommu.entries` and are computed where somebody looks.
* A map maps all or nothing; the range was empty before. An unmap that cuts a mapping leaves the rest as it was.
* One lock per domain, held for table changes and look-ups only, so that devices may translate while programs map.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from iommufd.errors import KernelError
from iommufd.iommu.dirty import DirtyState
from iommufd.iommu.domain import BaseDomain, Kind, Prot
from iommufd.iommu.entries import Mapping
from iommufd.memory.extents import pfn_at
from iommufd.memory.frames import PAGE_SHIFT, PAGE_SIZE, PFN_END
from iommufd.memory.intervals import IntervalIndex

if TYPE_CHECKING:
    from iommufd.iommu.domain import DirtyOps, DirtySink
    from iommufd.iommu.driver import Driver
    from iommufd.memory.frames import Extents

_ACCESS = Prot.READ.value | Prot.WRITE.value


class ExtentDomain(BaseDomain):
    """A page table with the page sizes ``pgsize_bitmap`` over the IOVA aperture ``[aperture_start, aperture_end]``.

    ``output_bits``: physical addresses must be below ``2 ** output_bits``. ``dirty_ops`` is the domain itself when
    made with ``dirty``.
    """

    __slots__ = (
        "_dirty",
        "_index",
        "_lock",
        "_narrow",
        "_smallest",
        "aperture_end",
        "aperture_start",
        "dirty_ops",
        "dirty_tracking",
        "output_bits",
        "pgsize_bitmap",
    )

    def __init__(
        self,
        pgsize_bitmap: int,
        aperture_start: int = 0,
        aperture_end: int = 2**64 - 1,
        *,
        output_bits: int = 52,
        dirty: bool = False,
        owner: Driver | None = None,
    ) -> None:
        super().__init__(Kind.PAGING, owner)
        self.pgsize_bitmap = pgsize_bitmap
        self._smallest = pgsize_bitmap & -pgsize_bitmap
        self.aperture_start = aperture_start
        self.aperture_end = aperture_end
        self.output_bits = output_bits
        self._narrow = 1 << output_bits < PFN_END << PAGE_SHIFT  # some frames are beyond its reach
        self._index: IntervalIndex[Mapping] = IntervalIndex()
        self._lock = threading.Lock()
        self._dirty = DirtyState()
        self.dirty_tracking = False
        self.dirty_ops: DirtyOps | None = self if dirty else None

    # ------------------------------------------------------------------------------------------------ mapping memory

    def map(self, iova: int, extents: Extents, offset: int, length: int, prot: int, page_by_page: bool) -> None:
        """As :meth:`~iommufd.iommu.domain.PagingDomain.map`; the order of the errors is mock-device 2.6's."""
        if not prot & _ACCESS:
            raise KernelError(errno.EINVAL, "a mapping needs read or write permission")
        last = iova + length - 1
        if iova < self.aperture_start or last > self.aperture_end:
            raise KernelError(
                errno.ERANGE,
                f"[{iova:#x}, {last:#x}] is outside the table's [{self.aperture_start:#x}, {self.aperture_end:#x}]",
            )
        if self._narrow:
            self._check_output(extents)
        if (iova | offset | length) & (self._smallest - 1):
            raise KernelError(
                errno.ENXIO, f"no page size of {self.pgsize_bitmap:#x} fits IOVA {iova:#x}, length {length:#x}"
            )
        mapping = Mapping(extents, offset, prot, page_by_page)
        lock = self._lock
        lock.acquire()  # half the price of a with statement
        try:
            self._index.insert(iova, last, mapping)
        except ValueError:
            raise KernelError(errno.EADDRINUSE, f"something is mapped in [{iova:#x}, {last:#x}] already") from None
        finally:
            lock.release()

    def _check_output(self, extents: Extents) -> None:
        for extent in extents:
            highest = extent.chunk.pfn(extent.index + extent.count - 1)
            if highest >> (self.output_bits - PAGE_SHIFT):
                raise KernelError(errno.ERANGE, f"frame {highest:#x} is beyond {self.output_bits} address bits")

    def unmap(self, iova: int, length: int) -> None:
        """As :meth:`~iommufd.iommu.domain.PagingDomain.unmap`; the dirty state of what goes is lost."""
        last = iova + length - 1
        index = self._index
        with self._lock:
            while (found := index.first_in(iova, last)) is not None:
                first, end, mapping = found
                index.remove(first)
                if first < iova:
                    index.insert(first, iova - 1, mapping)
                if end > last:
                    index.insert(last + 1, end, mapping.moved(last + 1 - first))
                if self._dirty:
                    self._dirty.forget(first, end, iova, last, mapping, self.pgsize_bitmap)
                if end >= last:
                    break

    def iova_to_phys(self, iova: int) -> int:
        """The physical address behind ``iova``, 0 when there is none."""
        with self._lock:
            found = self._index.find(iova)
        if found is None:
            return 0
        at = found[2].offset + iova - found[0]
        return pfn_at(found[2].extents, at >> PAGE_SHIFT) << PAGE_SHIFT | at & (PAGE_SIZE - 1)

    def entry(self, iova: int) -> tuple[int, int] | None:
        """The translation entry that covers ``iova`` as (IOVA, bytes); None when nothing is mapped."""
        with self._lock:
            found = self._index.find(iova)
        if found is None:
            return None
        first, last, mapping = found
        return mapping.entry(first, last, iova, self.pgsize_bitmap)

    def segments(self, iova: int, length: int) -> Iterator[tuple[int, Extents, int, int, int]]:
        """What is mapped in ``[iova, iova + length)``, ascending: (IOVA, extents, offset into them, bytes, prot).

        Holes are skipped. A snapshot: later changes of the table do not show."""
        last = iova + length - 1
        with self._lock:
            found = list(self._index.items(iova, last))
        for first, end, mapping in found:
            start, stop = max(first, iova), min(end, last)
            yield start, mapping.extents, mapping.offset + start - first, stop - start + 1, mapping.prot

    @property
    def empty(self) -> bool:
        return not self._index

    def __len__(self) -> int:
        """The number of mappings."""
        return len(self._index)

    # ---------------------------------------------------------------------------------------------- dirty tracking

    def set_dirty_tracking(self, enable: bool) -> None:
        """Idempotent; what is dirty stays dirty."""
        self.dirty_tracking = enable

    def mark_dirty(self, iova: int, length: int = 1) -> None:
        """Every entry that translates a byte of ``[iova, iova + length)`` becomes dirty; unmapped addresses are
        ignored."""
        last = iova + length - 1
        with self._lock:
            for first, end, mapping in self._index.items(iova, last):
                start, stop = max(first, iova), min(end, last)
                while start <= stop:
                    at, size = mapping.entry(first, end, start, self.pgsize_bitmap)
                    self._dirty.mark(first, end, mapping, self.pgsize_bitmap, at)
                    start = at + size

    def mark_dirty_bits(self, iova: int, step: int, bits: bytes, count: int) -> None:
        """Bit i of ``bits`` (byte i/8, lowest first, ``count`` of them) marks the entry that covers ``iova + i *
        step``."""
        if bits.count(0) == len(bits):
            return
        with self._lock:
            for first, end, mapping in self._index.items(iova, iova + (count - 1) * step):
                low = max(-((iova - first) // step), 0)  # the first bit at or above the mapping's first byte
                high = min((end - iova) // step, count - 1)
                if low <= high:
                    self._dirty.mark_bits(first, end, mapping, self.pgsize_bitmap, iova, step, bits, low, high + 1)

    def read_and_clear_dirty(self, iova: int, length: int, *, clear: bool, sink: DirtySink | None) -> None:
        """As :meth:`~iommufd.iommu.domain.DirtyOps.read_and_clear_dirty`. The range may span several mappings."""
        if not self._dirty:
            return
        last = iova + length - 1
        with self._lock:
            reports = [
                report
                for first, end, mapping in self._index.items(iova, last)
                for report in self._dirty.take(first, end, mapping, self.pgsize_bitmap, iova, last, clear)
            ]
        if sink is not None:
            for report in reports:
                report.to(sink)
        if clear:
            with self._lock:
                for report in reports:
                    self._dirty.recycle(report)
