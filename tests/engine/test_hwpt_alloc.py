"""IOMMU_HWPT_ALLOC (devices.md 4), by step."""

from __future__ import annotations

import errno

import pytest

from iommufd.engine.hwpt import HwptNested
from iommufd.iommu.domain import BaseDomain, Kind
from iommufd.iommu.driver import Capability
from iommufd.uapi import iommufd as u
from tests.engine.fakes import ARRAY
from tests.engine.hardware import DATA_TYPE, Bench, Driver, PlainDriver

NEST = u.IOMMU_HWPT_ALLOC_NEST_PARENT
DIRTY = u.IOMMU_HWPT_ALLOC_DIRTY_TRACKING
FAULT = u.IOMMU_HWPT_FAULT_ID_VALID
PASID = u.IOMMU_HWPT_ALLOC_PASID
DATA = {"data_type": DATA_TYPE, "data_len": 4, "data_uptr": ARRAY}


@pytest.fixture
def bench() -> Bench:
    return Bench()


def alloc(bench: Bench, number: int, **fields: int) -> None:
    """The allocation fails with ``number`` and leaves no object and no count."""
    before = {obj.id: obj.users for obj in bench.context.objects}
    bench.refuses(number, u.iommu_hwpt_alloc(**fields))
    assert {obj.id: obj.users for obj in bench.context.objects} == before
    assert len(bench.context.objects) == len(before)


def test_steps_before_the_kind_of_parent(bench: Bench) -> None:  # devices 4.2
    idev, ioas = bench.bound(), bench.ioas()
    good = {"dev_id": idev.id, "pt_id": ioas}
    alloc(bench, errno.EOPNOTSUPP, reserved=1, data_len=4)  # step 1
    alloc(bench, errno.EINVAL, data_len=4, dev_id=99)  # step 2
    alloc(bench, errno.EINVAL, data_type=1, dev_id=99)
    alloc(bench, errno.ENOENT, dev_id=99, pt_id=99, flags=0x100)  # step 3: flags come later
    alloc(bench, errno.ENOENT, dev_id=ioas, pt_id=ioas)
    alloc(bench, errno.EINVAL, dev_id=idev.id, pt_id=99, flags=0x100)  # step 4: not ENOENT
    alloc(bench, errno.EINVAL, dev_id=idev.id, pt_id=idev.id)  # step 5
    alloc(bench, errno.ENOENT, **good, flags=FAULT, fault_id=99)  # step 6
    alloc(bench, errno.ENOENT, **good, flags=FAULT, fault_id=ioas)
    bench.hwpt(idev, ioas, fault_id=99)  # ignored without the flag
    bench.hwpt(idev, ioas, reserved2=7)  # never checked


def test_fault_injection_of_the_lookups(bench: Bench) -> None:  # devices 10.7
    idev, ioas = bench.bound(), bench.ioas()
    for nth, wanted in ((1, errno.ENOENT), (2, errno.EINVAL)):
        seen = iter(range(1, 10))
        bench.world.fail = lambda name, task, nth=nth, seen=seen: name == "object lookup" and next(seen) == nth
        alloc(bench, wanted, dev_id=idev.id, pt_id=ioas)


def test_the_answer_that_cannot_be_written(bench: Bench) -> None:  # devices 4.2 step 8
    idev, ioas = bench.bound(), bench.ioas()
    bench.host.protect(0x2000_0000, 1, 1)  # readable only
    cmd = u.iommu_hwpt_alloc(size=48, dev_id=idev.id, pt_id=ioas)
    bench.refuses(errno.EFAULT, cmd, 0x2000_0000)
    assert bench.ids() == [idev.id, ioas]
    assert bench.log.calls[-1] == "free pt0"


