"""`iommufd doctor`: it tries what it reports, and its word is that of `iommufd run`."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from iommufd.cli import doctor

pytestmark = pytest.mark.interposed


def test_where_programs_run_the_doctor_says_so() -> None:
    told = subprocess.run([sys.executable, "-m", "iommufd", "doctor"], capture_output=True, text=True, check=False)
    tried = subprocess.run([sys.executable, "-m", "iommufd", "run", "--", "true"], capture_output=True, check=False)
    assert (told.returncode == 0) == (tried.returncode == 0), told.stdout
    assert "seccomp notification" in told.stdout
    assert "/dev/iommu" in told.stdout


def test_under_a_supervisor_it_says_what_is_missing() -> None:
    told = subprocess.run(
        [sys.executable, "-m", "iommufd", "run", "--", sys.executable, "-m", "iommufd", "doctor"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 1
    assert "✗ seccomp notification" in told.stdout
    assert "leave the sandbox" in told.stdout
    assert "Programs cannot be run here" in told.stdout
    assert "✓ real /dev/iommu: usable" in told.stdout  # inside, the software one is real


@pytest.mark.parametrize(
    ("text", "release"),
    [("6.18.44-fc-v657", (6, 18)), ("5.19.0", (5, 19)), ("6.1.0-18", (6, 1)), ("7.0+", (7, 0)), ("6-rc1", (6, 0))],
)
def test_releases_are_read(text: str, release: tuple[int, int]) -> None:
    assert doctor.kernel_release(text) == release


@pytest.mark.parametrize(("release", "state"), [("5.4.0", "missing"), ("5.19.0", "less"), ("6.11.0", "ok")])
def test_the_kernel_is_judged(monkeypatch: pytest.MonkeyPatch, release: str, state: str) -> None:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine="x86_64", release=release))
    assert next(iter(doctor.kernel())).state == state


def test_every_finding_that_is_not_ok_says_what_to_do() -> None:
    for title, findings in doctor.examine():
        assert findings, title
        for finding in findings:
            assert finding.state == doctor.OK or finding.fix, finding
