"""An unmodified VMM on the software machine: QEMU gives one of its PCI devices to a guest.

It comes by the type1 container, as QEMU always could, and by /dev/iommu and the device file, as since 8.2: sysfs,
regions, and all of the guest's memory mapped. The device is a Python object, so the test sees where its DMA
goes. KVM is not needed. ``QEMU`` in the environment is another one to try.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from iommufd.engine.task import CAP_IPC_LOCK
from iommufd.iommu.extent_domain import ExtentDomain
from iommufd.machine.machine import Machine
from iommufd.machine.snapshot import IoasView
from iommufd.memory.extents import read_extents, write_extents
from iommufd.vfio.pci_config import Bar, PciLayout
from iommufd.vfio.pci_function import PciFunction
from tools import kernel_tree, oracle

ADDRESS = "0000:01:00.0"
QEMU = os.environ.get("QEMU") or shutil.which("qemu-system-x86_64") or ""
GREETING = b"written by a device"
pytestmark = pytest.mark.skipif(not QEMU, reason="there is no qemu-system-x86_64 here (make oracle brings it)")


class Scribe(PciFunction):
    """A write of 8 bytes to register 0 is an address that it greets by DMA; register 8 counts the greetings."""

    def __init__(self, machine: Machine, layout: PciLayout, name: str, addresses: dict[int, int]) -> None:
        super().__init__(layout, name, addresses)
        self.machine = machine
        self.count = 0

    def read_register(self, bar: int, offset: int, width: int) -> int:
        return self.count if offset == 8 else super().read_register(bar, offset, width)

    def write_register(self, bar: int, offset: int, width: int, value: int) -> None:
        if (offset, width) == (0, 8):
            dma_write(self.machine, value, GREETING)
            self.count += 1


def domain_of(machine: Machine) -> ExtentDomain:
    """The page table the device is attached to."""
    (device,) = machine.devices
    domain = machine.pci.driver.domain_of(device)
    assert isinstance(domain, ExtentDomain), domain
    return domain


def dma_write(machine: Machine, iova: int, data: bytes) -> None:
    for at, extents, offset, length, _ in domain_of(machine).segments(iova, len(data)):
        write_extents(extents, offset, data[at - iova : at - iova + length])


def dma_read(machine: Machine, iova: int, count: int) -> bytes:
    return b"".join(
        read_extents(extents, offset, length)
        for _, extents, offset, length, _ in domain_of(machine).segments(iova, count)
    )


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine("host") as made:
        registers = PciLayout(vendor=0x1AF4, device=0x10F0, bars=(Bar(0x1000),))
        made.add_device(ADDRESS, layout=registers, model=partial(Scribe, made))
        made.world.granted = 1 << CAP_IPC_LOCK  # an ordinary user may not lock a guest's memory
        yield made


@pytest.fixture(params=["container", "iommufd"])
def device(request: pytest.FixtureRequest) -> list[str]:
    """QEMU's options for the device."""
    if request.param == "container":
        return ["-device", f"vfio-pci,host={ADDRESS}"]
    known = subprocess.run([QEMU, "-object", "help"], capture_output=True, text=True, check=True).stdout
    if "iommufd" not in known.split():
        pytest.skip("this QEMU is older than 8.2 and knows no iommufd")
    return ["-object", "iommufd,id=iommufd0", "-device", f"vfio-pci,host={ADDRESS},iommufd=iommufd0"]


class Monitor:
    """QEMU with the device and a guest that has not begun, by QMP."""

    def __init__(self, machine: Machine, device: list[str]) -> None:
        words = ["-accel", "tcg", "-machine", "q35", "-m", "64", "-nodefaults", "-display", "none", "-qmp", "stdio"]
        self.program = machine.popen(
            [QEMU, *words, "-S", *device], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert "QMP" in json.loads(self.program.stdout.readline())
        self.do("qmp_capabilities")

    def do(self, command: str, **arguments: str) -> Any:  # whatever JSON can be
        self.program.stdin.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self.program.stdin.flush()
        while True:
            answer = json.loads(self.program.stdout.readline())
            if "event" not in answer:
                return answer["return"]

    def ask(self, line: str) -> str:
        return str(self.do("human-monitor-command", **{"command-line": line}))


def test_qemu_takes_the_device_and_maps_its_guest(machine: Machine, device: list[str]) -> None:
    qemu = Monitor(machine, device)
    shown = qemu.ask("info pci")
    assert "1af4:10f0" in shown, shown
    areas = machine.snapshot().one(IoasView).areas
    assert [area for area in areas if area.first <= 0x200000 <= area.last], areas
    dma_write(machine, 0x1FFFFC, GREETING)  # two pages
    said = qemu.ask(f"xp /{len(GREETING)}xb 0x1ffffc")
    words = [word for line in said.splitlines() for word in line.partition(":")[2].split()]
    assert bytes(int(word, 16) for word in words) == GREETING, said
    assert dma_read(machine, 0x1FFFFC, 4) == GREETING[:4]
    qemu.do("quit")
    qemu.program.communicate(timeout=30)
    assert qemu.program.returncode == 0
    assert machine.snapshot().contexts == ()


@pytest.mark.slow
def test_a_guest_drives_the_device(
    machine: Machine, device: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A Linux guest gives the device the physical address of a page, and finds the page written."""
    if kernel_tree.cached("bzImage") is None:
        pytest.skip("the kernel that would be the guest is not built (make oracle)")
    job = """
for device in /sys/bus/pci/devices/*; do
    if [ "$(cat $device/vendor):$(cat $device/device)" = 0x1af4:0x10f0 ]; then echo 1 > $device/enable; break; fi
done
python3 - $device <<'END'
import ctypes, mmap, os, sys
page = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
page[:] = bytes([1]) * 4096
address = ctypes.addressof(ctypes.c_char.from_buffer(page))
assert ctypes.CDLL(None).mlock(ctypes.c_void_p(address), ctypes.c_size_t(4096)) == 0
with open("/proc/self/pagemap", "rb") as pagemap:
    pagemap.seek(address // 4096 * 8)
    frame = int.from_bytes(pagemap.read(8), "little") & (1 << 55) - 1
bar = mmap.mmap(os.open(sys.argv[1] + "/resource0", os.O_RDWR), 4096)
registers = memoryview(bar).cast("Q")
before = registers[1]
registers[0] = frame * 4096 + 100
print(registers[1] - before, bytes(page[100:119]), page[99], page[119])
END
"""
    extra = ["-M", "q35", *device]
    assert oracle.boot(job, tmp_path, extra, timeout=120, memory="512M", start=machine.popen, qemu=QEMU) == 0
    assert capfd.readouterr().out.split(maxsplit=1)[1].strip() == f"{GREETING!r} 1 1"
    assert machine.snapshot().contexts == ()
