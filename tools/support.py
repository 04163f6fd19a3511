"""What the software serves: docs/support.md is generated here, from the dispatch tables themselves.

Every ioctl, every value of every flag set and enumeration of the published headers, and every kind of object has a
row: since which release Linux has it, which releases show it (``--kernel`` hides the rest), and what serves it. What
serves a command is the function its table leads to; what serves a value is a module that names it. What is in the
headers and served by nothing needs a reason in :data:`REASONS`. ``python -m tools.support`` writes the page;
``--check`` fails if it is not up to date, has an empty cell, or a reason that nothing needs.
"""

from __future__ import annotations

import argparse
import ast
import fnmatch
import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import IntEnum, IntFlag
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from iommufd.engine import vfio_compat
from iommufd.engine.object import Object
from iommufd.machine.machine import FIRST_RELEASE
from iommufd.machine.presets import preset
from iommufd.selftest.driver import MockDriver
from iommufd.selftest.test_command import TestCommand
from iommufd.uapi import iommufd as u
from iommufd.uapi import iommufd_test as t
from iommufd.uapi import releases
from iommufd.uapi import vfio as v
from iommufd.uapi.commands import BY_NAME, COMMANDS
from iommufd.uapi.declare import Release, Struct
from iommufd.uapi.vfio.commands import CONTAINER, DEVICE, GROUP, VfioCommand
from iommufd.vfio import device_file, group

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src/iommufd"
PAGE = ROOT / "docs/support.md"
SERVING = ("engine", "iommu", "selftest", "vfio")  # the rooms whose naming a value is serving it

# What Linux 7.3 has in its headers and no module of ours names, and why that is the kernel's answer too.
REASONS = {
    "IOMMU_PGFAULT_*": "iommu/faults.py hands the device's report on as it is",
    "IOMMU_HW_INFO_*VTD*": "hardware of Intel: no machine has it, and the type is refused as on a host without",
    "IOMMU_HW_INFO_*SMMUV3*": "hardware of Arm: no machine has it, and the type is refused as on a host without",
    "IOMMU_HW_INFO_TYPE_TEGRA241_CMDQV": "hardware of NVIDIA: refused as on a host without",
    "IOMMU_HW_INFO_TYPE_AMD": "hardware of AMD: refused as on a host without",
    "IOMMU_VTD_*": "hardware of Intel: refused as on a host without",
    "IOMMU_HWPT_*DATA_VTD_S1": "hardware of Intel: refused as on a host without",
    "IOMMU_HWPT_DATA_ARM_SMMUV3": "hardware of Arm: refused as on a host without",
    "IOMMU_HWPT_DATA_AMD_GUEST": "hardware of AMD: refused as on a host without",
    "IOMMU_*_TYPE_ARM_SMMUV3": "hardware of Arm: refused as on a host without",
    "IOMMU_VIOMMU_INVALIDATE_DATA_ARM_SMMUV3": "hardware of Arm: refused as on a host without",
    "IOMMU_*_TYPE_TEGRA241_CMDQV": "hardware of NVIDIA: refused as on a host without",
    "VFIO_IOMMU_ENABLE": "ENOTTY, as from the kernel's iommufd: a command of the POWER container",
    "VFIO_IOMMU_DISABLE": "ENOTTY, as from the kernel's iommufd: a command of the POWER container",
    "VFIO_IOMMU_DIRTY_PAGES": "ENOTTY, as from the kernel's iommufd: dirty tracking is `IOMMU_HWPT_GET_DIRTY_BITMAP`",
    "VFIO_IOMMU_DIRTY_PAGES_FLAG_*": "ENOTTY: the command is not iommufd's",
    "VFIO_SPAPR_TCE*_IOMMU": "VFIO_CHECK_EXTENSION says 0, as the kernel's iommufd",
    "VFIO_EEH": "VFIO_CHECK_EXTENSION says 0, as the kernel's iommufd",
    "VFIO_UPDATE_VADDR": "VFIO_CHECK_EXTENSION says 0, as the kernel's iommufd",
    "VFIO_DMA_*MAP_FLAG_*": "EINVAL, as from the kernel's iommufd",
    "VFIO_DEVICE_FLAGS_*": "never told: the devices are PCI functions without device capabilities",
    "VFIO_DEVICE_DETACH_PASID": "vfio/device_file.py knows it as VFIO_DEVICE_ATTACH_PASID, the same bit",
    "VFIO_PCI_ATOMIC_COMP*": "never told: no port above the devices completes atomics",
    "VFIO_PCI_BAR*_REGION_INDEX": "vfio/device_file.py counts the BARs from 0",
    "VFIO_PCI_VGA_REGION_INDEX": "EINVAL: no device is a VGA adapter",
    "VFIO_DEVICE_IOEVENTFD": "ENOTTY (docs/deviations.md)",
    "VFIO_DEVICE_IOEVENTFD_*": "ENOTTY (docs/deviations.md)",
    "VFIO_DEVICE_FEATURE_*": "ENOTTY, as from a device that has not got the feature (docs/deviations.md)",
    "VFIO_DEVICE_STATE_*": "no device migrates: the feature is ENOTTY",
    "VFIO_MIGRATION_*": "no device migrates: the feature is ENOTTY",
    "VFIO_PRECOPY_INFO_*": "no device migrates: the feature is ENOTTY",
}

