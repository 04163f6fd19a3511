"""engine/fail.py: the counters of Documentation/fault-injection, the attribute's knobs, and rules."""

from __future__ import annotations

import errno
import os
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from iommufd.engine.fail import FaultAttr, Injector, Rule, RuleError, fail_nth, fail_rule, parse_rule, sweep
from iommufd.engine.world import World
from iommufd.errors import KernelError

if TYPE_CHECKING:
    from iommufd.engine.task import Task

ME = threading.get_native_id


def _task(tid: int) -> Task:
    return cast("Task", SimpleNamespace(tid=tid))  # all that an injector looks at


@pytest.fixture
def world() -> World:
    made = World()
    made.injector = Injector(made)
    return made


def _asks(world: World, task: Task, count: int, point: str = "pin") -> str:
    """What ``count`` points answer: ``F`` failed, ``.`` did not."""
    return "".join("F" if world.fail is not None and world.fail(point, task) else "." for _ in range(count))


# --- fail-nth


def test_nobody_injects_costs_nothing(world: World) -> None:
    assert world.fail is None
    assert world.fail_call is None


@pytest.mark.parametrize(("nth", "answers"), [(1, "F....."), (3, "..F..."), (6, ".....F"), (7, "......")])
def test_fail_nth_fails_once(world: World, nth: int, answers: str) -> None:
    task = _task(ME())
    world.injector.arm(task.tid, nth)
    assert _asks(world, task, 6) == answers
    assert world.injector.remaining(task.tid) == max(0, nth - 6)


def test_fail_nth_counts_every_kind_of_point(world: World) -> None:
    task = _task(ME())
    world.injector.arm(task.tid, 3)
    answers = "".join(_asks(world, task, 1, p) for p in ("object lookup", "scratch memory", "pin", "charge"))
    assert answers == "..F."


def test_fail_nth_is_the_tasks_own(world: World) -> None:
    armed, other = _task(ME()), _task(os.getppid())
    world.injector.arm(armed.tid, 2)
    assert _asks(world, other, 5) == "....."
    assert world.injector.remaining(other.tid) == 0
    assert _asks(world, armed, 2) == ".F"


def test_fail_nth_ends_with_the_task(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    births = {4711: 100}
    monkeypatch.setattr("iommufd.engine.fail.birth_of", births.get)
    world.injector.arm(4711, 5)
    assert world.injector.remaining(4711) == 5
    births[4711] = 200  # the number was used again
    assert world.injector.remaining(4711) == 0
    assert world.fail is None


def test_writing_zero_disarms(world: World) -> None:
    world.injector.arm(ME(), 5)
    world.injector.arm(ME(), 0)
    assert world.fail is None


def test_a_point_without_a_caller_is_nobodys(world: World) -> None:
    world.injector.arm(ME(), 1)
    assert world.fail is not None
    assert not world.fail("pin", None)
    assert world.injector.remaining(ME()) == 1


def test_slab_counts_only_when_sleeping_allocations_may_fail(world: World) -> None:
    task = _task(ME())
    world.injector.arm(task.tid, 1)
    assert _asks(world, task, 3, "slab") == "..."
    world.injector.configure(world.injector.failslab, ignore_gfp_wait=False)
    assert _asks(world, task, 3, "slab") == "F.."


# --- the attribute, as the knobs of the real kernel were seen to act


@pytest.mark.parametrize(
    ("knobs", "answers", "times_left", "space_left"),
    [
        ({}, "FFFFFFFFFFFF", -1, 0),
        ({"times": 2}, "FF..........", 0, 0),
        ({"times": 0}, "............", 0, 0),
        ({"interval": 3}, "..F..F..F..F", -1, 0),
        ({"interval": 0}, "FFFFFFFFFFFF", -1, 0),
        ({"space": 1}, "FFFFFFFFFFFF", -1, 1),
        ({"space": 3}, "..FFFFFFFFFF", -1, 1),
        ({"space": -1}, "FFFFFFFFFFFF", -1, -1),
        ({"space": 3, "times": 1}, "..F.........", 0, 1),
        ({"space": 3, "interval": 2}, "...F.F.F.F.F", -1, 1),
        ({"times": -2}, "FFFFFFFFFFFF", -14, 0),
        ({"probability": 0}, "............", -1, 0),
    ],
)
def test_knobs(world: World, knobs: dict[str, int], answers: str, times_left: int, space_left: int) -> None:
    attr = world.injector.fail_iommufd
    world.injector.configure(attr, **{"probability": 100, "times": -1, **knobs})
    assert _asks(world, _task(ME()), 12) == answers
    assert (attr.times, attr.space) == (times_left, space_left)


def test_probability_is_a_percentage() -> None:
    attr = FaultAttr("x", probability=50, times=-1)
    chances = iter([0.0, 49.9, 50.0, 99.0])
    assert [attr.should_fail(lambda: next(chances)) for _ in range(4)] == [True, True, False, False]


def test_fail_nth_takes_precedence_over_the_attribute(world: World) -> None:
    world.injector.configure(world.injector.fail_iommufd, probability=100, times=-1)
    world.injector.arm(ME(), 3)
    assert _asks(world, _task(ME()), 6) == "..FFFF"


def test_task_filter(world: World) -> None:
    world.injector.configure(world.injector.fail_iommufd, probability=100, times=-1, task_filter=True)
    task = _task(ME())
    assert _asks(world, task, 2) == ".."
    world.injector.filter(task.tid, True)
    assert _asks(world, task, 2) == "FF"
    world.injector.filter(task.tid, False)
    assert _asks(world, task, 2) == ".."


def test_task_filter_is_inherited(world: World) -> None:
    world.injector.configure(world.injector.fail_iommufd, probability=100, times=-1, task_filter=True)
    world.injector.filter(os.getppid(), True)
    assert _asks(world, _task(os.getpid()), 2) == "FF"


# --- rules


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("IOAS_MAP:nth=3:ENOMEM", Rule("IOMMU_IOAS_MAP", nth=3)),
        ("IOMMU_IOAS_MAP", Rule("IOMMU_IOAS_MAP")),
        ("HWPT_ALLOC:EBUSY", Rule("IOMMU_HWPT_ALLOC", number=errno.EBUSY)),
        ("VFIO_IOMMU_MAP_DMA:EFAULT:nth=0x10", Rule("VFIO_IOMMU_MAP_DMA", number=errno.EFAULT, nth=16)),
        ("*:every=10:EINTR", Rule("*", number=errno.EINTR, nth=10, every=10, times=-1)),
        ("*:every=10:times=2", Rule("*", nth=10, every=10, times=2)),
        ("IOAS_MAP:nth=5:every=1", Rule("IOMMU_IOAS_MAP", nth=5, every=1, times=-1)),
        ("IOAS_MAP:point=pin:nth=2", Rule("IOMMU_IOAS_MAP", point="pin", number=errno.EFAULT, nth=2)),
        ("IOAS_MAP:point=pin:EFAULT", Rule("IOMMU_IOAS_MAP", point="pin", number=errno.EFAULT)),
    ],
)
def test_a_rule_is_read(text: str, rule: Rule) -> None:
    assert parse_rule(text) == rule


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "names no command"),
        (":nth=1", "names no command"),
        ("IOAS_MAP:ENOSUCH", "neither KEY=VALUE nor the name of an errno"),
        ("IOAS_MAP:nth=0", "at least 1"),
        ("IOAS_MAP:nth=-1", "at least 1"),
        ("IOAS_MAP:times=-2", "at least 1"),
        ("IOAS_MAP:nth=x", "wants a number"),
        ("IOAS_MAP:nth=1:nth=2", "gives nth twice"),
        ("IOAS_MAP:often=2", "no key 'often'"),
        ("IOAS_MAP:point=nowhere", "no point 'nowhere'"),
        ("IOAS_MAP:point=pin:ENOMEM", "always fails with EFAULT"),
        ("IOAS_MAP:errorcode", "neither KEY=VALUE nor the name of an errno"),
        ("IOAS_MAPP", "no command 'IOMMU_IOAS_MAPP'"),
    ],
)
def test_a_rule_is_refused(world: World, text: str, says: str) -> None:
    with pytest.raises(RuleError, match=says):
        world.injector.add_rule(text)
    assert world.fail_call is None


