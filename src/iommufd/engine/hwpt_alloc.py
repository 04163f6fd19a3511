"""IOMMU_HWPT_ALLOC: a hardware page table on an IOAS, on a nesting parent, or on a vIOMMU (devices.md 4).

The shell: what is created lives in :mod:`iommufd.engine.hwpt`. Unknown flags are looked at after both lookups, and the
fault queue last of all, when the page table exists and is filled.
"""

from __future__ import annotations

import errno

from iommufd.engine.device import Device
from iommufd.engine.dispatch import Call, Handler, Respond
from iommufd.engine.fault import FaultQueue
from iommufd.engine.hwpt import (
    FAULT_ID_VALID,
    NESTED_FLAGS,
    PASID,
    Hwpt,
    HwptNested,
    HwptPaging,
    alloc_nested,
    alloc_paging,
)
from iommufd.engine.ioas import IOAS
from iommufd.engine.object import Object
from iommufd.engine.viommu import Viommu
from iommufd.errors import KernelError
from iommufd.iommu.user_data import UserData
from iommufd.iommu.viommu import AllocatesNestedOnViommu
from iommufd.uapi import iommufd as u
from iommufd.uapi import releases
from iommufd.uapi.commands import BY_NAME, Command

FLAG_NAMES = (
    "IOMMU_HWPT_ALLOC_NEST_PARENT",
    "IOMMU_HWPT_ALLOC_DIRTY_TRACKING",
    "IOMMU_HWPT_FAULT_ID_VALID",
    "IOMMU_HWPT_ALLOC_PASID",
)


def hwpt_alloc(call: Call) -> None:
    """IOMMU_HWPT_ALLOC (devices.md 4.2)."""
    cmd = call.cmd
    assert isinstance(cmd, u.iommu_hwpt_alloc)
    if cmd.reserved:  # step 1
        raise KernelError(errno.EOPNOTSUPP, f"__reserved {cmd.reserved:#x} is not 0")
    if (cmd.data_type == u.IOMMU_HWPT_DATA_NONE) != (cmd.data_len == 0):  # step 2
        raise KernelError(errno.EINVAL, f"driver data of type {cmd.data_type:#x} with {cmd.data_len} bytes")
    idev = call.get(cmd.dev_id, Device)  # step 3
    try:
        pt = call.get(cmd.pt_id, Object)  # step 4
    except KernelError as error:
        raise KernelError(errno.EINVAL, error.why) from None
    for name in releases.later(FLAG_NAMES, call.world.kernel):
        if cmd.flags & getattr(u, name):
            raise KernelError(errno.EOPNOTSUPP, releases.why_not_there(name, call.world.kernel))
    data = UserData(call.task, cmd.data_type, cmd.data_uptr, cmd.data_len) if cmd.data_len else None
    hwpt: Hwpt
    if isinstance(pt, IOAS):  # step 5
        with pt.mutex:
            paging = alloc_paging(call.task, pt, idev, cmd.flags, data, reserve=call.reserve)
            paging.list_locked()
        hwpt = paging
    elif isinstance(pt, HwptPaging):
        hwpt = alloc_nested(pt, idev, cmd.flags, data, reserve=call.reserve)
    elif isinstance(pt, Viommu):
        hwpt = alloc_nested_on_viommu(call, pt, idev, cmd.flags, data)
    else:
        raise KernelError(errno.EINVAL, f"id {pt.id} is of type {pt.kind}, not an IOAS, an HWPT or a vIOMMU")
    if cmd.flags & FAULT_ID_VALID:
        hwpt.link_fault(call.get(cmd.fault_id, FaultQueue))  # steps 6, 7
    cmd.out_hwpt_id = hwpt.id  # steps 8 and 9 are dispatch's


def alloc_nested_on_viommu(call: Call, viommu: Viommu, idev: Device, flags: int, data: UserData | None) -> HwptNested:
    """A HWPT_NESTED of a vIOMMU (devices.md 4.5)."""
    iommu = idev.device.iommu
    if iommu is None or iommu is not viommu.iommu:  # step 1
        raise KernelError(errno.EINVAL, f"{idev.device.name} is not behind the IOMMU of vIOMMU {viommu.id}")
    if flags & ~NESTED_FLAGS:  # step 2
        raise KernelError(errno.EOPNOTSUPP, f"flags {flags & ~NESTED_FLAGS:#x} do not go with a nested page table")
    if data is None:  # step 3
        raise KernelError(errno.EOPNOTSUPP, "a nested page table needs driver data")
    ops = viommu.ops
    if not isinstance(ops, AllocatesNestedOnViommu):  # step 4
        raise KernelError(errno.EOPNOTSUPP, f"vIOMMU {viommu.id} makes no nested page tables")
    hwpt = call.reserve(HwptNested(call.context, viommu.hwpt, viommu, pasid_compat=bool(flags & PASID)))  # step 5
    domain = ops.alloc_domain_nested(viommu, flags & ~FAULT_ID_VALID, data)  # step 6
    driver = idev.driver
    assert driver is not None
    hwpt.adopt(domain, driver)  # step 7
    return hwpt


ROWS: list[tuple[Command, Handler, Respond]] = [
    (BY_NAME["IOMMU_HWPT_ALLOC"], hwpt_alloc, Respond.ON_SUCCESS),
]
