"""A device behind the mock IOMMU (kernel: struct mock_dev in iommufd/selftest.c), mock-device 2.1."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iommufd.iommu.device import Device
from iommufd.uapi.iommufd_test import (
    IOMMU_TEST_DEV_CACHE_DEFAULT,
    MOCK_DEV_CACHE_NUM,
    MOCK_FLAGS_DEVICE_PASID,
    MOCK_PASID_WIDTH,
)

if TYPE_CHECKING:
    from iommufd.iommu.driver import Driver, Iommu
    from iommufd.iommu.viommu import DriverViommu


class MockDevice(Device):
    """Alone in its group. ``viommu`` and ``vdev_id`` are what its RID followed last (2.4), ``cache`` its four cache
    words.

    ``dev_flags``: NO_DIRTY 1, PASID 4. ``pasid_1024_fails``: the next attach of that PASID is the one that fails."""

    __slots__ = ("cache", "dev_flags", "pasid_1024_fails", "vdev_id", "viommu")

    def __init__(self, name: str, dev_flags: int, driver: Driver, iommu: Iommu) -> None:
        pasids = 1 << MOCK_PASID_WIDTH if dev_flags & MOCK_FLAGS_DEVICE_PASID else 1
        super().__init__(name, driver=driver, iommu=iommu, pasid_limit=pasids)
        self.dev_flags = dev_flags
        self.cache = [IOMMU_TEST_DEV_CACHE_DEFAULT] * MOCK_DEV_CACHE_NUM
        self.viommu: DriverViommu | None = None
        self.vdev_id = 0
        self.pasid_1024_fails = False
