"""Giving memory an IOVA: where it goes, the area that says so, and the domains it is filled into (core 4.7).

Functions on an :class:`IOPagetable`, as those of :mod:`.unmap`, so that a map of the usual kind is one call deep.

Invariants: the rows are checked in order and nothing is done before the last; a map with domains occupies its IOVA by
an area in progress while it fills them without ``World.lock``, and takes it back if that fails.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from iommufd.engine import auto_iova
from iommufd.engine.area import PAGE_OFFSET, WRITE, Area, Piece, fill, lose_source, release, unfill
from iommufd.engine.failpoints import SLAB
from iommufd.engine.ranges import ULMAX
from iommufd.errors import KernelError

if TYPE_CHECKING:
    from iommufd.engine.io_pagetable import IOPagetable
    from iommufd.engine.pages import Pages
    from iommufd.engine.source import Source
    from iommufd.engine.task import Task


def map_pages(
    table: IOPagetable, task: Task | None, pieces: list[Piece], length: int, iova: int | None, prot: int
) -> int:
    """The mapping core (core 4.7): one area per piece, ``length`` bytes in all, at ``iova`` or where core 4.8 says.

    Returns the IOVA. ``prot`` is READ and WRITE. All or nothing. The caller holds a user of each piece's source."""
    if len(pieces) == 1:
        pages, start, _ = pieces[0]
        return map_one(table, task, pages, start, length, iova, prot)
    world = table.world
    if world.fail is not None and world.fail(SLAB, task):  # row 1
        raise KernelError(errno.ENOMEM, "fault injection: no memory for an area")
    with world.lock:
        if table.domains_sem.blocked or table.iova_sem.writer:
            table.pass_placing()
        alignment = table.iova_alignment
        iova = _choose(table, pieces[0][0].base + pieces[0][1], length, iova)  # rows 2-3
        if table.areas.overlaps(iova, iova + length - 1):  # row 3b
            raise KernelError(errno.EEXIST, table.overlap_sentence(iova, iova + length - 1))
        live = not table.domains
        at = iova
        new: list[Area] = []
        for pages, start, size in pieces:
            if (prot & WRITE and not pages.writable) or (start & PAGE_OFFSET) % alignment:  # rows 4-5
                raise _piece_error(pages, start, prot, alignment)
            # row 6 cannot happen: the whole range was checked, and a pages object ends below 2^64
            new.append(Area(at, at + size - 1, pages if live else None, start, prot))
            at += size
        for area in new:
            table.areas.insert(area.first, area.last, area)
        for pages, _, _ in pieces:
            if pages.source is not None:
                pages.source.users += 1
        if live:
            return iova
        table.domains_sem.readers += 1
    _fill_several(table, task, new, [piece[0] for piece in pieces])
    return iova


def map_one(
    table: IOPagetable, task: Task | None, pages: Pages, start: int, length: int, iova: int | None, prot: int
) -> int:
    """:func:`map_pages` of one piece, the usual case."""
    world = table.world
    if world.fail is not None and world.fail(SLAB, task):  # row 1
        raise KernelError(errno.ENOMEM, "fault injection: no memory for an area")
    world.lock.acquire()  # half the price of a with statement
    try:
        if table.domains_sem.blocked or table.iova_sem.writer:
            table.pass_placing()
        area = place(table, pages, start, length, iova, prot)
        if pages.source is not None:
            pages.source.users += 1
        if not table.domains:
            return area.first
        table.domains_sem.readers += 1
        alone = not pages.busy
        if alone:
            pages.busy = True
    finally:
        world.lock.release()
    if alone:
        _fill_one(table, task, area, pages)
    else:
        _fill_several(table, task, [area], [pages])
    return area.first


def place(table: IOPagetable, pages: Pages, start: int, length: int, iova: int | None, prot: int) -> Area:
    """core 4.7 rows 2-6 for one piece: a new area, live at once if no domain is to be filled. Locked, and when
    :meth:`IOPagetable.pass_placing` lets pass."""
    alignment = table.iova_alignment
    if (
        iova is None
        or (iova | length) % alignment
        or not length
        or iova + length - 1 > ULMAX
        or table.reserved_union.overlap(iova, iova + length - 1) is not None
    ):
        iova = _choose(table, pages.base + start, length, iova)  # rows 2-3
    last = iova + length - 1
    if (prot & WRITE and not pages.writable) or (start & PAGE_OFFSET) % alignment:  # rows 4-5
        if table.areas.overlaps(iova, last):
            raise KernelError(errno.EEXIST, table.overlap_sentence(iova, last))
        raise _piece_error(pages, start, prot, alignment)
    # row 6 cannot happen: the range was checked, and a pages object ends below 2^64
    area = Area(iova, last, None if table.domains else pages, start, prot)
    try:
        table.areas.insert(iova, last, area)
    except ValueError:  # row 3b
        raise KernelError(errno.EEXIST, table.overlap_sentence(iova, last)) from None
    return area


