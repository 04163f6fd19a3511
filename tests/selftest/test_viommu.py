"""Virtual IOMMUs of the mock hardware: events 6 (driver part), 7, 9 (driver part), 11.1, 12; mock 2.4,
4.6, 4.7."""

from __future__ import annotations

import errno
import gc
import os
from struct import pack, unpack

import pytest

from iommufd.engine.eventq import QueueFile
from iommufd.engine.fault import FaultQueue
from iommufd.engine.hw_queue import HwQueue
from iommufd.engine.hwpt import HwptPaging
from iommufd.engine.ledger import difference
from iommufd.engine.vdevice import Vdevice
from iommufd.engine.veventq import VeventQueue
from iommufd.engine.viommu import Viommu
from iommufd.memory.space import READ, WRITE
from iommufd.selftest.device import MockDevice
from iommufd.selftest.nested import MockNestedDomain
from iommufd.selftest.viommu import MockViommu
from iommufd.uapi import iommufd as u
from iommufd.uapi import iommufd_test as t
from tests.engine.fakes import ARRAY, BUFFER
from tests.selftest.mock import FAULT, IOTLB, NEST, PASID, Mock

P = 4096
TYPE = t.IOMMU_VIOMMU_TYPE_SELFTEST
CACHE = t.IOMMU_TEST_DEV_CACHE_DEFAULT
IOVA = t.MOCK_APERTURE_START


class Guest(Mock):
    """A mock machine with a nesting parent and a vIOMMU on it."""

    def __init__(self) -> None:
        super().__init__()
        self.parent = self.hwpt(NEST)
        self.first = self.viommu(self.parent)


@pytest.fixture
def g() -> Guest:
    return Guest()


# -------------------------------------------------------------------------------------------------------- 6: allocation


def viommu_cmd(g: Guest, length: int, data: bytes = b"", **more: int) -> u.iommu_viommu_alloc:
    g.host.poke(ARRAY, data.ljust(64, b"\0"))
    given = {"type": TYPE, "dev_id": g.dev, "hwpt_id": g.parent, "data_uptr": ARRAY, **more}
    return u.iommu_viommu_alloc(data_len=length, **given)


def test_only_the_selftest_type(g: Guest) -> None:  # events-6-4
    g.refuses(errno.EOPNOTSUPP, viommu_cmd(g, 0, type=1, hwpt_id=99))


@pytest.mark.parametrize("length", [7, 25])
def test_data_length(g: Guest, length: int) -> None:  # events-6-driver-1
    g.refuses(errno.EINVAL, viommu_cmd(g, length, data_uptr=0x10))


def test_data_that_cannot_be_read(g: Guest) -> None:  # events-6-driver-2
    g.refuses(errno.EFAULT, viommu_cmd(g, 24, data_uptr=0x10))


def test_without_data_there_is_no_region(g: Guest) -> None:  # events 6
    g.do(viommu_cmd(g, 0))
    assert len(g.context.store.regions) == 0


def test_the_region_and_its_loopback(g: Guest) -> None:  # events-6-driver-3 events-6-driver-4 events-6-driver-5
    g.do(viommu_cmd(g, 24, pack("<I", 0xC0FFEE)))
    in_data, out_data, offset, length = unpack("<IIQQ", g.host.peek(ARRAY, 24))
    assert (in_data, out_data, offset, length) == (0xC0FFEE, 0xC0FFEE, 0x1000, 2 * P)
    fd, at = g.context.mmap(g.proc.task(), offset, length, 3, True)
    assert os.pread(fd, 8, at) == pack("<II", 0xC0FFEE, 0)
    g.context.mapping_closed(offset)


def test_short_data_hides_the_region(g: Guest) -> None:  # events 6
    g.do(viommu_cmd(g, 8, pack("<I", 5)))
    assert g.host.peek(ARRAY, 24) == pack("<II", 5, 5) + bytes(16)
    g.do(viommu_cmd(g, 24))
    assert unpack("<Q", g.host.peek(ARRAY + 8, 8)) == (0x3000,)  # but it takes offset space


