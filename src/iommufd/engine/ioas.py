"""IOAS: one I/O address space, and the commands that act on it (kernel: struct iommufd_ioas, core 4).

The shells: each handler makes the checks of its table in core 4 in order, the work is the I/O page table's.

* An IOAS is destroyed when no HWPT and no access holds it; areas alone do not keep it, they are unmapped.
* ``hwpts`` lists the HWPT_PAGING made on it in creation order, guarded by ``mutex`` (kernel: ioas->mutex), which is
  held over the search for an automatic HWPT.
"""

from __future__ import annotations

import errno
import os
import threading
from typing import TYPE_CHECKING

from iommufd.engine.area import READ, WRITE, forget_pieces
from iommufd.engine.dispatch import Call, Handler, Respond, unsupported
from iommufd.engine.dmabuf import DmaBufFile, dmabuf_pages
from iommufd.engine.failpoints import SLAB
from iommufd.engine.file import File
from iommufd.engine.io_pagetable import IOPagetable
from iommufd.engine.map import map_one, map_pages
from iommufd.engine.object import PUBLISHED, Object
from iommufd.engine.pages import Pages
from iommufd.engine.ranges import ULMAX, Ranges
from iommufd.engine.source import FileSource
from iommufd.engine.unmap import unmap_range
from iommufd.errors import KernelError
from iommufd.memory.frames import PAGE_SHIFT, PAGE_SIZE
from iommufd.memory.intervals import IntervalIndex
from iommufd.uapi import iommufd as u
from iommufd.uapi.commands import BY_NAME, Command

if TYPE_CHECKING:
    from iommufd.engine.area import Piece
    from iommufd.engine.context import Context
    from iommufd.engine.hwpt import HwptPaging
    from iommufd.engine.task import Task
    from iommufd.engine.world import World
    from iommufd.memory.hostfile import HostFile

FIXED, WRITEABLE, READABLE = u.IOMMU_IOAS_MAP_FIXED_IOVA, u.IOMMU_IOAS_MAP_WRITEABLE, u.IOMMU_IOAS_MAP_READABLE
MAP_FLAGS = FIXED | WRITEABLE | READABLE
PROT = tuple((flags & WRITEABLE and WRITE) | (flags & READABLE and READ) for flags in range(MAP_FLAGS + 1))
SYZ_FLAG = 1 << 16  # TEST builds: src_iova is "n-th area and offset" (mock-device 7)
ENTRY = 16  # bytes of struct iommu_iova_range
ENTRIES_AT_ONCE = 4096


class IOAS(Object):
    """An I/O address space."""

    __slots__ = ("hwpts", "io_pagetable", "mutex")
    kind = "IOAS"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.io_pagetable = IOPagetable(context.world)
        self.hwpts: list[HwptPaging] = []
        self.mutex = threading.Lock()

    def destroy(self) -> None:
        """core 2.5: unmap everything; the compat pointer no longer names it."""
        with self.context.world.lock:
            if self.context.compat_ioas is self:
                self.context.compat_ioas = None
        unmap_range(self.io_pagetable, 0, ULMAX)

    def map_user(self, task: Task, va: int, length: int, iova: int | None, prot: int) -> int:
        """core 4.9 rows 5-8, shared with the VFIO command: maps the task's memory and returns the IOVA."""
        if va + length > ULMAX:  # row 5
            raise KernelError(errno.EOVERFLOW, f"{length:#x} bytes at {va:#x} end beyond the last address")
        if length == 0 or length > ULMAX - PAGE_SIZE:  # row 6
            raise KernelError(errno.EINVAL, f"the length {length:#x} is zero or too large")
        context = self.context
        world = context.world
        if world.fail is not None and world.fail(SLAB, task):  # row 7
            raise KernelError(errno.ENOMEM, "fault injection: no memory for a pages object")
        start = va % PAGE_SIZE
        npages = (start + length + PAGE_SIZE - 1) >> PAGE_SHIFT
        pages = Pages(context.owner(task), va - start, npages, prot & WRITE != 0)
        chosen = map_one(self.io_pagetable, task, pages, start, length, iova, prot)  # row 8
        if world.instruments:
            world.event("map", ioas=self.id, iova=chosen, length=length, va=va)
        return chosen


def destroy(call: Call) -> None:
    """IOMMU_DESTROY (core 2.5)."""
    assert isinstance(call.cmd, u.iommu_destroy)
    call.context.objects.destroy(call.cmd.id)


