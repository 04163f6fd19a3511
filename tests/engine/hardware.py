"""An IOMMU for tests of devices and groups: groups of several members, every driver call written down, any of them
failing.

A :class:`Bench` is a process with a context (see fakes.Caller) on a machine with such hardware.
"""

from __future__ import annotations

from typing import Any, ClassVar

from iommufd.engine import device as engine_device
from iommufd.engine import dirty, fault, hw_info, hwpt_alloc, viommu
from iommufd.engine.dispatch import build_table
from iommufd.engine.hwpt import HwptPaging
from iommufd.engine.world import World
from iommufd.errors import KernelError
from iommufd.iommu.device import Device
from iommufd.iommu.domain import BaseDomain, Domain, Kind
from iommufd.iommu.driver import Capability, HwInfo, Iommu, ReservedRegion
from iommufd.iommu.drivers.noiommu import NoiommuDriver
from iommufd.iommu.extent_domain import ExtentDomain
from iommufd.iommu.faults import IopfQueue, PageRequest, ResponseCode
from iommufd.iommu.group import Group
from iommufd.iommu.user_data import UserData
from iommufd.memory.frames import Extents
from iommufd.uapi import iommufd as u
from tests.engine import fakes

K, M = 1024, 1024 * 1024
APERTURE = (16 * M, 2**40 - 1)
DATA_TYPE = 0x77


