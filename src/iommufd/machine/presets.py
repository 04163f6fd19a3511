"""The machines that can be named: ``iommufd run --machine NAME``.

``NAME@RELEASE`` is a machine that answers as that release does where it is itself wrong; its ``defects`` list says
where. A plain name behaves as intended.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from iommufd.engine.world import LATEST
from iommufd.machine.machine import Machine, shown_release

if TYPE_CHECKING:
    from iommufd.vfio.pci_config import PciLayout


class UnknownMachine(ValueError):
    """No machine of that name, or no such release of it; the message names what there is."""


@dataclass(frozen=True, slots=True)
class Preset:
    """A nameable machine: ``build(name, kernel)`` makes it, ``summary`` says what it is."""

    name: str
    summary: str
    build: Callable[[str, tuple[int, ...]], Machine]


def _default(name: str, kernel: tuple[int, ...]) -> Machine:
    return Machine(name, kernel=kernel)


def _mock(name: str, kernel: tuple[int, ...]) -> Machine:
    return _with_test_hardware(Machine(name, kernel=kernel))


def _mock_7_3_4(name: str, kernel: tuple[int, ...]) -> Machine:
    return _with_test_hardware(Machine(name, kernel=kernel, defects=DEFECTS_7_3_4, vfio_container=False))


def _with_test_hardware(machine: Machine) -> Machine:
    """A kernel built for tests: CONFIG_IOMMUFD_TEST and fault injection."""
    machine.add_mock()
    return machine


def _pci(name: str, kernel: tuple[int, ...]) -> Machine:
    """Functions with memory, MSI-X and PASIDs and no behaviour of their own; the second and third share a group."""
    from iommufd.vfio.pci_config import Bar, BarKind, PciLayout  # the other machines pay for none of this

    machine = Machine(name, kernel=kernel)
    layout = PciLayout(bars=(Bar(0x10000, BarKind.MEMORY), Bar(0x1000)), msix=4, msix_bar=1)
    for address, group in (("0000:00:03.0", None), ("0000:01:00.0", "both"), ("0000:01:00.1", "both")):
        machine.pci.add(address, layout, group=group, pasids=1 << 16)
    return machine


def _edu(name: str, kernel: tuple[int, ...]) -> Machine:
    """QEMU's edu three times, the second and third in one group: what the VM of ``make oracle`` has behind an IOMMU."""
    machine = _with_test_hardware(Machine(name, kernel=kernel, defects=DEFECTS_7_3_4))
    for address, group in (("0000:00:03.0", None), ("0000:01:01.0", "bridge"), ("0000:01:02.0", "bridge")):
        machine.pci.add(address, _edu_layout(), group=group)
    return machine


def _edu_noiommu(name: str, kernel: tuple[int, ...]) -> Machine:
    """QEMU's edu without an IOMMU, as another VM of ``make oracle`` has it."""
    machine = _with_test_hardware(Machine(name, kernel=kernel, defects=DEFECTS_7_3_4))
    machine.pci.add("0000:00:04.0", _edu_layout(), noiommu=True)
    return machine


def _edu_layout() -> PciLayout:
    from iommufd.vfio.pci_config import Bar, PciLayout

    return PciLayout(
        vendor=0x1234,
        device=0x11E8,
        class_code=0x00FF00,
        revision=0x10,
        bars=(Bar(1 << 20),),
        express=False,
        power_management=False,
    )


DEFECTS_7_3_4 = frozenset({"dmabuf-get-returns-0", "fault-cookie-0-becomes-free", "hw-queue-destroy-clears-slot-0"})
"""What Linux 7.3.4 does otherwise than intended and ``mock@7.3.4`` repeats."""

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("default", "/dev/iommu and /dev/vfio/vfio, no devices", _default),
        Preset("pci", "three PCI functions bound to vfio-pci behind an IOMMU, two of them in one group", _pci),
        Preset("edu", "three devices like QEMU's edu beside the mock hardware, without PASIDs, two in one group", _edu),
        Preset("edu-noiommu", "one such device that no IOMMU is in front of", _edu_noiommu),
        Preset("mock", "the kernel's selftest hardware and its test command, behaving as intended", _mock),
        Preset("mock@7.3.4", "the same, bit for bit as Linux 7.3.4 behaves, its defects included", _mock_7_3_4),
    )
}


def preset(name: str, kernel: str | tuple[int, ...] | None = None) -> Machine:
    """The machine called ``name``, or described by the file ``name`` (``*.toml``, or anything with a slash).

    ``kernel`` ("6.6") hides what later releases added (default: the latest known, or what the file says).
    UnknownMachine when there is none of that name, ValueError for a release without iommufd or a wrong description,
    OSError when the file cannot be read."""
    if name.endswith(".toml") or "/" in name:
        from iommufd.machine.description import load  # few machines are described

        return load(name, kernel)
    found = PRESETS.get(name)
    if found is None:
        raise UnknownMachine(f"there is no machine {name!r}; there are: {', '.join(PRESETS)}, and description files")
    return found.build(name, shown_release(LATEST if kernel is None else kernel))
