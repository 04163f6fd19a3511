"""Interrupts of a device as eventfds (kernel: VFIO_DEVICE_GET_IRQ_INFO, VFIO_DEVICE_SET_IRQS)."""

from __future__ import annotations

import asyncio
import errno
import os
import struct
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Self

from iommufd.client.backends.kernel import KernelBackend
from iommufd.client.errors import IommufdError
from iommufd.client.handle import POLLIN, Handle
from iommufd.client.numbers import U32, items, number, plural
from iommufd.client.vfio.chain import ask
from iommufd.uapi import vfio as v

if TYPE_CHECKING:
    from types import TracebackType

    from iommufd.client.buffers import HasFileno

HEAD = struct.Struct("<IIIII")  # struct vfio_irq_set without its data


class EventFd:
    """A counter that an interrupt adds 1 to; waiting takes what has come."""

    def __init__(self) -> None:
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._handle = Handle(KernelBackend(), fd, "the eventfd")  # real with any backend

    def fileno(self) -> int:
        """The descriptor, for select and friends. IommufdError EBADF when closed."""
        return self._handle.fileno()

    def take(self) -> int:
        """How many interrupts came since the last time; 0 when none. Never blocks."""
        try:
            return int.from_bytes(self._handle.read(8), sys.byteorder)
        except BlockingIOError:
            return 0

    def signal(self) -> None:
        """Adds 1, as an interrupt does: for eventfds that the kernel listens to."""
        self._handle.write((1).to_bytes(8, sys.byteorder))

    def wait(self, timeout: float | None = None) -> int:
        """Waits up to ``timeout`` seconds (None: forever) for an interrupt; how many have come, 0 on timeout."""
        self._handle.poll(POLLIN, timeout)
        return self.take()

    async def wait_async(self) -> int:
        """The same in an event loop, for one task at a time."""
        loop = asyncio.get_running_loop()
        while not (count := self.take()):
            ready: asyncio.Future[None] = loop.create_future()
            fd = self.fileno()
            loop.add_reader(fd, _settle, ready)
            try:
                await ready
            finally:
                loop.remove_reader(fd)
        return count

    def close(self) -> None:
        """Closes the descriptor. The kernel keeps what it was given until the interrupt is disabled."""
        self._handle.close_fd()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            self.close()

    def __repr__(self) -> str:
        return "<EventFd, closed>" if self._handle.closed else f"<EventFd {self._handle._fd}>"


def descriptor(event: HasFileno | int | None, what: str = "an eventfd") -> int:
    """The descriptor of an eventfd, -1 for None. TypeError for what has none, ValueError for no possible number."""
    if event is None:
        return -1
    if isinstance(event, int):
        return event if event == -1 else number(event, what, 2**31 - 1)
    if not hasattr(event, "fileno"):
        raise TypeError(f"{what} is an EventFd or a descriptor, not {type(event).__name__}")
    return event.fileno()


def _settle(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


class Irq:
    """Interrupt ``index`` of a device: ``count`` vectors. ``flags`` tells how they behave."""

    def __init__(self, handle: Handle, index: int) -> None:
        self._handle = handle
        query = v.vfio_irq_info(index=number(index, "index", U32))
        info = ask(handle, v.VFIO_DEVICE_GET_IRQ_INFO, query)
        self.index = index
        self.count: int = info.count
        self.flags: v.vfio_irq_info_flags = v.vfio_irq_info_flags(info.flags)

    def enable(self, count: int | None = None) -> list[EventFd]:
        """Lets the first ``count`` vectors (None: all) signal an eventfd each; the eventfds, in order. EINVAL for more
        than there are."""
        wanted = self.count if count is None else number(count, "count")
        if wanted > self.count:
            raise IommufdError(errno.EINVAL, f"{plural(wanted, 'vector')} of {self!r}")
        events: list[EventFd] = []
        try:
            events.extend(EventFd() for _ in range(wanted))
            self.set_eventfds(events)
        except BaseException:
            for event in events:
                event.close()
            raise
        return events

    def set_eventfds(self, events: Iterable[HasFileno | int | None], start: int = 0) -> None:
        """Vectors from ``start`` on signal these: :class:`EventFd` s or descriptors; None (or -1) stops one.

        The first of them enables the interrupt. EINVAL for more vectors than there are, and while another kind of
        interrupt of the device is enabled."""
        self._set_events(v.VFIO_IRQ_SET_ACTION_TRIGGER, events, start)

    def disable(self) -> None:
        """No vector signals anything any more."""
        self._set(v.VFIO_IRQ_SET_DATA_NONE | v.VFIO_IRQ_SET_ACTION_TRIGGER, 0, 0)

    def trigger(self, start: int = 0, count: int = 1, *, only: Iterable[object] | None = None) -> None:
        """Acts as if the device had raised ``count`` vectors from ``start`` on.

        ``only``: true for those that are meant, one for each vector from ``start`` on (``count`` is not looked at)."""
        self._act(v.VFIO_IRQ_SET_ACTION_TRIGGER, start, count, only)

    def mask(self, start: int = 0, count: int = 1, *, only: Iterable[object] | None = None) -> None:
        """Holds vectors back, chosen as in :meth:`trigger`. ENOTTY for an interrupt that is not MASKABLE."""
        self._act(v.VFIO_IRQ_SET_ACTION_MASK, start, count, only)

    def unmask(self, start: int = 0, count: int = 1, *, only: Iterable[object] | None = None) -> None:
        """Lets them through again; an AUTOMASKED one needs this after each interrupt."""
        self._act(v.VFIO_IRQ_SET_ACTION_UNMASK, start, count, only)

    def mask_on(self, events: Iterable[HasFileno | int | None], start: int = 0) -> None:
        """The kernel masks vectors from ``start`` on whenever these eventfds are signalled; None stops that."""
        self._set_events(v.VFIO_IRQ_SET_ACTION_MASK, events, start)

    def unmask_on(self, events: Iterable[HasFileno | int | None], start: int = 0) -> None:
        """The same for unmasking: a VMM's end of interrupt reaches the device without this process."""
        self._set_events(v.VFIO_IRQ_SET_ACTION_UNMASK, events, start)

    def _set_events(self, action: int, events: Iterable[HasFileno | int | None], start: int) -> None:
        fds = [descriptor(event) for event in items(events, "events")]
        self._set(v.VFIO_IRQ_SET_DATA_EVENTFD | action, start, len(fds), struct.pack(f"<{len(fds)}i", *fds))

    def _act(self, action: int, start: int, count: int, only: Iterable[object] | None) -> None:
        if only is None:
            self._set(v.VFIO_IRQ_SET_DATA_NONE | action, start, count)
        else:
            chosen = bytes(bool(each) for each in items(only, "only"))
            self._set(v.VFIO_IRQ_SET_DATA_BOOL | action, start, len(chosen), chosen)

    def _set(self, flags: int, start: int, count: int, data: bytes = b"") -> None:
        start, count = number(start, "start", U32), number(count, "count", U32)
        self._handle.ioctl(
            v.VFIO_DEVICE_SET_IRQS,
            bytearray(HEAD.pack(HEAD.size + len(data), flags, self.index, start, count) + data),
        )

    def __repr__(self) -> str:
        return f"<Irq {self.index}: {plural(self.count, 'vector')}, {self.flags.name}>"
