"""Snapshot: what is inside a machine at one moment, as values that never change (``machine.snapshot()``).

For tests that hold both ends: the program under test on one side, this on the other. Taking one takes the machine's
lock for the length of a copy, changes nothing, and may be done while programs run.

::

    snapshot = machine.snapshot()
    ioas = snapshot.one(IoasView)
    assert [area.length for area in ioas.areas] == [4096]
    assert snapshot.pinned_pages == 1
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from iommufd.engine.access import Access
from iommufd.engine.device import Device
from iommufd.engine.fault import FaultQueue
from iommufd.engine.hwpt import HwptNested, HwptPaging
from iommufd.engine.ioas import IOAS
from iommufd.engine.vdevice import Vdevice
from iommufd.engine.viommu import Viommu

if TYPE_CHECKING:
    from iommufd.engine.area import Area
    from iommufd.engine.context import Context
    from iommufd.engine.object import Object
    from iommufd.machine.machine import Machine


@dataclass(frozen=True, slots=True)
class AreaView:
    """One mapping ``[first, last]`` of an IOAS.

    ``source`` is where its memory comes from: ``memory`` of process ``pid`` from its address ``address`` on, a
    ``file`` or a ``dmabuf`` from byte ``address`` on. ``dma``: its pages are pinned because page tables map them;
    ``accesses`` counts the pins of kernel-internal users. ``source`` is ``in progress`` while a call makes it."""

    first: int
    last: int
    readable: bool
    writeable: bool
    source: str
    pid: int
    address: int
    dma: bool
    accesses: int

    @property
    def length(self) -> int:
        """Bytes."""
        return self.last - self.first + 1

    @property
    def pinned(self) -> bool:
        """Whether anybody holds its pages."""
        return self.dma or self.accesses > 0

    def __str__(self) -> str:
        flags = ("r" if self.readable else "-") + ("w" if self.writeable else "-")
        return f"[{self.first:#x}, {self.last:#x}] {flags} {self.source} {self.address:#x}"


@dataclass(frozen=True, slots=True)
class ObjectView:
    """An object of a context. ``users`` counts who holds it besides the table: 0 means IOMMU_DESTROY would work."""

    id: int
    kind: str
    users: int

    def __str__(self) -> str:
        return f"{self.kind} {self.id}"


@dataclass(frozen=True, slots=True)
class IoasView(ObjectView):
    """``hwpts`` are the page tables that map it; ``reserved`` and ``allowed`` ranges are (first, last)."""

    areas: tuple[AreaView, ...] = ()
    reserved: tuple[tuple[int, int], ...] = ()
    allowed: tuple[tuple[int, int], ...] = ()
    hwpts: tuple[int, ...] = ()

    def area_at(self, iova: int) -> AreaView | None:
        """The area that maps ``iova``."""
        return next((area for area in self.areas if area.first <= iova <= area.last), None)


@dataclass(frozen=True, slots=True)
class HwptView(ObjectView):
    """A page table. ``parent`` is the IOAS of a paging one, the HWPT under a nested one; ``automatic``: made by an
    attach; ``fault``: the queue its page requests go to, or None."""

    parent: int = 0
    nested: bool = False
    automatic: bool = False
    fault: int | None = None


@dataclass(frozen=True, slots=True)
class DeviceView(ObjectView):
    """A bound device called ``name``; ``attached`` maps PASIDs (0: the device itself) to the HWPT there."""

    name: str = ""
    attached: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AccessView(ObjectView):
    """A kernel-internal user of an IOAS (``ioas`` None: detached)."""

    ioas: int | None = None


@dataclass(frozen=True, slots=True)
class FaultView(ObjectView):
    """A fault queue: groups of page requests ``waiting`` to be read, and read but not answered (``awaiting``)."""

    waiting: int = 0
    awaiting: int = 0


@dataclass(frozen=True, slots=True)
class ViommuView(ObjectView):
    """``hwpt`` is its nesting parent; ``vdevices`` maps virtual ids to VDEVICE ids."""

    type: int = 0
    hwpt: int = 0
    vdevices: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class VdeviceView(ObjectView):
    viommu: int = 0
    virt_id: int = 0


V = TypeVar("V", bound=ObjectView)


@dataclass(frozen=True, slots=True)
class ContextView:
    """One open of /dev/iommu; ``opener`` is the thread that opened it (0: nobody knows)."""

    opener: int
    objects: tuple[ObjectView, ...]

    def of(self, kind: type[V]) -> list[V]:
        """Its objects of one kind, ascending by id."""
        return [obj for obj in self.objects if isinstance(obj, kind)]

    def __getitem__(self, number: int) -> ObjectView:
        """The object with this id; KeyError names those there are."""
        for obj in self.objects:
            if obj.id == number:
                return obj
        raise KeyError(f"there is no object {number}; there are: {', '.join(map(str, self.objects)) or 'none'}")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A machine at one moment. ``pinned_pages`` are all pages pinned by anybody, ``locked_pages`` those charged to each
    user (uid)."""

    machine: str
    contexts: tuple[ContextView, ...]
    pinned_pages: int
    locked_pages: dict[int, int]

    def of(self, kind: type[V]) -> list[V]:
        """The objects of one kind, in all contexts."""
        return [obj for context in self.contexts for obj in context.of(kind)]

    def one(self, kind: type[V]) -> V:
        """The only object of a kind; LookupError, with what there is, when there is none or more than one."""
        found = self.of(kind)
        if len(found) != 1:
            there = ", ".join(str(obj) for obj in self.of(ObjectView))
            name = kind.__name__.removesuffix("View")
            raise LookupError(f"the machine has {len(found)} objects of kind {name}, not 1; it has: {there or 'none'}")
        return found[0]

    @property
    def areas(self) -> list[AreaView]:
        """The mappings of all IOASes."""
        return [area for ioas in self.of(IoasView) for area in ioas.areas]

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"machine {self.machine}: {self.pinned_pages} pinned pages"
        for number, context in enumerate(self.contexts):
            yield f"context {number}" + (f" of thread {context.opener}" if context.opener else "")
            for obj in context.objects:
                yield f"  {obj}"
                if isinstance(obj, IoasView):
                    yield from (f"    {area}" for area in obj.areas)


