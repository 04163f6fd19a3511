"""Handle: one open descriptor of a backend, with what may and may not be done to it (kernel: struct file).

Invariants:

* Whoever made the handle closes it, once; afterwards every call fails with EBADF and a sentence. The number is taken
  out of the handle first and closed when the calls that have it are over (``_busy``): no call ever reaches a stranger's
  file that has got the number since.
* A forked child has none of its parent's handles: every call there raises RuntimeError, and nothing is ever closed or
  undone by it (the child's exit must not tear down what the parent uses). A child opens its own, or adopts the number
  (:func:`iommufd.client.context.adopt`).
* What a backend raises reaches the user as :class:`IommufdError` with the request in it.
"""

from __future__ import annotations

import errno
import os
import time
import weakref
from typing import TYPE_CHECKING, SupportsIndex

from iommufd.client.calls import refused, show
from iommufd.client.errors import IommufdError
from iommufd.client.numbers import U32, instance, number, seconds

if TYPE_CHECKING:
    from collections.abc import Callable

    from iommufd.client.backend import Backend

FAILURES = (OSError, ValueError, RuntimeError, OverflowError)  # of a backend's call
WAIT, WAITS = 0.001, 50  # seconds, times: how long closing waits for the calls in flight
POLLIN, POLLOUT = 0x001, 0x004
SSIZE_MAX = 2**63 - 1

_handles: weakref.WeakSet[Handle] = weakref.WeakSet()