def ioas_alloc(call: Call) -> None:
    """IOMMU_IOAS_ALLOC (core 4.4)."""
    cmd = call.cmd
    assert isinstance(cmd, u.iommu_ioas_alloc)
    if cmd.flags:  # row 1
        raise KernelError(errno.EOPNOTSUPP, f"unknown flags {cmd.flags:#x}")
    ioas = call.reserve(IOAS(call.context))  # row 2; rows 3 and 4 are dispatch's
    ioas.io_pagetable.ioas_id = ioas.id
    cmd.out_ioas_id = ioas.id


def ioas_iova_ranges(call: Call) -> None:
    """IOMMU_IOAS_IOVA_RANGES (core 4.5)."""
    cmd = call.cmd
    assert isinstance(cmd, u.iommu_ioas_iova_ranges)
    if cmd.reserved:  # row 1
        raise KernelError(errno.EOPNOTSUPP, f"__reserved {cmd.reserved:#x} is not 0")
    ioas = call.get(cmd.ioas_id, IOAS)  # row 2
    ranges, alignment = ioas.io_pagetable.usable()
    room = cmd.num_iovas
    shown = b"".join(first.to_bytes(8, "little") + last.to_bytes(8, "little") for first, last in ranges[:room])
    if shown:  # row 3: entries before an unwritable one stay written
        call.task.write(cmd.allowed_iovas, shown)
    cmd.num_iovas = len(ranges)  # row 4
    cmd.out_iova_alignment = alignment
    call.respond()
    if len(ranges) > room:  # row 5
        raise KernelError(errno.EMSGSIZE, f"there are {len(ranges)} ranges, the array has room for {room}")


def ioas_allow_iovas(call: Call) -> None:
    """IOMMU_IOAS_ALLOW_IOVAS (core 4.6)."""
    cmd = call.cmd
    assert isinstance(cmd, u.iommu_ioas_allow_iovas)
    if cmd.reserved:  # row 1
        raise KernelError(errno.EOPNOTSUPP, f"__reserved {cmd.reserved:#x} is not 0")
    ioas = call.get(cmd.ioas_id, IOAS)  # row 2
    allowed = read_allowed(call.world, call.task, cmd.allowed_iovas, cmd.num_iovas)  # rows 3-6
    ioas.io_pagetable.set_allowed(allowed)  # rows 7-8


def read_allowed(world: World, task: Task, addr: int, count: int) -> Ranges:
    """``count`` intervals from the caller's array, checked one by one (core 4.6 rows 3-6)."""
    seen: IntervalIndex[None] = IntervalIndex()
    for base in range(0, count, ENTRIES_AT_ONCE):
        want = min(count - base, ENTRIES_AT_ONCE)
        data = task.read_upto(addr + base * ENTRY, want * ENTRY)
        for i in range(want):
            at = i * ENTRY
            if at + ENTRY > len(data):  # row 3
                raise KernelError(errno.EFAULT, f"entry {base + i} at {addr + (base + i) * ENTRY:#x} cannot be read")
            first = int.from_bytes(data[at : at + 8], "little")
            last = int.from_bytes(data[at + 8 : at + 16], "little")
            if first >= last:  # row 4
                raise KernelError(errno.EINVAL, f"entry {base + i}: start {first:#x} is not below last {last:#x}")
            earlier = seen.first_in(first, last)
            if earlier is not None:  # row 5
                raise KernelError(
                    errno.EINVAL,
                    f"entry {base + i}: [{first:#x}, {last:#x}] overlaps [{earlier[0]:#x}, {earlier[1]:#x}]",
                )
            if world.fail is not None and world.fail(SLAB, task):  # row 6
                raise KernelError(errno.ENOMEM, f"fault injection: no memory for entry {base + i}")
            seen.insert(first, last, None)
    return Ranges((first, last) for first, last, _ in seen)


def _check_map_flags(flags: int, iova: int, length: int) -> int:
    """The first checks of MAP and MAP_FILE, ``flags`` known; the protection bits of the domain."""
    if iova == ULMAX or length == ULMAX:
        raise KernelError(errno.EOVERFLOW, f"iova {iova:#x} or length {length:#x} is the largest number")
    prot = PROT[flags]
    if not prot:
        raise KernelError(errno.EINVAL, "neither READABLE nor WRITEABLE is asked for")
    return prot


def ioas_map(call: Call) -> None:
    """IOMMU_IOAS_MAP (core 4.9)."""
    cmd = call.cmd
    assert isinstance(cmd, u.iommu_ioas_map)
    flags = cmd.flags
    if flags & ~MAP_FLAGS or cmd.reserved:  # row 1
        raise unsupported(flags & ~MAP_FLAGS, cmd.reserved)
    prot = _check_map_flags(flags, cmd.iova, cmd.length)  # rows 2-3
    ioas = call.get(cmd.ioas_id, IOAS)  # row 4
    iova = cmd.iova if flags & FIXED else None
    cmd.iova = ioas.map_user(call.task, cmd.user_va, cmd.length, iova, prot)  # rows 5-8


