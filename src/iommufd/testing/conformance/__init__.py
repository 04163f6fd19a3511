"""The conformance checks: what a /dev/iommu must do, row by row, for any backend.

A check is a function of one :class:`~iommufd.testing.subject.Subject`, registered with the specification rows it
covers. It states the kernel's behaviour; the recorded transcript of the same check on a real kernel is the proof.
Checks use only what the subject offers, so they run unchanged on a kernel, on the software machine in process, and
under ``iommufd run``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from iommufd.testing.subject import Subject

CheckFunction = Callable[["Subject"], None]

# chapter module -> what it covers; a module registers its checks when it is imported
CHAPTERS = (
    "dispatch",
    "objects",
    "options",
    "ioas_ranges",
    "ioas_map",
    "ioas_map_file",
    "ioas_copy",
    "ioas_unmap",
    "auto_iova",
    "access",
    "devices",
    "attach",
    "dirty",
    "dmabufs",
    "faults",
    "viommu",
    "vevents",
    "hw_queues",
    "vfio_compat",
    "vfio_cuts",
    "vfio_devices",
    "vfio_groups",
    "vfio_pci",
    "noiommu",
    "processes",
)


@dataclass(frozen=True, slots=True)
class Check:
    """One check: its name (``chapter.function``), the rows it covers (``core 4.9 row 3``), what it needs of the
    subject."""

    name: str
    rows: tuple[str, ...]
    needs: frozenset[str]
    run: CheckFunction


_CHECKS: dict[str, Check] = {}


def check(*rows: str, needs: str = "") -> Callable[[CheckFunction], CheckFunction]:
    """Registers a check for ``rows``. ``needs`` names, separated by spaces, what not every subject has: ``root``,
    ``hugepages``, ``processes``, ``capabilities`` (those it has, and they can be dropped: not where a machine grants
    them), ``vtd``, ``noiommu``."""

    def register(function: CheckFunction) -> CheckFunction:
        name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
        if name in _CHECKS:
            raise ValueError(f"two checks are called {name}")
        _CHECKS[name] = Check(name, rows, frozenset(needs.split()), function)
        return function

    return register


def checks() -> list[Check]:
    """Every check, chapter by chapter in the order they stand in the files."""
    for chapter in CHAPTERS:
        importlib.import_module(f"{__name__}.{chapter}")
    return list(_CHECKS.values())
