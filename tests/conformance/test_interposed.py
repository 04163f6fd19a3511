"""Every conformance check, played by an unmodified program under ``iommufd run``, must say what the real kernel said.

One program a machine plays them all, once in a test run (the first worker that asks runs it, the others wait for its
result): a supervised program costs half a second to start and a check milliseconds. The machine grants every
capability, for the transcripts were recorded by root.
"""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from iommufd.testing.conformance import Check, checks
from iommufd.testing.record import difference, load
from iommufd.testing.software import MACHINES, machine_for

pytestmark = pytest.mark.interposed

TRANSCRIPTS = Path(__file__).parent / "transcripts" / "linux-7.3"
CHECKS = [check for check in checks() if "capabilities" not in check.needs]  # what is granted cannot be dropped
HAVE = frozenset.union(*(check.needs for check in CHECKS))


@pytest.fixture(scope="session")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of transcripts; ``output`` beside them is what the program printed."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "interposed-transcripts"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "output").exists():
            said = [play(need, folder) for need in ("", *MACHINES)]
            (folder / "output").write_text("".join(said))
    return folder


def play(need: str, folder: Path) -> str:
    """Plays the checks that need ``need`` (those that need no special machine, when empty) on their machine."""
    run = [sys.executable, "-m", "iommufd", "run", "--machine", machine_for(frozenset([need])), "--grant", "all", "--"]
    have = (HAVE - MACHINES.keys()) | {need}
    record = [sys.executable, "-m", "iommufd.testing.record", "--out", str(folder), "--have", " ".join(have)]
    only = ["--only-needing", need] if need else []
    done = subprocess.run([*run, *record, *only], capture_output=True, text=True, timeout=120, check=False)
    return f"{done.stdout}{done.stderr}exit status {done.returncode}\n"


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_a_program_hears_what_the_kernel_said(check: Check, played: Path) -> None:
    path = played / f"{check.name}.json"
    output = (played / "output").read_text()
    assert path.exists(), f"{check.name} was not played: {output}"
    assert difference(load(TRANSCRIPTS / f"{check.name}.json"), load(path)) is None, output


def test_every_check_held(played: Path) -> None:
    """The program agrees with itself too: no expectation of a check failed, and it ended well."""
    output = (played / "output").read_text()
    passed = [int(number) for number in re.findall(r"^(\d+) passed, 0 failed", output, re.MULTILINE)]
    assert sum(passed) == len(CHECKS), output
    assert output.count("exit status 0\n") == 1 + len(MACHINES)
