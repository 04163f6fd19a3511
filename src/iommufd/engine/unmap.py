"""Taking areas away: the range walk of UNMAP, the callbacks it makes, and the cuts of the VFIO path (core 4.12, 4.15).

Invariants: the walk is ascending and not atomic; each area it removes leaves its domains, then lets its pages go, then
frees its IOVA. Callbacks run without any lock; ``prevent_access`` is set before the first of them, so no new pin can
begin, and stays set whatever happens.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from iommufd.engine.area import PAGE_OFFSET, Area, lose_source, release, unfill
from iommufd.engine.failpoints import SLAB
from iommufd.errors import KernelError

if TYPE_CHECKING:
    from iommufd.engine.io_pagetable import IOPagetable
    from iommufd.engine.pages import Pages
    from iommufd.engine.source import Source

UNMAP_ROUNDS = 100
UNMAP_BATCH = 256  # areas without domains that one unmap removes before it lets others in


def unmap_range(table: IOPagetable, start: int, last: int) -> tuple[int, KernelError | None]:
    """Removes every area inside ``[start, last]``, lowest first: the bytes removed, and why it stopped early (None: it
    did not)."""
    world, areas = table.world, table.areas
    total = rounds = 0
    asked = start
    while start <= last:
        area: Area | None = None
        pages: Pages | None = None
        error: KernelError | None = None
        dead: list[Source] = []
        pinned = ours = False
        budget = UNMAP_BATCH
        world.lock.acquire()  # half the price of a with statement
        try:
            if table.domains_sem.blocked or table.iova_sem.blocked or table.iova_sem.readers:
                table.pass_removing()
            while start <= last and budget:
                found = areas.first_in(start, last)
                if found is None:
                    start = last + 1
                    break
                first, end, area = found
                pages = area.pages
                if pages is None or area.locks or first < start or end > last:
                    error = _refusal(area, asked, last)
                    break
                if first != start:
                    rounds = 0
                if area.accesses:  # row d
                    area.prevent_access = pinned = True
                    start = first
                    break
                start = end + 1
                if table.domains:
                    area.pages = None
                    table.domains_sem.readers += 1
                    ours = not pages.busy
                    if ours:
                        pages.busy = True
                    break
                areas.remove(first)  # row e
                if pages.source is not None:
                    lose_source(pages, dead)
                total += start - first
                area = None
                budget -= 1
        finally:
            world.lock.release()
        if dead:
            release(dead)
        if error is not None:
            return total, error
        if area is None or pages is None:
            continue
        length = area.last - area.first + 1
        if pinned:
            notify(table, area.first, length)
            rounds += 1
            if rounds > UNMAP_ROUNDS:
                return total, KernelError(
                    errno.EDEADLOCK,
                    f"{area!r} still has {area.accesses} pin(s) after {rounds} rounds of unmap callbacks",
                )
            continue
        if not ours:
            pages.lock(world)
        _remove(table, area, pages)
        total += length
    return total, None


def _refusal(area: Area, start: int, last: int) -> KernelError:
    """core 4.12 rows a to c."""
    if area.pages is None:  # row a
        return KernelError(errno.EBUSY, f"another thread is mapping or unmapping {area!r}")
    if area.locks:  # row b
        return KernelError(errno.EBUSY, f"{area!r} is the memory of a hardware queue")
    return KernelError(errno.ENOENT, f"{area!r} is not completely inside [{start:#x}, {last:#x}]")  # row c


def _remove(table: IOPagetable, area: Area, pages: Pages) -> None:
    """core 4.12 row e for an area with domains. This thread took it out of service, read-holds ``domains_sem`` and has
    ``pages`` busy."""
    world = table.world
    unfill(area, pages, table.domains, True)
    dead: list[Source] = []
    with world.lock:
        pages.busy = False
        if table.iova_sem.writer:
            world.wake()
            table.pass_finishing()
        table.areas.remove(area.first)
        if pages.source is not None:
            lose_source(pages, dead)
        table.domains_sem.end_read(world)
        world.wake()
    if dead:
        release(dead)


def notify(table: IOPagetable, iova: int, length: int) -> None:
    """Calls the unmap callback of every external access, in the order of their slots (devices 8.6). No lock is held."""
    world = table.world
    slot = -1
    while True:
        with world.lock:
            slot = min((s for s in table.accesses if s > slot), default=-1)
            if slot < 0:
                return
            access = table.accesses[slot]
            unmap = access.ops.unmap
            if unmap is None or access.wait == 0:  # internal, or being destroyed
                continue
            access.users += 1
            access.wait += 1
        try:
            unmap(iova, length)
        finally:
            access.context.objects.put(access)


def cut(table: IOPagetable, position: int) -> None:
    """Makes ``position`` the last byte of an area if it is inside one (core 4.15); both parts share the pages object.

    Pins, charges and domain content stay as they are: pages are held by index interval, and two adjacent intervals hold
    what one did. KernelError EBUSY, EOPNOTSUPP, EINVAL."""
    world = table.world
    with world.lock:
        table.pass_removing()
        found = table.areas.find(position)
        if found is None:
            return
        first, last, area = found
        if position in (first, last):  # row 1
            return
        pages = area.pages
        if pages is None or area.prevent_access:  # row 2
            raise KernelError(errno.EBUSY, f"{area!r} is being mapped or unmapped")
        if pages.source is not None and pages.source.dmabuf is not None:  # row 3
            raise KernelError(errno.EOPNOTSUPP, f"{area!r} maps a dma-buf and cannot be cut")
        start = area.start + position + 1 - first
        alignment = table.iova_alignment
        if (position + 1 | start & PAGE_OFFSET) % alignment:  # row 4
            raise KernelError(
                errno.EINVAL,
                f"{area!r} cannot be cut at {position + 1:#x}, {start & PAGE_OFFSET:#x} bytes into a page: the IOVA "
                f"alignment is {alignment:#x}",
            )
        if world.fail is not None and world.fail(SLAB, None):  # row 5
            raise KernelError(errno.ENOMEM, "fault injection: no memory for an area")
        if area.accesses:  # row 6
            raise KernelError(errno.EINVAL, f"{area!r} has {area.accesses} pin(s)")
        if table.domains and not table.large_pages_disabled:  # row 7
            raise KernelError(errno.EINVAL, f"{area!r} may be in the domain as large pages")
        right = Area(position + 1, last, pages, start, area.prot)  # row 8
        table.areas.remove(first)
        area.last = position
        table.areas.insert(first, position, area)
        table.areas.insert(position + 1, last, right)
        if pages.source is not None:
            pages.source.users += 1
