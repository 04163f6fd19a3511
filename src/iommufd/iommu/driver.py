"""Driver: what an IOMMU driver offers (kernel: struct iommu_ops), devices.md 10.1.

:class:`Driver` is what every driver has. Each optional op is a protocol of its own with exactly that op; a driver
offers it by having the method, and iommufd answers EOPNOTSUPP (or what the chapter says) when it does not. Ops raise
KernelError; the errno reaches the client.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from iommufd.iommu.device import Device
    from iommufd.iommu.domain import Domain, PagingDomain
    from iommufd.iommu.faults import IopfQueue, PageRequest, ResponseCode
    from iommufd.iommu.user_data import UserData
    from iommufd.iommu.viommu import DriverViommu


class Capability(Enum):
    """What iommufd asks a driver about a device (kernel: enum iommu_cap)."""

    CACHE_COHERENCY = "cache coherency"
    ENFORCE_CACHE_COHERENCY = "enforced cache coherency"
    DIRTY_TRACKING = "dirty tracking"
    PCI_ATS_SUPPORTED = "PCI ATS"


class Iommu:
    """One IOMMU instance (kernel: struct iommu_device). Compared by identity; bounds the PASIDs of its devices.

    ``iopf_queue`` is where its devices report page requests, None when it has no such hardware.
    """

    __slots__ = ("iopf_queue", "max_pasids", "name")

    def __init__(self, name: str, *, max_pasids: int = 0, iopf_queue: IopfQueue | None = None) -> None:
        self.name = name
        self.max_pasids = max_pasids
        self.iopf_queue = iopf_queue

    def __repr__(self) -> str:
        return f"<Iommu {self.name}>"


class RegionType(Enum):
    """Kinds of reserved region of a device."""

    DIRECT = "direct"
    DIRECT_RELAXABLE = "direct-relaxable"
    RESERVED = "reserved"
    MSI = "msi"
    SW_MSI = "sw-msi"


@dataclass(frozen=True, slots=True)
class ReservedRegion:
    """IOVA ``[start, start + length)`` that a device's mappings must stay out of; ``prot`` for DIRECT ones."""

    start: int
    length: int
    type: RegionType
    prot: int = 0


@dataclass(frozen=True, slots=True)
class HwInfo:
    """The answer of ``hw_info``: ``data`` in the driver's own layout, its nonzero ``type``."""

    type: int
    data: bytes


class Driver(Protocol):
    """The required part. ``blocked_domain`` and ``identity_domain`` are static domains of the driver or None.

    ``user_pasid_table``: faults with a PASID nobody attached belong to the nested domain on the RID.
    """

    @property
    def name(self) -> str: ...

    @property
    def blocked_domain(self) -> Domain | None: ...

    @property
    def identity_domain(self) -> Domain | None: ...

    @property
    def user_pasid_table(self) -> bool: ...

    def capable(self, device: Device, capability: Capability) -> bool:
        """A pure query."""
        ...


@runtime_checkable
class HasHwInfo(Protocol):
    def hw_info(self, device: Device, requested: int) -> HwInfo:
        """``requested`` 0: the driver's own type; a type it does not know: EOPNOTSUPP. The answer's type is not 0."""
        ...


@runtime_checkable
class AllocatesPagingWithFlags(Protocol):
    def domain_alloc_paging_flags(self, device: Device, flags: int, data: UserData | None) -> PagingDomain:
        """``flags`` within NEST_PARENT, DIRTY_TRACKING, PASID; what the driver cannot do is EOPNOTSUPP."""
        ...


@runtime_checkable
class AllocatesPaging(Protocol):
    def domain_alloc_paging(self, device: Device) -> PagingDomain | None:
        """A plain page table; None means no memory."""
        ...


@runtime_checkable
class AllocatesNested(Protocol):
    def domain_alloc_nested(self, device: Device, parent: Domain, flags: int, data: UserData) -> Domain:
        """A user-managed stage-1 on ``parent``; ``flags`` within PASID. Wrong data type: EOPNOTSUPP; malformed:
        EINVAL."""
        ...


@runtime_checkable
class HasReservedRegions(Protocol):
    def get_resv_regions(self, device: Device) -> list[ReservedRegion]:
        """Cannot fail; asked at probe, at every RID attach and at replace to a new IOAS."""
        ...


@runtime_checkable
class RespondsToPages(Protocol):
    def page_response(self, device: Device, request: PageRequest, code: ResponseCode) -> None:
        """The answer to one last-of-group request; cannot fail."""
        ...


@runtime_checkable
class HasViommus(Protocol):
    def viommu_supported(self, device: Device, type: int) -> bool:
        """Whether ``type`` exists on this device's IOMMU (kernel: get_viommu_size not 0)."""
        ...

    def viommu_init(self, viommu: DriverViommu, parent: PagingDomain, data: UserData | None) -> None:
        """Sets ``viommu.ops``."""
        ...
