"""VFIO_DEVICE_FEATURE (kernel: vfio_ioctl_device_feature and vfio-pci's handlers).

A PCI function without virtual functions, migration or DMA logging has the power features alone: entry into and exit
from a low power state, in which every access still works, as the kernel wakes the device for it.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from iommufd.errors import KernelError
from iommufd.uapi import vfio as v
from iommufd.vfio.interrupts import eventfd_of

if TYPE_CHECKING:
    from iommufd.engine.task import Task
    from iommufd.vfio.device_file import DeviceFile

HEAD = 8
GET, SET, PROBE = v.VFIO_DEVICE_FEATURE_GET, v.VFIO_DEVICE_FEATURE_SET, v.VFIO_DEVICE_FEATURE_PROBE
KNOWN = v.VFIO_DEVICE_FEATURE_MASK | GET | SET | PROBE
WAKEUP_SIZE = v.vfio_device_low_power_entry_with_wakeup.SIZE


def check_feature(flags: int, argsz: int, supported: int, minimum: int) -> bool:
    """Whether there is something to do: False for a probe, which asks whether all of its GET and SET are ``supported``.

    EINVAL for an operation that is not, for none at all, and for a payload of less than ``minimum`` bytes."""
    wanted = flags & (GET | SET)
    if wanted & ~supported:
        raise KernelError(
            errno.EINVAL,
            f"feature {flags & v.VFIO_DEVICE_FEATURE_MASK} cannot be {' and '.join(_words(wanted & ~supported))}",
        )
    if flags & PROBE:
        return False
    if not wanted:
        raise KernelError(errno.EINVAL, f"flags {flags:#x} have neither GET nor SET")
    if argsz < HEAD + minimum:
        raise KernelError(errno.EINVAL, f"argsz {argsz} is less than {HEAD + minimum}")
    return True


def _words(ways: int) -> list[str]:
    return [word for way, word in ((GET, "read"), (SET, "set")) if ways & way]


def feature(file: DeviceFile, task: Task, arg: int) -> int:
    """VFIO_DEVICE_FEATURE."""
    argsz, flags = (int.from_bytes(part, "little") for part in _halves(task.read(arg, HEAD)))
    if argsz < HEAD:
        raise KernelError(errno.EINVAL, f"argsz {argsz} is less than {HEAD}")
    if flags & ~KNOWN:
        raise KernelError(errno.EINVAL, f"flags {flags & ~KNOWN:#x} are not known")
    if flags & GET and flags & SET and not flags & PROBE:
        raise KernelError(errno.EINVAL, "GET and SET at once are for probing only")
    number = flags & v.VFIO_DEVICE_FEATURE_MASK
    device = file.device
    if number == v.VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY:
        if check_feature(flags, argsz, SET, 0):
            _enter(file)
    elif number == v.VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP:
        if check_feature(flags, argsz, SET, WAKEUP_SIZE):
            fd = int.from_bytes(task.read(arg + HEAD, WAKEUP_SIZE)[:4], "little", signed=True)
            if fd < 0:
                raise KernelError(errno.EINVAL, f"descriptor {fd} cannot be an eventfd")
            eventfd_of(task, fd).close()  # it would fire on a wake-up by the device, which never sleeps
            _enter(file)
    elif number == v.VFIO_DEVICE_FEATURE_LOW_POWER_EXIT:
        if check_feature(flags, argsz, SET, 0):
            device.low_power = False
    elif number == v.VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2:
        raise KernelError(errno.EINVAL, f"{device.name} cannot migrate")
    else:
        raise KernelError(errno.ENOTTY, f"{device.name} has no feature {number}")
    return 0


def _enter(file: DeviceFile) -> None:
    if file.device.low_power:
        raise KernelError(errno.EINVAL, f"{file.device.name} is in low power already")
    file.device.low_power = True


def _halves(data: bytes) -> tuple[bytes, bytes]:
    return data[:4], data[4:8]
