"""VIOMMU (events 6, 10) and nested page tables made from one (devices 4.5)."""

from __future__ import annotations

import errno

import pytest

from iommufd.engine.failpoints import SLAB
from iommufd.engine.hwpt import HwptNested
from iommufd.iommu.driver import Iommu
from iommufd.uapi import iommufd as u
from tests.engine.flat_task import BASE, as_task, expect
from tests.engine.small_iommu import DATA_TYPE, EVENT_TYPE, VIOMMU_TYPE, PlainOps, Rig, SmallNested, SmallPaging


@pytest.fixture
def rig() -> Rig:
    return Rig()


def alloc(rig: Rig, **fields: int) -> u.iommu_viommu_alloc:
    given = {"type": VIOMMU_TYPE, "dev_id": rig.dev, "hwpt_id": rig.parent, **fields}
    return u.iommu_viommu_alloc(**given)


# -------------------------------------------------------------------------------------------------------- 6: allocation


@pytest.mark.parametrize("fields", [{"flags": 1}, {"type": 0}, {"flags": 1, "dev_id": 99}])
def test_flags_and_the_default_type(rig: Rig, fields: dict[str, int]) -> None:  # events-6-1
    rig.fails(errno.EOPNOTSUPP, alloc(rig, **fields))


def test_device_lookup(rig: Rig) -> None:  # events-6-2
    rig.fails(errno.ENOENT, alloc(rig, dev_id=99))
    rig.fails(errno.ENOENT, alloc(rig, dev_id=rig.ioas, type=0x99))


def test_a_device_without_iommu(rig: Rig) -> None:  # events-6-3
    rig.idev.device.iommu = None
    rig.fails(errno.EOPNOTSUPP, alloc(rig))


@pytest.mark.parametrize("hwpt", [0, 99])
def test_a_type_the_driver_does_not_know(rig: Rig, hwpt: int) -> None:  # events-6-4
    rig.fails(errno.EOPNOTSUPP, alloc(rig, type=VIOMMU_TYPE + 1, hwpt_id=hwpt or rig.parent))


def test_the_parent_is_a_paging_hwpt(rig: Rig) -> None:  # events-6-5
    rig.fails(errno.ENOENT, alloc(rig, hwpt_id=99))
    rig.fails(errno.ENOENT, alloc(rig, hwpt_id=rig.ioas))
    rig.fails(errno.ENOENT, alloc(rig, hwpt_id=rig.nested(rig.parent)))


def test_the_parent_was_made_for_nesting(rig: Rig) -> None:  # events-6-6
    rig.fails(errno.EINVAL, alloc(rig, hwpt_id=rig.hwpt()))


def test_no_memory_for_the_object(rig: Rig) -> None:  # events-6-7
    plain = rig.hwpt()
    rig.world.fail = lambda point, task: point == SLAB
    rig.fails(errno.ENOMEM, alloc(rig))
    rig.fails(errno.EINVAL, alloc(rig, hwpt_id=plain))
    assert rig.log.calls == []


def test_the_driver_may_refuse(rig: Rig) -> None:  # events-6-8
    rig.log.failures["viommu_init"] = errno.ENOSPC
    rig.fails(errno.ENOSPC, alloc(rig))
    assert rig.log.names() == ["viommu_init"]


def test_the_driver_gets_data_only_with_a_length(rig: Rig) -> None:  # events-6-8
    rig.do(alloc(rig, data_uptr=0x1234))
    rig.do(alloc(rig, data_uptr=0x1234, data_len=7))
    assert rig.log.calls == [("viommu_init", None), ("viommu_init", (VIOMMU_TYPE, 0x1234, 7))]


def test_nothing_remains_when_the_answer_cannot_be_written(rig: Rig) -> None:  # events-6-9
    rig.fails_unwritten(alloc(rig))
    assert rig.log.names() == ["viommu_init", "viommu_destroy"]


def test_reserved_is_not_looked_at(rig: Rig) -> None:  # events 6
    rig.do(alloc(rig, reserved=1))


def test_short_struct_of_the_first_release(rig: Rig) -> None:  # events 1: 24 bytes are enough
    cmd = alloc(rig, data_len=7)
    cmd.size = 24
    rig.do(cmd)
    assert rig.log.calls == [("viommu_init", None)]


def test_a_driver_that_sets_no_operations_is_refused(rig: Rig) -> None:  # devices 10.1 viommu_init
    rig.driver.ops = None
    rig.fails(errno.EINVAL, alloc(rig))


# ------------------------------------------------------------------------------------------------------- 10: references


def test_it_holds_its_parent_and_not_its_device(rig: Rig) -> None:  # events 6, 10
    parent, device = rig.object(rig.parent), rig.object(rig.dev)
    users = parent.users, device.users
    first, second = rig.viommu(), rig.viommu()
    assert (parent.users, device.users) == (users[0] + 2, users[1])
    rig.fails(errno.EBUSY, u.iommu_destroy(id=rig.parent))
    rig.destroy(first)
    rig.destroy(second)
    rig.destroy(rig.parent)


