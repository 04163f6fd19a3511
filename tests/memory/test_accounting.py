"""Pinned-page accounting: core 6 by its tables, and the quirks of core 4.13."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys

import pytest

from iommufd.errors import KernelError
from iommufd.memory.accounting import (
    Mode,
    Process,
    User,
    charge,
    memlock_of,
    must_move,
    over_limit,
    shown_kb,
    uncharge,
)
from iommufd.memory.physical import Physical
from iommufd.memory.space import AddressSpace
from tests.memory.fake_host import FakeHost

P = 4096


class Rig:
    """A process of user 1000 that may lock 10 pages."""

    def __init__(self, user: User | None = None, limit: int | None = 10 * P) -> None:
        self.host = FakeHost()
        self.space = AddressSpace(Physical(), self.host)
        self.user = user or User(1000)
        self.limit = limit
        self.process = Process(4242, self.user, self.space, limit=lambda tgid: self.limit)

    def charge(self, mode: Mode, pages: int) -> None:
        charge(mode, self.process, self.user, self.space, pages)

    def uncharge(self, mode: Mode, pages: int, *, although_gone: bool = False) -> bool:
        return uncharge(mode, self.process, self.user, self.space, pages, although_gone=although_gone)

    def fails(self, mode: Mode, pages: int, number: int = errno.ENOMEM) -> str:
        before = self.counters()
        with pytest.raises(KernelError) as caught:
            self.charge(mode, pages)
        assert caught.value.errno == number
        assert self.counters() == before
        return caught.value.why

    def counters(self) -> tuple[int, int, int]:
        return self.user.locked_pages, self.space.locked_vm, self.space.pinned_vm


@pytest.mark.parametrize(
    ("charged", "new", "limit", "over"),
    [
        (0, 10, 10 * P, False),
        (0, 11, 10 * P, True),
        (4, 7, 10 * P, True),
        (4, 6, 10 * P, False),
        (0, 1, P - 1, True),  # the limit is rounded down to pages
        (0, 1, 0, True),
        (0, 0, 0, False),
        (2**40, 2**40, None, False),  # infinite
    ],
)
def test_core_6_1_limit(charged: int, new: int, limit: int | None, over: bool) -> None:
    assert over_limit(charged, new, limit) is over


def test_core_6_1_mode_none() -> None:
    rig = Rig()
    rig.charge(Mode.NONE, 1000)
    assert rig.counters() == (0, 0, 1000)
    assert rig.uncharge(Mode.NONE, 1000)
    assert rig.counters() == (0, 0, 0)


def test_core_6_1_mode_user() -> None:
    rig = Rig()
    rig.charge(Mode.USER, 7)
    assert rig.counters() == (7, 0, 7)
    assert "uid 1000 has 7 locked pages and 4 more exceed RLIMIT_MEMLOCK of 10 pages" in rig.fails(Mode.USER, 4)
    rig.charge(Mode.USER, 3)
    assert rig.uncharge(Mode.USER, 10)
    assert rig.counters() == (0, 0, 0)


def test_core_6_1_mode_user_counts_all_processes_of_the_user() -> None:
    first = Rig()
    second = Rig(first.user)
    first.charge(Mode.USER, 7)
    second.fails(Mode.USER, 4)
    second.charge(Mode.USER, 3)
    assert (first.space.pinned_vm, second.space.pinned_vm) == (7, 3)


def test_core_6_1_mode_mm() -> None:
    rig = Rig()
    rig.charge(Mode.MM, 7)
    assert rig.counters() == (0, 7, 7)
    rig.fails(Mode.MM, 4)
    rig.charge(Mode.MM, 3)
    assert rig.uncharge(Mode.MM, 10)
    assert rig.counters() == (0, 0, 0)


def test_core_6_1_mode_mm_counts_what_the_process_locked_itself() -> None:
    rig = Rig()
    rig.host.locked = 5
    rig.fails(Mode.MM, 6)
    rig.charge(Mode.MM, 5)
    assert rig.space.locked_vm == 5


def test_core_6_2_the_limit_is_read_at_that_moment() -> None:
    rig = Rig()
    rig.charge(Mode.USER, 10)
    rig.fails(Mode.USER, 1)
    rig.limit = 11 * P
    rig.charge(Mode.USER, 1)
    rig.limit = 0
    rig.fails(Mode.USER, 1)
    rig.limit = None
    rig.charge(Mode.USER, 10**9)


def test_core_6_2_after_the_mappers_exit() -> None:
    """USER is released at unpin, MM silently not at all."""
    user, mm = Rig(), Rig()
    user.charge(Mode.USER, 4)
    mm.charge(Mode.MM, 4)
    for rig in (user, mm):
        rig.space.gone()
    assert user.uncharge(Mode.USER, 4)
    assert user.user.locked_pages == 0
    assert not mm.uncharge(Mode.MM, 4)
    assert mm.counters() == (0, 4, 4)
    mm.fails(Mode.MM, 7)
    mm.charge(Mode.MM, 6)
    assert mm.uncharge(Mode.MM, 1, although_gone=True)
    assert mm.counters() == (0, 9, 9)


def test_core_4_13_which_charges_move() -> None:
    a, b = Rig(), Rig()
    same_user = Rig(a.user)
    for mode, moves in ((Mode.NONE, False), (Mode.USER, True), (Mode.MM, True)):
        assert must_move(mode, a.user, a.space, b.user, b.space) is moves
        assert must_move(mode, a.user, a.space, same_user.user, same_user.space) is moves
        assert not must_move(mode, a.user, a.space, a.user, a.space)
    assert must_move(Mode.USER, a.user, a.space, b.user, a.space)  # another user in one mm
    assert not must_move(Mode.MM, a.user, a.space, b.user, a.space)


def test_core_4_13_charge_before_uncharge() -> None:
    """Same user, other process: both must fit under the limit for a moment."""
    old = Rig()
    new = Rig(old.user)
    old.charge(Mode.USER, 6)
    new.fails(Mode.USER, 6)
    new.limit = 12 * P
    new.charge(Mode.USER, 6)
    assert old.uncharge(Mode.USER, 6)
    assert (old.counters(), new.counters()) == ((6, 0, 0), (6, 0, 6))


def test_core_4_13_a_counter_below_zero_is_shown_as_a_huge_number() -> None:
    rig = Rig()
    rig.uncharge(Mode.NONE, 3)
    assert rig.space.pinned_vm == -3
    assert shown_kb(rig.space.pinned_vm) == 2**64 - 12
    assert shown_kb(5) == 20


def test_limits_of_real_processes() -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    assert memlock_of(os.getpid()) == (None if soft == resource.RLIM_INFINITY else soft)
    script = "import resource as r; r.setrlimit(r.RLIMIT_MEMLOCK, (8192, 8192)); print(flush=True); input()"
    child = subprocess.Popen([sys.executable, "-S", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    process = Process(child.pid, User(1), AddressSpace(Physical(), FakeHost()))
    assert process.memlock_limit() == 8192
    child.communicate(b"\n")
    assert process.memlock_limit() == 8192  # as last seen
    with pytest.raises(OSError, match="No such process"):
        memlock_of(child.pid)


def test_limits_read_from_proc_when_prlimit_is_not_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = memlock_of(os.getpid())

    def refuse(pid: int, what: int) -> tuple[int, int]:
        raise PermissionError(errno.EPERM, "no")

    monkeypatch.setattr(resource, "prlimit", refuse)
    assert memlock_of(os.getpid()) == expected
