"""engine/ledger.py, and with it core 10: whatever is made to fail, everything is as it was."""

from __future__ import annotations

import ast
import errno
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import iommufd
from iommufd.engine import failpoints
from iommufd.engine.fail import POINTS, sweep
from iommufd.engine.ledger import Ledger, difference, take
from iommufd.errors import KernelError
from iommufd.memory.frames import PAGE_SIZE
from iommufd.uapi import iommufd as u
from tests.engine.fakes import BUFFER, Caller, FakeFile, copy_struct, map_struct

if TYPE_CHECKING:
    pass

A = 0x1000000


def _ledger(caller: Caller) -> Ledger:
    return take(caller.world, [caller.context], [caller.proc.process])


def _sweep(caller: Caller, step: Callable[[], object]) -> list[str]:
    """Makes every point on the way of ``step`` fail in turn; the errnos. What failed must have changed nothing."""
    errnos = []
    for shot in sweep(caller.world):
        before = _ledger(caller)
        failure: KernelError | None = None
        try:
            step()
        except KernelError as error:
            failure = error
        assert shot.fired == (failure is not None), f"point {shot.nth}: {failure}"
        if failure is not None:
            assert difference(before, _ledger(caller)) == [], f"point {shot.nth}: {failure}"
            errnos.append(errno.errorcode[failure.errno])
    return errnos


# --- the ledger itself


def test_nothing_done_nothing_owed() -> None:
    caller = Caller()
    before = _ledger(caller)
    ioas = caller.ioas()
    caller.add_domain(ioas)
    caller.map(ioas, A, 4 * PAGE_SIZE)
    assert difference(before, _ledger(caller)) != []
    caller.do(u.iommu_destroy(id=ioas))
    assert difference(before, _ledger(caller)) == []


def test_every_debt_is_seen() -> None:
    caller = Caller()
    ioas = caller.ioas()
    steps: list[tuple[Callable[[], object], str]] = [
        (lambda: caller.add_domain(ioas), "domains: 0 became 1"),
        (lambda: caller.map(ioas, A, PAGE_SIZE), "areas: [] became"),
        (
            lambda: caller.map(ioas, A + PAGE_SIZE, PAGE_SIZE, va=BUFFER + PAGE_SIZE),
            "locked pages of uid 1000: 1 became 2",
        ),
        (lambda: caller.table(ioas).reserve(0, 5, None), "reserved"),
        (lambda: caller.access(ioas), "accesses: [] became [0]"),
        (lambda: caller.ioas(), "ids in use: 2 became 3"),
    ]
    for step, sentence in steps:
        before = _ledger(caller)
        step()
        assert any(sentence in found for found in difference(before, _ledger(caller))), sentence


def test_the_order_of_entries_does_not_matter() -> None:
    assert difference({"a": 1, "b": 2}, {"b": 2, "a": 1}) == []
    assert difference({"a": 1}, {"b": 2}) == ["a: 1 became nothing", "b: nothing became 2"]


# --- the points