def _choose(table: IOPagetable, addr: int, length: int, iova: int | None) -> int:
    """core 4.7 rows 2 and 3: where ``length`` bytes of memory at ``addr`` go. Whether a fixed IOVA is taken already
    (the last check of row 3b) is the caller's to find out."""
    alignment = table.iova_alignment
    if length % alignment or length == 0:  # row 2
        raise KernelError(
            errno.EINVAL, f"the length {length:#x} is not a multiple of the IOVA alignment {alignment:#x}"
        )
    if iova is None:  # row 3a
        return auto_iova.choose(
            addr,
            length,
            alignment,
            table.allowed,
            table.reserved_union,
            table.areas.holes,
            table.world.huge_page_size,
        )
    last = iova + length - 1  # row 3b
    if iova % alignment:
        raise KernelError(errno.EINVAL, f"IOVA {iova:#x} is not a multiple of the IOVA alignment {alignment:#x}")
    if last > ULMAX:
        raise KernelError(errno.EOVERFLOW, f"{length:#x} bytes at IOVA {iova:#x} end beyond the last address")
    taken = table.reserved_union.overlap(iova, last)
    if taken is not None:
        raise KernelError(
            errno.EINVAL, f"IOVA [{iova:#x}, {last:#x}] overlaps the reserved range [{taken[0]:#x}, {taken[1]:#x}]"
        )
    return iova


def _fill_one(table: IOPagetable, task: Task | None, area: Area, pages: Pages) -> None:
    """core 4.7 rows 7 and 8 for the usual map of one piece. This thread made the placeholder, read-holds
    ``domains_sem`` and has ``pages`` busy."""
    world = table.world
    try:
        fill(world, area, pages, table.domains, task, table.large_pages_disabled, True)
    except BaseException:
        pages.unlock(world)
        _take_back(table, [area], [pages])
        raise
    with world.lock:
        pages.busy = False
        if table.iova_sem.writer:
            world.wake()
            table.pass_finishing()
        area.pages = pages
        table.domains_sem.end_read(world)
        world.wake()


def _fill_several(table: IOPagetable, task: Task | None, areas: list[Area], backing: list[Pages]) -> None:
    """The same for several pieces; an earlier one is undone when a later one fails."""
    world = table.world
    done = 0
    try:
        for area, pages in zip(areas, backing, strict=True):
            with pages.mutex(world):
                fill(world, area, pages, table.domains, task, table.large_pages_disabled, True)
            done += 1
    except BaseException:
        for area, pages in zip(areas[:done], backing, strict=False):
            with pages.mutex(world):
                unfill(area, pages, table.domains, True)
        _take_back(table, areas, backing)
        raise
    with world.lock:
        table.pass_finishing()
        for area, pages in zip(areas, backing, strict=True):
            area.pages = pages
        table.domains_sem.end_read(world)


def _take_back(table: IOPagetable, areas: list[Area], backing: list[Pages]) -> None:
    """The placeholders of a map that failed go."""
    world = table.world
    dead: list[Source] = []
    with world.lock:
        table.pass_finishing()
        for area, pages in zip(areas, backing, strict=True):
            table.areas.remove(area.first)
            lose_source(pages, dead)
        table.domains_sem.end_read(world)
    release(dead)


def _piece_error(pages: Pages, start: int, prot: int, alignment: int) -> KernelError:
    """core 4.7 rows 4 and 5."""
    if prot & WRITE and not pages.writable:
        return KernelError(errno.EPERM, "the memory was mapped without WRITEABLE and cannot become writable")
    return KernelError(
        errno.EINVAL,
        f"the memory begins {start & PAGE_OFFSET:#x} bytes into a page, not at a multiple of the IOVA alignment "
        f"{alignment:#x}",
    )
