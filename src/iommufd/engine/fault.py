"""FAULT: a queue of page requests for user space (kernel: struct iommufd_fault).

Invariants (events-viommu 2-5):

* A group of page requests is bound to one attach (:class:`~iommufd.iommu.faults.AttachHandle`). It is in the deliver
  list until read as a whole, then in the response table under its cookie until answered; every group is answered once.
* When an attach ends, every group bound to it is answered INVALID in both places, and a group that was on its way then
  is refused: nothing bound to an ended attach is ever readable.
* A group gets its cookie when it is read and gives it back when it is answered.
* Locks: ``mutex`` serialises read, write and the end of an attach and is held over the caller's memory; ``World.lock``
  guards the deliver list, because reports come from any thread.
"""

from __future__ import annotations

import errno
from collections import deque
from struct import Struct
from typing import TYPE_CHECKING

from iommufd.engine.cookies import ZERO_BECOMES_FREE, Cookies
from iommufd.engine.dispatch import Call, Handler, Respond
from iommufd.engine.eventq import EventQueue, QueueFile, open_queue, stream_only
from iommufd.engine.file import POLLIN, POLLOUT, POLLRDNORM
from iommufd.engine.object import Object
from iommufd.errors import KernelError
from iommufd.iommu.faults import FaultGroup, ResponseCode, answer
from iommufd.uapi.commands import BY_NAME, Command
from iommufd.uapi.iommufd import (
    IOMMUFD_PAGE_RESP_INVALID,
    IOMMUFD_PAGE_RESP_SUCCESS,
    iommu_fault_alloc,
    iommu_hwpt_page_response,
    iommu_hwpt_pgfault,
)

if TYPE_CHECKING:
    from iommufd.engine.context import Context
    from iommufd.engine.task import Task
    from iommufd.iommu.faults import AttachHandle

MESSAGE = iommu_hwpt_pgfault.SIZE  # 40
RESPONSE = iommu_hwpt_page_response.SIZE  # 8
MAX_RW_COUNT = 0x7FFFF000  # what the VFS makes of any larger count

_RESPONSE = Struct("<II")


