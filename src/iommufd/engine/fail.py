"""Fault injection (kernel: the fault attribute ``fail_iommufd`` and the per-task counter ``fail-nth``).

The engine asks ``World.failpoint(name, task)`` at each point of core 10; an :class:`Injector` answers. Three ways to
make it say yes, the first as in the kernel (Documentation/fault-injection):

* ``fail-nth``: the N-th point the *task* passes fails, once; the counter reads back what is left, 0 when it has
  fired. It takes precedence over the other two;
* the attribute's ``probability``, ``interval``, ``times``, ``space`` and task filter, for every task;
* rules (``iommufd run --fail 'IOAS_MAP:nth=3:ENOMEM'``): a whole command, or one point inside it, by count.

Invariants: nobody injects -> ``World.fail`` and ``World.fail_call`` are None and a point costs one test. Points are
asked while engine state is being changed, so the Injector has a lock of its own, takes no other, and touches no
memory of the caller. A counter belongs to a task, not to its number: when the number is used again by another task it
reads 0.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from iommufd.errors import KernelError

if TYPE_CHECKING:
    from random import Random

    from iommufd.engine.task import Task
    from iommufd.engine.world import World

POINTS: dict[str, int] = {
    "object lookup": errno.ENOENT,  # every lookup by ID but DESTROY's
    "scratch memory": errno.ENOMEM,  # each temporary array of the fill and pin paths
    "pin": errno.EFAULT,  # each pin call from the source
    "store pfns": errno.EINVAL,  # copying PFNs into the pages object's store, at half of the range
    "charge": errno.ENOMEM,  # each increase of the pinned-page charge
    "remote copy": errno.EINVAL,  # single-page copy of an access in another process's memory
    "reserved regions": errno.EINVAL,  # applying a device's reserved regions at attach
    "slab": errno.ENOMEM,  # allocating an object; only counted when failslab/ignore-gfp-wait is N
}
"""The points of core 10 and what each of them then returns (before an ioctl translates it)."""

NO_LIMIT = -1
MAX_NTH = 2**32 - 1


@dataclass(slots=True)
class FaultAttr:
    """One directory of debugfs: the knobs of Documentation/fault-injection, with the values a kernel boots with.

    ``probability`` in percent, ``times`` -1 without limit, ``space`` a budget that must be used up first.
    ``ignore_gfp_wait`` and ``cache_filter`` exist for failslab only."""

    name: str
    probability: int = 0
    interval: int = 1
    times: int = 1
    space: int = 0
    verbose: int = 2
    verbose_ratelimit_burst: int = 10
    verbose_ratelimit_interval_ms: int = 0
    task_filter: bool = False
    ignore_gfp_wait: bool = True
    cache_filter: bool = False
    seen: int = 0  # calls since boot that reached the interval test

    def should_fail(self, chance: Callable[[], float]) -> bool:
        """Whether this call fails; ``chance`` gives a random number of [0, 100). Changes ``space``, ``times`` and
        ``seen``."""
        if self.probability == 0 or self.times == 0:
            return False
        if self.space > 1:  # each call costs 1
            self.space -= 1
            return False
        if self.interval > 1:
            self.seen += 1
            if self.seen % self.interval:
                return False
        if self.probability <= chance():
            return False
        if self.times != NO_LIMIT:
            self.times -= 1
        return True


GRAMMAR = "a rule is COMMAND[:nth=N][:every=N][:times=N][:point=NAME][:ERRNO]"


class RuleError(ValueError):
    """A rule that cannot be understood; the message says which part and what is possible."""


@dataclass(slots=True)
class Rule:
    """One ``--fail`` rule. Without ``point`` the command itself fails with ``number``, after the central checks and
    before it does anything; with ``point`` that point fails when a ``command`` passes it, and the command answers as
    it then does.

    ``nth`` and ``every`` count matching occurrences, machine-wide: the rule hits occurrence ``nth`` and, with
    ``every``, each ``every``-th after it; at most ``times`` times (-1: no limit)."""

    command: str  # "*": any
    point: str | None = None
    number: int = errno.ENOMEM
    nth: int = 1
    every: int = 0
    times: int = 1
    count: int = 0
    hits: int = 0

    def occurs(self) -> bool:
        """One more matching occurrence; whether it is to fail."""
        self.count += 1
        if self.times != NO_LIMIT and self.hits >= self.times:
            return False
        beyond = self.count - self.nth
        if beyond == 0 or (beyond > 0 and self.every and beyond % self.every == 0):
            self.hits += 1
            return True
        return False


def full_name(command: str) -> str:
    """``IOAS_MAP`` as ``IOMMU_IOAS_MAP``; names that carry their prefix, and ``*``, stay."""
    return command if command == "*" or command.startswith(("IOMMU_", "VFIO_")) else f"IOMMU_{command}"


def parse_rule(text: str) -> Rule:
    """``COMMAND[:KEY=VALUE...][:ERRNO]`` with the keys ``nth``, ``every``, ``times`` and ``point``; RuleError
    otherwise.

    ``IOAS_MAP:nth=3:ENOMEM``: the third IOAS_MAP answers ENOMEM. ``IOAS_MAP:point=pin:nth=2``: the second pin made by
    any IOAS_MAP fails. ``*:every=10:times=-1:EFAULT``: every tenth command of all. Without ``nth`` counting starts
    with the first (with ``every`` alone: with the ``every``-th); ``times`` is 1, or unlimited when ``every`` is
    given; the errno is ENOMEM."""
    command, *parts = text.split(":")
    if not command:
        raise RuleError(f"{text!r} names no command; {GRAMMAR}")
    rule = Rule(full_name(command))
    given: set[str] = set()
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals:
            key, value = "errno", part
        if key in given:
            raise RuleError(f"{text!r} gives {key} twice")
        given.add(key)
        if key == "errno":
            number = getattr(errno, value, None) if value.isidentifier() else None
            if not isinstance(number, int):
                raise RuleError(f"{value!r} in {text!r} is neither KEY=VALUE nor the name of an errno")
            rule.number = number
        elif key == "point":
            if value not in POINTS:
                raise RuleError(f"there is no point {value!r}; there are: {', '.join(POINTS)}")
            rule.point = value
        elif key in ("nth", "every", "times"):
            try:
                count = int(value, 0)
            except ValueError:
                raise RuleError(f"{key} in {text!r} wants a number, not {value!r}") from None
            if count < 1 and not (key == "times" and count == NO_LIMIT):
                raise RuleError(f"{key} in {text!r} must be at least 1")
            setattr(rule, key, count)
        else:
            raise RuleError(f"there is no key {key!r} in a rule; there are: nth, every, times, point")
    if rule.point is not None:
        if "errno" in given and rule.number != POINTS[rule.point]:
            fixed = errno.errorcode[POINTS[rule.point]]
            raise RuleError(f"the point {rule.point!r} always fails with {fixed}; leave the errno of {text!r} out")
        rule.number = POINTS[rule.point]
    if rule.every:
        if "nth" not in given:
            rule.nth = rule.every
        if "times" not in given:
            rule.times = NO_LIMIT
    return rule


def _known_commands() -> set[str]:
    """Every ioctl a rule may name. Imported when wanted: rules are rare."""
    from iommufd.uapi.commands import COMMANDS
    from iommufd.uapi.vfio.commands import CONTAINER, DEVICE, GROUP

    return {command.name for table in (COMMANDS, CONTAINER, GROUP, DEVICE) for command in table}


@dataclass(slots=True)
class _Nth:
    left: int
    birth: int | None  # which task had the number, see birth_of


@dataclass(slots=True)
class Hit:
    """One injected failure: the point (None: the whole command), the command it happened in, the task's number."""

    point: str | None
    command: str | None
    tid: int | None


