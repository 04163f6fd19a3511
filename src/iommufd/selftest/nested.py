"""The mock hardware's user-managed page tables (kernel: struct mock_iommu_domain_nested in iommufd/selftest.c).

There is no table: a nested domain is four words, the "IOTLB", that start as the program says and that an invalidation
zeroes. Whether it was made on a nesting parent or from a vIOMMU decides what an attach of a RID does (mock-device 2.4).
Sources: events-viommu 11.2 and 12, mock-device 2.3, 2.4, 4.8.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from iommufd.errors import KernelError
from iommufd.iommu.domain import BaseDomain, Kind
from iommufd.selftest.attach import MockAttach
from iommufd.uapi.iommufd_test import (
    IOMMU_HWPT_DATA_SELFTEST,
    IOMMU_HWPT_INVALIDATE_DATA_SELFTEST,
    IOMMU_TEST_INVALIDATE_FLAG_ALL,
    MOCK_NESTED_DOMAIN_IOTLB_ID_MAX,
    MOCK_NESTED_DOMAIN_IOTLB_NUM,
    iommu_hwpt_invalidate_selftest,
    iommu_hwpt_selftest,
    test_md_check_iotlb,
)

if TYPE_CHECKING:
    from iommufd.engine.dispatch import Call
    from iommufd.iommu.user_data import UserArray, UserData
    from iommufd.iommu.viommu import DriverViommu

DATA_MINIMUM = 4  # iommu_hwpt_selftest through ``iotlb``
ENTRY_MINIMUM = iommu_hwpt_invalidate_selftest.SIZE


class MockNestedDomain(MockAttach, BaseDomain):
    """Four IOTLB words. ``viommu`` is the vIOMMU it was made from, or None."""

    __slots__ = ("iotlb", "viommu")

    def __init__(self, iotlb: int, viommu: DriverViommu | None = None) -> None:
        super().__init__(Kind.NESTED)
        self.iotlb = [iotlb] * MOCK_NESTED_DOMAIN_IOTLB_NUM
        self.viommu = viommu

    def cache_invalidate_user(self, array: UserArray) -> None:
        """events-viommu 11.2; entries one by one, earlier ones stay applied."""
        wanted, entries = IOMMU_HWPT_INVALIDATE_DATA_SELFTEST, array.entry_num
        done = 0
        try:
            if array.type != wanted:  # row 1
                raise KernelError(errno.EINVAL, f"invalidation data of type {array.type:#x}, not {wanted:#x}")
            for index in range(entries):
                entry = array.entry(index, wanted, iommu_hwpt_invalidate_selftest, ENTRY_MINIMUM)  # rows 2, 3
                self._invalidate(entry)
                done += 1
        finally:
            array.entry_num = done

    def _invalidate(self, entry: iommu_hwpt_invalidate_selftest) -> None:
        if entry.flags & ~IOMMU_TEST_INVALIDATE_FLAG_ALL:  # row 4
            raise KernelError(errno.EOPNOTSUPP, f"unknown flags {entry.flags:#x}")
        if entry.iotlb_id > MOCK_NESTED_DOMAIN_IOTLB_ID_MAX:  # row 5, with ALL too
            raise KernelError(errno.EINVAL, f"there is no IOTLB word {entry.iotlb_id}")
        if entry.flags & IOMMU_TEST_INVALIDATE_FLAG_ALL:  # row 6
            self.iotlb[:] = [0] * MOCK_NESTED_DOMAIN_IOTLB_NUM
        else:
            self.iotlb[entry.iotlb_id] = 0


def alloc_nested(data: UserData, viommu: DriverViommu | None = None) -> MockNestedDomain:
    """A nested domain from what the program gave (mock-device 2.3 nested rows 3-5, events-viommu 12 rows 8-10)."""
    wanted = IOMMU_HWPT_DATA_SELFTEST
    if data.type != wanted:
        raise KernelError(errno.EOPNOTSUPP, f"page table data of type {data.type:#x}, not {wanted:#x}")
    given = data.copy(wanted, iommu_hwpt_selftest, DATA_MINIMUM)
    return MockNestedDomain(given.iotlb, viommu)


def check_iotlb(call: Call, cmd: test_md_check_iotlb) -> None:
    """Op MD_CHECK_IOTLB (mock-device 4.8)."""
    from iommufd.engine.hwpt import HwptNested

    hwpt = call.get(cmd.id, HwptNested)
    domain = hwpt.domain
    if not isinstance(domain, MockNestedDomain):
        raise KernelError(errno.EINVAL, f"HWPT {cmd.id} is not the mock hardware's")
    if cmd.arm_id > MOCK_NESTED_DOMAIN_IOTLB_ID_MAX:
        raise KernelError(errno.EINVAL, f"there is no IOTLB word {cmd.arm_id}")
    found = domain.iotlb[cmd.arm_id]
    if found != cmd.iotlb:
        raise KernelError(errno.EINVAL, f"IOTLB word {cmd.arm_id} is {found:#x}, not {cmd.iotlb:#x}")
