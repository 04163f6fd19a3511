"""Queues: descriptors that deliver records, for poll, ``for`` and ``async for`` (kernel: struct iommufd_eventq).

Invariants: the descriptor is closed with the queue object and before it (the kernel's object is held by its open file).
Records read and not yet handed out wait in ``_ready``; several iterations, threads and tasks may share a queue and each
record goes to one of them. Iterations end when the queue is closed. A thread that waits in poll holds the open file, so
threads wait in slices, and closing waits for them to leave.
"""

from __future__ import annotations

import asyncio
import errno
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Generic, Self, TypeVar

from iommufd.client.errors import IommufdError
from iommufd.client.handle import POLLIN, Handle
from iommufd.client.numbers import seconds
from iommufd.client.objects import Object

if TYPE_CHECKING:
    from iommufd.client.context import Context

R = TypeVar("R")
SLICE = 0.1  # seconds after which a waiting thread looks whether the queue is being closed
MOST = 1 << 20


class Queue(Object, Generic[R]):
    """A kernel object with a descriptor that records are read from."""

    _adoptable = False
    _room = 4096

    def __init__(self, context: Context, number: int, fd: int, *parents: Object | None) -> None:
        self._handle = Handle(context.backend, fd, f"{type(self).__name__} {number}")
        self._ready: deque[R] = deque()
        self._lock = threading.Lock()  # one reader at a time, so that records stay in order
        self._waiters: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
        self._waiting = 0  # threads in poll
        self._closing = False
        self._left = threading.Condition()
        super().__init__(context, number, *parents)

    # -------------------------------------------------------------------------------------------------------- reading

    def _parse(self, data: bytes) -> list[R]:
        """The records in what one read gave."""
        raise IommufdError(errno.EINVAL, "a queue of no kind")

    def _fill(self) -> bool:
        """Reads once into ``_ready``; whether anything is there. Never blocks."""
        with self._lock:
            if self._ready:
                return True
            while True:
                try:
                    data = self._handle.read(self._whole(self._room))
                    break
                except IommufdError as error:
                    if error.errno != errno.EINVAL or self._room >= MOST:
                        raise
                    self._room *= 4  # the next record alone is larger
            self._ready.extend(self._parse(data))
            return bool(self._ready)

    def _whole(self, room: int) -> int:
        """The largest size up to ``room`` that the kernel takes for a read."""
        return room

    def _next(self) -> R | None:
        try:
            return self._ready.popleft()
        except IndexError:  # none in store
            pass
        if self._fill():
            try:
                return self._ready.popleft()
            except IndexError:  # another thread took it
                pass
        return None

    def read(self, timeout: float | None = 0) -> list[R]:
        """Everything that waits, oldest first; waits up to ``timeout`` seconds (None: forever) for the first record."""
        found: list[R] = []
        timeout = seconds(timeout)
        if not self._ready and timeout != 0:
            self.wait(timeout)
        while (record := self._next()) is not None:
            found.append(record)
            if not self._ready and len(found) >= 1024:
                break
        return found

    def wait(self, timeout: float | None = None) -> bool:
        """Waits up to ``timeout`` seconds (None: forever) until something can be read; whether it can."""
        timeout = seconds(timeout)
        self._handle.fileno()  # raises when closed
        until = None if timeout is None else time.monotonic() + timeout
        with self._left:
            self._waiting += 1
        try:
            while not self._ready and not self._closing:
                left = SLICE if until is None else min(SLICE, max(until - time.monotonic(), 0.0))
                if self._handle.poll(POLLIN, left):
                    return True
                if until is not None and time.monotonic() >= until:
                    return False
        finally:
            with self._left:
                self._waiting -= 1
                self._left.notify_all()
        return bool(self._ready)

    def fileno(self) -> int:
        """The descriptor, readable when something waits; for select and event loops."""
        return self._handle.fileno()

    # ------------------------------------------------------------------------------------------------------- iteration

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> R:
        """The next record; waits for it. StopIteration when the queue is closed."""
        while not self._handle.closed and not self._closing:
            try:
                record = self._next()
                if record is not None:
                    return record
                self.wait()
            except IommufdError:
                if not self._closing:
                    raise
        if self._handle._foreign:
            raise self._handle.failure(None)
        raise StopIteration

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> R:
        """The next record, for ``async for``."""
        while not self._handle.closed and not self._closing:
            record = self._next()
            if record is not None:
                return record
            await self._readable()
        if self._handle._foreign:
            raise self._handle.failure(None)
        raise StopAsyncIteration

    async def _readable(self) -> None:
        loop = asyncio.get_running_loop()
        waiters = self._waiters.get(loop)
        fd = self._handle.fileno()
        if waiters is None:
            waiters = self._waiters[loop] = []
            loop.add_reader(fd, self._wake, loop, fd)
        waiter = loop.create_future()
        waiters.append(waiter)
        try:
            await waiter
        finally:
            if waiter in waiters:
                waiters.remove(waiter)
            if not waiters and self._waiters.get(loop) is waiters:
                self._unwatch(loop, fd)

    def _wake(self, loop: asyncio.AbstractEventLoop, fd: int) -> None:
        """Something can be read, or the queue is closed: all tasks of this loop look."""
        waiters = self._waiters.get(loop, [])
        self._unwatch(loop, fd)
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _unwatch(self, loop: asyncio.AbstractEventLoop, fd: int) -> None:
        if self._waiters.pop(loop, None) is not None:
            loop.remove_reader(fd)

    # ------------------------------------------------------------------------------------------------------------ life

    def close(self) -> None:
        """Ends the queue and first what reports into it. Iterations over it end."""
        if self.closed:
            return
        for child in sorted(self._children, key=lambda c: -c._serial):
            child.close()
        self._release()
        super().close()

    def _release(self) -> None:
        if self._handle.closed:
            return
        self._closing = True
        with self._left:
            self._left.wait_for(lambda: not self._waiting, 10 * SLICE)
        fd = self._handle.fileno()
        for loop in list(self._waiters):
            try:
                running = asyncio.get_running_loop()
            except RuntimeError:
                running = None
            if running is loop:
                self._wake(loop, fd)
            elif not loop.is_closed():
                loop.call_soon_threadsafe(self._wake, loop, fd)
        with self._lock:
            self._handle.close_fd()
