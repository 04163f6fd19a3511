"""An IOAS against a naive model: areas, reserved and allowed ranges, alignment, every answer and every errno.

The model keeps lists and looks at every member for every question; it knows nothing of interval trees or merged ranges.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from iommufd.errors import KernelError
from iommufd.iommu.extent_domain import ExtentDomain
from iommufd.uapi import iommufd as u
from tests.engine.fakes import ARRAY, BUFFER, ULMAX, Caller, copy_struct, domains_of, map_struct

P = 4096
# a small world: 32 units of half a page from 0x8000 on, and the two ends of the address space
UNIT = 0x800
LOW = 0x8000
EDGES = [0, 1, UNIT, ULMAX - P, ULMAX - 1, ULMAX]

iovas = st.one_of(
    st.integers(0, 31).map(lambda n: LOW + n * UNIT),
    st.integers(0, 31).map(lambda n: LOW + n * UNIT + 3),
    st.sampled_from(EDGES),
)
lengths = st.one_of(
    st.integers(1, 8).map(lambda n: n * UNIT), st.sampled_from([0, 1, 5, P + 1, 2**62, ULMAX - P, ULMAX - 1, ULMAX])
)
offsets = st.sampled_from([0, 0, 0, UNIT, P, 3, 0x2000, 0x3000])
flags = st.sampled_from([2, 4, 6, 6, 6, 0, 8])


@dataclass(frozen=True)
class ModelArea:
    first: int
    last: int
    memory: int  # address of the first byte
    base: int  # address of the pages object's first byte, rounded down
    writable: bool

    def conforms(self, alignment: int) -> bool:
        length = self.last - self.first + 1
        return not (self.first % alignment or length % alignment or self.memory % P % alignment)


def overlaps(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a[0] <= b[1] and b[0] <= a[1]


class Model:
    def __init__(self) -> None:
        self.areas: list[ModelArea] = []
        self.reserved: list[tuple[int, int, object]] = []
        self.allowed: list[tuple[int, int]] = []
        self.needs: dict[object, int] = {}  # who raises the alignment, and to what
        self.large = True

    @property
    def alignment(self) -> int:
        return max(1 if self.large else P, *self.needs.values(), 1)

    def conform(self, alignment: int) -> bool:
        return alignment <= self.alignment or all(area.conforms(alignment) for area in self.areas)

    def check_fixed(self, iova: int, length: int) -> int:
        last = iova + length - 1
        if iova % self.alignment:
            return errno.EINVAL
        if last > ULMAX:
            return errno.EOVERFLOW
        if any(overlaps((iova, last), r[:2]) for r in self.reserved):
            return errno.EINVAL
        if any(overlaps((iova, last), (a.first, a.last)) for a in self.areas):
            return errno.EEXIST
        return 0

    def holes(self, first: int, last: int) -> list[tuple[int, int]]:
        """The maximal intervals of ``[first, last]`` that are neither reserved nor mapped."""
        used = sorted([r[:2] for r in self.reserved] + [(a.first, a.last) for a in self.areas])
        found = []
        at = first
        for begin, end in used:
            if end < at:
                continue
            if begin > last:
                break
            if begin > at:
                found.append((at, begin - 1))
            at = max(at, end + 1)
        if at <= last:
            found.append((at, last))
        return found

    def choose(self, addr: int, length: int) -> int:
        """The IOVA, or minus the errno (core 4.8)."""
        if length >= ULMAX // 2:
            return -errno.EOVERFLOW
        align = 1
        while align < length:
            align *= 2
        if addr:
            while addr % align:
                align //= 2
        align = min(align, 2 << 20)
        if align < self.alignment:
            return -errno.EINVAL

        def fit(first: int, last: int) -> int | None:
            at = -(-first // align) * align
            if at > ULMAX:
                return None
            at |= addr % P
            return at if at < last and last - at >= length - 1 else None

        spans: list[tuple[int, int]] = []
        for first, last in sorted(self.allowed) or [(0, ULMAX)]:
            if spans and spans[-1][1] + 1 == first:
                spans[-1] = (spans[-1][0], last)
            else:
                spans.append((first, last))
        for first, last in spans:
            first, last = max(first, P), min(last, ULMAX - P)
            if first > last:
                continue
            start = fit(first, last)
            if start is None:
                continue
            for hole in self.holes(start, last):
                found = fit(*hole)
                if found is not None:
                    return found
        return -errno.ENOSPC

    def map(
        self, iova: int | None, pieces: list[tuple[int, int, bool, int]], length: int, want_write: bool
    ) -> tuple[int, int]:
        """(errno, IOVA); ``pieces`` are (memory, base, writable, bytes)."""
        if length % self.alignment or length == 0:
            return errno.EINVAL, 0
        if iova is None:
            iova = self.choose(pieces[0][0], length)
            if iova < 0:
                return -iova, 0
        else:
            number = self.check_fixed(iova, length)
            if number:
                return number, 0
        at = iova
        new = []
        for memory, base, writable, size in pieces:
            if want_write and not writable:
                return errno.EPERM, 0
            if memory % P % self.alignment:
                return errno.EINVAL, 0
            new.append(ModelArea(at, at + size - 1, memory, base, writable))
            at += size
        self.areas += new
        self.areas.sort(key=lambda a: a.first)
        return 0, iova

    def unmap(self, first: int, last: int) -> tuple[int, int]:
        """(errno, bytes removed)."""
        removed = 0
        for area in list(self.areas):
            if not overlaps((first, last), (area.first, area.last)):
                continue
            if area.first < first or area.last > last:
                return errno.ENOENT, removed
            self.areas.remove(area)
            removed += area.last - area.first + 1
        return 0, removed


class IoasMachine(RuleBasedStateMachine):
    domains: Bundle[ExtentDomain] = Bundle("domains")
    reservations: Bundle[object] = Bundle("reservations")

    @initialize()
    def start(self) -> None:
        self.c = Caller()
        self.ioas = self.c.ioas()
        self.table = self.c.table(self.ioas)
        self.model = Model()

    def ask(self, struct: u.iommu_ioas_map | u.iommu_ioas_copy | u.iommu_ioas_unmap | u.iommu_option) -> int:
        """The errno, 0 for success."""
        try:
            self.answer = self.c.do(struct)
        except KernelError as error:
            return error.errno
        return 0

    @rule(iova=st.one_of(st.none(), iovas), length=lengths, offset=offsets, flags=flags)
    def map(self, iova: int | None, length: int, offset: int, flags: int) -> None:
        va = BUFFER + offset
        got = self.ask(map_struct(self.ioas, iova, length, va, flags))
        if flags & ~7:
            expected = errno.EOPNOTSUPP
        elif iova == ULMAX or length == ULMAX:
            expected = errno.EOVERFLOW
        elif not flags & 6:
            expected = errno.EINVAL
        elif va + length > ULMAX:
            expected = errno.EOVERFLOW
        elif length == 0 or length > ULMAX - P:
            expected = errno.EINVAL
        else:
            expected, where = self.model.map(iova, [(va, va & -P, bool(flags & 2), length)], length, bool(flags & 2))
            if expected == 0 and self._fault(va, length):
                expected = errno.EFAULT
                self.model.areas = [a for a in self.model.areas if a.first != where]
            if expected == 0:
                assert isinstance(self.answer, u.iommu_ioas_map)
                assert self.answer.iova == where
        assert errno.errorcode.get(got, "0") == errno.errorcode.get(expected, "0")

    def _fault(self, va: int, length: int) -> bool:
        """Whether a domain would have to pin what is not there."""
        return bool(self.table.domains) and va + length > BUFFER + 0x400 * P

    @rule(src=iovas, length=lengths, iova=st.one_of(st.none(), iovas), flags=flags)
    def copy(self, src: int, length: int, iova: int | None, flags: int) -> None:
        got = self.ask(copy_struct(self.ioas, self.ioas, src, length, iova, flags))
        last = src + length - 1
        if flags & ~7:
            expected = errno.EOPNOTSUPP
        elif ULMAX in (src, iova, length):
            expected = errno.EOVERFLOW
        elif not flags & 6 or length == 0:
            expected = errno.EINVAL
        elif last > ULMAX:
            expected = errno.EOVERFLOW
        else:
            pieces = []
            at = src
            for area in self.model.areas:
                if area.first <= at <= area.last and at <= last:
                    end = min(last, area.last)
                    pieces.append((area.memory + at - area.first, area.base, area.writable, end - at + 1))
                    at = end + 1
            if at != last + 1:
                expected = errno.ENOENT
            else:
                expected, where = self.model.map(iova, pieces, length, bool(flags & 2))
                if expected == 0:
                    assert isinstance(self.answer, u.iommu_ioas_copy)
                    assert self.answer.dst_iova == where
        assert errno.errorcode.get(got, "0") == errno.errorcode.get(expected, "0")

    @rule(iova=iovas, length=lengths)
    def unmap(self, iova: int, length: int) -> None:
        got = self.ask(u.iommu_ioas_unmap(ioas_id=self.ioas, iova=iova, length=length))
        if iova == 0 and length == ULMAX:
            expected, removed = self.model.unmap(0, ULMAX)
        elif ULMAX in (iova, length):
            expected, removed = errno.EOVERFLOW, 0
        elif length == 0:
            expected, removed = errno.EINVAL, 0
        elif iova + length - 1 > ULMAX:
            expected, removed = errno.EOVERFLOW, 0
        else:
            expected, removed = self.model.unmap(iova, iova + length - 1)
            if not expected and not removed:
                expected = errno.ENOENT
        assert errno.errorcode.get(got, "0") == errno.errorcode.get(expected, "0")
        if not expected:
            assert isinstance(self.answer, u.iommu_ioas_unmap)
            assert self.answer.length == removed

    @rule(target=reservations, first=iovas, length=st.integers(1, 3))
    def reserve(self, first: int, length: int) -> object:
        last = min(first + length * UNIT - 1, ULMAX)
        owner = object()
        vetoed = any(overlaps((first, last), (a.first, a.last)) for a in self.model.areas) or any(
            overlaps((first, last), r) for r in self.model.allowed
        )
        try:
            self.table.reserve(first, last, owner)
            refused = 0
        except KernelError as error:
            refused = error.errno
        assert refused == (errno.EADDRINUSE if vetoed else 0)
        if not refused:
            self.model.reserved.append((first, last, owner))
        return owner

    @rule(owner=consumes(reservations))
    def unreserve(self, owner: object) -> None:
        self.table.remove_reserved(owner)
        self.model.reserved = [r for r in self.model.reserved if r[2] is not owner]

    @rule(entries=st.lists(st.tuples(iovas, st.integers(0, 8)), max_size=4))
    def allow(self, entries: list[tuple[int, int]]) -> None:
        pairs = [(first, min(first + n * UNIT, ULMAX)) for first, n in entries]
        data = b"".join(a.to_bytes(8, "little") + b.to_bytes(8, "little") for a, b in pairs)
        self.c.host.poke(ARRAY, data)
        expected = 0
        for i, (first, last) in enumerate(pairs):
            if first >= last or any(overlaps((first, last), other) for other in pairs[:i]):
                expected = errno.EINVAL
        if not expected and any(overlaps(pair, r[:2]) for pair in pairs for r in self.model.reserved):
            expected = errno.EADDRINUSE
        got = 0
        try:
            self.c.do(u.iommu_ioas_allow_iovas(ioas_id=self.ioas, num_iovas=len(pairs), allowed_iovas=ARRAY))
        except KernelError as error:
            got = error.errno
        assert got == expected
        if not expected:
            self.model.allowed = pairs

    @rule(
        target=domains,
        page=st.sampled_from([1, UNIT, P]),
        start=st.sampled_from([0, 0, LOW, LOW + 4 * UNIT]),
        end=st.sampled_from([ULMAX, ULMAX, LOW + 24 * UNIT - 1]),
    )
    def add_domain(self, page: int, start: int, end: int) -> ExtentDomain:
        domain = ExtentDomain(2**64 - page, start, end)
        model = self.model
        alignment = max(model.alignment, page)
        outside = [r for r in ((0, start - 1), (end + 1, ULMAX)) if r[0] <= r[1]]
        expected = 0
        if not model.conform(alignment) or any(
            overlaps(r, taken) for r in outside for taken in [(a.first, a.last) for a in model.areas] + model.allowed
        ):
            expected = errno.EADDRINUSE
        elif not self.table.domains and any(a.memory + (a.last - a.first) >= BUFFER + 0x400 * P for a in model.areas):
            expected = errno.EFAULT
        got = 0
        try:
            self.table.add_domain(domain)
        except KernelError as error:
            got = error.errno
        assert errno.errorcode.get(got, "0") == errno.errorcode.get(expected, "0")
        if not expected:
            model.reserved += [(*r, domain) for r in outside]
            model.needs[domain] = page
        return domain

    @rule(domain=consumes(domains))
    def remove_domain(self, domain: ExtentDomain) -> None:
        if domain not in self.table.domains:
            return
        self.table.remove_domain(domain)
        assert list(domain.segments(0, ULMAX)) == []
        self.model.reserved = [r for r in self.model.reserved if r[2] is not domain]
        del self.model.needs[domain]

    @rule(on=st.booleans())
    def huge_pages(self, on: bool) -> None:
        got = self.ask(u.iommu_option(option_id=1, op=0, object_id=self.ioas, val64=int(on)))
        expected = 0
        if not on and self.model.large:
            if self.table.domains and self.model.areas:
                expected = errno.EINVAL
            elif not self.model.conform(P):
                expected = errno.EADDRINUSE
        assert got == expected
        if not expected:
            self.model.large = on

    @rule(room=st.integers(0, 6))
    def ranges(self, room: int) -> None:
        free = []
        at = 0
        for first, last in sorted(r[:2] for r in self.model.reserved):
            if first > at:
                free.append((at, first - 1))
            at = max(at, last + 1)
        if at <= ULMAX:
            free.append((at, ULMAX))
        got = 0
        try:
            self.c.do(u.iommu_ioas_iova_ranges(ioas_id=self.ioas, num_iovas=room, allowed_iovas=ARRAY))
        except KernelError as error:
            got = error.errno
        out = self.c.after(u.iommu_ioas_iova_ranges)
        assert got == (errno.EMSGSIZE if len(free) > room else 0)
        assert (out.num_iovas, out.out_iova_alignment) == (len(free), self.model.alignment)
        shown = self.c.host.peek(ARRAY, 16 * min(room, len(free)))
        assert [
            (int.from_bytes(shown[i : i + 8], "little"), int.from_bytes(shown[i + 8 : i + 16], "little"))
            for i in range(0, len(shown), 16)
        ] == free[:room]

    @invariant()
    def same(self) -> None:
        if not hasattr(self, "model"):
            return
        assert self.c.areas(self.ioas) == [(a.first, a.last) for a in self.model.areas]
        assert self.table.iova_alignment == self.model.alignment
        for domain in domains_of(self.table):
            mapped = {first for first, *_ in domain.segments(0, ULMAX)}
            assert {a.first for a in self.model.areas} <= mapped
        if not self.table.domains:
            self.c.quiet()

    def teardown(self) -> None:
        if hasattr(self, "c"):
            for domain in list(self.table.domains):
                self.table.remove_domain(domain)
            self.c.do(u.iommu_destroy(id=self.ioas))
            self.c.quiet()


TestIoas = IoasMachine.TestCase
TestIoas.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
