"""The calling thread of another process as the engine's Task (kernel: current, copy_from_user, copy_to_user, capable).

Invariants:

* Memory is reached by ``process_vm_readv/writev``: page protections decide, as in the kernel's own copies (a read of
  PROT_NONE and a write to PROT_READ are EFAULT), and the address space is the one the thread has now.
* Buffers and iovecs are kept per thread; a thread makes one call at a time.
* Credentials are those of the thread: cached, and dropped when it makes a call that may change them.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
import sys
from typing import TYPE_CHECKING

from iommufd.errors import KernelError
from iommufd.interpose.libc import libc, pidfd_getfd, pidfd_open
from iommufd.memory.proc import unfilled

if TYPE_CHECKING:
    from iommufd.engine.file import File
    from iommufd.interpose.descriptors import Descriptors
    from iommufd.interpose.processes import Thread
    from iommufd.memory.accounting import Process
    from iommufd.memory.hostfile import HostFile
    from iommufd.memory.space import AddressSpace

KEPT = 512  # bytes of the kept transfer buffer
KEPT_MEMORIES = 1024
PIECE = 1 << 26  # bytes of one transfer of a large copy
INITIAL_USER_NAMESPACE = 0xEFFFFFFD  # inode of /proc/PID/ns/user (kernel: PROC_USER_INIT_INO)

_readv = libc.process_vm_readv
_writev = libc.process_vm_writev
_IOVECS = struct.Struct("=QQQQ")  # local base, local length, remote base, remote length
_ONE, _ZERO = ctypes.c_ulong(1), ctypes.c_ulong(0)


class CallerMemory:
    """Copies to and from the memory of one thread. Not for two threads of ours at once."""

    __slots__ = ("_address", "_buffer", "_iovecs", "_keep", "_local", "_pack", "_remote", "_tid", "_view", "tid")

    def __init__(self, tid: int) -> None:
        self.tid = tid
        self._tid = ctypes.c_int(tid)
        self._buffer = bytearray(KEPT)
        self._view = memoryview(self._buffer)
        buffer = (ctypes.c_char * KEPT).from_buffer(self._buffer)
        self._iovecs = bytearray(_IOVECS.size)
        iovecs = (ctypes.c_char * _IOVECS.size).from_buffer(self._iovecs)
        self._keep = (buffer, iovecs)
        self._address = ctypes.addressof(buffer)
        self._local = ctypes.c_void_p(ctypes.addressof(iovecs))
        self._remote = ctypes.c_void_p(ctypes.addressof(iovecs) + 16)
        self._pack = _IOVECS.pack_into

    def read_upto(self, addr: int, count: int) -> bytes:
        """The readable leading bytes of ``[addr, addr + count)``."""
        if count <= KEPT:
            self._pack(self._iovecs, 0, self._address, count, addr, count)
            got = _readv(self._tid, self._local, _ONE, self._remote, _ONE, _ZERO)
            if got <= 0:
                if got < 0:
                    self._diagnose()
                return b""
            return bytes(self._view[:got])
        data = unfilled(count)  # filled in place: a copy would cost as much as the read
        done = self._long(_readv, _address_of(data), addr, count)
        return data if done == count else data[:done]

    def read_into(self, addr: int, buffer: bytearray | memoryview) -> int:
        """Reads into the leading bytes of ``buffer``; how many could be read."""
        count = len(buffer)
        if count <= KEPT:
            self._pack(self._iovecs, 0, self._address, count, addr, count)
            got: int = _readv(self._tid, self._local, _ONE, self._remote, _ONE, _ZERO)
            if got < 0:
                self._diagnose()
                return 0
            buffer[:got] = self._view[:got]
            return got
        first = ctypes.c_char.from_buffer(buffer)
        return self._long(_readv, ctypes.addressof(first), addr, len(buffer))

    def write_upto(self, addr: int, data: bytes | bytearray | memoryview) -> int:
        """Writes the leading bytes that can be written and returns how many."""
        count = len(data)
        if count <= KEPT:
            self._buffer[:count] = data
            self._pack(self._iovecs, 0, self._address, count, addr, count)
            put: int = _writev(self._tid, self._local, _ONE, self._remote, _ONE, _ZERO)
            if put < 0:
                self._diagnose()
                return 0
            return put
        if not isinstance(data, bytes):
            if isinstance(data, bytearray) or (not data.readonly and data.c_contiguous):
                first = ctypes.c_char.from_buffer(data)
                return self._long(_writev, ctypes.addressof(first), addr, count)
            data = bytes(data)
        return self._long(_writev, _address_of(data), addr, count)

    def _long(self, call: ctypes._NamedFuncPointer, ours: int, theirs: int, count: int) -> int:
        iovecs = bytearray(_IOVECS.size)
        raw = ctypes.c_char.from_buffer(iovecs)
        local, remote = ctypes.c_void_p(ctypes.addressof(raw)), ctypes.c_void_p(ctypes.addressof(raw) + 16)
        done = 0
        while done < count and theirs + done < 2**64:
            piece = min(count - done, PIECE, 2**64 - theirs - done)
            self._pack(iovecs, 0, ours + done, piece, theirs + done, piece)
            got = call(self._tid, local, _ONE, remote, _ONE, _ZERO)
            if got < 0:
                self._diagnose()
                break
            done += got
            if got < piece:
                break
        return done

    def _diagnose(self) -> None:
        if ctypes.get_errno() in (errno.EPERM, errno.EACCES):
            say_unreadable(self.tid)

    def read_string(self, addr: int, limit: int = 4096) -> bytes:
        """The NUL-terminated string at ``addr`` without its NUL; KernelError EFAULT, or ENAMETOOLONG beyond
        ``limit``."""
        text = b""
        want = 128
        while len(text) < limit:
            piece = self.read_upto(addr + len(text), want)
            end = piece.find(0)
            if end >= 0:
                return text + piece[:end]
            text += piece
            if len(piece) < want:
                raise KernelError(errno.EFAULT, f"the string at {addr:#x} cannot be read")
            want = KEPT
        raise KernelError(errno.ENAMETOOLONG, f"the path at {addr:#x} is longer than {limit} bytes")


_memories: dict[int, CallerMemory] = {}


def memory_of(tid: int) -> CallerMemory:
    """The memory of a thread, recorded or not; kept, for it is no more than the number and buffers."""
    memory = _memories.get(tid)
    if memory is None:
        if len(_memories) >= KEPT_MEMORIES:
            _memories.clear()
        memory = _memories[tid] = CallerMemory(tid)
    return memory


def _address_of(data: bytes) -> int:
    return ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0


_said: set[int] = set()


def say_unreadable(tid: int) -> None:
    """Says once per process why everything it does fails: its memory is closed to us."""
    if tid not in _said:
        _said.add(tid)
        with contextlib.suppress(OSError, ValueError):  # standard error may be closed
            print(
                f"iommufd: the memory of process {tid} is not readable (a non-dumpable or unreadable binary needs a "
                "supervisor run by root): it cannot open the machine's files, and calls on those it has are EFAULT",
                file=sys.stderr,
                flush=True,
            )


class RemoteTask:
    """One supervised thread in one call. ``notification`` is the call being answered, ``fd`` the descriptor it names
    (None where that was not asked for); see engine.task.Task."""

    __slots__ = ("_descriptors", "fd", "memory", "notification", "thread", "tid")

    def __init__(self, thread: Thread, descriptors: Descriptors) -> None:
        self.thread = thread
        self.tid = thread.tid
        self.memory = memory_of(thread.tid)
        self.notification = 0
        self.fd: int | None = None
        self._descriptors = descriptors

    # ---- memory

    def read_upto(self, addr: int, count: int) -> bytes:
        if count <= 0:
            return b""
        return self.memory.read_upto(addr, count)

    def read_into(self, addr: int, buffer: bytearray | memoryview) -> None:
        done = self.memory.read_into(addr, buffer) if len(buffer) else 0
        if done != len(buffer):
            raise KernelError(errno.EFAULT, f"only {done} of {len(buffer)} bytes at {addr:#x} can be read")

    def read(self, addr: int, count: int) -> bytes:
        data = self.memory.read_upto(addr, count) if count > 0 else b""
        if len(data) != count:
            raise KernelError(errno.EFAULT, f"only {len(data)} of {count} bytes at {addr:#x} can be read")
        return data

    def write(self, addr: int, data: bytes | bytearray | memoryview) -> None:
        if len(data) and (done := self.memory.write_upto(addr, data)) != len(data):
            raise KernelError(errno.EFAULT, f"only {done} of {len(data)} bytes at {addr:#x} can be written")

    def write_upto(self, addr: int, data: bytes | bytearray | memoryview) -> int:
        return self.memory.write_upto(addr, data) if len(data) else 0

    # ---- identity

    @property
    def space(self) -> AddressSpace:
        return self.thread.group.need_space()

    @property
    def process(self) -> Process:
        return self.thread.need_process()

    def capable(self, capability: int) -> bool:
        """The effective set of the thread, if its user namespace is the initial one, and what the machine grants."""
        return bool((self.thread.effective_capabilities() | self._descriptors.granted) >> capability & 1)

    # ---- descriptors

    def file(self, fd: int) -> File | HostFile:
        carrier = self._descriptors.find(self.thread, fd & 0xFFFFFFFF) if fd >= 0 else None
        if carrier is not None:
            return carrier.file
        from iommufd.memory.hostfile import HostFile

        return HostFile(self._descriptors.physical, duplicate(self.thread.group.tgid, self.tid, fd))

    def reserve_fd(self, cloexec: bool) -> int:
        return self._descriptors.reserve(self.thread, cloexec)

    def install_fd(self, fd: int, file: File) -> None:
        self._descriptors.install(self, fd, file)

    def release_fd(self, fd: int) -> None:
        self._descriptors.unreserve(self.thread, fd)


def duplicate(tgid: int, tid: int, fd: int) -> int:
    """A duplicate of the caller's descriptor ``fd`` in our process; KernelError EBADF when it is not open or O_PATH.

    Where the host refuses ``pidfd_getfd`` the file is opened again through /proc, which keeps its identity but not the
    access mode if the caller could not open it so itself."""
    if not 0 <= fd < 2**31:
        raise KernelError(errno.EBADF, f"{fd} is not a descriptor")
    try:
        pidfd = pidfd_open(tgid)
        try:
            own = pidfd_getfd(pidfd, fd)
        finally:
            os.close(pidfd)
    except OSError as error:
        if error.errno != errno.EPERM:
            raise KernelError(errno.EBADF, f"descriptor {fd} is not open") from None
        own = _reopen(tid, fd)
    import fcntl

    if fcntl.fcntl(own, fcntl.F_GETFL) & os.O_PATH:
        os.close(own)
        raise KernelError(errno.EBADF, f"descriptor {fd} was opened with O_PATH")
    return own


def _reopen(tid: int, fd: int) -> int:
    link = f"/proc/{tid}/fd/{fd}"
    try:
        with open(f"/proc/{tid}/fdinfo/{fd}", "rb") as info:
            flags = next(int(line.split()[1], 8) for line in info if line.startswith(b"flags:"))
        if flags & os.O_PATH:
            raise KernelError(errno.EBADF, f"descriptor {fd} was opened with O_PATH")
        return os.open(link, (flags & os.O_ACCMODE) | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise KernelError(errno.EBADF, f"descriptor {fd} cannot be reached: {error.strerror}") from None
