"""VfioDevice: a device offered to user space, and its binding to iommufd (kernel: struct vfio_device, struct
vfio_group's part in opening it, vfio_iommufd_physical_*).

Invariants (devices.md 11):

* ``users`` counts open device files that have access: at most one through the cdev, any number through a group. The
  first one binds the device to an iommufd context and enables it, the last one disables and unbinds it.
* While the cdev is bound the group path is blocked (``VfioGroup.cdev_opens``), and the other way round.
* What VFIO remembers of attachments (``rid_attached``, ``pasids``) decides between attach and replace; PASID 0 given
  as a PASID is remembered apart from the RID, as in the kernel.
* ``lock`` (kernel: dev_set->lock) is held over opening, closing, attaching and detaching; it is outside all engine
  locks.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from iommufd.engine import device as engine_device
from iommufd.engine.vfio_compat import compat_ioas_id
from iommufd.errors import KernelError

if TYPE_CHECKING:
    from iommufd.engine.context import Context
    from iommufd.engine.task import Task
    from iommufd.engine.world import World
    from iommufd.iommu.device import Device
    from iommufd.vfio.group import VfioGroup
    from iommufd.vfio.pci_function import PciFunction

MAX_PASID = 2**31 - 1
EINVAL_AS_PASID = 2**32 - errno.EINVAL


class VfioDevice:
    """``device`` is what the IOMMU sees, ``function`` what the program sees; ``index`` is the N of vfioN.

    ``bus`` are the devices that a hot reset resets together, this one included; empty where none is possible."""

    def __init__(self, world: World, device: Device, function: PciFunction, index: int, group: VfioGroup) -> None:
        self.world = world
        self.device = device
        self.function = function
        self.index = index
        self.group = group
        self.bus: list[VfioDevice] = []
        self.lock = threading.Lock()
        self.users = 0
        self.registered = True
        self.idev: engine_device.Device | None = None
        self.rid_attached = False
        self.pasids: set[int] = set()
        self.low_power = False
        self._idle: list[Callable[[], None]] = []
        group.devices.append(self)

    @property
    def name(self) -> str:
        return self.device.name

    @property
    def noiommu(self) -> bool:
        return self.group.noiommu

    @property
    def node(self) -> str:
        """Its name under /dev/vfio/devices."""
        return f"{'noiommu-' if self.noiommu else ''}vfio{self.index}"

    # --- opening and closing; ``lock`` is held

    def open(self, context: Context | None, *, shared: bool) -> None:
        """One more user, through a group if ``shared``. The first binds to ``context`` (None: nothing to bind) and
        enables.

        EINVAL when in use and not shared; ENODEV when the device went; bind errors of devices.md 2.1."""
        if self.users and not shared:
            raise KernelError(errno.EINVAL, f"{self.name} is open through another descriptor")
        if not self.users:
            if not self.registered:
                raise KernelError(errno.ENODEV, f"{self.name} is gone")
            if context is not None:
                self.idev = engine_device.bind(context, self.device)
            try:
                self.function.opened()
            except BaseException:
                self._unbind()
                raise
        self.users += 1

    def close(self) -> None:
        """One user less. The last: the device is as before anybody opened it, detached and unbound (11.5)."""
        self.users -= 1
        if self.users:
            return
        self._disable()
        idle, self._idle = self._idle, []
        for done in idle:
            done()

    def _disable(self) -> None:
        function = self.function
        function.interrupts.disable()
        if function.resettable:
            function.reset()
        function.config.restore()
        function.closed()
        function.drop_store()
        self.low_power = False
        self._unbind()

    def _unbind(self) -> None:
        idev = self.idev
        if idev is None:
            return
        for pasid in sorted(self.pasids):
            idev.detach(pasid)
        self.pasids.clear()
        if self.rid_attached:
            idev.detach()
            self.rid_attached = False
        self.idev = None
        engine_device.unbind(idev)

    # --- attaching (11.3, 11.4); ``lock`` is held

    def attach(self, task: Task | None, pt_id: int) -> int:
        """The RID: attach, or replace when attached; the id of the HWPT it is on now."""
        idev = self._bound()
        if self.rid_attached:
            return idev.replace(pt_id, task=task)
        hwpt = idev.attach(pt_id, task=task)
        self.rid_attached = True
        return hwpt

    def detach(self) -> None:
        """The RID; nothing when it is not attached."""
        if self.rid_attached:
            self.rid_attached = False
            self._bound().detach()

    def attach_pasid(self, task: Task | None, pt_id: int, pasid: int) -> int:
        """One PASID: attach, or replace when attached. ENOSPC (or, for one number, EINVAL) when it cannot be a
        PASID."""
        idev = self._bound()
        if pasid in self.pasids:
            return idev.replace(pt_id, pasid, task=task)
        if pasid > MAX_PASID:
            number = errno.EINVAL if pasid == EINVAL_AS_PASID else errno.ENOSPC
            raise KernelError(number, f"PASID {pasid:#x} is more than {MAX_PASID:#x}")
        hwpt = idev.attach(pt_id, pasid, task=task)
        self.pasids.add(pasid)
        return hwpt

    def detach_pasid(self, pasid: int) -> None:
        """One PASID; nothing when it is not attached."""
        if pasid in self.pasids:
            self.pasids.discard(pasid)
            self._bound().detach(pasid)

    def attach_compat(self, task: Task | None) -> None:
        """The group path: to the compat IOAS of the context the device was just bound to (11.7)."""
        if self.idev is not None:
            self.attach(task, compat_ioas_id(self.idev.context))

    def _bound(self) -> engine_device.Device:
        if self.idev is None:
            raise KernelError(errno.ENODEV, f"{self.name} is not bound to an iommufd")
        return self.idev

    # --- 11.8

    def id_in(self, context: Context | None) -> int:
        """The DEVICE id in ``context``; ENOENT when another device of its group is bound there, ENODEV otherwise."""
        if self.idev is not None and context is not None and self.idev.context is context:
            return self.idev.id
        if engine_device.has_group(context, self.device.group):
            raise KernelError(errno.ENOENT, f"{self.name} is not bound here, another device of its group is")
        raise KernelError(errno.ENODEV, f"{self.name} is not bound here, and no other device of its group")

    def reset(self) -> None:
        """A function reset: the model's registers and memory; configuration space and interrupts stay (VFIO restores
        them)."""
        self.function.reset()

    def when_idle(self, done: Callable[[], None]) -> None:
        """Calls ``done`` once nobody has the device open any more."""
        with self.lock:
            if self.users:
                self._idle.append(done)
                return
        done()

    def remove(self) -> None:
        """The device leaves; it cannot be opened any more. Who has it open keeps it."""
        self.registered = False
        self.group.devices.remove(self)
