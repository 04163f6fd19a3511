"""VDEVICE: a device's identity within a vIOMMU (kernel: struct iommufd_vdevice).

Invariants (events-viommu 7):

* A device has at most one vDEVICE, whatever the vIOMMU; a virtual id names at most one vDEVICE of its vIOMMU. Both are
  claimed in one step under ``World.lock``, so of two racing calls one wins.
* It holds its vIOMMU (``users``) and its DEVICE (``users`` and ``wait``). A program may destroy it at any time.
* A device that is being unbound gets no new vDEVICE, takes the one it has with it, and leaves a tombstone in place of
  its number, because the program still believes it owns that number.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from iommufd.engine.device import Device
from iommufd.engine.dispatch import Call, Handler, Respond
from iommufd.engine.object import PUBLISHED, Object
from iommufd.engine.viommu import Viommu
from iommufd.errors import KernelError
from iommufd.iommu.viommu import InitsVdevices
from iommufd.uapi.commands import BY_NAME, Command
from iommufd.uapi.iommufd import iommu_vdevice_alloc

if TYPE_CHECKING:
    from iommufd.engine.context import Context
    from iommufd.iommu import device as iommu_device

ULONG_MAX = 2**64 - 1


class Vdevice(Object):
    """The object. ``linked``: it has the device's mark, the virtual id and its references. ``ready``: the driver's hook
    has accepted it and drivers may find it (a half-created one must not be found). ``private`` is the driver's."""

    __slots__ = ("idev", "linked", "private", "ready", "viommu", "virt_id")
    kind = "VDEVICE"

    def __init__(self, context: Context, viommu: Viommu, idev: Device, virt_id: int) -> None:
        super().__init__(context)
        self.viommu = viommu
        self.idev = idev
        self.virt_id = virt_id
        self.private: object = None
        self.linked = False
        self.ready = False

    @property
    def device(self) -> iommu_device.Device:
        return self.idev.device

    def link(self) -> None:
        """Takes the device's one place for a vDEVICE and the virtual id: ENOENT, EEXIST (events-viommu 7 rows 5-8)."""
        idev, viommu = self.idev, self.viommu
        with self.context.world.lock:
            if idev.destroying:  # row 5
                raise KernelError(errno.ENOENT, f"device {idev.id} is being unbound")
            if idev.vdevice is not None:  # row 6
                raise KernelError(errno.EEXIST, f"device {idev.id} has vDEVICE {idev.vdevice.id} already")
            if self.virt_id in viommu.vdevs:  # row 8
                raise KernelError(errno.EEXIST, f"virtual id {self.virt_id:#x} is taken on vIOMMU {viommu.id}")
            viommu.vdevs[self.virt_id] = self
            viommu.users += 1
            idev.vdevice = self
            idev.users += 1
            idev.wait += 1
            self.linked = True

    def destroy(self) -> None:
        if self.ready and isinstance(self.viommu.ops, InitsVdevices):
            self.viommu.ops.vdevice_destroy(self)
        if not self.linked:
            return
        world = self.context.world
        with world.lock:
            del self.viommu.vdevs[self.virt_id]
            self.viommu.users -= 1
            self.idev.vdevice = None
            self.idev.users -= 1
            self.idev.wait -= 1
            self.linked = False
            world.wake()


def remove_vdevice(idev: Device) -> None:
    """The device is being unbound: no new vDEVICE, and a live one becomes a tombstone (core 2.6, events-viommu 7).

    One that another thread is making or destroying right now is waited for."""
    world = idev.context.world
    with world.lock:
        idev.destroying = True
        while True:
            vdev = idev.vdevice
            if vdev is None or vdev.state == PUBLISHED:
                break
            world.wait()
    if vdev is not None:
        idev.context.objects.entomb(vdev)


def vdevice_alloc(call: Call) -> None:
    """IOMMU_VDEVICE_ALLOC (events-viommu 7)."""
    cmd = call.cmd
    assert isinstance(cmd, iommu_vdevice_alloc)
    if cmd.virt_id > ULONG_MAX:  # row 1: never with 64-bit longs
        raise KernelError(errno.EINVAL, f"virtual id {cmd.virt_id:#x} does not fit a long")
    viommu = call.get(cmd.viommu_id, Viommu)  # row 2
    idev = call.get(cmd.dev_id, Device)  # row 3
    if idev.device.iommu is not viommu.iommu:  # row 4
        raise KernelError(errno.EINVAL, f"{idev.device.name} is not behind the IOMMU of vIOMMU {viommu.id}")
    vdev = call.reserve(Vdevice(call.context, viommu, idev, cmd.virt_id))  # row 7; a number is free again on failure
    vdev.link()  # rows 5, 6, 8
    if isinstance(viommu.ops, InitsVdevices):
        viommu.ops.vdevice_init(vdev)  # row 9
    vdev.ready = True
    cmd.out_vdevice_id = vdev.id


ROWS: list[tuple[Command, Handler, Respond]] = [
    (BY_NAME["IOMMU_VDEVICE_ALLOC"], vdevice_alloc, Respond.ON_SUCCESS),
]