def _asked_points() -> dict[str, list[str]]:
    """Every constant of failpoints that some module asks, with the modules."""
    names = {name: value for name, value in vars(failpoints).items() if name.isupper()}
    asked: dict[str, list[str]] = {}
    for path in Path(iommufd.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
                continue
            if node.func.attr in ("fail", "failpoint") and isinstance(node.args[0], ast.Name):
                name = node.args[0].id
                if name in names:  # Pending.fail takes something else
                    asked.setdefault(names[name], []).append(path.name)
    return asked


def test_core_10_every_point_is_asked_somewhere_and_no_other() -> None:
    assert set(_asked_points()) == set(POINTS)


# --- core 10: what each command meets on its way, in the order seen on a 7.3.4 kernel (mock-device 10)


@pytest.fixture
def caller() -> Caller:
    return Caller()


def test_core_10_map_with_a_domain(caller: Caller) -> None:
    ioas = caller.ioas()
    caller.add_domain(ioas)
    met = _sweep(caller, lambda: caller.map(ioas, A, PAGE_SIZE))
    assert met == ["ENOENT", "ENOMEM", "ENOMEM", "EFAULT", "ENOMEM"]


def test_core_10_map_without_a_domain(caller: Caller) -> None:
    ioas = caller.ioas()
    assert _sweep(caller, lambda: caller.map(ioas, A, PAGE_SIZE)) == ["ENOENT"]


def test_core_10_unmap(caller: Caller) -> None:
    ioas = caller.ioas()
    caller.add_domain(ioas)
    caller.map(ioas, A, PAGE_SIZE)
    assert _sweep(caller, lambda: caller.unmap(ioas, A, PAGE_SIZE)) == ["ENOENT"]
    caller.quiet()


def test_core_10_points_that_are_not_asked(caller: Caller) -> None:
    """DESTROY looks nothing up, and releasing never fails."""
    ioas = caller.ioas()
    caller.add_domain(ioas)
    caller.map(ioas, A, PAGE_SIZE)
    assert _sweep(caller, lambda: caller.do(u.iommu_destroy(id=ioas))) == []
    caller.quiet()


def test_core_10_copy(caller: Caller) -> None:
    source, target = caller.ioas(), caller.ioas()
    caller.add_domain(target)
    caller.map(source, A, 4 * PAGE_SIZE)
    caller.map(source, A + 4 * PAGE_SIZE, 4 * PAGE_SIZE, va=BUFFER + 16 * PAGE_SIZE)
    met = _sweep(caller, lambda: caller.do(copy_struct(target, source, A, 8 * PAGE_SIZE, A)))
    assert met[:2] == ["ENOENT", "ENOENT"]
    assert met.count("EFAULT") == 2  # each area pins


def test_core_10_map_file(caller: Caller) -> None:
    ioas = caller.ioas()
    caller.add_domain(ioas)
    caller.proc.files[77] = lambda: FakeFile(caller.world, 16)
    step = u.iommu_ioas_map_file(flags=7, ioas_id=ioas, fd=77, length=4 * PAGE_SIZE, iova=A)
    met = _sweep(caller, lambda: caller.do(step))
    assert met == ["ENOENT", "ENOMEM", "ENOMEM", "EFAULT", "ENOMEM"]


def test_core_10_adding_a_domain_to_many_areas(caller: Caller) -> None:
    ioas = caller.ioas()
    for i in range(5):
        caller.map(ioas, A + i * 16 * PAGE_SIZE, 3 * PAGE_SIZE, va=BUFFER + i * 8 * PAGE_SIZE)
    met = _sweep(caller, lambda: caller.add_domain(ioas))
    assert met == ["ENOMEM", "ENOMEM", "EFAULT", "ENOMEM"] * 5


def test_core_10_a_second_domain_pins_nothing_and_charges_nothing(caller: Caller) -> None:
    ioas = caller.ioas()
    caller.add_domain(ioas)
    caller.map(ioas, A, 4 * PAGE_SIZE)
    assert "EFAULT" not in _sweep(caller, lambda: caller.add_domain(ioas))


def test_core_10_pinning_through_an_access(caller: Caller) -> None:
    ioas = caller.ioas()
    caller.map(ioas, A, 4 * PAGE_SIZE)
    access = caller.access(ioas)
    task = caller.proc.task()
    met = _sweep(caller, lambda: access.pin_pages(A, 4 * PAGE_SIZE, write=True, task=task))
    assert met == ["EFAULT", "EINVAL", "ENOMEM"]
    access.unpin_pages(A, 4 * PAGE_SIZE)
    caller.quiet()


def test_core_10_slab_failures_come_when_asked_for(caller: Caller) -> None:
    caller.world.injector.configure(caller.world.injector.failslab, ignore_gfp_wait=False)
    ioas = caller.ioas()
    caller.add_domain(ioas)
    met = _sweep(caller, lambda: caller.map(ioas, A, PAGE_SIZE))
    assert len(met) > 5
    assert set(met) == {"ENOENT", "ENOMEM", "EFAULT"}


def test_core_10_changing_nothing_of_what_others_have(caller: Caller) -> None:
    """A failed map next to, and sharing pages with, one that is there."""
    ioas = caller.ioas()
    caller.add_domain(ioas)
    caller.map(ioas, A, 8 * PAGE_SIZE)
    other = map_struct(ioas, A + 64 * PAGE_SIZE, 8 * PAGE_SIZE, BUFFER + 4 * PAGE_SIZE)
    _sweep(caller, lambda: caller.do(other))
    assert caller.areas(ioas) == [(A, A + 8 * PAGE_SIZE - 1), (A + 64 * PAGE_SIZE, A + 72 * PAGE_SIZE - 1)]
    caller.unmap(ioas, 0, 2**64 - 1)
    caller.quiet()