# Kind of object -> (what makes it, what its release is read from)
OBJECTS = {
    "IOAS": ("`IOMMU_IOAS_ALLOC`", "IOMMU_IOAS_ALLOC"),
    "HWPT_PAGING": ("`IOMMU_HWPT_ALLOC` on an IOAS; attaching a device to an IOAS", "IOMMU_IOAS_ALLOC"),
    "HWPT_NESTED": ("`IOMMU_HWPT_ALLOC` on a parent page table or a vIOMMU", "IOMMU_HWPT_ALLOC_NEST_PARENT"),
    "DEVICE": ("binding a device: `VFIO_DEVICE_BIND_IOMMUFD`, a VFIO group, the test command", "IOMMU_IOAS_ALLOC"),
    "ACCESS": ("an emulated device, from Python or the test command; a no-IOMMU device", "IOMMU_IOAS_ALLOC"),
    "FAULT": ("`IOMMU_FAULT_QUEUE_ALLOC`", "IOMMU_FAULT_QUEUE_ALLOC"),
    "VIOMMU": ("`IOMMU_VIOMMU_ALLOC`", "IOMMU_VIOMMU_ALLOC"),
    "VDEVICE": ("`IOMMU_VDEVICE_ALLOC`", "IOMMU_VDEVICE_ALLOC"),
    "VEVENTQ": ("`IOMMU_VEVENTQ_ALLOC`", "IOMMU_VEVENTQ_ALLOC"),
    "HW_QUEUE": ("`IOMMU_HW_QUEUE_ALLOC`", "IOMMU_HW_QUEUE_ALLOC"),
    "SELFTEST": ("the test command, for its devices", "IOMMU_TEST_CMD"),
}

Row = list[str]
VfioTable = dict[int, tuple[str, Any]]


def dotted(at: Release) -> str:
    return ".".join(map(str, at))


def served_by(handler: Callable[..., Any]) -> str:
    """The function behind a row of a table, as module and name."""
    function = getattr(handler, "__func__", handler)
    return f"{function.__module__.removeprefix('iommufd.')}.{function.__name__.lstrip('_')}"


# --- releases


@cache
def columns() -> tuple[Release, ...]:
    """The releases in which something of the interface changed, and the first and the last."""
    found = {command.since for command in COMMANDS} | {FIRST_RELEASE, (7, 3)}
    found |= {member.since for command in COMMANDS for member in command.struct.FIELDS}
    found |= {arm.SINCE for arm in t.ARMS.values()} | set(releases.VALUES.values())
    return tuple(sorted(found))


