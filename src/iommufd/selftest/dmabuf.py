"""The test exporter of dma-bufs (kernel: struct iommufd_test_dma_buf), mock-device 8.

Its memory is one physically contiguous, zeroed range of frames over a file in memory, so that a program which maps the
descriptor and a device that reads through an IOAS see the same bytes.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from iommufd.engine.dmabuf import DmaBufFile
from iommufd.engine.file import File
from iommufd.errors import KernelError
from iommufd.memory.frames import PAGE_SHIFT, PAGE_SIZE, Extent

if TYPE_CHECKING:
    from iommufd.engine.dispatch import Call
    from iommufd.engine.task import Task
    from iommufd.engine.world import World
    from iommufd.memory.frames import Extents
    from iommufd.uapi import iommufd_test as t

MAX_LENGTH = 2 << 20
RETURNS_0 = "dmabuf-get-returns-0"
"""Defect of 7.3: the new descriptor's number is not reported anywhere."""


class Backing:
    """The bytes (a Source of :mod:`iommufd.memory.frames`): the projector's file for the descriptor, or one of our
    own."""

    __slots__ = ("_fd", "_size")

    def __init__(self, size: int) -> None:
        self._fd = -1
        self._size = size

    def fd(self, given: int = -1) -> int:
        """The file; chosen, and given its size, by the first use."""
        if self._fd < 0:
            try:
                own = os.memfd_create("iommufd-dmabuf", os.MFD_CLOEXEC) if given < 0 else os.dup(given)
                os.ftruncate(own, self._size)
            except OSError as error:
                raise KernelError(errno.ENOMEM, f"no memory for a dma-buf: {error.strerror}") from error
            self._fd = own
        return self._fd

    def load(self, position: int, count: int) -> bytes:
        return os.pread(self.fd(), count, position)

    def save(self, position: int, data: bytes | bytearray | memoryview) -> None:
        os.pwrite(self.fd(), data, position)

    def view(self, position: int, count: int) -> memoryview | None:
        return None

    def forget(self, position: int, count: int) -> None:
        """The buffer is given back as a whole."""

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class MockDmaBuf(DmaBufFile):
    """One dma-buf of ``size`` bytes, whole pages."""

    mappable = True

    def __init__(self, world: World, size: int, mode: int) -> None:
        super().__init__(world, size)
        self.mode = mode
        self.revoked = False
        pages = size >> PAGE_SHIFT
        self._backing = Backing(size)
        self._chunk = world.physical.frames.contiguous(self, pages)
        self._chunk.place(0, pages, self._backing)
        self._chunk.hold()

    def phys(self) -> Extents:
        """ENODEV while revoked."""
        if self.revoked:
            raise KernelError(errno.ENODEV, "the dma-buf is revoked")
        return (Extent(self._chunk, 0, self._chunk.npages),)

    def revoke(self, revoked: bool) -> None:
        """8.2 row 4; importers are told in both directions, so an un-revoke takes live mappings away as well."""
        self.revoked = revoked
        self.invalidate()

    def mmap(self, task: Task, offset: int, length: int, prot: int, shared: bool) -> tuple[int, int]:
        """EINVAL for a range outside the buffer."""
        if offset + length > self.size:
            raise KernelError(errno.EINVAL, f"[{offset:#x}, +{length:#x}) is outside a dma-buf of {self.size:#x} bytes")
        fd = self._backing.fd(self.memory_fd)
        self.get()
        return fd, offset

    def release(self) -> None:
        self._chunk.drop()
        self._backing.close()


def dmabuf_get(call: Call, cmd: t.test_dmabuf_get) -> int:
    """Op DMABUF_GET (8.1): the new descriptor's number; 0 on a machine with that defect."""
    size = -(-cmd.length // PAGE_SIZE) * PAGE_SIZE
    if not 0 < size <= MAX_LENGTH:  # row 1
        raise KernelError(errno.EINVAL, f"a dma-buf of {cmd.length} bytes; possible are 1 to {MAX_LENGTH}")
    file = MockDmaBuf(call.world, size, cmd.open_flags & os.O_ACCMODE)  # row 2
    fd = call.reserve_fd(file, bool(cmd.open_flags & os.O_CLOEXEC))
    return 0 if RETURNS_0 in call.world.defects else fd  # row 3


def dmabuf_revoke(call: Call, cmd: t.test_dmabuf_revoke) -> None:
    """Op DMABUF_REVOKE (8.2)."""
    file = call.task.file(cmd.dmabuf_fd)  # row 1
    if not isinstance(file, File):
        foreign = os.readlink(f"/proc/self/fd/{file.fd}").startswith("/dmabuf:")
        file.close()
        if foreign:  # row 3
            raise KernelError(errno.EOPNOTSUPP, "the dma-buf is another exporter's")
        raise KernelError(errno.EINVAL, f"descriptor {cmd.dmabuf_fd} is not a dma-buf")  # row 2
    if not isinstance(file, DmaBufFile):  # row 2
        raise KernelError(errno.EINVAL, f"descriptor {cmd.dmabuf_fd} is not a dma-buf")
    if not isinstance(file, MockDmaBuf):  # row 3
        raise KernelError(errno.EOPNOTSUPP, "the dma-buf is another exporter's")
    file.revoke(cmd.revoked != 0)  # row 4
