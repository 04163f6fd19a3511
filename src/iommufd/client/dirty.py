"""Reading dirty bitmaps (kernel: struct iova_bitmap, IOMMU_HWPT_GET_DIRTY_BITMAP).

Two properties of the call shape this module. The kernel stops, silently, at the first gap between mappings: so each run
of adjacent mappings is asked for by itself. And it may set bits behind the end of the range, up to a page behind the
bitmap's last one, when a large entry reaches over it: so the bitmap is memory of its own, whole pages and one more.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import TYPE_CHECKING

from iommufd.client.buffers import too_much
from iommufd.uapi import iommufd as u

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from iommufd.client.hwpt import HWPT


def read_dirty(hwpt: HWPT, iova: int, length: int, page_size: int, clear: bool) -> NDArray[np.bool_]:
    """See :meth:`HWPT.dirty_pages`; all arguments are numbers."""
    import numpy as np

    if page_size & (page_size - 1) or not page_size:
        raise ValueError(f"page_size {page_size} is not a power of two")
    try:
        found = np.zeros(length // page_size, bool)
    except (MemoryError, OverflowError, ValueError):
        raise too_much(length // page_size) from None
    if (iova | length) % page_size or not length:
        _query(hwpt, iova, length, page_size, clear)  # the kernel says what is wrong with it
    for start, end in _runs_of_mappings(hwpt, iova, iova + length - 1):
        both = start | (end + 1) | page_size
        unit = both & -both  # a run may begin inside a page of the caller's
        units = _query(hwpt, start, end + 1 - start, unit, clear) + (start - iova) // unit
        found[units // (page_size // unit)] = True
    return found


def _runs_of_mappings(hwpt: HWPT, iova: int, last: int) -> list[tuple[int, int]]:
    """The parts of ``[iova, last]`` to ask for: runs of adjacent mappings; everything when no mapping is known."""
    ioas = hwpt.ioas
    known = ioas._within(iova, last, touching=True) if ioas is not None else []
    if not known:
        return [(iova, last)]
    runs: list[tuple[int, int]] = []
    for mapping in known:
        first, end = max(mapping.iova, iova), min(mapping.last, last)
        if runs and runs[-1][1] + 1 == first:
            runs[-1] = runs[-1][0], end
        else:
            runs.append((first, end))
    return runs


def _query(hwpt: HWPT, iova: int, length: int, page_size: int, clear: bool) -> NDArray[np.intp]:
    """The numbers of the dirty pages, counted from ``iova``."""
    bitmap = Bitmap(-(-length // page_size))
    query = u.iommu_hwpt_get_dirty_bitmap(
        hwpt_id=hwpt._id,
        flags=0 if clear else u.IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR,
        iova=iova,
        length=length,
        page_size=page_size,
        data=bitmap.address,
    )
    hwpt._do(query)
    return bitmap.ones()


class Bitmap:
    """Room for ``bits`` bits that a kernel sets, and a page behind them; at :attr:`address` while it lives."""

    __slots__ = ("_memory", "address", "bits")

    def __init__(self, bits: int) -> None:
        room = (-(-bits // 8) + 2 * mmap.PAGESIZE - 1) // mmap.PAGESIZE * mmap.PAGESIZE
        try:
            self._memory = mmap.mmap(-1, room)
        except (OSError, OverflowError, ValueError):
            raise too_much(room) from None
        self.bits = bits
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))

    def ones(self) -> NDArray[np.intp]:
        """The numbers of the bits that are set, ascending."""
        import numpy as np

        packed = np.frombuffer(self._memory, np.uint8, -(-self.bits // 8))
        marked = np.flatnonzero(packed)  # few of many bytes: only they are taken apart
        rows, columns = np.nonzero(np.unpackbits(packed[marked], bitorder="little").reshape(-1, 8))
        found = marked[rows] * 8 + columns
        return found[found < self.bits]


def runs(dirty: NDArray[np.bool_], iova: int, page_size: int) -> list[tuple[int, int]]:
    """The runs of True as ``(iova, length)``, ascending."""
    import numpy as np

    edges = np.flatnonzero(np.diff(np.concatenate(([False], dirty, [False])))).reshape(-1, 2)
    return [(iova + int(first) * page_size, int(end - first) * page_size) for first, end in edges]
