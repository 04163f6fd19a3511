"""iommu/drivers/pci_basic.py against the driver contract (devices.md 10)."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from iommufd.errors import KernelError
from iommufd.iommu.device import Device
from iommufd.iommu.domain import Kind
from iommufd.iommu.driver import Capability, Iommu, RegionType
from iommufd.iommu.drivers.pci_basic import PciBasicDriver
from iommufd.iommu.group import Group
from iommufd.iommu.user_data import UserData
from iommufd.uapi import iommufd as u
from tests.engine.flat_task import FlatTask, as_task


def _device(driver: PciBasicDriver, pasids: int = 64) -> Device:
    device = Device("dev", driver=driver, iommu=driver.iommu, pasid_limit=pasids, pci=True)
    Group("0", driver.identity_domain).add(device)
    return device


@pytest.mark.parametrize("dirty", [True, False])
@pytest.mark.parametrize("coherent", [True, False])
def test_capabilities(dirty: bool, coherent: bool) -> None:
    driver = PciBasicDriver(dirty=dirty, enforces_coherency=coherent)
    device = _device(driver)
    assert [driver.capable(device, capability) for capability in Capability] == [True, coherent, dirty, False]
    assert driver.domain_alloc_paging_flags(device, 0, None).enforce_cache_coherency() is coherent


@pytest.mark.parametrize(
    ("make", "flags", "made"),
    [
        (PciBasicDriver, 0, True),
        (PciBasicDriver, u.IOMMU_HWPT_ALLOC_PASID, True),
        (lambda: PciBasicDriver(max_pasids=0), u.IOMMU_HWPT_ALLOC_PASID, False),
        (PciBasicDriver, u.IOMMU_HWPT_ALLOC_DIRTY_TRACKING, False),
        (lambda: PciBasicDriver(dirty=True), u.IOMMU_HWPT_ALLOC_DIRTY_TRACKING | u.IOMMU_HWPT_ALLOC_PASID, True),
        (lambda: PciBasicDriver(dirty=True), u.IOMMU_HWPT_ALLOC_NEST_PARENT, False),
    ],
)
def test_page_tables(make: Callable[[], PciBasicDriver], flags: int, made: bool) -> None:
    driver = make()
    if made:
        domain = driver.domain_alloc_paging_flags(_device(driver), flags, None)
        assert domain.owner is driver
        assert (domain.pgsize_bitmap, domain.aperture_start, domain.aperture_end) == (0x40201000, 0, 2**48 - 1)
        assert (domain.dirty_ops is domain) == bool(flags & u.IOMMU_HWPT_ALLOC_DIRTY_TRACKING)
    else:
        with pytest.raises(KernelError) as caught:
            driver.domain_alloc_paging_flags(_device(driver), flags, None)
        assert caught.value.errno == errno.EOPNOTSUPP


def test_data_is_not_taken() -> None:
    driver = PciBasicDriver()
    with pytest.raises(KernelError) as caught:
        driver.domain_alloc_paging_flags(_device(driver), 0, UserData(as_task(FlatTask()), 5, 0, 8))
    assert caught.value.errno == errno.EOPNOTSUPP


def test_reserved_regions() -> None:
    driver = PciBasicDriver()
    (window,) = driver.get_resv_regions(_device(driver))
    assert (window.start, window.length, window.type) == (0xFEE00000, 0x100000, RegionType.MSI)


def test_what_the_hardware_uses() -> None:
    driver = PciBasicDriver()
    device = _device(driver)
    table = driver.domain_alloc_paging_flags(device, 0, None)
    assert driver.domain_of(device).kind is Kind.IDENTITY
    assert driver.domain_of(device, 5).kind is Kind.BLOCKED
    table.attach_dev(device, driver.blocked_domain)
    table.set_dev_pasid(device, 5, None)
    assert driver.domain_of(device) is driver.domain_of(device, 5) is table
    driver.blocked_domain.set_dev_pasid(device, 5, table)
    driver.blocked_domain.attach_dev(device, table)
    assert driver.domain_of(device) is driver.domain_of(device, 5) is driver.blocked_domain


def test_a_device_of_another_iommu_is_refused() -> None:
    driver = PciBasicDriver()
    stranger = Device("other", driver=None, iommu=Iommu("other"))
    with pytest.raises(KernelError) as caught:
        driver.domain_alloc_paging_flags(_device(driver), 0, None).attach_dev(stranger, driver.blocked_domain)
    assert caught.value.errno == errno.EINVAL
