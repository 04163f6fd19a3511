"""Software MSI windows: doorbells of interrupt controllers behind an IOMMU (kernel: iommufd_sw_msi), devices.md 1.6.

On platforms that translate MSI writes, each doorbell page a device uses is mapped at an IOVA inside the device's
SW_MSI window. Invariants: the context's list of doorbell pages only grows; a page has the same IOVA in every page
table of one window; a page table, once it has a page, keeps it until it is freed.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from iommufd.engine.group import NO_SW_MSI, IGroup
from iommufd.errors import KernelError
from iommufd.iommu.domain import Prot
from iommufd.iommu.faults import RID
from iommufd.memory.frames import PAGE_SHIFT, PAGE_SIZE, Chunk, Extent

if TYPE_CHECKING:
    from iommufd.engine.context import Context
    from iommufd.engine.hwpt import HwptPaging
    from iommufd.iommu.device import Device as CoreDevice

MAX_MAPS = 64
_PROT = (Prot.READ | Prot.WRITE | Prot.MMIO).value


class MsiMap:
    """One doorbell page: ``pgoff`` pages into the window that begins at ``start``; ``id`` names it in the context."""

    __slots__ = ("id", "pgoff", "start", "target")

    def __init__(self, id: int, start: int, pgoff: int, target: int) -> None:
        self.id = id
        self.start = start
        self.pgoff = pgoff
        self.target = target  # physical address of the page

    @property
    def iova(self) -> int:
        return self.start + self.pgoff * PAGE_SIZE


def setup_msi(igroup: IGroup, paging: HwptPaging) -> None:
    """The doorbells the group's devices have used so far are in ``paging`` from now on; the map's errno."""
    if not igroup.required_sw_msi:
        return
    for page in igroup.context.sw_msi_maps:
        if page.start == igroup.sw_msi_start and page.id in igroup.required_sw_msi:
            _install(page, paging)


def sw_msi(context: Context, device: CoreDevice, address: int) -> int:
    """An MSI of ``device`` is set up to write to ``address``; the address the device must use instead.

    Called by whoever models the interrupt controller, when the group's domain is an iommufd one. EOVERFLOW after 64
    pages."""
    igroup = context.groups.get(id(device.group))
    if igroup is None:
        return address
    with igroup.lock:
        slot = igroup.attached.get(RID)
        if slot is None or igroup.sw_msi_start == NO_SW_MSI:  # steps 1, 2
            return address
        page = _find(context, igroup.sw_msi_start, address & -PAGE_SIZE)  # step 3
        _install(page, slot.hwpt.paging)  # step 4
        igroup.required_sw_msi.add(page.id)  # step 5
        return page.iova + (address & (PAGE_SIZE - 1))


def _find(context: Context, start: int, target: int) -> MsiMap:
    with context.world.lock:
        maps = context.sw_msi_maps
        highest = -1
        for page in maps:
            if page.start == start:
                if page.target == target:
                    return page
                highest = max(highest, page.pgoff)
        if len(maps) >= MAX_MAPS:
            raise KernelError(errno.EOVERFLOW, f"all {MAX_MAPS} doorbell pages of the context are in use")
        page = MsiMap(len(maps), start, highest + 1, target)
        maps.append(page)
        return page


def _install(page: MsiMap, paging: HwptPaging) -> None:
    if page.id in paging.msi_present:
        return
    frames = paging.context.world.physical.frames
    doorbell = Chunk("MSI doorbell", 0, 1, page.target >> PAGE_SHIFT, frames)  # a device's page, not one of ours
    paging.domain.map(page.iova, (Extent(doorbell, 0, 1),), 0, PAGE_SIZE, _PROT, False)
    paging.msi_present.add(page.id)
