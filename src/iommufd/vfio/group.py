"""VFIO groups (kernel: struct vfio_group): ``/dev/vfio/N``, the older way to a device, through an iommufd as container.

vfio-compat.md 9. Invariants:

* A group is open at most once, and not while a device of it is bound through its cdev. Devices opened through it stay
  open, bound and attached when the group is closed or loses its container.
* The container is an iommufd context (``context``), whose file the group keeps open. Setting it claims nothing:
  devices are bound when they are opened.
"""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING

from iommufd.engine.context import Context
from iommufd.engine.file import File
from iommufd.engine.task import CAP_SYS_RAWIO
from iommufd.engine.vfio_compat import compat_ioas_create, compat_set_no_iommu
from iommufd.errors import KernelError
from iommufd.uapi import vfio as v
from iommufd.vfio.device_file import DeviceFile

if TYPE_CHECKING:
    from iommufd.engine.task import Task
    from iommufd.engine.world import World
    from iommufd.iommu.group import Group
    from iommufd.vfio.device import VfioDevice

NAME_LIMIT = 4096  # bytes of a device's name, its NUL included


class VfioGroup:
    """``number`` is the N of /dev/vfio/N; ``group`` the core's, None for the group of a device without an IOMMU.

    ``minor`` is the device number its node has."""

    def __init__(self, world: World, number: int, group: Group | None) -> None:
        self.world = world
        self.number = number
        self.minor = 0
        self.group = group
        self.devices: list[VfioDevice] = []
        self.lock = threading.Lock()
        self.file: GroupFile | None = None
        self.cdev_opens = 0
        self.context: Context | None = None

    @property
    def noiommu(self) -> bool:
        return self.group is None

    @property
    def node(self) -> str:
        """Its name under /dev/vfio."""
        return f"{'noiommu-' if self.noiommu else ''}{self.number}"

    def block(self) -> None:
        """A device of the group is about to be bound through its cdev; EBUSY while the group is open."""
        with self.lock:
            if self.file is not None:
                raise KernelError(errno.EBUSY, f"group {self.node} is open")
            self.cdev_opens += 1

    def unblock(self) -> None:
        with self.lock:
            self.cdev_opens -= 1

    def open(self, task: Task | None, flags: int) -> GroupFile:
        """Opens /dev/vfio/N: EPERM for a no-IOMMU group without CAP_SYS_RAWIO, EBUSY when in use, ENODEV without
        devices."""
        with self.lock:
            if not self.devices:
                raise KernelError(errno.ENODEV, f"group {self.node} has no devices any more")
            if self.noiommu and (task is None or not task.capable(CAP_SYS_RAWIO)):
                raise KernelError(errno.EPERM, f"group {self.node} has no IOMMU; opening it needs CAP_SYS_RAWIO")
            if self.cdev_opens or self.file is not None:
                raise KernelError(errno.EBUSY, f"group {self.node} is open, or a device of it is bound")
            self.file = GroupFile(self, flags & 3)
            return self.file

    def viable(self) -> bool:
        """Whether nobody else has the group's DMA."""
        return self.group is None or not self.group.owner_cnt


class GroupFile(File):
    """One open of a group."""

    def __init__(self, group: VfioGroup, mode: int) -> None:
        super().__init__()
        self.group = group
        self.mode = mode
        self.link = f"/dev/vfio/{group.node}"

    def ioctl(self, task: Task, cmd: int, arg: int) -> int:
        found = _TABLE.get(cmd)
        if found is None:
            raise KernelError(errno.ENOTTY, f"a VFIO group has no command {cmd:#x}")
        name, handler = found
        fail_call = self.group.world.fail_call
        if fail_call is not None:
            fail_call(name, task)
        return handler(self.group, task, arg)

    def release(self) -> None:
        group = self.group
        with group.lock:
            group.file = None
            context, group.context = group.context, None
        if context is not None:
            context.put()


def _get_status(group: VfioGroup, task: Task, arg: int) -> int:
    argsz = int.from_bytes(task.read(arg, 8)[:4], "little")
    if argsz < 8:
        raise KernelError(errno.EINVAL, f"argsz {argsz} is less than 8")
    with group.lock:
        if not group.devices:
            raise KernelError(errno.ENODEV, f"group {group.node} has no devices any more")
        if group.context is not None:
            flags = v.VFIO_GROUP_FLAGS_CONTAINER_SET | v.VFIO_GROUP_FLAGS_VIABLE
        else:
            flags = v.VFIO_GROUP_FLAGS_VIABLE if group.viable() else 0
    task.write(arg, v.vfio_group_status(argsz=argsz, flags=flags).pack())
    return 0