@pytest.mark.parametrize("flags", [NEST, DIRTY, PASID, NEST | DIRTY, DIRTY | PASID, NEST | PASID, NEST | DIRTY | PASID])
def test_paging_flags(bench: Bench, flags: int) -> None:  # devices 4.3, 4.6
    idev, ioas = bench.bound(), bench.ioas()
    hwpt = bench.paging(bench.hwpt(idev, ioas, flags))
    assert (hwpt.nest_parent, hwpt.pasid_compat) == (bool(flags & NEST), bool(flags & PASID))
    assert (hwpt.domain.dirty_ops is not None) == bool(flags & DIRTY)
    assert hwpt.domain.owner is bench.driver
    assert (bench.obj(ioas).users, bench.table(ioas).domains) == (2, [hwpt.domain])
    assert bench.obj(ioas).hwpts == [hwpt]


def test_paging_flags_that_do_not_go(bench: Bench) -> None:  # devices 4.3 steps 3-5
    idev, ioas = bench.bound(), bench.ioas()
    good = {"dev_id": idev.id, "pt_id": ioas}
    alloc(bench, errno.EOPNOTSUPP, **good, flags=0x10)
    alloc(bench, errno.EOPNOTSUPP, **good, flags=FAULT | NEST, fault_id=99)
    bench.driver.capabilities.discard(Capability.DIRTY_TRACKING)
    alloc(bench, errno.EOPNOTSUPP, **good, flags=DIRTY)


def test_the_fault_flag_never_reaches_the_driver(bench: Bench) -> None:  # devices 4.3 step 8a
    idev, ioas = bench.bound(), bench.ioas()
    queue = bench.do(u.iommu_fault_alloc()).out_fault_id
    bench.log.take()
    hwpt = bench.hwpt(idev, ioas, FAULT | DIRTY, fault_id=queue)
    assert bench.log.take() == ["alloc a 0x2"]
    assert bench.obj(queue).users == 3
    assert bench.paging(hwpt).domain.iopf_handler is not None
    bench.do(u.iommu_destroy(id=hwpt))
    assert bench.obj(queue).users == 2


