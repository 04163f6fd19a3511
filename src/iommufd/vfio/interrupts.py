"""Interrupts of one PCI function as its owner configures them (kernel: vfio-pci's SET_IRQS and its eventfd contexts).

Invariants:

* INTx, MSI and MSI-X exclude each other: while one is configured the others cannot be.
* A vector's eventfd is the owner's file, kept open here; the function's model signals it with
  :meth:`Interrupts.trigger`.
* INTx masks itself when it fires and stays so until the owner unmasks it, by a call or by signalling an eventfd set for
  that (:mod:`.unmask`); if the model still asserts it then, it fires again.
* A failed change of several vectors leaves all it had reached, and the one it failed at, without a signal.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from iommufd.errors import KernelError
from iommufd.uapi import vfio as v
from iommufd.vfio.unmask import UnmaskWatch

if TYPE_CHECKING:
    from iommufd.engine.task import Task
    from iommufd.vfio.pci_config import ConfigSpace

INTX, MSI, MSIX = v.VFIO_PCI_INTX_IRQ_INDEX, v.VFIO_PCI_MSI_IRQ_INDEX, v.VFIO_PCI_MSIX_IRQ_INDEX
ERR, REQ = v.VFIO_PCI_ERR_IRQ_INDEX, v.VFIO_PCI_REQ_IRQ_INDEX
HEAD = 20  # bytes of struct vfio_irq_set before its data

NONE, BOOL, EVENTFD = v.VFIO_IRQ_SET_DATA_NONE, v.VFIO_IRQ_SET_DATA_BOOL, v.VFIO_IRQ_SET_DATA_EVENTFD
MASK, UNMASK, TRIGGER = v.VFIO_IRQ_SET_ACTION_MASK, v.VFIO_IRQ_SET_ACTION_UNMASK, v.VFIO_IRQ_SET_ACTION_TRIGGER
WIDTHS = {NONE: 0, BOOL: 1, EVENTFD: 4}


class EventFd:
    """The owner's eventfd, by a descriptor of our own."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def signal(self) -> None:
        """Adds one; nothing when nobody reads and the counter is full."""
        with contextlib.suppress(BlockingIOError):  # as eventfd_signal of the kernel
            os.eventfd_write(self.fd, 1)

    def close(self) -> None:
        os.close(self.fd)


def eventfd_of(task: Task, fd: int) -> EventFd:
    """The eventfd behind a descriptor of the caller: EBADF when it is not open, EINVAL when it is something else."""
    from iommufd.engine.file import File

    file = task.file(fd)
    if not isinstance(file, File):
        own = os.dup(file.fd)
        file.close()
        if os.readlink(f"/proc/self/fd/{own}").startswith("anon_inode:[eventfd"):
            return EventFd(own)
        os.close(own)
    raise KernelError(errno.EINVAL, f"descriptor {fd} is not an eventfd")


