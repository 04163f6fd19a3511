"""HWPT and NestedHWPT: page tables that the IOMMU itself walks (kernel: struct iommufd_hwpt_paging and _nested).

Invariants: a HWPT is a view of its IOAS in one IOMMU's format, whole from the moment it exists; what is mapped in the
IOAS is mapped in it. A nested one is a guest's own table, translated further by its parent, and only caches of it are
known here (:meth:`NestedHWPT.invalidate`). The one the kernel makes by itself when a device is attached to an IOAS goes
by itself, too: closing it does nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from iommufd.client.buffers import Scratch
from iommufd.client.calls import packed
from iommufd.client.invalidation import invalidate
from iommufd.client.mapping import span
from iommufd.client.numbers import U32, instance, number
from iommufd.client.objects import Object, PageTable
from iommufd.uapi import iommufd as u
from iommufd.uapi.declare import Struct

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    from numpy.typing import NDArray

    from iommufd.client.context import Context
    from iommufd.client.device import Device
    from iommufd.client.fault_queue import FaultQueue
    from iommufd.client.invalidation import Entry
    from iommufd.client.ioas import IOAS
    from iommufd.client.mapping import Mapping
    from iommufd.client.nesting import HwptData
    from iommufd.client.viommu import VIOMMU

PAGE_SIZE = 4096


def alloc(target: Object, device: Device, flags: int, fault_queue: FaultQueue | None, data: HwptData | None) -> int:
    """IOMMU_HWPT_ALLOC on an IOAS, HWPT or vIOMMU; the new number."""
    from iommufd.client.device import Device
    from iommufd.client.fault_queue import FaultQueue

    instance(device, Device, "device")
    if fault_queue is not None:
        instance(fault_queue, FaultQueue, "fault_queue")
        flags |= u.IOMMU_HWPT_FAULT_ID_VALID
    for other in (device, fault_queue):
        if other is not None and other.context is not target.context:
            raise ValueError(f"{other!r} is not of the same context as {target!r}")
    payload = packed(data, "data of a HWPT", "data_type") if data is not None else b""
    memory = Scratch(payload)
    query = u.iommu_hwpt_alloc(
        flags=flags,
        dev_id=device.id,
        pt_id=target.id,
        data_type=number(data.data_type, "data_type", U32) if data is not None else u.IOMMU_HWPT_DATA_NONE,
        data_len=len(payload),
        data_uptr=memory.address if payload else 0,
        fault_id=fault_queue.id if fault_queue is not None else 0,
    )
    return target.context.do(query).out_hwpt_id


class HWPT(PageTable):
    """A page table made from an IOAS: by :meth:`IOAS.alloc_hwpt`, or by the kernel when a device is attached to it."""

    kind: ClassVar[str] = "HWPT_PAGING"

    def __init__(
        self,
        context: Context,
        number: int,
        ioas: IOAS | None = None,
        fault_queue: FaultQueue | None = None,
        *,
        automatic: bool = False,
    ) -> None:
        self.ioas = ioas
        self.fault_queue = fault_queue
        self.automatic = automatic
        super().__init__(context, number, ioas, fault_queue)

    def close(self) -> None:
        if self.automatic and not self.closed:
            for child in list(self._children):
                child.close()
            for device, pasid in list(self._attached):
                device._detach_from(self, pasid)
            self.context._objects.pop(self, None)
            self._forget()
            return
        super().close()

    # --------------------------------------------------------------------------------------------------------- dirt

    def set_dirty_tracking(self, enabled: bool) -> None:
        """Starts or stops recording which pages devices write (IOMMU_HWPT_SET_DIRTY_TRACKING).

        Starting forgets what was recorded before, also when it was on; stopping keeps it readable. EOPNOTSUPP unless
        made with ``dirty_tracking=True``."""
        flags = u.IOMMU_HWPT_DIRTY_TRACKING_ENABLE if enabled else 0
        self._do(u.iommu_hwpt_set_dirty_tracking(flags=flags, hwpt_id=self._id))

    def dirty_pages(
        self,
        iova: int | Mapping,
        length: int | None = None,
        *,
        page_size: int = PAGE_SIZE,
        clear: bool = True,
    ) -> NDArray[np.bool_]:
        """Which pages devices have written: one bool for each ``page_size`` bytes from ``iova`` on, or of a mapping.

        What is reported becomes clean, unless ``clear`` is false. IOVA and length must be multiples of ``page_size`` (a
        power of two) and of the IOAS's alignment: EINVAL. Pages where nothing is mapped are clean. Entries larger than
        ``page_size`` are reported whole; one that begins below ``iova`` is cleaned unseen (core 8.3).
        """
        from iommufd.client.dirty import read_dirty

        iova, length = span(iova, length)
        return read_dirty(self, iova, length, number(page_size, "page_size"), clear)

    def dirty_ranges(
        self,
        iova: int | Mapping,
        length: int | None = None,
        *,
        page_size: int = PAGE_SIZE,
        clear: bool = True,
    ) -> list[tuple[int, int]]:
        """As :meth:`dirty_pages`, as ascending ``(iova, length)`` of the runs of dirty pages."""
        from iommufd.client.dirty import runs

        iova, length = span(iova, length)
        return runs(self.dirty_pages(iova, length, page_size=page_size, clear=clear), iova, page_size)

    # -------------------------------------------------------------------------------------------------------- nesting

    def alloc_nested(
        self, device: Device, data: HwptData, *, fault_queue: FaultQueue | None = None, pasid: bool = False
    ) -> NestedHWPT:
        """A guest's page table on top of this one (which was made with ``nest_parent=True``).

        ``data`` is the vendor's description of it: :class:`VTDStage1`, ... EOPNOTSUPP when the hardware cannot nest,
        EINVAL when this HWPT is no nesting parent."""
        flags = u.IOMMU_HWPT_ALLOC_PASID if pasid else 0
        return NestedHWPT(self.context, alloc(self, device, flags, fault_queue, data), self, fault_queue)

    def alloc_viommu(self, device: Device, type: int, data: Struct | None = None) -> VIOMMU:
        """A virtual IOMMU over this nesting parent, backed by the IOMMU of ``device`` (IOMMU_VIOMMU_ALLOC).

        ``type`` is an ``iommu_viommu_type``. ``data`` is the vendor's struct, if it has one; what came back is the
        vIOMMU's :attr:`~VIOMMU.data`. EOPNOTSUPP when the hardware has no such vIOMMU."""
        from iommufd.client.device import Device
        from iommufd.client.viommu import VIOMMU

        instance(device, Device, "device")
        if device.context is not self.context:
            raise ValueError(f"{device!r} is not of the same context as {self!r}")
        payload = packed(instance(data, Struct, "data"), "struct") if data is not None else b""
        memory = Scratch(payload)
        answer = self._do(
            u.iommu_viommu_alloc(
                type=number(type, "type", U32),
                dev_id=device.id,
                hwpt_id=self._id,
                data_len=len(payload),
                data_uptr=memory.address if payload else 0,
            )
        )
        back = data.unpack(memory.bytes()) if data is not None else None
        return VIOMMU(self.context, answer.out_viommu_id, self, type, back)

    def _describe(self) -> str:
        words = [f"of IOAS {self.ioas.number}"] if self.ioas is not None else []
        if self.automatic:
            words.append("automatic")
        if self.fault_queue is not None:
            words.append(f"faults to queue {self.fault_queue.number}")
        return ", ".join(words)


class NestedHWPT(PageTable):
    """A guest's page table on a nesting parent or vIOMMU."""

    kind: ClassVar[str] = "HWPT_NESTED"

    def __init__(
        self,
        context: Context,
        number: int,
        parent: HWPT | VIOMMU | None = None,
        fault_queue: FaultQueue | None = None,
    ) -> None:
        self.parent = parent
        self.fault_queue = fault_queue
        super().__init__(context, number, parent, fault_queue)

    def invalidate(self, entries: Iterable[Entry]) -> int:
        """Drops cached translations of the guest's table (IOMMU_HWPT_INVALIDATE); how many entries were handled.

        :class:`InvalidationError` when one is refused: its ``handled`` tells how many before it took effect."""
        return invalidate(self, entries)

    def _describe(self) -> str:
        return f"on {type(self.parent).__name__} {self.parent.number}" if self.parent is not None else ""
