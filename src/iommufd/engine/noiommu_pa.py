"""IOMMU_IOAS_NOIOMMU_GET_PA: where the memory of a device without an IOMMU is (core 4.14, devices.md 9.3)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from iommufd.engine.area import gap_sentence
from iommufd.engine.dispatch import Call, Handler, Respond, unsupported
from iommufd.engine.ioas import IOAS
from iommufd.engine.ranges import ULMAX
from iommufd.engine.task import CAP_SYS_RAWIO
from iommufd.errors import KernelError
from iommufd.memory.extents import runs
from iommufd.uapi import iommufd as u
from iommufd.uapi.commands import BY_NAME, Command

if TYPE_CHECKING:
    from iommufd.engine.io_pagetable import IOPagetable
    from iommufd.iommu.driver import Driver


def ioas_noiommu_get_pa(call: Call) -> None:
    """The physical address of one IOVA, and how many bytes from there on are consecutive in both."""
    cmd = call.cmd
    assert isinstance(cmd, u.iommu_ioas_noiommu_get_pa)
    driver = call.world.noiommu_driver
    if driver is None:
        raise KernelError(errno.EOPNOTSUPP, "this machine has no support for devices without an IOMMU")
    if not call.task.capable(CAP_SYS_RAWIO):  # row 1
        raise KernelError(errno.EPERM, "physical addresses are for those with CAP_SYS_RAWIO")
    if cmd.flags or cmd.reserved:  # row 2
        raise unsupported(cmd.flags, cmd.reserved)
    if cmd.length == 0:  # row 3
        raise KernelError(errno.EINVAL, "the length is 0")
    if cmd.iova == ULMAX:  # row 4
        raise KernelError(errno.EOVERFLOW, f"iova {cmd.iova:#x} is the largest number")
    table = call.get(cmd.ioas_id, IOAS).io_pagetable  # row 5
    with table.reading():
        cmd.out_phys, cmd.length = _look(table, driver, cmd.iova, cmd.length)  # rows 6-9


def _look(table: IOPagetable, driver: Driver, iova: int, length: int) -> tuple[int, int]:
    """(physical address, contiguous bytes, at most ``length`` and to the end of the area)."""
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
        buffer = pages.source.dmabuf if pages.source is not None else None
        if buffer is not None and buffer.revoked:  # row 7
            raise KernelError(errno.EINVAL, f"the dma-buf behind {area!r} was revoked")
        if storage is None or storage.owner is not driver:  # row 8
            raise KernelError(
                errno.EOPNOTSUPP, f"{area!r} is not stored in the page table of a device without an IOMMU"
            )
        extents = pages.frames(*area.span()) if buffer is None else buffer.extents(*area.span())
        run = next(runs(extents, area.page_offset + iova - area.first, min(length, area.last - iova + 1)))
        return run.paddr, run.nbytes  # row 9
    finally:
        pages.unlock(world)


ROWS: list[tuple[Command, Handler, Respond]] = [
    (BY_NAME["IOMMU_IOAS_NOIOMMU_GET_PA"], ioas_noiommu_get_pa, Respond.ON_SUCCESS),
]