def ioas_map_file(call: Call) -> None:
    """IOMMU_IOAS_MAP_FILE (core 4.10, and core 7 when the file is a dma-buf)."""
    cmd = call.cmd
    assert isinstance(cmd, u.iommu_ioas_map_file)
    flags, length, start = cmd.flags, cmd.length, cmd.start
    if flags & ~MAP_FLAGS:  # row 1
        raise KernelError(errno.EOPNOTSUPP, f"unknown flags {flags & ~MAP_FLAGS:#x}")
    prot = _check_map_flags(flags, cmd.iova, length)  # rows 2-3
    ioas = call.get(cmd.ioas_id, IOAS)  # row 4
    if length == 0:  # row 5
        raise KernelError(errno.EINVAL, "the length is 0")
    if start + length - 1 > ULMAX:  # row 6
        raise KernelError(errno.EOVERFLOW, f"{length:#x} bytes at offset {start:#x} end beyond the last offset")
    pages = _file_pages(call, cmd.fd, start, length, bool(flags & WRITEABLE))  # rows 7-9
    pieces: list[Piece] = [(pages, start % PAGE_SIZE, length)]
    iova = cmd.iova if flags & FIXED else None
    try:
        cmd.iova = map_pages(ioas.io_pagetable, call.task, pieces, length, iova, prot)  # row 10
    finally:
        forget_pieces(call.world, pieces)
    if call.world.instruments:
        call.world.event("map", ioas=ioas.id, iova=cmd.iova, length=length, file=cmd.fd, offset=start)


def _file_pages(call: Call, fd: int, start: int, length: int, writable: bool) -> Pages:
    """core 4.10 rows 7-9: a pages object with one user of its source, the caller's."""
    file = call.task.file(fd)  # row 8
    owner = call.context.owner(call.task)
    if isinstance(file, DmaBufFile):  # row 7
        return dmabuf_pages(owner, file, start, length, writable)
    if not isinstance(file, File):
        try:
            _refuse_foreign_dmabuf(file, start, length)
        except KernelError:
            file.close()
            raise
    if length > ULMAX - PAGE_SIZE:  # row 9
        if not isinstance(file, File):
            file.close()
        raise KernelError(errno.EINVAL, f"the length {length:#x} is too large")
    offset = start % PAGE_SIZE
    npages = (offset + length + PAGE_SIZE - 1) >> PAGE_SHIFT
    return Pages(owner, start - offset, npages, writable, FileSource(file))


def _refuse_foreign_dmabuf(file: HostFile, start: int, length: int) -> None:
    """core 7 rows 1 and 6 for a dma-buf of the host: its exporter tells nobody where its memory is."""
    if file.kind != "dmabuf":
        return
    size = os.lseek(file.fd, 0, os.SEEK_END)
    if size <= start + length - 1:
        raise KernelError(
            errno.EINVAL, f"bytes [{start:#x}, {start + length - 1:#x}] are not in a dma-buf of {size:#x} bytes"
        )
    raise KernelError(errno.EOPNOTSUPP, "the exporter of this dma-buf does not tell its physical addresses")


def ioas_copy(call: Call) -> None:
    """IOMMU_IOAS_COPY (core 4.11)."""
    cmd = call.cmd
    assert isinstance(cmd, u.iommu_ioas_copy)
    if call.world.test_build and cmd.flags & SYZ_FLAG:  # row 0
        cmd.flags &= ~SYZ_FLAG
        cmd.src_iova = _syz_src_iova(call, cmd.src_ioas_id, cmd.src_iova)
    flags, length, src_iova = cmd.flags, cmd.length, cmd.src_iova
    if flags & ~MAP_FLAGS:  # row 1
        raise KernelError(errno.EOPNOTSUPP, f"unknown flags {flags & ~MAP_FLAGS:#x}")
    if src_iova == ULMAX:  # row 2
        raise KernelError(errno.EOVERFLOW, f"src_iova {src_iova:#x} is the largest number")
    prot = _check_map_flags(flags, cmd.dst_iova, length)  # rows 2-3
    source = call.get(cmd.src_ioas_id, IOAS)  # row 4
    if length == 0:  # row 5
        raise KernelError(errno.EINVAL, "the length is 0")
    last = src_iova + length - 1
    if last > ULMAX:  # row 6
        raise KernelError(errno.EOVERFLOW, f"{length:#x} bytes at IOVA {src_iova:#x} end beyond the last address")
    pieces = source.io_pagetable.pieces_of(src_iova, last)  # row 7
    try:
        target = call.get(cmd.dst_ioas_id, IOAS)  # row 8
        iova = cmd.dst_iova if flags & FIXED else None
        cmd.dst_iova = map_pages(target.io_pagetable, call.task, pieces, length, iova, prot)  # row 9
    finally:
        forget_pieces(call.world, pieces)
    if call.world.instruments:
        call.world.event("map", ioas=target.id, iova=cmd.dst_iova, length=length, copied_from=source.id)


