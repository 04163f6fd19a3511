"""What most tests of the engine begin with."""

from __future__ import annotations

import pytest

from tests.engine.fakes import Caller


@pytest.fixture
def c() -> Caller:
    """A process with a context, on a machine of its own."""
    return Caller()
