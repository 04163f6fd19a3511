"""The test exporter of dma-bufs (kernel: struct iommufd_test_dma_buf), mock-device 8.

Its memory is one physically contiguous, zeroed range of frames. A program cannot map the descriptor (EINVAL on 7.3.4);
only devices reach the bytes, through an IOAS.
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
    from iommufd.engine.world import World
    from iommufd.memory.frames import Extents
    from iommufd.uapi import iommufd_test as t

MAX_LENGTH = 2 << 20
RETURNS_0 = "dmabuf-get-returns-0"
"""Defect of 7.3: the new descriptor's number is not reported anywhere."""


class MockDmaBuf(DmaBufFile):
    """One dma-buf of ``size`` bytes, whole pages."""

    def __init__(self, world: World, size: int, mode: int) -> None:
        super().__init__(world, size)
        self.mode = mode
        self.revoked = False
        self._chunk = world.physical.buffer("test dma-buf", size >> PAGE_SHIFT)

    def phys(self) -> Extents:
        """ENODEV while revoked."""
        if self.revoked:
            raise KernelError(errno.ENODEV, "the dma-buf is revoked")
        return (Extent(self._chunk, 0, self._chunk.npages),)

    def revoke(self, revoked: bool) -> None:
        """8.2 row 4; importers are told in both directions, so an un-revoke takes live mappings away as well."""
        self.revoked = revoked
        self.invalidate()

    def release(self) -> None:
        self._chunk.drop()


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
