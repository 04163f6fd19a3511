"""Memory of our own for frames that have no other home: rescued contents, dma-bufs, device buffers.

Invariants: one sparse memfd a machine, opened on first use; a reserved range is zero until it is written; ranges never
overlap; a forgotten range is punched out, so the host's memory comes back.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading

from iommufd.errors import KernelError
from iommufd.memory.frames import PAGE_SHIFT, PAGE_SIZE
from iommufd.memory.intervals import IntervalIndex

STORE_PAGES = 1 << 40
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class Store:
    """A Source (see :mod:`iommufd.memory.frames`); positions are byte offsets in the memfd."""

    __slots__ = ("_fd", "_lock", "_used")

    def __init__(self) -> None:
        self._fd = -1
        self._lock = threading.Lock()
        self._used: IntervalIndex[None] = IntervalIndex()

    def __del__(self) -> None:
        self.close()

    def reserve(self, npages: int) -> int:
        """The position of ``npages`` zero pages. KernelError(ENOMEM) when there is no room."""
        with self._lock:
            if self._fd < 0:
                try:
                    self._fd = os.memfd_create("iommufd-store", os.MFD_CLOEXEC)
                    os.ftruncate(self._fd, STORE_PAGES << PAGE_SHIFT)
                except OSError as error:
                    raise KernelError(errno.ENOMEM, f"no memory for frames of our own: {error.strerror}") from error
            for first, _ in self._used.holes(0, STORE_PAGES - 1, npages):
                self._used.insert(first, first + npages - 1, None)
                return first << PAGE_SHIFT
        raise KernelError(errno.ENOMEM, f"no room for {npages} pages in the store")

    def load(self, position: int, count: int) -> bytes:
        data = os.pread(self._fd, count, position)
        while len(data) < count:  # a single read moves at most 2 GiB
            data += os.pread(self._fd, count - len(data), position + len(data))
        return data

    def save(self, position: int, data: bytes | bytearray | memoryview) -> None:
        done = os.pwrite(self._fd, data, position)
        while done < len(data):
            done += os.pwrite(self._fd, memoryview(data)[done:], position + done)

    def view(self, position: int, count: int) -> memoryview:
        page = position & ~(PAGE_SIZE - 1)
        size = position + count - page
        return memoryview(mmap.mmap(self._fd, size, offset=page))[position - page :]

    def forget(self, position: int, count: int) -> None:
        if count <= 0:
            return
        _libc.fallocate(self._fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, position, count)
        with self._lock:
            first, last = position >> PAGE_SHIFT, (position + count - 1) >> PAGE_SHIFT
            for begin, end, _ in list(self._used.items(first, last)):
                self._used.remove(begin)
                if begin < first:
                    self._used.insert(begin, first - 1, None)
                if end > last:
                    self._used.insert(last + 1, end, None)

    def close(self) -> None:
        """Gives all of it back to the host."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
