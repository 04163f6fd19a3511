"""Access: software that does DMA through an IOAS, as the kernel offers it to emulated devices (struct iommufd_access).

devices.md 8 and core 5.6. An access pins memory and is told when it must let go, or copies without pinning. Invariants:

* ``ioas`` is where new pins and copies go, ``ioas_unpin`` where unpins go; they differ only while a change of IOAS is
  in its unlocked callback.
* ``lock`` is the kernel's ``ioas_lock``: read-held over a pin or a copy, write-held over a change of IOAS except during
  its callback. Unpins never wait for either, so an unmap callback may unpin.
* Each area a pin touches counts one access (internal ones: one lock besides). A range is unpinned exactly as it was
  pinned.
* No callback runs with any lock held; while one runs, its access cannot be destroyed.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from iommufd.engine.area import PAGE_OFFSET, READ, WRITE, Area, gap_sentence
from iommufd.engine.failpoints import LOOKUP, REMOTE_COPY, SCRATCH
from iommufd.engine.io_pagetable import IOPagetable
from iommufd.engine.ioas import IOAS
from iommufd.engine.locks import RWState
from iommufd.engine.object import Object
from iommufd.engine.ranges import ULMAX
from iommufd.errors import KernelError
from iommufd.memory.extents import join, read_extents, unpin_extents, write_extents
from iommufd.memory.frames import PAGE_SHIFT, PAGE_SIZE

if TYPE_CHECKING:
    from iommufd.engine.context import Context
    from iommufd.engine.pages import Pages
    from iommufd.engine.task import Task
    from iommufd.engine.world import World
    from iommufd.memory.frames import Extents

ACCESS_RW_WRITE, ACCESS_RW_KTHREAD, ACCESS_RW_SLOW_PATH = 1, 2, 4
_NOT_AS_CALLER = ACCESS_RW_KTHREAD | ACCESS_RW_SLOW_PATH


@dataclass(frozen=True, slots=True)
class AccessOps:
    """What the owner of an access declares.

    ``unmap(iova, length)`` must, before it returns, unpin every pin that intersects the range; it is called from any
    thread, repeatedly, concurrently, for ranges never pinned, and with (0, 2**64 - 1). None: the access never pins."""

    needs_pin_pages: bool = False
    unmap: Callable[[int, int], None] | None = None


class Access(Object):
    """One user of at most one IOAS. Make it with :meth:`create` (external) or :meth:`create_internal` (HW queues)."""

    __slots__ = ("internal", "ioas", "ioas_unpin", "iova_alignment", "lock", "ops", "slot")
    kind = "ACCESS"

    def __init__(self, context: Context, ops: AccessOps, *, internal: bool) -> None:
        super().__init__(context)
        self.ops = ops
        self.internal = internal
        self.ioas: IOAS | None = None
        self.ioas_unpin: IOAS | None = None
        self.slot = -1
        self.iova_alignment = PAGE_SIZE if internal or ops.needs_pin_pages else 1
        self.lock = RWState()

    # ------------------------------------------------------------------------------------------- making and unmaking

    @classmethod
    def create(cls, context: Context, ops: AccessOps) -> Access:
        """devices 8.2: a new access, published, not attached; it keeps the context open. Its ID is ``.id``."""
        access = cls(context, ops, internal=False)
        context.objects.reserve(access)
        context.get()
        with context.world.lock:
            access.users += 1
            context.objects.publish(access)
        return access

    @classmethod
    def create_internal(cls, context: Context) -> Access:
        """An access of the kernel's own: no callbacks, its pins lock their areas, and it does not keep the context."""
        access = cls(context, AccessOps(), internal=True)
        context.objects.reserve(access)
        with context.world.lock:
            access.users += 1
            context.objects.publish(access)
        return access

    def destroy_access(self) -> None:
        """devices 8.2 destroy: waits for callbacks that run, detaches (one last callback), frees the ID. The caller
        must hold nothing its callback needs."""
        context = self.context
        context.objects.remove_by_driver(self)
        if not self.internal:
            context.put()

    def destroy(self) -> None:
        if self.ioas is not None:
            self.detach()
        self.ops = AccessOps(self.ops.needs_pin_pages)  # the callback knows its owner, who knows the access

    # ------------------------------------------------------------------------------------- attach, replace, detach

    def attach(self, ioas_id: int, task: Task | None = None) -> None:
        """devices 8.3; KernelError EINVAL when attached already, ENOENT, EBUSY, EADDRINUSE."""
        self._change(ioas_id, task, attached=False)

    def replace(self, ioas_id: int, task: Task | None = None) -> None:
        """devices 8.3; KernelError ENOENT when not attached or no such IOAS, EBUSY, EADDRINUSE."""
        self._change(ioas_id, task, attached=True)

    def detach(self) -> None:
        """devices 8.3; without effect when not attached."""
        world = self.context.world
        with world.lock:
            self.lock.start_write(world)
            if self.ioas is None:
                self.lock.end_write(world)
                return
        self._switch(None)

    def _change(self, ioas_id: int, task: Task | None, *, attached: bool) -> None:
        world = self.context.world
        with world.lock:
            self.lock.start_write(world)
            now = self.ioas
        try:
            if (now is not None) != attached:
                if attached:
                    raise KernelError(errno.ENOENT, "the access is not attached")
                raise KernelError(errno.EINVAL, "the access is attached already")
            if world.failpoint(LOOKUP, task):
                raise KernelError(errno.ENOENT, f"fault injection: lookup of id {ioas_id}")
            target = self.context.objects.get(ioas_id, IOAS)  # step 1
            assert isinstance(target, IOAS)
        except BaseException:
            with world.lock:
                self.lock.end_write(world)
            raise
        # the count the lookup took becomes the attachment's, should it come to that
        with world.lock:
            target.wait -= 1
        self._switch(target)

    def _switch(self, target: IOAS | None) -> None:
        """devices 8.3 steps 2-8. Takes over the write-held ``lock`` and one count on ``target``."""
        world = self.context.world
        old, old_slot = self.ioas, self.slot
        done = False
        try:
            if old is not self.ioas_unpin:  # step 2
                raise KernelError(errno.EBUSY, "another thread is moving the access")
            if target is not old:  # step 3
                self.ioas = None  # step 4
                if target is not None:
                    try:
                        self.slot = target.io_pagetable.add_access(self)  # step 5
                    except BaseException:
                        self.ioas = old
                        raise
                done = True
                self._leave(old, old_slot)  # steps 6-7
                self.ioas = self.ioas_unpin = target  # step 8
        finally:
            with world.lock:
                if target is not None and not done:
                    target.users -= 1
                self.lock.end_write(world)

    def _leave(self, old: IOAS | None, slot: int) -> None:
        world = self.context.world
        if old is None:
            return
        if self.ops.unmap is not None:  # step 6
            with world.lock:
                self.lock.end_write(world)
            try:
                self.ops.unmap(0, ULMAX)
            finally:
                with world.lock:
                    self.lock.start_write(world)
        old.io_pagetable.remove_access(slot)  # step 7
        with world.lock:
            old.users -= 1

    # --------------------------------------------------------------------------------------------------- pin, unpin

    def pin_pages(self, iova: int, length: int, write: bool, task: Task | None = None) -> Extents:
        """devices 8.4: the frames behind ``[iova, iova + length)``, pinned, one page per page of memory touched.

        KernelError EINVAL, EOVERFLOW, ENOENT, EPERM, EFAULT, ENOMEM; then nothing stays pinned. ``task`` is the caller,
        if a program is behind the pin."""
        world = self.context.world
        if self.iova_alignment != PAGE_SIZE or not (self.internal or self.ops.unmap):  # step 1
            raise KernelError(errno.EINVAL, "the access did not declare that it pins pages")
        last = _last(iova, length)  # steps 2-3
        with world.lock:
            table = self._start()  # step 4
        done: list[tuple[Area, Pages, int, int]] = []
        found: list[Extents] = []
        try:
            at = iova
            while at <= last:
                with world.lock:
                    area, pages = _area_at(table, at, iova, last)  # step 6
                    stop = min(last, area.last)
                    start = area.start + at - area.first
                    _check_pin(area, at, start, start + stop - at + 1, last, write)  # steps 5a-5c
                    area.accesses += 1
                    area.locks += self.internal
                page = start >> PAGE_SHIFT
                count = ((start + stop - at) >> PAGE_SHIFT) - page + 1
                try:
                    found.append(_pin(world, task, pages, page, count, write))  # step 5d
                except BaseException:
                    with world.lock:
                        area.accesses -= 1
                        area.locks -= self.internal
                    raise
                done.append((area, pages, page, count))
                at = stop + 1
        except BaseException:
            for area, pages, page, count in reversed(done):
                self._unpin(area, pages, page, count)
            raise
        finally:
            self._end(table)
        return join(e for part in found for e in part)

    def unpin_pages(self, iova: int, length: int) -> None:
        """devices 8.5: the same ``iova`` and ``length`` as a pin. A range never pinned so is ignored, as far as it
        is."""
        if length == 0 or iova + length - 1 > ULMAX:
            return
        world = self.context.world
        last = iova + length - 1
        with world.lock:
            if self.ioas_unpin is None:
                return
            table = self.ioas_unpin.io_pagetable
            while table.iova_sem.writer:
                world.wait()
            table.iova_sem.readers += 1
        try:
            at = iova
            while at <= last:
                with world.lock:
                    found = table.areas.find(at)
                    area = None if found is None else found[2]
                    if area is None or area.pages is None or area.accesses == 0:
                        return
                    pages = area.pages
                stop = min(last, area.last)
                start = area.start + at - area.first
                page = start >> PAGE_SHIFT
                self._unpin(area, pages, page, ((start + stop - at) >> PAGE_SHIFT) - page + 1)
                at = stop + 1
        finally:
            with world.lock:
                table.iova_sem.end_read(world)

    def _unpin(self, area: Area, pages: Pages, page: int, count: int) -> None:
        world = self.context.world
        pages.lock(world)
        known = pages.has_record(page, count)
        if known:
            pages.drop_record(page, count)
        pages.unlock(world)
        if known:
            with world.lock:
                area.accesses -= 1
                area.locks -= self.internal
                world.wake()

    # --------------------------------------------------------------------------------------------------------- copy

    def read(self, task: Task | None, iova: int, length: int, flags: int = 0) -> bytes:
        """devices 8.7: ``length`` bytes at ``iova``, or KernelError EINVAL, EOVERFLOW, ENOENT, EPERM, EFAULT, ENOMEM.

        ``task`` is the thread on whose behalf it happens: None, or flag KTHREAD, for a kernel thread."""
        _last(iova, length)  # before there is a buffer of that size
        try:
            data = bytearray(length)
        except (MemoryError, OverflowError):
            raise KernelError(errno.ENOMEM, f"no buffer of {length:#x} bytes") from None
        self._rw(task, iova, memoryview(data), False, flags)
        return bytes(data)

    def read_into(self, task: Task | None, iova: int, buffer: memoryview, flags: int = 0) -> None:
        """As :meth:`read`, into all of a writable, contiguous ``buffer``: for large copies that are to be repeated. On
        failure a leading part may have been filled."""
        self._rw(task, iova, buffer, False, flags)

    def write(
        self, task: Task | None, iova: int, data: bytes | bytearray | memoryview, flags: int = ACCESS_RW_WRITE
    ) -> None:
        """devices 8.7: writes ``data`` at ``iova``. Areas before the one that failed keep what was written."""
        self._rw(task, iova, memoryview(data), True, flags)

    def _rw(self, task: Task | None, iova: int, data: memoryview, write: bool, flags: int) -> None:
        world = self.context.world
        length = len(data)
        last = _last(iova, length)  # steps 1-2
        with world.lock:
            table = self._start()  # step 3
            found = table.areas.find(iova)
        try:
            at = iova
            while True:
                area, pages = _live(found, at, iova, last)  # step 7
                _check_protection(area, at, write, pinning=False)  # steps 4-5
                stop = area.last
                if stop >= last:
                    piece = data if at == iova else data[at - iova :]
                    _copy(world, task, pages, area.start + at - area.first, piece, write, flags)  # step 6
                    return
                piece = data[at - iova : stop - iova + 1]
                _copy(world, task, pages, area.start + at - area.first, piece, write, flags)
                at = stop + 1
                with world.lock:
                    found = table.areas.find(at)
        finally:
            self._end(table)

    # ------------------------------------------------------------------------------------------------ common to both

    def _start(self) -> IOPagetable:
        """Locked: keeps the IOAS attached and its areas in place until :meth:`_end`; ENOENT when there is none."""
        lock = self.lock
        while lock.blocked:
            self.context.world.wait()
        ioas = self.ioas
        if ioas is None:
            raise KernelError(errno.ENOENT, "the access is not attached to an IOAS")
        lock.readers += 1  # nobody writes: see RWState
        table = ioas.io_pagetable
        sem = table.iova_sem
        if sem.blocked:
            sem.start_read(self.context.world)
        else:
            sem.readers += 1
        return table

    def _end(self, table: IOPagetable) -> None:
        world = self.context.world
        with world.lock:
            table.iova_sem.end_read(world)
            self.lock.end_read(world)