def test_region_released_when_the_data_cannot_be_written_back(g: Guest) -> None:  # events-6-driver-5
    g.host.map(0x3000_0000, 1, READ)
    before = g.ledger()
    g.refuses(errno.EFAULT, viommu_cmd(g, 24, data_uptr=0x3000_0000))
    assert difference(before, g.ledger()) == []
    assert len(g.context.store.regions) == 0


def test_regions_of_viommus_first_fit(g: Guest) -> None:  # events 9.1, observed
    def offset() -> tuple[int, int]:
        number = g.do(viommu_cmd(g, 24)).out_viommu_id
        return number, unpack("<Q", g.host.peek(ARRAY + 8, 8))[0]

    made = [offset() for _ in range(3)]
    assert [at for _, at in made] == [0x1000, 0x3000, 0x5000]
    g.destroy(made[1][0])
    assert offset()[1] == 0x3000


def test_a_mapped_viommu_stays(g: Guest) -> None:  # events 9.1
    number = g.do(viommu_cmd(g, 24)).out_viommu_id
    g.context.mmap(g.proc.task(), 0x1000, 2 * P, 3, True)
    g.context.mapping_opened(0x1000)
    g.context.mapping_closed(0x1000)
    g.refuses(errno.EBUSY, u.iommu_destroy(id=number))
    g.context.mapping_closed(0x1000)
    g.destroy(number)


# ----------------------------------------------------------------------------------------------- 12: nested page tables


def test_nested_of_a_viommu(g: Guest) -> None:  # events-12-8 events-12-9 events-12-10
    g.refuses(errno.EOPNOTSUPP, g.nested_cmd(g.first, data_type=1, data_len=3))
    for length in (3, 12):
        g.refuses(errno.EINVAL, g.nested_cmd(g.first, data_len=length, data_uptr=0x10))
    g.refuses(errno.EFAULT, g.nested_cmd(g.first, data_uptr=0x10))
    assert g.iotlb(g.nested(g.first)) == [IOTLB] * 4


def test_nested_common_checks(g: Guest) -> None:  # events-12-1 events-12-2 events-12-3 events-12-4
    g.refuses(errno.EOPNOTSUPP, g.nested_cmd(g.first, reserved=1, data_type=0))
    g.refuses(errno.EINVAL, g.nested_cmd(g.first, data_type=0, dev_id=99))
    g.refuses(errno.EINVAL, g.nested_cmd(g.first, data_len=0, dev_id=99))
    g.refuses(errno.ENOENT, g.nested_cmd(99, dev_id=99))
    g.refuses(errno.EINVAL, g.nested_cmd(99))


@pytest.mark.parametrize("flags", range(16))
def test_nested_flags(g: Guest, flags: int) -> None:  # events-12-6 events-12-11
    given = g.nested_cmd(g.first, flags=flags, fault_id=99)
    if flags & ~(FAULT | PASID):
        g.refuses(errno.EOPNOTSUPP, given)
    elif flags & FAULT:
        g.refuses(errno.ENOENT, given)
        given.fault_id = g.do(u.iommu_fault_alloc()).out_fault_id
        g.do(given)
    else:
        g.do(given)


# ---------------------------------------------------------------------------------------- 7, mock 2.4: attaching


def test_rid_attach_needs_a_vdevice_here(g: Guest) -> None:  # events 7, mock-2.4-2
    nested, other = g.nested(g.first), g.viommu(g.parent)
    g.op_refuses(errno.ENOENT, t.test_mock_domain_replace(id=g.stdev, pt_id=nested))
    vdev = g.vdevice(other, 1)  # one on another vIOMMU does not help
    g.op_refuses(errno.ENOENT, t.test_mock_domain_replace(id=g.stdev, pt_id=nested))
    g.op(t.test_pasid_check_hwpt(id=g.stdev, hwpt_id=g.auto))  # still attached where it was
    g.destroy(vdev)
    g.vdevice(g.first, 1)
    g.replace(nested)


