"""Pages objects: who provides the frames behind areas, who holds them, who is charged (kernel: struct iopt_pages).

Invariants (core 5):

* A page index is pinned iff somebody holds it: a filled area that covers it, or an access record. It is pinned exactly
  once however many hold it, and every holder sees the frame captured when the first one came.
* Holders are counted per interval of indexes, never per page. The usual object, held as a whole or not at all, needs no
  list: ``extents`` and ``holders`` say it. ``segments`` exists only while some part has other holders than another.
* Letting go cannot fail and needs no source; pinning asks the source as it is at that moment.
* ``busy`` is the kernel's ``pages->mutex``: everything that changes holders, or maps what is held into a domain, runs
  between :meth:`lock` and :meth:`unlock`, without ``World.lock``.
* A source (a file, a dma-buf) lives as long as an area or an operation in flight refers to it (``source.users``).
  Memory of a process needs no source object; ``owner.space`` does not keep that address space alive, only its identity.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING

from iommufd.engine.failpoints import CHARGE, PIN, SCRATCH, STORE
from iommufd.errors import KernelError
from iommufd.memory.accounting import charge, uncharge
from iommufd.memory.extents import join, slice_extents, unpin_extents
from iommufd.memory.frames import PAGE_SIZE

if TYPE_CHECKING:
    from iommufd.engine.source import Source
    from iommufd.engine.task import Task
    from iommufd.engine.world import World
    from iommufd.memory.accounting import Mode, Process, User
    from iommufd.memory.frames import Extents
    from iommufd.memory.space import AddressSpace


class Owner:
    """Whose memory it is and who pays: fixed at MAP time, exchanged as a whole by CHANGE_PROCESS (core 6.1)."""

    __slots__ = ("mode", "process", "space", "user")

    def __init__(self, process: Process, user: User, space: AddressSpace, mode: Mode) -> None:
        self.process = process
        self.user = user
        self.space = space
        self.mode = mode


class Unsettled(Owner):
    """The owner of one pages object that is charged for ``charged`` pages and not for those that are pinned: more of
    them when the payer was gone as pages were unpinned (core 6.2), none when its heir could not settle (core 4.13,
    quirk). The next pin of new pages settles it."""

    __slots__ = ("charged",)

    def __init__(self, owner: Owner, charged: int) -> None:
        super().__init__(owner.process, owner.user, owner.space, owner.mode)
        self.charged = charged

    def settled(self) -> Owner:
        return Owner(self.process, self.user, self.space, self.mode)


class Segment:
    """Pages ``[start, end)`` of one pages object, all with the same number of holders (at least one)."""

    __slots__ = ("end", "extents", "holders", "start")

    def __init__(self, start: int, end: int, extents: Extents, holders: int) -> None:
        self.start = start
        self.end = end
        self.extents = extents
        self.holders = holders

    def cut(self, start: int, end: int) -> Extents:
        """The frames of ``[start, end)``, a part of this segment."""
        if start == self.start and end == self.end:
            return self.extents
        return slice_extents(self.extents, start - self.start, end - start)


class Pages:
    """A linear array of ``npages`` whole pages.

    ``base`` is the address of the first one at its source (user VA, file offset, dma-buf offset; bytes, page-aligned),
    ``source`` None for memory of the process ``owner``. ``records`` counts the users of each exact interval pinned by
    accesses."""

    __slots__ = ("base", "busy", "extents", "holders", "npages", "owner", "records", "segments", "source", "writable")

    def __init__(self, owner: Owner, base: int, npages: int, writable: bool, source: Source | None = None) -> None:
        self.owner = owner
        self.base = base
        self.npages = npages
        self.writable = writable
        self.source = source
        self.busy = False
        self.holders = 0
        self.extents: Extents = ()
        self.segments: list[Segment] | None = None
        self.records: dict[tuple[int, int], int] | None = None

    # ------------------------------------------------------------------------------------------------- the mutex

    def lock(self, world: World) -> None:
        with world.lock:
            while self.busy:
                world.wait()
            self.busy = True

    def unlock(self, world: World) -> None:
        with world.lock:
            self.busy = False
            world.wake()

    @contextmanager
    def mutex(self, world: World) -> Iterator[None]:
        """:meth:`lock` and :meth:`unlock` around a block."""
        self.lock(world)
        try:
            yield
        finally:
            self.unlock(world)

    # -------------------------------------------------------------------------- holding and letting go (under busy)

    def hold(
        self, world: World, task: Task | None, first: int, count: int, *, direct: bool = False
    ) -> tuple[Extents, int]:
        """One more holder of the pages ``[first, first + count)``: their frames, and how many had to be pinned.

        What is held already is not asked of its source again (core 5.3). On failure nothing changed. ``direct``: the
        list of pages is the caller's own, so no scratch memory is needed for it."""
        if self.segments is None:
            if count == self.npages:
                if self.holders == 0:
                    self.extents = self._pin(world, task, first, count, direct)
                    self.holders = 1
                    return self.extents, count
                self.holders += 1
                return self.extents, 0
            self._divide()
        return self._hold_part(world, task, first, first + count, direct)

    def _divide(self) -> None:
        """From "all or nothing" to a list of segments."""
        self.segments = [Segment(0, self.npages, self.extents, self.holders)] if self.holders else []
        self.extents, self.holders = (), 0

    def _hold_part(self, world: World, task: Task | None, start: int, end: int, direct: bool) -> tuple[Extents, int]:
        assert self.segments is not None
        low, high = self._touched(start, end)
        fresh: list[Segment] = []
        at = start
        try:
            for segment in self.segments[low:high]:
                if at < segment.start:
                    fresh.append(Segment(at, segment.start, self._pin(world, task, at, segment.start - at, direct), 0))
                at = segment.end
            if at < end:
                fresh.append(Segment(at, end, self._pin(world, task, at, end - at, direct), 0))
        except BaseException:
            for segment in fresh:
                unpin_extents(segment.extents)
            self._store(low, low, [])
            raise
        parts = sorted([*self.segments[low:high], *fresh], key=_start)
        inside = _split_at(parts, start, end)
        for segment in inside:
            segment.holders += 1
        self._store(low, high, parts)
        return join(chain.from_iterable(s.extents for s in inside)), sum(s.end - s.start for s in fresh)

    def drop(self, first: int, count: int) -> int:
        """One holder of ``[first, first + count)`` less; unpins what nobody holds any more and returns how many
        pages."""
        if self.segments is None:
            if count == self.npages:
                self.holders -= 1
                if self.holders:
                    return 0
                extents, self.extents = self.extents, ()
                unpin_extents(extents)
                return count
            self._divide()
        assert self.segments is not None
        start, end = first, first + count
        low, high = self._touched(start, end)
        parts = self.segments[low:high]
        free: list[Segment] = []
        for segment in _split_at(parts, start, end):
            segment.holders -= 1
            if segment.holders == 0:
                free.append(segment)
        self._store(low, high, [s for s in parts if s.holders])
        for segment in free:
            unpin_extents(segment.extents)
        return sum(s.end - s.start for s in free)

    def _touched(self, start: int, end: int) -> tuple[int, int]:
        """The slice of ``segments`` that intersects ``[start, end)``."""
        segments = self.segments
        assert segments is not None
        low, above = 0, len(segments)
        while low < above:
            middle = (low + above) // 2
            if segments[middle].end <= start:
                low = middle + 1
            else:
                above = middle
        high = low
        while high < len(segments) and segments[high].start < end:
            high += 1
        return low, high

    def _store(self, low: int, high: int, parts: list[Segment]) -> None:
        """Puts ``parts`` in place of ``segments[low:high]``, joins neighbours that no longer differ, and goes back to
        the short form where that says it all."""
        segments = self.segments
        assert segments is not None
        if low > 0:
            low -= 1
            parts = [segments[low], *parts]
        if high < len(segments):
            parts = [*parts, segments[high]]
            high += 1
        joined: list[Segment] = []
        for segment in parts:
            before = joined[-1] if joined else None
            if before is not None and before.end == segment.start and before.holders == segment.holders:
                extents = join((*before.extents, *segment.extents))
                joined[-1] = Segment(before.start, segment.end, extents, before.holders)
            else:
                joined.append(segment)
        segments[low:high] = joined
        if not segments:
            self.segments = None
        elif len(segments) == 1 and segments[0].start == 0 and segments[0].end == self.npages:
            self.extents, self.holders, self.segments = segments[0].extents, segments[0].holders, None

    def held(self) -> int:
        """How many pages are pinned."""
        if self.segments is None:
            return self.npages if self.holders else 0
        return sum(s.end - s.start for s in self.segments)

    def frames(self, first: int, count: int) -> Extents:
        """The frames of pages somebody holds (core 5.3 tiers 1 and 2)."""
        if self.segments is None:
            return self.extents if count == self.npages else slice_extents(self.extents, first, count)
        low, high = self._touched(first, first + count)
        end = first + count
        return join(chain.from_iterable(s.cut(max(s.start, first), min(s.end, end)) for s in self.segments[low:high]))

    def borrow(self, world: World, task: Task | None, first: int, count: int) -> tuple[Extents, list[Extents]]:
        """The frames of ``[first, first + count)`` for the length of a copy: what is held as it is, the rest pinned now
        and not charged. The caller unpins the second part of the answer (core 5.6, slow path)."""
        if self.segments is None and self.holders:
            return self.frames(first, count), []
        end = first + count
        low, high = self._touched(first, end) if self.segments is not None else (0, 0)
        parts: list[Extents] = []
        loans: list[Extents] = []
        try:
            at = first
            for segment in self.segments[low:high] if self.segments is not None else ():
                if at < segment.start:
                    loans.append(self._pin(world, task, at, segment.start - at))
                    parts.append(loans[-1])
                    at = segment.start
                stop = min(segment.end, end)
                parts.append(segment.cut(at, stop))
                at = stop
            if at < end:
                loans.append(self._pin(world, task, at, end - at))
                parts.append(loans[-1])
        except BaseException:
            for loan in loans:
                unpin_extents(loan)
            raise
        return join(chain.from_iterable(parts)), loans

    def _pin(self, world: World, task: Task | None, first: int, count: int, direct: bool = False) -> Extents:
        """Asks the source (core 5.5)."""
        if world.fail is not None:
            if not direct and world.fail(SCRATCH, task):
                raise KernelError(errno.ENOMEM, "fault injection: no memory for the list of pinned pages")
            if world.fail(PIN, task):
                raise KernelError(errno.EFAULT, f"fault injection: pinning {count} page(s) from page {first}")
        if self.source is not None:
            return self.source.pin(self.base + first * PAGE_SIZE, count)
        va = self.base + first * PAGE_SIZE
        space = self.owner.space
        extents: Extents = space.pin(va, count, self.writable, current=task is not None and task.space is space)
        if world.instruments:
            world.event("pin", va=va, pages=count)
        return extents

    # ------------------------------------------------------------------------------------------------- accounting

    def charge(self, world: World, task: Task | None, pages: int) -> None:
        """core 6.2: the new pages of one operation, in one step; ENOMEM over the limit."""
        if world.fail is not None and world.fail(CHARGE, task):
            raise KernelError(errno.ENOMEM, f"fault injection: charging {pages} page(s)")
        owner = self.owner
        if type(owner) is Unsettled:
            pages = self.held() - owner.charged
        if pages > 0:
            charge(owner.mode, owner.process, owner.user, owner.space, pages)
        elif pages < 0:
            uncharge(owner.mode, owner.process, owner.user, owner.space, -pages, although_gone=True)
        if type(owner) is Unsettled:
            self.owner = owner.settled()

    def uncharge(self, pages: int) -> None:
        """Takes the charge of unpinned pages back, after they were unpinned."""
        owner = self.owner
        if type(owner) is Unsettled:
            pages = owner.charged - self.held()
            if pages <= 0:
                return
        if not uncharge(owner.mode, owner.process, owner.user, owner.space, pages):
            self.owner = Unsettled(owner, self.held() + pages)
        elif type(owner) is Unsettled:
            self.owner = owner.settled()

    @property
    def charged(self) -> int:
        """How many pages the owner is charged for: those that are pinned, usually."""
        owner = self.owner
        return owner.charged if type(owner) is Unsettled else self.held()

    # ---------------------------------------------------------------------------------------------- access records

    def add_record(self, world: World, task: Task | None, first: int, count: int) -> Extents:
        """An access pins the pages (core 5.4): a new interval holds and is charged, a known one is counted."""
        records = self.records
        key = (first, count)
        if records is None:
            records = self.records = {}
        elif key in records:
            records[key] += 1
            return self.frames(first, count)
        extents, new = self.hold(world, task, first, count, direct=True)
        try:
            if world.fail is not None and world.fail(STORE, task):
                raise KernelError(errno.EINVAL, f"fault injection: storing the frames of {count} page(s)")
            if new:
                self.charge(world, task, new)
        except BaseException:
            self.drop(first, count)
            raise
        records[key] = 1
        return extents

    def has_record(self, first: int, count: int) -> bool:
        return self.records is not None and (first, count) in self.records

    def drop_record(self, first: int, count: int) -> None:
        """The last user of the interval lets go."""
        records = self.records
        assert records is not None
        key = (first, count)
        records[key] -= 1
        if records[key] == 0:
            del records[key]
            if not records:
                self.records = None
            freed = self.drop(first, count)
            if freed:
                self.uncharge(freed)


def _start(segment: Segment) -> int:
    return segment.start


def _split_at(parts: list[Segment], start: int, end: int) -> list[Segment]:
    """Cuts the members of ``parts`` (in order, in place) at ``start`` and ``end``; those inside, which cover it all."""
    if parts and parts[0].start < start:
        left = parts[0]
        parts.insert(1, Segment(start, left.end, left.cut(start, left.end), left.holders))
        parts[0] = Segment(left.start, start, left.cut(left.start, start), left.holders)
    if parts and parts[-1].end > end:
        right = parts[-1]
        parts[-1] = Segment(right.start, end, right.cut(right.start, end), right.holders)
        parts.append(Segment(end, right.end, right.cut(end, right.end), right.holders))
    return [s for s in parts if s.start >= start and s.end <= end]
