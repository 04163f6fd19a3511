"""IGroup: a core group as one context sees it (kernel: struct iommufd_group), devices.md 1.2.

Invariants:

* One per (context, core group), from the first bind of a member to the last unbind; no-IOMMU devices have one each, of
  no core group. All attach, replace and detach on it serialise on ``lock``.
* ``attached[pasid]`` exists exactly while some device of it is attached there; key 0 is the RID. All its devices are on
  ``Slot.hwpt``; the hardware (all members of the core group) follows the first attach and the last detach.
* Order of locks: ``ioas.mutex``, then this ``lock``, then the core group's ``mutex``.
"""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING

from iommufd.errors import KernelError

if TYPE_CHECKING:
    from iommufd.engine.context import Context
    from iommufd.engine.device import Device
    from iommufd.engine.hwpt import Hwpt
    from iommufd.iommu.faults import AttachHandle
    from iommufd.iommu.group import Group

NO_SW_MSI = 2**64 - 1


class Slot:
    """What a PASID (or the RID) of the group is attached to: ``hwpt``, and the devices attached, by id.

    ``handle`` is the core's for the attach in force; no-IOMMU devices have none."""

    __slots__ = ("devices", "handle", "hwpt")

    def __init__(self, hwpt: Hwpt, handle: AttachHandle | None) -> None:
        self.hwpt = hwpt
        self.handle = handle
        self.devices: dict[int, Device] = {}


class IGroup:
    """``sw_msi_start`` is where the devices' SW_MSI window begins, ``required_sw_msi`` the numbers of the context's MSI
    pages they have used (devices.md 1.6)."""

    __slots__ = ("attached", "context", "group", "lock", "required_sw_msi", "sw_msi_start", "users")

    def __init__(self, context: Context, group: Group | None) -> None:
        self.context = context
        self.group = group
        self.attached: dict[int, Slot] = {}
        self.sw_msi_start = NO_SW_MSI
        self.required_sw_msi: set[int] = set()
        self.lock = threading.Lock()
        self.users = 1

    @staticmethod
    def get(context: Context, group: Group | None) -> IGroup:
        """The context's group for ``group``, one user more; a private one when ``group`` is None."""
        if group is None:
            return IGroup(context, None)
        with context.world.lock:
            found = context.groups.get(id(group))
            if found is None:
                found = context.groups[id(group)] = IGroup(context, group)
            else:
                found.users += 1
            return found

    def put(self) -> None:
        """One user less; the last one drops it, and with it what its devices' interrupts needed."""
        with self.context.world.lock:
            self.users -= 1
            if not self.users and self.group is not None:
                del self.context.groups[id(self.group)]

    def check_pasid_compatible(self, hwpt: Hwpt, pasid: int) -> None:
        """EINVAL unless ``hwpt`` may go to ``pasid`` beside what is attached elsewhere (devices.md 3.9)."""
        if pasid == 0:
            if not hwpt.pasid_compat:
                used = next((p for p in self.attached if p), None)
                if used is not None:
                    raise KernelError(
                        errno.EINVAL, f"HWPT {hwpt.id} was made without PASID, and PASID {used} is attached"
                    )
            return
        if not hwpt.pasid_compat:
            raise KernelError(errno.EINVAL, f"HWPT {hwpt.id} was made without PASID; PASID {pasid} cannot use it")
        rid = self.attached.get(0)
        if rid is not None and not rid.hwpt.pasid_compat:
            raise KernelError(errno.EINVAL, f"the RID is attached to HWPT {rid.hwpt.id}, which was made without PASID")