def test_a_new_device_cannot_start_there(g: Guest) -> None:  # mock 4.1
    before = g.ledger()
    g.op_refuses(errno.ENOENT, t.test_mock_domain(id=g.nested(g.first)))
    g.destroy(max(o.id for o in g.context.objects))
    assert difference(before, g.ledger()) == []


def test_pasid_attach_needs_no_vdevice(g: Guest) -> None:  # events 7, mock 2.4
    nested, plain = g.nested(g.first, flags=PASID), g.hwpt(PASID)
    g.replace(plain)
    g.op(t.test_pasid_attach(id=g.stdev, pasid=7, pt_id=nested))
    assert g.core().viommu is None
    g.op(t.test_pasid_replace(id=g.stdev, pasid=7, pt_id=plain))
    g.op(t.test_pasid_replace(id=g.stdev, pasid=7, pt_id=nested))


def test_the_device_follows_its_rid(g: Guest) -> None:  # mock-2.4-3
    nested, again, core = g.nested(g.first), g.nested(g.first), g.core()
    vdev = g.vdevice(g.first, 5)
    g.replace(nested)
    assert getattr(core.viommu, "id", None) == g.first
    assert core.vdev_id == 5
    g.destroy(vdev)
    assert core.vdev_id == 5  # stale until the attach changes
    g.vdevice(g.first, 6)
    g.replace(again)
    assert core.vdev_id == 5  # the vIOMMU is the same: not refreshed
    g.replace(g.ioas_id)
    assert (core.viommu, core.vdev_id) == (None, 0)
    g.replace(nested)
    assert core.vdev_id == 6


def test_removing_the_device_takes_its_vdevice(g: Guest) -> None:  # events 7 lifecycle 2
    vdev = g.vdevice(g.first, 5)
    g.replace(g.nested(g.first))
    g.destroy(g.stdev)
    assert g.context.objects.tombstones == 1
    g.refuses(errno.ENOENT, u.iommu_destroy(id=vdev))
    _, _, dev = g.device()
    g.vdevice(g.first, 5, dev)


# ------------------------------------------------------------------------------------------- 8, mock 4.6: events


def veventq(g: Guest, depth: int = 4, **more: int) -> u.iommu_veventq_alloc:
    given = {"viommu_id": g.first, "type": t.IOMMU_VEVENTQ_TYPE_SELFTEST, **more}
    return g.do(u.iommu_veventq_alloc(veventq_depth=depth, **given))


def test_trigger_lookup(g: Guest) -> None:  # mock-4.6-1
    g.op_refuses(errno.ENOENT, t.test_trigger_vevent(dev_id=99))
    g.op_refuses(errno.ENOENT, t.test_trigger_vevent(dev_id=g.ioas_id))


def test_a_device_without_viommu_raises_nothing(g: Guest) -> None:  # mock-4.6-2
    veventq(g)
    g.op_refuses(errno.ENOENT, t.test_trigger_vevent(dev_id=g.dev))
    g.vdevice(g.first, 1)
    g.op_refuses(errno.ENOENT, t.test_trigger_vevent(dev_id=g.dev))  # not attached yet


def test_virtual_id_zero_raises_nothing(g: Guest) -> None:  # mock-4.6-2
    veventq(g)
    g.vdevice(g.first, 0)
    g.replace(g.nested(g.first))
    g.op_refuses(errno.ENOENT, t.test_trigger_vevent(dev_id=g.dev))


def test_without_a_queue_of_the_type(g: Guest) -> None:  # mock-4.6-3
    veventq(g, type=5)
    g.vdevice(g.first, 1)
    g.replace(g.nested(g.first))
    g.op_refuses(errno.EOPNOTSUPP, t.test_trigger_vevent(dev_id=g.dev))


