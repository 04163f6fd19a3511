"""Machines described in TOML files: what :mod:`.builder` says, written down (``iommufd run --machine FILE``).

::

    name = "two-nics"                # shown in traces; default: the file's name
    kernel = "6.14"                  # the release whose user API is shown
    mock = false                     # the kernel's selftest hardware too

    [[iommu]]
    name = "iommu0"
    dirty = true                     # options of Machine.add_iommu

    [[device]]
    address = "0000:01:00.0"
    iommu = "iommu0"
    group = "nics"
    reserved = [{ first = 0x8000000, last = 0x80fffff, type = "direct" }]
    vendor = 0x8086                  # members of PciLayout
    bars = [0x10000, { size = 0x1000, kind = "registers" }]

Every key is an argument of :class:`~iommufd.machine.machine.Machine` or of its ``add_iommu`` and ``add_device``; any
other is an error that names those there are.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from typing import Any, TypeAlias

from iommufd.machine.builder import choices
from iommufd.machine.machine import Machine

_MACHINE = {"name": str, "kernel": str, "mock": bool, "noiommu": bool, "vfio_container": bool, "defects": list}
_DEVICE = {
    "address": str,
    "iommu": str,
    "group": str,
    "reserved": list,
    "noiommu": bool,
    "pasids": int,
    "isolated_msi": bool,
}
_WORDS = {str: "a text", bool: "true or false", int: "a number", list: "a list"}


class DescriptionError(ValueError):
    """A description file that describes no machine; the message names the file and what is wrong."""


def load(path: str | os.PathLike[str], kernel: str | tuple[int, ...] | None = None) -> Machine:
    """The machine the file describes; ``kernel`` replaces the release in it. OSError, DescriptionError."""
    where = os.fspath(path)
    with open(where, "rb") as file:
        try:
            described = tomllib.load(file)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise DescriptionError(f"{where} is not TOML: {error}") from None
    try:
        return build(described, os.path.basename(where).removesuffix(".toml"), kernel)
    except (ValueError, TypeError) as error:
        raise DescriptionError(f"{where}: {error}") from None


TomlValue: TypeAlias = Any
"""Whatever a TOML file has there; :func:`_check` and the builder look before they believe."""


def build(described: Mapping[str, TomlValue], name: str, kernel: str | tuple[int, ...] | None = None) -> Machine:
    """The machine of a parsed description; ``name`` unless it has one. ValueError, TypeError."""
    for key in described:
        if key not in _MACHINE and key not in ("iommu", "device"):
            raise ValueError(f"there is no {key!r}; a machine has: {choices([*_MACHINE, '[[iommu]]', '[[device]]'])}")
    _check(described, _MACHINE, "the machine")
    options: dict[str, TomlValue] = {
        key: described[key] for key in ("noiommu", "vfio_container", "defects") if key in described
    }
    release = kernel if kernel is not None else described.get("kernel")
    if release is not None:
        options["kernel"] = release
    machine = Machine(described.get("name", name), **options)
    if described.get("mock"):
        machine.add_mock()
    for table in _tables(described, "iommu"):
        machine.add_iommu(**table)
    for table in _tables(described, "device"):
        who = f"device {table.get('address', '?')}"
        if "address" not in table:
            raise ValueError("a device needs an address, such as 0000:01:00.0")
        _check(table, _DEVICE, who)
        if "model" in table or "layout" in table:
            raise ValueError(f"{who}: a model or layout is code; build this machine in Python")
        machine.add_device(**table)
    return machine


def _tables(described: Mapping[str, TomlValue], key: str) -> list[dict[str, TomlValue]]:
    found = described.get(key, [])
    if not isinstance(found, list) or not all(isinstance(table, dict) for table in found):
        raise ValueError(f"{key} is a table in double brackets, [[{key}]], as there can be several")
    return found


def _check(table: Mapping[str, TomlValue], kinds: Mapping[str, type], who: str) -> None:
    for key, kind in kinds.items():
        if key in table and type(table[key]) is not kind:
            raise ValueError(f"{who}: {key} is {_WORDS[kind]}, not {table[key]!r}")
