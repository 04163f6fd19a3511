"""A program on a machine with mock hardware: ioctls by struct, mock devices, and what was left behind."""

from __future__ import annotations

import errno
from struct import pack
from typing import Any, TypeVar

import pytest

from iommufd.engine.device import Device
from iommufd.engine.ledger import Ledger, take
from iommufd.engine.object import Object
from iommufd.errors import KernelError
from iommufd.machine.presets import preset
from iommufd.selftest.device import MockDevice
from iommufd.selftest.nested import MockNestedDomain
from iommufd.uapi import iommufd as u
from iommufd.uapi import iommufd_test as t
from iommufd.uapi.declare import Struct, members
from tests.engine.fakes import ARG, ARRAY, Caller

S = TypeVar("S", bound=Struct)
OPS: dict[type[Struct], int] = {arm: op for op, arm in t.ARMS.items()}

NEST, DIRTY, FAULT, PASID = 1, 2, 4, 8  # flags of HWPT_ALLOC
IOTLB = 0x1234_5678

K = TypeVar("K", bound=Object)


class Mock(Caller):
    """A Caller with an IOAS and one PASID-capable mock device attached to it."""

    def __init__(self, **process: Any) -> None:
        self.machine = preset("mock")
        super().__init__(self.machine.world, **process)
        self.ioas_id = self.ioas()
        self.stdev, self.auto, self.dev = self.device()

    def op(self, cmd: S, at: int = ARG) -> S:
        """One op of the test command."""
        self._fill(cmd)
        self.raw(t.IOMMU_TEST_CMD, cmd.pack(), at)
        return type(cmd).unpack(self.host.peek(at, cmd.SIZE))

    def op_refuses(self, number: int, cmd: Struct) -> str:
        self._fill(cmd)
        return self.raw_refuses(number, t.IOMMU_TEST_CMD, cmd.pack())

    @staticmethod
    def _fill(cmd: Struct) -> None:
        fill = members(cmd)  # the head is every op's
        fill.size = fill.size or cmd.SIZE
        fill.op = OPS[type(cmd)]

    def raw_refuses(self, number: int, command: int, data: bytes) -> str:
        with pytest.raises(KernelError) as caught:
            self.raw(command, data)
        assert errno.errorcode[caught.value.errno] == errno.errorcode[number], caught.value.why
        return caught.value.why

    # ---------------------------------------------------------------------------------------------------------- devices

    def device(self, pt: int = 0, flags: int = t.MOCK_FLAGS_DEVICE_PASID) -> tuple[int, int, int]:
        """(test device, HWPT, DEVICE) of a new mock device."""
        made = self.op(t.test_mock_domain_flags(id=pt or self.ioas_id, dev_flags=flags))
        return made.out_stdev_id, made.out_hwpt_id, made.out_idev_id

    def core(self, dev: int = 0) -> MockDevice:
        """The device behind a DEVICE id."""
        device = self.find(dev or self.dev, Device).device
        assert isinstance(device, MockDevice)
        return device

    def replace(self, pt: int, stdev: int = 0) -> None:
        self.op(t.test_mock_domain_replace(id=stdev or self.stdev, pt_id=pt))

    def object(self, number: int) -> Object:
        found = self.context.objects.get(number)
        self.context.objects.put(found)
        return found

    def find(self, number: int, kind: type[K]) -> K:
        """The object, which is of that kind."""
        found = self.object(number)
        assert isinstance(found, kind)
        return found

    def destroy(self, number: int) -> None:
        self.do(u.iommu_destroy(id=number))

    def ledger(self) -> Ledger:
        return take(self.world, [self.context], [self.proc.process])

    # ------------------------------------------------------------------------------------------------------ page tables

    def hwpt(self, flags: int = 0, pt: int = 0, dev: int = 0, **more: int) -> int:
        return self.do(
            u.iommu_hwpt_alloc(flags=flags, dev_id=dev or self.dev, pt_id=pt or self.ioas_id, **more)
        ).out_hwpt_id

    def nested_cmd(self, pt: int, iotlb: int = IOTLB, **more: int) -> u.iommu_hwpt_alloc:
        """HWPT_ALLOC of a nested page table; its data is in memory."""
        self.host.poke(ARRAY, pack("<II", iotlb, 0))
        given = {"dev_id": self.dev, "data_type": t.IOMMU_HWPT_DATA_SELFTEST, "data_len": 8, "data_uptr": ARRAY, **more}
        return u.iommu_hwpt_alloc(pt_id=pt, **given)

    def nested(self, pt: int, iotlb: int = IOTLB, **more: int) -> int:
        return self.do(self.nested_cmd(pt, iotlb, **more)).out_hwpt_id

    def iotlb(self, hwpt: int) -> list[int]:
        found: Any = self.object(hwpt)
        assert isinstance(found.domain, MockNestedDomain)
        return found.domain.iotlb

    def viommu(self, parent: int) -> int:
        return self.do(
            u.iommu_viommu_alloc(type=t.IOMMU_VIOMMU_TYPE_SELFTEST, dev_id=self.dev, hwpt_id=parent)
        ).out_viommu_id

    def vdevice(self, viommu: int, virt_id: int, dev: int = 0) -> int:
        return self.do(u.iommu_vdevice_alloc(viommu_id=viommu, dev_id=dev or self.dev, virt_id=virt_id)).out_vdevice_id

    # ----------------------------------------------------------------------------------------------------------- queues

    def queue_read(self, fd: int, count: int) -> bytes:
        """read(2) of an event queue."""
        file = self.proc.installed[fd]
        done = file.read(self.proc.task(), ARRAY, count)
        assert isinstance(done, int)
        return self.host.peek(ARRAY, done)

    def queue_write(self, fd: int, data: bytes) -> int:
        self.host.poke(ARRAY, data)
        done = self.proc.installed[fd].write(self.proc.task(), ARRAY, len(data))
        assert isinstance(done, int)
        return done

    def close(self, fd: int) -> None:
        del self.proc.files[fd]
        self.proc.installed.pop(fd).put()