def test_events_carry_the_virtual_id(g: Guest) -> None:  # mock-4.6-4 mock-4.6-5, events 8
    fd = veventq(g, depth=2).out_veventq_fd
    g.vdevice(g.first, 0x1_2345_6789)
    g.replace(g.nested(g.first))
    for _ in range(3):
        g.op(t.test_trigger_vevent(dev_id=g.dev))
    assert g.queue_read(fd, 100) == pack("<IIIIIIII", 0, 0, 0x2345_6789, 0, 1, 0x2345_6789, 1, 2)


def test_events_go_on_with_the_stale_id(g: Guest) -> None:  # events 7 lifecycle 1
    fd = veventq(g).out_veventq_fd
    vdev = g.vdevice(g.first, 3)
    g.replace(g.nested(g.first))
    g.destroy(vdev)
    g.op(t.test_trigger_vevent(dev_id=g.dev))
    assert g.queue_read(fd, 12) == pack("<III", 0, 0, 3)


# --------------------------------------------------------------------------------------------------- 11.1: invalidation


def cmd(g: Guest, *entries: tuple[int, int, int], length: int = 12, **more: int) -> u.iommu_hwpt_invalidate:
    g.host.poke(ARRAY, b"".join(pack("<III", *entry)[:length].ljust(length, b"\0") for entry in entries))
    given = {"data_uptr": ARRAY, "data_type": TYPE, "entry_len": length, "entry_num": len(entries), **more}
    return u.iommu_hwpt_invalidate(hwpt_id=g.first, **given)


def refused(g: Guest, number: int, given: u.iommu_hwpt_invalidate) -> int:
    g.refuses(number, given)
    return g.after(u.iommu_hwpt_invalidate).entry_num


@pytest.fixture
def cached(g: Guest) -> Guest:
    """With a vDEVICE of id 9."""
    g.vdevice(g.first, 9)
    return g


def test_an_empty_array(cached: Guest) -> None:  # events-11.1-1
    assert cached.do(cmd(cached, data_uptr=0, entry_len=0)).entry_num == 0


@pytest.mark.parametrize("data_type", [TYPE, TYPE - 1])
def test_more_than_the_kernel_copies_at_once(cached: Guest, data_type: int) -> None:  # events-11.1-2
    big = cmd(cached, entry_num=349526, data_type=data_type, data_uptr=0x10)
    assert refused(cached, errno.ENOMEM, big) == 349526
    assert refused(cached, errno.EINVAL, cmd(cached, entry_num=349525, data_type=1, data_uptr=0x10)) == 0


@pytest.mark.parametrize("count", [0, 1])
def test_invalidate_type(cached: Guest, count: int) -> None:  # events-11.1-3
    given = cmd(cached, (0, 9, 0), data_type=t.IOMMU_HWPT_INVALIDATE_DATA_SELFTEST_INVALID, entry_num=count)
    assert refused(cached, errno.EINVAL, given) == 0


def test_entries_that_cannot_be_read(cached: Guest) -> None:  # events-11.1-4
    end = ARRAY + 0x100 * P
    cached.host.poke(end - 12, pack("<III", 0, 9, 0))
    given = cmd(cached, (0, 9, 0), (0, 9, 1), data_uptr=end - 12)
    assert refused(cached, errno.EFAULT, given) == 0
    assert cached.core().cache == [CACHE] * 4


def test_longer_entries_end_in_zeros(cached: Guest) -> None:  # events-11.1-4
    given = cmd(cached, (0, 9, 0), (0, 9, 1), length=16)
    cached.host.poke(ARRAY + 31, b"\1")
    assert refused(cached, errno.E2BIG, given) == 0
    assert cached.core().cache == [CACHE] * 4
    assert cached.do(cmd(cached, (0, 9, 0), (0, 9, 1), length=16)).entry_num == 2
    assert cached.core().cache == [0, 0, CACHE, CACHE]


def test_shorter_entries_are_extended(cached: Guest) -> None:  # events-11.1-4
    assert cached.do(cmd(cached, (0, 9, 3), length=8)).entry_num == 1
    assert cached.core().cache == [0, CACHE, CACHE, CACHE]
    assert refused(cached, errno.EINVAL, cmd(cached, (0, 9, 0), length=4)) == 0  # device 0


