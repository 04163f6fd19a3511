"""Ops that look at an IOAS or a page table from below: reservations, mappings, pins, dirty marks (mock-device 5)."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import TYPE_CHECKING

from iommufd.engine.hwpt import HwptPaging
from iommufd.engine.ioas import IOAS
from iommufd.errors import KernelError
from iommufd.iommu.bits import count_set
from iommufd.memory.extents import frame_at, same_frames, slice_extents
from iommufd.memory.frames import PAGE_SHIFT, PAGE_SIZE
from iommufd.selftest.domain import MockDomain

if TYPE_CHECKING:
    from iommufd.engine.dispatch import Call
    from iommufd.engine.task import Task
    from iommufd.memory.frames import Extents
    from iommufd.uapi import iommufd_test as t

U64_MAX = 2**64 - 1
SMALLEST_TEMP_LIMIT = 12
MAX_DIRTY_BITS = 16 * 2**20 * 8
PAGES_AT_ONCE = 1024


def add_reserved(call: Call, cmd: t.test_add_reserved) -> None:
    """Op ADD_RESERVED (5.1): a reserved range of nobody, there until the IOAS goes."""
    if cmd.length == 0:  # row 1
        raise KernelError(errno.EINVAL, "the length is 0")
    last = cmd.start + cmd.length - 1
    if last > U64_MAX:  # row 2
        raise KernelError(errno.EOVERFLOW, f"{cmd.length:#x} bytes at {cmd.start:#x} end beyond the last address")
    call.get(cmd.id, IOAS).io_pagetable.reserve(cmd.start, last, None)  # rows 3-5


def mock_hwpt(call: Call, number: int) -> MockDomain:
    """The domain of a paging HWPT of the mock hardware: ENOENT, EINVAL for another driver's."""
    domain: object = call.get(number, HwptPaging).domain
    if not isinstance(domain, MockDomain):
        raise KernelError(errno.EINVAL, f"HWPT {number} is not the mock hardware's")
    return domain


def md_check_map(call: Call, cmd: t.test_md_check_map) -> None:
    """Op MD_CHECK_MAP (5.2): EINVAL unless the page table leads to the frames that are behind ``uptr`` now."""
    domain = mock_hwpt(call, cmd.id)  # rows 1, 2
    if (cmd.iova | cmd.length | cmd.uptr) & (domain.smallest_page - 1) or cmd.uptr + cmd.length > U64_MAX:  # row 3
        raise KernelError(
            errno.EINVAL,
            f"iova {cmd.iova:#x}, length {cmd.length:#x} and uptr {cmd.uptr:#x} are not multiples of "
            f"{domain.smallest_page}, or the range wraps",
        )
    for at, extents, offset, length in user_frames(call.task, cmd.uptr, cmd.length):  # row 4
        wrong = mismatch(domain, cmd.iova + at, extents, offset, length)  # row 5
        if wrong is not None:
            raise KernelError(
                errno.EINVAL, f"IOVA {wrong:#x} does not lead to what is at {cmd.uptr + wrong - cmd.iova:#x}"
            )


def user_frames(task: Task, va: int, length: int) -> Iterator[tuple[int, Extents, int, int]]:
    """The caller's memory ``[va, va + length)`` in ascending pieces: (bytes from ``va``, frames, offset in them,
    bytes).

    EFAULT at the first page that is not there, after the pieces before it."""
    at = 0
    while at < length:
        first = va + at
        offset = first & (PAGE_SIZE - 1)
        count = min(PAGES_AT_ONCE, (offset + length - at + PAGE_SIZE - 1) >> PAGE_SHIFT)
        try:
            extents = task.space.look(first - offset, count)
        except KernelError:
            if count == 1:
                raise
            count = 1
            extents = task.space.look(first - offset, 1)
        size = min((count << PAGE_SHIFT) - offset, length - at)
        yield at, extents, offset, size
        at += size


def mismatch(domain: MockDomain, iova: int, extents: Extents, offset: int, length: int) -> int | None:
    """The first IOVA of ``[iova, iova + length)`` that does not translate to byte ``offset`` on of ``extents``; None:
    all do.

    Exact to the page."""
    at = 0
    for start, frames, begin, size, _ in domain.segments(iova, length):
        if start != iova + at:
            break
        while size:
            here, there = offset + at, begin
            n = min(PAGE_SIZE - (here & (PAGE_SIZE - 1)), size)
            if (here ^ there) & (PAGE_SIZE - 1):
                return iova + at
            if n == size or here & (PAGE_SIZE - 1):
                pages = 1
            else:
                pages = size >> PAGE_SHIFT
                n = pages << PAGE_SHIFT
                mine = slice_extents(extents, here >> PAGE_SHIFT, pages)
                if not same_frames(mine, slice_extents(frames, there >> PAGE_SHIFT, pages)):
                    pages, n = 1, PAGE_SIZE  # find the page
            if pages == 1 and frame_at(extents, here >> PAGE_SHIFT) != frame_at(frames, there >> PAGE_SHIFT):
                return iova + at
            at, begin, size = at + n, begin + n, size - n
    return None if at == length else iova + at


def md_check_refs(call: Call, cmd: t.test_md_check_refs) -> None:
    """Op MD_CHECK_REFS (5.3): EIO unless every ordinary page of the range is pinned ``refs`` times."""
    if (cmd.length | cmd.uptr) & (PAGE_SIZE - 1) or cmd.uptr + cmd.length > U64_MAX:
        raise KernelError(errno.EINVAL, f"[{cmd.uptr:#x}, +{cmd.length:#x}) is not whole pages, or wraps")
    for at, extents, _, _ in user_frames(call.task, cmd.uptr, cmd.length):
        for extent in extents:
            if extent.chunk.order:  # part of a huge page
                continue
            for index in range(extent.index, extent.index + extent.count):
                pins = extent.chunk.pins(index)
                if pins != cmd.refs:
                    raise KernelError(
                        errno.EIO, f"a page of [{cmd.uptr + at:#x}, ...) is pinned {pins} times, not {cmd.refs}"
                    )


def set_temp_memory_limit(call: Call, cmd: t.test_set_temp_memory_limit) -> None:
    """Op SET_TEMP_MEMORY_LIMIT (5.5). Scratch memory never decides a result (core 5.4), so there is nothing to set."""
    if cmd.limit < SMALLEST_TEMP_LIMIT:
        raise KernelError(errno.EINVAL, f"{cmd.limit} bytes of scratch memory hold not even one run")


def dirty(call: Call, cmd: t.test_dirty) -> None:
    """Op DIRTY (5.4): the hardware writes to the pages whose bits are set."""
    step, length = cmd.page_size, cmd.length
    if not step or not length or cmd.iova % step or length % step or not cmd.uptr:  # row 1
        raise KernelError(
            errno.EINVAL, f"[{cmd.iova:#x}, +{length:#x}) is not whole pages of {step:#x}, or there is no bitmap"
        )
    count = length // step
    if count > MAX_DIRTY_BITS:  # row 2
        raise KernelError(errno.EOVERFLOW, f"{count} bits are more than {MAX_DIRTY_BITS}")
    domain = mock_hwpt(call, cmd.id)  # row 3
    if not domain.dirty_tracking:  # row 4
        raise KernelError(errno.EINVAL, f"HWPT {cmd.id} does not track dirty pages now")
    bits = call.task.read(cmd.uptr, (count + 7) >> 3)  # row 5
    domain.mark_dirty_bits(cmd.iova, step, bits, count)  # row 6
    cmd.out_nr_dirty = count_set(bits, count)  # row 7
