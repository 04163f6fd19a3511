"""The files of /sys that act: config, reset, driver_override, and the bind and unbind of vfio-pci.

Writing them does what an administrator expects of them (kernel: Documentation/ABI/testing/sysfs-bus-pci). Taking the
driver from a function that is open waits, as in a kernel, until nobody has it open any more, and asks its owner for
it meanwhile.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from iommufd.engine.file import Pending
from iommufd.errors import KernelError
from iommufd.machine.fault_files import parse_bool
from iommufd.machine.text_file import TextFile
from iommufd.vfio.interrupts import REQ

if TYPE_CHECKING:
    from iommufd.engine.task import Task
    from iommufd.machine.pci import PciBus, Slot

VFIO_PCI = "vfio-pci"


def word(data: bytes) -> str:
    """What was written, without a newline."""
    return data.decode("utf-8", "replace").removesuffix("\n")


class Config(TextFile):
    """``config``: the configuration space as it is now. Writing it is the owner's business, through VFIO."""

    def __init__(self, slot: Slot, path: str) -> None:
        super().__init__(path)
        self.slot = slot

    def show(self) -> bytes:
        config = self.slot.function.config
        return config.read(0, config.size)


class Reset(TextFile):
    """``reset``: writing 1 resets the function."""

    def __init__(self, slot: Slot, path: str) -> None:
        super().__init__(path)
        self.slot = slot

    def store(self, data: bytes) -> None:
        if word(data) != "1":
            raise KernelError(errno.EINVAL, f"{word(data)!r} is written to {self.link}; only 1 resets")
        self.slot.function.reset()


class DriverOverride(TextFile):
    """``driver_override``: the only driver that may take the function; empty for any."""

    def __init__(self, slot: Slot, path: str) -> None:
        super().__init__(path)
        self.slot = slot

    def show(self) -> bytes:
        return f"{self.slot.override or '(null)'}\n".encode()

    def store(self, data: bytes) -> None:
        self.slot.override = word(data) or None


class UnsafeMode(TextFile):
    """VFIO's parameter ``enable_unsafe_noiommu_mode``. It may be switched either way: a machine that has functions
    without an IOMMU was made to offer them."""

    def __init__(self, bus: PciBus, path: str) -> None:
        super().__init__(path)
        self.bus = bus

    def show(self) -> bytes:
        return b"Y\n" if self.bus.unsafe_noiommu else b"N\n"

    def store(self, data: bytes) -> None:
        value = parse_bool(data)
        if value is None:
            raise KernelError(errno.EINVAL, f"{word(data)!r} is neither Y nor N")
        self.bus.unsafe_noiommu = value


class _OfBus(TextFile):
    def __init__(self, bus: PciBus, path: str) -> None:
        super().__init__(path)
        self.bus = bus


class DriversProbe(_OfBus):
    """``/sys/bus/pci/drivers_probe``: looks for a driver for the function named; finding none is no error."""

    def store(self, data: bytes) -> None:
        slot = self.bus.slots.get(word(data))
        if slot is None:
            raise KernelError(errno.EINVAL, f"there is no PCI function {word(data)!r}")
        if slot.free and slot.override == VFIO_PCI:
            self.bus.bind_driver(slot.address)


class Bind(_OfBus):
    """``/sys/bus/pci/drivers/vfio-pci/bind``."""

    def store(self, data: bytes) -> None:
        slot = self.bus.slots.get(word(data))
        if slot is None or not slot.free or slot.override != VFIO_PCI:
            raise KernelError(
                errno.ENODEV, f"vfio-pci cannot take {word(data)!r}: it is not there, or not free, or not its"
            )
        self.bus.bind_driver(slot.address)


class Unbind(_OfBus):
    """``/sys/bus/pci/drivers/vfio-pci/unbind``."""

    def write(self, task: Task, addr: int, count: int, pos: int | None = None) -> int | Pending:
        name = word(task.read(addr, min(count, 64)))
        slot = self.bus.slots.get(name)
        device = self.bus.unbind_driver(name) if slot is not None else None
        if device is None:
            raise KernelError(errno.ENODEV, f"{name!r} is not bound to vfio-pci")
        answer = Pending()
        device.function.interrupts.notice(REQ)
        device.when_idle(lambda: answer.finish(count))  # meanwhile the function is not free for another driver
        return answer
