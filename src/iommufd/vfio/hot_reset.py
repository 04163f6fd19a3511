"""Hot reset: the reset of a bus, and who must agree (kernel: vfio-pci's hot reset ioctls).

A hot reset resets every function on the bus. Whoever asks must own them all: by having them bound to the same iommufd
context (or in a group of which that context has a device), or by naming the open VFIO groups they are in. A function
on a root bus cannot be hot reset.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from iommufd.engine.file import File
from iommufd.errors import KernelError
from iommufd.uapi import vfio as v

if TYPE_CHECKING:
    from iommufd.engine.task import Task
    from iommufd.vfio.device import VfioDevice
    from iommufd.vfio.device_file import DeviceFile

HEAD = 12
ENTRY = 8
OWNED, NOT_OWNED = v.VFIO_PCI_DEVID_OWNED, v.VFIO_PCI_DEVID_NOT_OWNED % 2**32


def address_of(name: str) -> tuple[int, int, int]:
    """(segment, bus, devfn) of ``DDDD:BB:DD.F``."""
    segment, bus, rest = name.split(":")
    slot, function = rest.split(".")
    return int(segment, 16), int(bus, 16), int(slot, 16) << 3 | int(function, 16)


def owned_id(device: VfioDevice, asking: VfioDevice) -> int:
    """What the owner of ``asking`` is told of ``device``: its DEVICE id, OWNED, or NOT_OWNED (devices.md 11.8)."""
    context = asking.idev.context if asking.idev is not None else None
    try:
        return device.id_in(context)
    except KernelError as error:
        return OWNED if error.errno == errno.ENOENT else NOT_OWNED


def _check_bus(device: VfioDevice) -> None:
    if not device.bus:
        raise KernelError(errno.ENODEV, f"{device.name} is on a root bus, which cannot be reset")


def get_info(file: DeviceFile, task: Task, arg: int) -> int:
    """VFIO_DEVICE_GET_PCI_HOT_RESET_INFO; ENOSPC, with the count, when the array is too short."""
    device = file.device
    argsz = int.from_bytes(task.read(arg, HEAD)[:4], "little")
    if argsz < HEAD:
        raise KernelError(errno.EINVAL, f"argsz {argsz} is less than {HEAD}")
    _check_bus(device)
    affected = device.bus
    room = (argsz - HEAD) // ENTRY
    if len(affected) > room:
        task.write(arg, v.vfio_pci_hot_reset_info(argsz=argsz, flags=0, count=len(affected)).pack())
        raise KernelError(errno.ENOSPC, f"{len(affected)} devices are affected, there is room for {room}")
    flags = 0 if file.group_fd else v.VFIO_PCI_HOT_RESET_FLAG_DEV_ID | v.VFIO_PCI_HOT_RESET_FLAG_DEV_ID_OWNED
    entries = b""
    for other in affected:
        number = other.group.number
        if not file.group_fd:
            number = owned_id(other, device)
            if number == NOT_OWNED:
                flags &= ~v.VFIO_PCI_HOT_RESET_FLAG_DEV_ID_OWNED
        segment, bus, devfn = address_of(other.name)
        entries += v.vfio_pci_dependent_device(group_id=number, segment=segment, bus=bus, devfn=devfn).pack()
    task.write(arg + HEAD, entries)
    task.write(arg, v.vfio_pci_hot_reset_info(argsz=argsz, flags=flags, count=len(affected)).pack())
    return 0


def reset(file: DeviceFile, task: Task, arg: int) -> int:
    """VFIO_DEVICE_PCI_HOT_RESET: without descriptors on a bound cdev, with group descriptors on a group's file."""
    device = file.device
    head = v.vfio_pci_hot_reset.unpack(task.read(arg, HEAD))
    if head.argsz < HEAD:
        raise KernelError(errno.EINVAL, f"argsz {head.argsz} is less than {HEAD}")
    if head.flags:
        raise KernelError(errno.EINVAL, f"flags {head.flags:#x} are set; there are none")
    if bool(head.count) != file.group_fd:
        raise KernelError(errno.EINVAL, "groups are named exactly when the device was opened through one")
    _check_bus(device)
    if not file.group_fd:
        if any(owned_id(other, device) == NOT_OWNED for other in device.bus):
            raise KernelError(errno.EINVAL, f"not every device on the bus of {device.name} is the caller's")
    else:
        _check_groups(device, task, arg + HEAD, head.count)
    for other in device.bus:
        other.function.config.wake()
        other.reset()
    return 0


def _check_groups(device: VfioDevice, task: Task, at: int, count: int) -> None:
    """EINVAL unless the ``count`` descriptors at ``at`` are groups, and among them are those of all affected
    devices."""
    from iommufd.vfio.group import GroupFile  # a group makes device files

    if count > len(device.bus):
        raise KernelError(errno.EINVAL, f"{count} groups for {len(device.bus)} devices")
    data = task.read(at, 4 * count)
    named = []
    for start in range(0, len(data), 4):
        fd = int.from_bytes(data[start : start + 4], "little", signed=True)
        file = task.file(fd)
        if not isinstance(file, GroupFile):
            if not isinstance(file, File):
                file.close()
            raise KernelError(errno.EINVAL, f"descriptor {fd} is not a VFIO group")
        named.append(file.group)
    for other in device.bus:
        if other.group not in named:
            raise KernelError(errno.EINVAL, f"group {other.group.node} of {other.name} is not among those given")
