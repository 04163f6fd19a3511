"""The smallest IOMMU that can do everything of the driver contract, and a context that uses it.

Page tables are real (:class:`ExtentDomain`), everything else writes down that it was called; ``failures`` makes an
operation raise. Engine tests that need a driver use it, so that they do not depend on the selftest hardware.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, TypeVar, cast

from iommufd.engine import device as engine_device
from iommufd.engine import fault, hw_queue, hwpt_alloc, invalidate, ioas, vdevice, veventq, viommu
from iommufd.engine.context import Context
from iommufd.engine.dispatch import build_table
from iommufd.engine.viommu import Viommu
from iommufd.engine.world import World
from iommufd.errors import KernelError
from iommufd.iommu.device import Device
from iommufd.iommu.domain import BaseDomain, Domain, Kind
from iommufd.iommu.driver import Capability, Iommu
from iommufd.iommu.extent_domain import ExtentDomain
from iommufd.iommu.faults import IopfQueue, PageRequest, ResponseCode
from iommufd.iommu.group import Group
from iommufd.uapi import iommufd as u
from iommufd.uapi.commands import COMMANDS
from iommufd.uapi.declare import Struct
from tests.engine.flat_task import BASE, FlatTask, as_task, expect

if TYPE_CHECKING:
    from iommufd.engine.object import Object
    from iommufd.iommu.user_data import UserArray, UserData
    from iommufd.iommu.viommu import DriverHwQueue, DriverVdevice, DriverViommu

VIOMMU_TYPE, QUEUE_TYPE, EVENT_TYPE, DATA_TYPE = 0x51, 0x52, 0x53, 0x54
NUMBERS = {command.struct: command.number for command in COMMANDS}
KINDS = (ioas, hwpt_alloc, fault, viommu, vdevice, veventq, hw_queue, invalidate)

S = TypeVar("S", bound=Struct)

K = TypeVar("K", bound="Object")


class Log:
    """What the driver was asked, in order, and what it is told to refuse."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.failures: dict[str, int] = {}

    def __call__(self, name: str, *details: object) -> None:
        self.calls.append((name, *details))
        number = self.failures.get(name)
        if number is not None:
            raise KernelError(number, f"{name} was told to fail")

    def names(self) -> list[object]:
        return [call[0] for call in self.calls]


class SmallPaging(ExtentDomain):
    def attach_dev(self, device: Device, old: Domain) -> None:
        """Attaches to anything."""


class SmallBlocked(BaseDomain):
    def __init__(self) -> None:
        super().__init__(Kind.BLOCKED)

    def attach_dev(self, device: Device, old: Domain) -> None:
        """Attaches to anything."""


class SmallNested(BaseDomain):
    def __init__(self, log: Log) -> None:
        super().__init__(Kind.NESTED)
        self.log = log

    def attach_dev(self, device: Device, old: Domain) -> None:
        """Attaches to anything."""

    def cache_invalidate_user(self, array: UserArray) -> None:
        invalidate_all(self.log, array)


def invalidate_all(log: Log, array: UserArray) -> None:
    """Handles entries until one fails; ``invalidate-N`` in the failures makes entry N fail."""
    entries = array.entry_num
    array.entry_num = 0
    log("invalidate", array.type, entries)
    for index in range(entries):
        log(f"invalidate-{index}")
        array.entry_num += 1


class PlainOps:
    """A vIOMMU that can do nothing."""


class FullOps:
    """A vIOMMU that can do everything."""

    def __init__(self, log: Log) -> None:
        self.log = log

    def destroy(self, viommu: DriverViommu) -> None:
        self.log("viommu_destroy")

    def alloc_domain_nested(self, viommu: DriverViommu, flags: int, data: UserData) -> SmallNested:
        self.log("alloc_domain_nested", flags)
        return SmallNested(self.log)

    def cache_invalidate(self, viommu: DriverViommu, array: UserArray) -> None:
        invalidate_all(self.log, array)

    def vdevice_init(self, vdev: DriverVdevice) -> None:
        self.log("vdevice_init", vdev.virt_id)

    def vdevice_destroy(self, vdev: DriverVdevice) -> None:
        self.log("vdevice_destroy", vdev.virt_id)

    def hw_queue_supported(self, viommu: DriverViommu, type: int) -> bool:
        return type == QUEUE_TYPE

    def hw_queue_init_phys(self, viommu: DriverViommu, queue: DriverHwQueue, index: int, base_pa: int) -> None:
        self.log("hw_queue_init", index, base_pa)

    def hw_queue_destroy(self, viommu: DriverViommu, queue: DriverHwQueue) -> None:
        self.log("hw_queue_destroy")


