"""VEVENTQ: events of a virtual IOMMU for user space (kernel: struct iommufd_veventq).

Invariants (events-viommu 8):

* A vIOMMU has at most one queue per event type, from its creation until it is destroyed, open file or not.
* Every event takes one sequence number, stored or lost. A LOST entry is only ever the last one of the list, carries the
  number of the latest lost event, and goes when a later event is stored: the gap in the numbers tells of it then. So
  the list is ``events`` followed by ``lost``, if that is a number.
* ``num_events`` counts stored events until their bytes have been read; it never exceeds ``depth``.
"""

from __future__ import annotations

import errno
from collections import deque
from typing import TYPE_CHECKING

from iommufd.engine.dispatch import Call, Handler, Respond
from iommufd.engine.eventq import EventQueue, QueueFile, open_queue, stream_only
from iommufd.engine.failpoints import SLAB
from iommufd.engine.file import POLLIN, POLLRDNORM
from iommufd.engine.viommu import Viommu
from iommufd.errors import KernelError
from iommufd.uapi.commands import BY_NAME, Command
from iommufd.uapi.iommufd import (
    IOMMU_VEVENTQ_FLAG_LOST_EVENTS,
    IOMMU_VEVENTQ_TYPE_DEFAULT,
    iommu_veventq_alloc,
    iommufd_vevent_header,
)

if TYPE_CHECKING:
    from iommufd.engine.context import Context
    from iommufd.engine.task import Task

HEADER = iommufd_vevent_header.SIZE  # 8
MAX_DEPTH = 1 << 19
SEQUENCE_MASK = 0x7FFFFFFF


class VeventQueue(EventQueue):
    """The object. A driver's events arrive through :meth:`~iommufd.engine.viommu.Viommu.report_event`."""

    __slots__ = ("depth", "events", "lost", "sequence", "type", "viommu")
    kind = "VEVENTQ"

    def __init__(self, context: Context, viommu: Viommu, type: int, depth: int) -> None:
        super().__init__(context)
        self.viommu = viommu
        self.type = type
        self.depth = depth
        self.events: deque[tuple[int, bytes]] = deque()  # (sequence, data)
        self.lost: int | None = None
        self.sequence = 0  # of the next event

    @property
    def num_events(self) -> int:
        return len(self.events)

    def ready(self) -> bool:
        return self.lost is not None or bool(self.events)

    def store_locked(self, data: bytes, *, memory: bool) -> None:
        """One event (events-viommu 8.2 rows 2-6), under ``World.lock``; call :meth:`wake` afterwards.

        Without ``memory`` for it, it is lost."""
        sequence = self.sequence
        self.sequence = (sequence + 1) & SEQUENCE_MASK
        if not memory or self.num_events == self.depth:  # rows 2, 3
            self.lost = sequence
        else:
            self.lost = None  # row 5
            self.events.append((sequence, data))

    def destroy(self) -> None:
        world = self.context.world
        with world.lock:
            if self.viommu.veventqs.get(self.type) is self:
                del self.viommu.veventqs[self.type]
                self.viommu.users -= 1
            self.events.clear()
            self.lost = None

    def read(self, task: Task, addr: int, count: int) -> int:
        """Headers and data of whole events into ``[addr, addr + count)``; the bytes written (events-viommu 8.3)."""
        if count < HEADER:  # row 1
            raise KernelError(errno.EINVAL, f"a read of {count} bytes has no room for a header of {HEADER}")
        done = 0
        with self.mutex:
            while True:
                if self.events:
                    sequence, data = self.events[0]
                    entry = iommufd_vevent_header(sequence=sequence).pack() + data
                    lost = None
                else:
                    lost = self.lost
                    if lost is None:  # row 2
                        break
                    if self.context.world.failpoint(SLAB, task):  # row 3
                        if not done:
                            raise KernelError(errno.ENOMEM, "fault injection: no memory for a copy of the lost mark")
                        break
                    entry = iommufd_vevent_header(flags=IOMMU_VEVENTQ_FLAG_LOST_EVENTS, sequence=lost).pack()
                if done + len(entry) > count:  # rows 4, 5
                    if not done:
                        raise KernelError(
                            errno.EINVAL, f"the next event has {len(entry)} bytes, the read offers {count}"
                        )
                    break
                try:
                    task.write(addr + done, entry)  # row 6
                except KernelError:
                    if not done:
                        raise
                    break
                with self.context.world.lock:
                    if lost is None:
                        self.events.popleft()
                    elif self.lost == lost:  # nothing was lost or stored meanwhile
                        self.lost = None
                done += len(entry)  # row 7
        if done:
            self.wake()
        return done


class VeventFile(QueueFile):
    """The descriptor a VEVENTQ_ALLOC returns."""

    link = "anon_inode:[iommufd-viommu-event]"

    def __init__(self, veventq: VeventQueue) -> None:
        super().__init__(veventq)
        self.veventq = veventq

    def read(self, task: Task, addr: int, count: int, pos: int | None = None) -> int:
        stream_only(pos)
        return self.veventq.read(task, addr, count)

    def write(self, task: Task, addr: int, count: int, pos: int | None = None) -> int:
        stream_only(pos)
        raise KernelError(errno.EINVAL, "nothing can be written to a vIOMMU's events")

    def poll(self) -> int:
        return POLLIN | POLLRDNORM if self.veventq.ready() else 0


def veventq_alloc(call: Call) -> None:
    """IOMMU_VEVENTQ_ALLOC (events-viommu 8.1)."""
    cmd = call.cmd
    assert isinstance(cmd, iommu_veventq_alloc)
    if cmd.flags or cmd.reserved or cmd.type == IOMMU_VEVENTQ_TYPE_DEFAULT:  # row 1
        raise KernelError(
            errno.EOPNOTSUPP, f"flags {cmd.flags:#x} and __reserved {cmd.reserved:#x} must be 0, type {cmd.type} not"
        )
    if not 0 < cmd.veventq_depth <= MAX_DEPTH:  # row 2
        raise KernelError(errno.EINVAL, f"a depth of {cmd.veventq_depth} events is not within 1 to {MAX_DEPTH}")
    viommu = call.get(cmd.viommu_id, Viommu)  # row 3
    veventq = call.reserve(VeventQueue(call.context, viommu, cmd.type, cmd.veventq_depth))
    with call.world.lock:
        if cmd.type in viommu.veventqs:  # row 4
            raise KernelError(errno.EEXIST, f"vIOMMU {viommu.id} has a queue of events of type {cmd.type:#x}")
        viommu.veventqs[cmd.type] = veventq
        viommu.users += 1
    cmd.out_veventq_id = veventq.id
    cmd.out_veventq_fd = open_queue(call, VeventFile(veventq))  # row 5


ROWS: list[tuple[Command, Handler, Respond]] = [
    (BY_NAME["IOMMU_VEVENTQ_ALLOC"], veventq_alloc, Respond.ON_SUCCESS),
]
