"""No input upsets a machine: random structs, pointers and lengths, on every object and every kind of file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from iommufd.client.backends.software import SoftwareBackend
from iommufd.engine import ledger
from iommufd.machine.presets import preset
from tests.stress.bad_input import play

ROOT = Path(__file__).parent.parent.parent
COUNT = 4000


def paths(machine: str) -> list[str]:
    """What can be opened beside /dev/iommu; a group and a device of another one, which do not exclude each other."""
    with preset(machine) as made:
        names = sorted(path for path, node in made.paths().items() if node.opener is not None)
    nodes = [name for name in names if name.startswith("/dev/vfio/")]
    groups = [name for name in nodes if name.rpartition("/")[2].isdigit()]
    return [name for name in nodes if name not in groups][:2] + groups[-1:]


@pytest.mark.software
@pytest.mark.parametrize("machine", ["mock", "pci"])
@pytest.mark.parametrize("seed", range(4))
def test_in_process(machine: str, seed: int) -> None:
    backend = SoftwareBackend(preset(machine))
    before = ledger.take(backend.machine.world, [], [backend.owner.process])
    came = play(backend, paths(machine), seed, COUNT)
    assert came[0] > COUNT // 20
    assert len(came) > 8
    backend.close_all()  # random calls opened some more
    assert backend.machine.contexts == []
    assert not ledger.difference(before, ledger.take(backend.machine.world, [], [backend.owner.process]))


@pytest.mark.interposed
@pytest.mark.parametrize("machine", ["mock", "pci"])
def test_as_a_program(machine: str) -> None:
    run = [sys.executable, "-m", "iommufd", "run", "--machine", machine, "--"]
    program = [sys.executable, "-m", "tests.stress.bad_input", "7", str(COUNT), *paths(machine)]
    done = subprocess.run([*run, *program], capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, ""), done
    assert len(done.stdout.split(",")) > 8


@pytest.mark.interposed
def test_descriptors_closed_under_those_who_use_them() -> None:
    """The program hears what a descriptor that is gone, or is another's by now, has to say; the supervisor nothing."""
    run = [sys.executable, "-m", "iommufd", "run", "--machine", "mock", "--"]
    program = [sys.executable, "-m", "tests.stress.closing", "1.5"]
    done = subprocess.run([*run, *program], capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, ""), done
    used, *errnos = done.stdout.split()
    assert used == "True"
    assert set(errnos) <= {"EBADF", "EBADFD", "ENOENT", "EINVAL", "EBUSY", "EEXIST", "ENOTTY"}
