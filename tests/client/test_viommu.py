"""vIOMMUs, vDEVICEs, HW queues and mapped device memory."""

from __future__ import annotations

import errno
import gc
import mmap

import pytest

import iommufd
from iommufd.testing.mock import APERTURE, MockDevice, alloc_viommu, invalidate_cache, nested_data
from iommufd.uapi import iommufd_test as t


@pytest.fixture
def device(context: iommufd.Context, ioas: iommufd.IOAS) -> MockDevice:
    return MockDevice(context, ioas)


@pytest.fixture
def viommu(ioas: iommufd.IOAS, device: MockDevice) -> iommufd.VIOMMU:
    return alloc_viommu(ioas.alloc_hwpt(device, nest_parent=True), device, 0xABCD)


def test_the_vendors_data_comes_back(viommu: iommufd.VIOMMU, device: MockDevice) -> None:
    assert isinstance(viommu.data, t.iommu_viommu_selftest)
    assert viommu.data.out_data == 0xABCD
    assert viommu.parent is not None
    plain = viommu.parent.alloc_viommu(device, t.IOMMU_VIOMMU_TYPE_SELFTEST)
    assert plain.data is None
    with pytest.raises(ValueError, match="tells of no region"):
        plain.mmap()
    with pytest.raises(iommufd.IommufdError) as at:
        viommu.parent.alloc_viommu(device, 1)
    assert at.value.errno == errno.EOPNOTSUPP


def test_device_memory(viommu: iommufd.VIOMMU, context: iommufd.Context) -> None:
    view = viommu.mmap()
    assert len(view) == 8192 and view[:4] == (0xABCD).to_bytes(4, "little")
    view[4:8] = b"ours"
    assert bytes(viommu.mmap()[4:8]) == b"ours"
    gc.collect()
    with pytest.raises(iommufd.IommufdError) as at:
        viommu.destroy()
    assert at.value.errno == errno.EBUSY
    with pytest.raises(iommufd.IommufdError) as at:
        viommu.mmap(length=4096)
    assert at.value.errno == errno.ENXIO
    with pytest.raises(iommufd.IommufdError, match="0x100000"):
        context.mmap(4096, 0x100000)
    view.release()
    del view
    gc.collect()
    viommu.destroy()


def test_a_device_in_a_guest(viommu: iommufd.VIOMMU, device: MockDevice, ioas: iommufd.IOAS) -> None:
    nested = viommu.alloc_nested(device, nested_data())
    with pytest.raises(FileNotFoundError):
        device.replace(nested)  # not in the guest yet
    vdevice = viommu.alloc_vdevice(device, 0x1_0000_0001)
    assert (vdevice.viommu, vdevice.device, vdevice.virt_id) == (viommu, device, 0x1_0000_0001)
    assert repr(vdevice).endswith(f"0x100000001 is device {device.number}>")
    device.replace(nested)
    with pytest.raises(FileExistsError):
        viommu.alloc_vdevice(device, 2)
    vdevice.destroy()
    viommu.alloc_vdevice(device, 3)
    device.close()
    assert not viommu.closed
    viommu.alloc_vdevice(MockDevice(viommu.context, ioas), 3)


def test_invalidation_of_a_guests_device(viommu: iommufd.VIOMMU, device: MockDevice) -> None:
    viommu.alloc_vdevice(device, 7)
    default = t.IOMMU_TEST_DEV_CACHE_DEFAULT
    assert device.cache_is(0, default)
    assert viommu.invalidate([invalidate_cache(7, 0), invalidate_cache(7, 2)]) == 2
    assert [device.cache_is(i, default) for i in range(4)] == [False, True, False, True]
    with pytest.raises(iommufd.InvalidationError) as at:
        viommu.invalidate([invalidate_cache(7, 1), invalidate_cache(8, 3)])
    assert at.value.handled == 1
    assert viommu.invalidate([invalidate_cache(7, 0, everything=True)]) == 1
    assert device.cache_is(3, 0)


def test_hw_queues(viommu: iommufd.VIOMMU, ioas: iommufd.IOAS, memory: mmap.mmap) -> None:
    kind = t.IOMMU_HW_QUEUE_TYPE_SELFTEST
    ioas.map(memory, APERTURE)
    with pytest.raises(iommufd.IommufdError) as at:
        viommu.alloc_hw_queue(kind, 1, APERTURE, 4096)
    assert at.value.errno == errno.EIO  # ascending
    first = viommu.alloc_hw_queue(kind, 0, APERTURE, 4096)
    second = viommu.alloc_hw_queue(kind, 1, APERTURE + 4096, 4096)
    assert first.mmap()[:4] == (0xABCD).to_bytes(4, "little")
    gc.collect()
    with pytest.raises(iommufd.IommufdError) as at:
        first.destroy()
    assert at.value.errno == errno.EBUSY
    with pytest.raises(iommufd.IommufdError) as at:
        ioas.unmap(APERTURE, len(memory))
    assert at.value.errno == errno.EBUSY
    assert len(ioas.mappings) == 1
    second.close()
    first.close()
    ioas.unmap_all()
    memory.close()


def test_closing_goes_from_the_leaves(viommu: iommufd.VIOMMU, device: MockDevice, ioas: iommufd.IOAS) -> None:
    viommu.alloc_vdevice(device, 7)
    device.replace(viommu.alloc_nested(device, nested_data()))
    ioas.close()
    assert ioas.context.objects == [device]
