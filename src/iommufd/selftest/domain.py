"""The mock hardware's kernel-managed page tables and its blocking domain (kernel: struct mock_iommu_domain)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iommufd.iommu.domain import BaseDomain, Kind
from iommufd.iommu.extent_domain import ExtentDomain
from iommufd.selftest.attach import MockAttach
from iommufd.uapi.iommufd_test import (
    MOCK_APERTURE_LAST,
    MOCK_APERTURE_START,
    MOCK_IOMMUPT_DEFAULT,
    MOCK_IOMMUPT_HUGE,
)

if TYPE_CHECKING:
    from iommufd.iommu.driver import Driver

OUTPUT_BITS = 51

FORMATS: dict[int, tuple[int, int, int]] = {
    MOCK_IOMMUPT_DEFAULT: (0x1FFFFFF800, MOCK_APERTURE_START, MOCK_APERTURE_LAST),
    MOCK_IOMMUPT_HUGE: (0x101000, 0, 0x3FFFFFFFFF),
}
"""Page sizes and aperture of each ``pagetable_type`` (mock-device 2.6)."""


class MockDomain(MockAttach, ExtentDomain):
    """A page table of format ``pagetable_type``, with dirty tracking or without."""

    __slots__ = ()

    def __init__(self, pagetable_type: int, *, dirty: bool, owner: Driver) -> None:
        sizes, start, last = FORMATS[pagetable_type]
        super().__init__(sizes, start, last, output_bits=OUTPUT_BITS, dirty=dirty, owner=owner)

    @property
    def smallest_page(self) -> int:
        return self.pgsize_bitmap & -self.pgsize_bitmap


class MockBlockedDomain(MockAttach, BaseDomain):
    """The one static blocking domain, which is also every group's default domain."""

    __slots__ = ()

    def __init__(self, owner: Driver) -> None:
        super().__init__(Kind.BLOCKED, owner)
