"""World: what all open files of one software machine share.

One lock. ``World.lock`` is plain (not re-entrant) and guards state transitions only: object tables, area trees, group
and queue state. It is never held while caller memory is touched, pages are pinned, an unmap callback, an Instrument or
device code runs, or anything waits. ``World.changed`` is a condition on the same lock: work in flight is visible state
(reserved ids, in-progress areas, ``prevent_access``), and whoever must wait for such a state to pass waits on it,
through :meth:`World.wait`; whoever ends one calls :meth:`World.wake`, which costs one test when nobody waits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from iommufd.engine.fail import Injector
from iommufd.errors import KernelError
from iommufd.memory.physical import Physical

if TYPE_CHECKING:
    from iommufd.engine.context import Context
    from iommufd.engine.dispatch import Row
    from iommufd.engine.file import Pending
    from iommufd.engine.instrument import Instrument
    from iommufd.engine.task import Task
    from iommufd.iommu.driver import Driver

LATEST = (7, 3)
NATIVE_TOP_NR = 0x95

FailHook = Callable[[str, "Task | None"], bool]
FailCall = Callable[[str, "Task"], None]
CompatIoctl = Callable[["Context", "Task", int, int], "int | Pending"]


class _Changed(threading.Condition):
    """A condition that knows whether anybody waits; ``waiting`` changes under its lock."""

    def __init__(self, lock: threading.Lock) -> None:
        super().__init__(lock)
        self.waiting = 0

    def wait(self, timeout: float | None = None) -> bool:
        self.waiting += 1
        try:
            return super().wait(timeout)
        finally:
            self.waiting -= 1


class World:
    """Shared state and build configuration of one machine.

    ``kernel`` is the release whose uAPI is shown; newer commands do not exist and newer struct fields are unknown.
    ``defects`` names the known bugs of a release that this machine reproduces. ``noiommu`` and ``vfio_container`` are
    CONFIG_IOMMUFD_NOIOMMU and CONFIG_IOMMUFD_VFIO_CONTAINER; CONFIG_IOMMUFD_TEST is present when selftest/ has added
    its row. ``fail`` and ``fail_call`` are the fault-injection hooks of ``injector``; None (nobody injects) costs one
    test.
    """

    def __init__(
        self,
        *,
        kernel: tuple[int, int] = LATEST,
        defects: Iterable[str] = (),
        noiommu: bool = True,
        vfio_container: bool = False,
    ) -> None:
        self.lock = threading.Lock()
        self.changed = _Changed(self.lock)
        self.physical = Physical()
        self.kernel = kernel
        self.defects = frozenset(defects)
        self.noiommu = noiommu
        self.noiommu_driver: Driver | None = None  # the built-in driver of devices without an IOMMU, when noiommu
        self.granted = 0  # capabilities (bits) that every caller has on this machine, whatever the host gave it
        self.allow_unsafe_interrupts = False  # iommufd's module parameter (devices.md 2.1 step 6)
        self.vfio_container = vfio_container
        self.table: dict[int, Row] = {}
        self.top_nr = NATIVE_TOP_NR  # highest ``nr`` of the table (core 1.3): 0xa0 once selftest/ has added its row
        self.compat_ioctl: CompatIoctl | None = None
        self.instruments: list[Instrument] = []
        self.fail: FailHook | None = None
        self.fail_call: FailCall | None = None
        self.injector = Injector(self)
        self.huge_page_size = 2 << 20  # HPAGE_SIZE of a kernel with transparent huge pages (core 4.8 step 3)

    @property
    def test_build(self) -> bool:
        """CONFIG_IOMMUFD_TEST: the test command is in the table."""
        return self.top_nr > NATIVE_TOP_NR

    def wait(self) -> None:
        """Gives the lock up until some state changed; locked. Always in a loop over the state waited for."""
        self.changed.wait()

    def wake(self) -> None:
        """Some state others may wait for changed; locked."""
        if self.changed.waiting:
            self.changed.notify_all()

    def failpoint(self, name: str, task: Task | None) -> bool:
        """True when fault injection wants the point ``name`` (core 10) to fail now."""
        return self.fail is not None and self.fail(name, task)

    def event(self, name: str, **fields: object) -> None:
        """Tells every instrument; call it only behind ``if world.instruments``."""
        error = fields.get("error")
        if isinstance(error, KernelError):
            error.told = True
        for instrument in self.instruments:
            instrument.event(name, **fields)
