"""Numbers of groups waiting for a response (events-viommu 4.1 row 4), and what Linux 7.3.4 makes of cookie 0."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from iommufd.engine.cookies import Cookies


@given(st.lists(st.one_of(st.just(-1), st.integers(0, 6)), max_size=60))
def test_always_the_lowest_free_number(steps: list[int]) -> None:
    cookies, used = Cookies(), set[int]()
    for step in steps:
        if step < 0:
            cookie = cookies.take()
            assert cookie == next(n for n in range(1, 100) if n not in used)
            used.add(cookie)
        elif step in used:
            used.discard(step)
            cookies.release(step)
        else:
            cookies.refused(step)


def test_zero_becomes_free_while_a_group_waits() -> None:  # docs/deviations.md fault-cookie-0-becomes-free
    cookies = Cookies(leaky=True)
    cookies.refused(0)
    assert cookies.take() == 1  # nobody waited
    cookies.refused(0)
    assert [cookies.take(), cookies.take()] == [0, 2]
    cookies.release(0)
    assert cookies.take() == 0
    cookies.release(1)
    cookies.release(2)
    assert cookies.take() == 1
    cookies.release(1)
    cookies.release(0)
    assert [cookies.take(), cookies.take()] == [0, 1]  # for good, also when nobody waits
