"""The software backend: an in-process machine behind the eight calls.

Invariants:

* Descriptors are real ones of this process (see :mod:`.descriptors`). ``os.dup`` of one is recognised (by inode); the
  file is released when the backend's :meth:`~SoftwareBackend.close` has closed every number the backend itself handed
  out.
* Any thread may make any call. A forked child may make none: the machine is the parent's, and what the child has is a
  copy with other threads' locks in it. Every call there raises RuntimeError and touches nothing.
* A call holds the file it was made on, as in a kernel: closing the descriptor meanwhile releases the file when the call
  is over. The usual ioctl is too short for a counted reference: it is in ``_running`` from before it looks the file up,
  so that a close either hides the file from it or sees it, and leaves the release to it (``_leaving``).
* One backend a machine and process, because the process is one address space to the machine:
  :func:`~iommufd.client.backends.software.software` sees to it.
"""

from __future__ import annotations

import errno
import mmap as _mmap
import os
import select
import threading
import time
import weakref
from typing import TYPE_CHECKING

from iommufd.client.backends.software.descriptors import Descriptors
from iommufd.client.backends.software.own_task import STRUCT, OwnProcess, OwnTask, task_class
from iommufd.client.errors import IommufdError
from iommufd.engine.context import Context
from iommufd.engine.file import File, Pending, may_map
from iommufd.engine.map_array import ELEMENT, map_array
from iommufd.errors import KernelError
from iommufd.uapi.iommufd import IOMMU_IOAS_MAP

if TYPE_CHECKING:
    from iommufd.machine.machine import Machine

MOST = 1 << 26  # bytes; more than any file of a machine gives in one read

_alive: weakref.WeakSet[SoftwareBackend] = weakref.WeakSet()


