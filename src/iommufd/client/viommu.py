"""Virtual IOMMUs and what belongs to them (kernel: struct iommufd_viommu, iommufd_vdevice, iommufd_hw_queue).

A VIOMMU is one guest's slice of a physical IOMMU over a nesting parent; a VDEVICE gives a device its number in the
guest; a HW queue is guest memory that the hardware reads by itself. Each holds the VIOMMU, which holds the parent.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

from iommufd.client.hwpt import NestedHWPT, alloc
from iommufd.client.invalidation import invalidate
from iommufd.client.numbers import U32, instance, number
from iommufd.client.objects import Object
from iommufd.uapi import iommufd as u

if TYPE_CHECKING:
    from iommufd.client.context import Context
    from iommufd.client.device import Device
    from iommufd.client.fault_queue import FaultQueue
    from iommufd.client.hwpt import HWPT
    from iommufd.client.invalidation import Entry
    from iommufd.client.nesting import HwptData
    from iommufd.client.veventq import VEventQueue
    from iommufd.uapi.declare import Struct


class VIOMMU(Object):
    """A virtual IOMMU. Made by :meth:`HWPT.alloc_viommu`. ``data`` is the vendor's struct as it came back, or None."""

    kind: ClassVar[str] = "VIOMMU"

    def __init__(
        self, context: Context, number: int, parent: HWPT | None = None, type: int = 0, data: Struct | None = None
    ) -> None:
        self.parent = parent
        self.type = type
        self.data = data
        super().__init__(context, number, parent)

    def alloc_nested(
        self, device: Device, data: HwptData, *, fault_queue: FaultQueue | None = None, pasid: bool = False
    ) -> NestedHWPT:
        """A guest's page table through this vIOMMU (IOMMU_HWPT_ALLOC); to be attached a device needs a vDEVICE."""
        flags = u.IOMMU_HWPT_ALLOC_PASID if pasid else 0
        return NestedHWPT(self.context, alloc(self, device, flags, fault_queue, data), self, fault_queue)

    def alloc_vdevice(self, device: Device, virt_id: int) -> VDevice:
        """Tells the number of ``device`` in the guest (IOMMU_VDEVICE_ALLOC): its stream id, source id, ...

        EEXIST when the device has one, or another has this number; EINVAL when it is behind another IOMMU."""
        from iommufd.client.device import Device

        instance(device, Device, "device")
        if device.context is not self.context:
            raise ValueError(f"{device!r} is not of the same context as {self!r}")
        query = u.iommu_vdevice_alloc(viommu_id=self._id, dev_id=device.id, virt_id=number(virt_id, "virt_id"))
        return VDevice(self.context, self._do(query).out_vdevice_id, self, device, virt_id)

    def alloc_veventq(self, type: int, depth: int = 64, *, event_size: int | None = None) -> VEventQueue:
        """A queue for events of one type (an ``iommu_veventq_type``), ``depth`` of them (IOMMU_VEVENTQ_ALLOC).

        ``event_size``: bytes of one event, for types this client does not know. EEXIST for a second one of a type."""
        from iommufd.client.veventq import VEventQueue, size_of_event

        size = size_of_event(type, event_size)
        answer = self._do(
            u.iommu_veventq_alloc(
                viommu_id=self._id,
                type=number(type, "type", U32),
                veventq_depth=number(depth, "depth", U32),
            )
        )
        return VEventQueue(self.context, answer.out_veventq_id, answer.out_veventq_fd, self, type, size)

    def alloc_hw_queue(self, type: int, index: int, iova: int, length: int) -> HWQueue:
        """Lets the hardware read queue ``index`` of the guest at ``iova`` of the parent (IOMMU_HW_QUEUE_ALLOC).

        The memory must be physically contiguous (EFAULT) and stays pinned; unmapping it is EBUSY meanwhile. Indexes are
        made in ascending and closed in descending order."""
        query = u.iommu_hw_queue_alloc(
            viommu_id=self._id,
            type=number(type, "type", U32),
            index=number(index, "index", U32),
            nesting_parent_iova=number(iova, "iova"),
            length=number(length, "length"),
        )
        return HWQueue(self.context, self._do(query).out_hw_queue_id, self, index, iova, length)

    def invalidate(self, entries: Iterable[Entry]) -> int:
        """Drops cached translations and structures of the guest (IOMMU_HWPT_INVALIDATE); how many entries were handled.

        :class:`InvalidationError` when one is refused: its ``handled`` tells how many before it took effect."""
        return invalidate(self, entries)

    def mmap(self, offset: int | None = None, length: int | None = None, *, writeable: bool = True) -> memoryview:
        """Maps the vIOMMU's region of device memory. Where it is, the vendor's :attr:`data` says, unless given.

        Closing the vIOMMU is EBUSY until the last view of it is gone. ENXIO where no region begins or ends."""
        self._check()
        where = self.data
        for prefix in ("out_vintf_mmap_", "out_mmap_"):
            if where is not None and hasattr(where, f"{prefix}offset"):
                offset = getattr(where, f"{prefix}offset") if offset is None else offset
                length = getattr(where, f"{prefix}length") if length is None else length
        if offset is None or length is None:
            raise ValueError(f"{self!r} tells of no region: give offset and length")
        return self.context.mmap(number(length, "length"), number(offset, "offset"), writeable=writeable)

    def _describe(self) -> str:
        return f"type {self.type:#x}" + (f" over HWPT {self.parent.number}" if self.parent is not None else "")


class VDevice(Object):
    """A device in a guest, known there as ``virt_id``. Goes with the device, if not before."""

    kind: ClassVar[str] = "VDEVICE"

    def __init__(
        self,
        context: Context,
        number: int,
        viommu: VIOMMU | None = None,
        device: Device | None = None,
        virt_id: int = 0,
    ) -> None:
        self.viommu = viommu
        self.device = device
        self.virt_id = virt_id
        super().__init__(context, number, viommu, device)

    def _describe(self) -> str:
        return f"{self.virt_id:#x} is device {self.device.number}" if self.device is not None else ""


class HWQueue(Object):
    """A queue of the guest that hardware reads: ``length`` bytes at ``iova`` of the nesting parent."""

    kind: ClassVar[str] = "HW_QUEUE"

    def __init__(
        self,
        context: Context,
        number: int,
        viommu: VIOMMU | None = None,
        index: int = 0,
        iova: int = 0,
        length: int = 0,
    ) -> None:
        self.viommu = viommu
        self.index = index
        self.iova = iova
        self.length = length
        super().__init__(context, number, viommu)

    def mmap(self, *, writeable: bool = True) -> memoryview:
        """The registers of the vIOMMU's queues, see :meth:`VIOMMU.mmap`."""
        if self.viommu is None:
            raise ValueError(f"{self!r} is of a vIOMMU this client does not know")
        self._check()
        return self.viommu.mmap(writeable=writeable)

    def _describe(self) -> str:
        return f"index {self.index}, {self.length:#x} bytes at {self.iova:#x}"
