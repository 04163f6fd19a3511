"""DmaLog: the device itself records where it writes by DMA (kernel: struct vfio_log_ops).

Invariants: one log a device; it is started with the IOVAs to watch, and reading a part of it clears that part. It has
nothing to do with the IOMMU's dirty tracking (:meth:`HWPT.dirty_pages`), for which the device needs no feature.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import TYPE_CHECKING

from iommufd.client.buffers import Scratch, too_much
from iommufd.client.dirty import Bitmap
from iommufd.client.mapping import Mapping, span
from iommufd.client.numbers import items, number, pair
from iommufd.client.vfio import feature
from iommufd.uapi import vfio as v

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from iommufd.client.handle import Handle

PAGE_SIZE = 4096


class DmaLog:
    """The log of a device: ``device.dma_log``. Everything here is ENOTTY for a device that keeps none."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    @property
    def supported(self) -> bool:
        """Whether the device can keep one."""
        return feature.probe(self._handle, v.VFIO_DEVICE_FEATURE_DMA_LOGGING_START, feature.SET)

    def start(self, ranges: Iterable[Mapping | tuple[int, int]], page_size: int = PAGE_SIZE) -> int:
        """Records writes to ``ranges``: mappings, or ``(iova, length)`` in bytes (feature DMA_LOGGING_START).

        ``page_size``: how finely, in bytes; a wish. The page size that the device chose. 256 ranges are always taken;
        with more a driver may refuse. EINVAL when a log is kept already, for an empty range and for overlapping
        ones."""
        pairs = [
            (each.iova, each.length) if isinstance(each, Mapping) else pair(each, "a range", "iova", "length")
            for each in items(ranges, "ranges")
        ]
        array = Scratch(b"".join(struct.pack("<QQ", *pair) for pair in pairs))
        control = v.vfio_device_feature_dma_logging_control(
            page_size=number(page_size, "page_size"), num_ranges=len(pairs), ranges=array.address if pairs else 0
        )
        answer = feature.put(self._handle, v.VFIO_DEVICE_FEATURE_DMA_LOGGING_START, control)
        assert answer is not None
        return answer.page_size

    def stop(self) -> None:
        """Ends the log; what it held is gone (feature DMA_LOGGING_STOP). EINVAL when there is none."""
        feature.put(self._handle, v.VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP)

    def read(self, iova: int | Mapping, length: int | None = None, page_size: int = PAGE_SIZE) -> NDArray[np.bool_]:
        """What was written since the last time: one bool for each ``page_size`` bytes from ``iova`` on, or of a mapping
        (feature DMA_LOGGING_REPORT).

        ``page_size``, a power of two, need not be the one of :meth:`start`. What is read is cleared. After an error
        nothing in the log can be relied upon: all memory counts as written. EINVAL when no log is kept."""
        import numpy as np

        iova, length = span(iova, length)
        page_size = number(page_size, "page_size")
        if page_size & (page_size - 1) or not page_size:
            raise ValueError(f"page_size {page_size} is not a power of two")
        pages = -(-length // page_size)
        try:
            found = np.zeros(pages, bool)
        except (MemoryError, OverflowError, ValueError):
            raise too_much(pages) from None
        bitmap = Bitmap(pages)
        report = v.vfio_device_feature_dma_logging_report(
            iova=iova, length=length, page_size=page_size, bitmap=bitmap.address
        )
        feature.get(self._handle, v.VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT, report)
        found[bitmap.ones()] = True
        return found

    def __repr__(self) -> str:
        return f"<DmaLog of {self._handle.name}>"