class SoftwareBackend:
    """``machine`` in this process. All methods may be used by several threads at once; none in a forked child."""

    name = "software"

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.owner = OwnProcess(machine.world.physical)
        self.descriptors = Descriptors()
        self._files = self.descriptors.files
        self._instruments = machine.world.instruments
        self._task = task_class(self.owner, self.descriptors)
        self._running: dict[OwnTask, int] = {}  # ioctls in flight, and on which number
        self._leaving: list[tuple[set[OwnTask], File]] = []  # closed files, each held once until these calls are over
        self._lock = threading.Lock()
        _alive.add(self)

    def __repr__(self) -> str:
        return f"<SoftwareBackend of {self.machine!r}>"

    def task(self, buffer: bytearray | None = None) -> OwnTask:
        """The calling thread, for one call on the engine."""
        return self._task(buffer)

    def open(self, path: str, flags: int) -> int:
        self.owner.check()
        began = time.perf_counter()
        try:
            file = self.machine.open(path, self.task(), flags)
            if file is None:
                raise KernelError(errno.ENOENT, f"machine {self.machine.name} has no {path}")
            fd = self.descriptors.add(file)
        except KernelError as error:
            self._tell_open(began, path=path, flags=flags, result=-1, error=error)
            raise _os_error(error) from None
        self._tell_open(began, path=path, flags=flags, file=file, result=fd)
        return fd

    def _tell_open(self, began: float, **fields: object) -> None:
        if self._instruments:
            self.machine.world.event("open", task=self.task(), us=(time.perf_counter() - began) * 1e6, **fields)

    def _watched(self, fd: int, buffer: bytearray | None) -> OwnTask:
        """The task of a call that somebody watches."""
        task = self.task(buffer)
        task.fd = fd
        return task

    def _file(self, fd: int) -> File:
        """The file behind ``fd``, held for one call: another thread may close it meanwhile."""
        file = self._files.get(fd)
        if file is None:
            self.owner.check()
            file = self.descriptors.find(fd)
        if file is None or not file.hold():
            raise IommufdError(errno.EBADF, f"descriptor {fd} is not one of this machine's")
        return file

    def _done(self, file: File) -> None:
        file.put()
        if not file.references:
            self.descriptors.drop_memory(file)

    def ioctl(self, fd: int, cmd: int, arg: bytearray | int) -> int:
        if self._instruments or type(arg) is not bytearray:
            return self._ioctl(fd, cmd, arg)
        task = self._task(arg)
        running = self._running
        running[task] = fd
        try:
            file = self._files.get(fd)
            if file is not None:
                result = file.ioctl(task, cmd, STRUCT)
                return result if isinstance(result, int) else _wait(result)
        except KernelError as error:
            raise _os_error(error) from None
        finally:
            del running[task]
            if self._leaving:
                self._let_go()
        return self._ioctl(fd, cmd, arg)

    def ioctl_many(self, fd: int, cmd: int, data: bytearray, size: int, done: list[int]) -> None:
        """One ioctl after another on the structs of ``size`` bytes in ``data``, from number ``done[0]`` on; ``done[0]``
        counts them. Stops at the first that fails, with its error.

        Beyond the eight calls: the client uses it where a backend has it, and loops where not."""
        plain = cmd == IOMMU_IOAS_MAP and size == ELEMENT.size
        while done[0] * size < len(data):
            if plain:
                file = self._file(fd)
                try:
                    plain = isinstance(file, Context) and map_array(file, self._task(None), data, done)
                finally:
                    self._done(file)
                continue
            at = done[0] * size
            one = data[at : at + size]
            self.ioctl(fd, cmd, one)
            data[at : at + size] = one
            done[0] += 1

    def _ioctl(self, fd: int, cmd: int, arg: bytearray | int) -> int:
        """The same through a duplicate, with a number for a struct, or watched."""
        file = self._file(fd)
        buffer, addr = (None, arg & 0xFFFF_FFFF_FFFF_FFFF) if isinstance(arg, int) else (arg, STRUCT)
        try:
            if self._instruments:
                from iommufd.observe import watch

                result = watch.ioctl(self.machine.world, file, self._watched(fd, buffer), cmd, addr)
            else:
                result = file.ioctl(self._task(buffer), cmd, addr)
            return result if isinstance(result, int) else _wait(result)
        except KernelError as error:
            raise _os_error(error) from None
        finally:
            self._done(file)

    def _let_go(self) -> None:
        """Releases the closed files whose last call is over."""
        with self._lock:
            over = [entry for entry in self._leaving if self._running.keys().isdisjoint(entry[0])]
            for entry in over:
                self._leaving.remove(entry)
        for _, file in over:
            self._done(file)

    def read(self, fd: int, count: int, offset: int | None = None) -> bytes:
        file = self._file(fd)
        buffer = bytearray(min(count, MOST))
        try:
            if file.mode == os.O_WRONLY:
                raise KernelError(errno.EBADF, f"descriptor {fd} is not open for reading")
            if self._instruments:
                from iommufd.observe import watch

                got = watch.read(self.machine.world, file, self._watched(fd, buffer), STRUCT, count, offset)
            else:
                got = file.read(self.task(buffer), STRUCT, count, offset)
            return bytes(buffer[: got if isinstance(got, int) else _wait(got)])
        except KernelError as error:
            raise _os_error(error) from None
        finally:
            self._done(file)

    def write(self, fd: int, data: bytes, offset: int | None = None) -> int:
        file = self._file(fd)
        try:
            if file.mode == os.O_RDONLY:
                raise KernelError(errno.EBADF, f"descriptor {fd} is not open for writing")
            if self._instruments:
                from iommufd.observe import watch

                task = self._watched(fd, bytearray(data))
                done = watch.write(self.machine.world, file, task, STRUCT, len(data), offset)
            else:
                done = file.write(self.task(bytearray(data)), STRUCT, len(data), offset)
            return done if isinstance(done, int) else _wait(done)
        except KernelError as error:
            raise _os_error(error) from None
        finally:
            self._done(file)

    def poll(self, fd: int, events: int, timeout: float | None) -> int:
        file = self._file(fd)
        try:
            ready = file.poll() & events
            if ready or timeout == 0:
                return ready
            poller = select.poll()
            poller.register(fd, events & ~(select.POLLOUT | select.POLLWRNORM) or events)
            poller.poll(None if timeout is None else timeout * 1000)
            return file.poll() & events
        finally:
            self._done(file)

    def mmap(self, fd: int, length: int, prot: int, flags: int, offset: int) -> memoryview:
        file = self._file(fd)
        length = -(-length // 4096) * 4096
        try:
            shared = bool(flags & _mmap.MAP_SHARED)
            may_map(file, offset % 2**64, length, prot, shared)
            if self._instruments:
                from iommufd.observe import watch

                task = self._watched(fd, None)
                memory, where = watch.mmap(self.machine.world, file, task, offset, length, prot, shared)
            else:
                memory, where = file.mmap(self.task(), offset, length, prot, shared)
        except KernelError as error:
            raise _os_error(error) from None
        finally:
            self._done(file)
        try:
            mapping = _mmap.mmap(memory, length, flags=flags, prot=prot, offset=where)
        except BaseException:
            self._mapping_gone(file, offset)
            raise
        weakref.finalize(mapping, self._mapping_gone, file, offset).atexit = False
        return memoryview(mapping)

    def _mapping_gone(self, file: File, offset: int) -> None:
        if os.getpid() == self.owner.pid:
            file.mapping_closed(offset)
            self.descriptors.drop_memory(file)

    def close(self, fd: int) -> None:
        self.owner.check()
        file = self._file(fd)
        closed = self.descriptors.close(fd)
        tasks = {task for task, number in list(self._running.items()) if number == fd}
        if tasks:
            with self._lock:
                self._leaving.append((tasks, file))
            self._let_go()
        else:
            self._done(file)
        if not closed:
            raise IommufdError(errno.EBADF, f"descriptor {fd} is not one of this machine's")
        if self._instruments and not file.references:
            self.machine.world.event("close", task=self._watched(fd, None), file=file)

    def fileno(self, fd: int) -> int:
        return fd

    def listdir(self, path: str) -> list[str]:
        """What the directory ``path`` of the machine's /dev and /sys lists. OSError when there is none."""
        self.owner.check()
        return os.listdir(self.machine.tree.real(path))

    def close_all(self) -> None:
        """Closes every descriptor of the machine, newest first."""
        for fd in reversed(self.descriptors.numbers):
            self.descriptors.close(fd)


def _os_error(error: KernelError) -> IommufdError:
    return IommufdError(error.errno, error.why)


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
        raise _os_error(pending.error)
    return pending.result or 0


def _disown() -> None:
    """In a forked child: no number is found any more, so every call takes the slow path, where the owner refuses."""
    for backend in list(_alive):
        backend.descriptors.forget()


os.register_at_fork(after_in_child=_disown)
