"""ProcHost: a living Linux process as the Host of an AddressSpace, through /proc and process_vm_readv.

Invariants: ``/proc/PID/mem`` and ``/proc/PID/maps`` are opened once and stay tied to the mm of that moment, so they
answer nothing (0 bytes, ESRCH) once it exits or execs, and never show another program's memory. ``read`` and ``write``
use process_vm_readv/writev, which honour page protections but name a process: they are for the length of a call of that
process. ``peek`` and ``poke`` use the mem file, which does not honour protections; many bytes go by process_vm, which
is twice as fast, where that comes to the same: a read after which the process still has this mm, and a write while no
exec is announced (:meth:`ProcHost.exec_coming` waits for those under way). Works for the own process too: a wrong
address is a short count, never a signal. Safe to call from several threads.

The kernel objects are ``mm_struct`` and its VMAs.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
import sys
import threading
from collections.abc import Callable

from iommufd.errors import KernelError
from iommufd.memory.frames import PAGE_SHIFT, PAGE_SIZE
from iommufd.memory.kinds import Kinds, kernel_page_size
from iommufd.memory.vma import READ, SHARED, WRITE, Vma

PROCMAP_QUERY = 0xC0686611  # _IOWR('f', 17, struct procmap_query), Linux 6.11
PROCMAP_QUERY_COVERING_OR_NEXT_VMA = 0x10
PAGEMAP_SCAN = 0xC0606610  # _IOWR('f', 16, struct pm_scan_arg), Linux 6.7
PAGE_IS_PRESENT, PAGE_IS_SWAPPED = 1 << 3, 1 << 4

# struct procmap_query: size flags addr | start end vma_flags page_size offset inode |
# major minor name_size build_id_size | name_addr build_id_addr
_QUERY = struct.Struct("=QQQQQQQQQIIIIQQ")
_QUESTION = _QUERY.pack(_QUERY.size, PROCMAP_QUERY_COVERING_OR_NEXT_VMA, *[0] * 13)
_ADDR_AT, _NAME_SIZE_AT, _NAME_ADDR_AT = 16, 80, 88
_ANSWER = slice(24, _NAME_SIZE_AT)
_SIZE = struct.Struct("=I")
_put_addr = struct.Struct("=Q").pack_into
_put_size = _SIZE.pack_into
# struct pm_scan_arg: size flags start end walk_end vec vec_len max_pages inverted mask anyof_mask return_mask
_SCAN = struct.Struct("=12Q")
_REGION = struct.Struct("=3Q")  # struct page_region: start end categories
_NAME_BYTES = 4096
_REGIONS = 512

_KEPT_BYTES = 64 << 10  # copies up to this size go through a kept buffer

_libc = ctypes.CDLL(None, use_errno=True)
_readv, _writev = _libc.process_vm_readv, _libc.process_vm_writev
for _function in (_readv, _writev):
    _function.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_ulong,
        ctypes.c_void_p,
        ctypes.c_ulong,
        ctypes.c_ulong,
    ]
    _function.restype = ctypes.c_ssize_t


def _address(buffer: bytearray) -> int:
    """Where the buffer's bytes are; whoever keeps the number keeps the buffer. (A ctypes array would need a type for
    each length, and types are garbage only the cyclic collector finds.)"""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def _iovecs(ours: int, theirs: int, count: int) -> tuple[int, int, int, int, bytearray]:
    """The four middle arguments of a process_vm call, and what keeps them in place."""
    iov = bytearray(struct.pack("=4Q", ours, count, theirs, count))
    at = _address(iov)
    return at, 1, at + 16, 1, iov


_new_bytes = ctypes.pythonapi.PyBytes_FromStringAndSize
_new_bytes.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t]
_new_bytes.restype = ctypes.py_object


def unfilled(count: int) -> bytes:
    """``count`` bytes of anything, for whoever made them to fill in place before another sees them: zeroes would cost
    as much as a tenth of the copy."""
    data: bytes = _new_bytes(None, count)
    return data


_BUFFER = 128  # at least a Py_buffer; its first word is the address
_get_buffer, _release_buffer = ctypes.pythonapi.PyObject_GetBuffer, ctypes.pythonapi.PyBuffer_Release
_get_buffer.argtypes = [ctypes.py_object, ctypes.c_void_p, ctypes.c_int]
_release_buffer.argtypes = [ctypes.c_void_p]
_release_buffer.restype = None


class _Copier:
    """A buffer and the two iovecs of one process_vm call, laid out once."""

    __slots__ = ("iov", "local", "remote", "view")

    def __init__(self) -> None:
        buffer, iov = bytearray(_KEPT_BYTES), bytearray(32)  # iov: local base and length, remote base and length
        self.view = memoryview(buffer)
        self.iov = memoryview(iov).cast("Q")
        self.local = _address(iov)
        self.remote = self.local + 16
        self.iov[0] = _address(buffer)


class _Asker:
    """A PROCMAP_QUERY with room for the name."""

    __slots__ = ("name", "question")

    def __init__(self) -> None:
        buffer = bytearray(_NAME_BYTES)
        self.name = memoryview(buffer)
        self.question = bytearray(_QUESTION)
        _put_addr(self.question, _NAME_ADDR_AT, _address(buffer))


class ProcHost:
    """The address space of process (or thread) ``pid`` as it is now.

    ProcessLookupError when there is no such process, KernelError(EFAULT) when its memory is closed to us."""

    __slots__ = (
        "_askers",
        "_copiers",
        "_exec_coming",
        "_kinds",
        "_last",
        "_maps",
        "_mem",
        "_pagemap",
        "_writing",
        "pid",
    )

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._mem = self._maps = self._pagemap = -1
        try:
            self._maps = os.open(f"/proc/{pid}/maps", os.O_RDONLY | os.O_CLOEXEC)
            self._mem = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
            with contextlib.suppress(OSError):  # without it more is rescued, and guard regions stay unseen
                self._pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except PermissionError as error:
            self.close()
            raise KernelError(errno.EFAULT, f"the memory of process {pid} is closed to us: {error.strerror}") from None
        except FileNotFoundError:
            self.close()
            raise ProcessLookupError(errno.ESRCH, f"no process {pid}") from None
        self._kinds = Kinds(pid)
        self._askers: list[_Asker] = []
        self._copiers: list[_Copier] = []
        self._writing = threading.Lock()
        self._exec_coming = False
        self._last: tuple[bytes | bytearray, Vma, bytes] = b"", Vma(0, 0, 0), b""

    def __del__(self) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------------------ VMAs

    def query(self, va: int) -> Vma | None:
        """See :class:`iommufd.memory.vma.Host`. The gate VMA ([vsyscall]) is above user space and not one."""
        if va >= 1 << 63:
            return None
        raw, vma, _ = self._last
        try:
            if vma.kind == "shmem" and vma.flags & SHARED and vma.start <= va < vma.end:
                return self._named(va)
            question = bytearray(_QUESTION)
            _put_addr(question, _ADDR_AT, va)
            fcntl.ioctl(self._maps, PROCMAP_QUERY, question)
            return vma if question[_ANSWER] == raw else self._named(va)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return None
            if error.errno in (errno.ENOTTY, errno.EINVAL):
                return self._parse(va)
            # ESRCH, or EBADF: closed when the space was given up
            raise ProcessLookupError(errno.ESRCH, f"the address space of process {self.pid} is gone") from None

    def _named(self, va: int) -> Vma:
        """Asks with the name, and remembers the answer.

        What is shared in the kernel's own tmpfs is asked for so every time, because only the name tells a SysV segment
        from a memfd that has the same inode number."""
        pool = self._askers
        asker = pool.pop() if pool else _Asker()
        question, text = asker.question, asker.name
        _put_addr(question, _ADDR_AT, va)
        _put_size(question, _NAME_SIZE_AT, _NAME_BYTES)
        fcntl.ioctl(self._maps, PROCMAP_QUERY, question)
        answer, (size,) = question[_ANSWER], _SIZE.unpack_from(question, _NAME_SIZE_AT)
        name = bytes(text[: max(size - 1, 0)])
        raw, vma, known = self._last
        if answer != raw or name != known:
            _, _, _, start, end, flags, page_size, offset, ino, major, minor, _, _, _, _ = _QUERY.unpack(question)
            dev, decoded = os.makedev(major, minor), name.decode("utf-8", "surrogateescape")
            kind = self._kinds.of(start, end, dev, ino, decoded, page_size)
            vma = Vma(start, end, flags, kind=kind, dev=dev, ino=ino, offset=offset, name=decoded, page_size=page_size)
            self._last = answer, vma, name  # one object, so that no thread pairs bytes with another's VMA
        pool.append(asker)
        return vma

    def _parse(self, va: int) -> Vma | None:
        """The same from the text of maps, for kernels without PROCMAP_QUERY."""
        with open(f"/proc/{self.pid}/maps", encoding="utf-8", errors="surrogateescape") as lines:
            if not os.pread(self._maps, 1, 0):
                raise ProcessLookupError(errno.ESRCH, f"the address space of process {self.pid} is gone")
            for line in lines:
                words = line.rstrip("\n").split(maxsplit=5)
                start, _, end = words[0].partition("-")
                if int(end, 16) <= va:
                    continue
                if int(start, 16) >= 1 << 63:
                    break
                return self._parse_line(int(start, 16), int(end, 16), words)
        return None

    def _parse_line(self, start: int, end: int, words: list[str]) -> Vma:
        flags = sum(bit for letter, bit in zip("rwxs", (1, 2, 4, SHARED), strict=True) if letter in words[1])
        major, _, minor = words[3].partition(":")
        dev, ino = os.makedev(int(major, 16), int(minor, 16)), int(words[4])
        name = words[5] if len(words) > 5 else ""
        page_size = PAGE_SIZE
        if ino and not start % (2 << 20) and not end % (2 << 20):
            page_size = kernel_page_size(self.pid, start, end)
        kind = self._kinds.of(start, end, dev, ino, name, page_size)
        offset = int(words[2], 16) if ino else 0
        return Vma(start, end, flags, kind=kind, dev=dev, ino=ino, offset=offset, name=name, page_size=page_size)

    # ---------------------------------------------------------------------------------------------------------- copies

    def read(self, va: int, count: int) -> bytes:
        """The leading bytes that can be read under the page protections."""
        if count <= 0 or va >= 1 << 64:
            return b""
        if count > _KEPT_BYTES:
            data, done = self._read_bulk(va, count)
        else:
            pool = self._copiers
            copier = pool.pop() if pool else _Copier()
            iov = copier.iov
            iov[1] = iov[3] = count
            iov[2] = va
            done = _readv(self.pid, copier.local, 1, copier.remote, 1, 0)
            data = bytes(copier.view[:done]) if done > 0 else b""
            pool.append(copier)
        if done < 0 and ctypes.get_errno() == errno.ESRCH:
            return self.peek(va, self._allowed(va, count, READ))
        return data

    def write(self, va: int, data: bytes | bytearray | memoryview) -> int:
        """Writes the leading bytes that can be written under the page protections, and returns how many."""
        count = len(data)
        if not count or va >= 1 << 64:
            return 0
        if count > _KEPT_BYTES:
            done = self._write_bulk(va, data)
        else:
            pool = self._copiers
            copier = pool.pop() if pool else _Copier()
            copier.view[:count] = data
            iov = copier.iov
            iov[1] = iov[3] = count
            iov[2] = va
            done = _writev(self.pid, copier.local, 1, copier.remote, 1, 0)
            pool.append(copier)
        if done < 0 and ctypes.get_errno() == errno.ESRCH:
            return self.poke(va, data[: self._allowed(va, count, WRITE)])
        return max(done, 0)

    def _read_bulk(self, va: int, count: int) -> tuple[bytes, int]:
        """As process_vm_readv: the bytes, and what the call returned. The bytes are filled in place, before anybody
        else can see them, for a copy would cost as much as the read."""
        data = unfilled(count)
        done = self._bulk(_readv, va, data)
        return (data if done == count else data[: max(done, 0)]), done

    def _write_bulk(self, va: int, data: bytes | bytearray | memoryview) -> int:
        """As process_vm_writev."""
        return self._bulk(_writev, va, data)

    def _bulk(self, call: Callable[..., int], va: int, data: bytes | bytearray | memoryview) -> int:
        buffer = bytearray(_BUFFER)
        at = _address(buffer)
        _get_buffer(data, at, 0)
        try:
            ours, one, theirs, other, _keep = _iovecs(int.from_bytes(buffer[:8], sys.byteorder), va, len(data))
            return call(self.pid, ours, one, theirs, other, 0)
        finally:
            _release_buffer(at)

    def exec_coming(self) -> None:
        """The process may have another mm any moment, so from now on nothing is written to it by its number."""
        with self._writing:
            self._exec_coming = True

    def _is_its_process(self) -> bool:
        """Whether process ``pid`` still has this mm; after an exec it has another one."""
        try:
            self.query(0)
        except ProcessLookupError:
            return False
        return True

    def _allowed(self, va: int, count: int, need: int) -> int:
        """How many leading bytes of ``[va, va + count)`` are mapped with ``need``: for an mm whose first thread is gone
        while others live, which process_vm does not find any more."""
        at, end = va, va + count
        with contextlib.suppress(ProcessLookupError):  # it ends here, then
            while at < end:
                vma = self.query(at)
                if vma is None or vma.start > at or not vma.flags & need:
                    break
                at = min(end, vma.end)
        return at - va

    def peek(self, va: int, count: int) -> bytes:
        """The leading bytes that are there, whatever the page protections."""
        if va >= 1 << 63:
            return b""
        if count > _KEPT_BYTES and self._is_its_process():  # half the price of /proc/PID/mem
            data, done = self._read_bulk(va, count)
            if done == count and self._is_its_process():
                return data
        try:
            return os.pread(self._mem, count, va)
        except OSError:
            return b""

    def poke(self, va: int, data: bytes | bytearray | memoryview) -> int:
        """Writes the leading bytes whose pages are there, whatever the page protections."""
        if va >= 1 << 63:
            return 0
        count = len(data)
        if count > _KEPT_BYTES:
            with self._writing:
                if not self._exec_coming and self._is_its_process() and self._write_bulk(va, data) == count:
                    return count
        try:
            return os.pwrite(self._mem, data, va)
        except OSError:
            return 0

    def touched(self, va: int, end: int) -> list[tuple[int, int]]:
        """The parts of ``[va, end)`` that are mapped and may hold something else than zeroes.

        Of anonymous memory those are the pages ever touched (all, where PAGEMAP_SCAN is missing), of files all."""
        found: list[tuple[int, int]] = []
        try:
            while va < end:
                vma = self.query(va)
                if vma is None or vma.start >= end:
                    break
                start, stop = max(va, vma.start), min(end, vma.end)
                found += self._scan(start, stop) if not vma.ino else [(start, stop)]
                va = stop
        except ProcessLookupError:
            return []
        return found

    def _scan(self, start: int, end: int) -> list[tuple[int, int]]:
        regions = bytearray(_REGIONS * _REGION.size)
        found: list[tuple[int, int]] = []
        mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED
        while start < end:
            question = bytearray(
                _SCAN.pack(_SCAN.size, 0, start, end, 0, _address(regions), _REGIONS, 0, 0, 0, mask, mask)
            )
            try:
                count = fcntl.ioctl(self._pagemap, PAGEMAP_SCAN, question)
            except OSError:
                return [*found, (start, end)]
            for at in range(0, count * _REGION.size, _REGION.size):
                first, last, _ = _REGION.unpack_from(regions, at)
                if found and found[-1][1] == first:
                    found[-1] = found[-1][0], last
                else:
                    found.append((first, last))
            start = _SCAN.unpack(question)[4]
        return found

    # ---------------------------------------------------------------------------------------------------------- others

    def open_file(self, vma: Vma) -> int | None:
        """The file ``vma`` maps, for reading and writing if possible: by map_files (privileged), or by any descriptor
        of the process that is the same file."""
        fd = _open_same(f"/proc/{self.pid}/map_files/{vma.start:x}-{vma.end:x}", vma)
        if fd is None:
            with contextlib.suppress(OSError):  # closed to us, or gone
                for number in os.listdir(f"/proc/{self.pid}/fd"):
                    fd = _open_same(f"/proc/{self.pid}/fd/{number}", vma)
                    if fd is not None:
                        break
        return fd

    def mlocked_pages(self) -> int:
        """VmLck: what the process itself has locked."""
        with contextlib.suppress(OSError), open(f"/proc/{self.pid}/status", "rb") as status:  # it is gone
            for line in status:
                if line.startswith(b"VmLck:"):
                    return int(line.split()[1]) << 10 >> PAGE_SHIFT
        return 0

    def alive(self) -> bool:
        """Whether the mm still exists."""
        try:
            return bool(os.pread(self._maps, 1, 0))
        except OSError:
            return False

    def close(self) -> None:
        """Gives the descriptors back; the host answers as one that is gone."""
        fds = self._mem, self._maps, self._pagemap
        self._mem = self._maps = self._pagemap = -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)


def _open_same(path: str, vma: Vma) -> int | None:
    """Opens ``path``, if it is the very file that ``vma`` maps."""
    with contextlib.suppress(OSError):  # not there, or closed to us
        status = os.stat(path)
        if status.st_ino == vma.ino and status.st_dev == vma.dev:
            for flags in (os.O_RDWR, os.O_RDONLY):
                with contextlib.suppress(OSError):  # not with these flags
                    return os.open(path, flags | os.O_CLOEXEC)
    return None
