"""``iommufd machines``: lists the machines that can be named, or shows what one of them has.

Exit status: 0, 1 when there is no such machine or its description is wrong, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from iommufd.machine.machine import Machine


def has(machine: Machine) -> Iterator[tuple[str, str]]:
    """What a machine has: (what, which), for people."""
    release = ".".join(map(str, machine.world.kernel))
    yield "user API", f"Linux {release}, {len(machine.world.table)} commands"
    for name, driver in machine.iommus.items():
        traits = {
            "dirty tracking": driver.dirty,
            "page requests": driver.iommu.iopf_queue is not None,
            "PASIDs": driver.iommu.max_pasids > 0,
        }
        yield f"IOMMU {name}", ", ".join([driver.name, *(trait for trait, present in traits.items() if present)])
    slots = machine.pci.slots.values() if machine.iommus or _has_functions(machine) else ()
    for slot in slots:
        layout = slot.function.layout
        behind = slot.core.iommu.name if slot.core.iommu is not None else "no IOMMU"
        node = f", /dev/vfio/devices/{slot.vfio.node}" if slot.vfio is not None else ""
        what = f"{layout.vendor:04x}:{layout.device:04x} behind {behind}, group {slot.group_number}{node}"
        yield f"device {slot.address}", what
    if machine.world.test_build:
        yield "test hardware", "IOMMU_TEST_CMD, mock devices, fault injection files"
    paths = machine.paths()
    yield "/dev", ", ".join(path for path in sorted(paths) if path in ("/dev/iommu", "/dev/vfio/vfio"))
    for defect in sorted(machine.world.defects):
        yield "defect", defect


def _has_functions(machine: Machine) -> bool:
    return any(path.startswith("/sys/bus/pci/devices") for path in machine.paths())


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="iommufd machines",
        description="List the machines of `iommufd run --machine NAME`, or show what one of them has.",
    )
    made.add_argument("name", nargs="?", help="one machine, by name or description file (*.toml)")
    made.add_argument("--kernel", metavar="VERSION", help="as Linux VERSION (such as 6.6) shows it")
    return made


def show(name: str | None, kernel: str | None) -> None:
    """Prints the list, or one machine. ValueError and OSError when there is no such machine."""
    from rich.console import Console  # who runs programs does not wait for it
    from rich.table import Table

    from iommufd.machine.presets import PRESETS, preset

    console = Console(highlight=False)
    if name is None:
        table = Table("machine", "what it is", "devices", box=None, pad_edge=False)
        for entry in PRESETS.values():
            with preset(entry.name, kernel) as machine:
                table.add_row(entry.name, entry.summary, str(len(machine.devices) or ""))
        console.print(table)
        console.print("\n`iommufd machines NAME` shows one; a description file (*.toml) is a machine, too.")
        return
    with preset(name, kernel) as machine:
        console.print(f"machine {machine.name}")
        table = Table(show_header=False, box=None, pad_edge=False)
        for what, which in has(machine):
            table.add_row(what, which)
        console.print(table)


def main(argv: Sequence[str]) -> int:
    options = parser().parse_args(argv)
    try:
        show(options.name, options.kernel)
        return 0
    except ValueError as error:
        print(f"iommufd machines: {error}", file=sys.stderr)
    except OSError as error:
        print(f"iommufd machines: {error.filename}: {error.strerror}", file=sys.stderr)
    return 1
