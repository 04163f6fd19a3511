"""The examples of the library run, here on the software machine and in the oracle VM on the kernel, unchanged.

``make oracle`` runs them with the kernel as backend; the one that drives a real PCI device runs where that device is.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"

SAYS = {
    "map_numpy": ["8192 bytes at IOVA 0x", "unmapped: <Mapping [0x"],
    "devices": [
        "DIRTY_TRACKING",
        "[[0x1000000, 0x7fffffff]], in steps of 2048 bytes",
        "b'written by a device'",
        "is free of devices: True",
        "a page table in use stays: EBUSY",
        "not attached",
    ],
    "dirty_tracking": [
        "dirty: [0x1001000, 0x1001fff]\ndirty: [0x1005000, 0x1007fff]\ndirty: [0x1028000, 0x1028fff]\n",
        "5 of 64 pages are to be sent: [1, 5, 6, 7, 40]",
        "written since: 0",
    ],
    "nesting": ["2 invalidations; the cache still has words [1, 3]", "EINVAL after 1 of 3: word 1 is dropped True"],
    "page_faults": [
        "0x1000000 (READ): mapped page 0\n0x1005000 (WRITE): mapped page 5\n0x70000000: refused\n",
        "served: <IOAS 1: 2 mappings, 8 KiB>",
    ],
    "share_memory": [
        "the receiver reads b'through one space, and by the program.'",
        "it may not write: Operation not permitted",
        "outlives its origin: b'still here'",
    ],
}
"""What each must print, the same on every backend."""


def run(name: str, **environment: str) -> str:
    """The output of an example; warnings (something left open) are errors."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("IOMMUFD_")}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py")],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", SAYS)
@pytest.mark.parametrize("machine", ["mock", "mock@7.3.4"])
def test_on_the_software_machine(name: str, machine: str) -> None:
    text = run(name, IOMMUFD_MACHINE=machine)
    assert not [line for line in SAYS[name] if line not in text], text


@pytest.mark.oracle
@pytest.mark.parametrize("name", SAYS)
def test_on_the_kernel(name: str) -> None:
    text = run(name, IOMMUFD_BACKEND="kernel")
    assert not [line for line in SAYS[name] if line not in text], text


@pytest.mark.oracle
def test_a_real_device_does_dma() -> None:
    """QEMU's edu device: 28 bits of DMA address, bound to vfio-pci."""
    ids = [(path / "vendor", path / "device") for path in Path("/sys/bus/pci/devices").iterdir()]
    edu = [vendor for vendor, device in ids if (vendor.read_text(), device.read_text()) == ("0x1234\n", "0x11e8\n")]
    if not any((vendor.parent / "vfio-dev").exists() for vendor in edu):
        pytest.skip("there is no edu device bound to vfio-pci: make oracle boots one for the VFIO part")
    text = run("vfio_edu", IOMMUFD_BACKEND="kernel")
    assert "the device read 2048 bytes at 0x100000 and wrote them to 0x101000" in text
    assert "after unmapping the same DMA reaches nothing" in text


def test_the_shortest_one_is_short() -> None:
    """An example of at most 25 lines maps a NumPy array, reads its IOVA and unmaps."""
    text = (EXAMPLES / "map_numpy.py").read_text()
    assert len(text.splitlines()) <= 25
    assert all(word in text for word in ("np.arange", "ioas.map(", ".iova", ".unmap()"))


def test_without_a_backend_it_says_what_to_do() -> None:
    if Path("/dev/iommu").exists():
        pytest.skip("this system has a /dev/iommu")
    kept = {key: value for key, value in os.environ.items() if not key.startswith("IOMMUFD_")}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "map_numpy.py")], env=kept, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "IOMMUFD_BACKEND=software" in done.stderr.splitlines()[-1]


def test_every_example_says_how_to_run_it() -> None:
    for path in EXAMPLES.glob("*.py"):
        if path.stem in SAYS:
            assert re.search(rf"IOMMUFD_\w+=\w+ python examples/{path.name}", path.read_text()), path
