"""The mock hardware's virtual IOMMU, its two HW queues, its caches and its events (kernel: iommufd/selftest.c).

One :class:`MockViommuOps` serves every mock vIOMMU; what differs lies in ``viommu.private``. Sources: events-viommu 6,
9, 11.1, mock-device 2.1, 2.4, 4.5-4.7.
"""

from __future__ import annotations

import errno
from contextlib import suppress
from struct import pack
from typing import TYPE_CHECKING, NamedTuple

from iommufd.engine.device import Device
from iommufd.engine.viommu import Viommu
from iommufd.errors import KernelError
from iommufd.iommu.faults import LAST_PAGE, PASID_VALID, PageRequest, report_device_fault
from iommufd.memory.frames import PAGE_SIZE
from iommufd.selftest.device import MockDevice
from iommufd.selftest.nested import MockNestedDomain, alloc_nested
from iommufd.uapi.iommufd_test import (
    IOMMU_HW_QUEUE_TYPE_SELFTEST,
    IOMMU_TEST_HW_QUEUE_MAX,
    IOMMU_TEST_INVALIDATE_FLAG_ALL,
    IOMMU_VEVENTQ_TYPE_SELFTEST,
    IOMMU_VIOMMU_INVALIDATE_DATA_SELFTEST,
    IOMMU_VIOMMU_TYPE_SELFTEST,
    MOCK_DEV_CACHE_ID_MAX,
    MOCK_DEV_CACHE_NUM,
    iommu_viommu_event_selftest,
    iommu_viommu_invalidate_selftest,
    iommu_viommu_selftest,
    test_dev_check_cache,
    test_trigger_iopf,
    test_trigger_vevent,
)

if TYPE_CHECKING:
    from iommufd.engine.dispatch import Call
    from iommufd.iommu.domain import Domain, PagingDomain
    from iommufd.iommu.user_data import UserArray, UserData
    from iommufd.iommu.viommu import DriverHwQueue, DriverViommu

MMAP_LENGTH = 2 * PAGE_SIZE
DATA_MINIMUM = 8  # iommu_viommu_selftest through ``out_data``
CLEARS_SLOT_0 = "hw-queue-destroy-clears-slot-0"  # Linux 7.3.4: whatever the index of the queue destroyed
KMALLOC_MAX = 4 << 20  # bytes the kernel allocates in one piece; the array of entries is one


class MockViommu:
    """What the mock driver keeps of a vIOMMU: its HW queues by index.

    ``clears_slot_0``: the defect :data:`CLEARS_SLOT_0` is reproduced."""

    __slots__ = ("clears_slot_0", "queues")

    def __init__(self, *, clears_slot_0: bool = False) -> None:
        self.clears_slot_0 = clears_slot_0
        self.queues: list[DriverHwQueue | None] = [None] * IOMMU_TEST_HW_QUEUE_MAX


class Slot(NamedTuple):
    """What the mock driver keeps of a HW queue: its number, and the queue before it, which it depends on."""

    number: int
    before: DriverHwQueue | None


class MockViommuOps:
    """The operations of every mock vIOMMU."""

    def alloc_domain_nested(self, viommu: DriverViommu, flags: int, data: UserData) -> MockNestedDomain:
        """events-viommu 12 rows 8-10."""
        return alloc_nested(data, viommu)

    def cache_invalidate(self, viommu: DriverViommu, array: UserArray) -> None:
        """events-viommu 11.1: the whole array is copied first, so a bad copy applies nothing."""
        wanted = IOMMU_VIOMMU_INVALIDATE_DATA_SELFTEST
        if array.entry_num == 0 and array.type == wanted:  # row 1
            return
        size = iommu_viommu_invalidate_selftest.SIZE * array.entry_num
        if size > KMALLOC_MAX:  # row 2: entry_num stays
            raise KernelError(errno.ENOMEM, f"no memory for {size} bytes of entries")
        done = 0
        try:
            for entry in array.all(wanted, iommu_viommu_invalidate_selftest):  # rows 3, 4
                _invalidate(viommu, entry)
                done += 1
        finally:
            array.entry_num = done

    def hw_queue_supported(self, viommu: DriverViommu, type: int) -> bool:
        return type == IOMMU_HW_QUEUE_TYPE_SELFTEST

    def hw_queue_init_phys(self, viommu: DriverViommu, queue: DriverHwQueue, index: int, base_pa: int) -> None:
        """Two queues, the second only beside the first (events-viommu 9, driver part)."""
        queues = _state(viommu).queues
        if index >= IOMMU_TEST_HW_QUEUE_MAX:
            raise KernelError(errno.EINVAL, f"there is no HW queue {index}")
        if queues[index] is not None:
            raise KernelError(errno.EEXIST, f"HW queue {index} is in use")
        before = queues[index - 1] if index else None
        if index and before is None:
            raise KernelError(errno.EIO, f"HW queue {index} needs HW queue {index - 1}")
        translated = viommu.parent_domain.iova_to_phys(queue.base_iova)
        if translated != base_pa:
            raise KernelError(
                errno.EFAULT, f"the parent translates {queue.base_iova:#x} to {translated:#x}, its page is {base_pa:#x}"
            )
        if before is not None:
            queue.depend(before)
        queue.private = Slot(index, before)
        queues[index] = queue

    def hw_queue_destroy(self, viommu: DriverViommu, queue: DriverHwQueue) -> None:
        state, used = _state(viommu), queue.private
        assert isinstance(used, Slot)
        index, before = used
        state.queues[0 if state.clears_slot_0 else index] = None
        if before is not None:
            queue.undepend(before)


