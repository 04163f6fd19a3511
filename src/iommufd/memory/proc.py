"""ProcHost: a living Linux process as the Host of an AddressSpace, through /proc and process_vm_readv.

Invariants: ``/proc/PID/mem`` and ``/proc/PID/maps`` are opened once and stay tied to the mm of that moment, so they answer
nothing (0 bytes, ESRCH) once it exits or execs, and can never show another program's memory. ``read`` and ``write`` use
process_vm_readv/writev, which honour page protections; ``peek`` and ``poke`` use the mem file, which does not. Works for
the own process too: a wrong address is a short count, never a signal.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct

from iommufd.errors import KernelError
from iommufd.memory.frames import PAGE_SHIFT, PAGE_SIZE
from iommufd.memory.hostfile import file_kind
from iommufd.memory.space import SHARED, Vma

PROCMAP_QUERY = 0xC0686611  # _IOWR('f', 17, struct procmap_query), Linux 6.11
PROCMAP_QUERY_COVERING_OR_NEXT_VMA = 0x10
PAGEMAP_SCAN = 0xC0606610  # _IOWR('f', 16, struct pm_scan_arg), Linux 6.7
PAGE_IS_PRESENT, PAGE_IS_SWAPPED = 1 << 3, 1 << 4

# size flags addr | start end vma_flags page_size offset inode | major minor name_size build_size | name_addr build_addr
_QUERY = struct.Struct("=QQQQQQQQQIIIIQQ")
_SCAN = struct.Struct("=12Q")
_NAME_BYTES = 4096

_libc = ctypes.CDLL(None, use_errno=True)


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


_iovec_p = ctypes.POINTER(_Iovec)
for _function in (_libc.process_vm_readv, _libc.process_vm_writev):
    _function.argtypes = [ctypes.c_int, _iovec_p, ctypes.c_ulong, _iovec_p, ctypes.c_ulong, ctypes.c_ulong]
    _function.restype = ctypes.c_ssize_t


class ProcHost:
    """The process (or thread) ``pid``. KernelError(EFAULT) when its memory is closed to us; ProcessLookupError when gone."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        try:
            self._mem = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
            self._maps = os.open(f"/proc/{pid}/maps", os.O_RDONLY | os.O_CLOEXEC)
        except (PermissionError, FileNotFoundError) as error:
            if isinstance(error, FileNotFoundError):
                raise ProcessLookupError(errno.ESRCH, f"no process {pid}") from None
            raise KernelError(
                errno.EFAULT, f"the memory of process {pid} is not open to us: {error.strerror}"
            ) from None
        self._pagemap = -1
        self._name = ctypes.create_string_buffer(_NAME_BYTES)
        self._name_addr = ctypes.addressof(self._name)
        self._kinds: dict[int, str] = {}

    def query(self, va: int) -> Vma | None:
        if va >= 1 << 63:
            return None
        buffer = bytearray(
            _QUERY.pack(
                104, PROCMAP_QUERY_COVERING_OR_NEXT_VMA, va, 0, 0, 0, 0, 0, 0, 0, 0, _NAME_BYTES, 0, self._name_addr, 0
            )
        )
        try:
            fcntl.ioctl(self._maps, PROCMAP_QUERY, buffer)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return None
            if error.errno == errno.ENOTTY:
                return self._parse(va)
            if error.errno == errno.ESRCH:
                raise ProcessLookupError(errno.ESRCH, f"the address space of process {self.pid} is gone") from None
            raise
        _, _, _, start, end, flags, page_size, offset, ino, major, minor, name_size, _, _, _ = _QUERY.unpack(buffer)
        if not ino and not major and not minor and name_size == 0:
            return Vma(start, end, flags, page_size=page_size)
        name = self._name.raw[: max(name_size - 1, 0)].decode("utf-8", "surrogateescape")
        dev = os.makedev(major, minor)
        return Vma(
            start,
            end,
            flags,
            kind=self._kind(dev, ino, name, page_size),
            dev=dev,
            ino=ino,
            offset=offset,
            name=name,
            page_size=page_size,
        )

    def _parse(self, va: int) -> Vma | None:
        with open(f"/proc/{self.pid}/maps", encoding="utf-8", errors="surrogateescape") as lines:
            for line in lines:
                words = line.rstrip("\n").split(maxsplit=5)
                start, end = (int(word, 16) for word in words[0].split("-"))
                if end <= va:
                    continue
                perms = words[1]
                flags = sum(bit for char, bit in (("r", 1), ("w", 2), ("x", 4), ("s", 8)) if char in perms)
                major, minor = (int(word, 16) for word in words[3].split(":"))
                dev, ino, name = os.makedev(major, minor), int(words[4]), words[5] if len(words) > 5 else ""
                kind = self._kind(dev, ino, name, PAGE_SIZE)
                return Vma(start, end, flags, kind=kind, dev=dev, ino=ino, offset=int(words[2], 16), name=name)
        return None

    def _kind(self, dev: int, ino: int, name: str, page_size: int) -> str:
        if page_size > PAGE_SIZE:
            return "hugetlbfs"
        if name.startswith("[v") and name.rstrip("]") in ("[vvar", "[vvar_vclock", "[vsyscall"):
            return "special"
        if name.startswith(("/secretmem", "anon_inode:")):
            return "special"
        if name.startswith(("/memfd:", "/SYSV", "/dev/zero (deleted)")):
            return "shmem"
        if not ino:
            return "anon"
        return "other"

    def _transfer(self, function: object, va: int, buffer: object, count: int) -> int:
        local = _Iovec(ctypes.addressof(buffer), count)  # type: ignore[arg-type]
        remote = _Iovec(va, count)
        done = function(self.pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)  # type: ignore[operator]
        return max(int(done), 0)

    def read(self, va: int, count: int) -> bytes:
        if va >= 1 << 64 or not count:
            return b""
        buffer = ctypes.create_string_buffer(count)
        done = self._transfer(_libc.process_vm_readv, va, buffer, count)
        return buffer.raw[:done]  # .raw is a copy of now

    def write(self, va: int, data: bytes | bytearray | memoryview) -> int:
        if va >= 1 << 64 or not len(data):
            return 0
        buffer = (ctypes.c_char * len(data)).from_buffer_copy(data)
        return self._transfer(_libc.process_vm_writev, va, buffer, len(data))

    def peek(self, va: int, count: int) -> bytes:
        if va >= 1 << 63:
            return b""
        try:
            return os.pread(self._mem, count, va)
        except OSError:
            return b""

    def poke(self, va: int, data: bytes | bytearray | memoryview) -> int:
        if va >= 1 << 63:
            return 0
        try:
            return os.pwrite(self._mem, data, va)
        except OSError:
            return 0

    def touched(self, va: int, end: int) -> list[tuple[int, int]]:
        return [(va, end)]

    def open_file(self, vma: Vma) -> int | None:
        """Through map_files (root) or any descriptor of the process that is the same inode."""
        with contextlib.suppress(OSError):
            return os.open(f"/proc/{self.pid}/map_files/{vma.start:x}-{vma.end:x}", os.O_RDWR | os.O_CLOEXEC)
        with contextlib.suppress(OSError):
            for number in os.listdir(f"/proc/{self.pid}/fd"):
                path = f"/proc/{self.pid}/fd/{number}"
                with contextlib.suppress(OSError):
                    status = os.stat(path)
                    if (status.st_dev, status.st_ino) == (vma.dev, vma.ino):
                        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
        return None

    def mlocked_pages(self) -> int:
        with (
            contextlib.suppress(OSError),
            open(f"/proc/{self.pid}/status", encoding="ascii", errors="replace") as lines,
        ):
            for line in lines:
                if line.startswith("VmLck:"):
                    return int(line.split()[1]) * 1024 >> PAGE_SHIFT
        return 0

    def alive(self) -> bool:
        try:
            return self.query(0) is not None
        except OSError:
            return False

    def close(self) -> None:
        for fd in (self._mem, self._maps, self._pagemap):
            if fd >= 0:
                os.close(fd)
        self._mem = self._maps = self._pagemap = -1


__all__ = ["SHARED", "ProcHost", "file_kind"]