class SmallDriver:
    name = "small"
    identity_domain = None
    user_pasid_table = False

    def __init__(self) -> None:
        self.log = Log()
        self.blocked_domain = SmallBlocked()
        self.ops: object | None = FullOps(self.log)

    def capable(self, device: Device, capability: Capability) -> bool:
        return capability is Capability.CACHE_COHERENCY

    def domain_alloc_paging_flags(self, device: Device, flags: int, data: UserData | None) -> SmallPaging:
        return SmallPaging(0xFFFFFFFFFFFFF000)

    def domain_alloc_nested(self, device: Device, parent: Domain, flags: int, data: UserData) -> SmallNested:
        return SmallNested(self.log)

    def page_response(self, device: Device, request: PageRequest, code: ResponseCode) -> None:
        self.log("page_response", request.grpid, code)

    def viommu_supported(self, device: Device, type: int) -> bool:
        return type == VIOMMU_TYPE

    def viommu_init(self, viommu: DriverViommu, parent: Domain, data: UserData | None) -> None:
        self.log("viommu_init", None if data is None else (data.type, data.uptr, data.length))
        viommu.ops = self.ops


class Rig:
    """One context, an IOAS, a bound device, a nesting parent; ioctls by their struct."""

    def __init__(self, task: FlatTask | None = None) -> None:
        self.world = World()
        self.world.table = build_table([row for kind in KINDS for row in kind.ROWS], (7, 3))
        self.context = Context(self.world)
        self.task = task or FlatTask()
        self.driver = SmallDriver()
        self.log = self.driver.log
        self.iommu = Iommu("small")
        self.queue = IopfQueue("small")
        self.ioas = self.do(u.iommu_ioas_alloc()).out_ioas_id
        self.idev = self.bind()
        self.dev = self.idev.id
        self.parent = self.hwpt(u.IOMMU_HWPT_ALLOC_NEST_PARENT)

    # ------------------------------------------------------------------------------------------------------- hardware

    def bind(self, iommu: Iommu | None = None) -> engine_device.Device:
        """A new device in a group of its own, bound; behind the rig's IOMMU unless another is given."""
        device = Device("dev", driver=self.driver, iommu=iommu or self.iommu)
        group = Group("group", self.driver.blocked_domain)
        group.add(device)
        return engine_device.bind(self.context, device, keep_context=False)

    # --------------------------------------------------------------------------------------------------------- ioctls

    def ioctl(self, cmd: Struct, arg: int) -> None:
        """The ioctl that takes ``cmd``, which is in the task's memory at ``arg``. KernelError."""
        assert self.context.ioctl(as_task(self.task), NUMBERS[type(cmd)], arg) == 0

    def do(self, cmd: S, arg: int = BASE) -> S:
        """Writes ``cmd`` to the task's memory, does the ioctl; the struct as it comes back. KernelError."""
        self._put(cmd, arg)
        self.ioctl(cmd, arg)
        return type(cmd).unpack(self.task.read(arg, cmd.SIZE))

    def _put(self, cmd: Struct, arg: int) -> None:
        fields = cast("u.iommu_destroy", cmd)  # every command begins with its size
        fields.size = fields.size or cmd.SIZE
        self.task.write(arg, cmd.pack())

    def fails(self, number: int, cmd: S, arg: int = BASE) -> S:
        """The ioctl fails with ``number`` and leaves objects, references and descriptors as they were."""
        before = self.state()
        with expect(number):
            self.do(cmd, arg)
        assert self.state() == before
        return type(cmd).unpack(self.task.read_upto(arg, cmd.SIZE))

    def fails_unwritten(self, cmd: Struct) -> None:
        """The ioctl does its work, its answer cannot be written: EFAULT, and everything is undone."""
        self._put(cmd, BASE)
        before = self.state()
        self.task.write_protected = True
        with expect(errno.EFAULT):
            self.ioctl(cmd, BASE)
        self.task.write_protected = False
        assert self.state() == before

    def state(self) -> dict[str, object]:
        objects = {obj.id: (type(obj), obj.users, obj.wait) for obj in self.context.objects}
        return {"objects": objects, "references": self.context.references, "files": dict(self.task.files)}

    def destroy(self, number: int) -> None:
        self.do(u.iommu_destroy(id=number))

    def object(self, number: int) -> Object:
        obj = self.context.objects.get(number)
        self.context.objects.put(obj)
        return obj

    def find(self, number: int, kind: type[K]) -> K:
        """The object, which is of that kind."""
        found = self.object(number)
        assert isinstance(found, kind)
        return found

    def hwpt(self, flags: int = 0, pt: int = 0, **fields: int) -> int:
        return self.do(u.iommu_hwpt_alloc(flags=flags, dev_id=self.dev, pt_id=pt or self.ioas, **fields)).out_hwpt_id

    def nested(self, pt: int) -> int:
        return self.hwpt(pt=pt, data_type=DATA_TYPE, data_len=4, data_uptr=BASE)

    def viommu(self) -> int:
        return self.do(u.iommu_viommu_alloc(type=VIOMMU_TYPE, dev_id=self.dev, hwpt_id=self.parent)).out_viommu_id

    def viommu_object(self, number: int) -> Viommu:
        return self.find(number, Viommu)
