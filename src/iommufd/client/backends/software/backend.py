"""The software backend: an in-process machine behind the eight calls.

Descriptors are real ones of this process. A file that is always ready is represented by a memfd, a queue by a pipe that
holds one byte while the queue is readable, so ``select``, ``os.fstat`` and passing numbers inside structs work as with
a kernel. ``os.dup`` of one is recognised (by inode); the file is released when the backend's
:meth:`~SoftwareBackend.close` has closed every number the backend itself handed out.
"""

from __future__ import annotations

import errno
import mmap as _mmap
import os
import select
import threading
import weakref
from typing import TYPE_CHECKING

from iommufd.client.backends.software.descriptors import Descriptors
from iommufd.client.backends.software.own_task import STRUCT, OwnProcess, OwnTask
from iommufd.engine.file import File, Pending
from iommufd.errors import KernelError

if TYPE_CHECKING:
    from iommufd.machine.machine import Machine


class SoftwareError(OSError):
    """An OSError with the reason: ``why`` is one sentence with the numbers in it."""

    def __init__(self, number: int, why: str) -> None:
        super().__init__(number, f"{os.strerror(number)}: {why}")
        self.why = why


def as_os_error(error: KernelError) -> SoftwareError:
    return SoftwareError(error.errno, error.why)


class SoftwareBackend:
    """``machine`` in this process. All methods may be used by several threads at once; none in a forked child."""

    name = "software"

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.owner = OwnProcess(machine.world.physical)
        self.descriptors = Descriptors()
        self._files = self.descriptors._files

    def task(self, buffer: bytearray | None = None) -> OwnTask:
        """The calling thread, for one call on the engine."""
        return OwnTask(self.owner, self.descriptors, buffer)

    def open(self, path: str, flags: int) -> int:
        self.owner.check()
        try:
            file = self.machine.open(path, self.task(), flags)
            if file is None:
                raise KernelError(errno.ENOENT, f"machine {self.machine.name} has no {path}")
            return self.descriptors.add(file)
        except KernelError as error:
            raise as_os_error(error) from None

    def _file(self, fd: int) -> File:
        file = self._files.get(fd) or self.descriptors.find(fd)
        if file is None:
            raise SoftwareError(errno.EBADF, f"descriptor {fd} is not one of this machine's")
        return file

    def ioctl(self, fd: int, cmd: int, arg: bytearray | int) -> int:
        file = self._files.get(fd) or self._file(fd)
        try:
            if isinstance(arg, int):
                result = file.ioctl(self.task(), cmd, arg & 0xFFFF_FFFF_FFFF_FFFF)
            else:
                result = file.ioctl(OwnTask(self.owner, self.descriptors, arg), cmd, STRUCT)
        except KernelError as error:
            raise as_os_error(error) from None
        return result if isinstance(result, int) else _wait(result)

    def read(self, fd: int, count: int) -> bytes:
        buffer = bytearray(count)
        try:
            got = self._file(fd).read(self.task(buffer), STRUCT, count)
        except KernelError as error:
            raise as_os_error(error) from None
        return bytes(buffer[: got if isinstance(got, int) else _wait(got)])

    def write(self, fd: int, data: bytes) -> int:
        try:
            done = self._file(fd).write(self.task(bytearray(data)), STRUCT, len(data))
        except KernelError as error:
            raise as_os_error(error) from None
        return done if isinstance(done, int) else _wait(done)

    def poll(self, fd: int, events: int, timeout: float | None) -> int:
        file = self._file(fd)
        ready = file.poll() & events
        if ready or timeout == 0:
            return ready
        poller = select.poll()
        poller.register(fd, events & ~(select.POLLOUT | select.POLLWRNORM) or events)
        poller.poll(None if timeout is None else timeout * 1000)
        return file.poll() & events

    def mmap(self, fd: int, length: int, prot: int, flags: int, offset: int) -> memoryview:
        file = self._file(fd)
        length = -(-length // 4096) * 4096
        try:
            memory, where = file.mmap(self.task(), offset, length, prot, bool(flags & _mmap.MAP_SHARED))
        except KernelError as error:
            raise as_os_error(error) from None
        try:
            mapping = _mmap.mmap(memory, length, flags=flags, prot=prot, offset=where)
        except BaseException:
            file.mapping_closed(offset)
            raise
        weakref.finalize(mapping, file.mapping_closed, offset).atexit = False
        return memoryview(mapping)

    def close(self, fd: int) -> None:
        if fd not in self._files:
            raise SoftwareError(errno.EBADF, f"descriptor {fd} is not one of this machine's")
        self.descriptors.close(fd)

    def fileno(self, fd: int) -> int:
        return fd

    def close_all(self) -> None:
        """Closes every descriptor of the machine, newest first."""
        for fd in reversed(self.descriptors.numbers):
            self.descriptors.close(fd)


def _wait(pending: Pending) -> int:
    """Blocks the calling thread until a deferred answer is there."""
    done = threading.Event()
    pending.then(lambda _: done.set())
    try:
        done.wait()
    except BaseException:
        pending.drop()
        raise
    if pending.error is not None:
        raise as_os_error(pending.error)
    return pending.result or 0
