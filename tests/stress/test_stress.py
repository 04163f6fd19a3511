"""Threads race everything /dev/iommu can be asked: nothing but documented errnos, no deadlock, nothing left behind.

A pair of operations counts when one begins while another thread is inside the other. Threads switch every
microsecond (of the interpreter's clock), and prefer what the pairs in flight have met least.
"""

from __future__ import annotations

import gc
import sys
import threading
import time
import traceback
from collections import Counter

import pytest

from iommufd.client.backends.software import SoftwareBackend
from iommufd.engine import ledger
from iommufd.machine.presets import preset
from iommufd.uapi import iommufd as u
from iommufd.uapi import iommufd_test as t
from tests.stress.operations import CROWDED, DESTROYERS, OPERATIONS, PASIDS, Arena, Operation, Shared, Worker

pytestmark = [pytest.mark.software, pytest.mark.usefixtures("fast_switches")]
THREADS = 16
WANTED = 8
STUCK = 60.0  # seconds without an operation finished, on a host that may be busy with other things


class Racer(threading.Thread):
    """A worker that runs operations until told to stop; what it met is counted in the race."""

    def __init__(self, race: Race, worker: Worker, number: int) -> None:
        super().__init__(daemon=True, name=f"racer {number}")
        self.race = race
        self.worker = worker
        self.number = number
        self.beat = time.monotonic()
        self.errnos: Counter[tuple[str, int]] = Counter()
        self.done: Counter[str] = Counter()
        self.failure: str | None = None

    def run(self) -> None:
        race, worker, flying = self.race, self.worker, self.race.flying
        while not race.over:
            index = self.choose()
            met = race.pairs[index]
            for other in flying:
                if other >= 0:
                    met[other] += 1
            flying[self.number] = index
            self.one(OPERATIONS[index], worker)
            flying[self.number] = -1
            self.beat = time.monotonic()
        for view in worker.views:
            view.release()
        worker.views.clear()

    def choose(self) -> int:
        """What the operation in flight that has met some other least has met least; sometimes anything at all, and
        destruction when there is too much."""
        worker, race = self.worker, self.race
        worker.begin()
        if worker.chance(0.5) and sum(map(len, tuple(worker.context.ids.values()))) > CROWDED:
            return OPERATIONS.index(worker.random.choice(DESTROYERS))
        flying = [other for other in race.flying if other >= 0]
        if not flying or worker.chance(0.3):
            return worker.random.randrange(len(OPERATIONS))
        return race.wanted[min(flying, key=race.need.__getitem__)][int(worker.random.expovariate(0.5)) % WANTED]

    def one(self, op: Operation, worker: Worker) -> None:
        try:
            op.run(worker)
            self.done[op.name] += 1
        except OSError as error:
            if error.errno not in op.errnos:
                self.failure = f"{op.name} failed with {error!r}\n{traceback.format_exc()}"
                self.race.over = True
            self.errnos[op.name, error.errno or 0] += 1
        except BaseException:  # the test fails with it
            self.failure = f"{op.name}:\n{traceback.format_exc()}"
            self.race.over = True


