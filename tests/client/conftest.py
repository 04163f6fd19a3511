"""Every test of the client that takes ``context`` runs on the software machine and, in the oracle VM, on the kernel."""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import pytest

import iommufd

BACKENDS = ["software", pytest.param("kernel", marks=pytest.mark.oracle)]
MIB = 1 << 20


@pytest.fixture(params=BACKENDS)
def system(request: pytest.FixtureRequest) -> str:
    """ "software" or "kernel"."""
    name: str = request.param
    return name


@pytest.fixture
def context(system: str) -> Iterator[iommufd.Context]:
    """A context with mock hardware behind it."""
    machine = "mock@7.3.4" if system == "software" else None
    with iommufd.open(machine, None if machine else "kernel") as opened:
        yield opened


@pytest.fixture
def ioas(context: iommufd.Context) -> iommufd.IOAS:
    return context.alloc_ioas()


@pytest.fixture
def memory() -> mmap.mmap:
    """1 MiB, page-aligned."""
    return mmap.mmap(-1, MIB)
