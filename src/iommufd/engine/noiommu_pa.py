"""IOMMU_IOAS_NOIOMMU_GET_PA: where the memory of a device without an IOMMU is (core 4.14, devices.md 9.3)."""

from __future__ import annotations

import errno

from iommufd.engine.dispatch import Call, Handler, Respond
from iommufd.engine.ioas import IOAS
from iommufd.engine.ranges import ULMAX
from iommufd.engine.task import CAP_SYS_RAWIO
from iommufd.errors import KernelError
from iommufd.memory.frames import PAGE_SIZE
from iommufd.uapi import iommufd as u
from iommufd.uapi.commands import BY_NAME, Command


def ioas_noiommu_get_pa(call: Call) -> None:
    """The physical address of one IOVA, and how many bytes from there on are consecutive in both."""
    cmd = call.cmd
    assert isinstance(cmd, u.iommu_ioas_noiommu_get_pa)
    driver = call.world.noiommu_driver
    if driver is None:  # step 0
        raise KernelError(errno.EOPNOTSUPP, "this machine has no support for devices without an IOMMU")
    if not call.task.capable(CAP_SYS_RAWIO):  # step 1
        raise KernelError(errno.EPERM, "physical addresses are for those with CAP_SYS_RAWIO")
    if cmd.flags or cmd.reserved:  # step 2
        raise KernelError(errno.EOPNOTSUPP, f"unknown flags {cmd.flags:#x}, or __reserved is not zero")
    if cmd.length == 0:  # step 3
        raise KernelError(errno.EINVAL, "the length is 0")
    if cmd.iova == ULMAX:  # step 4
        raise KernelError(errno.EOVERFLOW, f"iova {cmd.iova:#x} is the largest number")
    table = call.get(cmd.ioas_id, IOAS).io_pagetable  # step 5
    with table.reading():
        with call.world.lock:
            found = table.areas.find(cmd.iova)
            area = None if found is None else found[2]
            source = None if area is None or area.pages is None else area.pages.source
            if area is None or area.pages is None:  # step 6
                raise KernelError(errno.ENOENT, f"nothing is mapped at IOVA {cmd.iova:#x}")
            domain = table.domains[0] if table.domains else None
        if source is not None and source.is_dmabuf and source.revoked:  # type: ignore[attr-defined]  # step 7
            raise KernelError(errno.EINVAL, f"the dma-buf at IOVA {cmd.iova:#x} was revoked")
        if domain is None or domain.owner is not driver:  # step 8
            raise KernelError(errno.EOPNOTSUPP, "the IOAS's first page table is not that of a device without an IOMMU")
        address = cmd.out_phys = domain.iova_to_phys(cmd.iova)  # step 9
        iova = cmd.iova
        length = min(PAGE_SIZE - iova % PAGE_SIZE, area.last - iova + 1)
        while length < cmd.length and iova + length <= area.last:
            if domain.iova_to_phys(iova + length) != address + length:
                break
            length += min(PAGE_SIZE, area.last - iova - length + 1)
    cmd.length = min(length, cmd.length)


ROWS: list[tuple[Command, Handler, Respond]] = [
    (BY_NAME["IOMMU_IOAS_NOIOMMU_GET_PA"], ioas_noiommu_get_pa, Respond.ON_SUCCESS),
]