def test_drivers_of_every_ability(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:  # devices 4.3 steps 1, 2, 8
    ioas = bench.ioas()
    plain = PlainDriver(bench.log)
    idev = bench.bound("p", driver=plain)
    bench.hwpt(idev, ioas)
    alloc(bench, errno.EOPNOTSUPP, dev_id=idev.id, pt_id=ioas, flags=PASID)
    alloc(bench, errno.EOPNOTSUPP, dev_id=idev.id, pt_id=ioas, **DATA)
    monkeypatch.setattr(plain, "domain_alloc_paging", lambda device: None)
    alloc(bench, errno.ENOMEM, dev_id=idev.id, pt_id=ioas)
    other = bench.noiommu()
    bench.world.noiommu_driver = None
    alloc(bench, errno.ENODEV, dev_id=other.id, pt_id=ioas)


def test_filling_a_manual_hwpt(bench: Bench) -> None:  # devices 4.3 step 11, 3.10
    idev, ioas = bench.bound(), bench.ioas()
    bench.map(ioas, 0x1000000, 0x2000)
    bench.log.take()
    bench.hwpt(idev, ioas)
    assert bench.log.take() == ["alloc a", "map pt0 0x1000000+0x2000"]
    assert bench.pinned_vm == 2
    bench.map(bench.ioas(), 0x1000, 0x1000)
    alloc(bench, errno.EADDRINUSE, dev_id=idev.id, pt_id=4)
    assert bench.log.take() == ["alloc a", "free pt1"]


def test_destroying_gives_everything_back(bench: Bench) -> None:  # devices 4.8
    idev, ioas = bench.bound(), bench.ioas()
    bench.map(ioas, 0x1000000, 0x2000)
    hwpt = bench.hwpt(idev, ioas)
    bench.refuses(errno.EBUSY, u.iommu_destroy(id=ioas))
    bench.log.take()
    bench.do(u.iommu_destroy(id=hwpt))
    assert bench.log.take() == ["unmap pt0 0x1000000+0x2000", "free pt0"]
    assert (bench.table(ioas).domains, bench.obj(ioas).hwpts, bench.table(ioas).reserved) == ([], [], [])
    bench.quiet()
    bench.do(u.iommu_destroy(id=ioas))


# ---------------------------------------------------------------------------------------------------------- 4.4: nested


def test_nested_on_a_parent(bench: Bench) -> None:  # devices 4.4
    idev, ioas = bench.bound(), bench.ioas()
    parent = bench.hwpt(idev, ioas, NEST)
    bench.log.take()
    number = bench.nested(idev, parent, PASID)
    assert bench.log.take() == ["nest a 0x8"]
    nested = bench.obj(number)
    assert isinstance(nested, HwptNested)
    assert nested.pasid_compat
    assert (nested.paging.id, bench.obj(parent).users) == (parent, 2)
    bench.refuses(errno.EBUSY, u.iommu_destroy(id=parent))
    idev.attach(number)
    bench.refuses(errno.EBUSY, u.iommu_destroy(id=number))
    idev.detach()
    bench.do(u.iommu_destroy(id=number))
    assert bench.obj(parent).users == 1


def test_what_a_nested_one_needs(bench: Bench) -> None:  # devices 4.4
    idev, ioas = bench.bound(), bench.ioas()
    parent = bench.hwpt(idev, ioas, NEST)
    good = {"dev_id": idev.id, "pt_id": parent, **DATA}
    for flags in (NEST, DIRTY, 0x10):  # step 1
        alloc(bench, errno.EOPNOTSUPP, **good, flags=flags)
    alloc(bench, errno.EOPNOTSUPP, dev_id=idev.id, pt_id=parent)
    alloc(bench, errno.EOPNOTSUPP, **{**good, "dev_id": bench.noiommu().id})
    alloc(bench, errno.EOPNOTSUPP, **{**good, "dev_id": bench.bound("p", driver=PlainDriver(bench.log)).id})
    foreign = bench.bound("f", driver=Driver(bench.log, "foreign"))
    alloc(bench, errno.EINVAL, **{**good, "dev_id": foreign.id})  # step 2
    alloc(bench, errno.EINVAL, **{**good, "pt_id": bench.hwpt(idev, ioas)})
    alloc(bench, errno.EINVAL, **{**good, "pt_id": bench.bound("b").attach(ioas)})
    alloc(bench, errno.EINVAL, **{**good, "pt_id": bench.nested(idev, parent)})  # 4.2 step 5
    bench.log.failures["nest"] = errno.ENOSPC
    alloc(bench, errno.ENOSPC, **good)  # step 4


def test_a_driver_that_makes_something_else(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:  # devices 4.4 step 5
    idev, ioas = bench.bound(), bench.ioas()
    parent = bench.hwpt(idev, ioas, NEST)
    monkeypatch.setattr(bench.driver, "domain_alloc_nested", lambda *_: BaseDomain(Kind.PAGING))
    alloc(bench, errno.EOPNOTSUPP, dev_id=idev.id, pt_id=parent, **DATA)


@pytest.mark.parametrize(
    ("fields", "number"),
    [
        ({}, 0),
        ({"flags": FAULT}, errno.ENOENT),  # accepted until the queue is looked up
        ({"flags": NEST}, errno.EOPNOTSUPP),
        ({"flags": PASID}, errno.EOPNOTSUPP),
        ({"flags": DIRTY}, errno.EOPNOTSUPP),
        (DATA, errno.EOPNOTSUPP),
    ],
)
def test_without_an_iommu(bench: Bench, fields: dict[str, int], number: int) -> None:  # devices 9.2
    idev, ioas = bench.noiommu(), bench.ioas()
    if number:
        alloc(bench, number, dev_id=idev.id, pt_id=ioas, **fields)
    else:
        bench.hwpt(idev, ioas)