def take(machine: Machine) -> Snapshot:
    """The machine now."""
    physical = machine.world.physical
    contexts = tuple(_context(context) for context in machine.contexts)
    pinned = sum(count for chunk in list(physical.frames) for _, count in chunk.pinned_in(0, chunk.npages))
    locked = {uid: user.locked_pages for uid, user in sorted(physical.users.items()) if user.locked_pages}
    return Snapshot(machine.name, contexts, pinned, locked)


def _context(context: Context) -> ContextView:
    objects = list(context.objects)
    with context.world.lock:
        views = tuple(_object(obj) for obj in objects)
    return ContextView(getattr(context, "opener", 0), views)


def _object(obj: Object) -> ObjectView:
    """One object; the machine's lock is held."""
    base = (obj.id, obj.kind, max(obj.users - 1, 0))
    if isinstance(obj, IOAS):
        table = obj.io_pagetable
        return IoasView(
            *base,
            areas=tuple(_area(area, bool(table.domains)) for area in table.areas.values()),
            reserved=tuple(sorted((first, last) for first, last, _ in table.reserved)),
            allowed=tuple(table.allowed),
            hwpts=tuple(hwpt.id for hwpt in obj.hwpts),
        )
    if isinstance(obj, HwptPaging):
        fault = obj.fault.id if obj.fault is not None else None
        return HwptView(*base, parent=obj.ioas.id, automatic=obj.auto_domain, fault=fault)
    if isinstance(obj, HwptNested):
        return HwptView(*base, parent=obj.parent.id, nested=True, fault=obj.fault.id if obj.fault is not None else None)
    if isinstance(obj, Device):
        slots = dict(obj.igroup.attached) if obj.igroup is not None else {}
        attached = {pasid: slot.hwpt.id for pasid, slot in sorted(slots.items()) if obj.id in slot.devices}
        return DeviceView(*base, name=obj.device.name, attached=attached)
    if isinstance(obj, Access):
        return AccessView(*base, ioas=obj.ioas.id if obj.ioas is not None else None)
    if isinstance(obj, FaultQueue):
        return FaultView(*base, waiting=obj.waiting, awaiting=obj.awaiting)
    if isinstance(obj, Viommu):
        vdevices = {virt_id: vdevice.id for virt_id, vdevice in sorted(obj.vdevs.items())}
        return ViommuView(*base, type=obj.type, hwpt=obj.hwpt.id, vdevices=vdevices)
    if isinstance(obj, Vdevice):
        return VdeviceView(*base, viommu=obj.viommu.id, virt_id=obj.virt_id)
    return ObjectView(*base)


def _area(area: Area, in_domains: bool) -> AreaView:
    pages = area.pages
    readable, writeable = bool(area.prot & 1), bool(area.prot & 2)
    if pages is None:
        return AreaView(area.first, area.last, readable, writeable, "in progress", 0, 0, False, area.accesses)
    source = pages.source
    name = "memory" if source is None else "dmabuf" if source.dmabuf is not None else "file"
    return AreaView(
        area.first,
        area.last,
        readable,
        writeable,
        name,
        pages.owner.process.tgid if source is None else 0,
        pages.base + area.start,
        in_domains and name != "dmabuf",
        area.accesses,
    )
