"""The store for contents without another home."""

from __future__ import annotations

import os

from iommufd.memory.store import Store

P = 4096


def test_ranges_are_zero_apart_and_used_again() -> None:
    store = Store()
    a, b = store.reserve(4), store.reserve(1)
    assert abs(a - b) >= P
    store.save(a, b"a" * 4 * P)
    store.save(b, b"b" * P)
    assert store.load(a, 4 * P) == b"a" * 4 * P
    store.forget(a + P, 2 * P)
    assert store.load(a, 1) + store.load(a + 3 * P, 1) + store.load(b, 1) == b"aab"
    again = store.reserve(2)
    assert again == a + P
    assert store.load(again, 2 * P) == bytes(2 * P)


def test_what_is_forgotten_goes_back_to_the_host() -> None:
    store = Store()
    position = store.reserve(1 << 20)
    store.save(position + (1 << 30), b"x" * (1 << 20))
    used = os.fstat(store._fd).st_blocks * 512
    assert 1 << 20 <= used < 4 << 20
    store.forget(position, 1 << 32)
    assert os.fstat(store._fd).st_blocks == 0
    store.forget(position, 0)


def test_a_view_is_the_bytes_themselves() -> None:
    store = Store()
    position = store.reserve(2)
    view = store.view(position + 10, P)
    view[:5] = b"hello"
    assert store.load(position + 10, 5) == b"hello"
    store.save(position + P, b"back")
    assert bytes(view[P - 10 : P - 6]) == b"back"


def test_nothing_is_opened_before_it_is_needed() -> None:
    store = Store()
    assert store._fd == -1
    store.close()
