"""core 9: what is promised when threads meet. A page fault that does not end (Gate) stands for work in progress."""

from __future__ import annotations

import errno
import random
import threading
import time
from functools import partial

import pytest

from iommufd.engine.access import Access, AccessOps
from iommufd.engine.unmap import unmap_range
from iommufd.errors import KernelError
from iommufd.iommu.extent_domain import ExtentDomain
from iommufd.uapi import iommufd as u
from tests.engine.fakes import (
    ARG,
    BUFFER,
    ULMAX,
    Background,
    Caller,
    Gate,
    copy_struct,
    frames_of,
    map_struct,
    pinned_frames,
)

P = 4096
FAR = BUFFER + 0x200 * P  # memory no gate stands before


def also(c: Caller) -> Caller:
    """Another process with the same file, so that two threads do not share the page their structs are in."""
    return Caller(c.world, context=c.context)


def stopped_map(c: Caller, ioas: int) -> tuple[Gate, Background[object]]:
    """A map of two pages at 0x1000 that waits in its page fault."""
    gate = Gate(c.proc, BUFFER)
    job = Background(lambda: c.do(map_struct(ioas, 0x1000, 2 * P), ARG + P))
    assert gate.reached.wait(10)
    return gate, job


class TestInProgress:
    def test_map_against_overlapping_map(self, c: Caller) -> None:
        ioas = c.ioas()
        c.add_domain(ioas)
        gate, job = stopped_map(c, ioas)
        why = c.refuses(errno.EEXIST, map_struct(ioas, 0x2000, P, FAR))
        assert "another thread" in why
        c.map(ioas, 0x3000, P, FAR)  # elsewhere nothing waits
        c.host.unmap(BUFFER, 2)
        gate.open()
        assert job.errno() == errno.EFAULT
        c.map(ioas, 0x2000, P, FAR)  # free again

    def test_automatic_choice_avoids_it(self, c: Caller) -> None:
        ioas = c.ioas()
        c.add_domain(ioas)
        gate, job = stopped_map(c, ioas)
        assert c.map(ioas, None, P, FAR) == 0x3000
        gate.open()
        job.result()

    def test_unmap(self, c: Caller) -> None:  # core-4.12-a, devices-8.6-1
        """EBUSY; areas below it are already gone."""
        ioas = c.ioas()
        c.add_domain(ioas)
        c.map(ioas, 0, P, FAR)
        gate, job = stopped_map(c, ioas)
        c.refuses(errno.EBUSY, u.iommu_ioas_unmap(ioas_id=ioas, iova=0, length=ULMAX))
        assert c.areas(ioas) == [(0x1000, 0x2FFF)]
        gate.open()
        job.result()
        assert c.unmap(ioas, 0, ULMAX) == 2 * P

    def test_readers_see_a_gap(self, c: Caller) -> None:
        ioas = c.ioas()
        c.add_domain(ioas)
        c.map(ioas, 0, P, FAR)
        gate, job = stopped_map(c, ioas)
        c.refuses(errno.ENOENT, copy_struct(ioas, ioas, 0, 2 * P))
        table = c.table(ioas)
        with table.reading():
            assert list(table.dirty_slices(0, ULMAX)) == [(0, 0xFFF)]
        gate.open()
        job.result()
        c.copy(ioas, ioas, 0, 2 * P)

    def test_reservation(self, c: Caller) -> None:
        """core 4.3: an area in progress vetoes too."""
        ioas = c.ioas()
        c.add_domain(ioas)
        gate, job = stopped_map(c, ioas)
        with pytest.raises(KernelError) as caught:
            c.table(ioas).reserve(0x2000, 0x2FFF, None)
        assert caught.value.errno == errno.EADDRINUSE
        gate.open()
        job.result()

    def test_change_process(self, c: Caller) -> None:  # core-4.13-3
        ioas = c.ioas()
        c.add_domain(ioas)
        gate, job = stopped_map(c, ioas)
        c.refuses(errno.EBUSY, u.iommu_ioas_change_process())
        gate.open()
        job.result()
        c.refuses(errno.EINVAL, u.iommu_ioas_change_process())

    def test_destroy_of_what_is_used(self, c: Caller) -> None:
        ioas = c.ioas()
        domain = c.add_domain(ioas)
        gate, job = stopped_map(c, ioas)
        c.refuses(errno.EBUSY, u.iommu_destroy(id=ioas))
        gate.open()
        job.result()
        c.table(ioas).remove_domain(domain)
        c.do(u.iommu_destroy(id=ioas))

    def test_ioctl_in_flight_keeps_the_context(self, c: Caller) -> None:
        """Whoever projects the file holds it over a call; the teardown then finds everything."""
        ioas = c.ioas()
        domain = c.add_domain(ioas)
        table = c.table(ioas)
        gate, job = stopped_map(c, ioas)
        c.context.get()  # the call's
        c.context.put()
        assert len(c.context.objects) == 1
        gate.open()
        job.result()
        table.remove_domain(domain)
        c.context.put()
        assert len(c.context.objects) == 0
        c.quiet()


