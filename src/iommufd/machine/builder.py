"""Building a machine: IOMMUs, PCI functions and test hardware by name (kernel: what probing finds at boot).

:class:`~iommufd.machine.machine.Machine` offers these as methods; a description file (:mod:`.description`) says the
same in TOML. Whatever a person can get wrong is a ValueError (or TypeError) of one sentence that names what there is,
raised before the machine has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeAlias

from iommufd.errors import KernelError
from iommufd.iommu.driver import RegionType, ReservedRegion
from iommufd.iommu.drivers.pci_basic import PciBasicDriver
from iommufd.iommu.faults import LAST_PAGE, PASID_VALID, PageRequest, report_device_fault
from iommufd.vfio.pci_config import Bar, BarKind, PciLayout
from iommufd.vfio.pci_function import PciFunction

if TYPE_CHECKING:
    from iommufd.iommu.device import Device
    from iommufd.machine.machine import Machine
    from iommufd.vfio.device import VfioDevice

Reserved: TypeAlias = "tuple[int, int] | tuple[int, int, str] | Mapping[str, object] | ReservedRegion"
"""A reserved region as it may be given; see :func:`reserved_region`."""

PCI_DRIVERS: dict[str, Callable[..., PciBasicDriver]] = {"pci_basic": PciBasicDriver}
"""IOMMU drivers that PCI functions can be behind, by name."""

PERMISSIONS = {"r": 1, "w": 2, "x": 4, "p": 8}
"""Letters of a page request's permission: read, write, execute, privileged."""


def choices(names: Iterable[str]) -> str:
    """``a, b, c``, for the end of a sentence."""
    return ", ".join(names) or "none"


# ------------------------------------------------------------------------------------------------------------- IOMMUs


# **options, **config: Any, because what they go to is chosen by name, or a dataclass's members; both are checked here


def add_iommu(machine: Machine, driver: str = "pci_basic", name: str | None = None, **options: Any) -> PciBasicDriver:
    """One more IOMMU; see :meth:`~iommufd.machine.machine.Machine.add_iommu`."""
    make = PCI_DRIVERS.get(driver)
    if make is None:
        hint = "; the mock hardware is added with add_mock()" if driver == "mock" else ""
        raise ValueError(f"there is no IOMMU driver {driver!r}; there are: {choices(PCI_DRIVERS)}{hint}")
    chosen = name if name is not None else f"iommu{len(machine.iommus)}"
    if not chosen or "/" in chosen:
        raise ValueError(f"{chosen!r} cannot be the name of an IOMMU: it is a name in /sys/class/iommu")
    if chosen in machine.iommus:
        raise ValueError(f"machine {machine.name} has an IOMMU {chosen!r} already")
    try:
        made = make(**options)
    except TypeError as error:
        raise TypeError(f"the IOMMU driver {driver!r} does not take these options: {error}") from None
    made.iommu.name = chosen
    machine.iommus[chosen] = made
    return made


def iommu_named(machine: Machine, iommu: object) -> PciBasicDriver:
    """The IOMMU that ``iommu`` means: itself, its name, or with None the machine's first, made when there is none."""
    if iommu is None:
        return next(iter(machine.iommus.values()), None) or add_iommu(machine)
    found = machine.iommus.get(iommu) if isinstance(iommu, str) else iommu
    if not isinstance(found, PciBasicDriver) or found not in machine.iommus.values():
        raise ValueError(f"machine {machine.name} has no IOMMU {iommu!r}; it has: {choices(machine.iommus)}")
    return found


# ------------------------------------------------------------------------------------------------------------ devices


