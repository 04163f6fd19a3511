"""VIOMMU: a slice of a physical IOMMU that a guest sees as its own (kernel: struct iommufd_viommu).

Invariants (events-viommu 6, 10):

* It belongs to the IOMMU instance of the device it was made through, and to nothing else of that device. Its nesting
  parent is referenced for its whole life; vDEVICEs, vEVENTQs, HW queues, nested page tables made from it and mappings
  of its memory reference it.
* ``vdevs`` has its vDEVICEs by virtual id, ``veventqs`` its event queues by type; ``World.lock`` guards both, and a
  virtual id whose vDEVICE is not yet complete is taken but not findable.
* Drivers see it as :class:`~iommufd.iommu.viommu.DriverViommu`; ``ops`` and ``private`` are theirs.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from iommufd.engine.device import Device
from iommufd.engine.dispatch import Call, Handler, Respond
from iommufd.engine.failpoints import SLAB
from iommufd.engine.hwpt import HwptPaging
from iommufd.engine.object import Object
from iommufd.errors import KernelError
from iommufd.iommu.driver import HasViommus
from iommufd.iommu.user_data import UserData
from iommufd.iommu.viommu import DestroysViommu
from iommufd.uapi.commands import BY_NAME, Command
from iommufd.uapi.iommufd import IOMMU_VIOMMU_TYPE_DEFAULT, iommu_viommu_alloc

if TYPE_CHECKING:
    from iommufd.engine.context import Context
    from iommufd.engine.mmap import MmapRegion
    from iommufd.engine.vdevice import Vdevice
    from iommufd.engine.veventq import VeventQueue
    from iommufd.iommu import device as iommu_device
    from iommufd.iommu.domain import PagingDomain
    from iommufd.iommu.driver import Iommu


class Viommu(Object):
    """The object, and the helpers a driver may call (devices.md 10.6)."""

    __slots__ = ("hwpt", "iommu", "ops", "private", "regions", "type", "vdevs", "veventqs")
    kind = "VIOMMU"

    def __init__(self, context: Context, type: int, iommu: Iommu, hwpt: HwptPaging) -> None:
        super().__init__(context)
        self.type = type
        self.iommu = iommu
        self.hwpt = hwpt
        self.ops: object | None = None
        self.private: object = None
        self.regions: list[MmapRegion] = []
        self.vdevs: dict[int, Vdevice] = {}
        self.veventqs: dict[int, VeventQueue] = {}
        with context.world.lock:
            hwpt.users += 1

    def destroy(self) -> None:
        if isinstance(self.ops, DestroysViommu):
            self.ops.destroy(self)
        while self.regions:  # those the driver left
            self.destroy_mmap(self.regions[-1].offset)
        self.private = None  # it may refer to the vIOMMU
        with self.context.world.lock:
            self.hwpt.users -= 1

    @property
    def parent_domain(self) -> PagingDomain:
        return self.hwpt.domain

    def find_device(self, virt_id: int) -> iommu_device.Device | None:
        """The device with that virtual id here; None for a free id and for one whose vDEVICE is still being made."""
        with self.context.world.lock:
            vdev = self.vdevs.get(virt_id)
            return vdev.device if vdev is not None and vdev.ready else None

    def vdev_id(self, device: iommu_device.Device) -> int:
        """The device's virtual id here; ENOENT when it has no vDEVICE on this vIOMMU."""
        with self.context.world.lock:
            for virt_id, vdev in self.vdevs.items():
                if vdev.device is device and vdev.ready:
                    return virt_id
        raise KernelError(errno.ENOENT, f"{device.name} has no vDEVICE on vIOMMU {self.id}")

    def report_event(self, type: int, data: bytes) -> None:
        """Queues an event (events-viommu 8.2). EINVAL without data, EOPNOTSUPP without a queue of that type, ENOMEM.

        An event that finds the queue full is lost, and that is no error."""
        if not data:
            raise KernelError(errno.EINVAL, "an event without data")
        world = self.context.world
        memory = not world.failpoint(SLAB, None)
        with world.lock:
            veventq = self.veventqs.get(type)
            if veventq is None:  # row 1
                raise KernelError(errno.EOPNOTSUPP, f"vIOMMU {self.id} has no queue of events of type {type:#x}")
            veventq.store_locked(data, memory=memory)
        if world.instruments:
            world.event("vevent", queue=veventq.id, type=type, data=data)
        veventq.wake()
        if not memory:  # row 2
            raise KernelError(errno.ENOMEM, "fault injection: no memory for an event")

    def alloc_mmap(self, length: int) -> MmapRegion:
        """``length`` bytes of zeroed memory that a program may map at ``region.offset`` (events-viommu 9.1)."""
        region = self.context.store.add(self, length)
        self.regions.append(region)
        return region

    def destroy_mmap(self, offset: int) -> None:
        """Gives a region back. Nothing maps it: a mapping keeps the vIOMMU."""
        region = next(r for r in self.regions if r.offset == offset)
        self.regions.remove(region)
        self.context.store.remove(region)


def viommu_alloc(call: Call) -> None:
    """IOMMU_VIOMMU_ALLOC (events-viommu 6)."""
    cmd = call.cmd
    assert isinstance(cmd, iommu_viommu_alloc)
    if cmd.flags or cmd.type == IOMMU_VIOMMU_TYPE_DEFAULT:  # row 1
        raise KernelError(errno.EOPNOTSUPP, f"flags {cmd.flags:#x} must be 0 and type {cmd.type:#x} must not")
    device = call.get(cmd.dev_id, Device).device  # row 2
    driver, iommu = device.driver, device.iommu
    if driver is None or iommu is None:  # row 3
        raise KernelError(errno.EOPNOTSUPP, f"{device.name} has no IOMMU")
    if not isinstance(driver, HasViommus) or not driver.viommu_supported(device, cmd.type):  # row 4
        raise KernelError(errno.EOPNOTSUPP, f"the IOMMU of {device.name} has no vIOMMU of type {cmd.type:#x}")
    hwpt = call.get(cmd.hwpt_id, HwptPaging)  # row 5
    if not hwpt.nest_parent:  # row 6
        raise KernelError(errno.EINVAL, f"HWPT {hwpt.id} was not allocated with NEST_PARENT")
    viommu = call.reserve(Viommu(call.context, cmd.type, iommu, hwpt))  # row 7
    data = UserData(call.task, cmd.type, cmd.data_uptr, cmd.data_len) if cmd.data_len else None
    driver.viommu_init(viommu, hwpt.domain, data)  # row 8
    if viommu.ops is None:
        raise KernelError(errno.EINVAL, f"the driver of {device.name} gave the vIOMMU no operations")
    cmd.out_viommu_id = viommu.id


ROWS: list[tuple[Command, Handler, Respond]] = [
    (BY_NAME["IOMMU_VIOMMU_ALLOC"], viommu_alloc, Respond.ON_SUCCESS),
]