def _set_container(group: VfioGroup, task: Task, arg: int) -> int:
    """vfio-compat 9.1."""
    fd = int.from_bytes(task.read(arg, 4), "little", signed=True)  # row 1
    file = task.file(fd)  # row 2
    try:
        with group.lock:
            if group.context is not None:  # row 3
                raise KernelError(errno.EINVAL, f"group {group.node} has a container")
            if not group.devices:  # row 4
                raise KernelError(errno.ENODEV, f"group {group.node} has no devices any more")
            if not isinstance(file, Context):  # row 11
                raise KernelError(errno.EBADFD, f"descriptor {fd} is neither a VFIO container nor an iommufd")
            if group.noiommu:  # rows 6, 7
                compat_set_no_iommu(file)
            else:  # rows 8-10
                compat_ioas_create(file)
            file.get()
            group.context = file
    finally:
        if not isinstance(file, File):
            file.close()
    return 0


def _unset_container(group: VfioGroup, task: Task, arg: int) -> int:
    with group.lock:
        context, group.context = group.context, None
    if context is None:
        raise KernelError(errno.EINVAL, f"group {group.node} has no container")
    context.put()
    return 0


def read_name(task: Task, arg: int) -> str:
    """A string of the caller; EFAULT when its memory ends before it does, EINVAL when it is longer than a page."""
    data = task.read_upto(arg, NAME_LIMIT)
    text, end, _ = data.partition(b"\0")
    if not end:
        if len(data) < NAME_LIMIT:
            raise KernelError(errno.EFAULT, f"the name at {arg:#x} cannot be read")
        raise KernelError(errno.EINVAL, f"the name at {arg:#x} is longer than a page")
    return text.decode("utf-8", "replace")


def find_device(group: VfioGroup, wanted: str) -> VfioDevice:
    """The device by name, with options behind a blank; ENODEV when none has it, EINVAL for options it does not know."""
    name, blank, options = wanted.partition(" ")
    for device in group.devices:
        if device.name == name:
            if blank and options.strip():
                raise KernelError(errno.EINVAL, f"{device.name} is no virtual function and takes no {options!r}")
            return device
    raise KernelError(errno.ENODEV, f"group {group.node} has no device {wanted!r}")


def _get_device_fd(group: VfioGroup, task: Task, arg: int) -> int:
    """vfio-compat 9.2, devices.md 11.7."""
    wanted = read_name(task, arg)
    with group.lock:
        device = find_device(group, wanted)
    fd = task.reserve_fd(True)
    try:
        file = _open_device(group, device, task)
    except BaseException:
        task.release_fd(fd)
        raise
    task.install_fd(fd, file)
    return fd


def _open_device(group: VfioGroup, device: VfioDevice, task: Task) -> DeviceFile:
    with group.lock:
        context = group.context
        if context is None:
            raise KernelError(errno.EINVAL, f"group {group.node} has no container")
        if group.noiommu and (not task.capable(CAP_SYS_RAWIO) or context.compat_ioas is not None):
            raise KernelError(errno.EPERM, "a device without an IOMMU needs CAP_SYS_RAWIO and no compatibility IOAS")
        with device.lock:
            first = device.users == 0
            device.open(None if group.noiommu else context, shared=True)
            if first:
                try:
                    device.attach_compat(task)
                except BaseException:
                    device.close()
                    raise
        return DeviceFile(device, group_fd=True)


_TABLE = {
    v.VFIO_GROUP_GET_STATUS: ("VFIO_GROUP_GET_STATUS", _get_status),
    v.VFIO_GROUP_SET_CONTAINER: ("VFIO_GROUP_SET_CONTAINER", _set_container),
    v.VFIO_GROUP_UNSET_CONTAINER: ("VFIO_GROUP_UNSET_CONTAINER", _unset_container),
    v.VFIO_GROUP_GET_DEVICE_FD: ("VFIO_GROUP_GET_DEVICE_FD", _get_device_fd),
}