class Handle:
    """``fd`` of ``backend``; ``name`` is what a sentence calls it (``"the iommufd context"``)."""

    def __init__(self, backend: Backend, fd: int, name: str) -> None:
        self.backend = backend
        self.name = name
        self._fd = fd
        self._open = [fd]  # whoever takes it out closes it
        self._busy: list[None] = []  # one for each call in flight; append and pop are atomic
        self._owed: list[int] = []  # closed while busy: the last call closes it
        self._foreign = False
        self._call = backend.ioctl
        _handles.add(self)

    @property
    def closed(self) -> bool:
        """Whether no call can be made through this handle (any more)."""
        return self._fd < 0

    def fileno(self) -> int:
        """The descriptor's number, for select and friends. IommufdError EBADF when closed."""
        if self._fd < 0:
            raise self.failure(None)
        return self.backend.fileno(self._fd)

    def ioctl(self, cmd: int, arg: bytearray | int = 0) -> int:
        """One raw ioctl: ``arg`` is the struct's bytes, changed in place, or a number. The result, 0 or more."""
        self._busy.append(None)
        try:
            return self._call(self._fd, cmd, arg)
        except FAILURES as error:
            check_ioctl(cmd, arg)
            raise self.failure(error, cmd, arg) from None
        except TypeError:
            check_ioctl(cmd, arg)
            raise
        finally:
            self._busy.pop()
            if self._owed:
                self._pay()

    def ioctl_many(self, cmd: int, data: bytearray, size: int, done: list[int]) -> None:
        """One ioctl after another on the structs of ``size`` bytes in ``data``, from number ``done[0]`` on, which
        counts them; stops at the first that fails, with its error. In one go where the backend can."""
        instance(data, bytearray, "data")
        if number(size, "size") == 0 or len(data) % size:
            raise ValueError(f"data of {len(data)} bytes is no number of structs of {size}")
        if not isinstance(done, list) or len(done) != 1:
            raise TypeError("done is a list of one number")
        done[0] = number(done[0], "done[0]")
        many: Callable[[int, int, bytearray, int, list[int]], None] | None
        many = getattr(self.backend, "ioctl_many", None)
        self._busy.append(None)
        try:
            if many is not None:
                many(self._fd, cmd, data, size, done)
                return
            while done[0] * size < len(data):
                at = done[0] * size
                one = data[at : at + size]
                self._call(self._fd, cmd, one)
                data[at : at + size] = one
                done[0] += 1
        except FAILURES as error:
            raise self.failure(error, cmd, data[done[0] * size : (done[0] + 1) * size]) from None
        finally:
            self._busy.pop()
            if self._owed:
                self._pay()

    def read(self, count: int, offset: int | None = None) -> bytes:
        """read(2) or, with an ``offset``, pread(2): up to ``count`` bytes."""
        count = number(count, "count", SSIZE_MAX)
        offset = None if offset is None else number(offset, "offset", SSIZE_MAX)
        self._busy.append(None)
        try:
            return self.backend.read(self._fd, count, offset)
        except FAILURES as error:
            raise self.failure(error, f"read of {count} bytes") from None
        finally:
            self._busy.pop()
            if self._owed:
                self._pay()

    def write(self, data: bytes, offset: int | None = None) -> int:
        """write(2) or, with an ``offset``, pwrite(2): bytes taken."""
        instance(data, bytes, "data")
        offset = None if offset is None else number(offset, "offset", SSIZE_MAX)
        self._busy.append(None)
        try:
            return self.backend.write(self._fd, data, offset)
        except FAILURES as error:
            raise self.failure(error, f"write of {len(data)} bytes") from None
        finally:
            self._busy.pop()
            if self._owed:
                self._pay()

    def poll(self, events: int = POLLIN, timeout: float | None = 0) -> int:
        """Which of ``events`` are ready, waiting up to ``timeout`` seconds (None: forever) for one; 0 when none is."""
        events, timeout = number(events, "events", 0x7FFF), seconds(timeout)
        self._busy.append(None)
        try:
            return self.backend.poll(self._fd, events, timeout)
        except FAILURES as error:
            raise self.failure(error, "poll") from None
        finally:
            self._busy.pop()
            if self._owed:
                self._pay()

    def mmap(self, length: int, offset: int, *, writeable: bool = True) -> memoryview:
        """Maps device memory, shared. It stays, and keeps the file open, until the last view of it is gone."""
        length, offset = number(length, "length", SSIZE_MAX), number(offset, "offset", SSIZE_MAX)
        prot = 3 if writeable else 1  # PROT_READ | PROT_WRITE
        self._busy.append(None)
        try:
            return self.backend.mmap(self._fd, length, prot, 1, offset)  # MAP_SHARED
        except FAILURES as error:
            raise self.failure(error, f"mmap of {length:#x} bytes at offset {offset:#x}") from None
        finally:
            self._busy.pop()
            if self._owed:
                self._pay()

    def close_fd(self) -> bool:
        """Closes the descriptor; False when it was closed already."""
        try:
            fd = self._open.pop()
        except IndexError:
            return False
        self._fd = -1
        for _ in range(WAITS):
            if not self._busy:
                self.backend.close(fd)
                return True
            time.sleep(WAIT)
        self._owed.append(fd)  # a long call: it closes the descriptor itself
        self._pay()
        return True

    def _pay(self) -> None:
        """Closes what is owed, if no call is in flight."""
        while self._owed and not self._busy:
            try:
                fd = self._owed.pop()
            except IndexError:  # another thread did
                return
            self.backend.close(fd)

    def failure(self, error: Exception | None, cmd: int | str = 0, arg: bytearray | int = 0) -> Exception:
        """What the user sees for ``error`` of a call (None: a call that was not even made)."""
        if self._foreign:
            return RuntimeError(
                f"{self.name} belongs to the parent of this process ({os.getpid()}), which must open its own"
            )
        if self._fd < 0:
            return IommufdError(errno.EBADF, f"{self.name} is closed")
        request = cmd if isinstance(cmd, str) else self._show(cmd, arg)
        if isinstance(error, OverflowError):
            return ValueError(f"{request}: {error}")
        if not isinstance(error, OSError):
            assert error is not None
            return error
        number = error.errno or 0
        if isinstance(error, IommufdError):
            error.request = request
            return error
        return IommufdError(number, refused(number, request), request)

    def _show(self, cmd: int, arg: bytearray | int) -> str:
        """An ioctl on this kind of file, as a person reads it."""
        return show(cmd, arg) if isinstance(arg, bytearray) else f"ioctl {cmd:#x}({arg:#x})"

    def _disown(self) -> None:
        if self._fd >= 0:
            self._foreign = True
            self._fd = -1
            self._open.clear()


def check_ioctl(cmd: SupportsIndex, arg: object) -> None:
    """TypeError or ValueError, with a sentence, for what cannot be the arguments of an ioctl."""
    number(cmd, "an ioctl's number", U32)
    if not isinstance(arg, bytearray | int):
        raise TypeError(f"an ioctl's argument is a bytearray or a number, not {type(arg).__name__}")


def _after_fork() -> None:
    for handle in list(_handles):
        handle._disown()


os.register_at_fork(after_in_child=_after_fork)
