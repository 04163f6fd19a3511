"""core 2: numbers, states, counts, who may destroy what."""

from __future__ import annotations

import errno
import random
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iommufd.engine.context import Context
from iommufd.engine.object import MAX_ID, Object
from iommufd.engine.world import World
from iommufd.errors import KernelError
from iommufd.uapi import iommufd as u
from tests.engine.fakes import Background, Caller, fails


class Thing(Object):
    kind = "THING"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.log: list[str] = []

    def destroy(self) -> None:
        assert not self.context.world.lock.locked()
        self.log.append("destroy")

    def pre_destroy(self) -> None:
        self.log.append("pre_destroy")


class Other(Object):
    kind = "OTHER"


@pytest.fixture
def context() -> Context:
    return Context(World())


def new(context: Context) -> Thing:
    thing = context.objects.reserve(Thing(context))
    context.objects.publish(thing)
    return thing


class TestNumbers:
    """core 2.1."""

    @given(st.lists(st.integers(0, 9), max_size=60))
    def test_always_the_lowest_free(self, steps: list[int]) -> None:
        context = Context(World())
        live: dict[int, Thing] = {}
        for step in steps:
            if step < 6 or not live:
                thing = new(context)
                assert thing.id == next(n for n in range(1, 100) if n not in live)
                live[thing.id] = thing
            else:
                number = random.Random(step * 7 + len(live)).choice(sorted(live))
                context.objects.destroy(number)
                del live[number]

    def test_a_failed_creation_gives_its_number_back(self, context: Context) -> None:
        assert new(context).id == 1
        half = context.objects.reserve(Thing(context))
        assert half.id == 2
        assert context.objects.reserve(Thing(context)).id == 3  # a concurrent creator sees the gap
        context.objects.abort(half)
        assert half.log == ["destroy"]
        assert new(context).id == 2

    def test_full_table_is_ebusy(self, context: Context) -> None:
        new(context)
        context.objects._next = MAX_ID + 1
        assert str(MAX_ID) in fails(errno.EBUSY, lambda: context.objects.reserve(Thing(context)))


class TestStates:
    """core 2.2."""

    def test_reserved(self, context: Context) -> None:
        thing = context.objects.reserve(Thing(context))
        fails(errno.ENOENT, lambda: context.objects.get(thing.id))
        fails(errno.ENOENT, lambda: context.objects.destroy(thing.id))
        assert len(context.objects) == 1

    def test_published_and_wrong_type(self, context: Context) -> None:
        thing = new(context)
        assert context.objects.get(thing.id) is thing
        assert context.objects.get(thing.id, Other, Thing) is thing
        assert "THING" in fails(errno.ENOENT, lambda: context.objects.get(thing.id, Other))
        fails(errno.ENOENT, lambda: context.objects.get(0))
        fails(errno.ENOENT, lambda: context.objects.get(77, Thing))

    def test_tombstone(self, context: Context) -> None:
        thing = new(context)
        context.objects.entomb(thing)
        fails(errno.ENOENT, lambda: context.objects.get(thing.id))
        fails(errno.ENOENT, lambda: context.objects.destroy(thing.id))
        assert thing.log == ["destroy"]
        assert (len(context.objects), context.objects.tombstones) == (1, 1)
        assert new(context).id == 2
        context.put()
        assert len(context.objects) == 0