def _syz_src_iova(call: Call, ioas_id: int, iova: int) -> int:
    """mock-device 7; unchanged when the source IOAS does not exist."""
    try:
        ioas = call.get(ioas_id, IOAS)
    except KernelError:
        return iova
    return ioas.io_pagetable.nth_iova(iova & 0xFFFFFFFF, iova >> 32)


def ioas_unmap(call: Call) -> None:
    """IOMMU_IOAS_UNMAP (core 4.12)."""
    cmd = call.cmd
    assert isinstance(cmd, u.iommu_ioas_unmap)
    table = call.get(cmd.ioas_id, IOAS).io_pagetable  # row 1
    iova, length = cmd.iova, cmd.length
    everything = iova == 0 and length == ULMAX
    if everything:  # row 2
        last = ULMAX
    else:
        if iova == ULMAX or length == ULMAX:  # row 3
            raise KernelError(errno.EOVERFLOW, f"iova {iova:#x} or length {length:#x} is the largest number")
        if length == 0:  # row 4
            raise KernelError(errno.EINVAL, "the length is 0")
        last = iova + length - 1
        if last > ULMAX:  # row 5
            raise KernelError(errno.EOVERFLOW, f"{length:#x} bytes at IOVA {iova:#x} end beyond the last address")
    removed, error = unmap_range(table, iova, last)  # row 6
    if removed and call.world.instruments:
        call.world.event("unmap", ioas=table.ioas_id, iova=iova, length=removed)
    if error is not None:
        raise KernelError(error.errno, error.why)  # a local that is raised would hold its own traceback
    if not removed and not everything:  # row 7
        raise KernelError(errno.ENOENT, f"nothing is mapped in [{iova:#x}, {last:#x}]")
    cmd.length = removed  # row 8


def vfio_ioas(call: Call) -> None:
    """IOMMU_VFIO_IOAS (core 4.16)."""
    cmd = call.cmd
    assert isinstance(cmd, u.iommu_vfio_ioas)
    context = call.context
    if cmd.reserved:
        raise KernelError(errno.EOPNOTSUPP, f"__reserved {cmd.reserved:#x} is not 0")
    if cmd.op == u.IOMMU_VFIO_IOAS_GET:
        with call.world.lock:
            ioas = context.compat_ioas
            if ioas is None or ioas.state != PUBLISHED:
                raise KernelError(errno.ENODEV, "no IOAS is set for VFIO compatibility")
            cmd.ioas_id = ioas.id
        call.respond()
    elif cmd.op == u.IOMMU_VFIO_IOAS_SET:
        ioas = call.get(cmd.ioas_id, IOAS)
        with call.world.lock:
            context.compat_ioas = ioas
    elif cmd.op == u.IOMMU_VFIO_IOAS_CLEAR:
        with call.world.lock:
            context.compat_ioas = None
    else:
        raise KernelError(errno.EOPNOTSUPP, f"op {cmd.op} is not GET, SET or CLEAR")


ROWS: list[tuple[Command, Handler, Respond]] = [
    (BY_NAME["IOMMU_DESTROY"], destroy, Respond.NOTHING),
    (BY_NAME["IOMMU_IOAS_ALLOC"], ioas_alloc, Respond.ON_SUCCESS),
    (BY_NAME["IOMMU_IOAS_ALLOW_IOVAS"], ioas_allow_iovas, Respond.NOTHING),
    (BY_NAME["IOMMU_IOAS_COPY"], ioas_copy, Respond.ON_SUCCESS),
    (BY_NAME["IOMMU_IOAS_IOVA_RANGES"], ioas_iova_ranges, Respond.HANDLER),
    (BY_NAME["IOMMU_IOAS_MAP"], ioas_map, Respond.ON_SUCCESS),
    (BY_NAME["IOMMU_IOAS_MAP_FILE"], ioas_map_file, Respond.ON_SUCCESS),
    (BY_NAME["IOMMU_IOAS_UNMAP"], ioas_unmap, Respond.ON_SUCCESS),
    (BY_NAME["IOMMU_VFIO_IOAS"], vfio_ioas, Respond.HANDLER),
]