class Interrupts:
    """State of the five interrupt indexes. ``active`` is the one of INTX, MSI, MSIX that is configured, or None.

    ``lock`` guards the vectors; signalling happens under it, so that no eventfd is closed meanwhile."""

    def __init__(self, config: ConfigSpace) -> None:
        self.config = config
        self.active: int | None = None
        self.vectors: list[EventFd | None] = []
        self.masked = False  # INTx
        self.asserted = False  # INTx: the model's line
        self.unmask_watch: UnmaskWatch | None = None  # INTx
        self.notices: dict[int, EventFd] = {}  # ERR, REQ
        self.lock = threading.Lock()

    def count(self, index: int) -> int:
        """How many interrupts there are at ``index``."""
        layout = self.config.layout
        if index == INTX:
            return 1 if layout.interrupt_pin else 0
        if index == MSI:
            return layout.msi
        if index == MSIX:
            return layout.msix
        return 1

    def flags(self, index: int) -> int:
        """GET_IRQ_INFO's flags: MSI-X vectors, where there are any, may be added one by one."""
        if index == INTX:
            return v.VFIO_IRQ_INFO_EVENTFD | v.VFIO_IRQ_INFO_MASKABLE | v.VFIO_IRQ_INFO_AUTOMASKED
        if index == MSIX and self.config.layout.msix:
            return v.VFIO_IRQ_INFO_EVENTFD
        return v.VFIO_IRQ_INFO_EVENTFD | v.VFIO_IRQ_INFO_NORESIZE

    # --- the model's side

    def trigger(self, vector: int = 0) -> bool:
        """The function raises MSI or MSI-X ``vector``; whether anybody was told."""
        with self.lock:
            event = self.vectors[vector] if self.active in (MSI, MSIX) and vector < len(self.vectors) else None
            if event is not None:
                event.signal()
            return event is not None

    def set_intx(self, asserted: bool) -> None:
        """The function raises or lowers its interrupt line."""
        with self.lock:
            self.asserted = asserted
            self._deliver_intx()

    def notice(self, index: int) -> bool:
        """Tells the owner of an error (ERR) or that the device is wanted back (REQ); whether it listens."""
        with self.lock:
            event = self.notices.get(index)
            if event is not None:
                event.signal()
            return event is not None

    def _deliver_intx(self) -> None:
        if self.asserted and not self.masked and self.active == INTX:
            self.masked = True
            self._signal_intx()

    def _signal_intx(self) -> None:
        event = self.vectors[0]
        if event is not None and not self.config.line_disabled:
            event.signal()

    @contextlib.contextmanager
    def line_switch(self) -> Iterator[None]:
        """Around a write to configuration space: switching the line off in the command register masks INTx, switching
        it on unmasks it."""
        with self.lock:
            before = self.config.line_disabled
            yield
            after = self.config.line_disabled
            if before != after:
                self.masked = after
                self._deliver_intx()

    # --- the owner's side

    def set(self, task: Task, arg: int) -> None:
        """VFIO_DEVICE_SET_IRQS."""
        head = v.vfio_irq_set.unpack(task.read(arg, HEAD))
        width = check_irq_set(head, self.count(head.index) if head.index < v.VFIO_PCI_NUM_IRQS else None)
        data = task.read(arg + HEAD, width * head.count) if width else b""
        action = head.flags & v.VFIO_IRQ_SET_ACTION_TYPE_MASK
        kind = head.flags & v.VFIO_IRQ_SET_DATA_TYPE_MASK
        with self.lock:
            if head.index in (ERR, REQ):
                if action != TRIGGER:
                    raise KernelError(errno.ENOTTY, f"interrupt index {head.index} can only be triggered")
                self._set_notice(task, head, kind, data)
            elif head.index == INTX and action in (MASK, UNMASK):
                self._mask_intx(task, head, action, kind, data)
            elif action != TRIGGER:
                raise KernelError(errno.ENOTTY, f"interrupt index {head.index} knows no action {action:#x}")
            elif head.index == INTX:
                self._trigger_intx(task, head, kind, data)
            else:
                self._trigger_msi(task, head, kind, data)

    def disable(self) -> None:
        """The device is closed: nothing is configured any more."""
        with self.lock:
            self._disable()
            for event in self.notices.values():
                event.close()
            self.notices.clear()

    def _disable(self) -> None:
        for event in self.vectors:
            if event is not None:
                event.close()
        self._stop_unmasking()
        if self.active == MSI:
            self.config.set_msi(0)
        if self.active == MSIX:
            self.config.set_msix(False)
        self.vectors = []
        self.active = None
        self.masked = False

    def _set_notice(self, task: Task, head: v.vfio_irq_set, kind: int, data: bytes) -> None:
        event = self.notices.get(head.index)
        if head.count > 1:
            raise KernelError(errno.EINVAL, f"interrupt index {head.index} has one signal, not {head.count}")
        if kind != NONE and not head.count:
            raise KernelError(errno.EINVAL, f"no data for interrupt index {head.index}")
        if kind == EVENTFD:
            fd = int.from_bytes(data, "little", signed=True)
            if fd < -1:
                raise KernelError(errno.EINVAL, f"descriptor {fd}")
            new = eventfd_of(task, fd) if fd >= 0 else None
            if event is not None:
                self.notices.pop(head.index).close()
            if new is not None:
                self.notices[head.index] = new
            return
        if kind == BOOL:  # with nobody to hear it, it is no error
            if data[0] and event is not None:
                event.signal()
            return
        if event is None:
            raise KernelError(errno.EINVAL, f"interrupt index {head.index} has no signal set")
        if head.count:
            event.signal()
        else:
            self.notices.pop(head.index).close()

    def _mask_intx(self, task: Task, head: v.vfio_irq_set, action: int, kind: int, data: bytes) -> None:
        self._check_intx(head)
        if kind == EVENTFD:
            if action == MASK:
                raise KernelError(errno.ENOTTY, "INTx cannot be masked by an eventfd")
            fd = int.from_bytes(data, "little", signed=True)
            new = eventfd_of(task, fd) if fd >= 0 else None
            if new is None:
                self._stop_unmasking()
            elif self.unmask_watch is None:
                self.unmask_watch = UnmaskWatch(new.fd, self._unmask)
            else:
                new.close()
                raise KernelError(errno.EBUSY, "another eventfd unmasks INTx; it must be given up first")
            return
        if kind == NONE or data[0]:
            self._set_masked(action == MASK)

    def _set_masked(self, masked: bool) -> None:
        """It stays masked as long as the command register keeps the line silent."""
        self.masked = masked or self.config.line_disabled
        self._deliver_intx()

    def _unmask(self, watch: UnmaskWatch) -> None:
        """The owner signalled the eventfd that unmasks, perhaps while it was given up."""
        with self.lock:
            if watch is self.unmask_watch:
                self._set_masked(False)

    def _stop_unmasking(self) -> None:
        if self.unmask_watch is not None:
            self.unmask_watch.close()
            self.unmask_watch = None

    def _check_intx(self, head: v.vfio_irq_set) -> None:
        if self.active != INTX or head.start or head.count != 1:
            raise KernelError(errno.EINVAL, "INTx is not configured, or something else than interrupt 0 is meant")

    def _trigger_intx(self, task: Task, head: v.vfio_irq_set, kind: int, data: bytes) -> None:
        if self.active == INTX and not head.count and kind == NONE:
            self._disable()
            return
        if self.active not in (INTX, None) or head.start or head.count != 1:
            raise KernelError(errno.EINVAL, "another interrupt index is configured, or not interrupt 0 alone is meant")
        if kind == EVENTFD:
            fd = int.from_bytes(data, "little", signed=True)
            new = eventfd_of(task, fd) if fd >= 0 else None
            if self.active == INTX:
                if self.vectors[0] is not None:
                    self.vectors[0].close()
            else:
                self.active = INTX
                self.masked = self.config.line_disabled
            self.vectors = [new]
            self._deliver_intx()
            return
        self._check_intx(head)
        if kind == NONE or data[0]:
            self._signal_intx()

    def _trigger_msi(self, task: Task, head: v.vfio_irq_set, kind: int, data: bytes) -> None:
        index = head.index
        if self.active == index and not head.count and kind == NONE:
            self._disable()
            return
        if self.active not in (index, None) or (self.active is None and kind != EVENTFD):
            raise KernelError(errno.EINVAL, f"interrupt index {index} is not configured, or another one is")
        if kind == EVENTFD:
            fds = [int.from_bytes(data[at : at + 4], "little", signed=True) for at in range(0, len(data), 4)]
            fresh = self.active is None
            if fresh:
                self._enable_msi(index, head.start + head.count)
            try:
                self._set_vectors(task, head.start, fds)
            except KernelError:
                if fresh:
                    self._disable()
                raise
            return
        for at in range(head.count):
            vector = head.start + at
            event = self.vectors[vector] if vector < len(self.vectors) else None
            if event is not None and (kind == NONE or data[at]):
                event.signal()

    def _enable_msi(self, index: int, vectors: int) -> None:
        if not vectors:
            raise KernelError(errno.ERANGE, f"interrupt index {index} cannot be configured for no vector")
        if self.config.power_state:
            raise KernelError(errno.EINVAL, f"no messages can be configured in D{self.config.power_state}")
        self.active = index
        self.vectors = [None] * vectors
        if index == MSI:
            self.config.set_msi(vectors)
        else:
            self.config.set_msix(True)

    def _set_vectors(self, task: Task, start: int, fds: Sequence[int]) -> None:
        if start + len(fds) > len(self.vectors):
            if self.active == MSI:
                raise KernelError(errno.EINVAL, f"MSI was configured for {len(self.vectors)} vectors")
            self.vectors += [None] * (start + len(fds) - len(self.vectors))
        for at, fd in enumerate(fds, start):
            self._drop(at)
            try:
                self.vectors[at] = eventfd_of(task, fd) if fd >= 0 else None
            except KernelError:
                for done in range(start, at):
                    self._drop(done)
                raise

    def _drop(self, vector: int) -> None:
        event = self.vectors[vector]
        if event is not None:
            event.close()
            self.vectors[vector] = None


