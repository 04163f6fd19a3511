"""The automatic choice of an IOVA (core 4.8): first fit, lowest address, exactly as the kernel. Pure functions.

Where a mapping lands is visible to programs (they compare, they compute from it), so the odd corners are kept: a
one-byte hole never fits, and the page offset is ORed in after rounding.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable

from iommufd.engine.ranges import ULMAX, Range, Ranges
from iommufd.errors import KernelError
from iommufd.memory.frames import PAGE_SIZE

HPAGE_SIZE = 2 << 20

WINDOW = (PAGE_SIZE, ULMAX - PAGE_SIZE)
"""core 4.8 step 5: the first and the last page are never chosen."""

Holes = Callable[[int, int, int], Iterable[Range]]
"""``holes(first, last, at_least)``: the maximal area-free intervals of ``[first, last]``, clipped, of at least that
many bytes, ascending."""


def natural_alignment(addr: int, length: int, cap: int) -> int:
    """Step 3: a power of two, from the size, the address of the memory, and the largest page worth aligning to."""
    align = 1 << (length - 1).bit_length()
    lowest = addr & -addr
    if 0 < lowest < align:
        align = lowest
    return align if align < cap else cap


def fit(start: int, last: int, length: int, align: int, offset: int) -> int | None:
    """Step 7: where in ``[start, last]`` the mapping would begin, or None."""
    at = (start + align - 1) & -align
    if at > ULMAX:
        return None
    at |= offset
    return at if at < last and last - at >= length - 1 else None


def choose(
    addr: int, length: int, alignment: int, allowed: Ranges, reserved: Ranges, holes: Holes, cap: int = HPAGE_SIZE
) -> int:
    """The IOVA of a mapping of ``length`` bytes of memory at ``addr`` (core 4.8; ``alignment`` is the IOAS's ``A``).

    EOVERFLOW for lengths no search makes sense for, EINVAL when the memory is less aligned than the IOAS demands,
    ENOSPC when nothing is free."""
    if length == 0 or length >= ULMAX // 2:  # step 1
        raise KernelError(errno.EOVERFLOW, f"no automatic IOVA for a length of {length:#x}")
    offset = addr % PAGE_SIZE  # step 2
    align = natural_alignment(addr, length, cap)  # step 3
    if align < alignment:  # step 4
        raise KernelError(
            errno.EINVAL, f"memory at {addr:#x} is aligned to {align:#x} only, the IOAS needs {alignment:#x}"
        )
    at_least = max(length, 2)  # a one-byte hole never fits
    first, last = WINDOW
    for span_first, span_last in allowed.within(first, last) if len(allowed) else (WINDOW,):  # step 6
        start = fit(span_first, span_last, length, align, offset)
        if start is None:
            continue
        free = reserved.gaps(start, span_last) if len(reserved) else ((start, span_last),)
        for free_first, free_last in free:  # step 8
            if free_last - free_first + 1 < at_least:
                continue
            for hole_first, hole_last in holes(free_first, free_last, at_least):
                found = fit(hole_first, hole_last, length, align, offset)
                if found is not None:
                    return found
    raise KernelError(  # step 9
        errno.ENOSPC, f"no free IOVA range of {length:#x} bytes aligned to {align:#x} plus offset {offset:#x}"
    )