class Race:
    """A mock machine, two contexts, an arena, and threads."""

    def __init__(self, seed: int) -> None:
        self.machine = preset("mock")
        self.backend = SoftwareBackend(self.machine)
        self.backend.owner.pretended = 2**64 - 1
        self.owed = ledger.take(self.machine.world, [], [self.backend.owner.process])
        self.arena = Arena()
        self.contexts = [Shared(self.backend), Shared(self.backend)]
        self.workers = [Worker(self.backend, self.contexts, self.arena, seed * 1000 + n) for n in range(THREADS)]
        self.over = False
        self.flying = [-1] * THREADS
        self.need = [0] * len(OPERATIONS)  # how often an operation has met the one it has met least, a moment ago
        self.wanted = [list(range(WANTED)) for _ in OPERATIONS]  # those it has met least
        self.pairs = [[0] * len(OPERATIONS) for _ in OPERATIONS]
        for context in self.contexts:
            self.furnish(context)

    def furnish(self, context: Shared) -> None:
        """What stays: two devices with PASIDs on an IOAS each, and one that is attached through a vIOMMU."""
        w = self.workers[0]
        w.context = context
        for _ in range(2):
            ioas = w.made("IOAS", w.do(u.iommu_ioas_alloc()).out_ioas_id)
            out = w.do(t.test_mock_domain_flags(id=ioas, dev_flags=t.MOCK_FLAGS_DEVICE_PASID))
            context.lasting.append(out.out_stdev_id)
            w.made("DEVICE", out.out_idev_id)
        ioas = w.do(u.iommu_ioas_alloc()).out_ioas_id
        plain = w.do(t.test_mock_domain(id=ioas))
        device = context.eventful = plain.out_idev_id
        parent = w.do(u.iommu_hwpt_alloc(flags=u.IOMMU_HWPT_ALLOC_NEST_PARENT, dev_id=device, pt_id=ioas)).out_hwpt_id
        make = u.iommu_viommu_alloc(type=t.IOMMU_VIOMMU_TYPE_SELFTEST, dev_id=device, hwpt_id=parent)
        viommu = w.made("VIOMMU", w.do(make).out_viommu_id)
        vdevice = w.do(u.iommu_vdevice_alloc(viommu_id=viommu, dev_id=device, virt_id=1)).out_vdevice_id
        ask = u.iommu_hwpt_alloc(dev_id=device, pt_id=viommu, data_type=t.IOMMU_HWPT_DATA_SELFTEST, data_len=4)
        ask.data_uptr = w.put(bytes(4))
        nested = w.do(ask).out_hwpt_id
        w.do(t.test_mock_domain_replace(id=plain.out_stdev_id, pt_id=nested))
        queue = w.do(u.iommu_veventq_alloc(viommu_id=viommu, type=t.IOMMU_VEVENTQ_TYPE_SELFTEST, veventq_depth=2))
        faults = w.do(u.iommu_fault_alloc())
        context.queues = {"veventq": queue.out_veventq_fd, "fault": faults.out_fault_fd}
        queues = (queue.out_veventq_id, faults.out_fault_id)
        context.kept = {*context.lasting, plain.out_stdev_id, parent, viommu, vdevice, nested, *queues}

    def met(self, one: int, other: int) -> int:
        """How often the one began beside the other, or the other way round."""
        return self.pairs[one][other] + (self.pairs[other][one] if one != other else 0)

    def plan(self) -> None:
        """Who should meet whom, for the next moment."""
        for one in range(len(OPERATIONS)):
            least = sorted(range(len(OPERATIONS)), key=lambda other: self.met(one, other))
            self.wanted[one] = least[:WANTED]
            self.need[one] = self.met(one, least[0])

    def run(self, seconds: float, meetings: int = 0, at_most: float = 300.0) -> list[Racer]:
        """Races for ``seconds``, and on until every pair met ``meetings`` times, or ``at_most`` seconds are over."""
        racers = [Racer(self, worker, number) for number, worker in enumerate(self.workers)]
        for racer in racers:
            racer.start()
        began = time.monotonic()
        while not self.over:
            took = time.monotonic() - began
            if took > at_most or (took > seconds and self.rarest() >= meetings):
                break
            time.sleep(0.1)
            self.plan()
            self.watch(racers)
        self.over = True
        for racer in racers:
            while racer.is_alive():
                racer.join(0.5)
                self.watch(racers)
        failures = [racer.failure for racer in racers if racer.failure]
        assert not failures, failures[0]
        return racers

    def rarest(self) -> int:
        """How often the pair has met that met least."""
        return min(self.met(one, other) for one in range(len(OPERATIONS)) for other in range(one + 1))

    def watch(self, racers: list[Racer]) -> None:
        """Fails with every thread's stack when one is stuck."""
        now = time.monotonic()
        if any(racer.is_alive() and now - racer.beat > STUCK for racer in racers):
            frames = sys._current_frames()
            stacks = ["".join(traceback.format_stack(frames[r.ident])) for r in racers if r.ident in frames]
            pytest.fail("a deadlock:\n" + "\n".join(stacks))

    def take_down(self) -> None:
        """Everything is destroyed by hand in one context, the other is closed with all it holds: nothing stays."""
        first, second = self.contexts
        for context in self.contexts:  # a device that goes with a PASID attached leaks it (mock-device 4.1)
            self.workers[0].context = context
            for stdev in context.lasting:
                for pasid in PASIDS:
                    self.workers[0].do(t.test_pasid_detach(id=stdev, pasid=pasid))
        by_hand = next(context for context in self.machine.contexts if context.references)
        w = self.workers[0]
        w.context = first
        for fd in [fd for fds in first.fds.values() for fd in fds] + list(first.queues.values()):
            if fd in self.backend.descriptors.numbers and fd not in (first.fd, second.fd, *second.queues.values()):
                self.backend.close(fd)
        gc.collect()  # mappings of device memory
        while True:
            gone = 0
            for obj in list(by_hand.objects):
                try:
                    w.do(u.iommu_destroy(id=obj.id))
                    gone += 1
                except OSError:  # something still holds it: the next round
                    continue
            if not gone:
                break
        assert [f"{obj.kind} {obj.id}: users {obj.users}" for obj in by_hand.objects] == []
        self.backend.close_all()
        assert self.machine.contexts == []
        now = ledger.take(self.machine.world, [], [self.backend.owner.process])
        left = ledger.difference(self.owed, now)
        assert not left, left
        self.arena.close()


def summary(racers: list[Racer]) -> tuple[Counter[str], Counter[tuple[str, int]]]:
    done: Counter[str] = Counter()
    errnos: Counter[tuple[str, int]] = Counter()
    for racer in racers:
        done += racer.done
        errnos += racer.errnos
    return done, errnos


@pytest.mark.parametrize("seed", [1, 2])
def test_a_short_race(seed: int) -> None:
    race = Race(seed)
    done, _ = summary(race.run(1.5))
    race.take_down()
    assert sum(done.values()) > 100


@pytest.mark.slow
def test_every_pair_of_operations_meets_a_thousand_times() -> None:
    """A minute (longer on a busy host), in which every operation also succeeds; the errnos met are printed."""
    race = Race(3)
    began = time.monotonic()
    racers = race.run(60, meetings=1000)
    took = time.monotonic() - began
    done, errnos = summary(racers)
    race.take_down()
    counts = sorted(
        (race.met(one, other), OPERATIONS[one].name, OPERATIONS[other].name)
        for one in range(len(OPERATIONS))
        for other in range(one + 1)
    )
    print(f"{sum(done.values()) + sum(errnos.values())} operations in {took:.0f} s; the rarest pairs: {counts[:3]}")
    for op in OPERATIONS:
        met = {number: times for (name, number), times in errnos.items() if name == op.name}
        print(f"{op.name}: {done[op.name]} done, errnos {met}")
        assert done[op.name] > 0 or not op.succeeds, f"{op.name} never succeeded"
    assert counts[0][0] >= 1000
