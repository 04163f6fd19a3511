"""A machine as the one the answers were taken from: a PCI function of its own, and two behind a bridge in one group."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from iommufd.machine.machine import Machine
from iommufd.vfio.pci_config import Bar, BarKind, PciLayout
from iommufd.vfio.pci_function import PciFunction
from tests.vfio.program import Program

EDU = PciLayout(
    vendor=0x1234,
    device=0x11E8,
    class_code=0x00FF00,
    revision=0x10,
    bars=(Bar(1 << 20),),
    express=False,
    power_management=False,
)
"""QEMU's edu: one BAR of registers, INTx, MSI, no capabilities else."""

NIC = PciLayout(
    vendor=0x8086,
    device=0x10D3,
    class_code=0x020000,
    bars=(Bar(1 << 17, BarKind.MEMORY), Bar(1 << 17), Bar(32, BarKind.IO), Bar(1 << 14, BarKind.MEMORY)),
    rom=b"\x55\xaa" + bytes(0x3FFFE),
    msix=5,
    msix_bar=3,
)
"""Like QEMU's e1000e, with memory behind two BARs and FLR."""


class Edu(PciFunction):
    """Register 0 identifies it; accesses of 8 bytes find nobody."""

    def read_register(self, bar: int, offset: int, width: int) -> int:
        if width == 8:
            return super().read_register(bar, offset, width)
        return 0x010000ED if (offset, width) == (0, 4) else 0


ALONE, FIRST, SECOND, NETWORK = "0000:00:03.0", "0000:01:01.0", "0000:01:02.0", "0000:02:00.0"


@pytest.fixture
def machine() -> Machine:
    made = Machine("test")
    made.pci.add(ALONE, EDU, model=Edu)
    made.pci.add(FIRST, EDU, model=Edu, group="behind the bridge")
    made.pci.add(SECOND, EDU, model=Edu, group="behind the bridge")
    made.pci.add(NETWORK, NIC, pasids=1 << 16)
    return made


@pytest.fixture
def p(machine: Machine) -> Iterator[Program]:
    program = Program(machine)
    yield program
    program.close_all()