def add_device(
    machine: Machine,
    address: str,
    *,
    iommu: object = None,
    group: str | None = None,
    reserved: Iterable[Reserved] = (),
    noiommu: bool = False,
    pasids: int = 0,
    isolated_msi: bool = True,
    model: Callable[[PciLayout, str, dict[int, int]], PciFunction] = PciFunction,
    layout: PciLayout | None = None,
    **config: Any,
) -> VfioDevice:
    """One more PCI function; see :meth:`~iommufd.machine.machine.Machine.add_device`."""
    regions = tuple(reserved_region(region, f"device {address}") for region in reserved)
    if layout is not None and config:
        raise ValueError(f"device {address}: give a layout, or {choices(config)}, not both")
    made = layout if layout is not None else layout_of(config, f"device {address}")
    if isinstance(pasids, bool) or not isinstance(pasids, int) or not 0 <= pasids <= 1 << 20:
        raise ValueError(f"device {address}: a function has 0 to {1 << 20} PASIDs, not {pasids!r}")
    if noiommu and (iommu is not None or regions or pasids):
        raise ValueError(f"device {address} is without IOMMU: it can have no iommu, reserved or pasids")
    driver = None if noiommu else iommu_named(machine, iommu)
    return machine.pci.add(
        address,
        made,
        model=model,
        driver=driver,
        group=group,
        noiommu=noiommu,
        pasids=pasids,
        isolated_msi=isolated_msi,
        reserved=regions,
    )


def layout_of(config: Mapping[str, Any], who: str) -> PciLayout:
    """The layout that the members in ``config`` describe; ``bars`` may be sizes, tables or Bars, None for a gap."""
    known = {field.name for field in fields(PciLayout)}
    for key in config:
        if key not in known:
            raise ValueError(f"{who}: there is no {key!r}; a function has: {choices(sorted(known))}")
    given = dict(config)
    if "bars" in given:
        if not isinstance(given["bars"], (list, tuple)):
            raise ValueError(f"{who}: bars is a list, not {given['bars']!r}")
        given["bars"] = tuple(bar_of(bar, f"{who}: BAR {index}") for index, bar in enumerate(given["bars"]))
    for field in fields(PciLayout):
        if field.name in given and field.type in ("int", "bool"):
            kind = int if field.type == "int" else bool
            value = given[field.name]
            if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                what = "a number" if kind is int else "true or false"
                raise ValueError(f"{who}: {field.name} is {what}, not {value!r}")
    for name, bits in (("vendor", 16), ("device", 16), ("subsystem_vendor", 16), ("subsystem_device", 16),
                       ("class_code", 24), ("revision", 8)):  # fmt: skip
        if not 0 <= given.get(name, 0) < 1 << bits:
            raise ValueError(f"{who}: {name} has {bits} bits, {given[name]:#x} does not fit")
    try:
        return PciLayout(**given)
    except ValueError as error:
        raise ValueError(f"{who}: {error}") from None


def bar_of(bar: object, who: str) -> Bar | None:
    """A Bar from what a person writes: None, 0 or {} (no BAR), a size, or a table of its members."""
    if bar is None or isinstance(bar, Bar):
        return bar
    if isinstance(bar, int) and not isinstance(bar, bool):
        bar = {"size": bar, "kind": "memory"} if bar else {}
    if not isinstance(bar, Mapping):
        raise ValueError(f"{who}: a BAR is a size or a table with a size, not {bar!r}")
    if not bar:
        return None
    known = {field.name for field in fields(Bar)}
    for key in bar:
        if key not in known:
            raise ValueError(f"{who}: there is no {key!r}; a BAR has: {choices(sorted(known))}")
    size, kind = bar.get("size"), bar.get("kind", "memory")
    if isinstance(size, bool) or not isinstance(size, int):
        raise ValueError(f"{who}: size is a number of bytes, not {size!r}")
    kinds = {k.value: k for k in BarKind}
    if not isinstance(kind, BarKind):
        if not isinstance(kind, str) or kind not in kinds:
            raise ValueError(f"{who}: there is no kind {kind!r}; there are: {choices(kinds)}")
        kind = kinds[kind]
    try:
        return Bar(**{**bar, "kind": kind})
    except ValueError as error:
        raise ValueError(f"{who}: {error}") from None


