"""Page requests on their way from a device to whoever owns its page table (kernel: drivers/iommu/io-pgfault.c).

Invariants (events-viommu 3):

* An :class:`AttachHandle` stands for one attach: device or group, RID or PASID, this attach. A request is bound to the
  handle, never to the page table or the device, so a later attach of the same page table is another handle.
* A device may report page requests only while it is registered with its IOMMU's :class:`IopfQueue`; it is registered
  while at least one of its attachments (RID and every PASID) has a domain with an ``iopf_handler``.
* Every request with LAST_PAGE set gets exactly one page response: from the handler's side through
  :meth:`FaultGroup.respond`, or INVALID from here when nobody takes it.
* Locks are leaves: nothing is called while one is held.
"""

from __future__ import annotations

import errno
import threading
from enum import IntEnum
from typing import TYPE_CHECKING

from iommufd.errors import KernelError
from iommufd.iommu.driver import RespondsToPages

if TYPE_CHECKING:
    from collections.abc import Iterable

    from iommufd.iommu.device import Device
    from iommufd.iommu.domain import Domain

PASID_VALID, LAST_PAGE = 1, 2  # as in enum iommu_hwpt_pgfault_flags
RID = 0  # the PASID number under which a group keeps the handle of its RID


class ResponseCode(IntEnum):
    """What the hardware is told (kernel: enum iommu_page_response_code). User space may only say the first two."""

    SUCCESS = 0
    INVALID = 1
    FAILURE = 2


class PageRequest:
    """One page request exactly as the hardware reported it (kernel: struct iommu_fault_page_request).

    ``flags``: PASID_VALID 1, LAST_PAGE 2. ``perm``: READ 1, WRITE 2, EXEC 4, PRIV 8. ``addr`` in bytes. ``answer`` is
    what the hardware was told, None until then and for requests without LAST_PAGE.
    """

    __slots__ = ("addr", "answer", "flags", "grpid", "pasid", "perm")

    def __init__(self, *, flags: int, pasid: int, grpid: int, perm: int, addr: int) -> None:
        self.flags = flags
        self.pasid = pasid
        self.grpid = grpid
        self.perm = perm
        self.addr = addr
        self.answer: ResponseCode | None = None

    def __repr__(self) -> str:
        pasid = f" pasid {self.pasid}" if self.flags & PASID_VALID else ""
        return f"<page request {self.addr:#x}{pasid} group {self.grpid} perm {self.perm:#x}>"


class AttachHandle:
    """One attach of a domain to a RID or a PASID (kernel: struct iommu_attach_handle).

    ``owner`` is whom the attacher names as the source of its requests (iommufd: its device object); ``ended`` is set by
    the owner of the fault queue once the attach is over, after which no group may be bound to it.
    """

    __slots__ = ("domain", "ended", "owner", "pasid")

    def __init__(self, domain: Domain, owner: object, pasid: int = RID) -> None:
        self.domain = domain
        self.owner = owner
        self.pasid = pasid
        self.ended = False


class IopfQueue:
    """The queue of one IOMMU instance through which its devices report page requests (kernel: struct iopf_queue)."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class FaultSource:
    """A device's part in fault reporting (kernel: struct iommu_fault_param and the driver's counter of attachments).

    ``attachments`` counts its attachments to domains with a fault handler, ``queue`` is where it is registered,
    ``partial`` are requests whose group is not complete yet, in arrival order.
    """

    __slots__ = ("attachments", "lock", "partial", "queue")

    def __init__(self) -> None:
        self.attachments = 0
        self.queue: IopfQueue | None = None
        self.partial: list[PageRequest] = []
        self.lock = threading.Lock()

    def domain_changes(self, queue: IopfQueue | None, new: Domain | None, old: Domain | None) -> None:
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

    def complete(self, last: PageRequest) -> list[PageRequest] | None:
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
            group = [request for request in self.partial if request.grpid == last.grpid]
            if group:
                self.partial = [request for request in self.partial if request.grpid != last.grpid]
            group.append(last)
            return group


class FaultGroup:
    """The requests of one group, the one with LAST_PAGE at the end, bound to an attach (kernel: struct iopf_group).

    ``cookie`` belongs to the queue's reader (0: not handed out).
    """

    __slots__ = ("cookie", "device", "handle", "requests")

    def __init__(self, device: Device, requests: list[PageRequest], handle: AttachHandle) -> None:
        self.device = device
        self.requests = requests
        self.handle = handle
        self.cookie = 0

    def respond(self, code: ResponseCode) -> None:
        """Answers the hardware, once."""
        respond(self.device, self.requests[-1], code)


def respond(device: Device, request: PageRequest, code: ResponseCode) -> None:
    """Gives the driver its answer to a request with LAST_PAGE set; a driver that does not listen gets none."""
    request.answer = code
    driver = device.driver
    if driver is not None and isinstance(driver, RespondsToPages):
        driver.page_response(device, request, code)


def find_handle(device: Device, request: PageRequest) -> AttachHandle | None:
    """The attach a request belongs to (events-viommu 3.3 rows 1-3), whether or not its domain takes requests."""
    group, driver = device.group, device.driver
    if group is None or driver is None:
        return None
    if request.flags & PASID_VALID:
        handle = group.handle(request.pasid)  # row 1
        if handle is not None:
            return handle
        handle = group.handle(RID)  # row 2
        if handle is None or not driver.user_pasid_table or not handle.domain.nested:
            return None
        return handle
    return group.handle(RID)  # row 3


def report_device_fault(device: Device, request: PageRequest) -> None:
    """The hardware reports a page request of ``device`` (kernel: iommu_report_device_fault; events-viommu 3.3).

    EINVAL when it is dropped, after the hardware was answered INVALID. A handler that refuses the complete group has it
    answered FAILURE, and that is not an error here (devices 10.6).
    """
    try:
        handle = find_handle(device, request)
        if handle is None:
            raise KernelError(errno.EINVAL, f"no page table is attached that {request!r} could belong to")
        handler = handle.domain.iopf_handler
        if handler is None:  # row 4: no second attempt
            raise KernelError(errno.EINVAL, f"the page table attached for {request!r} has no fault queue")
        source = device.fault_source
        if source is None:  # row 5
            raise KernelError(errno.EINVAL, f"{device!r} cannot report page requests")
        requests = source.complete(request)  # rows 5-7
    except KernelError:
        if request.flags & LAST_PAGE:
            respond(device, request, ResponseCode.INVALID)
        raise
    if requests is None:
        return
    group = FaultGroup(device, requests, handle)
    try:
        handler(group)  # row 8
    except KernelError:
        group.respond(ResponseCode.FAILURE)


def answer(groups: Iterable[FaultGroup], code: ResponseCode) -> None:
    """Answers every group with ``code``."""
    for group in groups:
        group.respond(code)