OPS = MockViommuOps()


def _state(viommu: DriverViommu) -> MockViommu:
    assert isinstance(viommu.private, MockViommu)
    return viommu.private


def supported(type: int) -> bool:
    """Whether mock hardware has vIOMMUs of that type."""
    return type == IOMMU_VIOMMU_TYPE_SELFTEST


def init(viommu: DriverViommu, parent: PagingDomain, data: UserData | None) -> None:
    """``viommu_init``: with data, memory to map whose first word says ``in_data`` (events-viommu 6, mock driver)."""
    assert isinstance(viommu, Viommu)  # what a driver may not know: whose defects it is to show
    viommu.private = MockViommu(clears_slot_0=CLEARS_SLOT_0 in viommu.context.world.defects)
    if data is not None:
        given = data.copy(IOMMU_VIOMMU_TYPE_SELFTEST, iommu_viommu_selftest, DATA_MINIMUM)  # rows 1, 2
        region = viommu.alloc_mmap(MMAP_LENGTH)  # row 3
        region.write(0, pack("<I", given.in_data))  # row 4
        given.out_data = given.in_data
        given.out_mmap_offset = region.offset
        given.out_mmap_length = region.length
        try:
            data.copy_back(IOMMU_VIOMMU_TYPE_SELFTEST, given, DATA_MINIMUM)  # row 5
        except KernelError:
            viommu.destroy_mmap(region.offset)
            raise
    viommu.ops = OPS


def _invalidate(viommu: DriverViommu, entry: iommu_viommu_invalidate_selftest) -> None:
    if entry.flags & ~IOMMU_TEST_INVALIDATE_FLAG_ALL:  # row 5
        raise KernelError(errno.EOPNOTSUPP, f"unknown flags {entry.flags:#x}")
    if entry.cache_id > MOCK_DEV_CACHE_ID_MAX:  # row 6, with ALL too
        raise KernelError(errno.EINVAL, f"there is no cache word {entry.cache_id}")
    device = viommu.find_device(entry.vdev_id)
    if device is None:  # row 7
        raise KernelError(errno.EINVAL, f"no vDEVICE has virtual id {entry.vdev_id:#x} here")
    assert isinstance(device, MockDevice)  # no other is behind this IOMMU
    if entry.flags & IOMMU_TEST_INVALIDATE_FLAG_ALL:  # row 8
        device.cache[:] = [0] * MOCK_DEV_CACHE_NUM
    else:
        device.cache[entry.cache_id] = 0


def follow_rid(device: MockDevice, domain: Domain) -> None:
    """The RID of ``device`` moves to ``domain``: it remembers the vIOMMU and its own virtual id there.

    ENOENT when the domain was made from a vIOMMU on which the device has no vDEVICE. Not refreshed while the vIOMMU
    stays the same, even if the vDEVICE was exchanged (mock-device 2.4 rows 2, 3)."""
    viommu = domain.viommu if isinstance(domain, MockNestedDomain) else None
    virt_id = viommu.vdev_id(device) if viommu is not None else 0  # row 2
    if viommu is not device.viommu:  # row 3
        device.viommu = viommu
        device.vdev_id = virt_id


def trigger_iopf(call: Call, cmd: test_trigger_iopf) -> None:
    """Op TRIGGER_IOPF (mock-device 4.5): one complete group; 0 even when nobody takes it."""
    device = _mock_device(call, cmd.dev_id)
    flags = LAST_PAGE | (PASID_VALID if cmd.pasid else 0)
    request = PageRequest(flags=flags, pasid=cmd.pasid, grpid=cmd.grpid, perm=cmd.perm, addr=cmd.addr)
    with suppress(KernelError):  # the hardware was answered; the trigger does not look
        report_device_fault(device, request)


def trigger_vevent(call: Call, cmd: test_trigger_vevent) -> None:
    """Op TRIGGER_VEVENT (mock-device 4.6)."""
    device = _mock_device(call, cmd.dev_id)
    viommu = device.viommu
    if viommu is None or not device.vdev_id:  # row 2
        raise KernelError(errno.ENOENT, f"{device.name} is not attached to a vIOMMU under a nonzero virtual id")
    event = iommu_viommu_event_selftest(virt_id=device.vdev_id & 0xFFFFFFFF)
    viommu.report_event(IOMMU_VEVENTQ_TYPE_SELFTEST, event.pack())  # rows 3-5


def check_cache(call: Call, cmd: test_dev_check_cache) -> None:
    """Op DEV_CHECK_CACHE (mock-device 4.7)."""
    device = _mock_device(call, cmd.id)
    if cmd.arm_id > MOCK_DEV_CACHE_ID_MAX:
        raise KernelError(errno.EINVAL, f"there is no cache word {cmd.arm_id}")
    found = device.cache[cmd.arm_id]
    if found != cmd.cache:
        raise KernelError(errno.EINVAL, f"cache word {cmd.arm_id} is {found:#x}, not {cmd.cache:#x}")


def _mock_device(call: Call, number: int) -> MockDevice:
    """The mock device behind a DEVICE id: ENOENT, EINVAL for another driver's.

    Ops 16 and 17 of the kernel do not test the kind and then work on whatever is there; nothing could depend on
    that."""
    device = call.get(number, Device).device
    if not isinstance(device, MockDevice):
        raise KernelError(errno.EINVAL, f"{device.name} is not a mock device")
    return device
