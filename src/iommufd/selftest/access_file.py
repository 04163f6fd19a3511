"""The mock access: software that pins and copies through an IOAS, as a file (kernel: struct selftest_access),
mock-device 6.

Invariants: every item is a pin in force with its own number, never used again; an unmap callback drops every item that
intersects the range. ``lock`` is held from a pin until its item is listed, so that the callback finds it (devices 8.6).
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import threading
from typing import TYPE_CHECKING, NamedTuple

from iommufd.engine.access import Access, AccessOps
from iommufd.engine.file import File
from iommufd.errors import KernelError
from iommufd.memory.extents import same_frames, slice_extents
from iommufd.memory.frames import PAGE_SHIFT, PAGE_SIZE
from iommufd.selftest.checks import user_frames
from iommufd.uapi import iommufd_test as t

if TYPE_CHECKING:
    from iommufd.engine.dispatch import Call
    from iommufd.engine.task import Task

MAX_LENGTH = 16 << 20
KEPT_BYTES = 2 << 20
PAGES_FLAGS = t.MOCK_FLAGS_ACCESS_WRITE | t.MOCK_FLAGS_ACCESS_SYZ
RW_FLAGS = t.MOCK_ACCESS_RW_WRITE | t.MOCK_ACCESS_RW_SLOW_PATH | t.MOCK_FLAGS_ACCESS_SYZ


class Item(NamedTuple):
    """Pinned IOVA ``[iova, iova + length)``."""

    iova: int
    length: int


class AccessFile(File):
    """The descriptor CREATE_ACCESS gives. ``pins``: the access may pin pages."""

    link = "anon_inode:[iommufd_test_staccess]"

    def __init__(self, pins: bool) -> None:
        super().__init__()
        self.pins = pins
        self.lock = threading.Lock()
        self._access: Access | None = None
        self._items: dict[int, Item] = {}
        self._next = 0
        self.kept: mmap.mmap | None = None

    @property
    def access(self) -> Access:
        assert self._access is not None
        return self._access

    def open(self, call: Call, ioas_id: int) -> None:
        """6.1 rows 4-6: the ACCESS object, attached."""
        ops = AccessOps(needs_pin_pages=self.pins, unmap=self._unmap)
        self._access = Access.create(call.context, ops)
        self._access.attach(ioas_id, call.task)

    def release(self) -> None:
        """The last close unpins every item and destroys the access."""
        access, self._access = self._access, None
        if access is None:
            return
        with self.lock:
            items = list(self._items.values())
            self._items.clear()
        for item in items:
            access.unpin_pages(*item)
        access.destroy_access()

    def pin(self, task: Task, iova: int, length: int, write: bool, uptr: int) -> int:
        """6.2 rows 6-13: a new item's number; ``uptr`` is where the pages must be the caller's (0: not compared)."""
        access = self.access
        with self.lock:
            extents = access.pin_pages(iova, length, write, task)
            try:
                if uptr:  # row 12
                    offset = iova & (PAGE_SIZE - 1)
                    count = (offset + length + PAGE_SIZE - 1) >> PAGE_SHIFT
                    first = (uptr - offset) & (2**64 - PAGE_SIZE)  # whose page counts, wherever in it that is
                    for at, frames, _, size in user_frames(task, first, count << PAGE_SHIFT):  # page by page, upwards
                        if not same_frames(slice_extents(extents, at >> PAGE_SHIFT, size >> PAGE_SHIFT), frames):
                            raise KernelError(errno.EBADE, f"the pinned pages are not those at {uptr:#x}")
            except BaseException:
                access.unpin_pages(iova, length)
                raise
            number = self._next  # row 13
            self._next += 1
            self._items[number] = Item(iova, length)
        return number

    def unpin(self, number: int) -> None:
        """6.3; ENOENT when there is no such item."""
        with self.lock:
            item = self._items.pop(number, None)
            if item is None:
                raise KernelError(errno.ENOENT, f"the access has no pinned item {number}")
            self.access.unpin_pages(*item)

    def _unmap(self, iova: int, length: int) -> None:
        """The unmap callback (6.4)."""
        with self.lock:
            last = iova + length - 1
            for number, item in list(self._items.items()):
                if item.iova <= last and iova < item.iova + item.length:
                    del self._items[number]
                    self.access.unpin_pages(*item)

    def buffer(self, length: int) -> tuple[memoryview, mmap.mmap | None]:
        """``length`` bytes to copy through, and what becomes ``kept`` again after the copy: the first use of a large
        buffer costs as much in page faults as the copy. It holds anything; a copy that fails shows none of it."""
        if not PAGE_SIZE < length <= KEPT_BYTES:
            return memoryview(bytearray(length)), None
        kept, self.kept = self.kept, None
        if kept is None:
            kept = _huge(KEPT_BYTES)
        return memoryview(kept)[:length], kept

    def syz_iova(self, iova: int) -> int:
        """7: "n-th area and offset" of the access's IOAS, as an IOVA."""
        ioas = self.access.ioas
        return ioas.io_pagetable.nth_iova(iova & 0xFFFFFFFF, iova >> 32) if ioas is not None else iova


