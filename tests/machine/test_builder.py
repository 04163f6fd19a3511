"""Machines built in Python and from description files; page requests; failing calls."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import iommufd
from iommufd.iommu.driver import RegionType
from iommufd.machine.description import DescriptionError, load
from iommufd.machine.machine import Machine
from iommufd.machine.presets import preset
from iommufd.machine.snapshot import DeviceView, FaultView, IoasView
from iommufd.vfio.pci_config import BarKind

ONE, TWO = "0000:01:00.0", "0000:02:00.0"

TOML = """
name = "two"
kernel = "6.14"
mock = true

[[iommu]]
name = "unit"
dirty = true

[[device]]
address = "0000:01:00.0"
iommu = "unit"
group = "pair"
reserved = [{ first = 0x8000000, last = 0x80fffff, type = "direct" }, [0x9000000, 0x9000fff]]
vendor = 0x8086
bars = [0x10000, {}, { size = 0x1000, kind = "registers" }]
pasids = 16

[[device]]
address = "0000:01:00.1"
group = "pair"

[[device]]
address = "0000:02:00.0"
noiommu = true
"""


def described(tmp_path: Path, text: str) -> str:
    path = tmp_path / "described.toml"
    path.write_text(text)
    return str(path)


def test_a_machine_of_ones_own_is_a_machine_like_any_other() -> None:
    machine = Machine()
    assert (machine.name, machine.world.kernel, machine.devices) == ("custom", (7, 3), [])
    machine.add_device(ONE)
    assert list(machine.iommus) == ["iommu0"], "an IOMMU is made when a device needs one"
    assert {"/dev/iommu", "/dev/vfio/devices/vfio0"} <= machine.paths().keys()
    with iommufd.open(machine) as context, context.open_device(ONE) as device, context.alloc_ioas() as ioas:
        device.attach(ioas)
        assert machine.snapshot().one(DeviceView).name == ONE


def test_reserved_regions_keep_mappings_out() -> None:
    machine = Machine()
    machine.add_device(ONE, reserved=[(0x8000000, 0x80FFFFF), (0x9000000, 0x9000FFF, "direct-relaxable")])
    with iommufd.open(machine) as context, context.open_device(ONE) as device, context.alloc_ioas() as ioas:
        device.attach(ioas)
        assert (0x8000000, 0x80FFFFF) in machine.snapshot().one(IoasView).reserved
        assert all(first != 0x9000000 for first, _ in machine.snapshot().one(IoasView).reserved)
    text = machine.paths()["/sys/kernel/iommu_groups/0/reserved_regions"].text.decode()
    assert "0x0000000008000000 0x00000000080fffff reserved" in text


def test_a_device_faults_and_is_answered() -> None:
    machine = Machine()
    machine.add_device(ONE, iommu=machine.add_iommu(page_requests=True))
    with pytest.raises(OSError, match="no page table is attached"):
        machine.page_request(ONE, 0x1000)
    with (
        iommufd.open(machine) as context,
        context.alloc_fault_queue() as queue,
        context.open_device(ONE) as device,
        context.alloc_ioas() as ioas,
    ):
        hwpt = ioas.alloc_hwpt(device, fault_queue=queue)
        device.attach(hwpt)
        first = machine.page_request(ONE, 0x1000, "w", group=7, last=False)
        second = machine.page_request(ONE, 0x2000, "rx", group=7)
        assert machine.snapshot().one(FaultView).waiting == 1
        group = next(iter(queue))
        assert [(r.address, int(r.perm)) for r in group] == [(0x1000, 2), (0x2000, 5)]
        group.respond()
        assert (first.answer, second.answer) == (None, 0)
        device.detach()
        hwpt.close()


def test_an_iommu_without_page_requests_takes_no_fault_queue() -> None:
    machine = Machine()
    machine.add_device(ONE)
    with (
        iommufd.open(machine) as context,
        context.alloc_fault_queue() as queue,
        context.open_device(ONE) as device,
        context.alloc_ioas() as ioas,
        ioas.alloc_hwpt(device, fault_queue=queue) as hwpt,
        pytest.raises(OSError, match="no queue for page requests"),
    ):
        device.attach(hwpt)


def test_calls_fail_by_rule() -> None:
    machine = Machine()
    with iommufd.open(machine) as context:
        with machine.failing("IOAS_ALLOC:ENOSPC") as rule:
            with pytest.raises(OSError, match="fault injection"):
                context.alloc_ioas()
            context.alloc_ioas().close()
        assert (rule.hits, rule.count) == (1, 2)


def test_a_description_is_the_same_in_toml(tmp_path: Path) -> None:
    machine = load(described(tmp_path, TOML))
    assert (machine.name, machine.world.kernel, machine.world.test_build) == ("two", (6, 14), True)
    assert machine.iommus["unit"].dirty
    slots = machine.pci.slots
    assert list(slots) == [ONE, "0000:01:00.1", TWO]
    one, other, alone = slots.values()
    assert one.group_number == other.group_number != alone.group_number
    layout = one.function.layout
    assert (layout.vendor, [b and (b.size, b.kind) for b in layout.bars]) == (
        0x8086,
        [(0x10000, BarKind.MEMORY), None, (0x1000, BarKind.REGISTERS)],
    )
    assert [(r.start, r.length, r.type) for r in one.core.resv_regions()[1:]] == [
        (0x8000000, 0x100000, RegionType.DIRECT),
        (0x9000000, 0x1000, RegionType.RESERVED),
    ]
    assert one.core.pasid_limit == 16
    assert alone.core.driver is None
    assert preset(described(tmp_path, TOML), "6.6").world.kernel == (6, 6)
    assert load(described(tmp_path, "")).name == "described"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("name = ", "is not TOML"),
        ("colour = 1", "there is no 'colour'; a machine has: name, kernel, mock"),
        ("mock = 1", "the machine: mock is true or false, not 1"),
        ('kernel = "six"', "'six' is not a kernel release"),
        ("[device]\naddress = '0000:01:00.0'", "device is a table in double brackets"),
        ("[[device]]\niommu = 'x'", "a device needs an address"),
        ("[[device]]\naddress = '1'", "'1' is not a PCI address"),
        ("[[device]]\naddress = '0000:01:00.0'\niommu = 'x'", "has no IOMMU 'x'; it has: none"),
        ("[[device]]\naddress = '0000:01:00.0'\nvendro = 1", "device 0000:01:00.0: there is no 'vendro'"),
        ("[[device]]\naddress = '0000:01:00.0'\nmodel = 'x'", "build this machine in Python"),
        ("[[iommu]]\ndriver = 'vtd'", "there is no IOMMU driver 'vtd'"),
        ("[[iommu]]\nspeed = 3", "does not take these options"),
        ("[[iommu]]\nname = 'a'\n[[iommu]]\nname = 'a'", "has an IOMMU 'a' already"),
    ],
)
def test_a_wrong_description_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    path = described(tmp_path, text)
    with pytest.raises(DescriptionError) as raised:
        load(path)
    assert str(raised.value).startswith(path)
    assert sentence in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        preset(os.fspath(tmp_path / "missing.toml"))


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda m: m.add_device(ONE), "there is a PCI function at 0000:01:00.0 already"),
        (lambda m: m.add_device(3), "3 is not a PCI address"),
        (lambda m: m.add_device(TWO, bars=3), "bars is a list, not 3"),
        (lambda m: m.add_device(TWO, bars=[3]), "BAR 0: a BAR of 3 bytes; it must be a power of two"),
        (lambda m: m.add_device(TWO, bars=["x"]), "a BAR is a size or a table with a size, not 'x'"),
        (lambda m: m.add_device(TWO, bars=[{"size": 4096, "kind": "soft"}]), "there is no kind 'soft'"),
        (lambda m: m.add_device(TWO, bars=[{"length": 4096}]), "there is no 'length'; a BAR has"),
        (lambda m: m.add_device(TWO, vendor=0x10000), "vendor has 16 bits, 0x10000 does not fit"),
        (lambda m: m.add_device(TWO, vendor="x"), "vendor is a number, not 'x'"),
        (lambda m: m.add_device(TWO, msix=4), "the MSI-X table at 0x0 does not fit BAR 0"),
        (lambda m: m.add_device(TWO, pasids=-1), "a function has 0 to 1048576 PASIDs, not -1"),
        (lambda m: m.add_device(TWO, noiommu=True, pasids=1), "is without IOMMU"),
        (lambda m: m.add_device(TWO, reserved=[(3, 2)]), "ends before it begins"),
        (lambda m: m.add_device(TWO, reserved=[3]), "a reserved region is (first, last)"),
        (lambda m: m.add_device(TWO, reserved=[(0, 1, "x")]), "there is no region type 'x'"),
        (lambda m: m.add_device(TWO, reserved=[(0, 2**64)]), "no address of a reserved region"),
        (lambda m: m.add_iommu("mock"), "the mock hardware is added with add_mock()"),
        (lambda m: m.add_iommu(name="a/b"), "cannot be the name of an IOMMU"),
        (lambda m: m.page_request("x", 0), "has no device 'x' now; it has: 0000:01:00.0"),
        (lambda m: m.page_request(ONE, -1), "-1 is no address"),
        (lambda m: m.page_request(ONE, 0, "z"), "letters r, w, x and p, not 'z'"),
        (lambda m: m.page_request(ONE, 0, pasid=1 << 20), "a PASID has 20 bits"),
        (lambda m: (m.add_mock(), m.add_mock()), "has the test hardware already"),
        (lambda m: Machine(kernel="6.1"), "Linux 6.1 has no /dev/iommu; it came with 6.2"),
        (lambda m: Machine(kernel=(6,)), "a kernel release has at least two numbers"),
    ],
)
def test_what_cannot_be_is_one_sentence_and_changes_nothing(wrong: Callable[[Any], object], sentence: str) -> None:
    machine = Machine()
    machine.add_device(ONE)
    paths = machine.paths().keys()
    with pytest.raises(ValueError, match=re.escape(sentence)):
        wrong(machine)
    assert "mock" in sentence or "test hardware" in sentence or machine.paths().keys() == paths
