"""What /sys and /dev say of the PCI functions of a machine (kernel: their kobjects). Pure: descriptions in, nodes out.

Attribute files carry what Linux 7.3.4 showed for vfio-pci devices behind an emulated IOMMU. Links are relative, as
there.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from iommufd.machine import pci_attributes as attributes
from iommufd.machine.node import Node, directory, link, text_file
from iommufd.vfio.cdev import open_cdev
from iommufd.vfio.pci_config import BarKind, PciLayout

if TYPE_CHECKING:
    from iommufd.engine.file import File
    from iommufd.machine.pci import PciBus, Slot
    from iommufd.vfio.device import VfioDevice
    from iommufd.vfio.group import VfioGroup

CDEV_MAJOR, GROUP_MAJOR = 252, 253
DEVICES = "/sys/bus/pci/devices"
DRIVERS = "/sys/bus/pci/drivers"
DRIVER = f"{DRIVERS}/vfio-pci"
GROUPS = "/sys/kernel/iommu_groups"
IORESOURCE_IO, IORESOURCE_MEM, IORESOURCE_PREFETCH, IORESOURCE_READONLY = 0x100, 0x200, 0x2000, 0x4000
IORESOURCE_SIZEALIGN, IORESOURCE_MEM_64 = 0x40000, 0x100000


def bridge_of(name: str) -> str | None:
    """The bridge a function is behind: one for each bus but the root bus, at 0000:00:1c.0 and following."""
    segment, bus, _ = name.split(":")
    number = int(bus, 16)
    if number == 0:
        return None
    slot, function = divmod(number - 1, 8)
    return f"{segment}:00:{0x1C + slot:02x}.{function}"


def root_path(name: str) -> str:
    """The root bus the function is on or below."""
    return f"/sys/devices/pci{name.split(':')[0]}:00"


def device_path(name: str) -> str:
    """Where under /sys/devices the function is."""
    bridge = bridge_of(name)
    return f"{root_path(name)}/" + (f"{bridge}/{name}" if bridge else name)


def modalias(layout: PciLayout) -> str:
    code = layout.class_code
    return (
        f"pci:v{layout.vendor:08X}d{layout.device:08X}sv{layout.subsystem_vendor:08X}sd{layout.subsystem_device:08X}"
        f"bc{code >> 16:02X}sc{code >> 8 & 0xFF:02X}i{code & 0xFF:02X}"
    )


def resource_lines(layout: PciLayout, addresses: dict[int, int]) -> str:
    """The file ``resource``: first and last address and flags of the BARs, the ROM, and six bridge windows."""
    lines = []
    for index in range(13):
        start = addresses.get(index, 0)
        bar = layout.bar(index) if index < 6 else None
        size, flags = (layout.rom_size, 0) if index == 6 else (bar.size if bar else 0, bar.type_bits if bar else 0)
        if not size:
            lines.append(f"0x{0:016x} 0x{0:016x} 0x{0:016x}")
            continue
        flags |= IORESOURCE_SIZEALIGN
        flags |= IORESOURCE_IO if bar is not None and bar.kind is BarKind.IO else IORESOURCE_MEM
        if bar is not None and bar.wide:
            flags |= IORESOURCE_MEM_64
        if bar is not None and bar.prefetchable:
            flags |= IORESOURCE_PREFETCH
        if index == 6:
            flags |= IORESOURCE_READONLY | IORESOURCE_PREFETCH
        lines.append(f"0x{start:016x} 0x{start + size - 1:016x} 0x{flags:016x}")
    return "\n".join(lines)


def identity_nodes(at: str, name: str, layout: PciLayout) -> Iterator[Node]:
    """The attributes every PCI function has."""
    yield text_file(f"{at}/vendor", f"0x{layout.vendor:04x}")
    yield text_file(f"{at}/device", f"0x{layout.device:04x}")
    yield text_file(f"{at}/class", f"0x{layout.class_code:06x}")
    yield text_file(f"{at}/revision", f"0x{layout.revision:02x}")
    yield text_file(f"{at}/subsystem_vendor", f"0x{layout.subsystem_vendor:04x}")
    yield text_file(f"{at}/subsystem_device", f"0x{layout.subsystem_device:04x}")
    yield text_file(f"{at}/modalias", modalias(layout))
    yield text_file(f"{at}/numa_node", "-1")
    yield text_file(f"{at}/enable", "0")
    yield text_file(f"{at}/power_state", "D0")
    yield link(f"{at}/subsystem", "/sys/bus/pci")
    yield link(f"{DEVICES}/{name}", at)


def uevent(name: str, layout: PciLayout, driver: str | None) -> str:
    """The file ``uevent``."""
    return (
        (f"DRIVER={driver}\n" if driver else "")
        + f"PCI_CLASS={layout.class_code:04X}\nPCI_ID={layout.vendor:04X}:{layout.device:04X}\n"
        f"PCI_SUBSYS_ID={layout.subsystem_vendor:04X}:{layout.subsystem_device:04X}\nPCI_SLOT_NAME={name}\n"
        f"MODALIAS={modalias(layout)}"
    )


def bridge_nodes(name: str) -> Iterator[Node]:
    """A bridge is there to be walked past."""
    layout = PciLayout(vendor=0x1B36, device=0x000C, class_code=0x060400, msi=0)
    at = device_path(name)
    yield from identity_nodes(at, name, layout)
    yield text_file(f"{at}/uevent", uevent(name, layout, None))


def function_nodes(bus: PciBus, slot: Slot) -> Iterator[Node]:
    """A function, whether or not a driver has it. The machine's root bus is all its own: the host's functions have the
    same addresses."""
    function, name = slot.function, slot.address
    layout = function.layout
    at = device_path(name)
    yield directory(root_path(name), whole=True)
    yield from identity_nodes(at, name, layout)
    yield text_file(f"{at}/uevent", uevent(name, layout, None))
    yield text_file(f"{at}/irq", str(function.config.read(0x3C, 1)[0]))
    yield text_file(f"{at}/resource", resource_lines(layout, function.addresses))
    yield _acting(f"{at}/config", 0o644, lambda path: attributes.Config(slot, path))
    yield _acting(f"{at}/driver_override", 0o644, lambda path: attributes.DriverOverride(slot, path))
    if function.resettable:
        yield _acting(f"{at}/reset", 0o200, lambda path: attributes.Reset(slot, path))
    if slot.core.iommu is not None:
        unit = f"/sys/devices/virtual/iommu/{slot.core.iommu.name}"
        yield link(f"{at}/iommu", unit)
        yield link(f"{unit}/devices/{name}", at)
        yield link(f"{at}/iommu_group", f"{GROUPS}/{slot.group_number}")
        yield link(f"{GROUPS}/{slot.group_number}/devices/{name}", at)
        yield text_file(f"{GROUPS}/{slot.group_number}/type", "DMA")
        lines = [f"0x{r.start:016x} 0x{r.start + r.length - 1:016x} {r.type.value}\n" for r in slot.core.resv_regions()]
        yield text_file(f"{GROUPS}/{slot.group_number}/reserved_regions", "".join(lines).encode())


def _acting(path: str, mode: int, make: Callable[[str], File]) -> Node:
    """A file that is one of ours: what is written to it has an effect."""
    return Node(path, stat.S_IFREG | mode, opener=lambda task, flags: make(path))


def vfio_nodes(name: str, device: VfioDevice) -> Iterator[Node]:
    """What there is while vfio-pci has the function."""
    at = device_path(name)
    yield text_file(f"{at}/uevent", uevent(name, device.function.layout, "vfio-pci"))
    yield link(f"{at}/driver", DRIVER)
    yield link(f"{DRIVER}/{name}", at)
    if device.noiommu:  # VFIO itself makes the group that the IOMMU layer has not
        yield link(f"{at}/iommu_group", f"{GROUPS}/{device.group.number}")
        yield link(f"{GROUPS}/{device.group.number}/devices/{name}", at)
    if device.world.kernel >= (6, 6):
        yield from _cdev_nodes(device, at)


def _cdev_nodes(device: VfioDevice, at: str) -> Iterator[Node]:
    node, number = device.node, (CDEV_MAJOR, device.index)
    own = f"{at}/vfio-dev/{node}"
    yield Node(
        f"/dev/vfio/devices/{node}", stat.S_IFCHR | 0o666, number, lambda task, flags: open_cdev(device, task, flags)
    )
    yield text_file(f"{own}/dev", f"{CDEV_MAJOR}:{device.index}")
    yield text_file(f"{own}/uevent", f"MAJOR={CDEV_MAJOR}\nMINOR={device.index}\nDEVNAME=vfio/devices/{node}")
    yield link(f"{own}/device", at)
    yield link(f"{own}/subsystem", "/sys/class/vfio-dev")
    yield link(f"/sys/class/vfio-dev/{node}", own)


def group_nodes(group: VfioGroup) -> Iterator[Node]:
    """A VFIO group: its device node and its class entry."""
    node = group.node
    yield Node(f"/dev/vfio/{node}", stat.S_IFCHR | 0o666, (GROUP_MAJOR, group.minor), group.open)
    own = f"/sys/devices/virtual/vfio/{node}"
    yield text_file(f"{own}/dev", f"{GROUP_MAJOR}:{group.minor}")
    yield text_file(f"{own}/uevent", f"MAJOR={GROUP_MAJOR}\nMINOR={group.minor}\nDEVNAME=vfio/{node}")
    yield link(f"{own}/subsystem", "/sys/class/vfio")
    yield link(f"/sys/class/vfio/{node}", own)
    if group.noiommu:
        core = f"{GROUPS}/{group.number}"
        yield text_file(f"{core}/name", "vfio-noiommu")
        yield text_file(f"{core}/type", "unknown")
        yield text_file(f"{core}/reserved_regions", b"")


def bus_nodes(bus: PciBus) -> Iterator[Node]:
    """What is there whenever a machine has PCI functions."""
    yield directory("/dev/vfio", whole=True)
    for path in (DEVICES, DRIVERS, GROUPS, "/sys/class/vfio", "/sys/class/vfio-dev", "/sys/class/iommu"):
        yield directory(path, whole=True)
    yield directory(DRIVER)
    yield _acting(f"{DRIVER}/bind", 0o200, lambda path: attributes.Bind(bus, path))
    yield _acting(f"{DRIVER}/unbind", 0o200, lambda path: attributes.Unbind(bus, path))
    yield _acting("/sys/bus/pci/drivers_probe", 0o200, lambda path: attributes.DriversProbe(bus, path))
    unsafe = "/sys/module/vfio/parameters/enable_unsafe_noiommu_mode"
    yield _acting(unsafe, 0o644, lambda path: attributes.UnsafeMode(bus, path))
    for parameter in ("disable_idle_d3", "nointxmask", "disable_denylist"):
        yield text_file(f"/sys/module/vfio_pci/parameters/{parameter}", "N")


def iommu_nodes(name: str) -> Iterator[Node]:
    """One IOMMU instance."""
    unit = f"/sys/devices/virtual/iommu/{name}"
    yield directory(f"{unit}/devices")
    yield link(f"{unit}/subsystem", "/sys/class/iommu")
    yield text_file(f"{unit}/uevent", b"")
    yield link(f"/sys/class/iommu/{name}", unit)
