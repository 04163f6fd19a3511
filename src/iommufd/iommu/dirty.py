"""Which translation entries of a page table are dirty (kernel: the dirty bit in every leaf of a page table).

Invariants: one state per entry, never per page or byte. A mapping nobody wrote to costs nothing; one with a few dirty
entries a set of their first IOVAs; one with many, whose entries are all of one size, a bit per entry, so that reading
the dirty state of 128 GiB is a copy of its bitmap. Owned and locked by the domain.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from iommufd.iommu import bits as bitmap

if TYPE_CHECKING:
    from iommufd.iommu.bits import Bits
    from iommufd.iommu.domain import DirtySink
    from iommufd.iommu.entries import Mapping, Uniform

FEW = 64  # dirty entries of one mapping that are kept as a set


class Report:
    """Dirty entries on their way to a sink: the one of ``size`` bytes at ``iova``, or ``count`` of them as ``bits``.

    ``owned``: nobody else has the bit array."""

    __slots__ = ("bits", "count", "iova", "owned", "size")

    def __init__(self, iova: int, size: int, bits: Bits | None = None, count: int = 1, *, owned: bool = False) -> None:
        self.iova = iova
        self.size = size
        self.bits = bits
        self.count = count
        self.owned = owned

    def to(self, sink: DirtySink) -> None:
        if self.bits is None:
            sink.record(self.iova, self.size)
        else:
            sink.record_bits(self.iova, self.size, self.bits.data, self.count)


class _Marks:
    """The dirty entries of one mapping: first IOVAs in ``few``, and bits over the uniform part when there are many."""

    __slots__ = ("bits", "few", "tried", "uniform")

    def __init__(self) -> None:
        self.few: set[int] = set()
        self.bits: Bits | None = None
        self.uniform: Uniform | None = None
        self.tried = False  # whether the mapping was asked for its uniform part

    def spread(self, uniform: Uniform | None, spare: Bits | None) -> bool:
        """From now on a bit per entry of the uniform part; whether ``spare`` (clear bits) was used for them."""
        self.tried = True
        if uniform is None or self.bits is not None:
            return False
        self.uniform = uniform
        count = (uniform.end - uniform.start) // uniform.size
        reuse = spare is not None and len(spare) == (count + 7) >> 3
        self.bits = spare if reuse and spare is not None else bitmap.empty(count)
        inside = {at for at in self.few if uniform.start <= at < uniform.end}
        self.few -= inside
        for at in inside:
            bitmap.put(self.bits, (at - uniform.start) // uniform.size)
        return reuse


class DirtyState:
    """The dirty entries of one domain, by the first IOVA of their mapping.

    One bit array that was reported is kept, clear: who reads dirty state reads it again, and fresh memory costs more
    than the reading."""

    __slots__ = ("_marks", "_spare")

    def __init__(self) -> None:
        self._marks: dict[int, _Marks] = {}
        self._spare: Bits | None = None

    def recycle(self, report: Report) -> None:
        """The report was delivered; nobody looks at its bits any more."""
        if report.owned and report.bits is not None and (self._spare is None or len(self._spare) <= len(report.bits)):
            report.bits.fill(0)
            self._spare = report.bits

    def _spread(self, marks: _Marks, uniform: Uniform | None) -> None:
        if marks.spread(uniform, self._spare):
            self._spare = None

    def __bool__(self) -> bool:
        return bool(self._marks)

    def mark(self, first: int, last: int, mapping: Mapping, sizes: int, at: int) -> None:
        """The entry that begins at ``at``, of the mapping ``[first, last]``, becomes dirty."""
        marks = self._marks.get(first)
        if marks is None:
            marks = self._marks[first] = _Marks()
        uniform = marks.uniform
        if marks.bits is not None and uniform is not None and uniform.start <= at < uniform.end:
            bitmap.put(marks.bits, (at - uniform.start) // uniform.size)
            return
        marks.few.add(at)
        if not marks.tried and len(marks.few) > FEW:
            self._spread(marks, mapping.uniform(first, last, sizes))

    def mark_bits(
        self,
        first: int,
        last: int,
        mapping: Mapping,
        sizes: int,
        iova: int,
        step: int,
        source: bytes,
        low: int,
        high: int,
    ) -> None:
        """Marks the entry over ``iova + n * step`` for every set bit n of ``[low, high)``; all lie in the mapping."""

        def mark_each(low: int, high: int) -> None:
            done = 0  # everything below is marked already: a large entry is looked up once
            for number in bitmap.each_set(source, low, high):
                address = iova + number * step
                if address >= done:
                    at, size = mapping.entry(first, last, address, sizes)
                    self.mark(first, last, mapping, sizes, at)
                    done = at + size

        marks = self._marks.get(first)
        octets = source[low >> 3 : (high + 7) >> 3]
        many = len(octets) - octets.count(0) > FEW
        if many or marks is not None:
            if marks is None:
                marks = self._marks[first] = _Marks()
            if many and not marks.tried:
                self._spread(marks, mapping.uniform(first, last, sizes))
        uniform = marks.uniform if marks is not None else None
        if not many or uniform is None or marks is None or marks.bits is None:
            mark_each(low, high)
            return
        begin = max(low, -((iova - uniform.start) // step))  # the first bit inside the uniform part
        end = min(high, -((iova - uniform.end) // step))
        mark_each(low, min(begin, high))
        if begin < end:
            bits = bitmap.of(source)
            base = iova - uniform.start
            if step == uniform.size:
                part = bitmap.extract(bits, begin, end - begin)
                bitmap.or_into(marks.bits, begin + base // step, part, end - begin)
            else:
                bitmap.scatter(marks.bits, bits, begin, end - begin, step, base, uniform.size)
        mark_each(max(begin, end), high)

    def take(
        self, first: int, last: int, mapping: Mapping, sizes: int, low: int, high: int, clear: bool
    ) -> list[Report]:
        """The dirty entries of the mapping that lie at least partly in ``[low, high]``, ascending; clean after
        ``clear``."""
        marks = self._marks.get(first)
        if marks is None:
            return []
        reports: list[Report] = []
        for at in sorted(marks.few):
            size = mapping.entry(first, last, at, sizes)[1]
            if at + size - 1 >= low and at <= high:
                reports.append(Report(at, size))
                if clear:
                    marks.few.discard(at)
        if marks.bits is not None:
            reports += self._take_bits(marks, low, high, clear)
            reports.sort(key=lambda report: report.iova)
        if marks.bits is None and not marks.few:
            del self._marks[first]
        return reports

    def _take_bits(self, marks: _Marks, low: int, high: int, clear: bool) -> list[Report]:
        bits, uniform = marks.bits, marks.uniform
        assert bits is not None
        assert uniform is not None
        size = uniform.size
        start, stop = max(low, uniform.start), min(high, uniform.end - 1)
        if start > stop:
            return []
        begin, end = (start - uniform.start) // size, (stop - uniform.start) // size + 1
        whole = clear and begin == 0 and end == (uniform.end - uniform.start) // size
        if whole:
            found, marks.bits, marks.uniform, marks.tried = bits, None, None, False  # nothing stays: no copy
        else:
            found = bitmap.extract(bits, begin, end - begin)
            if clear:
                bitmap.clear(bits, begin, end - begin)
        count = end - begin
        reports: list[Report] = []
        # Entries that stick out of the range go one by one: their reader treats them differently.
        after: list[Report] = []
        if uniform.start + end * size - 1 > high:
            if bitmap.get(found, count - 1):
                after.append(Report(uniform.start + (end - 1) * size, size))
            count -= 1
            found = bitmap.extract(found, 0, count)
        if count and uniform.start + begin * size < low:
            if bitmap.get(found, 0):
                reports.append(Report(uniform.start + begin * size, size))
            begin, count = begin + 1, count - 1
            found = bitmap.extract(found, 1, count)
        if count:
            reports.append(Report(uniform.start + begin * size, size, found, count, owned=whole))
        return reports + after

    def forget(self, first: int, last: int, low: int, high: int, mapping: Mapping, sizes: int) -> None:
        """``[low, high]`` of the mapping ``[first, last]`` is unmapped; what is left keeps its dirty entries."""
        marks = self._marks.pop(first, None)
        if marks is None or (low <= first and last <= high):
            return
        self._marks[first] = marks
        dirty = self.take(first, last, mapping, sizes, first, last, False)
        del self._marks[first]
        for report in dirty:
            starts = [report.iova]
            if report.bits is not None:
                numbers = bitmap.each_set(report.bits.tobytes(), 0, report.count)
                starts = [report.iova + n * report.size for n in numbers]
            for at in starts:
                if at + report.size <= low:
                    self._keep(first, at)
                elif at > high:
                    self._keep(high + 1, at)

    def _keep(self, first: int, at: int) -> None:
        self._marks.setdefault(first, _Marks()).few.add(at)