def reserved_region(region: object, who: str) -> ReservedRegion:
    """A region from ``(first, last)`` or ``(first, last, type)`` (``last`` inclusive), or a table with those keys."""
    if isinstance(region, ReservedRegion):
        return region
    if isinstance(region, Mapping):
        for key in region:
            if key not in ("first", "last", "type"):
                raise ValueError(f"{who}: there is no {key!r}; a reserved region has: first, last, type")
        region = (region.get("first"), region.get("last"), region.get("type", "reserved"))
    if not isinstance(region, (tuple, list)) or len(region) not in (2, 3):
        raise ValueError(f"{who}: a reserved region is (first, last) or (first, last, type), not {region!r}")
    first, last = _iova(region[0], who), _iova(region[1], who)
    kind = region[2] if len(region) == 3 else "reserved"
    types = {t.value: t for t in RegionType}
    if not isinstance(kind, RegionType):
        if not isinstance(kind, str) or kind not in types:
            raise ValueError(f"{who}: there is no region type {kind!r}; there are: {choices(types)}")
        kind = types[kind]
    if first > last:
        raise ValueError(f"{who}: the reserved region [{first:#x}, {last:#x}] ends before it begins")
    return ReservedRegion(first, last - first + 1, kind, prot=3 if kind in _DIRECT else 0)


def _iova(value: object, who: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**64:
        raise ValueError(f"{who}: {value!r} is no address of a reserved region")
    return value


_DIRECT = (RegionType.DIRECT, RegionType.DIRECT_RELAXABLE)


# ------------------------------------------------------------------------------------------------------ test hardware


def add_mock(machine: Machine) -> None:
    """The kernel's selftest hardware; see :meth:`~iommufd.machine.machine.Machine.add_mock`."""
    from iommufd.machine import fault_files
    from iommufd.selftest.driver import MockDriver
    from iommufd.selftest.test_command import TOP_NR, TestCommand

    if machine.world.test_build:
        raise ValueError(f"machine {machine.name} has the test hardware already")
    machine.add_rows(TestCommand(MockDriver()).rows, TOP_NR)
    fault_files.mount(machine)


# ------------------------------------------------------------------------------------------------------------- faults


def device_named(machine: Machine, name: str) -> Device:
    """The device ``name``: a PCI function by its address, or a device bound to an open context. ValueError."""
    found = {device.name: device for device in machine.devices}
    if name not in found:
        raise ValueError(f"machine {machine.name} has no device {name!r} now; it has: {choices(sorted(found))}")
    return found[name]


def page_request(
    machine: Machine, device: str, address: int, perm: str, pasid: int | None, group: int, last: bool
) -> PageRequest:
    """``device`` reports one page request; see :meth:`~iommufd.machine.machine.Machine.page_request`."""
    target = device_named(machine, device)
    if isinstance(address, bool) or not isinstance(address, int) or not 0 <= address < 2**64:
        raise ValueError(f"{address!r} is no address of a page request")
    if not perm or set(perm) - set(PERMISSIONS):
        raise ValueError(f"a page request's permission is made of the letters r, w, x and p, not {perm!r}")
    if pasid is not None and not 0 <= pasid < 1 << 20:
        raise ValueError(f"a PASID has 20 bits, {pasid!r} does not fit")
    if not 0 <= group < 1 << 32:
        raise ValueError(f"a page request's group has 32 bits, {group!r} does not fit")
    flags = (LAST_PAGE if last else 0) | (PASID_VALID if pasid is not None else 0)
    bits = sum(PERMISSIONS[letter] for letter in set(perm))
    request = PageRequest(flags=flags, pasid=pasid or 0, grpid=group, perm=bits, addr=address)
    try:
        report_device_fault(target, request)
    except KernelError as error:
        raise OSError(error.errno, error.why) from None
    return request