@pytest.mark.parametrize(
    ("entry", "number"),
    [
        ((2, 9, 0), errno.EOPNOTSUPP),  # events-11.1-5
        ((0, 9, 4), errno.EINVAL),  # events-11.1-6
        ((1, 9, 4), errno.EINVAL),  # events-11.1-6
        ((0, 8, 0), errno.EINVAL),  # events-11.1-7
    ],
)
def test_bad_entries_stop_after_the_good_ones(cached: Guest, entry: tuple[int, int, int], number: int) -> None:
    assert refused(cached, number, cmd(cached, (0, 9, 2), entry, (0, 9, 3))) == 1
    assert cached.core().cache == [CACHE, CACHE, 0, CACHE]


def test_all_words(cached: Guest) -> None:  # events-11.1-8
    assert cached.do(cmd(cached, (1, 9, 0))).entry_num == 1
    assert cached.core().cache == [0] * 4


def test_check_cache(cached: Guest) -> None:  # mock 4.7
    cached.op_refuses(errno.ENOENT, t.test_dev_check_cache(id=99, cache=CACHE))
    cached.op_refuses(errno.EINVAL, t.test_dev_check_cache(id=cached.dev, arm_id=4, cache=CACHE))
    cached.op_refuses(errno.EINVAL, t.test_dev_check_cache(id=cached.dev, arm_id=3, cache=0))
    cached.op(t.test_dev_check_cache(id=cached.dev, arm_id=3, cache=CACHE))


# --------------------------------------------------------------------------------------------------------- 9: HW queues


def queue(g: Guest, index: int, page: int = 0, **more: int) -> u.iommu_hw_queue_alloc:
    given = {"viommu_id": g.first, "type": t.IOMMU_HW_QUEUE_TYPE_SELFTEST, "length": P, **more}
    return u.iommu_hw_queue_alloc(index=index, nesting_parent_iova=IOVA + page * P, **given)


@pytest.fixture
def mapped(g: Guest) -> Guest:
    g.map(g.ioas_id, IOVA, 4 * P, BUFFER)
    return g


def test_only_the_selftest_queues(mapped: Guest) -> None:  # events-9-5
    mapped.refuses(errno.EOPNOTSUPP, queue(mapped, 0, type=1))


def test_two_queues_in_ascending_order(mapped: Guest) -> None:  # events 9, driver part
    mapped.refuses(errno.EINVAL, queue(mapped, 2))
    mapped.refuses(errno.EIO, queue(mapped, 1))
    mapped.refuses(errno.ENOENT, queue(mapped, 2, page=4))  # pinning comes first
    first = mapped.do(queue(mapped, 0)).out_hw_queue_id
    mapped.refuses(errno.EEXIST, queue(mapped, 0))
    second = mapped.do(queue(mapped, 1, page=1)).out_hw_queue_id
    mapped.refuses(errno.EEXIST, queue(mapped, 1))
    mapped.refuses(errno.EBUSY, u.iommu_destroy(id=first))
    mapped.destroy(second)
    second = mapped.do(queue(mapped, 1, page=2)).out_hw_queue_id
    mapped.destroy(second)
    mapped.destroy(first)
    mapped.do(queue(mapped, 0))


def test_what_7_3_4_frees(mapped: Guest) -> None:  # docs/deviations.md hw-queue-destroy-clears-slot-0
    state = mapped.find(mapped.first, Viommu).private
    assert isinstance(state, MockViommu)
    state.clears_slot_0 = True
    first = mapped.do(queue(mapped, 0)).out_hw_queue_id
    mapped.destroy(mapped.do(queue(mapped, 1, page=1)).out_hw_queue_id)
    mapped.refuses(errno.EEXIST, queue(mapped, 1, page=1))
    again = mapped.do(queue(mapped, 0, page=2)).out_hw_queue_id
    mapped.destroy(again)
    mapped.destroy(first)
    mapped.do(queue(mapped, 0))
    mapped.refuses(errno.EEXIST, queue(mapped, 1, page=1))


