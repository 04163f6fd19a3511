"""What every test gets: repeatable property tests, and a word when a test needs a kernel that is not here."""

from __future__ import annotations

import os
from pathlib import Path

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