def _huge(length: int) -> mmap.mmap:
    """Zeroed memory, of huge pages if the host has some: a large copy spends a tenth of its time on small ones."""
    memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a host without transparent huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def create_access(call: Call, cmd: t.test_create_access) -> None:
    """Op CREATE_ACCESS (6.1)."""
    if cmd.flags & ~t.MOCK_FLAGS_ACCESS_CREATE_NEEDS_PIN_PAGES:  # row 1
        raise KernelError(errno.EOPNOTSUPP, f"unknown flags {cmd.flags:#x}")
    file = AccessFile(bool(cmd.flags & t.MOCK_FLAGS_ACCESS_CREATE_NEEDS_PIN_PAGES))  # row 2
    try:
        fd = call.reserve_fd(file)
    except KernelError as error:  # row 3: not EMFILE
        raise KernelError(errno.ENOMEM, error.why) from None
    file.open(call, cmd.id)  # rows 4-6
    cmd.out_access_fd = fd  # row 7


def access_file(call: Call, fd: int) -> AccessFile:
    """The mock access behind descriptor ``fd``, with one more reference; EBADFD for anything else."""
    try:
        file = call.task.file(fd if fd < 2**31 else fd - 2**32)
    except KernelError as error:
        raise KernelError(errno.EBADFD, error.why) from None
    if isinstance(file, AccessFile) and file.hold():
        return file
    if not isinstance(file, File):
        file.close()
    raise KernelError(errno.EBADFD, f"descriptor {fd} is not a mock access")


def destroy_access_pages(call: Call, cmd: t.test_destroy_access_pages) -> None:
    """Op DESTROY_ACCESS_PAGES (6.3)."""
    file = access_file(call, cmd.id)
    try:
        file.unpin(cmd.access_pages_id)
    finally:
        file.put()


def access_pages(call: Call, cmd: t.test_access_pages) -> None:
    """Op ACCESS_PAGES (6.2)."""
    if cmd.length > MAX_LENGTH:  # row 1
        raise KernelError(errno.ENOMEM, f"{cmd.length:#x} bytes are more than the 16 MiB one call pins")
    if cmd.flags & ~PAGES_FLAGS:  # row 2
        raise KernelError(errno.EOPNOTSUPP, f"unknown flags {cmd.flags:#x}")
    file = access_file(call, cmd.id)  # row 3
    try:
        if not file.pins:  # row 4
            raise KernelError(errno.EOPNOTSUPP, "the access was made without NEEDS_PIN_PAGES")
        iova = file.syz_iova(cmd.iova) if cmd.flags & t.MOCK_FLAGS_ACCESS_SYZ else cmd.iova  # row 5
        number = file.pin(call.task, iova, cmd.length, bool(cmd.flags & t.MOCK_FLAGS_ACCESS_WRITE), cmd.uptr)
        cmd.out_access_pages_id = number
        try:
            call.respond()
        except KernelError:
            file.unpin(number)
            raise
    finally:
        file.put()


def access_rw(call: Call, cmd: t.test_access_rw) -> None:
    """Op ACCESS_RW (6.6)."""
    length = cmd.length
    if length > MAX_LENGTH:  # row 1
        raise KernelError(errno.ENOMEM, f"{length:#x} bytes are more than the 16 MiB one call copies")
    if cmd.flags & ~RW_FLAGS:  # row 2
        raise KernelError(errno.EOPNOTSUPP, f"unknown flags {cmd.flags:#x}")
    file = access_file(call, cmd.id)  # row 3
    task = call.task
    data, kept = file.buffer(length)
    try:
        if cmd.flags & t.MOCK_ACCESS_RW_WRITE:
            task.read_into(cmd.uptr, data)  # row 4
        iova = file.syz_iova(cmd.iova) if cmd.flags & t.MOCK_FLAGS_ACCESS_SYZ else cmd.iova  # row 5
        flags = cmd.flags & ~t.MOCK_FLAGS_ACCESS_SYZ
        if cmd.flags & t.MOCK_ACCESS_RW_WRITE:
            file.access.write(task, iova, data, flags)  # rows 6-8
        else:
            file.access.read_into(task, iova, data, flags)
            task.write(cmd.uptr, data)  # row 9
    finally:
        if kept is not None:
            file.kept = kept
        file.put()


def access_replace_ioas(call: Call, cmd: t.test_access_replace_ioas) -> None:
    """Op ACCESS_REPLACE_IOAS (6.5)."""
    file = access_file(call, cmd.id)
    try:
        file.access.replace(cmd.ioas_id, call.task)
    finally:
        file.put()
