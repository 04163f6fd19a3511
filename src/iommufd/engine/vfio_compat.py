"""The VFIO type 1 container ioctls on an iommufd descriptor (kernel: iommufd's vfio_compat).

vfio-compat.md sections 1-8. Invariants:

* These ioctls need no ``size`` field and no SET_IOMMU first; what they work on is the context's *compat IOAS*, an
  ordinary IOAS to which the context points without holding it. Nobody set one -> ENODEV.
* The choice between type 1 and type 1 v2 is not stored: type 1 means "large pages disabled" on the IOAS, and unmap cuts
  areas exactly when that is so.
* GET_INFO writes its capabilities piece by piece while it makes them, the fixed struct last; UNMAP_DMA writes
  ``size`` back whatever the range walk said. What goes where is decided in pure functions here.
* A context that a no-IOMMU group was added to is in no-IOMMU mode for good.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from iommufd.engine.ioas import IOAS
from iommufd.engine.object import PUBLISHED
from iommufd.engine.ranges import ULMAX
from iommufd.engine.task import CAP_SYS_RAWIO
from iommufd.engine.unmap import cut, unmap_range
from iommufd.errors import KernelError
from iommufd.memory.frames import PAGE_SIZE
from iommufd.uapi import vfio as v

if TYPE_CHECKING:
    from iommufd.engine.context import Context
    from iommufd.engine.file import Pending
    from iommufd.engine.io_pagetable import IOPagetable
    from iommufd.engine.task import Task

Write = tuple[int, bytes]
"""Bytes to put at an offset of the caller's buffer."""


# --- the compat IOAS (section 1.1) and what VFIO groups do to a context (section 9.1)


class _Held:
    """The compat IOAS held for one call; ENODEV when there is none or it is being destroyed."""

    __slots__ = ("_context", "ioas")

    def __init__(self, context: Context) -> None:
        self._context = context
        with context.world.lock:
            ioas = context.compat_ioas
            if ioas is None or ioas.state != PUBLISHED:
                raise KernelError(errno.ENODEV, "the context has no compatibility IOAS (IOMMU_VFIO_IOAS sets one)")
            ioas.users += 1
            ioas.wait += 1
        self.ioas: IOAS = ioas

    def __enter__(self) -> IOAS:
        return self.ioas

    def __exit__(self, *_: object) -> None:
        self._context.objects.put(self.ioas)


def compat_ioas_id(context: Context) -> int:
    """The id of the compat IOAS; ENODEV without one."""
    with _Held(context) as ioas:
        return ioas.id


def compat_ioas_create(context: Context) -> None:
    """A normal VFIO group was given this context as its container: it gets a compat IOAS if it has none (rows 8-10).

    EBUSY when ids are exhausted, EINVAL in no-IOMMU mode."""
    objects = context.objects
    made = objects.reserve(IOAS(context))  # before anything is checked: an id is needed even when it is given back
    made.io_pagetable.ioas_id = made.id
    with context.world.lock:
        unfit = context.no_iommu_mode
        existing = context.compat_ioas
        if not unfit and (existing is None or existing.state != PUBLISHED):
            context.compat_ioas = made
            objects.publish(made)
            return
    objects.abort(made)
    if unfit:
        raise KernelError(errno.EINVAL, "the context is in no-IOMMU mode and cannot hold a group with an IOMMU")


def compat_set_no_iommu(context: Context) -> None:
    """A no-IOMMU group was given this context: no-IOMMU mode from now on; EINVAL with a compat IOAS (rows 6, 7)."""
    with context.world.lock:
        if context.compat_ioas is not None:
            raise KernelError(errno.EINVAL, "the context has a compatibility IOAS and cannot enter no-IOMMU mode")
        context.no_iommu_mode = True


# --- dispatch (sections 1 and 2)


def compat_ioctl(context: Context, task: Task, cmd: int, arg: int) -> int | Pending:
    """``World.compat_ioctl``: matched on the whole command; ENOTTY leaves the argument alone."""
    found = _TABLE.get(cmd)
    if found is None:
        raise KernelError(errno.ENOTTY, f"an iommufd descriptor has no command {cmd:#x}")
    name, handler = found
    fail_call = context.world.fail_call
    if fail_call is not None:
        fail_call(name, task)
    return handler(context, task, arg)


def _get_api_version(context: Context, task: Task, arg: int) -> int:
    return v.VFIO_API_VERSION


