"""Memory of an iommufd descriptor that a program may map (kernel: struct iommufd_mmap and the context's maple tree).

Invariants (core 1.7, events-viommu 9.1):

* A region belongs to one object, begins at the lowest free offset >= one page that has room for it, and can be mapped
  only whole. It goes with its owner; while a mapping of it exists the owner has a ``users`` count per mapping.
* All regions of a context lie in one file in memory, the *store*, at the very offset a program passes to mmap(2). A
  projector whose descriptor is such a file gives it (``File.memory_fd``) and lets the program map it natively; a
  mapping made that way is the memory the device model reads and writes.
* The store has its final size from its first use on (a mapping must never raise SIGBUS).
  Memory of a region that went is given back; a new region reads as zero.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import resource
from typing import TYPE_CHECKING

from iommufd.engine.object import PUBLISHED
from iommufd.errors import KernelError
from iommufd.memory.frames import PAGE_SIZE
from iommufd.memory.intervals import IntervalIndex

if TYPE_CHECKING:
    from iommufd.engine.context import Context
    from iommufd.engine.object import Object

STORE_SIZE = 1 << 62  # bytes of offset space; a file in memory costs only what was written
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

PROT_WRITE, PROT_EXEC = 2, 4
O_RDONLY, O_WRONLY = 0, 1


class MmapRegion:
    """``length`` bytes at ``offset`` of the store, which belong to ``owner``. ``mappings`` counts live mappings."""

    __slots__ = ("length", "mappings", "offset", "owner", "store")

    def __init__(self, store: MmapStore, owner: Object, offset: int, length: int) -> None:
        self.store = store
        self.owner = owner
        self.offset = offset
        self.length = length
        self.mappings = 0

    def read(self, at: int, count: int) -> bytes:
        """``count`` bytes from ``at`` of the region."""
        if not 0 <= at <= at + count <= self.length:
            raise ValueError(f"[{at}, {at + count}) is outside a region of {self.length} bytes")
        return os.pread(self.store.fd, count, self.offset + at)

    def write(self, at: int, data: bytes) -> None:
        """Stores ``data`` from ``at`` of the region on."""
        if not 0 <= at <= at + len(data) <= self.length:
            raise ValueError(f"[{at}, {at + len(data)}) is outside a region of {self.length} bytes")
        os.pwrite(self.store.fd, data, self.offset + at)

    def __repr__(self) -> str:
        return f"<mmap region {self.offset:#x}+{self.length:#x} of {self.owner!r}>"


class MmapStore:
    """The regions of one context and the file behind them. ``World.lock`` guards ``regions``."""

    __slots__ = ("_size", "fd", "regions")

    def __init__(self) -> None:
        self.regions: IntervalIndex[MmapRegion] = IntervalIndex()
        self.fd = -1  # set by the first region
        self._size = 0

    def open(self, given: int) -> None:
        """Chooses the file, once: ``given`` is the projector's, -1 makes one. OSError when none can be had."""
        if self.fd >= 0:
            return
        # A descriptor of our own: the context may outlive the projector's (an access or a queue keeps it).
        fd = os.dup(given) if given >= 0 else os.memfd_create("iommufd", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        size = os.fstat(fd).st_size
        wanted = STORE_SIZE if limit == resource.RLIM_INFINITY else min(STORE_SIZE, limit)
        if size < wanted:
            try:
                os.ftruncate(fd, wanted)
                size = wanted
            except PermissionError:  # sealed by its owner at the size he wants
                pass
        if given < 0:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        self.fd, self._size = fd, size

    def add(self, owner: Object, length: int) -> MmapRegion:
        """A zeroed region for ``owner`` (events-viommu 9.1): EINVAL unless ``length`` is whole pages, ENOMEM, EBUSY."""
        if length <= 0 or length % PAGE_SIZE:
            raise KernelError(errno.EINVAL, f"a region of {length} bytes is not one or more whole pages")
        with owner.context.world.lock:
            try:
                self.open(owner.context.memory_fd)
            except OSError as error:
                raise KernelError(errno.ENOMEM, f"no memory that can be mapped: {error.strerror}") from None
            hole = next(self.regions.holes(PAGE_SIZE, self._size - 1, length), None)
            if hole is None:
                raise KernelError(errno.EBUSY, f"no room for {length} bytes in the descriptor's offsets")
            region = MmapRegion(self, owner, hole[0], length)
            self.regions.insert(region.offset, region.offset + length - 1, region)
        return region

    def remove(self, region: MmapRegion) -> None:
        """The owner goes and its region with it: offsets and memory are free again."""
        try:
            with mmap.mmap(self.fd, region.length, offset=region.offset) as memory:
                memory.madvise(mmap.MADV_REMOVE)
        except OSError:  # our address space is full: the pages stay, but as zeros
            with contextlib.suppress(OSError):  # the end of an object cannot fail
                region.write(0, bytes(region.length))
        with region.owner.context.world.lock:
            self.regions.remove(region.offset)

    def close(self) -> None:
        """The context is gone; mappings keep the memory by themselves."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1


def check_mapping(mode: int, offset: int, prot: int, shared: bool) -> None:
    """What is decided before the offset is looked up: EINVAL, EACCES, EPERM (core 1.7 rows 0-3).

    ``mode`` is the descriptor's open mode. The first two checks are the VFS's."""
    if offset % PAGE_SIZE:
        raise KernelError(errno.EINVAL, f"offset {offset:#x} is not a multiple of the page size")
    if mode == O_WRONLY:
        raise KernelError(errno.EACCES, "a descriptor opened O_WRONLY cannot be mapped")
    if mode == O_RDONLY and shared and prot & PROT_WRITE:
        raise KernelError(errno.EACCES, "PROT_WRITE on a descriptor opened O_RDONLY")
    if not shared or mode == O_RDONLY:
        raise KernelError(errno.EINVAL, "only MAP_SHARED, of a descriptor opened O_RDWR")
    if prot & PROT_EXEC:
        raise KernelError(errno.EPERM, "PROT_EXEC is not possible here")


def map_region(context: Context, offset: int, length: int) -> MmapRegion:
    """Finds the region and counts a first mapping of it; ENXIO (core 1.7 rows 4, 5). ``length`` is whole pages."""
    with context.world.lock:
        found = context.store.regions.find(offset)
        region = found[2] if found is not None else None
        if region is None or region.owner.state != PUBLISHED:
            raise KernelError(errno.ENXIO, f"nothing can be mapped at offset {offset:#x}")
        if offset != region.offset or length != region.length:
            raise KernelError(
                errno.ENXIO, f"{offset:#x}+{length:#x} is not the whole region {region.offset:#x}+{region.length:#x}"
            )
        _count(region, 1)
    context.get()
    return region


def mapping_opened(context: Context, offset: int) -> None:
    """One more mapping of the mapped region at ``offset``: by fork, or the second half of a split one."""
    context.get()
    with context.world.lock:
        _count(_mapped(context, offset), 1)


def mapping_closed(context: Context, offset: int) -> None:
    """One mapping less of the region at ``offset``."""
    with context.world.lock:
        _count(_mapped(context, offset), -1)
    context.put()


def _mapped(context: Context, offset: int) -> MmapRegion:
    found = context.store.regions.find(offset)
    assert found is not None, "a mapping keeps its region"
    return found[2]


def _count(region: MmapRegion, change: int) -> None:
    region.mappings += change
    region.owner.users += change