class TestDomains:
    def test_attach_waits_for_a_running_map(self, c: Caller) -> None:
        ioas = c.ioas()
        c.add_domain(ioas)
        gate, job = stopped_map(c, ioas)
        second = ExtentDomain(0xFFFFF000)
        attach = Background(lambda: c.add_domain(ioas, second))
        time.sleep(0.02)
        assert attach.running
        gate.open()
        job.result()
        attach.result()
        assert 0 not in frames_of(second, 0x1000, 2 * P)

    def test_a_map_waits_for_a_running_attach(self, c: Caller) -> None:
        ioas = c.ioas()
        c.map(ioas, 0x10000, P)
        gate = Gate(c.proc, BUFFER)
        domain = ExtentDomain(0xFFFFF000)
        attach = Background(lambda: c.add_domain(ioas, domain))
        assert gate.reached.wait(10)
        other = also(c)
        jobs: list[Background[object]] = [
            Background(lambda: other.map(ioas, 0x20000, P)),
            Background(lambda: unmap_range(c.table(ioas), 0x10000, 0x10FFF)),
            Background(lambda: c.table(ioas).reserve(0x30000, 0x30FFF, None)),
        ]
        time.sleep(0.02)
        assert all(job.running for job in jobs)
        gate.open()
        attach.result()
        for job in jobs:
            job.result()
        assert domain.iova_to_phys(0x20000)
        assert c.areas(ioas) == [(0x20000, 0x20FFF)]
        assert domain.iova_to_phys(0x10000) == 0

    def test_a_failing_attach_lets_others_go_on(self, c: Caller) -> None:
        ioas = c.ioas()
        c.map(ioas, 0x10000, P)
        gate = Gate(c.proc, BUFFER)
        attach = Background(lambda: c.add_domain(ioas))
        assert gate.reached.wait(10)
        other = also(c)
        job = Background(lambda: other.map(ioas, 0x20000, P))
        c.host.unmap(BUFFER, 1)
        gate.open()
        assert attach.errno() == errno.EFAULT
        job.result()

    def test_maps_and_attaches_in_parallel(self, c: Caller) -> None:
        """Afterwards every live area is in every domain."""
        ioas = c.ioas()
        callers = [also(c) for _ in range(3)]
        domains = [ExtentDomain(0xFFFFF000) for _ in range(3)]

        def maps(caller: Caller, base: int) -> None:
            for i in range(40):
                caller.map(ioas, base + i * P, P, BUFFER + i * P)
                if i % 3 == 0:
                    caller.unmap(ioas, base + i * P, P)

        jobs = [Background(partial(maps, caller, (n + 1) << 20)) for n, caller in enumerate(callers)]
        jobs += [Background(partial(c.table(ioas).add_domain, domain)) for domain in domains]
        for job in jobs:
            job.result()
        for first, _ in c.areas(ioas):
            frames = {domain.iova_to_phys(first) for domain in domains}
            assert len(frames) == 1
            assert 0 not in frames
        c.unmap(ioas, 0, ULMAX)
        assert pinned_frames(c.world) == 0
        assert [list(domain.segments(0, ULMAX)) for domain in domains] == [[]] * 3


