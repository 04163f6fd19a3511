"""Group: devices that only move between page tables together (kernel: struct iommu_group, drivers/iommu/iommu.c).

devices.md 1.1, 1.3, 3.3, 3.4, 3.4b. One Group per isolation group of the hardware, shared by all contexts. Invariants:

* ``domain`` is the RID domain of every member; a switch that fails leaves all members where they were.
* ``owner_cnt`` counts claims. While it is not 0, ``owner`` is who claimed (an iommufd context), or None for a kernel
  driver that uses the DMA API. Unowned, the group is in ``default_domain``; owned and not attached, in
  ``blocking_domain``.
* ``handles`` has the attach in force per PASID; key 0 is the RID.
* Everything happens under ``mutex``; drivers are called with it held, as in the kernel.
"""

from __future__ import annotations

import errno
import logging
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from iommufd.errors import KernelError
from iommufd.iommu.domain import AttachesDevices, Kind, SetsPasids
from iommufd.iommu.driver import AllocatesPaging, AllocatesPagingWithFlags
from iommufd.iommu.faults import RID, AttachHandle

if TYPE_CHECKING:
    from iommufd.iommu.device import Device
    from iommufd.iommu.domain import Domain

log = logging.getLogger(__name__)


class Group:
    """A group of devices. ``default_domain`` is what it uses when nobody owns it."""

    __slots__ = (
        "__weakref__",
        "blocking_domain",
        "default_domain",
        "devices",
        "domain",
        "handles",
        "mutex",
        "name",
        "owner",
        "owner_cnt",
        "recovery_cnt",
    )

    def __init__(self, name: str, default_domain: Domain) -> None:
        self.name = name
        self.devices: list[Device] = []
        self.default_domain = default_domain
        self.blocking_domain: Domain | None = None
        self.domain: Domain = default_domain
        self.handles: dict[int, AttachHandle] = {}
        self.owner: object | None = None
        self.owner_cnt = 0
        self.recovery_cnt = 0
        self.mutex = threading.Lock()

    def add(self, device: Device) -> None:
        """A device joins, in the group's current domain."""
        with self.mutex:
            self.devices.append(device)
            device.group = self

    def remove(self, device: Device) -> None:
        """A device leaves; it must not be attached by itself any more."""
        with self.mutex:
            self.devices.remove(device)
            device.group = None

    def handle(self, pasid: int) -> AttachHandle | None:
        """The attach in force at ``pasid`` (0: the RID)."""
        return self.handles.get(pasid)

    # ------------------------------------------------------------------------------------------------ ownership (1.3)

    def claim(self, owner: object) -> None:
        """DMA ownership for ``owner``: the group leaves its default domain for the blocking one. EPERM, EBUSY,
        EINVAL."""
        with self.mutex:
            if self.owner_cnt:
                if self.owner is not owner:  # step 2
                    raise KernelError(errno.EPERM, f"group {self.name} is owned by somebody else")
                self.owner_cnt += 1  # step 3
                return
            if self.domain is not self.default_domain or self.handles:  # step 4
                raise KernelError(errno.EBUSY, f"group {self.name} is not in its default domain")
            self._choose_blocking_domain()  # step 5
            assert self.blocking_domain is not None
            self._switch(self.blocking_domain)  # step 6
            self.owner = owner  # step 7
            self.owner_cnt = 1

    def release(self) -> None:
        """One claim less; the last one puts the group back into its default domain."""
        with self.mutex:
            if self.owner_cnt > 1:
                self.owner_cnt -= 1
                return
            self.owner_cnt = 0
            self.owner = None
            self._must_switch(self.default_domain)

    def use_dma_api(self) -> None:
        """A kernel driver that uses the DMA API starts on a member: the group is taken, by nobody a user can be.

        EBUSY when somebody else owns it (devices.md 1.4)."""
        with self.mutex:
            if self.owner_cnt and self.owner is not None:
                raise KernelError(errno.EBUSY, f"group {self.name} is owned by a user of its devices")
            self.owner_cnt += 1

    def unuse_dma_api(self) -> None:
        """The kernel driver of :meth:`use_dma_api` leaves."""
        with self.mutex:
            self.owner_cnt -= 1

    def _choose_blocking_domain(self) -> None:
        if self.blocking_domain is not None:
            return
        device = self.devices[0]
        driver = device.driver
        if driver is None:
            raise KernelError(errno.EOPNOTSUPP, f"{device.name} has no IOMMU driver")
        if driver.blocked_domain is not None:
            self.blocking_domain = driver.blocked_domain
            return
        if isinstance(driver, AllocatesPagingWithFlags):
            domain = driver.domain_alloc_paging_flags(device, 0, None)
        elif isinstance(driver, AllocatesPaging):
            empty = driver.domain_alloc_paging(device)
            if empty is None:
                raise KernelError(errno.ENOMEM, f"no memory for an empty page table for group {self.name}")
            domain = empty
        else:
            raise KernelError(errno.EOPNOTSUPP, f"the driver of {device.name} can neither block nor make page tables")
        domain.owner = driver
        self.blocking_domain = domain

    # --------------------------------------------------------------------------------------------------- the RID (3.3)

    def attach(self, domain: Domain, handle: AttachHandle) -> None:
        """First attach of the group's RID. EBUSY when it is attached, EINVAL for another driver's domain."""
        with self.mutex:
            if RID in self.handles:  # 3.3 step 1
                raise KernelError(errno.EBUSY, f"group {self.name} is attached already")
            if self.domain is not self.default_domain and self.domain is not self.blocking_domain:  # step 2
                raise KernelError(errno.EBUSY, f"group {self.name} is in a domain that is neither default nor blocking")
            if not compatible(domain, self.devices[0]):  # step 3
                raise KernelError(errno.EINVAL, f"the domain belongs to another driver than that of group {self.name}")
            self._switch(domain)  # step 4
            self.handles[RID] = handle  # step 5

    def replace(self, domain: Domain, handle: AttachHandle) -> None:
        """Another domain for the attached RID, without passing through the blocking one. Its owner is not tested
        (quirk)."""
        with self.mutex:
            self._switch(domain)
            self.handles[RID] = handle

    def detach(self) -> None:
        """Back to the blocking domain, or to the default one when nobody owns the group. Cannot fail."""
        with self.mutex:
            self.handles.pop(RID, None)
            blocking = self.blocking_domain
            self._must_switch(blocking if self.owner_cnt and blocking is not None else self.default_domain)

    def _switch(self, new: Domain) -> None:
        """3.4: every member in list order, all or none."""
        old = self.domain
        if new is old:  # step 1
            return
        if self.recovery_cnt:  # step 2
            raise KernelError(errno.EBUSY, f"a member of group {self.name} is being reset")
        if new.kind is Kind.BLOCKED or new is self.blocking_domain:  # step 3
            for device in self.devices:
                if device.require_direct:
                    raise KernelError(errno.EINVAL, f"{device.name} needs its 1:1 regions and cannot be blocked")
        if not isinstance(new, AttachesDevices):  # step 4
            raise KernelError(errno.ENODEV, f"the domain cannot be attached to a device of group {self.name}")
        for done, device in enumerate(self.devices):
            try:
                new.attach_dev(device, old)
            except KernelError:  # step 5
                assert isinstance(old, AttachesDevices)
                for undo in self.devices[:done]:
                    old.attach_dev(undo, new)
                raise
        self.domain = new  # step 6

    def _must_switch(self, new: Domain) -> None:
        """3.4, must-succeed mode: recovery is ignored and every member tried; a failure is a bug of the driver."""
        old = self.domain
        if new is old:
            return
        assert isinstance(new, AttachesDevices)
        for device in self.devices:
            try:
                new.attach_dev(device, old)
            except KernelError as error:
                log.warning("%s refuses a domain it must accept: %s", device.name, error)
                blocking = self.blocking_domain
                if blocking is not None and blocking is not new and isinstance(blocking, AttachesDevices):
                    with suppress(KernelError):  # as little can be done about this one
                        blocking.attach_dev(device, old)
        self.domain = new

    # -------------------------------------------------------------------------------------------------- a PASID (3.4b)

    def attach_pasid(self, domain: Domain, pasid: int, handle: AttachHandle) -> None:
        """First attach of ``pasid`` on every member. EOPNOTSUPP, EINVAL, EBUSY or the driver's errno; all or none."""
        with self.mutex:
            blocked = self._blocked()
            if not isinstance(domain, SetsPasids) or blocked is None:  # step 1
                raise KernelError(errno.EOPNOTSUPP, f"the driver of group {self.name} has no PASID support")
            self._check_pasid_change(domain)  # steps 2, 3
            for device in self.devices:  # step 4
                if 0 < device.max_pasids <= pasid:
                    raise KernelError(errno.EINVAL, f"PASID {pasid} of {device.name}, which has {device.max_pasids}")
            if pasid in self.handles:  # step 5
                raise KernelError(errno.EBUSY, f"PASID {pasid} of group {self.name} is attached already")
            members = [d for d in self.devices if d.max_pasids]
            for done, device in enumerate(members):  # step 6
                try:
                    domain.set_dev_pasid(device, pasid, None)
                except KernelError:  # step 7
                    for undo in members[:done]:
                        blocked.set_dev_pasid(undo, pasid, domain)
                    raise
            self.handles[pasid] = handle  # step 8

    def replace_pasid(self, domain: Domain, pasid: int, handle: AttachHandle) -> None:
        """Another domain for an attached PASID. Errors as :meth:`attach_pasid`, EINVAL when it is not attached."""
        with self.mutex:
            if not isinstance(domain, SetsPasids):  # step 1
                raise KernelError(errno.EOPNOTSUPP, "the domain cannot be attached to a PASID")
            self._check_pasid_change(domain)  # steps 2, 3
            current = self.handles.get(pasid)
            if current is None:  # step 5
                raise KernelError(errno.EINVAL, f"PASID {pasid} of group {self.name} is not attached")
            old = current.domain
            if old is not domain:  # step 6
                members = [d for d in self.devices if d.max_pasids]
                for done, device in enumerate(members):
                    try:
                        domain.set_dev_pasid(device, pasid, old)
                    except KernelError:  # step 7
                        self._restore_pasid(members[:done], pasid, old, domain)
                        raise
            self.handles[pasid] = handle  # step 8

    def detach_pasid(self, pasid: int) -> None:
        """The PASID is blocked again on every member that is not being reset. Cannot fail."""
        with self.mutex:
            handle = self.handles.pop(pasid, None)
            blocked = self._blocked()
            if handle is None or blocked is None:
                return
            for device in self.devices:
                if not device.max_pasids or device.parked:
                    continue
                try:
                    blocked.set_dev_pasid(device, pasid, handle.domain)
                except KernelError as error:
                    log.warning("%s refuses to give up PASID %d: %s", device.name, pasid, error)

    def _restore_pasid(self, members: list[Device], pasid: int, old: Domain, new: Domain) -> None:
        for device in members:
            try:
                assert isinstance(old, SetsPasids)
                old.set_dev_pasid(device, pasid, new)
            except KernelError as error:
                log.warning("%s refuses the domain PASID %d had before: %s", device.name, pasid, error)
                blocked = self._blocked()
                if blocked is not None:
                    blocked.set_dev_pasid(device, pasid, new)

    def _blocked(self) -> SetsPasids | None:
        driver = self.devices[0].driver if self.devices else None
        blocked = driver.blocked_domain if driver is not None else None
        return blocked if blocked is not None and isinstance(blocked, SetsPasids) else None

    def _check_pasid_change(self, domain: Domain) -> None:
        if not compatible(domain, self.devices[0]):
            raise KernelError(errno.EINVAL, f"the domain belongs to another driver than that of group {self.name}")
        if self.recovery_cnt:
            raise KernelError(errno.EBUSY, f"a member of group {self.name} is being reset")

    def __repr__(self) -> str:
        return f"<Group {self.name}: {', '.join(d.name for d in self.devices)}>"


def compatible(domain: Domain, device: Device) -> bool:
    """3.3 step 3: whether the core lets ``domain`` near ``device``: same driver, or a static domain of the driver."""
    driver = device.driver
    if driver is None or device.iommu is None:
        return False
    return domain.owner is driver or domain is driver.blocked_domain or domain is driver.identity_domain
