"""Realm: what the supervised trees of one machine share (kernel: there is one kernel, however many process trees).

Invariants:

* A machine has at most one realm in a process. Each tree in it has a listener and a Supervisor of its own; a file of
  the machine is the same file in whichever tree a descriptor of it turns up, because the carriers are shared.
* A notification is answered through the listener it came from, so threads, numbers and paths belong to their tree.
* Trees come and go. :meth:`Realm.close` is the end of all: programs still running are killed, and what anybody still
  holds is released.
"""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING

from iommufd.interpose.carriers import Carriers
from iommufd.interpose.mappings import Mappings

if TYPE_CHECKING:
    from iommufd.interpose.carriers import Carrier
    from iommufd.interpose.supervisor import Supervisor
    from iommufd.machine.machine import Machine
    from iommufd.memory.files import FileSpace

SWITCH_INTERVAL = 0.000002
"""Seconds a thread keeps the interpreter while another wants it: a call must not wait for whoever computes.

A call gives the interpreter up about five times (receive, copy in, copy out, answer, look for releases) and waits as
often for a device model that computes; at 500 µs a call beside one took 30 times its time, at 2 µs 6 to 8 times."""


class Realm:
    """The trees of ``machine``; :func:`realm_of` gives the one a long-lived machine keeps."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.carriers = Carriers(self._released)
        self.mappings = Mappings(self.members)
        self.trees: list[Supervisor] = []
        self.closed = False
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._interval = 0.0
        machine.world.physical.locate = self._locate

    def join(self, tree: Supervisor) -> None:
        with self._lock:
            if not self.trees:
                self._interval = sys.getswitchinterval()
                sys.setswitchinterval(min(self._interval, SWITCH_INTERVAL))
            self.trees.append(tree)

    def leave(self, tree: Supervisor) -> None:
        with self._lock:
            if tree not in self.trees:
                return
            self.trees.remove(tree)
            if not self.trees:
                sys.setswitchinterval(self._interval)
            self._changed.notify_all()

    def wait_for_trees(self, most: int, timeout: float | None) -> bool:
        """Waits until at most ``most`` trees are left; whether they are."""
        with self._lock:
            return self._changed.wait_for(lambda: len(self.trees) <= most, timeout)

    def members(self) -> list[int]:
        """Every living process that may be in a tree, and some that are not."""
        return list({pid for tree in list(self.trees) for pid in tree.members()})

    def settle(self) -> None:
        """Performs the releases that programs have caused so far."""
        if not self.closed:
            self.carriers.drain()

    def _released(self, carrier: Carrier) -> None:
        for tree in list(self.trees):
            tree.processes.carrier_released(carrier)
        world = self.machine.world
        if world.instruments:
            closers = [tree.processes.closer(carrier) for tree in list(self.trees)]
            task = next((task for task in closers if task is not None), None)
            world.event("close", task=task, file=carrier.file)

    def _locate(self, file: FileSpace) -> None:
        for tree in list(self.trees):
            tree.unmaps.locate(file, tree.members())

    def close(self) -> None:
        """Ends every tree and releases everything that is left, whoever holds it."""
        if self.closed:
            return
        for tree in list(self.trees):
            if tree.ours:
                tree.kill()
            tree.finish()
        self.closed = True
        self.carriers.close()


def realm_of(machine: Machine) -> Realm:
    """The realm of a machine in this process, made when first asked for. ValueError when the machine is closed."""
    if machine.closed:
        raise ValueError(f"machine {machine.name} is closed; no program can be run on it any more")
    realm = machine.realm
    if not isinstance(realm, Realm):
        realm = machine.realm = Realm(machine)
        machine.on_close(realm.close)
        machine.on_settle(realm.settle)
    return realm
