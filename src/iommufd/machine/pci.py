"""The PCI side of a machine: functions that are bound to vfio-pci, their groups, their place in /dev and /sys.

Invariants:

* A function is added once, by its address, and is from then on a VFIO device: cdev, group, sysfs entries. Removing it
  takes all of them away; who has it open keeps it.
* Groups are made by naming them: functions added with the same ``group`` share one; without a name each has its own.
  The numbers are those of the kernel: as groups come, from 0.
* Functions on one bus other than the root bus are reset together by a hot reset.
"""

from __future__ import annotations

import re
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
    from collections.abc import Callable

    from iommufd.machine.machine import Machine

ADDRESS = re.compile(r"[0-9a-f]{4}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]")
MEMORY_WINDOW, WIDE_WINDOW, IO_WINDOW = 0xC0000000, 0x380000000000, 0xC000


class PciBus:
    """The functions of one machine, by address. ``driver`` is the IOMMU's driver for functions that name no other."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.devices: dict[str, VfioDevice] = {}
        self._driver: PciBasicDriver | None = None
        self._groups: dict[str, VfioGroup] = {}
        self._numbers = 0
        self._indexes = 0
        self._bridges: set[str] = set()
        self._iommus: set[str] = set()
        self._next = {"memory": MEMORY_WINDOW, "wide": WIDE_WINDOW, "io": IO_WINDOW}
        self._bus_listed = False
        self._paths: dict[str, list[str]] = {}  # by address, what stands for the function alone

    @property
    def driver(self) -> PciBasicDriver:
        if self._driver is None:
            self._driver = PciBasicDriver()
        return self._driver

    @driver.setter
    def driver(self, driver: PciBasicDriver) -> None:
        self._driver = driver

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
    ) -> VfioDevice:
        """A function at ``address`` (``DDDD:BB:DD.F``), bound to vfio-pci.

        ``model`` makes the function behind it (default: memory BARs work, registers read as all ones). ``pasids``:
        how many PASIDs the function can tell apart. ``noiommu``: there is no IOMMU in front of it. ``isolated_msi``
        False: binding it is EPERM unless unsafe interrupts are allowed. ValueError for an address that is malformed
        or taken."""
        if not ADDRESS.fullmatch(address):
            raise ValueError(f"{address!r} is not a PCI address of the form 0000:00:1f.7")
        if address in self.devices or address in self._bridges:
            raise ValueError(f"there is a PCI function at {address} already")
        layout = layout if layout is not None else PciLayout()
        device = self._core_device(address, driver, noiommu, pasids, isolated_msi)
        vfio_group = self._group(group, device, noiommu)
        function = model(layout, address, self._place(layout))
        made = VfioDevice(self.machine.world, device, function, self._indexes, vfio_group)
        self._indexes += 1
        self.devices[address] = made
        self._join_bus(made)
        self._list(made)
        return made

    def remove(self, address: str) -> None:
        """The function leaves the machine. KeyError when there is none."""
        device = self.devices.pop(address)
        for path in self._paths.pop(address):
            self.machine.remove_node(path)
        device.remove()
        if device in device.bus:
            device.bus.remove(device)
        core = device.device.group
        if core is not None:
            core.remove(device.device)
        if not device.group.devices:
            self._remove_group(device.group)

    # --- making

    def _core_device(
        self, address: str, driver: PciBasicDriver | None, noiommu: bool, pasids: int, isolated_msi: bool
    ) -> Device:
        if noiommu:
            return Device(address, pci=True)
        chosen = driver if driver is not None else self.driver
        return Device(
            address, driver=chosen, iommu=chosen.iommu, pasid_limit=pasids, pci=True, isolated_msi=isolated_msi
        )

    def _group(self, name: str | None, device: Device, noiommu: bool) -> VfioGroup:
        found = self._groups.get(name) if name is not None else None
        if found is not None:
            if found.noiommu or noiommu:
                raise ValueError(f"group {name!r} cannot hold {device.name}: a function without an IOMMU is alone")
            assert found.group is not None
            found.group.add(device)
            return found
        number = self._numbers
        self._numbers += 1
        core: Group | None = None
        if not noiommu:
            driver = device.driver
            assert isinstance(driver, PciBasicDriver)
            core = Group(str(number), driver.identity_domain)
            core.add(device)
        made = VfioGroup(self.machine.world, number, core)
        self._groups[name if name is not None else f"#{number}"] = made
        return made

    def _remove_group(self, group: VfioGroup) -> None:
        for path in (
            f"/dev/vfio/{group.node}",
            f"/sys/devices/virtual/vfio/{group.node}",
            f"/sys/class/vfio/{group.node}",
            f"{pci_nodes.GROUPS}/{group.number}",
        ):
            self._remove_below(path)
        self._groups = {name: kept for name, kept in self._groups.items() if kept is not group}

    def _remove_below(self, path: str) -> None:
        for known in list(self.machine.paths()):
            if known == path or known.startswith(path + "/"):
                self.machine.remove_node(known)

    def _place(self, layout: PciLayout) -> dict[int, int]:
        """Bus addresses for the BARs, each a multiple of its size."""
        addresses = {}
        wanted = [(i, bar.size, bar) for i, bar in enumerate(layout.bars) if bar is not None]
        for index, size, bar in wanted:
            window = "io" if bar.kind is BarKind.IO else "wide" if bar.wide else "memory"
            addresses[index] = self._take(window, size)
        if layout.rom_size:
            addresses[6] = self._take("memory", layout.rom_size)
        return addresses

    def _take(self, window: str, size: int) -> int:
        start = -(-self._next[window] // size) * size
        self._next[window] = start + size
        return start

    def _join_bus(self, device: VfioDevice) -> None:
        bus = device.name.rsplit(":", 1)[0]
        if pci_nodes.bridge_of(device.name) is None:
            return
        for other in self.devices.values():
            if other is not device and other.name.rsplit(":", 1)[0] == bus:
                device.bus = other.bus
                break
        device.bus.append(device)

    # --- showing

    def _list(self, device: VfioDevice) -> None:
        add = self.machine.add_node
        if not self._bus_listed or device.noiommu:
            self._bus_listed = True
            for node in pci_nodes.bus_nodes(any(d.noiommu for d in self.devices.values())):
                add(node)
        bridge = pci_nodes.bridge_of(device.name)
        if bridge is not None and bridge not in self._bridges:
            self._bridges.add(bridge)
            for node in pci_nodes.bridge_nodes(bridge):
                add(node)
        iommu = device.device.iommu.name if device.device.iommu is not None else None
        if iommu is not None and iommu not in self._iommus:
            self._iommus.add(iommu)
            for node in pci_nodes.iommu_nodes(iommu):
                add(node)
        if len(device.group.devices) == 1:
            for node in pci_nodes.group_nodes(device.group, device.group.number):
                add(node)
        nodes = list(pci_nodes.device_nodes(device, iommu))
        self._paths[device.name] = [node.path for node in nodes]
        for node in nodes:
            add(node)