def check_irq_set(head: v.vfio_irq_set, count: int | None) -> int:
    """The checks VFIO makes for every driver; the width of one item of data. ``count`` None: there is no such index."""
    known = v.VFIO_IRQ_SET_DATA_TYPE_MASK | v.VFIO_IRQ_SET_ACTION_TYPE_MASK
    if head.argsz < HEAD:
        raise KernelError(errno.EINVAL, f"argsz {head.argsz} is less than {HEAD}")
    if head.flags & ~known:
        raise KernelError(errno.EINVAL, f"flags {head.flags:#x} are not known")
    if count is None:
        raise KernelError(errno.EINVAL, f"there is no interrupt index {head.index}")
    if head.count + head.start > 2**32 - 1 or head.start >= count or head.start + head.count > count:
        raise KernelError(
            errno.EINVAL,
            f"{head.count} interrupts from number {head.start} on: index {head.index} has {count}",
        )
    width = WIDTHS.get(head.flags & v.VFIO_IRQ_SET_DATA_TYPE_MASK)
    if width is None:
        raise KernelError(errno.EINVAL, f"flags {head.flags:#x} name no one type of data")
    if head.argsz - HEAD < head.count * width:
        raise KernelError(errno.EINVAL, f"{head.count} interrupts, but {head.argsz - HEAD} bytes of data")
    return width
