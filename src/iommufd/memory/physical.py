"""Physical: the memory side of one machine: frames, files, users, and a store for contents without another home.

Lock order: an ``AddressSpace``'s lock, then ``Physical.lock``, which is the FrameAllocator's. Neither is held while
bytes are copied.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from iommufd.memory.accounting import User
from iommufd.memory.files import FileSpace
from iommufd.memory.frames import PAGE_SHIFT, PAGE_SIZE, Chunk, FrameAllocator
from iommufd.memory.store import Store
from iommufd.memory.vma import FileKey

if TYPE_CHECKING:
    from collections.abc import Callable

    from iommufd.memory.space import AddressSpace


class Physical:
    """Registry of what all processes of one machine share."""

    def __init__(self) -> None:
        self.frames = FrameAllocator()
        self.lock = self.frames.lock
        self.store = Store()
        self.files: dict[FileKey, FileSpace] = {}
        self.users: dict[int, User] = {}
        self.spaces: weakref.WeakSet[AddressSpace] = weakref.WeakSet()
        # Who knows more processes than have pinned here makes intervals for their mappings of a file
        # (AddressSpace.look) when the last mapping known goes and there is no descriptor.
        self.locate: Callable[[FileSpace], None] | None = None

    def user(self, uid: int) -> User:
        """The user ``uid``, one object per machine."""
        with self.lock:
            user = self.users.get(uid)
            if user is None:
                user = self.users[uid] = User(uid)
            return user

    def file_space(self, key: FileKey, order: int, space: AddressSpace | None = None) -> FileSpace:
        """The file's page identities, with one more use, which :meth:`FileSpace.release` gives back: that of an
        interval in ``space`` if given."""
        with self.lock:
            file = self.files.get(key)
            if file is None:
                file = self.files[key] = FileSpace(key, order, self)
            file.users += 1
            if space is not None:
                file.spaces[space] = file.spaces.get(space, 0) + 1
            return file

    def buffer(self, owner: object, npages: int) -> Chunk:
        """A physically contiguous, zeroed buffer of ours (a dma-buf), held once: ``chunk.drop()`` frees it."""
        chunk = self.frames.contiguous(owner, npages)
        chunk.place(0, npages, self.store, self.store.reserve(npages))
        chunk.hold()
        return chunk

    def read(self, paddr: int, count: int) -> bytes | None:
        """``count`` bytes at a physical address, within one block of frames; None when there is none."""
        found = self._find(paddr, count)
        return None if found is None else found[0].read(found[1], count)

    def write(self, paddr: int, data: bytes | bytearray | memoryview) -> bool:
        """Writes ``data`` at a physical address, within one block of frames; False when there is none."""
        found = self._find(paddr, len(data))
        if found is None:
            return False
        found[0].write(found[1], data)
        return True

    def _find(self, paddr: int, count: int) -> tuple[Chunk, int] | None:
        """The chunk, and the byte offset in it, of ``count`` bytes that lie in one block."""
        found = self.frames.frame(paddr >> PAGE_SHIFT)
        if found is None:
            return None
        chunk, index = found
        offset = (index << PAGE_SHIFT) + (paddr & (PAGE_SIZE - 1))
        block = PAGE_SIZE << chunk.order
        if offset // block != (offset + count - 1) // block or offset + count > chunk.npages << PAGE_SHIFT:
            return None
        return chunk, offset
