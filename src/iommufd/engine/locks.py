"""RWState: a reader-writer semaphore as visible state under ``World.lock`` (kernel: domains_rwsem, iova_rwsem,
ioas_lock).

The one lock of a machine is never held while something pins, copies or calls out; what the kernel protects by sleeping
locks over such work is therefore a number somebody may wait on. Invariants:

* Every method wants ``World.lock`` held and may give it up while it waits (on ``World.changed``).
* A waiting writer keeps new readers out, so that it cannot starve; ``blocked`` is nonzero exactly while a writer holds
  or waits, which is the one test the hot paths make.
* Order, outermost first: an IOAS's ``domains``, its ``iova``, a pages object's ``busy`` (core 9).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from iommufd.engine.world import World


class RWState:
    """``readers`` may be raised and lowered directly by code that holds the lock and has seen ``blocked == 0``."""

    __slots__ = ("blocked", "readers", "writer")

    def __init__(self) -> None:
        self.readers = 0
        self.writer = False
        self.blocked = 0  # writers that hold or wait

    def start_read(self, world: World) -> None:
        while self.blocked:
            world.wait()
        self.readers += 1

    def end_read(self, world: World) -> None:
        self.readers -= 1
        if self.readers == 0:
            world.wake()

    def start_write(self, world: World) -> None:
        self.blocked += 1
        while self.writer or self.readers:
            world.wait()
        self.writer = True

    def end_write(self, world: World) -> None:
        self.blocked -= 1
        self.writer = False
        world.wake()

    def pass_writer(self, world: World) -> None:
        """A writer's turn too short to show: waits until nobody holds it; the caller keeps ``World.lock`` from then
        on."""
        if self.writer or self.readers:
            self.blocked += 1
            while self.writer or self.readers:
                world.wait()
            self.blocked -= 1
            world.wake()
