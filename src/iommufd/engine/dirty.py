"""IOMMU_HWPT_SET_DIRTY_TRACKING and IOMMU_HWPT_GET_DIRTY_BITMAP (devices.md 6, core 8)."""

from __future__ import annotations

import errno

from iommufd.engine.dispatch import Call, Handler, Respond, unsupported
from iommufd.engine.hwpt import HwptPaging
from iommufd.engine.iova_bitmap import IovaBitmap
from iommufd.engine.ranges import ULMAX
from iommufd.errors import KernelError
from iommufd.uapi import iommufd as u
from iommufd.uapi.commands import BY_NAME, Command


def hwpt_set_dirty_tracking(call: Call) -> None:
    """IOMMU_HWPT_SET_DIRTY_TRACKING (devices.md 6.1); every enable starts clean, also of what is enabled already."""
    cmd = call.cmd
    assert isinstance(cmd, u.iommu_hwpt_set_dirty_tracking)
    if cmd.flags & ~u.IOMMU_HWPT_DIRTY_TRACKING_ENABLE:  # step 1
        raise KernelError(errno.EOPNOTSUPP, f"unknown flags {cmd.flags:#x}")
    hwpt = call.get(cmd.hwpt_id, HwptPaging)  # step 2
    ops = hwpt.domain.dirty_ops
    if ops is None:  # step 3
        raise KernelError(errno.EOPNOTSUPP, f"HWPT {hwpt.id} was made without dirty tracking")
    enable = bool(cmd.flags & u.IOMMU_HWPT_DIRTY_TRACKING_ENABLE)
    table = hwpt.ioas.io_pagetable
    with table.reading():
        if enable:  # step 4
            with call.world.lock:
                live = [(first, last) for first, last, area in table.areas if area.pages is not None]
            for first, last in live:
                ops.read_and_clear_dirty(first, last - first + 1, clear=True, sink=None)
        ops.set_dirty_tracking(enable)  # step 5


def hwpt_get_dirty_bitmap(call: Call) -> None:
    """IOMMU_HWPT_GET_DIRTY_BITMAP (devices.md 6.2); after the checks always a success."""
    cmd = call.cmd
    assert isinstance(cmd, u.iommu_hwpt_get_dirty_bitmap)
    if cmd.flags & ~u.IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR or cmd.reserved:  # step 1
        raise unsupported(cmd.flags & ~u.IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR, cmd.reserved)
    hwpt = call.get(cmd.hwpt_id, HwptPaging)  # step 2
    table = hwpt.ioas.io_pagetable
    iova, length, page_size = cmd.iova, cmd.length, cmd.page_size
    last = check_range(iova, length, page_size, table.iova_alignment)  # steps 3-7
    ops = hwpt.domain.dirty_ops
    if ops is None:  # step 8
        raise KernelError(errno.EOPNOTSUPP, f"HWPT {hwpt.id} was made without dirty tracking")
    clear = not cmd.flags & u.IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR
    bitmap = IovaBitmap(call.task, cmd.data, iova, length, page_size)  # step 9
    with table.reading():
        for first, end in table.dirty_slices(iova, last):  # step 10
            try:
                ops.read_and_clear_dirty(first, end - first + 1, clear=clear, sink=bitmap)
            except KernelError:
                break
    bitmap.flush()


def check_range(iova: int, length: int, page_size: int, alignment: int) -> int:
    """devices.md 6.2 steps 3-7; the last IOVA."""
    if length == 0:
        raise KernelError(errno.EINVAL, "the length is 0")
    last = iova + length - 1
    if last > ULMAX:
        raise KernelError(errno.EOVERFLOW, f"{length:#x} bytes at IOVA {iova:#x} end beyond the last address")
    end = (last + 1) & ULMAX
    if iova % alignment or end % alignment:
        raise KernelError(errno.EINVAL, f"[{iova:#x}, {last:#x}] is not aligned to the IOVA alignment {alignment:#x}")
    if page_size == 0:
        raise KernelError(errno.EINVAL, "the page size is 0")
    if (iova | end) & (page_size - 1):
        raise KernelError(errno.EINVAL, f"[{iova:#x}, {last:#x}] is not aligned to the page size {page_size:#x}")
    return last


ROWS: list[tuple[Command, Handler, Respond]] = [
    (BY_NAME["IOMMU_HWPT_SET_DIRTY_TRACKING"], hwpt_set_dirty_tracking, Respond.NOTHING),
    (BY_NAME["IOMMU_HWPT_GET_DIRTY_BITMAP"], hwpt_get_dirty_bitmap, Respond.NOTHING),
]
