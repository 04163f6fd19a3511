"""The one exception inside the software kernel: an errno for the caller, a sentence for the human.

A C caller sees only ``errno``; ``iommufd run --explain`` and Python callers also see ``why``, a sentence with the
numbers in it ("IOVA 0x1000 overlaps the area [0x0, 0x1fff]").
"""

from __future__ import annotations

import errno as _errno


class KernelError(Exception):
    """An ioctl (or other call on one of our files) that fails with ``errno`` because ``why``.

    ``errno`` is positive, as in C. ``why`` is one sentence without a trailing full stop, numbers in hexadecimal for
    addresses and decimal for counts.
    """

    __slots__ = ("errno", "why")

    def __init__(self, errno: int, why: str) -> None:
        self.errno = errno
        self.why = why

    def __str__(self) -> str:
        return f"{_errno.errorcode.get(self.errno, self.errno)}: {self.why}"
