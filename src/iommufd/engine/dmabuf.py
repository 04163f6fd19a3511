"""dma-bufs: memory of a device, mapped by IOAS_MAP_FILE until its exporter takes it back (core 7).

:class:`DmaBufFile` is what an exporter implements (the selftest's, later VFIO PCI); :class:`DmaBufSource` is one pages
object's attachment to it (kernel: dma_buf_attachment and iopt_pages_dmabuf). Invariants:

* Nothing is pinned and nobody is charged; domains map the exporter's physical addresses as MMIO.
* A revoked attachment stays revoked. When :meth:`DmaBufFile.invalidate` returns, no domain holds an entry of it.
* ``mapped`` lists every (domain, area) with entries; it changes only under the pages object's ``busy``.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from iommufd.engine.file import POLLIN, POLLOUT, File
from iommufd.engine.pages import Pages
from iommufd.engine.source import Source
from iommufd.errors import KernelError
from iommufd.memory.extents import slice_extents
from iommufd.memory.frames import PAGE_SHIFT, PAGE_SIZE

if TYPE_CHECKING:
    from iommufd.engine.area import Area
    from iommufd.engine.pages import Owner
    from iommufd.engine.ranges import Range
    from iommufd.engine.task import Task
    from iommufd.engine.world import World
    from iommufd.iommu.domain import PagingDomain
    from iommufd.memory.frames import Extents


class DmaBufFile(File):
    """Base of exporters: one dma-buf, as a file. Subclasses say where its memory is.

    ``size`` in bytes, whole pages. An exporter that takes the memory back makes :meth:`phys` fail first and then calls
    :meth:`invalidate`."""

    link = "/dmabuf:"

    def __init__(self, world: World, size: int) -> None:
        super().__init__()
        self.world = world
        self.size = size
        self._importers: set[DmaBufSource] = set()

    def lseek(self, task: Task, offset: int = 0, whence: int = 0) -> int:
        """Only what finds out the size (Documentation/driver-api/dma-buf.rst): offset 0 from the start or the end."""
        if offset or whence not in (os.SEEK_SET, os.SEEK_END):
            raise KernelError(errno.EINVAL, f"a dma-buf cannot be positioned at {offset} (whence {whence})")
        return self.size if whence == os.SEEK_END else 0

    def poll(self) -> int:
        """No fence is ever pending."""
        return POLLIN | POLLOUT

    def mmap(self, task: Task, offset: int, length: int, prot: int, shared: bool) -> tuple[int, int]:
        raise KernelError(errno.EINVAL, "the exporter of this dma-buf does not let it be mapped")

    def attach(self) -> None:
        """A device wants in; KernelError when the exporter refuses (VFIO PCI: ENODEV while revoked)."""

    def pin(self) -> None:
        """The memory must stay where it is; KernelError when the exporter refuses."""

    def phys(self) -> Extents:
        """The physical memory of the whole buffer, one contiguous range.

        KernelError EOPNOTSUPP from exporters that do not tell (the default) or have several ranges, ENODEV while
        revoked."""
        raise KernelError(errno.EOPNOTSUPP, "the exporter of this dma-buf does not tell its physical addresses")

    def invalidate(self) -> None:
        """Tells every importer that the memory is gone. Call without locks; idempotent."""
        with self.world.lock:
            importers = list(self._importers)
        for importer in importers:
            importer.revoke()


class DmaBufSource(Source):
    """The attachment of one pages object to a dma-buf."""

    __slots__ = ("_extents", "_first_page", "file", "mapped", "pages", "revoked")

    def __init__(self, file: DmaBufFile, start: int) -> None:
        """core 7 rows 4-6."""
        super().__init__()
        self.file = file
        self.revoked = False
        self.mapped: dict[tuple[int, int], tuple[PagingDomain, Range]] = {}
        self.pages: Pages | None = None  # set once the pages object exists; cleared with it
        self._first_page = start >> PAGE_SHIFT
        file.get()
        try:
            file.attach()  # row 4
            with file.world.lock:
                file._importers.add(self)
            try:
                file.pin()  # row 5
                self._extents = file.phys()  # row 6
            except BaseException:
                with file.world.lock:
                    file._importers.discard(self)
                raise
        except BaseException:
            file.put()
            raise

    @property
    def dmabuf(self) -> DmaBufSource:
        return self

    def extents(self, first: int, count: int) -> Extents:
        """The memory of the pages object's pages ``[first, first + count)``."""
        return slice_extents(self._extents, self._first_page + first, count)

    def note(self, domain: PagingDomain, area: Area) -> None:
        """``domain`` has entries for ``area`` now (under busy)."""
        self.mapped[id(domain), area.first] = (domain, (area.first, area.last))

    def forget(self, domain: PagingDomain, area: Area) -> bool:
        """``area`` is about to leave ``domain`` (under busy); whether it has entries there."""
        return self.mapped.pop((id(domain), area.first), None) is not None

    def revoke(self) -> None:
        """The exporter took the memory back: every area leaves every domain at once, and for good (core 7)."""
        world = self.file.world
        with world.lock:
            pages = self.pages
            if pages is None:  # still being made, or dead: nothing is mapped, nor will be
                self.revoked = True
                return
        pages.lock(world)
        self.revoked = True
        for domain, (first, last) in self.mapped.values():
            domain.unmap(first, last - first + 1)
        self.mapped.clear()
        pages.unlock(world)

    def release(self) -> None:
        with self.file.world.lock:
            self.file._importers.discard(self)
            self.pages = None
        self.file.put()


def dmabuf_pages(owner: Owner, file: DmaBufFile, start: int, length: int, writable: bool) -> Pages:
    """The pages object of a MAP_FILE of bytes ``[start, start + length)`` of a dma-buf (core 7; ``length`` is not
    0)."""
    if file.size <= start + length - 1:  # row 1
        raise KernelError(
            errno.EINVAL, f"bytes [{start:#x}, {start + length - 1:#x}] are not in a dma-buf of {file.size:#x} bytes"
        )
    if length // PAGE_SIZE >= 2**32 - 1:  # row 2
        raise KernelError(errno.EINVAL, f"{length:#x} bytes are more than one dma-buf mapping can have")
    if length > 2**64 - 1 - PAGE_SIZE:  # row 3 (no dma-buf is that large: row 1 decides)
        raise KernelError(errno.EINVAL, f"the length {length:#x} is too large")
    source = DmaBufSource(file, start)  # rows 4-6
    offset = start % PAGE_SIZE
    pages = Pages(owner, start - offset, (offset + length + PAGE_SIZE - 1) >> PAGE_SHIFT, writable, source)
    with file.world.lock:
        source.pages = pages
    return pages
