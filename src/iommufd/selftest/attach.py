"""What every mock domain does when a device moves to it (kernel: mock_domain_nop_attach,
mock_domain_set_dev_pasid_nop).

mock-device 2.4, 2.5. The kernel's mock driver does not look whose device it is given and corrupts memory for another
driver's; here that is EINVAL (docs/deviations.md).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from iommufd.errors import KernelError
from iommufd.iommu.domain import Kind
from iommufd.selftest.device import MockDevice
from iommufd.uapi.iommufd_test import IOMMU_TEST_PASID_RESERVED, MOCK_FLAGS_DEVICE_NO_DIRTY

if TYPE_CHECKING:
    from iommufd.iommu.device import Device
    from iommufd.iommu.domain import Domain


class MockAttach:
    """Gives a domain ``attach_dev`` and ``set_dev_pasid``."""

    __slots__ = ()

    def attach_dev(self: Domain, device: Device, old: Domain) -> None:
        """RID attach, the driver's part (mock-device 2.4)."""
        from iommufd.selftest.viommu import follow_rid  # vIOMMUs make nested domains, which are attached through here

        mock = _mock(device)
        if getattr(self, "dirty_ops", None) is not None and mock.dev_flags & MOCK_FLAGS_DEVICE_NO_DIRTY:  # row 1
            raise KernelError(errno.EINVAL, f"{mock.name} cannot track dirty pages, the page table does")
        follow_rid(mock, self)  # rows 2, 3
        assert mock.iommu is not None
        mock.fault_source.domain_changes(mock.iommu.iopf_queue, self, old)  # row 4: row 3 is not undone

    def set_dev_pasid(self: Domain, device: Device, pasid: int, old: Domain | None) -> None:
        """PASID attach, replace and (on the blocked domain) detach; every second one fails on PASID 1024 (2.5)."""
        mock = _mock(device)
        if pasid == IOMMU_TEST_PASID_RESERVED:
            if self.kind is not Kind.BLOCKED and mock.pasid_1024_fails:
                mock.pasid_1024_fails = False
                raise KernelError(errno.ENOMEM, f"{mock.name} fails every second change of PASID {pasid}")
            mock.pasid_1024_fails = self.kind is not Kind.BLOCKED
        assert mock.iommu is not None
        mock.fault_source.domain_changes(mock.iommu.iopf_queue, self, old)


def _mock(device: Device) -> MockDevice:
    if not isinstance(device, MockDevice):
        raise KernelError(errno.EINVAL, f"{device.name} is not a mock device")
    return device