def _calls(world: World, task: Task, command: str, count: int) -> list[int]:
    """The errnos of ``count`` calls of ``command``; 0 where it may go on."""
    got = []
    for _ in range(count):
        try:
            if world.fail_call is not None:
                world.fail_call(command, task)
            got.append(0)
        except KernelError as error:
            got.append(error.errno)
    return got


def test_a_rule_fails_the_nth_call(world: World) -> None:
    with fail_rule(world, "IOAS_MAP:nth=3:EBUSY") as rule:
        assert _calls(world, _task(1), "IOMMU_IOAS_UNMAP", 3) == [0, 0, 0]
        assert _calls(world, _task(2), "IOMMU_IOAS_MAP", 5) == [0, 0, errno.EBUSY, 0, 0]
    assert (rule.count, rule.hits) == (5, 1)
    assert (world.fail, world.fail_call) == (None, None)


def test_a_rule_fails_every_nth_call(world: World) -> None:
    with fail_rule(world, "*:every=2:times=2:EINTR"):
        assert _calls(world, _task(1), "IOMMU_DESTROY", 8) == [0, errno.EINTR, 0, errno.EINTR, 0, 0, 0, 0]


def test_a_rule_fails_a_point_of_a_command(world: World) -> None:
    task = _task(ME())
    with fail_rule(world, "IOAS_MAP:point=pin:nth=2"):
        assert _calls(world, task, "IOMMU_IOAS_COPY", 1) == [0]
        assert _asks(world, task, 3) == "..."
        assert _calls(world, task, "IOMMU_IOAS_MAP", 1) == [0]
        assert _asks(world, task, 2, "charge") == ".."
        assert _asks(world, task, 4) == ".F.."
    assert [(h.point, h.command) for h in world.injector.hits] == [("pin", "IOMMU_IOAS_MAP")]


# --- Python


def test_the_block_disarms(world: World) -> None:
    with fail_nth(world, 100) as shot:
        assert _asks(world, _task(ME()), 4) == "...."
        assert not shot.fired
    assert world.fail is None


def test_a_sweep_visits_every_point_and_ends_clean(world: World) -> None:
    task = _task(ME())
    rounds = [(shot.nth, _asks(world, task, 3)) for shot in sweep(world)]
    assert rounds == [(1, "F.."), (2, ".F."), (3, "..F"), (4, "...")]


def test_a_sweep_of_an_endless_chain_gives_up(world: World) -> None:
    task = _task(ME())
    with pytest.raises(RuntimeError, match="after 5 rounds"):
        [_asks(world, task, shot.nth) for shot in sweep(world, limit=5)]
