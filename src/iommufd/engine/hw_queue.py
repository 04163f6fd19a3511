"""HW_QUEUE: a queue in guest memory that the physical IOMMU serves itself (kernel: struct iommufd_hw_queue).

Invariants (events-viommu 9):

* From creation to destruction the guest pages are pinned through an internal access to the nesting parent's IOAS. That
  access locks every area it touches (IOAS_UNMAP is EBUSY) and never receives unmap callbacks; it has an object number
  of its own, which nobody can destroy.
* The pages are physically consecutive, because the hardware gets one physical address.
* A driver may make one queue depend on another of the same vIOMMU; the one depended on cannot be destroyed before.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from iommufd.engine.access import Access
from iommufd.engine.dispatch import Call, Handler, Respond
from iommufd.engine.object import Object
from iommufd.engine.viommu import Viommu
from iommufd.errors import KernelError
from iommufd.iommu.viommu import HasHwQueues
from iommufd.memory.extents import runs
from iommufd.memory.frames import PAGE_SHIFT, PAGE_SIZE
from iommufd.uapi.commands import BY_NAME, Command
from iommufd.uapi.iommufd import IOMMU_HW_QUEUE_TYPE_DEFAULT, iommu_hw_queue_alloc

if TYPE_CHECKING:
    from iommufd.engine.context import Context
    from iommufd.engine.task import Task
    from iommufd.iommu.viommu import DriverHwQueue
    from iommufd.memory.frames import Extents

U64_MAX = 2**64 - 1
SIZE_MAX = 2**64 - 1
PAGE_ARRAY_LIMIT = 2**31 - 1  # bytes the kernel allocates in one piece; a page costs it one pointer
POINTER = 8


class HwQueue(Object):
    """The object. ``base_iova`` and ``length`` in bytes; ``private`` is the driver's."""

    __slots__ = ("access", "base_iova", "inited", "length", "private", "type", "viommu")
    kind = "HW_QUEUE"

    def __init__(self, context: Context, viommu: Viommu, type: int, base_iova: int, length: int) -> None:
        super().__init__(context)
        self.viommu = viommu
        self.type = type
        self.base_iova = base_iova
        self.length = length
        self.private: object = None
        self.access: Access | None = None
        self.inited = False
        with context.world.lock:
            viommu.users += 1

    def destroy(self) -> None:
        """Driver hook, unpin, the access goes, then the vIOMMU is let go (events-viommu 9, destroy order)."""
        ops = self.viommu.ops
        if self.inited and isinstance(ops, HasHwQueues):
            ops.hw_queue_destroy(self.viommu, self)
        if self.access is not None:
            close_access(self.access, *page_span(self.base_iova, self.length))
        with self.context.world.lock:
            self.viommu.users -= 1

    def depend(self, on: DriverHwQueue) -> None:
        """This queue keeps ``on`` alive; EINVAL for itself, for something else, or for another vIOMMU's."""
        if on is self or not isinstance(on, HwQueue) or on.viommu is not self.viommu:
            raise KernelError(errno.EINVAL, f"HW queue {self.id} cannot depend on {on!r}")
        with self.context.world.lock:
            on.users += 1

    def undepend(self, on: DriverHwQueue) -> None:
        """Reverses :meth:`depend`."""
        assert isinstance(on, HwQueue)
        assert on.viommu is self.viommu
        with self.context.world.lock:
            on.users -= 1


def page_span(iova: int, length: int) -> tuple[int, int]:
    """The whole pages of IOVA that ``[iova, iova + length)`` touches, as (start, length) in bytes.

    ERANGE when they cannot be counted in a size_t (events-viommu 9 row 7)."""
    offset = iova % PAGE_SIZE
    if offset + length > SIZE_MAX or offset + length + PAGE_SIZE - 1 > SIZE_MAX:
        raise KernelError(errno.ERANGE, f"{length:#x} bytes at {iova:#x} are more pages than can be counted")
    return iova - offset, -(-(offset + length) >> PAGE_SHIFT) << PAGE_SHIFT


def check_contiguous(extents: Extents, length: int) -> int:
    """The physical address of ``length`` bytes of whole pages; EFAULT unless they are consecutive (row 16)."""
    run = next(runs(extents, 0, length))
    if run.nbytes != length:
        raise KernelError(
            errno.EFAULT,
            f"the {length >> PAGE_SHIFT} pages are not physically consecutive, only {run.nbytes} bytes are",
        )
    return run.paddr


def open_access(queue: HwQueue, task: Task) -> Extents:
    """The queue's access: attached to the parent's IOAS (rows 9, 10) and its pages pinned (rows 11-15)."""
    start, length = page_span(queue.base_iova, queue.length)  # row 7
    pages = length >> PAGE_SHIFT
    if pages * POINTER > PAGE_ARRAY_LIMIT:  # row 8
        raise KernelError(errno.ENOMEM, f"no memory for a list of {pages} pages")
    access = Access.create_internal(queue.context)
    try:
        access.attach(queue.viommu.hwpt.ioas.id)
        extents = access.pin_pages(start, length, False, task)
    except BaseException:
        access.destroy_access()
        raise
    queue.access = access
    return extents


def close_access(access: Access, start: int, length: int) -> None:
    access.unpin_pages(start, length)
    access.destroy_access()


def hw_queue_alloc(call: Call) -> None:
    """IOMMU_HW_QUEUE_ALLOC (events-viommu 9)."""
    cmd = call.cmd
    assert isinstance(cmd, iommu_hw_queue_alloc)
    iova, length = cmd.nesting_parent_iova, cmd.length
    if cmd.flags or cmd.type == IOMMU_HW_QUEUE_TYPE_DEFAULT:  # row 1
        raise KernelError(errno.EOPNOTSUPP, f"flags {cmd.flags:#x} must be 0 and type {cmd.type:#x} must not")
    if not length:  # row 2
        raise KernelError(errno.EINVAL, "a queue of 0 bytes")
    if iova + length - 1 > U64_MAX:  # row 3
        raise KernelError(errno.EOVERFLOW, f"[{iova:#x}, +{length:#x}) ends beyond 64 bits")
    viommu = call.get(cmd.viommu_id, Viommu)  # row 4
    ops = viommu.ops
    if not isinstance(ops, HasHwQueues) or not ops.hw_queue_supported(viommu, cmd.type):  # row 5
        raise KernelError(errno.EOPNOTSUPP, f"vIOMMU {viommu.id} has no HW queues of type {cmd.type:#x}")
    queue = call.reserve(HwQueue(call.context, viommu, cmd.type, iova, length))  # row 6
    extents = open_access(queue, call.task)
    base = check_contiguous(extents, page_span(iova, length)[1]) + iova % PAGE_SIZE  # row 16
    ops.hw_queue_init_phys(viommu, queue, cmd.index, base)  # row 17
    queue.inited = True
    cmd.out_hw_queue_id = queue.id


ROWS: list[tuple[Command, Handler, Respond]] = [
    (BY_NAME["IOMMU_HW_QUEUE_ALLOC"], hw_queue_alloc, Respond.ON_SUCCESS),
]