def _check_extension(context: Context, task: Task, arg: int) -> int:
    """Section 4."""
    if arg in (v.VFIO_TYPE1_IOMMU, v.VFIO_TYPE1v2_IOMMU, v.VFIO_UNMAP_ALL):
        return 0 if context.no_iommu_mode else 1
    if arg == v.VFIO_NOIOMMU_IOMMU:
        return 1 if context.world.noiommu else 0
    if arg == v.VFIO_DMA_CC_IOMMU:
        with _Held(context) as ioas, ioas.mutex:
            return 1 if all(hwpt.enforce_cache_coherency for hwpt in ioas.hwpts) else 0
    return 0


def _set_iommu(context: Context, task: Task, arg: int) -> int:
    """Section 5."""
    if context.world.noiommu and arg == v.VFIO_NOIOMMU_IOMMU and context.no_iommu_mode:  # row 1
        if not task.capable(CAP_SYS_RAWIO):
            raise KernelError(errno.EPERM, "VFIO_NOIOMMU_IOMMU needs CAP_SYS_RAWIO")
        return 0
    if arg not in (v.VFIO_TYPE1_IOMMU, v.VFIO_TYPE1v2_IOMMU):  # row 2
        raise KernelError(errno.EINVAL, f"{arg:#x} is neither VFIO_TYPE1_IOMMU nor VFIO_TYPE1v2_IOMMU")
    if context.no_iommu_mode:
        raise KernelError(errno.EINVAL, "the context is in no-IOMMU mode; only VFIO_NOIOMMU_IOMMU can be set")
    with _Held(context) as ioas:  # row 3
        if arg == v.VFIO_TYPE1_IOMMU:  # rows 5-8; row 4: v2 changes nothing
            ioas.io_pagetable.disable_large_pages()
    return 0


# --- GET_INFO (section 6)

_HEAD = struct.Struct("<IIQII")
_DMA_AVAIL = struct.Struct("<HHII")
_IOVA_RANGE = struct.Struct("<HHIII")
_RANGE = struct.Struct("<QQ")
DMA_AVAIL_OFFSET = 24
IOVA_RANGE_OFFSET = 40


def iova_pgsizes(bitmaps: Iterable[int], alignment: int) -> int:
    """The ``iova_pgsizes`` of an IOAS: ``bitmaps`` are its domains' page sizes, ``alignment`` its IOVA alignment."""
    common = ULMAX
    for bitmap in bitmaps:
        common &= bitmap
    if common & (PAGE_SIZE - 1):  # smaller than the CPU's pages: 4096 stands for all of them
        common = common & ~(PAGE_SIZE - 1) | PAGE_SIZE
    return max(common, alignment)