class TestAccesses:
    def test_unmap_waits_for_a_pin_that_is_faulting(self, c: Caller) -> None:
        ioas = c.ioas()
        unpinned = threading.Event()
        recorded = threading.Lock()
        pins: list[tuple[int, int]] = []

        def unmap(iova: int, length: int) -> None:
            with recorded:  # "pin returned, recorded" is atomic against the callback
                for pin in pins:
                    access.unpin_pages(*pin)
                pins.clear()
            unpinned.set()

        def pin() -> None:
            with recorded:
                access.pin_pages(0x1000, P, write=False)
                pins.append((0x1000, P))

        access: Access = Access.create(c.context, AccessOps(True, unmap))
        access.attach(ioas)
        c.map(ioas, 0x1000, P)
        c.map(ioas, 0x8000, P, FAR)
        gate = Gate(c.proc, BUFFER)
        pinning = Background(pin)
        assert gate.reached.wait(10)
        other = also(c)
        unmapping = Background(lambda: other.unmap(ioas, 0x1000, P))
        time.sleep(0.02)
        assert unmapping.running
        assert not unpinned.is_set()
        gate.open()
        pinning.result()
        assert unmapping.result() == P
        assert unpinned.is_set()
        c.quiet()

    def test_a_callback_that_unpins_unmaps_and_sleeps(self, c: Caller) -> None:
        """No lock of the engine is held: other threads make progress while the callback sleeps."""
        ioas, other_ioas = c.ioas(), c.ioas()
        asleep, wake = threading.Event(), threading.Event()
        inner: list[int] = []
        calls: list[tuple[int, int]] = []

        def unmap(iova: int, length: int) -> None:
            calls.append((iova, length))
            if iova != 0x1000:
                return
            access.unpin_pages(0x1000, P)
            inner.append(unmap_range(c.table(ioas), 0x8000, 0x8FFF)[0])
            asleep.set()
            assert wake.wait(10)

        access: Access = Access.create(c.context, AccessOps(True, unmap))
        access.attach(ioas)
        c.add_domain(ioas)
        for iova in (0x1000, 0x8000, 0x9000):
            c.map(ioas, iova, P, BUFFER + iova)
        access.pin_pages(0x1000, P, write=False)
        unmapping = Background(lambda: also(c).unmap(ioas, 0x1000, P))
        assert asleep.wait(10)
        # meanwhile: everything else works, on this IOAS and on others
        c.map(ioas, 0x20000, P)
        c.unmap(ioas, 0x9000, P)
        c.copy(other_ioas, ioas, 0x20000, P, 0)
        domain = c.add_domain(ioas)
        assert domain.iova_to_phys(0x20000)
        access.pin_pages(0x20000, P, write=False)
        access.unpin_pages(0x20000, P)
        with pytest.raises(KernelError):  # prevent_access is set before the callback
            access.pin_pages(0x1000, P, write=False)
        assert c.ioas() == 4
        assert unmapping.running
        wake.set()
        assert unmapping.result() == P
        assert inner == [P]
        assert calls == [(0x1000, P)]
        assert c.areas(ioas) == [(0x20000, 0x20FFF)]

    def test_destroy_of_an_access_waits_for_its_callback(self, c: Caller) -> None:
        ioas = c.ioas()
        inside, leave = threading.Event(), threading.Event()

        def unmap(iova: int, length: int) -> None:
            if length != ULMAX:
                inside.set()
                assert leave.wait(10)
            access.unpin_pages(0x1000, P)

        access: Access = Access.create(c.context, AccessOps(True, unmap))
        access.attach(ioas)
        c.map(ioas, 0x1000, P)
        access.pin_pages(0x1000, P, write=False)
        unmapping = Background(lambda: c.unmap(ioas, 0x1000, P))
        assert inside.wait(10)
        destroying = Background(access.destroy_access)
        time.sleep(0.02)
        assert destroying.running
        leave.set()
        unmapping.result()
        destroying.result()
        c.quiet()

    def test_a_change_of_ioas_waits_for_a_running_pin(self, c: Caller) -> None:
        a, b = c.ioas(), c.ioas()
        c.map(a, 0x1000, P)
        access: Access = c.access(a, unmap=lambda iova, length: access.unpin_pages(0x1000, P))
        gate = Gate(c.proc, BUFFER)
        pinning = Background(lambda: access.pin_pages(0x1000, P, write=False))
        assert gate.reached.wait(10)
        moving = Background(lambda: access.replace(b))
        time.sleep(0.02)
        assert moving.running
        gate.open()
        pinning.result()
        moving.result()
        c.quiet()


