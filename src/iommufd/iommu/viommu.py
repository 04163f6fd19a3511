"""What a driver sees of a virtual IOMMU, and what it may implement for one (kernel: struct iommufd_viommu and its ops).

devices.md 10.5, 10.6. The vIOMMU object itself is iommufd's; a driver's ``viommu_init`` gets it as
:class:`DriverViommu` and puts an object into ``ops`` that has the methods of those protocols below which it supports.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from iommufd.iommu.device import Device
    from iommufd.iommu.domain import Domain, PagingDomain
    from iommufd.iommu.driver import Iommu
    from iommufd.iommu.user_data import UserArray, UserData


class MmapRegion(Protocol):
    """Memory of the vIOMMU that a program can map through the iommufd descriptor at ``offset``; ``length`` in bytes."""

    offset: int
    length: int

    def read(self, at: int, count: int) -> bytes: ...

    def write(self, at: int, data: bytes) -> None: ...


class DriverViommu(Protocol):
    """The helpers a driver may call (devices.md 10.6).

    ``ops`` is the driver's to set, once, in ``viommu_init``; ``private`` is its own state."""

    type: int
    iommu: Iommu
    ops: object | None
    private: object

    @property
    def parent_domain(self) -> PagingDomain: ...

    def find_device(self, virt_id: int) -> Device | None:
        """The device whose vDEVICE here has that id."""
        ...

    def vdev_id(self, device: Device) -> int:
        """The id of the device's vDEVICE on this vIOMMU; ENOENT when it has none here."""
        ...

    def report_event(self, type: int, data: bytes) -> None:
        """Queues an event; EOPNOTSUPP when nobody has a queue of that type. A full queue loses it silently."""
        ...

    def alloc_mmap(self, length: int) -> MmapRegion:
        """New zeroed memory that can be mapped. EINVAL unless whole pages, ENOMEM, EBUSY. The kernel takes a physical
        address instead; here the memory a program maps and the memory a device model uses are one file."""
        ...

    def destroy_mmap(self, offset: int) -> None:
        """Gives the region at ``offset`` back; those left go with the vIOMMU."""
        ...


class DriverVdevice(Protocol):
    """One vDEVICE as a driver sees it."""

    virt_id: int
    private: object

    @property
    def device(self) -> Device: ...


class DriverHwQueue(Protocol):
    """One HW queue as a driver sees it. ``private`` is the driver's."""

    type: int
    base_iova: int
    length: int
    private: object

    def depend(self, on: DriverHwQueue) -> None:
        """This queue keeps ``on`` alive; EINVAL for itself or a queue of another vIOMMU."""
        ...

    def undepend(self, on: DriverHwQueue) -> None: ...


@runtime_checkable
class DestroysViommu(Protocol):
    def destroy(self, viommu: DriverViommu) -> None:
        """The last call."""
        ...


@runtime_checkable
class AllocatesNestedOnViommu(Protocol):
    def alloc_domain_nested(self, viommu: DriverViommu, flags: int, data: UserData) -> Domain: ...


@runtime_checkable
class InvalidatesViommuCaches(Protocol):
    def cache_invalidate(self, viommu: DriverViommu, array: UserArray) -> None:
        """As :meth:`~iommufd.iommu.domain.InvalidatesCaches.cache_invalidate_user`, for the whole vIOMMU."""
        ...


@runtime_checkable
class InitsVdevices(Protocol):
    def vdevice_init(self, vdevice: DriverVdevice) -> None: ...

    def vdevice_destroy(self, vdevice: DriverVdevice) -> None: ...


@runtime_checkable
class HasHwQueues(Protocol):
    def hw_queue_supported(self, viommu: DriverViommu, type: int) -> bool: ...

    def hw_queue_init_phys(self, viommu: DriverViommu, queue: DriverHwQueue, index: int, base_pa: int) -> None: ...

    def hw_queue_destroy(self, viommu: DriverViommu, queue: DriverHwQueue) -> None: ...
