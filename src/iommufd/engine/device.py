"""DEVICE: a device bound to a context, and its page tables (kernel: struct iommufd_device), devices.md 1-3, 9.

Invariants:

* While bound, the device's core group is owned by the context, so every member is either blocked or attached to a page
  table of this context. The driver that bound it holds ``users``, so a program can never destroy it.
* ``users`` counts its attachments too, one per PASID and one for the RID.
* Reserved regions of a RID attachment are in the IOAS under the *physical* device (:attr:`Device.device`), as in the
  kernel.
* A real device keeps the context's file open; the selftest's does not (``keeps_context``).
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from iommufd.engine.failpoints import LOOKUP, RESERVED_REGIONS
from iommufd.engine.group import IGroup, Slot
from iommufd.engine.hwpt import Hwpt, HwptPaging, alloc_paging, put_hwpt
from iommufd.engine.ioas import IOAS
from iommufd.engine.object import PUBLISHED, Object
from iommufd.engine.sw_msi import setup_msi
from iommufd.errors import KernelError
from iommufd.iommu.driver import Capability, RegionType
from iommufd.iommu.faults import AttachHandle

if TYPE_CHECKING:
    from iommufd.engine.context import Context
    from iommufd.engine.io_pagetable import IOPagetable
    from iommufd.engine.task import Task
    from iommufd.iommu.device import Device as CoreDevice
    from iommufd.iommu.driver import Driver
    from iommufd.iommu.group import Group

Change = Callable[["Task | None", Hwpt, int], "tuple[Hwpt, int] | None"]
"""Attach or replace; returns the HWPT to let go and how many references, once no lock is held."""


class Device(Object):
    """A bound device. ``destroying``: being unbound, gets no vDEVICE any more; ``vdevice``: the one it has."""

    __slots__ = ("claimed", "destroying", "device", "enforce_cache_coherency", "igroup", "keeps_context", "vdevice")
    kind = "DEVICE"

    def __init__(self, context: Context, device: CoreDevice) -> None:
        super().__init__(context)
        self.device = device
        self.igroup: IGroup | None = None
        self.claimed: Group | None = None
        self.enforce_cache_coherency = False
        self.keeps_context = False
        self.destroying = False
        self.vdevice: Object | None = None

    @property
    def noiommu(self) -> bool:
        """Whether the device has no IOMMU and everything about it is bookkeeping (devices.md 9)."""
        return is_noiommu(self.device)

    @property
    def driver(self) -> Driver | None:
        """The IOMMU driver; the built-in software one for a no-IOMMU device."""
        return self.context.world.noiommu_driver if self.noiommu else self.device.driver

    def pre_destroy(self) -> None:
        """core 2.6: a live vDEVICE goes with the device and leaves a tombstone."""
        from iommufd.engine.vdevice import remove_vdevice  # vDEVICEs are made of devices, not the other way round

        remove_vdevice(self)

    def destroy(self) -> None:
        """devices.md 2.3 step 3."""
        if self.claimed is not None:
            self.claimed.release()
        if self.igroup is not None:
            self.igroup.put()
        if self.keeps_context:
            self.context.put()

    # ------------------------------------------------------------------------------------------------- attach (3.1-3.5)

    def attach(self, pt_id: int, pasid: int = 0, *, task: Task | None = None) -> int:
        """Attaches the RID (``pasid`` 0) or a PASID to the HWPT or IOAS ``pt_id``; the id of the HWPT it is on now."""
        hwpt = self._change(task, pt_id, pasid, self._attach, attach=True)
        with self.context.world.lock:
            self.users += 1  # 3.1 step 5
        return hwpt

    def replace(self, pt_id: int, pasid: int = 0, *, task: Task | None = None) -> int:
        """Moves an attached RID or PASID to the HWPT or IOAS ``pt_id``; the id of the HWPT it is on now."""
        return self._change(task, pt_id, pasid, self._replace, attach=False)

    def detach(self, pasid: int = 0) -> None:
        """Detaches; cannot fail, does nothing when not attached (3.7)."""
        hwpt = self._detach(pasid)
        if hwpt is None:
            return
        put_hwpt(hwpt)  # step 5
        with self.context.world.lock:
            self.users -= 1

    def attached(self, pasid: int = 0) -> Hwpt | None:
        """The HWPT this device is attached to at ``pasid``."""
        slot = self._group.attached.get(pasid)
        return slot.hwpt if slot is not None and self.id in slot.devices else None

    def pasids(self) -> list[int]:
        """The PASIDs (without the RID) this device is attached at, ascending."""
        with self._group.lock:
            return sorted(p for p, slot in self._group.attached.items() if p and self.id in slot.devices)

    @property
    def _group(self) -> IGroup:
        assert self.igroup is not None
        return self.igroup

    def _change(self, task: Task | None, pt_id: int, pasid: int, change: Change, *, attach: bool) -> int:
        """devices.md 3.1."""
        objects = self.context.objects
        if self.context.world.failpoint(LOOKUP, task):
            raise KernelError(errno.ENOENT, f"fault injection: lookup of id {pt_id}")
        obj = objects.get(pt_id)  # step 1
        released: tuple[Hwpt, int] | None = None
        try:
            if isinstance(obj, Hwpt):  # step 2
                released = change(task, obj, pasid)
                return pt_id
            if isinstance(obj, IOAS):  # step 3
                hwpt, released = self._search(task, obj, pasid, change, attach=attach)
                return hwpt.id
            raise KernelError(errno.EINVAL, f"id {pt_id} is of type {obj.kind}, neither an IOAS nor an HWPT")  # step 4
        finally:
            objects.put(obj)
            if released is not None:
                put_hwpt(*released)

    def _search(
        self, task: Task | None, ioas: IOAS, pasid: int, change: Change, *, attach: bool
    ) -> tuple[HwptPaging, tuple[Hwpt, int] | None]:
        """The automatic HWPT of ``ioas`` that fits, or a new one (devices.md 3.5)."""
        objects = self.context.objects
        with ioas.mutex:
            for candidate in list(ioas.hwpts):  # step 1
                assert isinstance(candidate, HwptPaging)
                if not candidate.auto_domain or not _hold(candidate):
                    continue
                try:
                    return candidate, change(task, candidate, pasid)
                except KernelError as error:
                    if error.errno != errno.EINVAL:
                        raise
                finally:
                    objects.put(candidate)
            made: list[HwptPaging] = []

            def reserve(hwpt: HwptPaging) -> HwptPaging:
                objects.reserve(hwpt)
                made.append(hwpt)
                return hwpt

            released: tuple[Hwpt, int] | None = None
            try:
                if attach:  # step 3a
                    hwpt = alloc_paging(
                        task,
                        ioas,
                        self,
                        0,
                        None,
                        reserve=reserve,
                        attach=lambda new: _nothing(change(task, new, pasid)),
                        detach=lambda: self._undo_attach(pasid),
                    )
                else:  # step 3b
                    hwpt = alloc_paging(task, ioas, self, 0, None, reserve=reserve)
                    released = change(task, hwpt, pasid)
            except BaseException:
                for hwpt in made:
                    objects.abort(hwpt)
                raise
            hwpt.auto_domain = True  # step 4
            hwpt.list_locked()
            with self.context.world.lock:
                objects.publish(hwpt)
            return hwpt, released

    def _undo_attach(self, pasid: int) -> None:
        hwpt = self._detach(pasid)
        assert hwpt is not None
        with self.context.world.lock:
            hwpt.users -= 1

    def _attach(self, task: Task | None, hwpt: Hwpt, pasid: int) -> None:
        """devices.md 3.2."""
        igroup, group = self._group, self.device.group
        paging = hwpt.paging
        table = paging.ioas.io_pagetable
        reserves = pasid == 0 and not self.noiommu
        with igroup.lock:
            slot = igroup.attached.get(pasid)  # step 1
            if slot is not None:
                if self.id in slot.devices:  # step 2
                    raise KernelError(errno.EBUSY, f"{self._at(pasid)} is attached to HWPT {slot.hwpt.id} already")
                if slot.hwpt is not hwpt:  # step 3
                    raise KernelError(errno.EINVAL, f"the group of device {self.id} is attached to HWPT {slot.hwpt.id}")
            if reserves:
                self._reserve_regions(task, table, attach=True)  # step 4
            if slot is None:
                try:
                    if reserves:
                        setup_msi(igroup, paging)  # step 5
                    self._check_fault(hwpt)  # step 6
                    igroup.check_pasid_compatible(hwpt, pasid)  # step 7
                    handle = None
                    if group is not None:  # step 8
                        handle = AttachHandle(hwpt.core_domain, self, pasid)
                        if pasid == 0:  # step 9
                            group.attach(hwpt.core_domain, handle)
                        else:
                            group.attach_pasid(hwpt.core_domain, pasid, handle)
                except BaseException:
                    if reserves:
                        table.remove_reserved(self.device)
                    raise
                slot = igroup.attached[pasid] = Slot(hwpt, handle)
            slot.devices[self.id] = self  # step 10
            with self.context.world.lock:
                hwpt.users += 1

    def _replace(self, task: Task | None, hwpt: Hwpt, pasid: int) -> tuple[Hwpt, int] | None:
        """devices.md 3.6."""
        igroup, group = self._group, self.device.group
        paging = hwpt.paging
        table = paging.ioas.io_pagetable
        reserves = pasid == 0 and not self.noiommu
        with igroup.lock:
            slot = igroup.attached.get(pasid)
            if slot is None or self.id not in slot.devices:  # steps 1, 2
                raise KernelError(errno.EINVAL, f"{self._at(pasid)} is not attached, so nothing can be replaced")
            old, old_handle = slot.hwpt, slot.handle
            if hwpt is old:  # step 3
                return None
            old_table = old.paging.ioas.io_pagetable
            moves = old_table is not table
            devices = list(slot.devices.values())
            handle = None
            try:
                if reserves and moves:
                    for idev in devices:  # step 4
                        idev._reserve_regions(task, table, attach=False)
                if reserves:
                    setup_msi(igroup, paging)  # step 5
                self._check_fault(hwpt)  # step 6
                igroup.check_pasid_compatible(hwpt, pasid)
                if group is not None:  # step 7
                    handle = AttachHandle(hwpt.core_domain, self, pasid)
                    if pasid == 0:  # step 8
                        group.replace(hwpt.core_domain, handle)
                    else:
                        group.replace_pasid(hwpt.core_domain, pasid, handle)
            except BaseException:
                if reserves:  # also within one IOAS (quirk)
                    for idev in devices:
                        table.remove_reserved(idev.device)
                raise
            if old.fault is not None and old_handle is not None:
                old.fault.discard(old_handle)  # step 9
            if pasid == 0 and moves and reserves:
                for idev in devices:  # step 10
                    old_table.remove_reserved(idev.device)
            slot.hwpt, slot.handle = hwpt, handle  # step 11
            with self.context.world.lock:
                hwpt.users += len(devices)
            return old, len(devices)

    def _detach(self, pasid: int) -> Hwpt | None:
        """devices.md 3.7 steps 1-4; the HWPT whose reference is to be dropped."""
        igroup, group = self._group, self.device.group
        with igroup.lock:
            slot = igroup.attached.get(pasid)
            if slot is None:  # step 1
                return None
            slot.devices.pop(self.id, None)  # step 2
            hwpt = slot.hwpt
            if not slot.devices:  # step 3
                if group is not None:
                    if pasid == 0:
                        group.detach()
                    else:
                        group.detach_pasid(pasid)
                if hwpt.fault is not None and slot.handle is not None:
                    hwpt.fault.discard(slot.handle)
                del igroup.attached[pasid]
            if pasid == 0:  # step 4
                hwpt.paging.ioas.io_pagetable.remove_reserved(self.device)
            return hwpt

    def _check_fault(self, hwpt: Hwpt) -> None:
        if hwpt.fault is not None and self.device.vf_with_pri:
            raise KernelError(
                errno.EINVAL, f"{self.device.name} is a virtual function; its page requests cannot be told apart"
            )

    def _reserve_regions(self, task: Task | None, table: IOPagetable, *, attach: bool) -> None:
        """devices.md 3.8: the device's reserved regions go into the IOAS, all or none."""
        if self.context.world.failpoint(RESERVED_REGIONS, task):
            raise KernelError(errno.EINVAL, f"fault injection: reserved regions of {self.device.name}")
        msi = sw_msi = 0
        try:
            for region in self.device.resv_regions():
                if region.type is RegionType.DIRECT_RELAXABLE:  # step 1
                    continue
                if attach and region.type is RegionType.MSI:  # step 2
                    msi += 1
                if attach and region.type is RegionType.SW_MSI:
                    sw_msi += 1
                    self._group.sw_msi_start = region.start
                table.reserve(region.start, region.start + region.length - 1, self.device)  # steps 3, 4
            if attach and (sw_msi > 1 or (sw_msi and msi)):  # step 5
                raise KernelError(errno.EINVAL, f"{self.device.name} has {msi} MSI and {sw_msi} SW_MSI windows")
        except BaseException:
            table.remove_reserved(self.device)
            raise

    def _at(self, pasid: int) -> str:
        return f"PASID {pasid} of device {self.id}" if pasid else f"device {self.id}"


