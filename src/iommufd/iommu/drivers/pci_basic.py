"""A plain DMA-remapping IOMMU for PCI functions, the model of no particular vendor (kernel: a struct iommu_ops).

It translates with one page table per RID or PASID and can do what VFIO and iommufd want of every x86 IOMMU: 4 KiB, 2
MiB and 1 GiB pages, coherent DMA that can be enforced, an interrupt window at 0xfee00000, PASIDs and, if asked for,
dirty tracking and page requests. It has no user-managed tables and reports no hardware information.

Invariant: :meth:`PciBasicDriver.domain_of` is what the hardware would translate with at this moment; a RID that nobody
attached uses the identity domain until its group is claimed and the blocked domain from then on.
"""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING

from iommufd.errors import KernelError
from iommufd.iommu.domain import BaseDomain, Kind
from iommufd.iommu.driver import Capability, Iommu, RegionType, ReservedRegion
from iommufd.iommu.extent_domain import ExtentDomain
from iommufd.iommu.faults import RID, IopfQueue
from iommufd.uapi import iommufd as u

if TYPE_CHECKING:
    from iommufd.iommu.device import Device
    from iommufd.iommu.domain import Domain
    from iommufd.iommu.user_data import UserData

PAGE_SIZES = 1 << 12 | 1 << 21 | 1 << 30
APERTURE_END = 2**48 - 1
MSI_WINDOW = ReservedRegion(0xFEE00000, 0x100000, RegionType.MSI)
PASIDS = 1 << 20


class _Attach:
    """What every domain of this driver does when a device moves to it: the hardware uses it from then on."""

    __slots__ = ()

    def attach_dev(self: Domain, device: Device, old: Domain) -> None:
        driver = _driver_of(device)
        device.fault_source.domain_changes(driver.iommu.iopf_queue, self, old)
        driver._use(device, RID, self)

    def set_dev_pasid(self: Domain, device: Device, pasid: int, old: Domain | None) -> None:
        driver = _driver_of(device)
        device.fault_source.domain_changes(driver.iommu.iopf_queue, self, old)
        driver._use(device, pasid, self)


class BasicDomain(_Attach, ExtentDomain):
    """A page table."""

    __slots__ = ("_enforceable",)

    def __init__(self, driver: PciBasicDriver, *, dirty: bool) -> None:
        super().__init__(PAGE_SIZES, 0, APERTURE_END, dirty=dirty, owner=driver)
        self._enforceable = driver.enforces_coherency

    def enforce_cache_coherency(self) -> bool:
        return self._enforceable


class StaticDomain(_Attach, BaseDomain):
    """The blocked or the identity domain of a driver."""

    __slots__ = ()


class PciBasicDriver:
    """One machine's driver; all its devices are behind one IOMMU instance, ``iommu``.

    ``dirty``: page tables may track dirty pages. ``enforces_coherency``: no-snoop DMA can be made coherent.
    ``max_pasids``: 0 for an IOMMU without PASIDs. ``page_requests``: its devices may fault (PRI) on page tables with a
    fault queue. ``firmware_regions``: what the firmware's tables reserve, by device name (DMAR's RMRR, IVRS's IVMD)."""

    name = "pci_basic"
    user_pasid_table = False

    def __init__(
        self,
        *,
        dirty: bool = False,
        enforces_coherency: bool = True,
        max_pasids: int = PASIDS,
        page_requests: bool = False,
    ) -> None:
        queue = IopfQueue("pci_basic") if page_requests else None
        self.iommu = Iommu("iommu0", max_pasids=max_pasids, iopf_queue=queue)
        self.firmware_regions: dict[str, tuple[ReservedRegion, ...]] = {}
        self.dirty = dirty
        self.enforces_coherency = enforces_coherency
        self.blocked_domain: StaticDomain = StaticDomain(Kind.BLOCKED, self)
        self.identity_domain: StaticDomain = StaticDomain(Kind.IDENTITY, self)
        self._in_use: dict[tuple[int, int], Domain] = {}  # (identity of the device, PASID)
        self._lock = threading.Lock()

    def capable(self, device: Device, capability: Capability) -> bool:
        if capability is Capability.CACHE_COHERENCY:
            return True
        if capability is Capability.ENFORCE_CACHE_COHERENCY:
            return self.enforces_coherency
        return capability is Capability.DIRTY_TRACKING and self.dirty

    def domain_alloc_paging_flags(self, device: Device, flags: int, data: UserData | None) -> BasicDomain:
        """EOPNOTSUPP for data, for a nesting parent, and for PASIDs or dirty tracking that the hardware has not."""
        if data is not None:
            raise KernelError(errno.EOPNOTSUPP, f"{self.name} takes no page table data (type {data.type:#x})")
        possible = u.IOMMU_HWPT_ALLOC_PASID if self.iommu.max_pasids else 0
        if self.dirty:
            possible |= u.IOMMU_HWPT_ALLOC_DIRTY_TRACKING
        if flags & ~possible:
            raise KernelError(errno.EOPNOTSUPP, f"{self.name} makes no page tables with flags {flags & ~possible:#x}")
        return BasicDomain(self, dirty=bool(flags & u.IOMMU_HWPT_ALLOC_DIRTY_TRACKING))

    def get_resv_regions(self, device: Device) -> list[ReservedRegion]:
        return [MSI_WINDOW, *self.firmware_regions.get(device.name, ())]

    def domain_of(self, device: Device, pasid: int = RID) -> Domain:
        """What the hardware translates with for a request of ``device``: its RID, or one PASID of it."""
        with self._lock:
            found = self._in_use.get((id(device), pasid))
        if found is not None:
            return found
        return self.identity_domain if pasid == RID else self.blocked_domain

    def _use(self, device: Device, pasid: int, domain: Domain) -> None:
        with self._lock:
            if pasid != RID and domain is self.blocked_domain:
                self._in_use.pop((id(device), pasid), None)
            else:
                self._in_use[id(device), pasid] = domain


def _driver_of(device: Device) -> PciBasicDriver:
    driver = device.driver
    if not isinstance(driver, PciBasicDriver):
        raise KernelError(errno.EINVAL, f"{device.name} is behind another kind of IOMMU")
    return driver
