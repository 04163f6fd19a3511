"""Ledger: everything a machine owes at one moment, as plain values, to hold one moment against another.

Whatever fails, nothing leaks: a call that failed leaves objects and their counts, areas, reservations, pins, charges,
page tables and groups as they were. :func:`take` writes them down, :func:`difference` says in sentences what changed.
Pure reading; take it while no call is running. Frames that are known but not pinned, and the blocking domain a group
chose when it was first claimed, are no debts and left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from iommufd.engine.device import Device
from iommufd.engine.hwpt import HwptPaging
from iommufd.engine.ioas import IOAS
from iommufd.iommu.extent_domain import ExtentDomain
from iommufd.memory.frames import PAGE_SHIFT

if TYPE_CHECKING:
    from iommufd.engine.context import Context
    from iommufd.engine.group import Slot
    from iommufd.engine.object import Object
    from iommufd.engine.world import World
    from iommufd.iommu.group import Group
    from iommufd.memory.accounting import Process

Ledger = dict[str, object]
"""What is owed, by name; values compare with ``==``."""


def take(world: World, contexts: Iterable[Context], processes: Iterable[Process] = ()) -> Ledger:
    """Everything in ``contexts`` and in the machine's memory, and what ``processes`` are charged."""
    ledger: Ledger = {}
    groups: dict[int, Group] = {}
    for number, context in enumerate(contexts):
        at = f"context {number}"
        ledger[f"{at}: references"] = context.references
        ledger[f"{at}: ids in use"] = len(context.objects)
        ledger[f"{at}: tombstones"] = context.objects.tombstones
        ledger[f"{at}: compatibility IOAS"] = context.compat_ioas.id if context.compat_ioas is not None else None
        ledger[f"{at}: no-IOMMU mode"] = context.no_iommu_mode
        for obj in context.objects:
            _object(ledger, f"{at}: {obj.kind} {obj.id}", obj)
            if isinstance(obj, Device) and obj.device.group is not None:
                groups[id(obj.device.group)] = obj.device.group
    for group in groups.values():
        _group(ledger, group)
    for chunk in world.physical.frames:
        runs = chunk.pinned_in(0, chunk.npages)
        if runs:
            name = f"pins of frames from {chunk.base_pfn:#x}"
            ledger[name] = [(index, count, chunk.pins(index)) for index, count in runs]
    for uid, user in sorted(world.physical.users.items()):
        ledger[f"locked pages of uid {uid}"] = user.locked_pages
    for process in processes:
        ledger[f"VmPin pages of process {process.tgid}"] = process.space.pinned_vm
        ledger[f"VmLck pages of process {process.tgid}"] = process.space.locked_vm
    return ledger


def difference(before: Ledger, after: Ledger) -> list[str]:
    """One sentence per entry that differs; empty when nothing leaked and nothing was lost."""
    found = []
    for name in [*before, *(n for n in after if n not in before)]:
        was, is_ = before.get(name, "nothing"), after.get(name, "nothing")
        if was != is_:
            found.append(f"{name}: {was} became {is_}")
    return found


def _object(ledger: Ledger, at: str, obj: Object) -> None:
    ledger[at] = f"users {obj.users}, wait {obj.wait}"
    if isinstance(obj, IOAS):
        table = obj.io_pagetable
        ledger[f"{at}: areas"] = [
            (area.first, area.last, area.start, area.prot, area.accesses, area.locks, area.prevent_access)
            for area in table.areas.values()
        ]
        ledger[f"{at}: areas in progress"] = sum(area.pages is None for area in table.areas.values())
        ledger[f"{at}: reserved"] = sorted((first, last) for first, last, _ in table.reserved)
        ledger[f"{at}: allowed"] = list(table.allowed)
        ledger[f"{at}: alignment"] = (table.iova_alignment, table.large_pages_disabled)
        ledger[f"{at}: domains"] = len(table.domains)
        ledger[f"{at}: accesses"] = sorted(table.accesses)
        ledger[f"{at}: HWPTs"] = [hwpt.id for hwpt in obj.hwpts]
    if isinstance(obj, HwptPaging):
        _page_table(ledger, f"{at}: entries", obj.domain)
    if isinstance(obj, Device):
        ledger[f"{at}: attached"] = sorted(
            (pasid, slot.hwpt.id, sorted(slot.devices)) for pasid, slot in _slots(obj).items()
        )


def _page_table(ledger: Ledger, at: str, domain: object) -> None:
    """What the table maps; drivers with tables of another kind are known by their counts only."""
    if isinstance(domain, ExtentDomain):
        ledger[at] = [
            (iova, length, prot, offset, [(e.chunk.pfn(e.index) << PAGE_SHIFT, e.count) for e in extents])
            for iova, extents, offset, length, prot in domain.segments(0, 2**64)
        ]


def _slots(device: Device) -> dict[int, Slot]:
    return dict(device.igroup.attached) if device.igroup is not None else {}


def _group(ledger: Ledger, group: Group) -> None:
    at = f"group {group.name}"
    ledger[f"{at}: claims"] = group.owner_cnt
    ledger[f"{at}: domain"] = id(group.domain)
    ledger[f"{at}: attached PASIDs"] = sorted(group.handles)