def _last(iova: int, length: int) -> int:
    if length == 0:
        raise KernelError(errno.EINVAL, "the length is 0")
    last = iova + length - 1
    if last > ULMAX:
        raise KernelError(errno.EOVERFLOW, f"{length:#x} bytes at IOVA {iova:#x} end beyond the last address")
    return last


def _area_at(table: IOPagetable, at: int, iova: int, last: int) -> tuple[Area, Pages]:
    """The live area at IOVA ``at``, locked; ENOENT where the range ``[iova, last]`` has a gap (core 5.6 row 7)."""
    return _live(table.areas.find(at), at, iova, last)


def _live(found: tuple[int, int, Area] | None, at: int, iova: int, last: int) -> tuple[Area, Pages]:
    """The same for what was found at ``at``."""
    area = None if found is None else found[2]
    if area is None or area.pages is None:
        raise KernelError(errno.ENOENT, gap_sentence(iova, last, at, area))
    return area, area.pages


def _check_protection(area: Area, at: int, write: bool, *, pinning: bool) -> None:
    if not pinning and area.prevent_access:
        raise KernelError(errno.EINVAL, f"{area!r} is being unmapped")
    if not area.prot & (WRITE if write else READ):
        raise KernelError(errno.EPERM, f"{area!r} is not {'writeable' if write else 'readable'} (at IOVA {at:#x})")


