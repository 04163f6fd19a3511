"""machine/pci.py: functions, groups, the vfio-pci driver, and what /dev and /sys show of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from iommufd.engine.file import Pending
from iommufd.errors import KernelError, errno_name
from iommufd.machine.machine import Machine
from iommufd.machine.pci_nodes import bridge_of, device_path, modalias, resource_lines
from iommufd.machine.text_file import TextFile
from iommufd.vfio.pci_config import Bar, BarKind, PciLayout
from tests.vfio.conftest import EDU, NIC
from tests.vfio.program import Program

A, B, C = "0000:00:03.0", "0000:01:01.0", "0000:01:02.0"


@pytest.fixture
def machine() -> Iterator[Machine]:
    made = Machine("test")
    yield made
    made.close()


@pytest.fixture
def root(machine: Machine) -> Path:
    """The tree of a machine with three functions, two of them in one group behind a bridge."""
    machine.pci.add(A, EDU)
    machine.pci.add(B, NIC, group="g")
    machine.pci.add(C, EDU, group="g")
    return Path(machine.tree.root)


def _text(path: Path) -> str:
    return path.read_text().rstrip("\n")


# --- names


def test_addresses() -> None:
    assert (bridge_of(A), bridge_of(B), bridge_of("0000:09:00.0")) == (None, "0000:00:1c.0", "0000:00:1d.0")
    assert device_path(A) == f"/sys/devices/pci0000:00/{A}"
    assert device_path(B) == f"/sys/devices/pci0000:00/0000:00:1c.0/{B}"
    assert modalias(EDU) == "pci:v00001234d000011E8sv00001AF4sd00001100bc00scFFi00"


def test_resource_lines() -> None:
    layout = PciLayout(bars=(Bar(1 << 20), None, Bar(32, BarKind.IO), None, Bar(1 << 14, wide=True, prefetchable=True)))
    lines = resource_lines(layout, {0: 0xFEA00000, 2: 0xC000, 4: 0x380000000000}).split("\n")
    assert len(lines) == 13
    assert lines[0] == "0x00000000fea00000 0x00000000feafffff 0x0000000000040200"
    assert lines[1] == "0x0000000000000000 0x0000000000000000 0x0000000000000000"
    assert lines[2] == "0x000000000000c000 0x000000000000c01f 0x0000000000040101"
    assert lines[4] == "0x0000380000000000 0x0000380000003fff 0x000000000014220c"


@pytest.mark.parametrize("address", ["", "00:03.0", "0000:00:03.8", "0000:00:20.0", "0000:00:03.0 ", "0000:0A:00.0"])
def test_malformed_addresses(machine: Machine, address: str) -> None:
    with pytest.raises(ValueError, match="not a PCI address"):
        machine.pci.add(address)


def test_an_address_is_taken_once(machine: Machine) -> None:
    machine.pci.add(B)
    for taken in (B, "0000:00:1c.0"):  # the function, and its bridge
        with pytest.raises(ValueError, match="already"):
            machine.pci.add(taken)


# --- groups


def test_groups(machine: Machine) -> None:
    one, two = machine.pci.add(A), machine.pci.add(B, group="g")
    three, bare = machine.pci.add(C, group="g"), machine.pci.add("0000:00:05.0", noiommu=True)
    assert [d.group.number for d in (one, two, three, bare)] == [0, 1, 1, 2]
    assert two.device.group is three.device.group is not one.device.group
    assert bare.device.group is None
    assert [d.node for d in (one, bare)] == ["vfio0", "noiommu-vfio3"]
    assert [d.group.node for d in (one, bare)] == ["0", "noiommu-2"]
    for arguments in ({"group": "g", "noiommu": True}, {"group": "n"}):
        if "noiommu" not in arguments:
            machine.pci.add("0000:00:06.0", group="n", noiommu=True)
        with pytest.raises(ValueError, match="alone"):
            machine.pci.add("0000:00:07.0", **arguments)


def test_addresses_on_the_bus_do_not_overlap(machine: Machine) -> None:
    taken: list[tuple[int, int]] = []
    for n in range(4):
        function = machine.pci.add(f"0000:00:{n + 4:02x}.0", NIC).function
        for index, start in function.addresses.items():
            bar = NIC.bar(index) if index < 6 else None
            size = bar.size if bar is not None else NIC.rom_size
            assert start % size == 0
            assert all(start + size <= first or last <= start for first, last in taken)
            taken.append((start, start + size))


# --- what is seen


def test_a_program_finds_its_device(root: Path) -> None:
    """The ways programs go: from the address to the cdev, to the group, to the IOMMU."""
    at = root / "sys/bus/pci/devices" / A
    assert [p.name for p in (at / "vfio-dev").iterdir()] == ["vfio0"]
    assert _text(at / "vfio-dev/vfio0/dev") == "252:0"
    assert os.readlink(at / "vfio-dev/vfio0/device") == f"../../../{A}"
    assert (at / "iommu_group").resolve() == root / "sys/kernel/iommu_groups/0"
    assert (at / "driver").resolve().name == "vfio-pci"
    assert (at / "iommu").resolve().name == "iommu0"
    assert [_text(at / f) for f in ("vendor", "device", "class", "revision")] == [
        "0x1234",
        "0x11e8",
        "0x00ff00",
        "0x10",
    ]
    assert _text(at / "uevent").splitlines()[:2] == ["DRIVER=vfio-pci", "PCI_CLASS=FF00"]
    assert sorted(os.listdir(root / "dev/vfio/devices")) == ["vfio0", "vfio1", "vfio2"]
    assert sorted(os.listdir(root / "dev/vfio")) == ["0", "1", "devices", "vfio"]


def test_a_group_lists_its_members(root: Path) -> None:
    group = root / "sys/kernel/iommu_groups/1"
    assert sorted(os.listdir(group / "devices")) == [B, C]
    assert (group / "devices" / B).resolve() == root / f"sys/devices/pci0000:00/0000:00:1c.0/{B}"
    assert _text(group / "reserved_regions") == "0x00000000fee00000 0x00000000feefffff msi"
    assert sorted(os.listdir(root / "sys/class/vfio")) == ["0", "1"]
    assert _text(root / "sys/class/vfio/1/dev") == "253:1"


def test_every_link_leads_somewhere(root: Path, machine: Machine) -> None:
    for path, node in machine.paths().items():
        if node.target and not node.target.endswith("bus/pci"):
            assert (root / path[1:]).exists() or "class" in node.target, path


# --- the driver


def _file(machine: Machine, path: str) -> TextFile:
    file = machine.open(path, None, os.O_RDWR)
    assert isinstance(file, TextFile), path
    return file


def _write(machine: Machine, path: str, text: str) -> object:
    program = Program(machine)
    fd = program.open(path)
    try:
        result = _file(machine, path).write(
            program.backend.task(bytearray(text.encode())), 0xFFFF_8000_0000_0000, len(text)
        )
    except KernelError as error:
        return errno_name(error.errno)
    finally:
        program.close(fd)
    return result


def test_the_driver_comes_and_goes(machine: Machine, root: Path) -> None:
    old = machine.pci[A]
    driver = "/sys/bus/pci/drivers/vfio-pci"
    done = _write(machine, f"{driver}/unbind", A + "\n")
    assert isinstance(done, Pending)
    assert done.result == len(A) + 1
    assert not (root / "dev/vfio/devices/vfio0").exists()
    assert not (root / "dev/vfio/0").exists()
    assert not (root / "sys/kernel/iommu_groups/0/devices" / A / "driver").exists()
    assert (root / "sys/bus/pci/devices" / A / "vendor").exists()
    assert "DRIVER" not in (root / "sys/bus/pci/devices" / A / "uevent").read_text()
    assert (_write(machine, f"{driver}/unbind", A), _write(machine, f"{driver}/unbind", "x")) == ("ENODEV", "ENODEV")
    assert not old.registered

    override = f"{device_path(A)}/driver_override"
    assert _file(machine, override).show() == b"vfio-pci\n"
    assert _write(machine, override, "\n") == 1
    assert _file(machine, override).show() == b"(null)\n"
    assert _write(machine, f"{driver}/bind", A) == "ENODEV"
    assert _write(machine, "/sys/bus/pci/drivers_probe", A) == len(A)  # nobody wants it
    assert machine.pci.slots[A].vfio is None
    assert _write(machine, override, "vfio-pci\n") == 9
    assert _write(machine, "/sys/bus/pci/drivers_probe", "nothing") == "EINVAL"
    assert _write(machine, "/sys/bus/pci/drivers_probe", A + "\n") == len(A) + 1
    assert machine.pci[A].index == 0  # the lowest free number
    assert (root / "dev/vfio/0").exists()
    assert _write(machine, f"{driver}/bind", A) == "ENODEV"  # it has it


def test_an_open_device_is_waited_for(machine: Machine) -> None:
    machine.pci.add(A, EDU)
    program = Program(machine)
    fd, _ = program.bound(A, program.iommufd())
    done = _write(machine, "/sys/bus/pci/drivers/vfio-pci/unbind", A)
    assert isinstance(done, Pending)
    answers = [done.result]
    with pytest.raises(ValueError, match="still open"):
        machine.pci.bind_driver(A)
    program.close(fd)
    answers.append(done.result)
    assert answers == [None, len(A)]
    machine.pci.bind_driver(A)
    program.close_all()


def test_a_function_leaves(machine: Machine, root: Path) -> None:
    before = set(machine.paths())
    machine.pci.add("0000:00:07.0")
    assert set(machine.paths()) > before
    machine.pci.remove("0000:00:07.0")
    assert set(machine.paths()) == before
    assert not (root / "sys/bus/pci/devices/0000:00:07.0").exists()
    with pytest.raises(KeyError):
        machine.pci.remove("0000:00:07.0")
    machine.pci.remove(B)  # the group stays for the other member
    assert sorted(os.listdir(root / "sys/kernel/iommu_groups/1/devices")) == [C]
    assert (root / "sys/kernel/iommu_groups/1/type").exists()
    assert (root / "dev/vfio/1").exists()


def test_acting_files(machine: Machine) -> None:
    device = machine.pci.add(A, NIC)
    at = device_path(A)
    assert _file(machine, f"{at}/config").show()[:4] == bytes.fromhex("8680d310")
    device.function.config.write(0x3C, b"\x55")
    assert _file(machine, f"{at}/config").show()[0x3C] == 0x55
    assert (_write(machine, f"{at}/reset", "1"), _write(machine, f"{at}/reset", "2\n")) == (1, "EINVAL")
    unsafe = "/sys/module/vfio/parameters/enable_unsafe_noiommu_mode"
    assert _file(machine, unsafe).show() == b"N\n"
    assert (_write(machine, unsafe, "Y\n"), _write(machine, unsafe, "?")) == (2, "EINVAL")
    assert _file(machine, unsafe).show() == b"Y\n"
