"""Put a guest's page table on top of ours, attach a device to it, and drop what the hardware has cached of it.

Needs a test kernel (CONFIG_IOMMUFD_TEST), or: IOMMUFD_MACHINE=mock python examples/nesting.py
On hardware the data is the vendor's: iommufd.VTDStage1(pgtbl_addr=...), iommufd.SMMUv3Stage.translate(...).
"""

import mmap

import iommufd
from iommufd.testing.mock import APERTURE, MockDevice, invalidate_iotlb, iotlb_is, nested_data

CACHED = 0x1234

with iommufd.open() as context:
    ioas = context.alloc_ioas()
    ioas.map(mmap.mmap(-1, 1 << 20), APERTURE)  # the guest's memory
    device = MockDevice(context, ioas)

    parent = ioas.alloc_hwpt(device, nest_parent=True)
    nested = parent.alloc_nested(device, nested_data(iotlb=CACHED))
    device.replace(nested)
    print(f"{device}, {nested}")

    assert all(iotlb_is(nested, word, CACHED) for word in range(4))
    handled = nested.invalidate([invalidate_iotlb(0), invalidate_iotlb(2)])
    left = [word for word in range(4) if iotlb_is(nested, word, CACHED)]
    print(f"{handled} invalidations; the cache still has words {left}")

    try:
        nested.invalidate([invalidate_iotlb(1), invalidate_iotlb(99), invalidate_iotlb(3)])
    except iommufd.InvalidationError as error:
        print(f"{error.name} after {error.handled} of 3: word 1 is dropped {not iotlb_is(nested, 1, CACHED)}")
# leaving the context detaches the device and takes the tables down, leaves first
