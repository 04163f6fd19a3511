"""HostFile: a file of the host handed over for IOAS_MAP_FILE.

Invariants: it owns its descriptor; closing the program's does not matter. Nothing is checked before a pin. The kernel
object is the ``struct file`` behind a FILE pages object; the rules are those of memfd_pin_folios as core 4.10 lays out.

Holes are not filled at the pin (they read as zeroes and are allocated when written), except on hugetlbfs, where
running out of huge pages must be known then (ENOMEM).
"""

from __future__ import annotations

import contextlib
import errno
import os

from iommufd.errors import KernelError
from iommufd.memory.files import FileSpace
from iommufd.memory.frames import PAGE_SHIFT, Extents
from iommufd.memory.kinds import file_kind
from iommufd.memory.physical import Physical


class HostFile:
    """``fd`` becomes this object's. ``dev``, ``ino`` as fstat tells; ``kind`` 'shmem', 'hugetlbfs', 'dmabuf' or
    'other'."""

    __slots__ = ("_physical", "_space", "dev", "fd", "ino", "kind", "order")

    def __init__(self, physical: Physical, fd: int) -> None:
        self.fd = fd
        status = os.fstat(fd)
        self.dev, self.ino = status.st_dev, status.st_ino
        kind, self.order = file_kind(fd)
        self.kind = kind if kind in ("shmem", "hugetlbfs", "dmabuf") else "other"
        self._physical = physical
        self._space: FileSpace | None = None

    def size(self) -> int:
        """The file's size in bytes, now."""
        return os.fstat(self.fd).st_size

    def pin(self, first_page: int, npages: int) -> Extents:
        """Pins file pages ``[first_page, first_page + npages)``.

        KernelError: EINVAL for a file that is neither shmem nor hugetlbfs, an offset of 2**63 or more, or a last byte
        beyond the file's end; ENOMEM when no memory is left (core 4.10, 5.5 FILE)."""
        start, end = first_page << PAGE_SHIFT, (first_page + npages) << PAGE_SHIFT
        if self.kind not in ("shmem", "hugetlbfs"):
            raise KernelError(errno.EINVAL, f"file {self.dev:#x}:{self.ino} is neither shmem (memfd) nor hugetlbfs")
        if end - 1 >= 2**63:
            raise KernelError(errno.EINVAL, f"file range [{start:#x}, {end - 1:#x}] passes 2**63")
        size = self.size()
        if end > size:
            raise KernelError(
                errno.EINVAL, f"file range [{start:#x}, {end - 1:#x}] passes the end of the file, {size:#x} bytes"
            )
        if self.kind == "hugetlbfs":
            self._allocate(start, end)
        space = self._space
        if space is None:
            space = self._space = self._physical.file_space((self.dev, self.ino, ""), self.order)
        with self._physical.lock:
            extents = space.resolve(first_page, npages, (0, (size - 1) >> PAGE_SHIFT))
            for extent in extents:
                extent.chunk.pin(extent.index, extent.count)
            space.fresh = False
            space.offer(self.fd)
        return extents

    def _allocate(self, start: int, end: int) -> None:
        with contextlib.suppress(PermissionError):  # a write seal: what is not there reads as zeroes
            try:
                os.posix_fallocate(self.fd, start, end - start)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.ENOMEM):
                    raise KernelError(
                        errno.ENOMEM, f"no huge pages for file range [{start:#x}, {end - 1:#x}]"
                    ) from None
                if error.errno != errno.EBADF:  # not open for writing
                    raise

    def close(self) -> None:
        """Gives the descriptor back; pinned frames keep their contents."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        if self._space is not None:
            self._space.release()
            self._space = None