def _nothing(_: object) -> None:
    """An attach lets nothing go."""


def _hold(hwpt: HwptPaging) -> bool:
    """Keeps a candidate from being destroyed meanwhile; False when it is being destroyed or not yet published."""
    with hwpt.context.world.lock:
        if hwpt.state != PUBLISHED:
            return False
        hwpt.users += 1
        hwpt.wait += 1
        return True


def is_noiommu(device: CoreDevice) -> bool:
    """Whether a device has no IOMMU state at all."""
    return device.driver is None and device.iommu is None and device.group is None


def bind(context: Context, device: CoreDevice, *, keep_context: bool = True) -> Device:
    """Binds ``device`` to ``context`` (devices.md 2.1); the DEVICE is published and its ``id`` valid.

    DMA of the whole group is blocked until an attach. EINVAL, ENODEV, EPERM, EBUSY, or the driver's errno."""
    world = context.world
    idev = Device(context, device)
    context.objects.reserve(idev)  # step 1
    try:
        if is_noiommu(device) and world.noiommu_driver is not None:  # step 2
            idev.igroup = IGroup.get(context, None)
        else:
            driver, group = device.driver, device.group
            if driver is None or not driver.capable(device, Capability.CACHE_COHERENCY):  # step 3
                raise KernelError(errno.EINVAL, f"{device.name} has no IOMMU that makes its DMA cache coherent")
            if group is None:  # step 4
                raise KernelError(errno.ENODEV, f"{device.name} is in no IOMMU group")
            idev.igroup = IGroup.get(context, group)  # step 5
            unsafe = next((d for d in group.devices if not d.isolated_msi), None)
            if unsafe is not None and not world.allow_unsafe_interrupts:  # step 6
                raise KernelError(errno.EPERM, f"the interrupts of {unsafe.name} are not isolated")
            group.claim(context)  # step 7
            idev.claimed = group
            idev.enforce_cache_coherency = driver.capable(device, Capability.ENFORCE_CACHE_COHERENCY)  # step 8
    except BaseException:
        context.objects.abort(idev)
        raise
    if keep_context:  # step 9
        context.get()
        idev.keeps_context = True
    with world.lock:
        idev.users += 1
        context.objects.publish(idev)
    return idev


def unbind(idev: Device) -> None:
    """Gives the device back (devices.md 2.3). It must be detached; if it is not, the object stays until the context
    goes."""
    idev.context.objects.remove_by_driver(idev)


def has_group(context: Context | None, group: Group | None) -> bool:
    """iommufd_ctx_has_group: whether some device of ``group`` is bound to ``context`` (devices.md 1.5)."""
    if context is None or group is None:
        return False
    return any(isinstance(obj, Device) and obj.device.group is group for obj in context.objects)
