"""FileSpace: the pages of one file, which have one identity however they are reached.

Invariants: page ``p`` of a file has the same frame through every shared mapping in every process and through MAP_FILE.
The key is (device, inode), and the name too for SysV segments, whose inode number is theirs alone. A FileSpace lives
while a VA interval or a HostFile refers to it (``users``) or one of its pages is pinned; then its identities are dropped
and the descriptor it may hold is closed, so it keeps no memory of a program alive that the program itself has given up.
A file that is cut or punched by the program loses the contents of pinned pages (a kernel would keep them).

The kernel object is the ``address_space`` of an inode.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from typing import TYPE_CHECKING, NamedTuple

from iommufd.errors import KernelError
from iommufd.memory.frames import PAGE_SHIFT, Chunk, Extent, Extents, FrameAllocator
from iommufd.memory.intervals import IntervalIndex

if TYPE_CHECKING:
    from iommufd.memory.space import Host

FileKey = tuple[int, int, str]  # st_dev, st_ino, name where the inode number does not say it all

WINDOW_PAGES = 1 << 24  # 64 GiB: how far around the pages asked for a new chunk reaches


class View(NamedTuple):
    """``npages`` pages of the file from ``page`` on are mapped shared at ``va`` of ``host``."""

    host: Host
    va: int
    page: int
    npages: int


class FileSpace:
    """Identities of one file's pages, and the Source of their bytes (positions are file offsets).

    Guarded by the allocator's lock. Bytes come through ``fd`` when we hold one, else through any mapping known.
    """

    __slots__ = ("_frames", "_registry", "fd", "index", "key", "order", "pinned_chunks", "users", "views", "writable")

    def __init__(self, key: FileKey, order: int, frames: FrameAllocator, registry: dict[FileKey, FileSpace]) -> None:
        self.key = key
        self.order = order
        self.index: IntervalIndex[Chunk] = IntervalIndex()  # file pages -> the chunk whose page 0 is the first of them
        self.users = 0
        self.pinned_chunks = 0
        self.fd = -1
        self.writable = False
        self.views: list[View] = []
        self._frames = frames
        self._registry = registry

    # -------------------------------------------------------------------------------------------------------- identity

    def resolve(self, page: int, count: int, cover: tuple[int, int]) -> Extents:
        """The frames of file pages ``[page, page + count)``. New chunks reach as far as ``cover`` (first, last page)."""
        found: list[Extent] = []
        end = page + count
        with self._frames.lock:
            while page < end:
                held = self.index.find(page)
                if held is None:
                    held = self._extend(page, end, cover)
                first, last, chunk = held
                n = min(end, last + 1) - page
                found.append(Extent(chunk, page - first, n))
                page += n
        return tuple(found)

    def _extend(self, page: int, end: int, cover: tuple[int, int]) -> tuple[int, int, Chunk]:
        below, above = self.index.neighbours(page, page)
        window = page & -WINDOW_PAGES
        first = max(min(page, max(cover[0], window)), below[1] + 1 if below else 0) & -(1 << self.order)
        last = max(end - 1, min(cover[1], window + WINDOW_PAGES - 1)) | ((1 << self.order) - 1)
        if above:
            last = min(last, above[0] - 1)
        chunk = self._frames.chunk(f"file {self.key[0]:#x}:{self.key[1]}", last - first + 1, self.order)
        chunk.pieces = [(0, chunk.npages, self, first << PAGE_SHIFT)]
        chunk.file = self
        chunk.resolve_from(1)
        self.index.insert(first, last, chunk)
        return first, last, chunk

    # -------------------------------------------------------------------------------------------------------- lifetime

    def release(self) -> None:
        """Gives up one use."""
        with self._frames.lock:
            self.users -= 1
            self._retire_if_unused()

    def pins_began(self) -> None:
        """A chunk has its first pin."""
        self.pinned_chunks += 1

    def pins_ended(self) -> None:
        """A chunk has lost its last pin."""
        self.pinned_chunks -= 1
        self._retire_if_unused()

    def _retire_if_unused(self) -> None:
        if self.users or self.pinned_chunks:
            return
        if self._registry.get(self.key) is self:
            del self._registry[self.key]
        chunks = list(self.index.values())
        self.index.clear()
        for chunk in chunks:
            chunk.resolve_from(-1)
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    # -------------------------------------------------------------------------------------------------------- contents

    def offer(self, fd: int) -> None:
        """A descriptor of the file; a copy is kept, writable if that can be had, until the FileSpace retires."""
        with self._frames.lock:
            if self.fd >= 0 and self.writable:
                return
            writable = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
            own = -1
            if not writable:
                with contextlib.suppress(OSError):
                    own = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
                    writable = True
            if own < 0 and (self.fd < 0 or writable):
                own = os.dup(fd)
            if own >= 0:
                if self.fd >= 0:
                    os.close(self.fd)
                self.fd, self.writable = own, writable

    def load(self, position: int, count: int) -> bytes:
        if self.fd >= 0:
            data = os.pread(self.fd, count, position)
            if len(data) == count:
                return data
        else:
            for view, begin in self._views_of(position, count):
                data = view.host.peek(view.va + begin, count)
                if len(data) == count:
                    return data
        raise KernelError(errno.EFAULT, f"{count} bytes at offset {position:#x} of the file are gone")

    def save(self, position: int, data: bytes | bytearray | memoryview) -> None:
        count = len(data)
        if self.fd >= 0 and self.writable:
            with contextlib.suppress(OSError):
                if os.pwrite(self.fd, data, position) == count:
                    return
        for view, begin in self._views_of(position, count):
            if view.host.poke(view.va + begin, data) == count:
                return
        raise KernelError(errno.EFAULT, f"{count} bytes at offset {position:#x} of the file cannot be written")

    def _views_of(self, position: int, count: int) -> list[tuple[View, int]]:
        found = []
        with self._frames.lock:
            for view in self.views:
                begin = position - (view.page << PAGE_SHIFT)
                if begin >= 0 and begin + count <= view.npages << PAGE_SHIFT:
                    found.append((view, begin))
        return found

    def view(self, position: int, count: int) -> memoryview | None:
        """None: a program may cut its file under us, and a mapping of it would then kill us with SIGBUS."""
        return None

    def forget(self, position: int, count: int) -> None:
        """The file keeps its bytes."""
