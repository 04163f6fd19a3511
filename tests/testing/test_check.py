"""check_backend: the conformance functions against any backend."""

from __future__ import annotations

import pytest

from iommufd.client.backends.software import SoftwareBackend
from iommufd.machine.presets import preset
from iommufd.testing import check_backend
from iommufd.uapi.iommufd import IOMMU_IOAS_UNMAP

pytestmark = pytest.mark.software
ALL = 2**64 - 1


def backend(kind: type[SoftwareBackend] = SoftwareBackend, machine: str = "mock@7.3.4") -> SoftwareBackend:
    made = kind(preset(machine))
    made.owner.pretended = ALL
    return made


class Forgetful(SoftwareBackend):
    """A backend with two bugs."""

    def ioctl(self, fd: int, cmd: int, arg: bytearray | int) -> int:
        if cmd == IOMMU_IOAS_UNMAP:
            return 0
        return super().ioctl(fd, cmd, arg)

    def read(self, fd: int, count: int, offset: int | None = None) -> bytes:
        raise ZeroDivisionError("no bytes today")


def test_the_software_backend_passes() -> None:
    report = check_backend(backend(), only=["objects", "ioas_unmap", "faults"], have=["root"])
    assert report.ok, report
    assert len(report.passed) > 10
    assert str(report).startswith(f"{len(report.passed)} passed, 0 failed")


def test_bugs_are_found_and_named() -> None:
    report = check_backend(backend(Forgetful), only=["ioas_unmap", "faults"], have=["root"])
    assert not report.ok
    assert "ioas_unmap.unmap_refuses" in report.failed
    assert any("ZeroDivisionError: no bytes today" in why for why in report.failed.values())
    assert "ioas_unmap.unmap_refuses: " in str(report)


def test_what_a_backend_has_not_is_skipped() -> None:
    report = check_backend(backend(), only=["options"], have=[])
    assert report.skipped
    assert set(report.skipped.values()) <= {"needs root", "needs capabilities"}


def test_what_is_no_backend() -> None:
    with pytest.raises(TypeError, match="object is no backend: it lacks open, ioctl, read"):
        check_backend(object())  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(ValueError, match="no check is called anything like no such"):
        check_backend(backend(), only=["no such"])
    with pytest.raises(ValueError, match="there is no magic to have; there are: "):
        check_backend(backend(), have=["magic"])
    with pytest.raises(RuntimeError, match="no test hardware"):
        check_backend(backend(machine="default"))
