"""Device: a device behind (or without) an IOMMU, as the generic layer knows it (kernel: struct device with its
dev_iommu)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iommufd.iommu.driver import HasReservedRegions, RegionType
from iommufd.iommu.faults import FaultSource

if TYPE_CHECKING:
    from iommufd.iommu.driver import Driver, Iommu, ReservedRegion
    from iommufd.iommu.group import Group


class Device:
    """One device. Without IOMMU state (``driver``, ``iommu`` and ``group`` None) it is a no-IOMMU device.

    ``pasid_limit``: how many PASIDs the device itself can tell apart (0: no PASID capability). ``pci``: a PCI function;
    ``pasid_exec``/``pasid_priv``: bits enabled in its PASID control register; ``vf_with_pri``: a virtual function that
    shares its physical function's page request interface. ``isolated_msi``: its interrupts cannot be forged by others.
    """

    __slots__ = (
        "__weakref__",
        "driver",
        "fault_source",
        "group",
        "iommu",
        "isolated_msi",
        "name",
        "parked",
        "pasid_exec",
        "pasid_limit",
        "pasid_priv",
        "pci",
        "require_direct",
        "vf_with_pri",
    )

    def __init__(
        self,
        name: str,
        *,
        driver: Driver | None = None,
        iommu: Iommu | None = None,
        pasid_limit: int = 0,
        pci: bool = False,
        isolated_msi: bool = True,
    ) -> None:
        self.name = name
        self.driver = driver
        self.iommu = iommu
        self.group: Group | None = None
        self.pasid_limit = pasid_limit
        self.pci = pci
        self.pasid_exec = False
        self.pasid_priv = False
        self.vf_with_pri = False
        self.isolated_msi = isolated_msi
        self.parked = False  # being reset: its PASIDs are left alone (devices.md 3.4b)
        self.fault_source = FaultSource()
        self.require_direct = any(r.type is RegionType.DIRECT for r in self.resv_regions())

    @property
    def max_pasids(self) -> int:
        """devices.md 3.4b: what both the device and its IOMMU can do; 0 without PASID."""
        return min(self.pasid_limit, self.iommu.max_pasids) if self.iommu is not None else 0

    def resv_regions(self) -> list[ReservedRegion]:
        """The driver's list for this device; empty when it has none."""
        driver = self.driver
        return driver.get_resv_regions(self) if driver is not None and isinstance(driver, HasReservedRegions) else []

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"
