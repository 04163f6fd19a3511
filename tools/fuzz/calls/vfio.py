"""Calls of the VFIO container, and ioctls without a struct."""

from __future__ import annotations

import struct

from tools.fuzz.author import ULMAX, Author
from tools.fuzz.program import IOCTL, Step


def vfio(a: Author) -> None:
    what = a.r.randrange(5)
    _, iova, length = a.mapped()
    if what == 0:
        a.raw(0x3B70, struct.pack("<II", a.wrong(a.r.choice((16, 24, 72, 149)), 0, 15), 0) + b"\xaa" * 152)
    elif what == 1:
        size, flags = a.wrong(32, 31), a.wrong(a.r.choice((3, 1, 2)), 0, 4)
        a.raw(0x3B71, struct.pack("<IIQQQ", size, flags, a.va(), a.iova(), a.size()))
    elif what == 2:
        flags = a.r.choice((0, 0, 0, 2, 1))
        where = (0, 0) if flags == 2 else (iova, length)
        a.raw(0x3B72, struct.pack("<IIQQ", a.wrong(24, 23), flags, *where))
    elif what == 3:
        a.write(Step(IOCTL, a.slot, cmd=0x3B65, address=a.r.randrange(12)))
    else:
        a.write(Step(IOCTL, a.slot, cmd=0x3B66, address=a.r.choice((1, 3, 8, 2))))


def bare(a: Author) -> None:
    """A bare argument: no struct where the number points."""
    cmd = a.r.choice((0x3B80, 0x3B85, 0x3B96, 0x3BA0, 0x3BA1, 0x3B64, 0x3B70))
    a.write(Step(IOCTL, a.slot, cmd=cmd, address=a.r.choice((0, 1, 2**47, ULMAX))))


CALLS = {vfio: 5, bare: 1}
