"""Cookies of a fault queue: the lowest free number >= 1 (kernel: an allocating xarray, ``fault->response``).

With the defect :data:`ZERO_BECOMES_FREE` of Linux 7.3.4 a response with cookie 0, though refused, makes 0 a cookie like
any other of this queue from then on, if any group waits for its response at that moment.
"""

from __future__ import annotations

from heapq import heappop, heappush

ZERO_BECOMES_FREE = "fault-cookie-0-becomes-free"


class Cookies:
    """The numbers in use. ``leaky``: the defect is reproduced."""

    __slots__ = ("_free", "_leaky", "_next", "_used", "_zero_free")

    def __init__(self, *, leaky: bool = False) -> None:
        self._leaky = leaky
        self._used = 0
        self._zero_free = False
        self._free: list[int] = []  # freed numbers below _next, a heap
        self._next = 1

    def take(self) -> int:
        self._used += 1
        if self._zero_free:
            self._zero_free = False
            return 0
        if self._free:
            return heappop(self._free)
        self._next += 1
        return self._next - 1

    def release(self, cookie: int) -> None:
        self._used -= 1
        if cookie == 0:
            self._zero_free = True
        else:
            heappush(self._free, cookie)
        if not self._used:
            self._free.clear()
            self._next = 1

    def refused(self, cookie: int) -> None:
        """Somebody answered ``cookie``, which nobody has."""
        if cookie == 0 and self._leaky and self._used:
            self._zero_free = True
