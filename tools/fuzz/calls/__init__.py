"""The calls a program is made of, by what they are about. Each takes the author; the number is how often it is made."""

from __future__ import annotations

from collections.abc import Callable

from tools.fuzz.author import Author
from tools.fuzz.calls import events, hwpt, ioas, processes, selftest, vfio

Call = Callable[[Author], None]
CALLS: dict[Call, int] = {
    **ioas.CALLS,
    **hwpt.CALLS,
    **events.CALLS,
    **selftest.CALLS,
    **vfio.CALLS,
    **processes.CALLS,
}
