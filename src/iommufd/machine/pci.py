"""The PCI side of a machine: functions, their IOMMU groups, the vfio-pci driver that offers them, their place in /dev
and /sys.

Invariants:

* A function is added once, by its address, and bound to vfio-pci at once. The files of /sys unbind and bind it as
  they do in a kernel: a function without the driver keeps its address, its model and its IOMMU group, and has no VFIO
  device.
* IOMMU groups are made by naming them: functions added with the same ``group`` share one; without a name each has its
  own. The numbers are given as groups come, from 0. A VFIO group exists while a member is a VFIO device.
* Functions on one bus other than the root bus are reset together by a hot reset.
"""

from __future__ import annotations

import re
from itertools import count
from typing import TYPE_CHECKING

from iommufd.iommu.device import Device
from iommufd.iommu.drivers.pci_basic import PciBasicDriver
from iommufd.iommu.group import Group
from iommufd.machine import pci_nodes
from iommufd.vfio.device import VfioDevice
from iommufd.vfio.group import VfioGroup
from iommufd.vfio.pci_config import BarKind, PciLayout
from iommufd.vfio.pci_function import PciFunction

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from iommufd.iommu.driver import ReservedRegion
    from iommufd.machine.machine import Machine
    from iommufd.machine.node import Node

ADDRESS = re.compile(r"[0-9a-f]{4}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]")
MEMORY_WINDOW, WIDE_WINDOW, IO_WINDOW = 0xC0000000, 0x380000000000, 0xC000
VFIO_PCI = "vfio-pci"


class Slot:
    """One function. ``vfio`` is its VFIO device while it is bound to vfio-pci; ``override`` its driver_override."""

    __slots__ = ("address", "core", "function", "group_number", "leaving", "override", "paths", "vfio")

    def __init__(self, address: str, core: Device, function: PciFunction, group_number: int) -> None:
        self.address = address
        self.core = core
        self.function = function
        self.group_number = group_number
        self.override: str | None = VFIO_PCI
        self.vfio: VfioDevice | None = None
        self.leaving: VfioDevice | None = None  # unbound, and still open
        self.paths: list[str] = []  # what the machine shows while it is bound

    @property
    def free(self) -> bool:
        """Whether a driver may take it."""
        return self.vfio is None and self.leaving is None

    @property
    def bus(self) -> str:
        return self.address.rsplit(":", 1)[0]