def _check_pin(area: Area, at: int, start: int, end: int, last: int, write: bool) -> None:
    """core 5.6 rows 2 and 3 for the bytes ``[start, end)`` of the pages object, which are at IOVA ``at``."""
    if area.prevent_access:  # row 2
        raise KernelError(errno.EINVAL, f"{area!r} is being unmapped")
    if start & PAGE_OFFSET:
        raise KernelError(
            errno.EINVAL, f"IOVA {at:#x} is {start & PAGE_OFFSET:#x} bytes into a page of the memory behind it"
        )
    if area.last < last and end & PAGE_OFFSET:
        raise KernelError(
            errno.EINVAL, f"{area!r} ends {end & PAGE_OFFSET:#x} bytes into a page, and the range goes on"
        )
    _check_protection(area, at, write, pinning=True)  # row 3


def _check_backing(pages: Pages, write: bool) -> None:
    """core 5.6 rows 4 and 5."""
    if write and not pages.writable:
        raise KernelError(errno.EPERM, "the memory was mapped without WRITEABLE")
    if pages.source is not None and pages.source.dmabuf is not None:
        raise KernelError(errno.EINVAL, "the memory of a dma-buf is not for software")


def _pin(world: World, task: Task | None, pages: Pages, page: int, count: int, write: bool) -> Extents:
    _check_backing(pages, write)  # rows 4-5
    pages.lock(world)
    try:
        return pages.add_record(world, task, page, count)  # row 6
    finally:
        pages.unlock(world)