class FaultQueue(EventQueue):
    """The object. ``deliver`` takes groups from :func:`~iommufd.iommu.faults.report_device_fault`."""

    __slots__ = ("_cookies", "_deliver", "_response")
    kind = "FAULT"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._deliver: deque[FaultGroup] = deque()
        self._response: dict[int, FaultGroup] = {}
        self._cookies = Cookies(leaky=ZERO_BECOMES_FREE in context.world.defects)

    def ready(self) -> bool:
        return bool(self._deliver)

    @property
    def waiting(self) -> int:
        """Groups not read yet."""
        return len(self._deliver)

    @property
    def awaiting(self) -> int:
        """Groups read and not yet answered."""
        return len(self._response)

    def deliver(self, group: FaultGroup) -> None:
        """A complete group for one of the page tables this queue serves (events-viommu 3.3 row 8).

        EINVAL when its attach ended meanwhile."""
        world = self.context.world
        with world.lock:
            if group.handle.ended:
                raise KernelError(errno.EINVAL, "the attach these page requests belong to is over")
            self._deliver.append(group)
        if world.instruments:
            last = group.requests[-1]
            world.event("fault", queue=self.id, pasid=last.pasid, grpid=last.grpid, addr=last.addr)
        self.wake()

    def discard(self, handle: AttachHandle) -> None:
        """The attach ``handle`` is over: its groups, read or not, are answered INVALID (events-viommu 5)."""
        with self.mutex:
            with self.context.world.lock:
                handle.ended = True
                gone = [group for group in self._deliver if group.handle is handle]
                if gone:
                    self._deliver = deque(group for group in self._deliver if group.handle is not handle)
            unread = len(gone)
            for cookie in [c for c, group in self._response.items() if group.handle is handle]:
                gone.append(self._response.pop(cookie))
                self._cookies.release(cookie)
        if unread:
            self.wake()
        answer(gone, ResponseCode.INVALID)

    def destroy(self) -> None:
        """No page table and no file is left, so usually no group either; what there is is answered INVALID."""
        groups = [*self._deliver, *self._response.values()]
        self._deliver.clear()
        self._response.clear()
        answer(groups, ResponseCode.INVALID)

    def read(self, task: Task, addr: int, count: int) -> int:
        """Whole groups into ``[addr, addr + count)``; the bytes written (events-viommu 4.1)."""
        count = min(count, MAX_RW_COUNT)
        if count % MESSAGE:  # row 1
            raise KernelError(errno.ESPIPE, f"a read of {count} bytes is not a whole number of {MESSAGE}-byte messages")
        done = 0
        with self.mutex:
            while self._deliver:  # row 2
                group = self._deliver[0]
                size = len(group.requests) * MESSAGE
                if done >= count or size > count - done:  # row 3
                    if not done:
                        raise KernelError(errno.EINVAL, f"the next group needs {size} bytes, the read offers {count}")
                    break
                cookie = self._cookies.take()  # row 4
                try:
                    task.write(addr + done, messages(group, cookie))  # row 5
                except KernelError:
                    self._cookies.release(cookie)
                    if not done:
                        raise
                    break
                group.cookie = cookie
                self._response[cookie] = group
                with self.context.world.lock:
                    self._deliver.popleft()
                done += size  # row 6
        if done:
            self.wake()
        return done

    def write(self, task: Task, addr: int, count: int) -> int:
        """Responses from ``[addr, addr + count)``; the bytes taken (events-viommu 4.2)."""
        count = min(count, MAX_RW_COUNT)
        if count % RESPONSE:  # row 1
            raise KernelError(errno.ESPIPE, f"a write of {count} bytes is not whole {RESPONSE}-byte responses")
        done = 0
        with self.mutex:
            while done < count:
                try:
                    cookie, code = _RESPONSE.unpack(task.read(addr + done, RESPONSE))  # row 2
                    if code not in (IOMMUFD_PAGE_RESP_SUCCESS, IOMMUFD_PAGE_RESP_INVALID):  # row 3
                        raise KernelError(errno.EINVAL, f"{code} is not a response code (0 success, 1 invalid)")
                    group = self._response.pop(cookie, None)  # row 4
                    if group is None:
                        self._cookies.refused(cookie)
                        raise KernelError(errno.EINVAL, f"no group with cookie {cookie} waits for a response")
                except KernelError:
                    if not done:
                        raise
                    break
                self._cookies.release(cookie)  # row 5
                group.respond(ResponseCode(code))
                done += RESPONSE
        return done


def messages(group: FaultGroup, cookie: int) -> bytes:
    """What a reader gets of a group (events-viommu 3.4)."""
    owner = group.handle.owner
    assert isinstance(owner, Object)
    return b"".join(
        iommu_hwpt_pgfault(
            flags=request.flags,
            dev_id=owner.id,
            pasid=request.pasid,
            grpid=request.grpid,
            perm=request.perm,
            addr=request.addr,
            cookie=cookie,
        ).pack()
        for request in group.requests
    )


class FaultFile(QueueFile):
    """The descriptor a FAULT_QUEUE_ALLOC returns."""

    link = "anon_inode:[iommufd-pgfault]"

    def __init__(self, fault: FaultQueue) -> None:
        super().__init__(fault)
        self.fault = fault

    def read(self, task: Task, addr: int, count: int, pos: int | None = None) -> int:
        stream_only(pos)
        return self.fault.read(task, addr, count)

    def write(self, task: Task, addr: int, count: int, pos: int | None = None) -> int:
        stream_only(pos)
        return self.fault.write(task, addr, count)

    def poll(self) -> int:
        return POLLOUT | POLLIN | POLLRDNORM if self.fault.ready() else POLLOUT


def fault_queue_alloc(call: Call) -> None:
    """IOMMU_FAULT_QUEUE_ALLOC (events-viommu 2)."""
    cmd = call.cmd
    assert isinstance(cmd, iommu_fault_alloc)
    if cmd.flags:  # row 1
        raise KernelError(errno.EOPNOTSUPP, f"unknown flags {cmd.flags:#x}")
    fault = call.reserve(FaultQueue(call.context))  # row 2
    cmd.out_fault_id = fault.id
    cmd.out_fault_fd = open_queue(call, FaultFile(fault))  # rows 3, 4


ROWS: list[tuple[Command, Handler, Respond]] = [
    (BY_NAME["IOMMU_FAULT_QUEUE_ALLOC"], fault_queue_alloc, Respond.ON_SUCCESS),
]
