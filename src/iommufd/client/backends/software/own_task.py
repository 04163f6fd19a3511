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

_libc = ctypes.CDLL(None, use_errno=True)


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


class _Capabilities(threading.local):
    """The buffers of capget(2), one set a thread (a thread's capabilities are its own)."""

    def __init__(self) -> None:
        self.header = _CapHeader(0x20080522, 0)
        self.data = (ctypes.c_uint32 * 6)()

    def effective(self) -> int:
        _libc.capget(ctypes.byref(self.header), self.data)
        return int(self.data[0]) | int(self.data[3]) << 32


_capabilities = _Capabilities()


class OwnTask:
    """The calling thread for one call; ``buffer`` is the ioctl's struct, or None. See engine.task.Task."""

    __slots__ = ("_descriptors", "_owner", "buffer", "process", "space", "tid")

    def __init__(self, owner: OwnProcess, descriptors: Descriptors, buffer: bytearray | None) -> None:
        self._owner = owner
        self._descriptors = descriptors
        self.buffer = buffer
        self.space = owner.space
        self.process = owner.process
        self.tid = threading.get_native_id()

    # --- memory

    def read_upto(self, addr: int, count: int) -> bytes:
        if addr >= STRUCT and self.buffer is not None:
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
            room = max(len(self.buffer) - offset, 0)
            part = data if len(data) <= room else data[:room]
            self.buffer[offset : offset + len(part)] = part
            return len(part)
        return self._owner.host.write(addr, data) if len(data) else 0

    def write(self, addr: int, data: bytes | bytearray | memoryview) -> None:
        done = self.write_upto(addr, data)
        if done != len(data):
            raise KernelError(errno.EFAULT, f"only {done} of {len(data)} bytes at {addr:#x} can be written")

    # --- identity

    def capable(self, capability: int) -> bool:
        """capget(2) of the calling thread, if the process lives in the initial user namespace."""
        if self._owner.pretended is not None:
            return bool(self._owner.pretended >> capability & 1)
        return self._owner.initial_namespace and bool(_capabilities.effective() >> capability & 1)

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
