"""Hardware page tables (kernel: struct iommufd_hw_pagetable, iommufd_hwpt_paging, iommufd_hwpt_nested), devices.md 4.

Invariants:

* A HWPT_PAGING's domain is in its IOAS's list of domains from creation to destruction, so it maps exactly the IOAS's
  areas. It references the IOAS; a HWPT_NESTED references what it was allocated on, its parent or a vIOMMU.
* ``auto_domain``: made by attaching to an IOAS. Whoever drops a reference on such a one tries to destroy it; it goes
  when only the table holds it (devices.md 3.5).
* A HWPT with a fault queue references the queue from :meth:`link_fault` on.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from iommufd.engine.object import Object
from iommufd.errors import KernelError
from iommufd.iommu.domain import EnforcesCoherency, Kind
from iommufd.iommu.driver import AllocatesNested, AllocatesPaging, AllocatesPagingWithFlags, Capability
from iommufd.uapi import iommufd as u

if TYPE_CHECKING:
    from iommufd.engine.context import Context
    from iommufd.engine.device import Device
    from iommufd.engine.fault import FaultQueue
    from iommufd.engine.ioas import IOAS
    from iommufd.engine.task import Task
    from iommufd.iommu.domain import Domain, PagingDomain
    from iommufd.iommu.driver import Driver
    from iommufd.iommu.user_data import UserData

NEST_PARENT = u.IOMMU_HWPT_ALLOC_NEST_PARENT
DIRTY_TRACKING = u.IOMMU_HWPT_ALLOC_DIRTY_TRACKING
FAULT_ID_VALID = u.IOMMU_HWPT_FAULT_ID_VALID
PASID = u.IOMMU_HWPT_ALLOC_PASID
PAGING_FLAGS = NEST_PARENT | DIRTY_TRACKING | FAULT_ID_VALID | PASID
NESTED_FLAGS = FAULT_ID_VALID | PASID


class Hwpt(Object):
    """What both kinds have: ``domain`` once allocated, ``fault`` (the queue of its page requests) and the PASID
    mark."""

    __slots__ = ("_domain", "fault", "pasid_compat")

    def __init__(self, context: Context, pasid_compat: bool) -> None:
        super().__init__(context)
        self._domain: Domain | None = None
        self.fault: FaultQueue | None = None
        self.pasid_compat = pasid_compat

    @property
    def core_domain(self) -> Domain:
        """The domain as the core sees it, whatever its kind."""
        assert self._domain is not None
        return self._domain

    @property
    def paging(self) -> HwptPaging:
        """Itself, or the nesting parent."""
        raise AssertionError("a HWPT of no kind")

    def link_fault(self, fault: FaultQueue) -> None:
        """Page requests go to ``fault`` from now on (devices.md 4.2 step 7)."""
        with self.context.world.lock:
            fault.users += 1
        self.fault = fault
        self.core_domain.iopf_handler = fault.deliver

    def _free(self) -> None:
        """devices.md 4.8: the domain first, then the fault queue."""
        if self._domain is not None:
            self._domain.free()
        if self.fault is not None:
            with self.context.world.lock:
                self.fault.users -= 1


class HwptPaging(Hwpt):
    """A kernel-managed page table that maps an IOAS."""

    __slots__ = (
        "_in_ioas",
        "_listed",
        "_paging_domain",
        "auto_domain",
        "enforce_cache_coherency",
        "ioas",
        "msi_present",
        "nest_parent",
    )
    kind = "HWPT_PAGING"

    def __init__(self, context: Context, ioas: IOAS, *, pasid_compat: bool = False, nest_parent: bool = False) -> None:
        super().__init__(context, pasid_compat)
        self._paging_domain: PagingDomain | None = None  # the domain again, as what it is
        self.ioas = ioas
        self.nest_parent = nest_parent
        self.auto_domain = False
        self.enforce_cache_coherency = False
        self.msi_present: set[int] = set()
        self._in_ioas = False
        self._listed = False
        with context.world.lock:
            ioas.users += 1

    @property
    def domain(self) -> PagingDomain:
        assert self._paging_domain is not None
        return self._paging_domain

    @domain.setter
    def domain(self, domain: PagingDomain) -> None:
        self._domain = self._paging_domain = domain

    @property
    def paging(self) -> HwptPaging:
        return self

    def add_to_ioas(self, task: Task | None) -> None:
        """Maps the IOAS's areas (devices.md 3.8)."""
        self.ioas.io_pagetable.add_domain(self.domain, task)
        self._in_ioas = True

    def list_locked(self) -> None:
        """Joins the IOAS's list; ``ioas.mutex`` is held. From here on an automatic search may find it."""
        self.ioas.hwpts.append(self)
        self._listed = True

    def destroy(self) -> None:
        """devices.md 4.8."""
        if self._listed:
            with self.ioas.mutex:
                self.ioas.hwpts.remove(self)
        if self._in_ioas:
            self.ioas.io_pagetable.remove_domain(self.domain)
        self._free()
        with self.context.world.lock:
            self.ioas.users -= 1