def test_everything_made_from_it_keeps_it(rig: Rig) -> None:  # events 10
    viommu = rig.viommu()
    nested = rig.nested(viommu)
    vdevice = rig.do(u.iommu_vdevice_alloc(viommu_id=viommu, dev_id=rig.dev, virt_id=1)).out_vdevice_id
    events = rig.do(u.iommu_veventq_alloc(viommu_id=viommu, type=EVENT_TYPE, veventq_depth=1))
    region = rig.viommu_object(viommu).alloc_mmap(4096)
    rig.context.mmap(as_task(rig.task), region.offset, 4096, 3, True)
    for number in (nested, vdevice, events.out_veventq_id, None):
        rig.fails(errno.EBUSY, u.iommu_destroy(id=viommu))
        if number == events.out_veventq_id:
            rig.task.close(events.out_veventq_fd)
        if number is None:
            rig.context.mapping_closed(region.offset)
        else:
            rig.destroy(number)
    rig.destroy(viommu)
    assert rig.log.names()[-1] == "viommu_destroy"


def test_its_memory_goes_with_it(rig: Rig) -> None:  # events 9.1
    viommu = rig.viommu()
    assert rig.viommu_object(viommu).alloc_mmap(8192).offset == 0x1000
    rig.destroy(viommu)
    with expect(errno.ENXIO):
        rig.context.mmap(as_task(rig.task), 0x1000, 8192, 3, True)
    assert rig.viommu_object(rig.viommu()).alloc_mmap(4096).offset == 0x1000


def test_closing_the_context_takes_everything_leaf_first(rig: Rig) -> None:  # events 10
    viommu = rig.viommu()
    rig.nested(viommu)
    rig.do(u.iommu_vdevice_alloc(viommu_id=viommu, dev_id=rig.dev, virt_id=1))
    rig.idev.users -= 1  # the driver's, as the selftest's device goes with its context
    rig.context.put()
    assert len(rig.context.objects) == 0
    assert rig.log.names()[-2:] == ["vdevice_destroy", "viommu_destroy"]


# -------------------------------------------------------------------------------------- devices 4.5: nested on a vIOMMU


def nested_alloc(rig: Rig, viommu: int, **fields: int) -> u.iommu_hwpt_alloc:
    given = {"dev_id": rig.dev, "pt_id": viommu, "data_type": DATA_TYPE, "data_len": 4, "data_uptr": BASE, **fields}
    return u.iommu_hwpt_alloc(**given)


def test_nested_wants_a_device_of_the_same_iommu(rig: Rig) -> None:  # devices-4.5-1 events-12-5
    other = rig.bind(Iommu("another"))
    rig.fails(errno.EINVAL, nested_alloc(rig, rig.viommu(), dev_id=other.id, flags=1))


@pytest.mark.parametrize("flags", [f for f in range(17) if f & ~12])
def test_nested_flags(rig: Rig, flags: int) -> None:  # devices-4.5-2
    rig.fails(errno.EOPNOTSUPP, nested_alloc(rig, rig.viommu(), flags=flags))


def test_nested_wants_data(rig: Rig) -> None:  # devices-4.5-3 events-12-7
    rig.fails(errno.EOPNOTSUPP, nested_alloc(rig, rig.viommu(), data_type=0, data_len=0))


def test_nested_wants_a_driver_that_makes_them(rig: Rig) -> None:  # devices-4.5-4
    rig.driver.ops = PlainOps()
    rig.fails(errno.EOPNOTSUPP, nested_alloc(rig, rig.viommu()))


def test_nested_driver_errors_pass_through(rig: Rig) -> None:  # devices-4.5-6
    viommu = rig.viommu()
    rig.log.failures["alloc_domain_nested"] = errno.ENOSPC
    rig.fails(errno.ENOSPC, nested_alloc(rig, viommu))


def test_nested_must_be_nested(rig: Rig) -> None:  # devices-4.5-7
    viommu = rig.viommu()

    class Wrong:
        def alloc_domain_nested(self, viommu: object, flags: int, data: object) -> SmallPaging:
            return SmallPaging(0x1000)

    rig.viommu_object(viommu).ops = Wrong()
    rig.fails(errno.EOPNOTSUPP, nested_alloc(rig, viommu))


def test_nested_of_a_viommu_references_the_viommu_only(rig: Rig) -> None:  # devices-4.5-5, events 10
    viommu = rig.viommu()
    parent = rig.object(rig.parent)
    users = parent.users
    number = rig.nested(viommu)
    hwpt = rig.object(number)
    assert isinstance(hwpt, HwptNested)
    assert isinstance(hwpt.domain, SmallNested)
    assert hwpt.parent is parent
    assert parent.users == users
    assert rig.log.calls[-1] == ("alloc_domain_nested", 0)
    rig.fails(errno.EBUSY, u.iommu_destroy(id=viommu))
    rig.destroy(number)
    rig.destroy(viommu)


def test_fault_flag_is_hidden_from_the_driver(rig: Rig) -> None:  # devices-4.5-6
    queue = rig.do(u.iommu_fault_alloc()).out_fault_id
    rig.do(nested_alloc(rig, rig.viommu(), flags=12, fault_id=queue))
    assert rig.log.calls[-1] == ("alloc_domain_nested", u.IOMMU_HWPT_ALLOC_PASID)
    rig.fails(errno.ENOENT, nested_alloc(rig, rig.viommu(), flags=4, fault_id=99))  # events-12-11
