"""Packed bit arrays against lists of bools."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from iommufd.iommu import bits as b

flags = st.lists(st.booleans(), max_size=200)


def pack(values: list[bool]) -> bytes:
    octets = (values[at : at + 8] for at in range(0, len(values), 8))
    return bytes(sum(bit << n for n, bit in enumerate(octet)) for octet in octets)


def unpack(data: bytes, count: int) -> list[bool]:
    return [bool(data[n >> 3] >> (n & 7) & 1) for n in range(count)]


@given(flags, st.data())
def test_each_set_and_count(values: list[bool], data: st.DataObject) -> None:
    low = data.draw(st.integers(0, len(values)))
    high = data.draw(st.integers(low, len(values)))
    assert list(b.each_set(pack(values), low, high)) == [n for n in range(low, high) if values[n]]
    assert b.count_set(pack(values), high) == sum(values[:high])


@given(flags, st.data())
def test_extract(values: list[bool], data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(values)))
    count = data.draw(st.integers(0, len(values) - first))
    found = b.extract(b.of(pack(values)), first, count).tobytes()
    assert len(found) == (count + 7) // 8
    assert unpack(found, len(found) * 8) == values[first : first + count] + [False] * (len(found) * 8 - count)


@given(flags)
def test_any_set(values: list[bool]) -> None:
    assert b.any_set(b.of(pack(values))) == any(values)


@given(flags, flags, st.data())
def test_or_into(target: list[bool], source: list[bool], data: st.DataObject) -> None:
    target += [False] * len(source)
    at = data.draw(st.integers(0, len(target) - len(source)))
    array = b.of(bytearray(pack(target)))
    b.or_into(array, at, b.of(pack(source)), len(source))
    wanted = [t or (at <= n < at + len(source) and source[n - at]) for n, t in enumerate(target)]
    assert unpack(array.tobytes(), len(target)) == wanted


@given(flags, st.data())
def test_clear(values: list[bool], data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(values)))
    count = data.draw(st.integers(0, len(values) - first))
    array = b.of(bytearray(pack(values)))
    b.clear(array, first, count)
    assert unpack(array.tobytes(), len(values)) == [v and not first <= n < first + count for n, v in enumerate(values)]


@given(flags, st.sampled_from([1, 2, 4, 32]), st.integers(0, 31))
def test_widen_and_narrow(values: list[bool], by: int, skip: int) -> None:
    skip %= by
    wide = b.widen(b.of(pack(values)), len(values), by).tobytes()
    assert unpack(wide, len(values) * by) == [v for v in values for _ in range(by)]
    narrow = b.narrow(b.of(pack(values)), len(values), skip, by).tobytes()
    padded = [False] * skip + values
    groups = [any(padded[at : at + by]) for at in range(0, len(padded), by)]
    assert unpack(narrow, len(groups)) == groups


@given(st.binary(min_size=1, max_size=60), st.data())
def test_scatter(source: bytes, data: st.DataObject) -> None:
    step = data.draw(st.sampled_from([512, 1024, 4096, 6000]))
    base = data.draw(st.integers(0, 8192))
    first = data.draw(st.integers(0, len(source) * 8 - 1))
    count = data.draw(st.integers(0, len(source) * 8 - first))
    wanted = {(base + n * step) // 4096 for n in b.each_set(source, first, first + count)}
    target = b.empty((base + len(source) * 8 * step) // 4096 + 1)
    b.scatter(target, b.of(source), first, count, step, base, 4096)
    assert set(b.each_set(target.tobytes(), 0, len(target) * 8)) == wanted
