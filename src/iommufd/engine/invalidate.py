"""IOMMU_HWPT_INVALIDATE: a guest's cache invalidations, on a nested page table or on a vIOMMU (devices.md 7).

Invariant: the struct goes back to the caller whatever happened, with ``entry_num`` saying how many entries took full
effect; if that cannot be written, EFAULT is the answer whatever the error was. Entries before a failing one stay done.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial

from iommufd.engine.dispatch import Call, Handler, Respond
from iommufd.engine.hwpt import HwptNested
from iommufd.engine.object import Object
from iommufd.engine.viommu import Viommu
from iommufd.errors import KernelError
from iommufd.iommu.domain import InvalidatesCaches
from iommufd.iommu.user_data import UserArray
from iommufd.iommu.viommu import InvalidatesViommuCaches
from iommufd.memory.frames import PAGE_SIZE
from iommufd.uapi.commands import BY_NAME, Command
from iommufd.uapi.iommufd import iommu_hwpt_invalidate

MAX_ENTRIES = 1 << 19


def operation(obj: Object) -> Callable[[UserArray], None]:
    """What invalidates on ``obj``: EOPNOTSUPP when its driver cannot, EINVAL when nothing of its kind can."""
    if isinstance(obj, HwptNested):
        if not isinstance(obj.domain, InvalidatesCaches):  # row 4
            raise KernelError(errno.EOPNOTSUPP, f"nested HWPT {obj.id} has no caches to invalidate")
        return obj.domain.cache_invalidate_user  # row 5
    if isinstance(obj, Viommu):
        ops = obj.ops
        if not isinstance(ops, InvalidatesViommuCaches):  # row 6
            raise KernelError(errno.EOPNOTSUPP, f"vIOMMU {obj.id} has no caches to invalidate")
        return partial(ops.cache_invalidate, obj)  # row 7
    raise KernelError(errno.EINVAL, f"id {obj.id} is of type {obj.kind}, neither a nested HWPT nor a vIOMMU")  # row 8


def hwpt_invalidate(call: Call) -> None:
    """IOMMU_HWPT_INVALIDATE (devices.md 7, events-viommu 11)."""
    cmd = call.cmd
    assert isinstance(cmd, iommu_hwpt_invalidate)
    array = UserArray(call.task, cmd.data_type, cmd.data_uptr, cmd.entry_len, cmd.entry_num)
    handled = 0
    try:
        if cmd.reserved:  # row 1
            raise KernelError(errno.EOPNOTSUPP, f"__reserved is {cmd.reserved:#x}")
        if cmd.entry_num and (
            not cmd.data_uptr or not 0 < cmd.entry_len <= PAGE_SIZE or cmd.entry_num > MAX_ENTRIES
        ):  # row 2
            raise KernelError(
                errno.EINVAL,
                f"{cmd.entry_num} entries of {cmd.entry_len} bytes at {cmd.data_uptr:#x}; "
                f"possible are {MAX_ENTRIES} of up to {PAGE_SIZE}, not at 0",
            )
        invalidate = operation(call.get_any(cmd.hwpt_id))  # rows 3, 4, 6, 8
        try:
            invalidate(array)  # rows 5, 7
        finally:
            handled = array.entry_num
    finally:
        cmd.entry_num = handled
        call.respond()  # row 9


ROWS: list[tuple[Command, Handler, Respond]] = [
    (BY_NAME["IOMMU_HWPT_INVALIDATE"], hwpt_invalidate, Respond.HANDLER),
]
