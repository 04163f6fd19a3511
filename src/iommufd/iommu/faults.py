"""Page requests on their way from a device to whoever owns its page table (kernel: drivers/iommu/io-pgfault.c).

Invariants (events-viommu 3):

* An :class:`AttachHandle` stands for one attach: device or group, RID or PASID, this attach. A fault is bound to the
  handle, never to the page table or the device, so a later attach of the same page table is another handle.
* A device may report faults only while it is registered with its IOMMU's :class:`IopfQueue`; it is registered while at
  least one of its attachments (RID and every PASID) has a domain with an ``iopf_handler``.
* Every request with LAST_PAGE set gets exactly one page response: from the handler's side through
  :meth:`FaultGroup.respond`, or INVALID from here when nobody takes it.
* Locks are leaves: nothing is called while one is held.

The drivers' part: ``Driver.page_response(device, fault, code)``, ``Driver.user_pasid_table``; the domain's part:
``Domain.iopf_handler``; the device's part: ``Device.fault_source`` and ``Device.group.handle(pasid)``.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from iommufd.errors import KernelError

if TYPE_CHECKING:
    from collections.abc import Iterable

PASID_VALID, LAST_PAGE = 1, 2  # as in enum iommu_hwpt_pgfault_flags
RESPONSE_SUCCESS, RESPONSE_INVALID, RESPONSE_FAILURE = 0, 1, 2
RID = 0  # the PASID number under which a group keeps the handle of its RID


class PageFault:
    """One page request exactly as the hardware reported it (kernel: struct iommu_fault_page_request).

    ``flags``: PASID_VALID 1, LAST_PAGE 2. ``perm``: READ 1, WRITE 2, EXEC 4, PRIV 8. ``addr`` in bytes.
    """

    __slots__ = ("addr", "flags", "grpid", "pasid", "perm")

    def __init__(self, *, flags: int, pasid: int, grpid: int, perm: int, addr: int) -> None:
        self.flags = flags
        self.pasid = pasid
        self.grpid = grpid
        self.perm = perm
        self.addr = addr

    def __repr__(self) -> str:
        pasid = f" pasid {self.pasid}" if self.flags & PASID_VALID else ""
        return f"<page request {self.addr:#x}{pasid} group {self.grpid} perm {self.perm:#x}>"


class FaultDomain(Protocol):
    """What routing needs of a domain."""

    @property
    def iopf_handler(self) -> Callable[[FaultGroup], None] | None:
        """Takes a complete group and answers it in its own time; raises KernelError if it cannot take it."""

    @property
    def nested(self) -> bool:
        """Whether it is a user-managed stage 1 over a nesting parent (kernel: IOMMU_DOMAIN_NESTED)."""


class AttachHandle:
    """One attach of a domain to a RID or a PASID (kernel: struct iommu_attach_handle).

    ``owner`` is whom the attacher names as the source of its faults (iommufd: its device object); ``ended`` is set by
    the owner of the fault queue once the attach is over, after which no group may be bound to it.
    """

    __slots__ = ("domain", "ended", "owner", "pasid")

    def __init__(self, domain: FaultDomain, owner: object, pasid: int = RID) -> None:
        self.domain = domain
        self.owner = owner
        self.pasid = pasid
        self.ended = False


class FaultSource:
    """A device's part in fault reporting (kernel: struct iommu_fault_param and the driver's counter of attachments).

    ``attachments`` counts its attachments to domains with a fault handler, ``queue`` is where it is registered,
    ``partial`` are requests whose group is not complete yet, in arrival order.
    """

    __slots__ = ("attachments", "lock", "partial", "queue")

    def __init__(self) -> None:
        self.attachments = 0
        self.queue: IopfQueue | None = None
        self.partial: list[PageFault] = []
        self.lock = threading.Lock()

    def domain_changes(self, queue: IopfQueue | None, new: FaultDomain | None, old: FaultDomain | None) -> None:
        """The device's domain at one RID or PASID becomes ``new`` instead of ``old`` (events-viommu 3.2).

        ``queue`` is the IOMMU's fault queue, None when it has none. ``new`` is counted before ``old`` is released, so
        moving from one fault-capable domain to another never unregisters the device. ENODEV without a queue, EBUSY when
        the device is already registered; then nothing has changed and the attach must fail.
        """
        with self.lock:
            if new is not None and new.iopf_handler is not None:
                if self.attachments == 0:
                    if queue is None:
                        raise KernelError(errno.ENODEV, "the IOMMU has no queue for page requests")
                    if self.queue is not None:
                        raise KernelError(errno.EBUSY, "the device already reports page requests")
                    self.queue = queue
                self.attachments += 1
            if old is not None and old.iopf_handler is not None:
                self.attachments -= 1
                if self.attachments == 0:
                    self.queue = None
                    self.partial.clear()

    def complete(self, last: PageFault) -> list[PageFault] | None:
        """Every partial request of the group of ``last`` in arrival order, then ``last``; they leave the list.

        None when the request does not end its group and is only kept. EINVAL when the device is not registered. Only
        ``grpid`` is compared, not ``pasid`` (events-viommu 3.3 row 7).
        """
        with self.lock:
            if self.queue is None:  # row 5
                raise KernelError(errno.EINVAL, "the device is not registered as a source of page requests")
            if not last.flags & LAST_PAGE:  # row 6
                self.partial.append(last)
                return None
            group = [fault for fault in self.partial if fault.grpid == last.grpid]
            if group:
                self.partial = [fault for fault in self.partial if fault.grpid != last.grpid]
            group.append(last)
            return group


class IopfQueue:
    """The queue of one IOMMU instance through which its devices report page requests (kernel: struct iopf_queue)."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class FaultDriver(Protocol):
    """What routing needs of an IOMMU driver."""

    @property
    def user_pasid_table(self) -> bool:
        """The guest owns the PASID table: faults of a PASID without an attach go to the nested domain on the RID."""

    def page_response(self, device: FaultDevice, fault: PageFault, code: int) -> None:
        """Answers the group whose last request is ``fault``: SUCCESS 0, INVALID 1, FAILURE 2. Cannot fail."""


