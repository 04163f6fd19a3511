"""Many IOMMU_IOAS_MAPs of one IOAS in one go, for programs in this process (kernel: each is a call of its own).

Invariant: an element is done here only if it is an ordinary map that nobody watches and nothing refuses, and it is done
as the call would do it (core 4.9). Whatever else an element may be, this stops before it, and the caller makes the
call: checks, errors and their sentences are the call's alone.
"""

from __future__ import annotations

import struct
from itertools import islice
from typing import TYPE_CHECKING

from iommufd.engine.ioas import FIXED, IOAS, MAP_FLAGS, PROT, WRITEABLE
from iommufd.engine.map import place
from iommufd.engine.pages import Pages
from iommufd.engine.ranges import ULMAX
from iommufd.errors import KernelError
from iommufd.memory.frames import PAGE_SHIFT, PAGE_SIZE

if TYPE_CHECKING:
    from iommufd.engine.context import Context
    from iommufd.engine.task import Task

ELEMENT = struct.Struct("<IIIIQQQ")  # struct iommu_ioas_map: size flags ioas_id __reserved user_va length iova
BATCH = 64  # elements after which others are let in

_IOVA = 32  # offset of `iova`
_ID = struct.Struct("<I").unpack_from
_put_iova = struct.Struct("<Q").pack_into


def map_array(context: Context, task: Task, data: bytearray, done: list[int]) -> bool:
    """Does the elements of ``data`` from number ``done[0]`` on, counting them there, as far as they are ordinary.

    False when not even the first one was."""
    world = context.world
    if world.instruments or world.fail is not None or world.fail_call is not None:
        return False
    first = done[0]
    (number,) = _ID(data, first * ELEMENT.size + 8)
    ioas = context.objects.take(number, IOAS)
    if ioas is None:
        return False
    try:
        _map(context, ioas, task, data, done)
    finally:
        context.objects.put(ioas)
    return done[0] > first


def _map(context: Context, ioas: IOAS, task: Task, data: bytearray, done: list[int]) -> None:
    world, table, owner, wanted = context.world, ioas.io_pagetable, context.owner(task), ioas.id
    at = done[0] * ELEMENT.size
    elements = ELEMENT.iter_unpack(data[at:])
    while at < len(data):
        with world.lock:
            if table.domains or table.domains_sem.blocked or table.iova_sem.writer:
                return
            for size, flags, number, reserved, va, length, iova in islice(elements, BATCH):
                if (
                    size != ELEMENT.size
                    or number != wanted
                    or reserved
                    or flags > MAP_FLAGS
                    or not PROT[flags]
                    or va + length > ULMAX
                    or length >= ULMAX - PAGE_SIZE
                    or iova == ULMAX
                ):
                    return
                start = va % PAGE_SIZE
                pages = Pages(owner, va - start, (start + length + PAGE_SIZE - 1) >> PAGE_SHIFT, flags & WRITEABLE != 0)
                try:
                    area = place(table, pages, start, length, iova if flags & FIXED else None, PROT[flags])
                except KernelError:
                    return
                if not flags & FIXED:
                    _put_iova(data, at + _IOVA, area.first)
                done[0] += 1
                at += ELEMENT.size
