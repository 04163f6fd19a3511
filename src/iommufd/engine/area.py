"""Area: one contiguous mapped interval, and how its pages come into domains and leave them (kernel: struct iopt_area).

Invariants (core 5.4): filling maps every frame of the area into each of the given domains, then charges what was newly
pinned, in one step; a failure undoes all of it. Unfilling takes the entries out first, then lets the pages go, then
takes the charge back; it cannot fail. Both run under the pages object's ``busy`` and without ``World.lock``. They cost
what the number of extents costs, never what the number of pages would.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from iommufd.engine.failpoints import SCRATCH
from iommufd.errors import KernelError
from iommufd.memory.frames import PAGE_SHIFT, PAGE_SIZE

if TYPE_CHECKING:
    from iommufd.engine.dmabuf import DmaBufSource
    from iommufd.engine.pages import Pages
    from iommufd.engine.ranges import Range
    from iommufd.engine.source import Source
    from iommufd.engine.task import Task
    from iommufd.engine.world import World
    from iommufd.iommu.domain import PagingDomain

READ, WRITE, CACHE, MMIO = 1, 2, 4, 16  # iommufd.iommu.domain.Prot, as plain ints

PAGE_OFFSET = PAGE_SIZE - 1

Piece = tuple["Pages", int, int]
"""(pages object, start_byte, length): what one area maps."""


class Area:
    """One contiguous mapped interval ``[first, last]``; byte ``start`` of its pages object is at ``first``.

    ``pages`` None: in progress. ``accesses`` counts the pins of accesses, ``locks`` those of internal ones among them;
    ``prevent_access`` is sticky."""

    __slots__ = ("accesses", "first", "last", "locks", "pages", "prevent_access", "prot", "start")

    def __init__(self, first: int, last: int, pages: Pages | None, start: int, prot: int) -> None:
        self.first = first
        self.last = last
        self.pages = pages
        self.start = start
        self.prot = prot
        self.accesses = 0
        self.locks = 0
        self.prevent_access = False

    def span(self) -> Range:
        """The page indexes the area touches, as (first page, number of pages)."""
        page = self.start >> PAGE_SHIFT
        return page, ((self.start + self.last - self.first) >> PAGE_SHIFT) - page + 1

    @property
    def page_offset(self) -> int:
        """How far into its first page the area's memory begins."""
        return self.start & PAGE_OFFSET

    def __repr__(self) -> str:
        return f"the area [{self.first:#x}, {self.last:#x}]"


def fill(
    world: World,
    area: Area,
    pages: Pages,
    domains: list[PagingDomain],
    task: Task | None,
    page_by_page: bool,
    storage: bool,
) -> None:
    """Maps ``area``, which is a slice of ``pages``, into ``domains``; all or nothing.

    ``storage``: the area becomes a holder of its pages, which are pinned and charged as needed; otherwise it is one
    already. KernelError EFAULT, ENOMEM, EINVAL, EOVERFLOW from pinning and charging, or the driver's."""
    if pages.source is not None and (dmabuf := pages.source.dmabuf) is not None:
        _fill_dmabuf(area, dmabuf, domains, page_by_page)
        return
    if world.fail is not None and world.fail(SCRATCH, task):
        raise KernelError(errno.ENOMEM, "fault injection: no memory to gather page frames")
    first, start = area.first, area.start
    length = area.last - first + 1
    page = start >> PAGE_SHIFT
    count = ((start + length - 1) >> PAGE_SHIFT) - page + 1
    new = 0
    if storage:
        extents, new = pages.hold(world, task, page, count)
    else:
        extents = pages.frames(page, count)
    done = 0
    try:
        offset, prot = start & PAGE_OFFSET, area.prot | CACHE
        for domain in domains:
            domain.map(first, extents, offset, length, prot, page_by_page)
            done += 1
        if new:
            pages.charge(world, task, new)
    except BaseException:
        for domain in domains[:done]:
            domain.unmap(first, length)
        if storage:
            pages.drop(page, count)
        raise


def _fill_dmabuf(area: Area, source: DmaBufSource, domains: list[PagingDomain], page_by_page: bool) -> None:
    """core 7: MMIO entries, nothing pinned; a revoked one maps nothing and succeeds."""
    if source.revoked:
        return
    extents = source.extents(*area.span())
    offset, length = area.start & PAGE_OFFSET, area.last - area.first + 1
    done: list[PagingDomain] = []
    try:
        for domain in domains:
            domain.map(area.first, extents, offset, length, area.prot | MMIO, page_by_page)
            source.note(domain, area)
            done.append(domain)
    except BaseException:
        for domain in done:
            source.forget(domain, area)
            domain.unmap(area.first, length)
        raise


def unfill(area: Area, pages: Pages, domains: list[PagingDomain], storage: bool) -> None:
    """Undoes :func:`fill`."""
    first, start = area.first, area.start
    length = area.last - first + 1
    if pages.source is not None and (dmabuf := pages.source.dmabuf) is not None:
        for domain in domains:
            if dmabuf.forget(domain, area):
                domain.unmap(first, length)
        return
    for domain in domains:
        domain.unmap(first, length)
    if storage:
        page = start >> PAGE_SHIFT
        freed = pages.drop(page, ((start + length - 1) >> PAGE_SHIFT) - page + 1)
        if freed:
            pages.uncharge(freed)


def lose_source(pages: Pages, dead: list[Source]) -> None:
    """One user of the pages object's source less; locked. What must be released then goes to ``dead``."""
    source = pages.source
    if source is not None:
        source.users -= 1
        if source.users == 0:
            dead.append(source)


def release(dead: list[Source]) -> None:
    """Releases sources without users; without locks."""
    for source in dead:
        source.release()


def forget_pieces(world: World, pieces: list[Piece]) -> None:
    """An operation in flight no longer needs the sources of its pieces."""
    dead: list[Source] = []
    with world.lock:
        for pages, _, _ in pieces:
            lose_source(pages, dead)
    release(dead)


def gap_sentence(iova: int, last: int, at: int, area: Area | None) -> str:
    """Why ``[iova, last]`` is not covered at ``at``."""
    why = "nothing is mapped" if area is None else "another thread is mapping or unmapping"
    return f"{why} at IOVA {at:#x} of [{iova:#x}, {last:#x}]"