class Log:
    """Driver calls in order; ``failures[name]`` (name of the call, or "call device") makes it raise that errno."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.failures: dict[str, int] = {}

    def __call__(self, call: str, device: str = "", detail: str = "") -> None:
        self.calls.append(" ".join(word for word in (call, device, detail) if word))
        number = self.failures.get(f"{call} {device}", self.failures.get(call))
        if number is not None:
            raise KernelError(number, f"{call} was told to fail")

    def take(self) -> list[str]:
        calls, self.calls = self.calls, []
        return calls


class _Attach:
    log: Log
    label: str

    def attach_dev(self, device: Device, old: Any) -> None:
        self.log("attach", device.name, f"{old.label}->{self.label}")

    def set_dev_pasid(self, device: Device, pasid: int, old: Any) -> None:
        self.log("pasid", device.name, f"{pasid} {old.label if old is not None else '-'}->{self.label}")


class Blocked(_Attach, BaseDomain):
    def __init__(self, log: Log, label: str) -> None:
        super().__init__(Kind.BLOCKED)
        self.log, self.label = log, label


class NestedDomain(_Attach, BaseDomain):
    def __init__(self, log: Log, label: str) -> None:
        super().__init__(Kind.NESTED)
        self.log, self.label = log, label

    def free(self) -> None:
        self.log("free", "", self.label)


class PagingDomain(_Attach, ExtentDomain):
    def __init__(self, log: Log, label: str, *, dirty: bool) -> None:
        super().__init__(0xFFFFFFFFF000, *APERTURE, dirty=dirty)
        self.log, self.label = log, label

    def map(self, iova: int, extents: Extents, offset: int, length: int, prot: int, page_by_page: bool) -> None:
        self.log("map", "", f"{self.label} {iova:#x}+{length:#x}")
        super().map(iova, extents, offset, length, prot, page_by_page)

    def unmap(self, iova: int, length: int) -> None:
        self.log("unmap", "", f"{self.label} {iova:#x}+{length:#x}")
        super().unmap(iova, length)

    def enforce_cache_coherency(self) -> bool:
        self.log("enforce", "", self.label)
        return True

    def free(self) -> None:
        self.log("free", "", self.label)


class Driver:
    """Answers ``capable`` from ``capabilities``; page tables are labelled pt0, pt1, ... in order of allocation."""

    identity_domain: Domain | None = None
    user_pasid_table = True

    def __init__(self, log: Log, name: str = "bench") -> None:
        self.log = log
        self.name = name
        self.capabilities = {Capability.CACHE_COHERENCY, Capability.DIRTY_TRACKING}
        self.blocked_domain: Domain | None = Blocked(log, "blocked")
        self.regions: dict[str, list[ReservedRegion]] = {}
        self.made = 0

    def capable(self, device: Device, capability: Capability) -> bool:
        return capability in self.capabilities

    def get_resv_regions(self, device: Device) -> list[ReservedRegion]:
        return self.regions.get(device.name, [])

    def _label(self) -> str:
        self.made += 1
        return f"pt{self.made - 1}"

    def domain_alloc_paging_flags(self, device: Device, flags: int, data: UserData | None) -> PagingDomain:
        self.log("alloc", device.name, f"{flags:#x}" if flags else "")
        return PagingDomain(self.log, self._label(), dirty=bool(flags & u.IOMMU_HWPT_ALLOC_DIRTY_TRACKING))

    def domain_alloc_nested(self, device: Device, parent: Domain, flags: int, data: UserData) -> NestedDomain:
        self.log("nest", device.name, f"{flags:#x}" if flags else "")
        return NestedDomain(self.log, self._label())

    def page_response(self, device: Device, request: PageRequest, code: ResponseCode) -> None:
        self.log("respond", device.name, f"{request.grpid} {code.name}")

    def hw_info(self, device: Device, requested: int) -> HwInfo:
        return HwInfo(0x99, b"hardware")


class PlainDriver:
    """A driver with the smallest page-table op only: no flags, no data, no PASID, no hardware information."""

    name = "plain"
    identity_domain: Domain | None = None
    blocked_domain: Domain | None = None
    user_pasid_table = False
    domain: ClassVar[Any] = None

    def __init__(self, log: Log) -> None:
        self.log = log

    def capable(self, device: Device, capability: Capability) -> bool:
        return capability is Capability.CACHE_COHERENCY

    def domain_alloc_paging(self, device: Device) -> Any:
        return PagingDomain(self.log, "plain", dirty=False) if self.domain is None else self.domain


class Bench(fakes.Caller):
    """A caller with hardware. Devices are named a, b, ... by who asks for them."""

    def __init__(self, world: World | None = None, **options: Any) -> None:
        if world is None:
            world = fakes.make_world()
            rows = [*fakes.ROWS, *hwpt_alloc.ROWS, *hw_info.ROWS, *dirty.ROWS, *fault.ROWS, *viommu.ROWS]
            world.table = build_table(rows, world.kernel)
            world.noiommu_driver = NoiommuDriver()
        super().__init__(world, **options)
        self.log = Log()
        self.driver = Driver(self.log)
        self.iommu = Iommu("bench", max_pasids=1 << 20, iopf_queue=IopfQueue("bench"))

    def group(self, *names: str, pasids: int = 1 << 20, driver: Any = None) -> list[Device]:
        """New devices that are one group, in its default domain."""
        driver = driver if driver is not None else self.driver
        default = driver.blocked_domain or Blocked(self.log, "default")
        group = Group("-".join(names), default)
        members = [Device(name, driver=driver, iommu=self.iommu, pasid_limit=pasids) for name in names]
        for member in members:
            group.add(member)
        return members

    def bind(self, device: Device) -> engine_device.Device:
        return engine_device.bind(self.context, device)

    def bound(self, name: str = "a", **options: Any) -> engine_device.Device:
        """A new device, alone in its group, bound."""
        return self.bind(self.group(name, **options)[0])

    def noiommu(self, name: str = "n") -> engine_device.Device:
        return self.bind(Device(name))

    def hwpt(self, idev: engine_device.Device, pt_id: int, flags: int = 0, **fields: int) -> int:
        return self.do(u.iommu_hwpt_alloc(flags=flags, dev_id=idev.id, pt_id=pt_id, **fields)).out_hwpt_id

    def nested(self, idev: engine_device.Device, pt_id: int, flags: int = 0) -> int:
        return self.hwpt(idev, pt_id, flags, data_type=DATA_TYPE, data_len=4, data_uptr=fakes.ARRAY)

    def obj(self, number: int) -> Any:
        found = self.context.objects.get(number)
        self.context.objects.put(found)
        return found

    def paging(self, number: int) -> HwptPaging:
        found = self.obj(number)
        assert isinstance(found, HwptPaging)
        return found

    def ids(self) -> list[int]:
        return [obj.id for obj in self.context.objects]

    def reserved(self, ioas: int) -> list[tuple[int, int]]:
        """The device-owned reservations of an IOAS."""
        return sorted((first, last) for first, last, owner in self.table(ioas).reserved if isinstance(owner, Device))
