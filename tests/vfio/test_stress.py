"""Threads race everything a VFIO device can be asked; nothing but documented errnos, no deadlock, nothing left."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable

import pytest

from tests.vfio.conftest import ALONE, FIRST, NETWORK, SECOND
from tests.vfio.program import CONFIG, RESET, Program, eventfds
from tests.vfio.test_features import info, reset
from tests.vfio.test_group import device_fd, set_container

SECONDS = 1.5
ALLOWED = {
    "EBADF",
    "EBADFD",
    "EBUSY",
    "EINVAL",
    "EIO",
    "ENODEV",
    "ENOENT",
    "ENOSPC",
    "ENOTTY",
    "EPERM",
}


class Worker:
    """One thread's random walk over a few descriptors of its own and shared ones."""

    def __init__(self, p: Program, seed: int, shared: list[int], iommufds: list[tuple[int, int]]) -> None:
        self.p = p
        self.random = random.Random(seed)
        self.shared = shared
        self.iommufds = iommufds
        self.own: list[int] = []
        self.event = os.eventfd(0, os.EFD_NONBLOCK)
        self.seen: set[str] = set()
        self.failure: BaseException | None = None

    def run(self, until: float) -> None:
        try:
            while time.monotonic() < until:
                answer = self.step()
                if isinstance(answer, str):
                    self.seen.add(answer)
        except BaseException as error:  # the test fails with it
            self.failure = error
        for fd in self.own:
            self.p.close(fd)
        os.close(self.event)

    def fd(self) -> int:
        return self.random.choice(self.own + self.shared) if self.own else self.random.choice(self.shared)

    def step(self) -> object:
        p, choose = self.p, self.random.choice
        iommufd, ioas = choose(self.iommufds)
        what = self.random.randrange(14)
        if what == 0 and len(self.own) < 6:
            fd = p.cdev(choose([ALONE, FIRST, SECOND, NETWORK]))
            self.own.append(fd)
            return 0
        if what == 1 and self.own:
            p.close(self.own.pop(self.random.randrange(len(self.own))))
            return 0
        if what == 2:
            group = p.group(choose([ALONE, FIRST]))
            if isinstance(group, int):
                set_container(p, group, iommufd)
                fd = device_fd(p, group, choose([ALONE, FIRST, SECOND]))
                if isinstance(fd, int):
                    self.own.append(fd)
                p.close(group)
                return fd
            return group
        fd = self.fd()
        actions: dict[int, Callable[[], object]] = {
            3: lambda: p.bind(fd, iommufd),
            4: lambda: p.bind(fd, iommufd),
            5: lambda: p.attach(fd, ioas),
            6: lambda: p.attach(fd, ioas, self.random.randrange(1, 4)),
            7: lambda: p.detach(fd, choose([None, 1, 2])),
            8: lambda: p.read(fd, choose([0, CONFIG, 3 << 40]), 16) and 0,
            9: lambda: p.write(fd, choose([0, CONFIG + 4, CONFIG + 0x40]), b"\2\0"),
            10: lambda: p.call(fd, RESET),
            11: lambda: p.irqs(fd, 4 | 32, choose([0, 1, 2]), 0, 1, eventfds(choose([self.event, -1]))),
            12: lambda: p.irqs(fd, 1 | 32, choose([0, 1, 2]), 0, choose([0, 1])),
            13: lambda: info(p, fd) if choose([True, False]) else reset(p, fd),
        }
        return actions.get(what, lambda: 0)()


@pytest.mark.usefixtures("fast_switches")
@pytest.mark.parametrize("seed", [1, 2])
def test_everything_at_once(p: Program, seed: int) -> None:
    iommufds = [(fd, p.ioas(fd)) for fd in (p.iommufd(), p.iommufd())]
    shared = [p.cdev(NETWORK)]  # one that all use; the others come and go
    workers = [Worker(p, seed * 100 + n, shared, iommufds) for n in range(4)]
    until = time.monotonic() + SECONDS
    threads = [threading.Thread(target=worker.run, args=(until,), daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS + 30)
        assert not thread.is_alive(), "a deadlock"
    for worker in workers:
        if worker.failure is not None:
            raise worker.failure
        assert worker.seen <= ALLOWED, worker.seen - ALLOWED
    for fd in shared:
        p.close(fd)
    for slot in p.machine.pci.slots.values():
        device = slot.vfio
        assert device is not None
        assert (device.users, device.idev, device.pasids, device.group.cdev_opens) == (0, None, set(), 0)
        assert device.group.file is None
        assert slot.core.group is not None
        assert (slot.core.group.owner_cnt, slot.core.group.handles) == (0, {})
        assert (slot.function.interrupts.active, slot.function.interrupts.vectors) == (None, [])
    for iommufd, _ in iommufds:
        context = p.context(iommufd)
        assert {o.kind for o in context.objects} == {"IOAS"}
        assert context.references == 1
