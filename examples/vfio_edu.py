"""Drive a PCI device from Python through VFIO and iommufd: it reads our memory by DMA, writes it back, and interrupts.

The device is QEMU's `edu`, bound to vfio-pci. Its DMA reaches 28 bits, so the buffer is mapped below 256 MiB.

    python examples/vfio_edu.py [0000:00:04.0]
"""

import glob
import mmap
import sys
from pathlib import Path

import iommufd
from iommufd.uapi.vfio import VFIO_PCI_MSI_IRQ_INDEX

EDU = ("0x1234", "0x11e8")
IOVA, PAGE = 0x10_0000, 4096
SIZE = 2048  # of a transfer: the device has a page of memory, of which it dislikes the last byte
SOURCE, DESTINATION, COUNT, COMMAND = 0x80, 0x88, 0x90, 0x98  # registers of the device's DMA engine
INTERRUPT_STATUS, INTERRUPT_ACKNOWLEDGE = 0x24, 0x64
BUFFER = 0x40000  # the device's own memory
START, TO_MEMORY, INTERRUPT = 1, 2, 4


def find() -> str:
    """The address of the first edu device of this system."""
    for path in sorted(glob.glob("/sys/bus/pci/devices/*")):
        if tuple(Path(path, name).read_text().strip() for name in ("vendor", "device")) == EDU:
            return Path(path).name
    sys.exit("there is no edu device here")


def transfer(registers: iommufd.Region, source: int, destination: int, command: int, done: iommufd.EventFd) -> None:
    """One DMA; returns when the device has interrupted."""
    registers.write_int(SOURCE, source, 8)
    registers.write_int(DESTINATION, destination, 8)
    registers.write_int(COUNT, SIZE, 8)
    registers.write_int(COMMAND, command | START | INTERRUPT, 8)
    assert done.wait(timeout=10), "the device did not interrupt"
    registers.write_int(INTERRUPT_ACKNOWLEDGE, registers.read_int(INTERRUPT_STATUS))


with iommufd.open() as context:
    device = context.open_device(sys.argv[1] if len(sys.argv) > 1 else find())
    print(device, device.info(), *device.regions, sep="\n  ")

    ioas = context.alloc_ioas()
    table = device.attach(ioas)
    print(f"{table}; {ioas.iova_ranges()}\n  {device.hw_info().data!r}")
    memory = mmap.mmap(-1, 2 * PAGE)
    memory[:SIZE] = bytes(i * 7 & 0xFF for i in range(SIZE))
    mapping = ioas.map(memory, IOVA)

    registers = device.bar(0)
    assert registers.read_int(0) & 0xFF == 0xED, "this is no edu device"
    device.set_bus_master(True)
    (done,) = device.irq(VFIO_PCI_MSI_IRQ_INDEX).enable(1)

    transfer(registers, mapping.iova, BUFFER, 0, done)  # from our first page into the device
    transfer(registers, BUFFER, mapping.iova + PAGE, TO_MEMORY, done)  # and out again, into the second
    assert memory[:SIZE] == memory[PAGE : PAGE + SIZE], "the device wrote something else"
    print(f"the device read {SIZE} bytes at {mapping.iova:#x} and wrote them to {mapping.iova + PAGE:#x}")

    mapping.unmap()
    transfer(registers, BUFFER, IOVA + PAGE, TO_MEMORY, done)  # the IOMMU stops it
    print("after unmapping the same DMA reaches nothing")
