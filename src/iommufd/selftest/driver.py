"""The mock IOMMU and its driver (kernel: mock_ops in iommufd/selftest.c), mock-device 2."""

from __future__ import annotations

import errno
from itertools import count
from typing import TYPE_CHECKING

from iommufd.errors import KernelError
from iommufd.iommu.driver import Capability, HwInfo, Iommu
from iommufd.iommu.faults import IopfQueue
from iommufd.iommu.group import Group
from iommufd.selftest import viommu as mock_viommu
from iommufd.selftest.device import MockDevice
from iommufd.selftest.domain import FORMATS, MockBlockedDomain, MockDomain
from iommufd.selftest.nested import alloc_nested
from iommufd.uapi import iommufd as u
from iommufd.uapi.iommufd_test import (
    IOMMU_HW_INFO_SELFTEST_REGVAL,
    IOMMU_HW_INFO_TYPE_SELFTEST,
    IOMMU_HWPT_DATA_SELFTEST,
    MOCK_FLAGS_DEVICE_NO_DIRTY,
    MOCK_IOMMUPT_DEFAULT,
    MOCK_PASID_WIDTH,
    iommu_hwpt_selftest,
    iommu_test_hw_info,
)

if TYPE_CHECKING:
    from iommufd.iommu.device import Device
    from iommufd.iommu.domain import Domain, PagingDomain
    from iommufd.iommu.faults import PageRequest, ResponseCode
    from iommufd.iommu.user_data import UserData
    from iommufd.iommu.viommu import DriverViommu

PAGING_FLAGS = u.IOMMU_HWPT_ALLOC_NEST_PARENT | u.IOMMU_HWPT_ALLOC_DIRTY_TRACKING | u.IOMMU_HWPT_ALLOC_PASID
HWPT_DATA_MINIMUM = 4  # iommu_hwpt_selftest through ``iotlb``


class MockDriver:
    """The driver of one machine's mock IOMMU, which all mock devices of all contexts share."""

    name = "mock"
    identity_domain: Domain | None = None
    user_pasid_table = True

    def __init__(self) -> None:
        self.iommu = Iommu("iommufd_mock", max_pasids=1 << MOCK_PASID_WIDTH, iopf_queue=IopfQueue("mock-iopfq"))
        self.blocked_domain: Domain | None = MockBlockedDomain(self)
        self._numbers = count()

    def new_device(self, dev_flags: int) -> MockDevice:
        """A device on a bus of its own, the only member of its group."""
        name = f"iommufd_mock{next(self._numbers)}"
        device = MockDevice(name, dev_flags, self, self.iommu)
        assert self.blocked_domain is not None
        Group(name, self.blocked_domain).add(device)
        return device

    def remove_device(self, device: MockDevice) -> None:
        """The device disappears; it is bound to nothing any more."""
        if device.group is not None:
            device.group.remove(device)

    def capable(self, device: Device, capability: Capability) -> bool:
        if capability is Capability.CACHE_COHERENCY:
            return True
        if capability is Capability.DIRTY_TRACKING:
            return isinstance(device, MockDevice) and not device.dev_flags & MOCK_FLAGS_DEVICE_NO_DIRTY
        return False

    def hw_info(self, device: Device, requested: int) -> HwInfo:
        """mock-device 2.2."""
        if requested not in (u.IOMMU_HW_INFO_TYPE_DEFAULT, IOMMU_HW_INFO_TYPE_SELFTEST):
            raise KernelError(errno.EOPNOTSUPP, f"the mock IOMMU has no information of type {requested:#x}")
        info = iommu_test_hw_info(flags=0, test_reg=IOMMU_HW_INFO_SELFTEST_REGVAL)
        return HwInfo(IOMMU_HW_INFO_TYPE_SELFTEST, info.pack())

    def domain_alloc_paging_flags(self, device: Device, flags: int, data: UserData | None) -> MockDomain:
        """mock-device 2.3; the fault flag never gets here."""
        dirty = bool(flags & u.IOMMU_HWPT_ALLOC_DIRTY_TRACKING)
        if flags & ~PAGING_FLAGS:  # row 1
            raise KernelError(errno.EOPNOTSUPP, f"unknown flags {flags & ~PAGING_FLAGS:#x}")
        if dirty and not self.capable(device, Capability.DIRTY_TRACKING):  # row 2
            raise KernelError(errno.EOPNOTSUPP, f"{device.name} cannot track dirty pages")
        pagetable_type = MOCK_IOMMUPT_DEFAULT
        if data is not None:
            if data.type != IOMMU_HWPT_DATA_SELFTEST:  # row 4
                raise KernelError(errno.EOPNOTSUPP, f"page table data of type {data.type:#x}")
            given = data.copy(IOMMU_HWPT_DATA_SELFTEST, iommu_hwpt_selftest, HWPT_DATA_MINIMUM)  # rows 5, 6
            pagetable_type = given.pagetable_type
            if pagetable_type not in FORMATS:  # row 7
                raise KernelError(errno.EOPNOTSUPP, f"there is no mock page table of type {pagetable_type}")
        return MockDomain(pagetable_type, dirty=dirty, owner=self)

    def domain_alloc_nested(self, device: Device, parent: Domain, flags: int, data: UserData) -> Domain:
        """mock-device 2.3, nested rows 3-5."""
        if flags & ~u.IOMMU_HWPT_ALLOC_PASID:
            raise KernelError(errno.EOPNOTSUPP, f"unknown flags {flags:#x}")
        return alloc_nested(data)

    def viommu_supported(self, device: Device, type: int) -> bool:
        return mock_viommu.supported(type)

    def viommu_init(self, viommu: DriverViommu, parent: PagingDomain, data: UserData | None) -> None:
        mock_viommu.init(viommu, parent, data)

    def page_response(self, device: Device, request: PageRequest, code: ResponseCode) -> None:
        """The mock hardware does not care."""
