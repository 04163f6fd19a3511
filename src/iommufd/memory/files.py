"""FileSpace: the pages of one file, which have one identity however they are reached.

Invariants: page ``p`` of a file has the same frame through every shared mapping in every process and through MAP_FILE.
A FileSpace lives while a VA interval or a HostFile refers to it (``users``) or one of its pages is pinned; then its
identities are dropped. It holds a descriptor of the file only while pages are pinned, so it keeps no memory alive that
the program has given up. A file that a program cuts or punches loses the contents of pinned pages there (a kernel would
keep them).

The kernel object is the ``address_space`` of an inode.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
from typing import TYPE_CHECKING

from iommufd.errors import KernelError
from iommufd.memory.frames import PAGE_SHIFT, PAGE_SIZE, Chunk, Extent, Extents
from iommufd.memory.intervals import IntervalIndex
from iommufd.memory.vma import FileKey, Vma

if TYPE_CHECKING:
    from iommufd.memory.physical import Physical
    from iommufd.memory.space import AddressSpace

WINDOW_PAGES = 1 << 24  # 64 GiB: how far around the pages asked for a new chunk reaches


class FileSpace:
    """Identities of one file's pages, and the Source of their bytes (positions are file offsets).

    Guarded by the allocator's lock. Bytes go through ``fd``; where no process has a descriptor to offer (anonymous
    shared memory), through a mapping in one of ``spaces`` (how many intervals each of them has).
    """

    __slots__ = (
        "_physical",
        "_searched",
        "fd",
        "fresh",
        "index",
        "key",
        "order",
        "pinned_chunks",
        "spaces",
        "users",
        "writable",
    )

    def __init__(self, key: FileKey, order: int, physical: Physical) -> None:
        self.key = key
        self.order = order
        self.index: IntervalIndex[Chunk] = IntervalIndex()  # file pages -> the chunk whose page 0 is the first of them
        self.spaces: dict[AddressSpace, int] = {}
        self.users = 0
        self.pinned_chunks = 0
        self.fd = -1
        self.fresh = True  # never pinned yet: the first pin looks for a descriptor, later ones when they need it
        self.writable = False
        self._searched = 0  # processes that had been asked for a descriptor when none had one
        self._physical = physical

    def __repr__(self) -> str:
        return f"file {os.major(self.key[0])}:{os.minor(self.key[0])} inode {self.key[1]} {self.key[2]}".rstrip()

    # -------------------------------------------------------------------------------------------------------- identity

    def resolve(self, page: int, count: int, cover: tuple[int, int]) -> Extents:
        """The frames of file pages ``[page, page + count)``. New chunks reach as far as ``cover`` (first, last
        page)."""
        found: list[Extent] = []
        end = page + count
        with self._physical.lock:
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
        block, window = 1 << self.order, page & -WINDOW_PAGES
        first = min(page, max(cover[0], window)) & -block
        last = max(end - 1, min(cover[1], window + WINDOW_PAGES - 1)) | (block - 1)
        if below:
            first = max(first, below[1] + 1)
        if above:
            last = min(last, above[0] - 1)
        chunk = self._physical.frames.chunk(repr(self), last - first + 1, self.order)
        chunk.place(0, chunk.npages, self, first << PAGE_SHIFT)
        chunk.file = self
        chunk.resolve_from(1)
        self.index.insert(first, last, chunk)
        return first, last, chunk

    # -------------------------------------------------------------------------------------------------------- lifetime

    def release(self, space: AddressSpace | None = None) -> None:
        """Gives up one use, that of ``space`` if it was an interval of it."""
        with self._physical.lock:
            if space is not None:
                self.spaces[space] -= 1
                if not self.spaces[space]:
                    del self.spaces[space]
            self.users -= 1
            self._retire_if_unused()

    def pins_began(self) -> None:
        """A chunk has its first pin."""
        self.pinned_chunks += 1

    def pins_ended(self) -> None:
        """A chunk has lost its last pin."""
        self.pinned_chunks -= 1
        if not self.pinned_chunks:
            if self.fd >= 0:
                os.close(self.fd)
                self.fd = -1
            self._retire_if_unused()

    def _retire_if_unused(self) -> None:
        if self.users or self.pinned_chunks:
            return
        files = self._physical.files
        if files.get(self.key) is self:
            del files[self.key]
        chunks = list(self.index.values())
        self.index.clear()
        for chunk in chunks:
            chunk.resolve_from(-1)

    # ------------------------------------------------------------------------------------------------------ descriptor

    def offer(self, fd: int) -> None:
        """A descriptor of the file: a copy of it is kept, one that can write if possible, while pages are pinned."""
        with self._physical.lock:
            if self.fd >= 0 or not self.pinned_chunks:
                return
            self.writable = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
            if not self.writable:
                with contextlib.suppress(OSError):  # read-only for us: the copy is, too
                    self.fd = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
                    self.writable = True
                    return
            self.fd = os.dup(fd)

    def obtain(self) -> bool:
        """Sees that there is a descriptor, if any process we know has one. Called without locks; true when there is."""
        if self.fd >= 0:
            return True
        with self._physical.lock:
            spaces = dict.fromkeys([*self.spaces, *self._physical.spaces])
        if len(spaces) == self._searched or self.key[2]:
            return False
        wanted = Vma(0, 0, 0, dev=self.key[0], ino=self.key[1])
        for space in spaces:
            windows = space.windows(self)
            fd = space.host.open_file(windows[0][0] if windows else wanted)
            if fd is not None:
                self.offer(fd)
                os.close(fd)
                return self.fd >= 0
        self._searched = len(spaces)
        return False

    def reachable(self, page: int, count: int, without: AddressSpace) -> bool:
        """Whether file pages can be had by a descriptor, or by mappings in other address spaces."""
        if self.obtain():
            return True
        if self._mapped_elsewhere(page, count, without):
            return True
        locate = self._physical.locate
        if locate is None:
            return False
        locate(self)
        return self._mapped_elsewhere(page, count, without)

    def _mapped_elsewhere(self, page: int, count: int, without: AddressSpace) -> bool:
        position, end = page << PAGE_SHIFT, (page + count) << PAGE_SHIFT
        while position < end:
            for space in [*self.spaces]:
                found = self._at(space, position, end - position) if space is not without else None
                if found is not None:
                    position += found[1]
                    break
            else:
                return False
        return True

    def _at(self, space: AddressSpace, position: int, count: int) -> tuple[int, int] | None:
        """Where ``space`` has byte ``position`` of the file mapped, and how many of ``count`` bytes follow there."""
        for vma, first, last in space.windows(self):
            va = vma.start + position - vma.offset
            if first <= va <= last:
                return va, min(count, last + 1 - va)
        return None

    # -------------------------------------------------------------------------------------------------------- contents

    def load(self, position: int, count: int) -> bytes:
        if self.obtain():
            data = os.pread(self.fd, count, position)
            if len(data) == count:
                return data
            raise KernelError(errno.EFAULT, f"offset {position + len(data):#x} is beyond the end of {self!r}")
        parts: list[bytes] = []
        while count:
            for space in [*self.spaces]:
                found = self._at(space, position, count)
                if found is not None and (data := space.host.peek(*found)):
                    break
            else:
                raise KernelError(errno.EFAULT, f"offset {position:#x} of {self!r} is mapped nowhere any more")
            parts.append(data)
            position, count = position + len(data), count - len(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def save(self, position: int, data: bytes | bytearray | memoryview) -> None:
        count = len(data)
        if self.obtain() and self.writable:
            # EPERM: a write seal (mappings made before it may do). ValueError: a huge page file that was cut.
            with contextlib.suppress(OSError, ValueError):
                if self.order:
                    if _save_mapped(self.fd, PAGE_SIZE << self.order, position, data):
                        return
                elif os.fstat(self.fd).st_size >= position + count and os.pwrite(self.fd, data, position) == count:
                    return
        rest = memoryview(data)
        while rest:
            for space in [*self.spaces]:
                found = self._at(space, position, len(rest))
                if found is not None and (done := space.host.poke(found[0], rest[: found[1]])):
                    break
            else:
                raise KernelError(errno.EFAULT, f"offset {position:#x} of {self!r} cannot be written")
            position, rest = position + done, rest[done:]

    def view(self, position: int, count: int) -> memoryview | None:
        """None: a program may cut its file under us, and a mapping of it would then kill us with SIGBUS."""
        return None

    def forget(self, position: int, count: int) -> None:
        """The file keeps its bytes."""


def _save_mapped(fd: int, page_size: int, position: int, data: bytes | bytearray | memoryview) -> bool:
    """hugetlbfs files cannot be written, only mapped. The copy goes through /proc/self/mem, which answers an error
    where touching the mapping (a file that was cut, no huge page left) would be a deadly signal."""
    start = position & -page_size
    size = -(-(position + len(data)) // page_size) * page_size - start
    with mmap.mmap(fd, size, offset=start) as window, open("/proc/self/mem", "r+b", buffering=0) as memory:
        anchor = ctypes.c_char.from_buffer(window)
        va = ctypes.addressof(anchor)
        del anchor
        return os.pwrite(memory.fileno(), data, va + position - start) == len(data)