class HandleSource(Protocol):
    """What routing needs of an IOMMU group."""

    def handle(self, pasid: int) -> AttachHandle | None:
        """The attach in force at ``pasid`` (0: the RID)."""


class FaultDevice(Protocol):
    """What routing needs of a device."""

    @property
    def fault_source(self) -> FaultSource: ...

    @property
    def driver(self) -> FaultDriver: ...

    @property
    def group(self) -> HandleSource: ...


class FaultGroup:
    """The requests of one group, the one with LAST_PAGE at the end, bound to an attach (kernel: struct iopf_group).

    ``cookie`` belongs to the queue's reader (0: not handed out).
    """

    __slots__ = ("_device", "cookie", "faults", "handle")

    def __init__(self, device: FaultDevice, faults: list[PageFault], handle: AttachHandle) -> None:
        self._device = device
        self.faults = faults
        self.handle = handle
        self.cookie = 0

    def respond(self, code: int) -> None:
        """Answers the hardware, once."""
        self._device.driver.page_response(self._device, self.faults[-1], code)


def find_handle(device: FaultDevice, fault: PageFault) -> AttachHandle | None:
    """The attach a fault belongs to (events-viommu 3.3 rows 1-3), whether or not its domain takes faults."""
    if fault.flags & PASID_VALID:
        handle = device.group.handle(fault.pasid)  # row 1
        if handle is not None:
            return handle
        handle = device.group.handle(RID)  # row 2
        if handle is None or not device.driver.user_pasid_table or not handle.domain.nested:
            return None
        return handle
    return device.group.handle(RID)  # row 3


def report_device_fault(device: FaultDevice, fault: PageFault) -> None:
    """The hardware reports a page request of ``device`` (kernel: iommu_report_device_fault; events-viommu 3.3).

    EINVAL when it is dropped, after the hardware was answered INVALID. A handler that refuses the complete group has it
    answered FAILURE, and that is not an error here (devices 10.6).
    """
    try:
        handle = find_handle(device, fault)
        if handle is None:
            raise KernelError(errno.EINVAL, f"no page table is attached that {fault!r} could belong to")
        handler = handle.domain.iopf_handler
        if handler is None:  # row 4: no second attempt
            raise KernelError(errno.EINVAL, f"the page table attached for {fault!r} has no fault queue")
        faults = device.fault_source.complete(fault)  # rows 5-7
    except KernelError:
        if fault.flags & LAST_PAGE:
            device.driver.page_response(device, fault, RESPONSE_INVALID)
        raise
    if faults is None:
        return
    group = FaultGroup(device, faults, handle)
    try:
        handler(group)  # row 8
    except KernelError:
        group.respond(RESPONSE_FAILURE)


def answer(groups: Iterable[FaultGroup], code: int) -> None:
    """Answers every group with ``code``."""
    for group in groups:
        group.respond(code)
