"""IOMMU_IOAS_NOIOMMU_GET_PA: where memory is, for drivers of devices without an IOMMU (core 4.14, devices 9.3)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, cast

from iommufd.engine.area import gap_sentence
from iommufd.engine.dispatch import Call, Handler, Respond
from iommufd.engine.ioas import IOAS
from iommufd.engine.ranges import ULMAX
from iommufd.engine.task import CAP_SYS_RAWIO
from iommufd.errors import KernelError
from iommufd.memory.extents import runs
from iommufd.uapi import iommufd as u
from iommufd.uapi.commands import BY_NAME

if TYPE_CHECKING:
    from iommufd.engine.dmabuf import DmaBufSource
    from iommufd.engine.io_pagetable import IOPagetable
    from iommufd.uapi.commands import Command

NOIOMMU_DRIVER = "noiommu"


def noiommu_get_pa(call: Call) -> None:
    """The physical address of ``iova`` and how many of the ``length`` bytes asked for are contiguous there."""
    cmd = call.cmd
    assert isinstance(cmd, u.iommu_ioas_noiommu_get_pa)
    if not call.world.noiommu:
        raise KernelError(errno.EOPNOTSUPP, "this machine has no no-IOMMU support")
    if not call.task.capable(CAP_SYS_RAWIO):  # row 1
        raise KernelError(errno.EPERM, "physical addresses are for CAP_SYS_RAWIO")
    if cmd.flags or cmd.reserved:  # row 2
        raise KernelError(errno.EOPNOTSUPP, f"flags {cmd.flags:#x} are not known, or __reserved is not zero")
    if cmd.length == 0:  # row 3
        raise KernelError(errno.EINVAL, "the length is zero")
    if cmd.iova == ULMAX:  # row 4
        raise KernelError(errno.EOVERFLOW, f"iova {cmd.iova:#x} is the largest number")
    table = call.get(cmd.ioas_id, IOAS).io_pagetable  # row 5
    with table.reading():
        cmd.out_phys, cmd.length = _look(table, cmd.iova, cmd.length)  # rows 6-9


def _look(table: IOPagetable, iova: int, length: int) -> tuple[int, int]:
    world = table.world
    with world.lock:
        found = table.areas.find(iova)
        area = None if found is None else found[2]
        if area is None or area.pages is None:  # row 6
            raise KernelError(errno.ENOENT, gap_sentence(iova, iova, iova, area))
        pages = area.pages
        storage = table.domains[0] if table.domains else None
    pages.lock(world)
    try:
        buffer = cast("DmaBufSource", pages.source) if pages.source is not None and pages.source.is_dmabuf else None
        if buffer is not None and buffer.revoked:  # row 7
            raise KernelError(errno.EINVAL, f"the dma-buf behind {area!r} was revoked")
        if storage is None or storage.owner is None or storage.owner.name != NOIOMMU_DRIVER:  # row 8
            raise KernelError(errno.EOPNOTSUPP, f"{area!r} is not stored in the page table of a no-IOMMU device")
        extents = pages.frames(*area.span()) if buffer is None else buffer.extents(*area.span())
        offset = area.page_offset + iova - area.first
        run = next(runs(extents, offset, min(length, area.last - iova + 1)))
        return run.paddr, run.nbytes  # row 9
    finally:
        pages.unlock(world)


ROWS: list[tuple[Command, Handler, Respond]] = [
    (BY_NAME["IOMMU_IOAS_NOIOMMU_GET_PA"], noiommu_get_pa, Respond.ON_SUCCESS)
]
