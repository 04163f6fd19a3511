"""Attach a device to an address space, move it to another without a gap, detach it.

Needs a test kernel (CONFIG_IOMMUFD_TEST), or: IOMMUFD_MACHINE=mock python examples/devices.py
A real device is opened with context.open_device("0000:01:00.0") instead, and used in the same way.
"""

import mmap

import iommufd
from iommufd.testing.mock import APERTURE, MockAccess, MockDevice

MIB = 1 << 20

with iommufd.open() as context:
    first, second = context.alloc_ioas(), context.alloc_ioas()
    memory = mmap.mmap(-1, MIB)  # anonymous memory is page-aligned, as devices want it
    buffer = first.map(memory, APERTURE)

    device = MockDevice(context, first)  # attached from the start; the kernel made a page table for it
    print(f"{device}: {device.hw_info().capabilities!r}")
    print(f"it reaches {first.iova_ranges()}, in steps of {first.iova_alignment} bytes")

    with MockAccess(first) as dma:
        dma.write(buffer.iova + 0x40, b"written by a device")
    print(f"our memory now says {memory[0x40:0x53]!r}")

    second.map(memory, APERTURE)  # the same memory, in the other space
    table = second.alloc_hwpt(device, dirty_tracking=True)
    device.replace(table)  # at no moment is the device without a page table
    print(f"{device}: {first} is free of devices: {not first.devices}")

    try:
        table.destroy()
    except iommufd.IommufdError as error:
        print(f"a page table in use stays: {error.name}")

    device.detach()
    print(device)
