"""Opening ``/dev/vfio/devices/vfioN`` (kernel: vfio_device_fops_cdev_open)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from iommufd.engine.task import CAP_SYS_RAWIO
from iommufd.errors import KernelError
from iommufd.vfio.device_file import DeviceFile

if TYPE_CHECKING:
    from iommufd.engine.task import Task
    from iommufd.vfio.device import VfioDevice


def open_cdev(device: VfioDevice, task: Task | None, flags: int) -> DeviceFile:
    """A file that can do nothing but bind (devices.md 11.1). ENODEV for a device that left, EPERM for one without an
    IOMMU when the caller lacks CAP_SYS_RAWIO. Any number of such files may be open; one of them can be bound."""
    if not device.registered:
        raise KernelError(errno.ENODEV, f"{device.name} is gone")
    if device.noiommu and (task is None or not task.capable(CAP_SYS_RAWIO)):
        raise KernelError(errno.EPERM, f"{device.name} has no IOMMU; opening it needs CAP_SYS_RAWIO")
    return DeviceFile(device, mode=flags & 3)
