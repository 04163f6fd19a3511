"""IOMMU_IOAS_CHANGE_PROCESS: file mappings change hands, their charge with them (core 4.13).

A process that takes over a context (live update of a VMM) becomes the one who pays for the pages pinned from files.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from iommufd.engine.dispatch import Call, Handler, Respond
from iommufd.engine.ioas import IOAS
from iommufd.engine.pages import Owner, Pages, Unsettled
from iommufd.errors import KernelError
from iommufd.memory.accounting import Mode, charge, must_move, uncharge
from iommufd.uapi import iommufd as u
from iommufd.uapi.commands import BY_NAME

if TYPE_CHECKING:
    from iommufd.engine.context import Context
    from iommufd.engine.task import Task
    from iommufd.uapi.commands import Command


def change_process(call: Call) -> None:
    """IOMMU_IOAS_CHANGE_PROCESS."""
    cmd = call.cmd
    assert isinstance(cmd, u.iommu_ioas_change_process)
    if cmd.reserved:  # row 1
        raise KernelError(errno.EOPNOTSUPP, f"__reserved {cmd.reserved:#x} is not 0")
    with _all_ioases(call.context) as ioases:  # row 2
        pages = _file_pages(ioases)  # rows 3-4
        _move(call.task, pages)  # rows 5-6


@contextmanager
def _all_ioases(context: Context) -> Iterator[list[IOAS]]:
    """Every IOAS, by ID, none of which changes a mapping or goes away meanwhile; none is published either."""
    world = context.world
    with world.lock:
        while context.changing_process:
            world.wait()
        context.changing_process = True
        ioases = [o for o in context.objects.published_locked() if isinstance(o, IOAS)]
        for ioas in ioases:
            ioas.users += 1
        for ioas in ioases:
            ioas.io_pagetable.iova_sem.start_write(world)
    try:
        yield ioases
    finally:
        with world.lock:
            for ioas in reversed(ioases):
                ioas.io_pagetable.iova_sem.end_write(world)
                ioas.users -= 1
            context.changing_process = False
            world.wake()


def _file_pages(ioases: list[IOAS]) -> list[Pages]:
    """The pages objects of all areas, each once, in the order of their first area; all must be of files."""
    found: dict[int, Pages] = {}
    for ioas in ioases:
        for first, last, area in ioas.io_pagetable.areas:
            if area.pages is None:  # row 3
                raise KernelError(errno.EBUSY, f"[{first:#x}, {last:#x}] of IOAS {ioas.id} is being mapped or unmapped")
            if area.pages.source is None or not area.pages.source.is_file:  # row 4
                raise KernelError(errno.EINVAL, f"[{first:#x}, {last:#x}] of IOAS {ioas.id} does not map a file")
            found[id(area.pages)] = area.pages
    return list(found.values())


def _move(task: Task, found: list[Pages]) -> None:
    process, user, space = task.process, task.process.user, task.space
    moving = [p for p in found if must_move(p.owner.mode, p.owner.user, p.owner.space, user, space)]
    bill: Counter[Mode] = Counter()
    for pages in moving:
        bill[pages.owner.mode] += pages.charged
    paid: list[Mode] = []
    try:
        for mode, count in bill.items():  # row 5: before anything is given back, so both must fit for a moment
            charge(mode, process, user, space, count)
            paid.append(mode)
    except KernelError:
        for mode in paid:
            uncharge(mode, process, user, space, bill[mode])
        raise
    owners = {mode: Owner(process, user, space, mode) for mode in Mode}
    lost: set[int] = set()
    for pages in moving:  # row 6
        old = pages.owner
        if not uncharge(old.mode, old.process, old.user, old.space, pages.charged):
            lost.add(id(pages))
    for pages in found:
        owner, charged = owners[pages.owner.mode], 0 if id(pages) in lost else pages.charged
        pages.owner = owner if charged == pages.held() else Unsettled(owner, charged)
    if lost:  # the quirk of row 6
        raise KernelError(errno.EINVAL, "the process that paid until now is gone; its charge could not be taken back")


ROWS: list[tuple[Command, Handler, Respond]] = [(BY_NAME["IOMMU_IOAS_CHANGE_PROCESS"], change_process, Respond.NOTHING)]