class TestSharedPages:
    def test_two_ioases_share_a_pages_object(self, c: Caller) -> None:
        """Serialised per pages object; counts come out even."""
        a, b = c.ioas(), c.ioas()
        c.map(a, 0x100000, 64 * P)
        callers = [also(c) for _ in range(3)]

        def work(caller: Caller, seed: int) -> None:
            rng = random.Random(seed)
            domain = ExtentDomain(0xFFFFF000)
            for _ in range(30):
                first, count = rng.randrange(60), rng.randint(1, 4)
                iova = (seed + 1) << 30
                caller.copy(b, a, 0x100000 + first * P, count * P, iova)
                if rng.random() < 0.3:
                    caller.table(a).add_domain(domain)
                    caller.table(a).remove_domain(domain)
                caller.unmap(b, iova, count * P)

        c.add_domain(b)
        for job in [Background(partial(work, caller, n)) for n, caller in enumerate(callers)]:
            job.result(30)
        c.unmap(a, 0, ULMAX)
        c.quiet()


class TestChangeProcess:
    def test_publication_of_an_ioas_waits(self, c: Caller) -> None:
        c.context.changing_process = True
        other = also(c)
        job = Background(other.ioas)
        time.sleep(0.02)
        assert job.running
        with c.world.lock:
            c.context.changing_process = False
            c.world.wake()
        assert job.result() == 1

    def test_destroy_meanwhile_is_ebusy(self, c: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
        ioas = c.ioas()
        seen: list[int] = []

        def slow(*_: object) -> list[object]:
            other = also(c)
            try:
                other.do(u.iommu_destroy(id=ioas))
            except KernelError as error:
                seen.append(error.errno)
            job = Background(lambda: other.map(ioas, 0x1000, P))
            time.sleep(0.02)
            assert job.running
            jobs.append(job)
            return []

        jobs: list[Background[object]] = []
        monkeypatch.setattr("iommufd.engine.change_process._file_pages", slow)
        c.do(u.iommu_ioas_change_process())
        assert seen == [errno.EBUSY]
        jobs[0].result()


def test_stress(c: Caller, fast_switches: None) -> None:
    """Every operation of an IOAS against every other; documented errnos only, and nothing left at the end."""
    ioas = c.ioas()
    fine = {errno.EEXIST, errno.ENOENT, errno.EBUSY, errno.EINVAL, errno.ENOSPC, errno.EADDRINUSE, errno.EPERM}
    stop = time.monotonic() + 1.0

    def act(seed: int) -> None:
        rng = random.Random(seed)
        me = also(c)
        pins: list[tuple[int, int]] = []
        guard = threading.Lock()

        def unmap(iova: int, length: int) -> None:
            with guard:
                for pin in [p for p in pins if p[0] < iova + length and iova < p[0] + p[1]]:
                    pins.remove(pin)
                    access.unpin_pages(*pin)

        access = Access.create(c.context, AccessOps(True, unmap))
        access.attach(ioas)
        domain = ExtentDomain(0xFFFFF000)
        while time.monotonic() < stop:
            iova, pages = rng.randrange(32) * P, rng.randint(1, 4)
            try:
                match rng.randrange(8):
                    case 0 | 1:
                        me.map(ioas, iova, pages * P, BUFFER + iova)
                    case 2 | 3:
                        me.unmap(ioas, iova, pages * P)
                    case 4:
                        me.copy(ioas, ioas, iova, pages * P, rng.randrange(32) * P)
                    case 5:
                        with guard:
                            access.pin_pages(iova, pages * P, write=False)
                            pins.append((iova, pages * P))
                    case 6:
                        access.read(None, iova, pages * P)
                    case _:
                        me.table(ioas).add_domain(domain)
                        me.table(ioas).remove_domain(domain)
            except KernelError as error:
                if error.errno not in fine:
                    raise
        access.destroy_access()

    for job in [Background(partial(act, n)) for n in range(4)]:
        job.result(30)
    c.unmap(ioas, 0, ULMAX)
    c.do(u.iommu_destroy(id=ioas))
    assert pinned_frames(c.world) == 0
    assert sum(user.locked_pages for user in c.world.physical.users.values()) == 0
