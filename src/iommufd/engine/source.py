"""Sources of frames other than a process's memory: a file of the host, a dma-buf (core 4.10, 5.1, 7).

A source belongs to one pages object. ``users`` counts the areas and operations in flight that refer to that object,
under ``World.lock``; when it falls to zero whoever lowered it calls :meth:`Source.release`, without the lock.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from iommufd.engine.file import File
from iommufd.errors import KernelError
from iommufd.memory.frames import PAGE_SHIFT

if TYPE_CHECKING:
    from iommufd.engine.dmabuf import DmaBufSource
    from iommufd.memory.frames import Extents
    from iommufd.memory.hostfile import HostFile


class Source:
    """What a pages object asks for frames."""

    __slots__ = ("users",)

    is_file = False

    def __init__(self) -> None:
        self.users = 1  # of whoever made it

    @property
    def dmabuf(self) -> DmaBufSource | None:
        """Itself, if it is a dma-buf: nothing is pinned then, and it may be taken back."""
        return None

    def pin(self, offset: int, count: int) -> Extents:
        """Long-term pin of ``count`` pages from byte ``offset`` (page-aligned) on; all or nothing."""
        raise KernelError(errno.EINVAL, "this source has no pages that can be pinned")

    def release(self) -> None:
        """The pages object is dead: gives the file or buffer back. Never fails."""


class FileSource(Source):
    """A file handed over with IOAS_MAP_FILE. Which kinds can be pinned, and how far, shows at pin time only (core
    4.10)."""

    __slots__ = ("file",)

    is_file = True

    def __init__(self, file: HostFile | File) -> None:
        super().__init__()
        self.file = file
        if isinstance(file, File):
            file.get()

    def pin(self, offset: int, count: int) -> Extents:
        if isinstance(self.file, File):
            raise KernelError(errno.EINVAL, f"{self.file.link} is neither a memfd nor a hugetlbfs file")
        if offset + (count << PAGE_SHIFT) > 2**63:
            raise KernelError(errno.EINVAL, f"no file has bytes at offset {offset:#x}")
        extents: Extents = self.file.pin(offset >> PAGE_SHIFT, count)
        return extents

    def release(self) -> None:
        if isinstance(self.file, File):
            self.file.put()
        else:
            self.file.close()
