"""Every command of the native table, gathered from the modules of the engine that implement them."""

from __future__ import annotations

from iommufd.engine import (
    change_process,
    dirty,
    fault,
    hw_info,
    hw_queue,
    hwpt_alloc,
    invalidate,
    ioas,
    noiommu_pa,
    options,
    vdevice,
    veventq,
    viommu,
)
from iommufd.engine.dispatch import Handler, Respond
from iommufd.uapi.commands import Command

RowOf = tuple[Command, Handler, Respond]

ENGINE_ROWS: list[RowOf] = [
    *ioas.ROWS,
    *options.ROWS,
    *change_process.ROWS,
    *hwpt_alloc.ROWS,
    *hw_info.ROWS,
    *dirty.ROWS,
    *invalidate.ROWS,
    *fault.ROWS,
    *viommu.ROWS,
    *vdevice.ROWS,
    *veventq.ROWS,
    *hw_queue.ROWS,
    *noiommu_pa.ROWS,
]