def _copy(world: World, task: Task | None, pages: Pages, start: int, data: memoryview, write: bool, flags: int) -> None:
    """devices 8.7, copy of one slice: ``data`` to or from byte ``start`` of the pages object."""
    _check_backing(pages, write)  # steps 1-2
    space = pages.owner.space
    if pages.source is not None:  # step 3
        _slow_copy(world, task, pages, start, data, write)
        return
    own = task is not None and task.space is space
    if flags & _NOT_AS_CALLER or not own:
        if not (flags & ACCESS_RW_KTHREAD or task is None):  # step 4; step 5 is the kernel thread's
            if (start & PAGE_OFFSET) + len(data) > PAGE_SIZE:
                _slow_copy(world, task, pages, start, data, write)
                return
            if world.fail is not None and world.fail(REMOTE_COPY, task):
                raise KernelError(errno.EINVAL, "fault injection: copying one page of another process")
        if not space.alive:
            _slow_copy(world, task, pages, start, data, write)
            return
    # step 6, and the one-page path: what is at the address now, under the protections the process set
    va = pages.base + start
    if task is not None and own:
        if write:
            task.write(va, data)
        else:
            task.read_into(va, data)
    elif write:
        space.write(va, data)
    else:
        data[:] = space.read(va, len(data))


def _slow_copy(world: World, task: Task | None, pages: Pages, start: int, data: memoryview, write: bool) -> None:
    """Through page frames: those held already, others pinned for the length of the copy (core 5.3)."""
    page = start >> PAGE_SHIFT
    count = ((start + len(data) - 1) >> PAGE_SHIFT) - page + 1
    pages.lock(world)
    try:
        if world.fail is not None and world.fail(SCRATCH, task):
            raise KernelError(errno.ENOMEM, "fault injection: no memory to gather page frames")
        extents, loans = pages.borrow(world, task, page, count)
        try:
            if write:
                write_extents(extents, start & PAGE_OFFSET, data)
            else:
                data[:] = read_extents(extents, start & PAGE_OFFSET, len(data))
        finally:
            for loan in loans:
                unpin_extents(loan)
    finally:
        pages.unlock(world)
