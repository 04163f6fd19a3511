"""The I/O page table of one IOAS: which IOVA maps what, in which domains (kernel: struct io_pagetable).

Invariants (core 4, 9):

* Areas are disjoint. An area without ``pages`` is in progress: a map or an unmap of another thread is at work on it. It
  occupies its IOVA, conforms to the alignment, and is a gap for everybody who reads.
* Live areas are in every domain of the list ("filled") unless their dma-buf was revoked. The storage domain of an area
  is therefore always the first one of the list, and needs no field.
* ``domains_sem`` is read-held over every fill and unfill and write-held by whoever changes the list of domains,
  accesses or the alignment; ``iova_sem`` is read-held by accesses while they pin or copy and write-held by whoever must
  see no area change. Maps and unmaps change areas under ``World.lock`` alone, when no writer holds either.
* An area's entries leave the domains before its pages are let go; both before its IOVA is free again.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from iommufd.engine.area import PAGE_OFFSET, Area, Piece, fill, gap_sentence, unfill
from iommufd.engine.locks import RWState
from iommufd.engine.ranges import EMPTY, ULMAX, Range, Ranges
from iommufd.errors import KernelError
from iommufd.memory.frames import PAGE_SIZE
from iommufd.memory.intervals import IntervalIndex

if TYPE_CHECKING:
    from iommufd.engine.access import Access
    from iommufd.engine.task import Task
    from iommufd.engine.world import World
    from iommufd.iommu.domain import PagingDomain

MAX_ACCESSES = 65536


class IOPagetable:
    """Areas, reservations, domains and accesses of one IOAS.

    ``reserved`` lists (first, last, owner), ``reserved_union`` is their union; ``allowed`` is the user's list (empty:
    no restriction); ``accesses`` maps list slots to attached accesses. Read them under ``World.lock``."""

    __slots__ = (
        "accesses",
        "allowed",
        "areas",
        "domains",
        "domains_sem",
        "ioas_id",
        "iova_alignment",
        "iova_sem",
        "large_pages_disabled",
        "reserved",
        "reserved_union",
        "world",
    )

    def __init__(self, world: World) -> None:
        self.world = world
        self.ioas_id = 0
        self.areas: IntervalIndex[Area] = IntervalIndex()
        self.reserved: list[tuple[int, int, object]] = []
        self.reserved_union = EMPTY
        self.allowed = EMPTY
        self.domains: list[PagingDomain] = []
        self.accesses: dict[int, Access] = {}
        self.iova_alignment = 1
        self.large_pages_disabled = False
        self.domains_sem = RWState()
        self.iova_sem = RWState()

    # ------------------------------------------------------------------------------------------ who may go on, locked

    def pass_placing(self) -> None:
        """Until no writer holds or wants the table (a map's first step needs both semaphores for a moment)."""
        while self.domains_sem.blocked or self.iova_sem.writer:
            self.world.wait()

    def pass_finishing(self) -> None:
        """The second step of a map or unmap that read-holds ``domains_sem``."""
        while self.iova_sem.writer:
            self.world.wait()

    def pass_removing(self) -> None:
        """As placing, and no access may be pinning or copying either (core 9)."""
        while True:
            self.pass_placing()
            if not self.iova_sem.readers:
                return
            self.iova_sem.pass_writer(self.world)
            if not self.domains_sem.blocked:
                return

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Nobody maps, unmaps, pins or copies meanwhile; areas in progress are finished. Call without locks."""
        world = self.world
        with world.lock:
            self.domains_sem.start_write(world)
            self.iova_sem.start_write(world)
        try:
            yield
        finally:
            with world.lock:
                self.iova_sem.end_write(world)
                self.domains_sem.end_write(world)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """No area goes away meanwhile; new ones may appear. Call without locks."""
        world = self.world
        with world.lock:
            self.iova_sem.start_read(world)
        try:
            yield
        finally:
            with world.lock:
                self.iova_sem.end_read(world)

    # --------------------------------------------------------------------------------------------------- what is mapped

    def overlap_sentence(self, first: int, last: int) -> str:
        """What is in the way of ``[first, last]``, for an error; locked."""
        found = self.areas.first_in(first, last)
        assert found is not None
        state = "" if found[2].pages is not None else ", which another thread is mapping or unmapping"
        return f"IOVA [{first:#x}, {last:#x}] overlaps the area [{found[0]:#x}, {found[1]:#x}]{state}"

    def pieces_of(self, iova: int, last: int) -> list[Piece]:
        """What ``[iova, last]`` maps, one piece per area (core 4.11 row 7), each with one more user of its source.

        ENOENT unless live areas cover it without a gap."""
        world = self.world
        pieces: list[Piece] = []
        with world.lock:
            while self.iova_sem.writer:
                world.wait()
            at = iova
            while True:
                found = self.areas.find(at)
                area = None if found is None else found[2]
                if area is None or area.pages is None:
                    raise KernelError(errno.ENOENT, gap_sentence(iova, last, at, area))
                stop = min(last, area.last)
                pieces.append((area.pages, area.start + at - area.first, stop - at + 1))
                if stop == last:
                    break
                at = stop + 1
            for pages, _, _ in pieces:
                if pages.source is not None:
                    pages.source.users += 1
        return pieces

    def nth_iova(self, n: int, offset: int) -> int:
        """mock-device 7: ``offset`` bytes into the n-th area, or 0 when there are not so many."""
        with self.world.lock:
            return self.areas.nth(n)[0] + offset if n < len(self.areas) else 0

    # -------------------------------------------------------------------------------- ranges, alignment, large pages

    def _alignment(self) -> int:
        """core 4.2, from scratch; locked."""
        alignment = PAGE_SIZE if self.large_pages_disabled else 1
        for domain in self.domains:
            alignment = max(alignment, domain.pgsize_bitmap & -domain.pgsize_bitmap)
        for access in self.accesses.values():
            alignment = max(alignment, access.iova_alignment)
        return alignment

    def _check_conforming(self, alignment: int) -> None:
        """EADDRINUSE unless every area, also in progress, has IOVA, length and memory offset multiples of
        ``alignment``."""
        if alignment <= self.iova_alignment:
            return
        for first, last, area in self.areas:
            if (first | (last + 1) | (area.start & PAGE_OFFSET)) & (alignment - 1):
                raise KernelError(
                    errno.EADDRINUSE,
                    f"the area [{first:#x}, {last:#x}], {area.start & PAGE_OFFSET:#x} bytes into a page, "
                    f"does not conform to an IOVA alignment of {alignment:#x}",
                )

    def reserve(self, start: int, last: int, owner: object) -> None:
        """One more reserved range of ``owner`` (core 4.3); EADDRINUSE when an area or an allowed range intersects
        it."""
        with self.world.lock:
            while self.iova_sem.writer:
                self.world.wait()
            self._reserve(start, last, owner)

    def _reserve(self, start: int, last: int, owner: object) -> None:
        if self.areas.overlaps(start, last):
            raise KernelError(errno.EADDRINUSE, f"reserving it: {self.overlap_sentence(start, last)}")
        allowed = self.allowed.overlap(start, last)
        if allowed is not None:
            raise KernelError(
                errno.EADDRINUSE,
                f"[{start:#x}, {last:#x}] cannot be reserved: it overlaps the allowed range "
                f"[{allowed[0]:#x}, {allowed[1]:#x}]",
            )
        self.reserved.append((start, last, owner))
        self._sum_up_reserved()

    def remove_reserved(self, owner: object) -> None:
        """Drops the reservations of ``owner``, compared by identity."""
        with self.world.lock:
            while self.iova_sem.writer:
                self.world.wait()
            self._remove_reserved(owner)

    def _remove_reserved(self, owner: object) -> None:
        self.reserved = [entry for entry in self.reserved if entry[2] is not owner]
        self._sum_up_reserved()

    def _sum_up_reserved(self) -> None:
        self.reserved_union = Ranges((first, last) for first, last, _ in self.reserved)

    def set_allowed(self, allowed: Ranges) -> None:
        """core 4.6 rows 7 and 8: the whole list at once, or EADDRINUSE."""
        with self.world.lock:
            while self.iova_sem.writer:
                self.world.wait()
            for first, last in allowed:
                taken = self.reserved_union.overlap(first, last)
                if taken is not None:
                    raise KernelError(
                        errno.EADDRINUSE,
                        f"the allowed range [{first:#x}, {last:#x}] overlaps the reserved range "
                        f"[{taken[0]:#x}, {taken[1]:#x}]",
                    )
            self.allowed = allowed

    def usable(self) -> tuple[list[Range], int]:
        """The holes between the reservations, and the alignment (core 4.5), of one moment."""
        with self.world.lock:
            while self.iova_sem.writer:
                self.world.wait()
            return list(self.reserved_union.gaps(0, ULMAX)), self.iova_alignment

    def disable_large_pages(self) -> None:
        """HUGE_PAGES=0 (core 3): EINVAL with domains and areas, EADDRINUSE when an area does not conform."""
        with self.exclusive():
            if self.large_pages_disabled:  # row 3
                return
            if self.domains and self.areas:  # row 4
                raise KernelError(
                    errno.EINVAL,
                    f"{len(self.areas)} area(s) are mapped in {len(self.domains)} domain(s) with large pages already",
                )
            self._check_conforming(PAGE_SIZE)  # row 5
            self.large_pages_disabled = True
            self.iova_alignment = self._alignment()  # row 6

    def enable_large_pages(self) -> None:
        """HUGE_PAGES=1 (core 3 row 7)."""
        with self.exclusive():
            self.large_pages_disabled = False
            self.iova_alignment = self._alignment()

    # ------------------------------------------------------------------------------------------------------- domains

    def add_domain(self, domain: PagingDomain, task: Task | None = None) -> None:
        """Puts every area into ``domain`` and the domain into the list (core 4.3); all or nothing."""
        with self.exclusive():
            smallest = domain.pgsize_bitmap & -domain.pgsize_bitmap
            alignment = max(self.iova_alignment, smallest)
            if alignment > PAGE_SIZE:  # row 1
                raise KernelError(
                    errno.EINVAL, f"the domain's smallest page of {smallest:#x} bytes is larger than a page of memory"
                )
            self._check_conforming(alignment)
            try:
                with self.world.lock:
                    if domain.aperture_start:  # row 2
                        self._reserve(0, domain.aperture_start - 1, domain)
                    if domain.aperture_end != ULMAX:  # row 3
                        self._reserve(domain.aperture_end + 1, ULMAX, domain)
                self._fill_domain(domain, task)  # row 4
            except BaseException:
                with self.world.lock:
                    self._remove_reserved(domain)
                raise
            with self.world.lock:
                self.iova_alignment = alignment  # row 5
                self.domains.append(domain)

    def _fill_domain(self, domain: PagingDomain, task: Task | None) -> None:
        storage = not self.domains
        done = 0
        target = [domain]
        try:
            for area in self.areas.values():
                assert area.pages is not None
                with area.pages.mutex(self.world):
                    fill(self.world, area, area.pages, target, task, self.large_pages_disabled, storage)
                done += 1
        except BaseException:
            for area in self.areas.values():
                if done == 0:
                    break
                assert area.pages is not None
                with area.pages.mutex(self.world):
                    unfill(area, area.pages, target, storage)
                done -= 1
            raise

    def remove_domain(self, domain: PagingDomain) -> None:
        """Takes every area out of ``domain`` and the domain out of the list (core 4.3); cannot fail."""
        with self.exclusive():
            domains = self.domains
            storage = len(domains) == 1
            target = [domain]
            for area in self.areas.values():
                assert area.pages is not None
                with area.pages.mutex(self.world):
                    unfill(area, area.pages, target, storage)
            with self.world.lock:
                at = next(i for i, d in enumerate(domains) if d is domain)
                moved = domains.pop()
                if at < len(domains):  # core 4.1: the last entry moves into the hole
                    domains[at] = moved
                self._remove_reserved(domain)
                self.iova_alignment = self._alignment()

    def dirty_slices(self, iova: int, last: int) -> Iterator[Range]:
        """The live areas from ``iova`` on, clipped to ``last``, up to the first gap (core 8.2 step 10).

        Use inside :meth:`reading`."""
        at = iova
        while at <= last:
            with self.world.lock:
                found = self.areas.find(at)
            if found is None or found[2].pages is None:
                return
            yield at, min(last, found[1])
            at = found[1] + 1

    # ------------------------------------------------------------------------------------------------------ accesses

    def add_access(self, access: Access) -> int:
        """Takes ``access`` into the list (devices 8.3 step 5) and returns its slot.

        EBUSY when 65536 are attached, EADDRINUSE when an area does not conform to its alignment."""
        with self.exclusive():
            slot = next(i for i in range(len(self.accesses) + 1) if i not in self.accesses)
            if slot >= MAX_ACCESSES:
                raise KernelError(errno.EBUSY, f"{MAX_ACCESSES} accesses are attached already")
            self._check_conforming(access.iova_alignment)
            with self.world.lock:
                self.accesses[slot] = access
                self.iova_alignment = self._alignment()
            return slot

    def remove_access(self, slot: int) -> None:
        """The access leaves the list; the alignment is worked out anew."""
        with self.exclusive(), self.world.lock:
            del self.accesses[slot]
            self.iova_alignment = self._alignment()