def test_each_viommu_has_its_own(mapped: Guest) -> None:  # events 9
    other = mapped.viommu(mapped.parent)
    mapped.do(queue(mapped, 0))
    mapped.refuses(errno.EIO, queue(mapped, 1, viommu_id=other))
    mapped.do(queue(mapped, 0, viommu_id=other))


def test_the_base_address_is_checked(mapped: Guest) -> None:  # events 9, driver part
    """The pinned page and the parent's translation differ only if the page table does not hold what was pinned."""
    domain = mapped.find(mapped.parent, HwptPaging).domain
    domain.unmap(IOVA, 4 * P)
    before = mapped.ledger()
    mapped.refuses(errno.EFAULT, queue(mapped, 0))
    assert difference(before, mapped.ledger()) == []


def test_a_queue_inside_a_page(mapped: Guest) -> None:  # events 9
    given = queue(mapped, 0, length=16)
    given.nesting_parent_iova += 0x123
    mapped.do(given)


def test_alignment_of_the_ioas_rises_and_falls(mapped: Guest) -> None:  # events-9-10
    table = mapped.table(mapped.ioas_id)
    assert table.iova_alignment == 2048
    number = mapped.do(queue(mapped, 0)).out_hw_queue_id
    assert table.iova_alignment == P
    mapped.destroy(number)
    assert table.iova_alignment == 2048
    mapped.map(mapped.ioas_id, IOVA + 8 * P, 2048, BUFFER)
    mapped.refuses(errno.EADDRINUSE, queue(mapped, 0))


def test_everything_goes_with_the_context(mapped: Guest) -> None:  # events 10
    mapped.do(viommu_cmd(mapped, 24))
    mapped.do(queue(mapped, 0))
    mapped.do(queue(mapped, 1, page=1))
    mapped.vdevice(mapped.first, 4)
    mapped.replace(mapped.nested(mapped.first))
    veventq(mapped)
    mapped.host.map(0x3000_0000, 1, READ | WRITE)
    for fd in list(mapped.proc.installed):
        mapped.close(fd)
    mapped.context.put()
    assert mapped.context.references == 0
    assert len(mapped.context.objects) == 0
    mapped.quiet()


def test_nothing_waits_for_the_cyclic_collector() -> None:
    """The supervisor runs with it disabled: what was destroyed must be gone by itself."""

    def live() -> list[object]:
        kinds = (Viommu, Vdevice, HwQueue, VeventQueue, FaultQueue, QueueFile, MockDevice, MockNestedDomain)
        return [obj for obj in gc.get_objects() if isinstance(obj, kinds)]

    gc.collect()
    gc.disable()
    try:
        before = len(live())
        for leaky in (False, True):
            use_everything(leaky)
            assert len(live()) == before
    finally:
        gc.enable()


def use_everything(leaky: bool) -> None:
    g = Guest()
    g.map(g.ioas_id, IOVA, 4 * P, BUFFER)
    state = g.find(g.first, Viommu).private
    assert isinstance(state, MockViommu)
    state.clears_slot_0 = leaky
    g.do(viommu_cmd(g, 24))
    g.do(queue(g, 0))
    g.destroy(g.do(queue(g, 1, page=1)).out_hw_queue_id)
    g.vdevice(g.first, 4)
    fault = g.do(u.iommu_fault_alloc())
    g.replace(g.nested(g.first, flags=FAULT, fault_id=fault.out_fault_id))
    veventq(g)
    for _ in range(3):
        g.op(t.test_trigger_vevent(dev_id=g.dev))
        g.op(t.test_trigger_iopf(dev_id=g.dev))
        g.queue_read(fault.out_fault_fd, 40)
    g.op(t.test_trigger_iopf(dev_id=g.dev))
    g.destroy(g.stdev)
    for fd in list(g.proc.installed):
        g.close(fd)
    g.context.put()
    assert len(g.context.objects) == 0
