"""Physical: the memory side of one machine: frames, files, users, and a store for contents without another home.

Lock order: an ``AddressSpace``'s lock, then ``Physical.lock``, which is the FrameAllocator's. Neither is held while bytes
are copied.
"""

from __future__ import annotations

from iommufd.memory.accounting import User
from iommufd.memory.files import FileKey, FileSpace
from iommufd.memory.frames import PAGE_SHIFT, Chunk, FrameAllocator
from iommufd.memory.store import Store


class Physical:
    """Registry of what all processes of one machine share."""

    def __init__(self) -> None:
        self.frames = FrameAllocator()
        self.lock = self.frames.lock
        self.store = Store()
        self.files: dict[FileKey, FileSpace] = {}
        self.users: dict[int, User] = {}

    def user(self, uid: int) -> User:
        """The user ``uid``, one object per machine."""
        with self.lock:
            user = self.users.get(uid)
            if user is None:
                user = self.users[uid] = User(uid)
            return user

    def file_space(self, key: FileKey, order: int) -> FileSpace:
        """The file's page identities, with one more use, which :meth:`FileSpace.release` gives back."""
        with self.lock:
            space = self.files.get(key)
            if space is None:
                space = self.files[key] = FileSpace(key, order, self.frames, self.files)
            space.users += 1
            return space

    def buffer(self, owner: object, npages: int) -> Chunk:
        """A physically contiguous, zeroed buffer of ours (a dma-buf), held once: ``chunk.drop()`` frees it."""
        chunk = self.frames.contiguous(owner, npages)
        chunk.place(0, npages, self.store, self.store.reserve(npages))
        chunk.hold()
        return chunk

    def read(self, paddr: int, count: int) -> bytes | None:
        """``count`` bytes at a physical address within one chunk, or None when no frame is there."""
        found = self.frames.frame(paddr >> PAGE_SHIFT)
        if found is None:
            return None
        chunk, index = found
        return chunk.read((index << PAGE_SHIFT) + (paddr & 0xFFF), count)
