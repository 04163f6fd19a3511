"""Mappings of our files in programs, counted (kernel: vm_operations open and close of the iommufd's mmap).

A mapping is made by the kernel itself once a File has granted it; it can be copied by fork, split, moved and dropped
without a word to us. So nobody follows it: before a call on a file that has granted mappings, the mappings that
exist are counted in /proc/PID/maps of all trees, and the File is told of the difference.
"""

from __future__ import annotations

import os
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from iommufd.interpose.carriers import Carrier

GRACE_SECONDS = 0.05  # a granted mapping of another thread may not have been made yet


class Mappings:
    """Keeps :attr:`Carrier.mapped` (offset of a granted region -> mappings the File knows of) true.

    ``members`` lists the processes that may have such mappings."""

    def __init__(self, members: Callable[[], Iterable[int]]) -> None:
        self._members = members
        self._last_grant: dict[tuple[int, int], tuple[int, float]] = {}

    def granted(self, carrier: Carrier, offset: int, tid: int) -> None:
        """The File has just counted a mapping at ``offset``; thread ``tid`` goes on to make it."""
        carrier.mapped[offset] = carrier.mapped.get(offset, 0) + 1
        self._last_grant[carrier.key] = (tid, time.monotonic())

    def settle(self, carrier: Carrier, tid: int) -> None:
        """Tells the File what mappings were made or went since; thread ``tid`` is in a call."""
        granted_to, when = self._last_grant.get(carrier.key, (tid, 0.0))
        in_flight = granted_to != tid and time.monotonic() - when < GRACE_SECONDS
        present = count(carrier, self._members())
        for offset, known in list(carrier.mapped.items()):
            now = present.get(offset, 0)
            if now < known and in_flight:
                continue
            adjust(carrier, offset, now - known)
        if not carrier.mapped:
            self._last_grant.pop(carrier.key, None)


def adjust(carrier: Carrier, offset: int, by: int) -> None:
    """Tells the File of ``by`` more (or fewer) mappings at ``offset``."""
    for _ in range(by):
        carrier.file.mapping_opened(offset)
    for _ in range(-by):
        carrier.file.mapping_closed(offset)
    carrier.mapped[offset] += by
    if not carrier.mapped[offset]:
        del carrier.mapped[offset]


def count(carrier: Carrier, members: Iterable[int]) -> dict[int, int]:
    """The mappings of the carrier in the processes ``members``, by the granted region they lie in."""
    starts = sorted(carrier.mapped)
    found: dict[int, int] = {}
    dev, ino = carrier.key
    needle = f" {os.major(dev):02x}:{os.minor(dev):02x} {ino} ".encode()
    for pid in members:
        try:
            with open(f"/proc/{pid}/maps", "rb") as maps:
                lines = [line for line in maps if needle in line]
        except OSError:  # it is gone, and its mappings with it
            continue
        for line in lines:
            index = bisect_right(starts, int(line.split(None, 3)[2], 16)) - 1
            if index >= 0:
                found[starts[index]] = found.get(starts[index], 0) + 1
    return found
