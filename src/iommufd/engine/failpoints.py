"""The names of the fault-injection points of the core (core 10), as :mod:`iommufd.engine.fail` lists them.

A point is asked with ``world.failpoint(NAME, task)``; what it does when it is told to fail stands beside the call.
Whoever asks must be able to unwind completely, as from the corresponding real failure.
"""

from __future__ import annotations

LOOKUP = "object lookup"
SCRATCH = "scratch memory"
PIN = "pin"
STORE = "store pfns"
CHARGE = "charge"
REMOTE_COPY = "remote copy"
RESERVED_REGIONS = "reserved regions"
SLAB = "slab"