class HwptNested(Hwpt):
    """A user-managed stage 1. ``holder`` is what it was allocated on and references: its parent, or a vIOMMU."""

    __slots__ = ("holder", "parent")
    kind = "HWPT_NESTED"

    def __init__(self, context: Context, parent: HwptPaging, holder: Object, *, pasid_compat: bool) -> None:
        super().__init__(context, pasid_compat)
        self.parent = parent
        self.holder = holder
        with context.world.lock:
            holder.users += 1

    @property
    def domain(self) -> Domain:
        assert self._domain is not None
        return self._domain

    @property
    def paging(self) -> HwptPaging:
        return self.parent

    def adopt(self, domain: Domain, owner: Driver) -> None:
        """Takes what the driver allocated; EOPNOTSUPP when it is not a nested domain (a bug of the driver)."""
        domain.owner = owner
        self._domain = domain
        if domain.kind is not Kind.NESTED:
            raise KernelError(errno.EOPNOTSUPP, f"the driver made a {domain.kind.value} domain, not a nested one")

    def destroy(self) -> None:
        """devices.md 4.8."""
        self._free()
        with self.context.world.lock:
            self.holder.users -= 1


def alloc_paging(
    task: Task | None,
    ioas: IOAS,
    idev: Device,
    flags: int,
    data: UserData | None,
    *,
    reserve: Callable[[HwptPaging], HwptPaging],
    attach: Callable[[HwptPaging], None] | None = None,
    detach: Callable[[], None] | None = None,
) -> HwptPaging:
    """A HWPT_PAGING on ``ioas`` for ``idev`` (devices.md 4.3), reserved with ``reserve`` and not yet listed.

    ``attach`` (automatic mode) runs before the IOAS's contents are mapped, ``detach`` undoes it. On KernelError the
    caller aborts the object, if it was reserved."""
    driver = idev.driver  # step 1
    if driver is None:
        raise KernelError(errno.ENODEV, f"{idev.device.name} has no IOMMU driver")
    if (flags or data is not None) and not isinstance(driver, AllocatesPagingWithFlags):  # step 2
        raise KernelError(errno.EOPNOTSUPP, f"driver {driver.name} makes page tables without flags and data only")
    if flags & ~PAGING_FLAGS:  # step 3
        raise KernelError(errno.EOPNOTSUPP, f"unknown flags {flags & ~PAGING_FLAGS:#x}")
    if flags & DIRTY_TRACKING and not driver.capable(idev.device, Capability.DIRTY_TRACKING):  # step 4
        raise KernelError(errno.EOPNOTSUPP, f"{idev.device.name} cannot track dirty pages")
    if flags & FAULT_ID_VALID and flags & NEST_PARENT:  # step 5
        raise KernelError(errno.EOPNOTSUPP, "a nesting parent cannot have a fault queue")
    hwpt = HwptPaging(  # steps 6, 7
        ioas.context, ioas, pasid_compat=bool(flags & PASID), nest_parent=bool(flags & NEST_PARENT)
    )
    reserve(hwpt)
    hwpt.domain = _driver_paging(driver, idev, flags & ~FAULT_ID_VALID, data)  # step 8
    hwpt.domain.owner = driver
    if idev.enforce_cache_coherency:  # step 9
        domain = hwpt.domain
        if not isinstance(domain, EnforcesCoherency) or not domain.enforce_cache_coherency():
            raise KernelError(errno.EINVAL, f"driver {driver.name} cannot enforce the cache coherency it reported")
        hwpt.enforce_cache_coherency = True
    if attach is not None:  # step 10
        attach(hwpt)
    try:
        hwpt.add_to_ioas(task)  # step 11
    except BaseException:
        if detach is not None:
            detach()
        raise
    return hwpt


def _driver_paging(driver: Driver, idev: Device, flags: int, data: UserData | None) -> PagingDomain:
    """devices.md 4.3 step 8."""
    if isinstance(driver, AllocatesPagingWithFlags):
        return driver.domain_alloc_paging_flags(idev.device, flags, data)
    if not isinstance(driver, AllocatesPaging):
        raise KernelError(errno.EOPNOTSUPP, f"driver {driver.name} makes no page tables")
    domain = driver.domain_alloc_paging(idev.device)
    if domain is None:
        raise KernelError(errno.ENOMEM, f"driver {driver.name} has no memory for a page table")
    return domain


def alloc_nested(
    parent: HwptPaging, idev: Device, flags: int, data: UserData | None, *, reserve: Callable[[HwptNested], HwptNested]
) -> HwptNested:
    """A HWPT_NESTED directly on ``parent`` (devices.md 4.4)."""
    driver = idev.driver
    if flags & ~NESTED_FLAGS or data is None or driver is None or not isinstance(driver, AllocatesNested):  # step 1
        raise KernelError(
            errno.EOPNOTSUPP,
            f"a nested page table takes flags {NESTED_FLAGS:#x} (here {flags:#x}), data, and a driver that makes them",
        )
    if parent.auto_domain or not parent.nest_parent or parent.domain.owner is not driver:  # step 2
        raise KernelError(errno.EINVAL, f"HWPT {parent.id} is not a nesting parent of {idev.device.name}'s driver")
    hwpt = HwptNested(parent.context, parent, parent, pasid_compat=bool(flags & PASID))  # step 3
    reserve(hwpt)
    domain = driver.domain_alloc_nested(idev.device, parent.domain, flags & ~FAULT_ID_VALID, data)  # step 4
    hwpt.adopt(domain, driver)  # step 5
    return hwpt


def put_hwpt(hwpt: Hwpt, count: int = 1) -> None:
    """Drops ``count`` attachments' references; an automatic HWPT that nobody else holds goes (devices.md 3.5).

    Call without ``igroup.lock`` and ``ioas.mutex``."""
    with hwpt.context.world.lock:
        hwpt.users -= count
    if isinstance(hwpt, HwptPaging) and hwpt.auto_domain:
        hwpt.context.objects.destroy_if_idle(hwpt)
