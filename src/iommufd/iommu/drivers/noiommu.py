"""The software page table of devices without an IOMMU (kernel: CONFIG_IOMMUFD_NOIOMMU), devices.md 9.

Nothing translates through it: it holds pages pinned and answers IOMMU_IOAS_NOIOMMU_GET_PA. It cannot be attached to
anything, so it has no attach op; binding and attaching such devices is bookkeeping in iommufd alone.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from iommufd.errors import KernelError
from iommufd.iommu.extent_domain import ExtentDomain

if TYPE_CHECKING:
    from iommufd.iommu.device import Device
    from iommufd.iommu.driver import Capability
    from iommufd.iommu.user_data import UserData

PAGE_SIZES = 0xFFFFFFFFFFFFF000  # 4 KiB and larger
OUTPUT_BITS = 52


class NoiommuDriver:
    """The built-in driver of no-IOMMU devices: plain page tables and nothing else."""

    name = "noiommu"
    blocked_domain = None
    identity_domain = None
    user_pasid_table = False

    def capable(self, device: Device, capability: Capability) -> bool:
        return False

    def domain_alloc_paging_flags(self, device: Device, flags: int, data: UserData | None) -> ExtentDomain:
        """EOPNOTSUPP for any flag and for any data."""
        if flags or data is not None:
            raise KernelError(errno.EOPNOTSUPP, f"{device.name} has no IOMMU: no flags ({flags:#x}) and no driver data")
        return ExtentDomain(PAGE_SIZES, output_bits=OUTPUT_BITS, owner=self)
