"""engine/pages.py: who holds which page, against a model that counts each page by itself (core 5.1-5.4)."""

from __future__ import annotations

import errno
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from iommufd.engine.pages import Owner, Pages
from iommufd.errors import KernelError
from iommufd.memory.accounting import Mode
from iommufd.memory.extents import pfn_at, total, unpin_extents
from iommufd.memory.frames import Extents
from tests.engine.fakes import FakeProcess, make_world, pinned_frames

SIZE = 24
BASE = 0x100000
P = 4096


def make() -> tuple[FakeProcess, Pages]:
    proc = FakeProcess(make_world())
    proc.host.map(BASE, SIZE)
    owner = Owner(proc.process, proc.process.user, proc.space, Mode.USER)
    return proc, Pages(owner, BASE, SIZE, True)


def parts(pages: Pages) -> list[tuple[int, int, int]]:
    return [(s.start, s.end, s.holders) for s in pages.segments or ()]


def test_whole_object_needs_no_segments() -> None:
    proc, pages = make()
    extents, new = pages.hold(proc.world, None, 0, SIZE)
    assert (new, total(extents), pages.segments) == (SIZE, SIZE, None)
    assert pages.hold(proc.world, None, 0, SIZE) == (extents, 0)
    assert (pages.drop(0, SIZE), pages.drop(0, SIZE)) == (0, SIZE)
    assert pinned_frames(proc.world) == 0


def test_parts_join_again() -> None:
    proc, pages = make()
    pages.hold(proc.world, None, 0, SIZE)
    pages.hold(proc.world, None, 5, 7)
    assert parts(pages) == [(0, 5, 1), (5, 12, 2), (12, SIZE, 1)]
    pages.drop(5, 7)
    assert parts(pages) == []
    assert len(pages.extents) == 1


def test_failure_changes_nothing() -> None:
    proc, pages = make()
    proc.host.unmap(BASE + 10 * P, 1)
    pages.hold(proc.world, None, 2, 3)
    with pytest.raises(KernelError) as caught:
        pages.hold(proc.world, None, 0, 12)
    assert caught.value.errno == errno.EFAULT
    assert pages.held() == pinned_frames(proc.world) == 3
    with pytest.raises(KernelError):
        pages.borrow(proc.world, None, 0, 12)
    assert pinned_frames(proc.world) == 3


class Holders(RuleBasedStateMachine):
    """Random holders and records; every page counted by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.proc, self.pages = make()
        self.model: Counter[int] = Counter()
        self.frame: dict[int, int] = {}
        self.holds: list[tuple[int, int]] = []
        self.records: list[tuple[int, int]] = []

    spans = st.tuples(st.integers(0, SIZE - 1), st.integers(1, SIZE)).map(lambda s: (s[0], min(s[1], SIZE - s[0])))

    def _seen(self, first: int, extents: Extents) -> None:
        for i in range(total(extents)):
            pfn = pfn_at(extents, i)
            assert self.frame.setdefault(first + i, pfn) == pfn, "a held page changed its frame"

    @rule(span=spans)
    def hold(self, span: tuple[int, int]) -> None:
        first, count = span
        fresh = sum(not self.model[i] for i in range(first, first + count))
        extents, new = self.pages.hold(self.proc.world, None, first, count)
        assert (new, total(extents)) == (fresh, count)
        self.model.update(range(first, first + count))
        self._seen(first, extents)
        self.holds.append(span)

    @precondition(lambda self: self.holds)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        first, count = self.holds.pop(data.draw(st.integers(0, len(self.holds) - 1)))
        self.model.subtract(range(first, first + count))
        freed = [i for i in range(first, first + count) if not self.model[i]]
        assert self.pages.drop(first, count) == len(freed)
        for i in freed:
            del self.frame[i]

    @rule(span=spans)
    def add_record(self, span: tuple[int, int]) -> None:
        extents = self.pages.add_record(self.proc.world, None, *span)
        if span not in self.records:
            self.model.update(range(span[0], span[0] + span[1]))
        self._seen(span[0], extents)
        self.records.append(span)

    @precondition(lambda self: self.records)
    @rule(data=st.data())
    def drop_record(self, data: st.DataObject) -> None:
        span = self.records.pop(data.draw(st.integers(0, len(self.records) - 1)))
        assert self.pages.has_record(*span)
        self.pages.drop_record(*span)
        if span not in self.records:
            assert not self.pages.has_record(*span)
            self.model.subtract(range(span[0], span[0] + span[1]))
            for i in range(span[0], span[0] + span[1]):
                if not self.model[i]:
                    self.frame.pop(i, None)

    @rule(span=spans)
    def borrow(self, span: tuple[int, int]) -> None:
        extents, loans = self.pages.borrow(self.proc.world, None, *span)
        assert total(extents) == span[1]
        missing = sum(not self.model[i] for i in range(span[0], span[0] + span[1]))
        assert sum(total(loan) for loan in loans) == missing
        for i in range(span[1]):
            if self.model[span[0] + i]:
                assert pfn_at(extents, i) == self.frame[span[0] + i]
        for loan in loans:
            unpin_extents(loan)

    @rule(span=spans)
    def remap(self, span: tuple[int, int]) -> None:
        """The process has other memory there from now on."""
        self.proc.unmap(BASE + span[0] * P, span[1])
        self.proc.host.map(BASE + span[0] * P, span[1])

    @invariant()
    def counts(self) -> None:
        held = [i for i in range(SIZE) if self.model[i]]
        assert self.pages.held() == len(held) == pinned_frames(self.proc.world)
        for i in held:
            assert pfn_at(self.pages.frames(i, 1), 0) == self.frame[i]
        if self.pages.segments is not None:
            ends = parts(self.pages)
            assert ends == sorted(ends)
            assert all(a[1] <= b[0] and (a[1] < b[0] or a[2] != b[2]) for a, b in pairwise(ends))
            assert all(s.holders > 0 and total(s.extents) == s.end - s.start for s in self.pages.segments)


TestHolders = Holders.TestCase
TestHolders.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
