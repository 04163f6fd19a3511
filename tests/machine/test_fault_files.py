"""machine/fault_files.py: what Linux 7.3 was seen to answer on fail-nth, make-it-fail and the knobs of debugfs."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from iommufd.engine.fail import Injector
from iommufd.engine.world import World
from iommufd.errors import KernelError
from iommufd.machine.fault_files import FailNth, Knob, MakeItFail, knobs, mount, parse_bool, parse_number
from iommufd.machine.text_file import TextFile

if TYPE_CHECKING:
    from collections.abc import Callable

    from iommufd.engine.task import Task
    from iommufd.machine.machine import Machine
    from iommufd.machine.node import Node


class _Memory:
    """A caller with 4 KiB at address 0."""

    def __init__(self) -> None:
        self.bytes = bytearray(4096)

    def read(self, addr: int, count: int) -> bytes:
        return bytes(self.bytes[addr : addr + count])

    def write(self, addr: int, data: bytes) -> None:
        self.bytes[addr : addr + len(data)] = data


def _read(file: TextFile, count: int = 100, pos: int | None = 0) -> bytes:
    memory = _Memory()
    done = file.read(cast("Task", memory), 0, count, pos)  # all that a read uses of a task
    return bytes(memory.bytes[:done])


def _write(file: TextFile, data: bytes, pos: int | None = 0) -> int:
    """Bytes taken, or minus the errno."""
    memory = _Memory()
    memory.write(0, data)
    try:
        done = file.write(cast("Task", memory), 0, len(data), pos)  # and a write
    except KernelError as error:
        return -error.errno
    assert isinstance(done, int)
    return done


@pytest.fixture
def injector() -> Injector:
    return Injector(World())


@pytest.fixture
def fail_nth(injector: Injector) -> FailNth:
    return FailNth(injector, threading.get_native_id(), "/proc/thread-self/fail-nth")


INVAL, RANGE = -errno.EINVAL, -errno.ERANGE

ORACLE_WRITES: list[tuple[bytes, int, bytes]] = [
    (b"5", 1, b"5\n"),
    (b"5\n", 2, b"5\n"),
    (b"5\n\n", INVAL, b"0\n"),
    (b" 5", INVAL, b"0\n"),
    (b"+5", 2, b"5\n"),
    (b"-1", INVAL, b"0\n"),
    (b"0x10", 4, b"16\n"),
    (b"010", 3, b"8\n"),
    (b"4294967295", 10, b"4294967295\n"),
    (b"4294967296", RANGE, b"0\n"),
    (b"", INVAL, b"0\n"),
    (b"abc", INVAL, b"0\n"),
    (b"7abc", INVAL, b"0\n"),
    (b"7\0", 2, b"7\n"),
    (b"7\0junk", 6, b"7\n"),
    (b"1" * 40, RANGE, b"0\n"),
    (b"0" * 33 + b"7", 34, b"7\n"),
    (b"0" * 34 + b"7", 35, b"0\n"),  # it looks at 34 bytes
    (b"\n", INVAL, b"0\n"),
    (b"0x", INVAL, b"0\n"),
]
"""Written, result, read back, as Linux 7.3.4 answered."""


@pytest.mark.parametrize(("data", "result", "then"), ORACLE_WRITES)
def test_fail_nth_takes_numbers_as_the_kernel_does(fail_nth: FailNth, data: bytes, result: int, then: bytes) -> None:
    assert _write(fail_nth, data) == result
    assert _read(fail_nth) == then


def test_fail_nth_is_read_by_position(fail_nth: FailNth) -> None:
    assert [_read(fail_nth, count, pos) for count, pos in ((1, 0), (5, 1), (5, 2), (5, 3))] == [b"0", b"\n", b"", b""]
    assert [_read(fail_nth, count, None) for count in (1, 9, 9)] == [b"0", b"\n", b""]


def test_fail_nth_is_written_at_any_position(fail_nth: FailNth) -> None:
    assert _write(fail_nth, b"9", 5) == 1
    assert _read(fail_nth) == b"9\n"


def test_the_file_means_the_task_it_was_opened_for(injector: Injector) -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        file = FailNth(injector, child.pid, "")
        assert _write(file, b"3") == 1
        assert injector.remaining(child.pid) == 3
        assert injector.remaining(threading.get_native_id()) == 0
    finally:
        child.kill()
        child.wait()
    with pytest.raises(KernelError) as caught:
        _read(file)
    assert caught.value.errno == errno.ESRCH
    assert _write(file, b"1") == -errno.ESRCH


@pytest.mark.parametrize(
    ("data", "result", "then"),
    [
        (b"1", 1, b"1\n"),
        (b"0", 1, b"0\n"),
        (b"2", INVAL, b"0\n"),
        (b"-1", INVAL, b"0\n"),
        (b"1\n", 2, b"1\n"),
        (b"Y", INVAL, b"0\n"),
        (b"0" * 11 + b"1", 12, b"1\n"),
        (b"0" * 12 + b"1", 13, b"0\n"),
    ],
)
def test_make_it_fail(injector: Injector, data: bytes, result: int, then: bytes) -> None:
    file = MakeItFail(injector, os.getpid(), "")
    assert _write(file, data) == result
    assert _read(file) == then


# --- debugfs

KNOBS = {
    "interval": b"1\n",
    "probability": b"0\n",
    "space": b"0\n",
    "task-filter": b"N\n",
    "times": b"1\n",
    "verbose": b"2\n",
    "verbose_ratelimit_burst": b"10\n",
    "verbose_ratelimit_interval_ms": b"0\n",
}
SLAB_KNOBS = {**KNOBS, "cache-filter": b"N\n", "ignore-gfp-wait": b"Y\n"}


def test_knobs_are_those_of_the_kernel(injector: Injector) -> None:
    for attr, wanted in ((injector.fail_iommufd, KNOBS), (injector.failslab, SLAB_KNOBS)):
        assert {file: _read(Knob(injector, attr, name, "")) for file, name in knobs(attr)} == wanted


@pytest.mark.parametrize(
    ("name", "data", "result", "then"),
    [
        ("probability", b"3\n", 2, b"3\n"),
        ("probability", b"-1", INVAL, b"0\n"),
        ("probability", b"x", INVAL, b"0\n"),
        ("probability", b"", INVAL, b"0\n"),
        ("probability", b"0x10", 4, b"16\n"),
        ("probability", b"99999999999", 11, b"99999999999\n"),
        ("verbose", b"0" * 22 + b"7", 23, b"7\n"),
        ("verbose", b"0" * 23 + b"7", 24, b"0\n"),
        ("times", b"-1", 2, b"-1\n"),
        ("times", b"99999999999", 11, b"1215752191\n"),
        ("space", b"-1", 2, b"-1\n"),
        ("verbose", b"-1", INVAL, b"2\n"),
        ("task_filter", b"3", 1, b"N\n"),
        ("task_filter", b"x", 1, b"N\n"),
        ("task_filter", b"", 0, b"N\n"),
        ("task_filter", b"Y", 1, b"Y\n"),
        ("task_filter", b"yes", 3, b"Y\n"),
        ("task_filter", b"0x10", 4, b"N\n"),
    ],
)
def test_a_knob_takes_what_the_kernels_does(
    injector: Injector, name: str, data: bytes, result: int, then: bytes
) -> None:
    knob = Knob(injector, injector.fail_iommufd, name, "")
    assert _write(knob, data) == result
    assert _read(knob) == then


def test_a_knob_acts(injector: Injector) -> None:
    _write(Knob(injector, injector.fail_iommufd, "probability", ""), b"100")
    assert injector.world.fail is not None
    assert injector.world.fail("pin", None)


def test_booleans() -> None:
    words = [b"on", b"OFF", b"t", b"1", b"n", b"F0", b"maybe", b""]
    assert [parse_bool(word) for word in words] == [True, False, True, True, False, False, None, None]


def test_numbers_outside_are_erange() -> None:
    with pytest.raises(KernelError) as caught:
        parse_number(b"-129", -128, 127, 10)
    assert caught.value.errno == errno.ERANGE


# --- where they are


class _Machine:
    def __init__(self, injector: Injector) -> None:
        self.world = SimpleNamespace(injector=injector)
        self.nodes: dict[str, Node] = {}
        self.claims: list[Callable[[str], Node | None]] = []

    def add_node(self, node: Node) -> None:
        self.nodes[node.path] = node

    def add_claim(self, claim: Callable[[str], Node | None]) -> None:
        self.claims.append(claim)


def test_the_files_are_where_programs_look(injector: Injector) -> None:
    machine = _Machine(injector)
    mount(cast("Machine", machine))  # all that mounting uses of one
    assert {"/sys/kernel/debug", "/sys/kernel/debug/fail_iommufd", "/sys/kernel/debug/failslab"} <= set(machine.nodes)
    node = machine.nodes["/sys/kernel/debug/failslab/ignore-gfp-wait"]
    assert node.opener is not None
    file = node.opener(None, 2)
    assert isinstance(file, TextFile)
    _write(file, b"N")
    assert not injector.failslab.ignore_gfp_wait

    (claim,) = machine.claims
    me = os.getpid()
    for path in (f"/proc/{me}/fail-nth", f"/proc/{me}/task/{me}/fail-nth", f"/proc/{me}/make-it-fail"):
        found = claim(path)
        assert found is not None
        assert found.path == path
    for path in (f"/proc/{me}/status", "/proc/self/fail-nth", f"/proc/{2**22 + 1}/fail-nth"):
        assert claim(path) is None