def shown(since: Release) -> Row:
    """One cell a release: whether it has what came with ``since``."""
    return ["yes" if since <= at else "-" for at in columns()]


# --- values


def modules(package: ModuleType) -> Iterator[ModuleType]:
    if not hasattr(package, "__path__"):
        yield package
        return
    for info in pkgutil.iter_modules(package.__path__):
        yield importlib.import_module(f"{package.__name__}.{info.name}")


@cache
def named_in() -> dict[str, str]:
    """Name -> the module of a serving room that has it in its code (the first, in alphabetical order)."""
    found: dict[str, str] = {}
    for path in sorted(path for room in SERVING for path in (SOURCE / room).rglob("*.py")):
        where = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None
            if name is not None:
                found.setdefault(name, where)
    return found


@cache
def c_names(module: ModuleType) -> dict[str, dict[str, str]]:
    """Class -> member -> the C constant its value is, read from the source of the class."""
    found: dict[str, dict[str, str]] = {}
    tree = ast.parse(Path(str(module.__file__)).read_text())
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            members = [line for line in node.body if isinstance(line, ast.Assign) and isinstance(line.value, ast.Name)]
            found[node.name] = {
                target.id: line.value.id
                for line in members
                for target in line.targets
                if isinstance(target, ast.Name) and isinstance(line.value, ast.Name)
            }
    return found


class Used(set[str]):
    """The reasons that were needed."""


def reason(name: str, used: Used) -> str:
    """Why nothing names ``name``; empty when there is no reason, which the page must not have."""
    for pattern, text in REASONS.items():
        if fnmatch.fnmatchcase(name, pattern):
            used.add(pattern)
            return text
    return ""


def first_release(symbols: type[IntEnum] | type[IntFlag], module: ModuleType) -> Release:
    """When the first field of this type came."""
    found = [
        member.since
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, Struct)
        for member in kind.FIELDS
        if member.symbols is symbols
    ]
    return min(found, default=FIRST_RELEASE)


def value_tables(package: ModuleType, used: Used) -> Iterator[str]:
    """A table for every flag set and enumeration of a header."""
    for module in modules(package):
        for name, symbols in list(vars(module).items()):
            if not (isinstance(symbols, type) and issubclass(symbols, IntEnum | IntFlag)):
                continue
            if symbols.__module__ != module.__name__:
                continue
            of_class = first_release(symbols, module)
            rows = []
            for member in symbols:
                constant = c_names(module)[name].get(member.name or "", member.name or "")
                since = releases.VALUES.get(constant, of_class)
                home = named_in().get(constant)
                serves = f"`{home}`" if home is not None else reason(constant, used)
                rows.append([f"`{constant}`", f"{int(member):#x}", dotted(since), *shown(since), serves])
            yield from table(f"#### {name}", ["value", "number", "since", *map(dotted, columns()), "served by"], rows)


# --- tables


def table(title: str, heads: Sequence[str], rows: Iterable[Row]) -> Iterator[str]:
    yield from ("", title, "", f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}")
    for row in rows:
        yield f"| {' | '.join(row)} |"


def native() -> Iterator[Row]:
    """From the tables that machines of each release really have."""
    tables = [preset("mock", at).world.table for at in columns()]
    for command in COMMANDS:
        row = tables[-1].get(command.number)
        sizes = [str(found[command.number].full) if command.number in found else "-" for found in tables]
        serves = "" if row is None else f"`{served_by(row.handler)}`"
        yield [f"`{command.name}`", f"{command.number:#x}", dotted(command.since), *sizes, serves]


def test_ops() -> Iterator[Row]:
    ops = TestCommand(MockDriver())._ops
    for op in t.iommu_test_op:
        since = t.ARMS[op].SINCE
        serves = f"`{served_by(ops[op])}`" if op in ops else ""
        yield [f"`IOMMU_TEST_OP_{op.name}`", str(int(op)), dotted(since), *shown(since), serves]


