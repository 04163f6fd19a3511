"""check_backend: every conformance function against anyone's backend, and a report of what does not hold.

::

    report = check_backend(MyBackend())
    assert report.ok, report
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from iommufd.client.backend import check_calls
from iommufd.testing.conformance import checks
from iommufd.testing.record import play
from iommufd.testing.subject import Subject

if TYPE_CHECKING:
    from iommufd.client.backend import Backend
    from iommufd.testing.system import System

NEEDS = frozenset(("root", "hugepages", "processes", "capabilities", "vtd", "noiommu"))


@dataclass(slots=True)
class BackendReport:
    """``passed`` are names of checks, ``failed`` maps names to what did not hold, ``skipped`` to what they need and
    the backend has not."""

    passed: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether something was checked and nothing failed."""
        return bool(self.passed) and not self.failed

    def __str__(self) -> str:
        lines = [f"{len(self.passed)} passed, {len(self.failed)} failed, {len(self.skipped)} skipped"]
        lines += [f"  {name}: {why}" for name, why in self.failed.items()]
        return "\n".join(lines)


def check_backend(
    backend: Backend,
    *,
    only: Iterable[str] = (),
    have: Iterable[str] | None = None,
    system: Callable[[], System] | None = None,
) -> BackendReport:
    """Runs the conformance functions on ``backend``, one after the other, each from a fresh open of ``/dev/iommu``.

    The backend must have the kernel's test hardware (IOMMU_TEST_CMD). ``only``: parts of names of checks, such as
    ``"ioas_map"``. ``have``: what the backend offers beyond that, of ``root`` and ``capabilities`` (all of them),
    ``hugepages``, ``processes``, ``vtd``, ``noiommu``; checks that need more are skipped (default: ``root`` if we are).
    ``system()`` makes the process as the backend must be told of it, for backends in this process that cannot see
    memory go (default: an operating system does; a SoftwareBackend is told). Whatever a backend raises but OSError is
    a failure of the check, not of this function.

    TypeError for what is no backend, ValueError for names that mean nothing, RuntimeError without test hardware."""
    check_calls(backend)
    parts = tuple(only)
    every = checks()
    chosen = [check for check in every if not parts or any(part in check.name for part in parts)]
    if not chosen:
        raise ValueError(f"no check is called anything like {', '.join(parts)}")
    offered = frozenset(have) if have is not None else frozenset({"root"} if os.geteuid() == 0 else ())
    known = NEEDS.union(*(check.needs for check in every))
    if offered - known:
        unknown, there = ", ".join(sorted(offered - known)), ", ".join(sorted(known))
        raise ValueError(f"there is no {unknown} to have; there are: {there}")
    _require_test_hardware(backend)
    if system is None:
        system = _system_of(backend)
    report = BackendReport()
    for check in chosen:
        lacking = check.needs - offered
        if lacking:
            report.skipped[check.name] = f"needs {', '.join(sorted(lacking))}"
            continue
        try:
            failure = play(check, Subject(backend, system()))[0]
        except Exception as error:  # of any backend, which may raise what it likes
            failure = f"{type(error).__name__}: {error}"
        if failure is None:
            report.passed.append(check.name)
        else:
            report.failed[check.name] = failure
    return report


def _system_of(backend: Backend) -> Callable[[], System]:
    from iommufd.testing.system import System

    if type(backend).__module__.startswith("iommufd.client.backends.kernel"):
        return System
    from iommufd.client.backends.software import SoftwareBackend

    if not isinstance(backend, SoftwareBackend):
        return System
    from iommufd.testing.software import SoftwareSystem

    return lambda: SoftwareSystem(backend)


def _require_test_hardware(backend: Backend) -> None:
    import errno

    from iommufd.uapi.iommufd_test import IOMMU_TEST_CMD

    try:
        fd = backend.open("/dev/iommu", os.O_RDWR)
    except OSError as error:
        raise RuntimeError(f"the backend opens no /dev/iommu: {error.strerror}") from error
    try:
        backend.ioctl(fd, IOMMU_TEST_CMD, bytearray((72).to_bytes(4, "little") + bytes(68)))
    except OSError as error:
        if error.errno == errno.ENOTTY:
            raise RuntimeError("the backend has no test hardware (CONFIG_IOMMUFD_TEST, or machine mock)") from None
    finally:
        backend.close(fd)