class TestDestroy:
    """core 2.5."""

    def test_row_1_and_2(self, context: Context) -> None:  # core-2.5-1, core-2.5-2, core-2.5-5
        thing = new(context)
        fails(errno.ENOENT, lambda: context.objects.destroy(0))
        context.objects.get(thing.id)
        assert "1 time" in fails(errno.EBUSY, lambda: context.objects.destroy(thing.id))
        context.objects.put(thing)
        context.objects.destroy(thing.id)
        assert thing.log == ["destroy"]
        fails(errno.ENOENT, lambda: context.objects.destroy(thing.id))

    def test_row_4_waits_for_stragglers(self, context: Context) -> None:  # core-2.5-4
        thing = new(context)
        context.objects.get(thing.id)
        thing.users -= 1  # a link that dropped users but not yet wait
        job = Background(lambda: context.objects.destroy(thing.id))
        assert new(context).id in (1, 2)  # row 3: the number may be free already
        thing.users += 1
        context.objects.put(thing)
        job.result()
        assert thing.log == ["destroy"]

    def test_one_of_two_destroys_wins(self, context: Context) -> None:
        """core 9."""
        for _ in range(50):
            thing = new(context)
            results: list[int] = []

            def destroy(number: int = thing.id, into: list[int] = results) -> None:
                try:
                    context.objects.destroy(number)
                    into.append(0)
                except KernelError as error:
                    into.append(error.errno)

            threads = [threading.Thread(target=destroy) for _ in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert sorted(results) == [0, errno.ENOENT]

    def test_automatic_objects_go_when_idle(self, context: Context) -> None:
        """core 2.7."""
        thing = new(context)
        context.objects.get(thing.id)
        assert not context.objects.destroy_if_idle(thing)
        context.objects.put(thing)
        assert context.objects.destroy_if_idle(thing)
        assert not context.objects.destroy_if_idle(thing)


class TestDriverRemoval:
    """core 2.6."""

    def test_idle(self, context: Context) -> None:
        thing = new(context)
        thing.users += 1  # the driver's
        context.objects.remove_by_driver(thing)
        assert thing.log == ["destroy"]
        assert len(context.objects) == 0

    def test_runs_pre_destroy_and_waits(self, context: Context) -> None:
        thing = new(context)
        thing.users += 1
        context.objects.get(thing.id)
        job = Background(lambda: context.objects.remove_by_driver(thing))
        while "pre_destroy" not in thing.log:
            assert job.running
        assert job.running
        context.objects.put(thing)
        job.result()
        assert thing.log == ["pre_destroy", "destroy"]


class TestTeardown:
    """core 2.8."""

    def test_leaves_first(self, context: Context) -> None:
        order: list[int] = []

        class Node(Object):
            kind = "NODE"
            parent: Node | None = None

            def destroy(self) -> None:
                order.append(self.id)
                if self.parent is not None:
                    self.parent.users -= 1

        nodes: list[Node] = []
        for parent in (None, 0, 1, 0):
            node = context.objects.reserve(Node(context))
            context.objects.publish(node)
            if parent is not None:
                node.parent = nodes[parent]
                node.parent.users += 1
            nodes.append(node)
        context.put()
        assert order == [3, 4, 2, 1]  # ascending passes over those that nothing holds

    def test_close_releases_memory(self) -> None:
        c = Caller()
        ioas = c.ioas()
        c.map(ioas, 0, 0x4000)
        c.add_domain(ioas)
        assert c.pinned_vm == 4
        table = c.table(ioas)
        table.remove_domain(table.domains[0])
        c.context.put()
        c.quiet()


def test_destroy_of_an_ioas_with_mappings() -> None:
    """core 2.4: mappings alone do not block."""
    c = Caller()
    ioas = c.ioas()
    c.map(ioas, 0, 0x4000)
    c.do(u.iommu_destroy(id=ioas))
    c.refuses(errno.ENOENT, u.iommu_destroy(id=ioas))
    assert c.ioas() == ioas


def test_access_cannot_be_destroyed_by_the_user() -> None:
    """core 2.4."""
    c = Caller()
    ioas = c.ioas()
    access = c.access(ioas)
    assert access.id == 2
    c.refuses(errno.EBUSY, u.iommu_destroy(id=access.id))
    c.refuses(errno.EBUSY, u.iommu_destroy(id=ioas))
    access.destroy_access()
    c.do(u.iommu_destroy(id=ioas))