def vfio(commands: Iterable[VfioCommand], tables: Iterable[VfioTable], used: Used) -> Iterator[Row]:
    handlers = {number: handler for found in tables for number, (_, handler) in found.items()}
    for command in commands:
        handler = handlers.get(command.number)
        serves = reason(command.name, used) if handler is None else f"`{served_by(handler)}`"
        yield [f"`{command.name}`", f"{command.number:#x}", dotted(command.since), *shown(command.since), serves]


def kinds(base: type[Object] = Object) -> Iterator[type[Object]]:
    """Every class of object that a context can hold."""
    for kind in base.__subclasses__():
        if "kind" in vars(kind) and not kind.__name__.startswith("_") and kind.__module__.startswith("iommufd."):
            yield kind
        yield from kinds(kind)


def objects() -> Iterator[Row]:
    by_kind = {kind.kind: kind for kind in kinds()}
    for name in sorted({*by_kind, *OBJECTS}, key=lambda kind: [*OBJECTS, kind].index(kind)):
        made_by, origin = OBJECTS.get(name, ("", "IOMMU_IOAS_ALLOC"))
        since = releases.VALUES.get(origin) or BY_NAME[origin].since
        serves = f"`{by_kind[name].__module__.removeprefix('iommufd.')}`" if name in by_kind else ""
        yield [f"`{name}`", made_by, dotted(since), *shown(since), serves]


def page() -> tuple[str, list[str]]:
    """The page's text, and one sentence per thing that is wrong with it."""
    used = Used()
    when = ["since", *map(dotted, columns()), "served by"]
    vfio_tables = (
        ("VFIO containers: `/dev/iommu`, `/dev/vfio/vfio`", CONTAINER, [vfio_compat._TABLE]),
        ("VFIO groups: `/dev/vfio/N`", GROUP, [group._TABLE]),
        ("VFIO devices: `/dev/vfio/devices/vfioN`", DEVICE, [device_file._CDEV, device_file._TABLE]),
    )
    lines = [
        "# What is supported",
        "",
        "Generated from the dispatch tables by `python -m tools.support`; a test keeps it up to date.",
        "The interface is that of Linux 7.3; `iommufd run --kernel VERSION` hides what that release did not have.",
        *table(
            "## Commands of `/dev/iommu`\n\nUnder each release: the bytes of the struct that it knows; `-`: ENOTTY.",
            ["command", "number", *when],
            native(),
        ),
        *table(
            "## Ops of the test command\n\nOn machines `mock` and `mock@7.3.4`; `-`: EOPNOTSUPP.",
            ["op", "number", *when],
            test_ops(),
        ),
        "",
        "## VFIO",
        "",
        "What is older than iommufd is marked 6.2.",
    ]
    for title, commands, tables in vfio_tables:
        lines += table(f"### {title}", ["command", "number", *when], vfio(commands, tables, used))
    lines += table("## Objects", ["object", "made by", *when], objects())
    for title, package in (
        ("Flags and values of `iommufd.h`", u),
        ("Flags and values of the test command", t),
        ("Flags and values of `vfio.h`, the part that iommufd and its devices serve", v),
    ):
        lines += ["", f"## {title}", *value_tables(package, used)]
    text = "\n".join([*lines, ""])
    wrong = [f"an empty cell: {line}" for line in lines if "|  |" in line]
    wrong += [f"the reason of {pattern} is not needed" for pattern in REASONS if pattern not in used]
    return text, wrong


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools.support", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail on empty cells or an old page")
    options = parser.parse_args(argv)
    text, wrong = page()
    if options.check:
        if not PAGE.exists() or PAGE.read_text() != text:
            wrong.append("docs/support.md is not what `python -m tools.support` writes")
    else:
        PAGE.write_text(text)
    for sentence in wrong:
        print(sentence)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
