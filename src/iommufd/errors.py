"""The one exception inside the software kernel: an errno for the caller, a sentence for the human.

A C caller sees only ``errno``; ``iommufd run --explain`` and Python callers also see ``why``, a sentence with the
numbers in it ("IOVA 0x1000 overlaps the area [0x0, 0x1fff]").
"""

from __future__ import annotations

import errno as _errno

# Python prefers the other name of two; these are the ones manuals and strace use.
_NAMES = {_errno.EOPNOTSUPP: "EOPNOTSUPP", _errno.EDEADLK: "EDEADLK", _errno.EAGAIN: "EAGAIN"}


def errno_name(number: int) -> str:
    """``"EEXIST"`` for 17, as C spells it; the number itself when it has no name."""
    return _NAMES.get(number) or _errno.errorcode.get(number, str(number))


class KernelError(Exception):
    """An ioctl (or other call on one of our files) that fails with ``errno`` because ``why``.

    ``errno`` is positive, as in C. ``why`` is one sentence without a trailing full stop, numbers in hexadecimal for
    addresses and decimal for counts. ``told``: the instruments have heard of it.
    """

    __slots__ = ("errno", "told", "why")

    def __init__(self, errno: int, why: str) -> None:
        self.errno = errno
        self.why = why
        self.told = False

    def __str__(self) -> str:
        return f"{errno_name(self.errno)}: {self.why}"