def birth_of(tid: int) -> int | None:
    """When the task ``tid`` was started (field 22 of /proc/TID/stat, clock ticks), which tells it from a later one
    with the same number; None when there is no such task on this host."""
    try:
        with open(f"/proc/{tid}/stat", "rb") as stat:
            return int(stat.read().rpartition(b")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return None


@dataclass(slots=True)
class Injector:
    """Who fails what in one World. ``hits`` lists what was injected, oldest first, up to :attr:`MEMORY` entries."""

    world: World
    fail_iommufd: FaultAttr = field(default_factory=lambda: FaultAttr("fail_iommufd"))
    failslab: FaultAttr = field(default_factory=lambda: FaultAttr("failslab"))
    rules: list[Rule] = field(default_factory=list)
    hits: list[Hit] = field(default_factory=list)
    _random: Random | None = None
    _nth: dict[int, _Nth] = field(default_factory=dict)
    _filtered: dict[int, int | None] = field(default_factory=dict)  # tasks with make-it-fail set, by number
    _commands: dict[int, str] = field(default_factory=dict)  # the command a task is in, while there are rules
    _lock: threading.Lock = field(default_factory=threading.Lock)

    MEMORY = 10_000

    # --- setting it up

    def arm(self, tid: int, nth: int) -> None:
        """``fail-nth`` of the task ``tid``: its ``nth``-th point from now on fails; 0 disarms. 0 <= nth < 2**32."""
        if not 0 <= nth <= MAX_NTH:
            raise ValueError(f"fail-nth is 0 to {MAX_NTH}, not {nth}")
        with self._lock:
            if nth:
                self._nth[tid] = _Nth(nth, birth_of(tid))
            else:
                self._nth.pop(tid, None)
            self._refresh()

    def remaining(self, tid: int) -> int:
        """What ``fail-nth`` of the task reads: points left until one fails; 0 when it has fired or was never armed."""
        with self._lock:
            armed = self._armed(tid)
            return 0 if armed is None else armed.left

    def filter(self, tid: int, on: bool) -> None:
        """``make-it-fail`` of the task ``tid``."""
        with self._lock:
            if on:
                self._filtered[tid] = birth_of(tid)
            else:
                self._filtered.pop(tid, None)

    def filtered(self, tid: int) -> bool:
        """Whether ``make-it-fail`` is set for the task (its own; a child inherits, see :meth:`_passes_filter`)."""
        with self._lock:
            return tid in self._filtered and self._filtered[tid] == birth_of(tid)

    def add_rule(self, rule: Rule | str) -> Rule:
        """One more rule, parsed if it is text. RuleError for a command that does not exist: it would never fire."""
        made = parse_rule(rule) if isinstance(rule, str) else rule
        if made.command != "*" and made.command not in _known_commands():
            raise RuleError(f"there is no command {made.command!r}")
        with self._lock:
            self.rules.append(made)
            self._refresh()
        return made

    def remove_rule(self, rule: Rule) -> None:
        """Calls no longer fail by ``rule``."""
        with self._lock:
            self.rules[:] = [r for r in self.rules if r is not rule]
            self._refresh()

    def configure(self, attr: FaultAttr, **knobs: int | bool) -> None:
        """Sets knobs of one of the two attributes, by field name."""
        with self._lock:
            for name, value in knobs.items():
                setattr(attr, name, value)
            self._refresh()

    def _refresh(self) -> None:
        active = self._nth or self.rules or self.fail_iommufd.probability or self.failslab.probability
        self.world.fail = self.point if active else None
        self.world.fail_call = self.call if self.rules else None
        if not self.rules:
            self._commands.clear()

    # --- being asked

    def call(self, command: str, task: Task) -> None:
        """``task`` starts ``command`` (its full name): KernelError when a rule makes the whole command fail."""
        with self._lock:
            self._commands[task.tid] = command
            meant = [rule for rule in self.rules if rule.point is None and rule.command in ("*", command)]
            hits = [rule for rule in meant if rule.occurs()]  # each of them counts the call
            if hits:
                self._note(None, command, task.tid)
                raise KernelError(hits[0].number, f"fault injection: occurrence {hits[0].count} of {hits[0].command}")

    def point(self, name: str, task: Task | None) -> bool:
        """Whether the point ``name`` fails now. ``task`` None: not on behalf of a caller, so no counter of a task
        applies."""
        with self._lock:
            attr = self.failslab if name == "slab" else self.fail_iommufd
            if name == "slab" and self.failslab.ignore_gfp_wait:
                return False  # the engine's allocations may all sleep
            tid = None if task is None else task.tid
            command = None if tid is None else self._commands.get(tid)
            fails = self._decide(name, attr, tid, command)
            if fails:
                self._note(name, command, tid)
            return fails

    def _decide(self, name: str, attr: FaultAttr, tid: int | None, command: str | None) -> bool:
        armed = None if tid is None else self._armed(tid)
        if armed is not None and tid is not None:  # precedence over the attribute
            armed.left -= 1
            if armed.left:
                return False
            del self._nth[tid]
            self._refresh()
            return True
        if (not attr.task_filter or self._passes_filter(tid)) and attr.should_fail(self._chance):
            return True
        hit = False
        for rule in self.rules:
            if rule.point == name and (rule.command == "*" or rule.command == command):
                hit |= rule.occurs()
        return hit

    def _chance(self) -> float:
        """0 to 100, from a generator with a fixed seed: a run with a probability can be repeated."""
        if self._random is None:
            from random import Random  # costs milliseconds that nobody but such a run should pay

            self._random = Random(0)
        return self._random.uniform(0, 100)

    def _armed(self, tid: int) -> _Nth | None:
        armed = self._nth.get(tid)
        if armed is None:
            return None
        if armed.birth != birth_of(tid):  # the number belongs to another task now, and a new task starts disarmed
            del self._nth[tid]
            self._refresh()
            return None
        return armed

    def _passes_filter(self, tid: int | None) -> bool:
        """make-it-fail of the task, or inherited: of its thread group or of an ancestor."""
        while tid:
            if tid in self._filtered and self._filtered[tid] == birth_of(tid):
                return True
            tid = _parent_of(tid)
        return False

    def _note(self, point: str | None, command: str | None, tid: int | None) -> None:
        if len(self.hits) < self.MEMORY:
            self.hits.append(Hit(point, command, tid))


def _parent_of(tid: int) -> int | None:
    """The thread group of a thread, the parent of a thread group; None at the top."""
    try:
        with open(f"/proc/{tid}/status", "rb") as status:
            fields = dict(line.split(b":\t", 1) for line in status.read().splitlines() if b":\t" in line)
    except OSError:
        return None
    group = int(fields[b"Tgid"])
    return group if group != tid else int(fields[b"PPid"])


# --- for Python


@dataclass(slots=True)
class Shot:
    """One armed ``fail-nth``: ``nth`` as armed; ``fired`` whether the point was reached and failed."""

    injector: Injector
    tid: int
    nth: int

    @property
    def fired(self) -> bool:
        """Whether the point that was to fail was reached."""
        return self.injector.remaining(self.tid) == 0


@contextmanager
def fail_nth(world: World, nth: int, *, tid: int | None = None) -> Iterator[Shot]:
    """The ``nth`` point passed by the task ``tid`` (default: the calling thread) inside the block fails.

    ``nth`` 0 injects nothing. The counter is gone after the block."""
    task = threading.get_native_id() if tid is None else tid
    shot = Shot(world.injector, task, nth)
    world.injector.arm(task, nth)
    try:
        yield shot
    finally:
        world.injector.arm(task, 0)


def sweep(world: World, *, tid: int | None = None, limit: int = 1000) -> Iterator[Shot]:
    """Fails the first point, then the second, and so on, until a round passes no armed point any more.

    The body of the loop is the call chain under test; the last round runs it without a failure. RuntimeError after
    ``limit`` rounds."""
    for nth in range(1, limit + 1):
        with fail_nth(world, nth, tid=tid) as shot:
            yield shot
            if not shot.fired:
                return
    raise RuntimeError(f"still failing after {limit} rounds: the call chain passes ever more points")


@contextmanager
def fail_rule(world: World, rule: Rule | str) -> Iterator[Rule]:
    """A ``--fail`` rule in force inside the block; the Rule counts ``count`` occurrences and ``hits``."""
    made = world.injector.add_rule(rule)
    try:
        yield made
    finally:
        world.injector.remove_rule(made)
