"""What every test gets: repeatable property tests, and a word when a test needs a kernel that is not here."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
from hypothesis import settings

# No deadline: CI hosts stall at will. In CI the same examples every time, so that a red run can be repeated.
settings.register_profile("person", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "person")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not Path("/dev/iommu").exists():
        absent = pytest.mark.skip(reason="there is no /dev/iommu on this host: make oracle")
        for item in items:
            if item.get_closest_marker("oracle"):
                item.add_marker(absent)


@pytest.fixture
def fast_switches() -> Iterator[None]:
    """Threads change places as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def garbage() -> Iterator[Callable[[], list[str]]]:
    """Asked, what has become unreachable in cycles since the test began, or since it was asked last.

    For code that the supervisor runs, where the cyclic collector is off."""
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)

    def found() -> list[str]:
        gc.collect()
        kinds = [
            f"frame of {o.f_code.co_qualname}"
            if isinstance(o, FrameType)
            else f"{type(o).__module__}.{type(o).__name__}"
            for o in gc.garbage
        ]
        gc.garbage.clear()
        return sorted(kinds)

    yield found
    gc.set_debug(0)
    gc.garbage.clear()
    gc.enable()
