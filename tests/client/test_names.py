"""Public names are imported when they are asked for, and what that costs. (Which they are: tests/public_names.txt.)"""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

import iommufd


def test_every_public_name_is_there_when_asked_for() -> None:
    for name in iommufd.__all__:
        assert getattr(iommufd, name) is not None
        assert name in dir(iommufd)


@pytest.mark.parametrize("name", ["Ioas", "ioas", "client_", "__nothing__"])
def test_any_other_name_is_an_attribute_error(name: str) -> None:
    with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
        getattr(iommufd, name)


def fresh(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_is_light() -> None:
    """80 ms at most; in fact it loads one module."""
    before = set(fresh("import sys, importlib, typing; print(*sys.modules)").split())
    loaded = set(fresh("import sys, importlib, typing, iommufd; print(*sys.modules)").split()) - before
    assert loaded == {"iommufd"}
    times = [
        float(fresh("import time; t = time.perf_counter(); import iommufd; print(time.perf_counter() - t)"))
        for _ in range(3)
    ]
    assert min(times) <= 0.08


def test_the_kernel_backend_needs_nothing_of_the_engine() -> None:
    code = """
import sys, iommufd
try:
    iommufd.open(backend="kernel")
except OSError:
    pass
iommufd.IOAS, iommufd.FaultQueue, iommufd.VFIODevice
print(*sys.modules)
"""
    loaded = fresh(code).split()
    rooms = ("engine", "machine", "memory", "iommu", "selftest", "interpose", "client.backends.software")
    assert not [name for name in loaded for room in rooms if name.startswith(f"iommufd.{room}")]
    assert "numpy" not in loaded


def test_opening_is_quick() -> None:
    """A context of a machine that runs already: well below a millisecond."""
    with iommufd.open(machine="mock"):
        best = 1.0
        for _ in range(20):
            start = time.perf_counter()
            iommufd.open(machine="mock").close()
            best = min(best, time.perf_counter() - start)
    assert best < 0.005
