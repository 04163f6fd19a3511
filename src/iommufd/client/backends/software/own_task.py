"""The calling thread of this very process as the engine's Task.

Invariants:

* The struct of an ioctl travels as a buffer, not as memory: it appears at :data:`STRUCT`, an address no user space
  has, for the length of one call. Everything else is real memory of this process, copied by
  ``process_vm_readv/writev`` on ourselves, so that a wrong address is EFAULT and never a crash.
* One :class:`OwnProcess` a machine: the address space, the user and the limits all tasks of this process share. After a
  fork the child's is another process; :meth:`OwnProcess.check` refuses to go on with the parent's.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from functools import partial
from typing import TYPE_CHECKING

from iommufd.errors import KernelError
from iommufd.memory.accounting import Process
from iommufd.memory.hostfile import HostFile
from iommufd.memory.proc import ProcHost
from iommufd.memory.space import AddressSpace

if TYPE_CHECKING:
    from iommufd.client.backends.software.descriptors import Descriptors
    from iommufd.engine.file import File
    from iommufd.memory.physical import Physical

STRUCT = 0xFFFF_8000_0000_0000  # where the buffer of an ioctl appears: never a user address
INITIAL_USER_NAMESPACE = 0xEFFFFFFD  # inode of /proc/PID/ns/user in the initial one


class _CapHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class OwnProcess:
    """What this process is to one machine: its mm, its user, its limits."""

    def __init__(self, physical: Physical) -> None:
        self.pid = os.getpid()
        self.physical = physical
        self.host = ProcHost(self.pid)
        self.space = AddressSpace(physical, self.host, f"pid {self.pid}")
        self.process = Process(self.pid, physical.user(os.getuid()), self.space)
        self.initial_namespace = os.stat("/proc/self/ns/user").st_ino == INITIAL_USER_NAMESPACE

        self.pretended: int | None = None  # capabilities instead of the thread's own (bits), for tests

    def check(self) -> None:
        """RuntimeError in a forked child: the machine's state is the parent's, and the child has only a copy of it."""
        if os.getpid() != self.pid:
            raise RuntimeError(
                f"this software machine belongs to process {self.pid}; a forked child (process {os.getpid()}) "
                "must open its own"
            )


_capget = ctypes.PyDLL(None).capget  # so short a call is not worth giving up the GIL


def _new_capget() -> tuple[partial[int], memoryview]:
    """capget(2) of the calling thread with buffers of its own, and what it fills: for one call at a time."""
    memory = (ctypes.c_uint32 * 6)()
    call = partial(_capget, ctypes.byref(_CapHeader(0x20080522, 0)), ctypes.byref(memory))
    return call, memoryview(memory).cast("B").cast("I")


_unused = [_new_capget()]


class OwnTask:
    """The calling thread for one call; ``buffer`` is the ioctl's struct, or None; ``fd`` the descriptor, set only
    while somebody watches. See engine.task.Task.

    What all calls of a backend share belongs to a class of its own, made by :func:`task_class`, so that a call costs
    one small object."""

    __slots__ = ("buffer", "fd")

    fd: int
    space: AddressSpace
    process: Process
    _owner: OwnProcess
    _native: bool  # the process lives in the initial user namespace
    _descriptors: Descriptors

    def __init__(self, buffer: bytearray | None) -> None:
        self.buffer = buffer

    @property
    def tid(self) -> int:
        return threading.get_native_id()

    # --- memory

    def read_upto(self, addr: int, count: int) -> bytes:
        if addr >= STRUCT and self.buffer is not None:
            if addr == STRUCT and count >= len(self.buffer):
                return bytes(self.buffer)
            return bytes(self.buffer[addr - STRUCT : addr - STRUCT + count])
        return self._owner.host.read(addr, count) if count > 0 else b""

    def read_into(self, addr: int, buffer: bytearray | memoryview) -> None:
        buffer[:] = self.read(addr, len(buffer))

    def read(self, addr: int, count: int) -> bytes:
        data = self.read_upto(addr, count)
        if len(data) != count:
            raise KernelError(errno.EFAULT, f"only {len(data)} of {count} bytes at {addr:#x} can be read")
        return data

    def write_upto(self, addr: int, data: bytes | bytearray | memoryview) -> int:
        if addr >= STRUCT and self.buffer is not None:
            offset = addr - STRUCT
            count, room = len(data), len(self.buffer) - offset
            if count > room:
                count = max(room, 0)
                data = data[:count]
            self.buffer[offset : offset + count] = data
            return count
        return self._owner.host.write(addr, data) if len(data) else 0

    def write(self, addr: int, data: bytes | bytearray | memoryview) -> None:
        if addr == STRUCT and self.buffer is not None and len(data) <= len(self.buffer):
            self.buffer[: len(data)] = data
            return
        done = self.write_upto(addr, data)
        if done != len(data):
            raise KernelError(errno.EFAULT, f"only {done} of {len(data)} bytes at {addr:#x} can be written")

    # --- identity

    def capable(self, capability: int) -> bool:
        """capget(2) of the calling thread, if the process lives in the initial user namespace."""
        if self._owner.pretended is not None:
            return bool(self._owner.pretended >> capability & 1)
        if not self._native:
            return False
        try:
            mine = _unused.pop()
        except IndexError:  # another thread is between these lines
            mine = _new_capget()
        mine[0]()
        found: int = mine[1][0 if capability < 32 else 3]
        _unused.append(mine)
        return found >> (capability & 31) & 1 == 1

    # --- descriptors

    def file(self, fd: int) -> File | HostFile:
        ours = self._descriptors.find(fd)
        if ours is not None:
            return ours
        import fcntl

        try:
            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH:
                raise KernelError(errno.EBADF, f"descriptor {fd} was opened with O_PATH")
            return HostFile(self._owner.physical, os.dup(fd))
        except (OSError, ValueError, OverflowError):
            raise KernelError(errno.EBADF, f"descriptor {fd} is not open") from None

    def reserve_fd(self, cloexec: bool) -> int:
        return self._descriptors.reserve(cloexec)

    def install_fd(self, fd: int, file: File) -> None:
        self._descriptors.install(fd, file)

    def release_fd(self, fd: int) -> None:
        self._descriptors.unreserve(fd)


def task_class(owner: OwnProcess, descriptors: Descriptors) -> type[OwnTask]:
    """The tasks of one backend: called with a buffer, the calling thread for one call."""
    shared = {
        "__slots__": (),
        "space": owner.space,
        "process": owner.process,
        "_owner": owner,
        "_native": owner.initial_namespace,
        "_descriptors": descriptors,
    }
    return type("OwnTask", (OwnTask,), shared)