def info_writes(argsz: int, pgsizes: int, ranges: Sequence[tuple[int, int]]) -> list[Write]:
    """Everything GET_INFO writes into a buffer of ``argsz`` (>= 16) bytes, in order; ``ranges`` inclusive, ascending.

    The capabilities come first, each item only if the buffer reaches its end; the head last."""
    writes: list[Write] = []
    total = IOVA_RANGE_OFFSET + _IOVA_RANGE.size + _RANGE.size * len(ranges)
    if argsz >= DMA_AVAIL_OFFSET + _DMA_AVAIL.size:
        avail = _DMA_AVAIL.pack(v.VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL, 1, 0, 0xFFFFFFFF)
        writes.append((DMA_AVAIL_OFFSET, avail))
    first = IOVA_RANGE_OFFSET + _IOVA_RANGE.size
    fit = min(len(ranges), max(0, argsz - first) // _RANGE.size)
    if fit:
        writes.append((first, b"".join(_RANGE.pack(*r) for r in ranges[:fit])))
    if argsz >= total:
        head = _IOVA_RANGE.pack(v.VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, 1, 0, len(ranges), 0)
        writes.append((IOVA_RANGE_OFFSET, head))
    if argsz >= IOVA_RANGE_OFFSET:  # whether or not what it points to is there
        writes.append((DMA_AVAIL_OFFSET + 4, IOVA_RANGE_OFFSET.to_bytes(4, "little")))
    flags = v.VFIO_IOMMU_INFO_PGSIZES | v.VFIO_IOMMU_INFO_CAPS
    info = _HEAD.pack(total & 0xFFFFFFFF, flags, pgsizes, DMA_AVAIL_OFFSET if argsz >= total else 0, 0)
    writes.append((0, info[: min(argsz, _HEAD.size)]))
    return writes


def _iommu_get_info(context: Context, task: Task, arg: int) -> int:
    argsz = int.from_bytes(task.read(arg, 16)[:4], "little")  # row 1
    if argsz < 16:  # row 2
        raise KernelError(errno.EINVAL, f"argsz {argsz} is less than 16")
    with _Held(context) as ioas:  # row 3
        table = ioas.io_pagetable
        with context.world.lock:
            bitmaps = [domain.pgsize_bitmap for domain in table.domains]
        ranges, alignment = table.usable()
        for offset, data in info_writes(argsz, iova_pgsizes(bitmaps, alignment), ranges):  # rows 4, 5
            task.write(arg + offset, data)
    return 0


# --- MAP_DMA, UNMAP_DMA (sections 7 and 8)

_MAP = struct.Struct("<IIQQQ")
_UNMAP = struct.Struct("<IIQQ")


def _map_dma(context: Context, task: Task, arg: int) -> int:
    argsz, flags, vaddr, iova, size = _MAP.unpack(task.read(arg, _MAP.size))  # row 1
    if argsz < _MAP.size:  # row 2
        raise KernelError(errno.EINVAL, f"argsz {argsz} is less than {_MAP.size}")
    if flags & ~(v.VFIO_DMA_MAP_FLAG_READ | v.VFIO_DMA_MAP_FLAG_WRITE):
        raise KernelError(errno.EINVAL, f"flags {flags:#x} are more than READ and WRITE")
    with _Held(context) as ioas:  # row 3
        ioas.map_user(task, vaddr, size, iova, flags)  # rows 4-12; READ 1 and WRITE 2 are the IOMMU's own bits
    return 0


def _unmap_dma(context: Context, task: Task, arg: int) -> int:
    argsz, flags, iova, size = _UNMAP.unpack(task.read(arg, _UNMAP.size))  # row 1
    if argsz < _UNMAP.size:  # row 2
        raise KernelError(errno.EINVAL, f"argsz {argsz} is less than {_UNMAP.size}")
    if flags & ~v.VFIO_DMA_UNMAP_FLAG_ALL:
        raise KernelError(errno.EINVAL, f"flags {flags:#x} are more than ALL")
    with _Held(context) as ioas:  # row 3
        table = ioas.io_pagetable
        removed, failure = 0, None
        if flags & v.VFIO_DMA_UNMAP_FLAG_ALL:
            if iova or size:  # row 4
                raise KernelError(errno.EINVAL, f"ALL with iova {iova:#x} and size {size:#x}; both must be 0")
            removed, failure = unmap_range(table, 0, ULMAX)  # row 5
        else:
            if table.large_pages_disabled:  # row 6: type 1
                _cut(table, iova, size)
            failure = _range_error(iova, size)  # row 7
            if failure is None:
                removed, failure = unmap_range(table, iova, iova + size - 1)  # row 8
        if removed and context.world.instruments:
            context.world.event("unmap", ioas=ioas.id, iova=iova, length=removed)
        task.write(arg, _UNMAP.pack(argsz, flags, iova, removed))  # row 9: EFAULT beats what the walk said
        if failure is not None:
            raise KernelError(failure.errno, failure.why)  # a local that is raised would hold its own traceback
    return 0


def _range_error(iova: int, size: int) -> KernelError | None:
    if size == 0:
        return KernelError(errno.EINVAL, "size is 0")
    if iova + size - 1 > ULMAX:
        return KernelError(errno.EOVERFLOW, f"iova {iova:#x} + size {size:#x} - 1 is more than 2**64-1")
    return None


def _cut(table: IOPagetable, iova: int, size: int) -> None:
    """Row 6: makes the range's two ends area boundaries; a failure leaves the first cut and removes nothing."""
    cut(table, iova + size - 1 & ULMAX)
    if iova:
        cut(table, iova - 1)


Handler = Callable[["Context", "Task", int], "int | Pending"]

_TABLE: dict[int, tuple[str, Handler]] = {
    v.VFIO_GET_API_VERSION: ("VFIO_GET_API_VERSION", _get_api_version),
    v.VFIO_CHECK_EXTENSION: ("VFIO_CHECK_EXTENSION", _check_extension),
    v.VFIO_SET_IOMMU: ("VFIO_SET_IOMMU", _set_iommu),
    v.VFIO_IOMMU_GET_INFO: ("VFIO_IOMMU_GET_INFO", _iommu_get_info),
    v.VFIO_IOMMU_MAP_DMA: ("VFIO_IOMMU_MAP_DMA", _map_dma),
    v.VFIO_IOMMU_UNMAP_DMA: ("VFIO_IOMMU_UNMAP_DMA", _unmap_dma),
}
