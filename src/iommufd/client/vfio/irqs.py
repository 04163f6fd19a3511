"""Interrupts of a device as eventfds (kernel: VFIO_DEVICE_GET_IRQ_INFO, VFIO_DEVICE_SET_IRQS)."""

from __future__ import annotations

import asyncio
import os
import select
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from iommufd.client.numbers import number, plural
from iommufd.client.vfio.chain import ask
from iommufd.uapi import vfio as v

if TYPE_CHECKING:
    from types import TracebackType

    from iommufd.client.handle import Handle

HEAD = struct.Struct("<IIIII")  # struct vfio_irq_set without its data


class EventFd:
    """A counter that an interrupt adds 1 to; waiting takes what has come."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def fileno(self) -> int:
        return self._fd

    def take(self) -> int:
        """How many interrupts came since the last time; 0 when none. Never blocks."""
        try:
            return os.eventfd_read(self._fd)
        except BlockingIOError:
            return 0

    def wait(self, timeout: float | None = None) -> int:
        """Waits up to ``timeout`` seconds (None: forever) for an interrupt; how many have come, 0 on timeout."""
        poller = select.poll()
        poller.register(self._fd, select.POLLIN)
        poller.poll(None if timeout is None else timeout * 1000)
        return self.take()

    async def wait_async(self) -> int:
        """The same in an event loop, for one task at a time."""
        loop = asyncio.get_running_loop()
        while not (count := self.take()):
            ready: asyncio.Future[None] = loop.create_future()
            loop.add_reader(self._fd, _settle, ready)
            try:
                await ready
            finally:
                loop.remove_reader(self._fd)
        return count

    def close(self) -> None:
        """Closes the descriptor. The kernel keeps what it was given until the interrupt is disabled."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<EventFd {self._fd}>"


def _settle(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


class Irq:
    """Interrupt ``index`` of a device: ``count`` vectors. ``flags`` tells how they behave."""

    def __init__(self, handle: Handle, index: int) -> None:
        self._handle = handle
        query = v.vfio_irq_info(index=number(index, "index", 2**32 - 1))
        info = ask(handle, v.VFIO_DEVICE_GET_IRQ_INFO, query)
        self.index = index
        self.count = info.count
        self.flags = v.vfio_irq_info_flags(info.flags)

    def enable(self, count: int | None = None) -> list[EventFd]:
        """Lets the first ``count`` vectors (None: all) signal an eventfd each; the eventfds, in order."""
        events = [EventFd() for _ in range(self.count if count is None else number(count, "count", 1 << 16))]
        self.set_eventfds([event.fileno() for event in events])
        return events

    def set_eventfds(self, fds: Sequence[int], start: int = 0) -> None:
        """Vectors from ``start`` on signal these descriptors; -1 stops one."""
        data = struct.pack(f"<{len(fds)}i", *fds)
        self._set(v.VFIO_IRQ_SET_DATA_EVENTFD | v.VFIO_IRQ_SET_ACTION_TRIGGER, start, len(fds), data)

    def disable(self) -> None:
        """No vector signals anything any more."""
        self._set(v.VFIO_IRQ_SET_DATA_NONE | v.VFIO_IRQ_SET_ACTION_TRIGGER, 0, 0)

    def trigger(self, start: int = 0, count: int = 1) -> None:
        """Acts as if the device had raised these vectors."""
        self._set(v.VFIO_IRQ_SET_DATA_NONE | v.VFIO_IRQ_SET_ACTION_TRIGGER, start, count)

    def mask(self, start: int = 0, count: int = 1) -> None:
        """Holds these vectors back."""
        self._set(v.VFIO_IRQ_SET_DATA_NONE | v.VFIO_IRQ_SET_ACTION_MASK, start, count)

    def unmask(self, start: int = 0, count: int = 1) -> None:
        """Lets them through again; an automasked one needs this after each interrupt."""
        self._set(v.VFIO_IRQ_SET_DATA_NONE | v.VFIO_IRQ_SET_ACTION_UNMASK, start, count)

    def _set(self, flags: int, start: int, count: int, data: bytes = b"") -> None:
        start, count = number(start, "start", 2**32 - 1), number(count, "count", 2**32 - 1)
        self._handle.ioctl(
            v.VFIO_DEVICE_SET_IRQS,
            bytearray(HEAD.pack(HEAD.size + len(data), flags, self.index, start, count) + data),
        )

    def __repr__(self) -> str:
        return f"<Irq {self.index}: {plural(self.count, 'vector')}, {self.flags.name}>"