class PciBus:
    """The functions of one machine, by address. ``driver`` is the IOMMU's driver for functions that name no other."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.slots: dict[str, Slot] = {}
        self._driver: PciBasicDriver | None = None
        self._groups: dict[str, int] = {}  # by the name they were given
        self._numbers = count()
        self._vfio_groups: dict[int, tuple[VfioGroup, list[str]]] = {}  # by number: the group and its paths
        self._bridges: set[str] = set()
        self._iommus: set[str] = set()
        self.unsafe_noiommu = False
        self._next = {"memory": MEMORY_WINDOW, "wide": WIDE_WINDOW, "io": IO_WINDOW}
        self._show(pci_nodes.bus_nodes(self))

    @property
    def driver(self) -> PciBasicDriver:
        if self._driver is None:
            from iommufd.machine.builder import iommu_named  # builds on us

            self._driver = iommu_named(self.machine, None)
        return self._driver

    @driver.setter
    def driver(self, driver: PciBasicDriver) -> None:
        self._driver = self.machine.iommus[driver.iommu.name] = driver

    def __getitem__(self, address: str) -> VfioDevice:
        """The VFIO device at ``address``; KeyError when there is none."""
        device = self.slots[address].vfio
        if device is None:
            raise KeyError(address)
        return device

    def __contains__(self, address: object) -> bool:
        return address in self.slots

    # --- functions

    def add(
        self,
        address: str,
        layout: PciLayout | None = None,
        *,
        model: Callable[[PciLayout, str, dict[int, int]], PciFunction] = PciFunction,
        driver: PciBasicDriver | None = None,
        group: str | None = None,
        noiommu: bool = False,
        pasids: int = 0,
        isolated_msi: bool = True,
        reserved: tuple[ReservedRegion, ...] = (),
    ) -> VfioDevice:
        """A function at ``address`` (``DDDD:BB:DD.F``), bound to vfio-pci.

        ``model`` makes the function behind it (default: memory BARs work, registers read as all ones). ``pasids``: how
        many PASIDs the function can tell apart. ``noiommu``: there is no IOMMU in front of it. ``isolated_msi`` False:
        binding it is EPERM unless unsafe interrupts are allowed. ``reserved``: what the firmware's tables reserve for
        it. ValueError for an address that is malformed or taken."""
        if not isinstance(address, str) or not ADDRESS.fullmatch(address):
            raise ValueError(f"{address!r} is not a PCI address of the form 0000:00:1f.7")
        if address in self.slots or address in self._bridges:
            raise ValueError(f"there is a PCI function at {address} already")
        if noiommu and group in self._groups:
            raise ValueError(f"group {group!r} cannot hold {address}: a function without an IOMMU is alone")
        layout = layout if layout is not None else PciLayout()
        if not noiommu and reserved:
            (driver if driver is not None else self.driver).firmware_regions[address] = reserved
        core = self._core_device(address, driver, noiommu, pasids, isolated_msi)
        slot = Slot(address, core, model(layout, address, self._place(layout)), self._join_group(group, core))
        self.slots[address] = slot
        bridge = pci_nodes.bridge_of(address)
        if bridge is not None and bridge not in self._bridges:
            self._bridges.add(bridge)
            self._show(pci_nodes.bridge_nodes(bridge))
        if core.iommu is not None and core.iommu.name not in self._iommus:
            self._iommus.add(core.iommu.name)
            self._show(pci_nodes.iommu_nodes(core.iommu.name))
        self._show(pci_nodes.function_nodes(self, slot))
        return self.bind_driver(address)

    def remove(self, address: str) -> None:
        """The function leaves the machine. KeyError when there is none."""
        slot = self.slots[address]
        self.unbind_driver(address)
        del self.slots[address]
        if slot.core.group is not None:
            slot.core.group.remove(slot.core)
        kept = {node.path for other in self.slots.values() for node in pci_nodes.function_nodes(self, other)}
        self._hide([node.path for node in pci_nodes.function_nodes(self, slot) if node.path not in kept])
        self.machine.remove_node(pci_nodes.device_path(address))

    def _core_device(
        self, address: str, driver: PciBasicDriver | None, noiommu: bool, pasids: int, isolated_msi: bool
    ) -> Device:
        if noiommu:
            self.unsafe_noiommu = True
            return Device(address, pci=True)
        chosen = driver if driver is not None else self.driver
        return Device(
            address, driver=chosen, iommu=chosen.iommu, pasid_limit=pasids, pci=True, isolated_msi=isolated_msi
        )

    def _join_group(self, name: str | None, core: Device) -> int:
        """Puts the function into its IOMMU group; the group's number."""
        if name is not None and name in self._groups:
            number = self._groups[name]
            other = next(slot.core for slot in self.slots.values() if slot.group_number == number)
            if other.group is None:
                raise ValueError(f"group {name!r} cannot hold {core.name}: a function without an IOMMU is alone")
            other.group.add(core)
            return number
        number = next(self._numbers)
        if name is not None:
            self._groups[name] = number
        if isinstance(core.driver, PciBasicDriver):
            Group(str(number), core.driver.identity_domain).add(core)
        return number

    def _place(self, layout: PciLayout) -> dict[int, int]:
        """Bus addresses for the BARs, each a multiple of its size."""
        addresses = {}
        for index, bar in enumerate(layout.bars):
            if bar is not None:
                window = "io" if bar.kind is BarKind.IO else "wide" if bar.wide else "memory"
                addresses[index] = self._take(window, bar.size)
        if layout.rom_size:
            addresses[6] = self._take("memory", layout.rom_size)
        return addresses

    def _take(self, window: str, size: int) -> int:
        start = -(-self._next[window] // size) * size
        self._next[window] = start + size
        return start

    # --- vfio-pci

    def bind_driver(self, address: str) -> VfioDevice:
        """vfio-pci takes the function: a VFIO device, with the lowest free number. KeyError; ValueError when it is."""
        slot = self.slots[address]
        if not slot.free:
            raise ValueError(f"{address} is bound to {VFIO_PCI} already, or still open")
        taken = {other.vfio.index for other in self.slots.values() if other.vfio is not None}
        index = next(n for n in count() if n not in taken)
        fresh = slot.group_number not in self._vfio_groups
        if fresh:
            group = VfioGroup(self.machine.world, slot.group_number, slot.core.group)
        else:
            group = self._vfio_groups[slot.group_number][0]
        device = slot.vfio = VfioDevice(self.machine.world, slot.core, slot.function, index, group)
        if pci_nodes.bridge_of(address) is not None:
            mates = [s.vfio for s in self.slots.values() if s.vfio is not None and s is not slot and s.bus == slot.bus]
            device.bus = mates[0].bus if mates else []
            device.bus.append(device)
        if fresh:
            minors = {shown.minor for shown, _ in self._vfio_groups.values()}
            group.minor = next(n for n in count() if n not in minors)
            self._vfio_groups[slot.group_number] = group, self._show(pci_nodes.group_nodes(group))
        slot.paths = self._show(pci_nodes.vfio_nodes(slot.address, device))
        return device

    def unbind_driver(self, address: str) -> VfioDevice | None:
        """vfio-pci gives the function up; its VFIO device cannot be opened any more. None when it had none."""
        slot = self.slots[address]
        device = slot.vfio
        if device is None:
            return None
        slot.vfio, slot.leaving = None, device
        device.remove()
        device.when_idle(lambda: setattr(slot, "leaving", None))
        if device in device.bus:
            device.bus.remove(device)
        self._hide(slot.paths)
        self._show(node for node in pci_nodes.function_nodes(self, slot) if node.path in slot.paths)  # as it was before
        if not device.group.devices:
            _, paths = self._vfio_groups.pop(slot.group_number)
            self._hide(paths)
        return device

    # --- showing

    def _show(self, nodes: Iterable[Node]) -> list[str]:
        paths = []
        for node in nodes:
            self.machine.add_node(node)
            paths.append(node.path)
        return paths

    def _hide(self, paths: list[str]) -> None:
        for path in reversed(paths):
            self.machine.remove_node(path)
