"""Event queues: what FAULT and VEVENTQ have in common (kernel: struct iommufd_eventq, drivers/iommu/iommufd/eventq.c).

Invariants (events-viommu 2, 4, 8):

* The object is one thing, its open file another: the file keeps the object and the whole context alive, and once it is
  closed nobody gets a descriptor of the object again, but events are still queued until the object is destroyed.
* Readers are serialised by the queue's own mutex. An entry stays at its place in the list until its bytes are in the
  caller's memory, so nothing needs putting back and readiness never flickers.
* Readiness is told to the projector after every change that may alter it, never under a lock of the engine, and with
  the mask as it is at that moment, so that the last call always tells the truth.
"""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING, ClassVar

from iommufd.engine.file import File
from iommufd.engine.object import Object
from iommufd.errors import KernelError

if TYPE_CHECKING:
    from iommufd.engine.context import Context
    from iommufd.engine.dispatch import Call
    from iommufd.engine.task import Task


class EventQueue(Object):
    """A queue of events with, at most, one open file. ``mutex`` serialises its readers and writers."""

    __slots__ = ("file", "mutex")

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.file: QueueFile | None = None
        self.mutex = threading.Lock()

    def ready(self) -> bool:
        """Whether there is anything to read."""
        raise AssertionError("a kind of queue says when it is ready")

    def wake(self) -> None:
        """Something arrived or went: tell whoever polls. Call without locks."""
        file = self.file
        if file is not None:
            file.wake()


class QueueFile(File):
    """The open file of an event queue; its reads and writes never block."""

    carrier: ClassVar[str] = "queue"

    def __init__(self, queue: EventQueue) -> None:
        super().__init__()
        self.context = queue.context
        self.context.get()
        with self.context.world.lock:
            queue.users += 1
        self._queue = queue
        self._wake_lock = threading.Lock()
        queue.file = self

    def wake(self) -> None:
        with self._wake_lock:
            changed = self.poll_changed
            if changed is not None:
                changed(self.poll())

    def lseek(self, task: Task, offset: int = 0, whence: int = 0) -> int:
        raise KernelError(errno.ESPIPE, "an event queue has no position")

    def release(self) -> None:
        """The last reference went: object and context lose theirs, what is queued stays."""
        with self._wake_lock:
            self.poll_changed = None
        self._queue.file = None
        with self.context.world.lock:
            self._queue.users -= 1
        self.context.put()


def stream_only(pos: int | None) -> None:
    """ESPIPE for pread and pwrite (events-viommu 4.3, 8.4)."""
    if pos is not None:
        raise KernelError(errno.ESPIPE, "an event queue has no positions to read or write at")


def open_queue(call: Call, file: QueueFile) -> int:
    """Reserves a close-on-exec descriptor for the new queue's file; EMFILE, and then the file is gone again."""
    return call.reserve_fd(file, cloexec=True)
