"""Binding, attaching, replacing, detaching (devices.md 1-3, 9), by row."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from iommufd.engine import device as engine_device
from iommufd.engine.context import Context
from iommufd.engine.device import has_group, unbind
from iommufd.iommu.device import Device
from iommufd.iommu.driver import Capability, RegionType, ReservedRegion
from iommufd.iommu.faults import LAST_PAGE, PASID_VALID, PageRequest, report_device_fault
from iommufd.uapi import iommufd as u
from tests.engine.fakes import BUFFER
from tests.engine.flat_task import expect
from tests.engine.hardware import Bench, Driver, M, PlainDriver

PASID = u.IOMMU_HWPT_ALLOC_PASID
NEST = u.IOMMU_HWPT_ALLOC_NEST_PARENT
FAULT = u.IOMMU_HWPT_FAULT_ID_VALID
IOVA = 16 * M
MSI = ReservedRegion(0xFEE00000, 0x100000, RegionType.MSI)
SW_MSI = ReservedRegion(0x8000000, 0x100000, RegionType.SW_MSI)


@pytest.fixture
def bench() -> Bench:
    return Bench()


# ---------------------------------------------------------------------------------------------------------- 2.1, 2.3


def test_binding_takes_an_id_and_blocks_dma(bench: Bench) -> None:  # devices 2.1
    device = bench.group("a")[0]
    idev = bench.bind(device)
    assert (idev.id, idev.users, bench.context.references) == (1, 2, 2)
    assert device.group is not None
    assert device.group.owner is bench.context
    bench.refuses(errno.EBUSY, u.iommu_destroy(id=1))
    unbind(idev)
    assert (bench.ids(), bench.context.references, device.group.owner_cnt) == ([], 1, 0)
    assert len(bench.context.objects) == 0
    assert bench.context.groups == {}


@pytest.mark.parametrize("why", ["no driver", "incoherent"])
def test_devices_without_coherent_dma(bench: Bench, why: str) -> None:  # devices 2.1 step 3
    device = bench.group("a")[0]
    if why == "no driver":
        device.driver = None  # it still has a group, so it is not a no-IOMMU device
    else:
        bench.driver.capabilities.clear()
    with expect(errno.EINVAL):
        bench.bind(device)
    assert len(bench.context.objects) == 0


def test_a_device_in_no_group(bench: Bench) -> None:  # devices 2.1 step 4
    with expect(errno.ENODEV):
        bench.bind(Device("a", driver=bench.driver, iommu=bench.iommu))


def test_isolated_interrupts_of_every_member(bench: Bench) -> None:  # devices 2.1 step 6
    a, b = bench.group("a", "b")
    b.isolated_msi = False
    with expect(errno.EPERM):
        bench.bind(a)
    assert bench.context.groups == {}
    bench.world.allow_unsafe_interrupts = True
    bench.bind(a)


def test_a_group_owned_by_somebody_else(bench: Bench) -> None:  # devices 2.1 step 7, 1.4
    a, b = bench.group("a", "b")
    bench.bind(a)
    other = Bench(bench.world)
    with expect(errno.EPERM):
        other.bind(b)
    assert (len(other.context.objects), other.context.references) == (0, 1)
    bench.bind(b)  # the same context may


def test_members_share_the_igroup_and_one_device_binds_twice(bench: Bench) -> None:  # devices 1.2, 1.4
    a, b = bench.group("a", "b")
    first, second, again = bench.bind(a), bench.bind(b), bench.bind(a)
    assert first.igroup is second.igroup is again.igroup
    assert a.group is not None
    assert a.group.owner_cnt == 3
    for idev in (first, second, again):
        assert len(bench.context.groups) == 1
        unbind(idev)
    assert bench.context.groups == {}


def test_has_group(bench: Bench) -> None:  # devices 1.5
    device = bench.group("a")[0]
    assert not has_group(bench.context, device.group)
    idev = bench.bind(device)
    assert has_group(bench.context, device.group)
    assert not has_group(bench.context, None)
    assert not has_group(None, device.group)
    assert not has_group(Context(bench.world), device.group)
    unbind(idev)
    assert not has_group(bench.context, device.group)


def test_a_bound_device_keeps_the_context(bench: Bench) -> None:  # devices 1.5
    idev = bench.bound()
    bench.context.put()  # the program closes its descriptor
    assert bench.ids() == [idev.id]
    unbind(idev)
    assert bench.context.references == 0


def test_unbinding_what_is_still_attached(bench: Bench) -> None:  # devices 2.3 step 2
    idev = bench.bound()
    idev.attach(bench.ioas())
    unbind(idev)
    assert idev.id in bench.ids()


def test_cache_coherency_is_enforced_when_the_device_can(bench: Bench) -> None:  # devices 2.2
    bench.driver.capabilities.add(Capability.ENFORCE_CACHE_COHERENCY)
    idev = bench.bound()
    bench.log.take()
    hwpt = bench.paging(idev.attach(bench.ioas()))
    assert bench.log.take() == ["alloc a", "enforce pt0", "attach a blocked->pt0"]
    assert hwpt.enforce_cache_coherency
    bench.log.failures["enforce"] = errno.EIO
    with expect(errno.EIO):
        bench.bound("b").attach(bench.ioas())


# -------------------------------------------------------------------------------------------------------------- 3.1,
# 3.2


def test_what_can_be_attached(bench: Bench) -> None:  # devices 3.1
    idev = bench.bound()
    for number, wanted in ((99, errno.ENOENT), (idev.id, errno.EINVAL)):
        with expect(wanted):
            idev.attach(number)
        with expect(wanted):
            idev.replace(number)
    ioas = bench.ioas()
    hwpt = bench.hwpt(idev, ioas)
    assert idev.attach(hwpt) == hwpt
    assert (idev.users, bench.obj(hwpt).users) == (3, 2)
    with expect(errno.EBUSY):  # 3.2 step 2
        idev.attach(hwpt)
    idev.detach()
    assert (idev.users, bench.obj(hwpt).users) == (2, 1)
    idev.detach()  # 3.7 step 1
    assert (idev.users, bench.obj(hwpt).users) == (2, 1)


def test_the_second_member_joins_or_is_refused(bench: Bench) -> None:  # devices 3.2 step 3, 3.1 state table
    a, b = (bench.bind(d) for d in bench.group("a", "b"))
    ioas = bench.ioas()
    one, two = bench.hwpt(a, ioas), bench.hwpt(a, ioas)
    bench.log.take()
    a.attach(one)
    assert bench.log.take() == ["attach a blocked->pt0", "attach b blocked->pt0"]  # the whole group moves
    with expect(errno.EINVAL):
        b.attach(two)
    with expect(errno.EINVAL):  # replace of one that is not attached
        b.replace(two)
    b.attach(one)
    assert bench.log.take() == []  # joining needs no driver
    a.replace(two)
    assert bench.log.take() == ["attach a pt0->pt1", "attach b pt0->pt1"]
    assert a.attached() is b.attached() is bench.obj(two)
    assert (bench.obj(one).users, bench.obj(two).users) == (1, 3)
    a.detach()
    assert bench.log.take() == []
    b.detach()
    assert bench.log.take() == ["attach a pt1->blocked", "attach b pt1->blocked"]


def test_a_failing_attach_leaves_nothing(bench: Bench) -> None:  # devices 3.2, steps 6-9 undone
    bench.driver.regions["a"] = [MSI]
    idev = bench.bound()
    ioas = bench.ioas()
    hwpt = bench.hwpt(idev, ioas)
    bench.log.failures["attach a"] = errno.ENOSPC
    with expect(errno.ENOSPC):
        idev.attach(hwpt)
    assert bench.reserved(ioas) == []
    assert idev.attached() is None
    assert (idev.users, bench.obj(hwpt).users) == (2, 1)


# ------------------------------------------------------------------------------------------------------ 3.8:
# reservations


def test_reserved_regions_come_and_go_with_the_rid(bench: Bench) -> None:  # devices 3.8 region steps 1, 2, 4
    bench.driver.regions["a"] = [MSI, ReservedRegion(0x7000, 0x1000, RegionType.DIRECT_RELAXABLE)]
    bench.driver.regions["b"] = [ReservedRegion(0x9000000, 0x1000, RegionType.RESERVED)]
    a, b = (bench.bind(d) for d in bench.group("a", "b"))
    ioas = bench.ioas()
    hwpt = bench.hwpt(a, ioas, PASID)
    a.attach(hwpt, 5)
    assert bench.reserved(ioas) == []  # not for a PASID
    a.attach(hwpt)
    assert bench.reserved(ioas) == [(0xFEE00000, 0xFEEFFFFF)]
    b.attach(hwpt)
    assert bench.reserved(ioas) == [(0x9000000, 0x9000FFF), (0xFEE00000, 0xFEEFFFFF)]
    a.detach()
    assert bench.reserved(ioas) == [(0x9000000, 0x9000FFF)]
    b.detach()
    assert bench.reserved(ioas) == []


@pytest.mark.parametrize("what", ["area", "allowed"])
def test_a_reservation_that_hits_something(bench: Bench, what: str) -> None:  # devices 3.8 region step 3
    bench.driver.regions["a"] = [ReservedRegion(0x9000000, 0x1000, RegionType.RESERVED), MSI]
    idev, ioas = bench.bound(), bench.ioas()
    if what == "area":
        bench.map(ioas, 0xFEE00000, 0x1000)
    else:
        bench.host.poke(BUFFER, (0xFEE00000).to_bytes(8, "little") + (0xFEE00FFF).to_bytes(8, "little"))
        bench.do(u.iommu_ioas_allow_iovas(ioas_id=ioas, num_iovas=1, allowed_iovas=BUFFER))
    with expect(errno.EADDRINUSE):
        idev.attach(ioas)
    assert bench.reserved(ioas) == []
    assert len(bench.ids()) == 2  # the automatic HWPT went again


@pytest.mark.parametrize("regions", [[MSI, SW_MSI], [SW_MSI, ReservedRegion(0, 4096, RegionType.SW_MSI)]])
def test_impossible_msi_windows(bench: Bench, regions: list[ReservedRegion]) -> None:  # devices 3.8 region step 5
    bench.driver.regions["a"] = regions
    idev, ioas = bench.bound(), bench.ioas()
    hwpt = bench.hwpt(idev, ioas)
    with expect(errno.EINVAL):
        idev.attach(hwpt)
    assert bench.reserved(ioas) == []


def test_fault_injection_of_the_regions(bench: Bench) -> None:  # devices 10.7
    idev, ioas = bench.bound(), bench.ioas()
    hwpt, other = bench.hwpt(idev, ioas), bench.hwpt(idev, bench.ioas())
    points: list[str] = []

    def fails(name: str, task: object) -> bool:
        points.append(name)
        return name == "reserved regions"

    bench.world.fail = fails
    with expect(errno.EINVAL):
        idev.attach(hwpt)
    assert points == ["object lookup", "reserved regions"]
    bench.world.fail = None
    idev.attach(hwpt)
    bench.world.fail = lambda name, task: name == "reserved regions"
    with expect(errno.EINVAL):
        idev.replace(other)
    bench.world.fail = None
    same = bench.hwpt(idev, ioas)
    bench.world.fail = lambda name, task: name == "reserved regions"
    idev.replace(same)  # not within one IOAS
    bench.world.fail = lambda name, task: name == "object lookup"
    with expect(errno.ENOENT):
        idev.replace(hwpt)


# ------------------------------------------------------------------------------------------------ 3.5: automatic HWPTs


def test_an_automatic_hwpt_is_made_shared_and_destroyed(bench: Bench) -> None:  # devices 3.5
    a, b = bench.bound("a"), bench.bound("b")
    ioas = bench.ioas()
    auto = a.attach(ioas)
    assert bench.paging(auto).auto_domain
    assert b.attach(ioas) == auto
    assert bench.obj(auto).users == 3
    a.detach()
    assert auto in bench.ids()
    b.detach()
    assert auto not in bench.ids()
    assert bench.obj(ioas).users == 1


def test_manual_hwpts_are_never_candidates_and_survive(bench: Bench) -> None:  # devices 3.5, 3.7
    idev, ioas = bench.bound(), bench.ioas()
    manual = bench.hwpt(idev, ioas)
    auto = idev.attach(ioas)
    assert auto != manual
    assert idev.replace(manual) == manual
    assert auto not in bench.ids()
    idev.detach()
    assert manual in bench.ids()


def test_attaching_again(bench: Bench) -> None:  # devices 3.5 consequences
    a, b = (bench.bind(d) for d in bench.group("a", "b"))
    first, second = bench.ioas(), bench.ioas()
    auto = a.attach(first)
    for ioas in (first, second):
        with expect(errno.EBUSY):
            a.attach(ioas)
    with expect(errno.EINVAL):  # the group is on another IOAS
        b.attach(second)
    assert b.attach(first) == auto
    before = bench.ids()
    assert a.replace(first) == auto
    assert bench.ids() == before


def test_candidates_that_do_not_fit_are_passed_over(bench: Bench) -> None:  # devices 3.5 step 1
    a = bench.bound("a")
    foreign = bench.bound("f", driver=Driver(bench.log, "foreign"))
    ioas = bench.ioas()
    first = foreign.attach(ioas)
    own = a.attach(ioas)
    assert own != first
    assert bench.bound("b").attach(ioas) == own


def test_a_candidate_that_fails_otherwise_ends_the_search(bench: Bench) -> None:  # devices 3.5 step 1
    a, b = bench.bound("a"), bench.bound("b")
    ioas = bench.ioas()
    a.attach(ioas)
    before = bench.ids()
    bench.log.failures["attach b"] = errno.ENOMEM
    with expect(errno.ENOMEM):
        b.attach(ioas)
    assert bench.ids() == before


def test_order_of_the_driver_calls(bench: Bench) -> None:  # devices 3.10
    idev, first, second = bench.bound(), bench.ioas(), bench.ioas()
    for ioas in (first, second):
        bench.map(ioas, IOVA, 0x1000)
    bench.log.take()
    idev.attach(first)
    assert bench.log.take() == ["alloc a", "attach a blocked->pt0", "map pt0 0x1000000+0x1000"]
    idev.replace(second)
    assert bench.log.take() == [
        "alloc a", "map pt1 0x1000000+0x1000", "attach a pt0->pt1", "unmap pt0 0x1000000+0x1000", "free pt0",
    ]  # fmt: skip
    idev.detach()
    assert bench.log.take() == ["attach a pt1->blocked", "unmap pt1 0x1000000+0x1000", "free pt1"]


def test_filling_fails_after_the_attach(bench: Bench) -> None:  # devices 3.5 step 3a, 3.10
    idev, ioas = bench.bound(), bench.ioas()
    bench.map(ioas, IOVA, 0x1000)
    bench.map(ioas, IOVA + 0x1000, 0x1000, va=0xDEAD_0000)
    bench.log.take()
    with expect(errno.EFAULT):
        idev.attach(ioas)
    assert bench.log.take() == [
        "alloc a", "attach a blocked->pt0", "map pt0 0x1000000+0x1000", "unmap pt0 0x1000000+0x1000",
        "attach a pt0->blocked", "free pt0",
    ]  # fmt: skip
    assert (idev.attached(), idev.users, bench.obj(ioas).users, bench.pinned_vm) == (None, 2, 1, 0)
    assert bench.ids() == [idev.id, ioas]


def test_filling_fails_before_the_replace(bench: Bench) -> None:  # devices 3.5 step 3b, mock-device 3
    idev, good, bad = bench.bound(), bench.ioas(), bench.ioas()
    bench.map(bad, 0x1000, 0x1000)  # below the aperture
    with expect(errno.EADDRINUSE):  # though nothing is attached that could be replaced
        idev.replace(bad)
    auto = idev.attach(good)
    with expect(errno.EADDRINUSE):
        idev.replace(bad)
    assert idev.attached() is bench.obj(auto)


def test_an_automatic_hwpt_that_is_busy_survives(bench: Bench) -> None:  # devices 3.5, core 2.7
    a, b = bench.bound("a"), bench.bound("b")
    ioas = bench.ioas()
    auto = a.attach(ioas)
    held = bench.context.objects.get(auto)
    a.detach()
    assert auto in bench.ids()
    bench.context.objects.put(held)
    assert b.attach(ioas) == auto  # still eligible
    b.detach()
    assert auto not in bench.ids()


# ------------------------------------------------------------------------------------------------------- 3.6: replace


def test_replacing_moves_the_reservations_of_all(bench: Bench) -> None:  # devices 3.6 steps 4, 10
    bench.driver.regions = {"a": [MSI], "b": [ReservedRegion(0x9000000, 0x1000, RegionType.RESERVED)]}
    a, b = (bench.bind(d) for d in bench.group("a", "b"))
    first, second = bench.ioas(), bench.ioas()
    one, two = bench.hwpt(a, first), bench.hwpt(a, second)
    a.attach(one)
    b.attach(one)
    both = [(0x9000000, 0x9000FFF), (0xFEE00000, 0xFEEFFFFF)]
    a.replace(two)
    assert (bench.reserved(first), bench.reserved(second)) == ([], both)
    bench.log.failures["attach b"] = errno.EIO
    with expect(errno.EIO):
        a.replace(one)
    assert (bench.reserved(first), bench.reserved(second)) == ([], both)


def test_a_failed_replace_within_one_ioas_loses_the_reservations(bench: Bench) -> None:  # devices 3.6, quirk
    bench.driver.regions = {"a": [MSI]}
    idev, ioas = bench.bound(), bench.ioas()
    one, two = bench.hwpt(idev, ioas), bench.hwpt(idev, ioas)
    idev.attach(one)
    bench.log.failures["attach a"] = errno.EIO
    with expect(errno.EIO):
        idev.replace(two)
    assert bench.reserved(ioas) == []
    bench.map(ioas, 0xFEE00000, 0x1000)  # over the MSI window
    bench.unmap(ioas, 0xFEE00000, 0x1000)
    bench.log.failures.clear()
    idev.replace(two)
    assert bench.reserved(ioas) == []  # not restored
    idev.replace(bench.hwpt(idev, bench.ioas()))
    idev.replace(two)
    assert bench.reserved(ioas) == [(0xFEE00000, 0xFEEFFFFF)]


def test_replacing_by_the_same_is_nothing(bench: Bench) -> None:  # devices 3.6 step 3
    idev = bench.bound()
    hwpt = bench.hwpt(idev, bench.ioas())
    with expect(errno.EINVAL):  # step 1
        idev.replace(hwpt)
    idev.attach(hwpt)
    bench.log.take()
    assert idev.replace(hwpt) == hwpt
    assert (bench.log.take(), bench.obj(hwpt).users) == ([], 2)


# --------------------------------------------------------------------------------------------------------- 3.9: PASIDs


def test_pasid_compatibility(bench: Bench) -> None:  # devices 3.9
    idev, ioas = bench.bound(), bench.ioas()
    plain, good = bench.hwpt(idev, ioas), bench.hwpt(idev, ioas, PASID)
    with expect(errno.EINVAL):
        idev.attach(plain, 7)
    idev.attach(plain)
    with expect(errno.EINVAL):  # the RID is on one that is not compatible
        idev.attach(good, 7)
    idev.replace(good)
    idev.attach(good, 7)
    with expect(errno.EINVAL):
        idev.replace(plain)
    idev.detach()
    with expect(errno.EINVAL):  # a PASID is attached
        idev.attach(plain)
    idev.attach(bench.hwpt(idev, ioas, PASID))
    assert idev.pasids() == [7]
    with expect(errno.EINVAL):  # automatic ones are not compatible
        idev.attach(ioas, 8)
    with expect(errno.EBUSY):
        idev.attach(ioas, 7)
    with expect(errno.EINVAL):
        idev.replace(ioas, 7)
    idev.detach(7)
    idev.detach(7)
    assert idev.pasids() == []


def test_rid_and_pasids_are_detached_apart(bench: Bench) -> None:  # devices 3.7
    idev, ioas = bench.bound(), bench.ioas()
    hwpt = bench.hwpt(idev, ioas, PASID)
    idev.attach(hwpt)
    idev.attach(hwpt, 3)
    idev.attach(hwpt, 4)
    assert (bench.obj(hwpt).users, idev.users) == (4, 5)
    idev.detach()
    assert idev.pasids() == [3, 4]
    bench.log.take()
    idev.detach(3)
    assert bench.log.take() == ["pasid a 3 pt0->blocked"]


def test_pasid_beyond_the_device(bench: Bench) -> None:  # devices 3.4b step 4
    idev = bench.bound(pasids=16)
    hwpt = bench.hwpt(idev, bench.ioas(), PASID)
    with expect(errno.EINVAL):
        idev.attach(hwpt, 16)
    idev.attach(hwpt, 15)


# --------------------------------------------------------------------------------------------------- pending page
# requests


def fault_queue(bench: Bench) -> tuple[int, Any]:
    queue = bench.do(u.iommu_fault_alloc()).out_fault_id
    return queue, bench.obj(queue)


def request(pasid: int = 0) -> PageRequest:
    return PageRequest(flags=LAST_PAGE | (PASID_VALID if pasid else 0), pasid=pasid, grpid=1, perm=1, addr=0x1000)


def test_page_requests_end_with_their_attach(bench: Bench) -> None:  # devices 3.6 step 9, 3.7 step 3
    idev, ioas = bench.bound(), bench.ioas()
    number, queue = fault_queue(bench)
    one = bench.hwpt(idev, ioas, FAULT | PASID, fault_id=number)
    two = bench.hwpt(idev, ioas, FAULT | PASID, fault_id=number)
    assert queue.users == 4
    idev.attach(one)
    idev.attach(one, 9)
    idev.device.fault_source.domain_changes(bench.iommu.iopf_queue, bench.obj(one).domain, None)
    for pasid in (0, 9):
        report_device_fault(idev.device, request(pasid))
    bench.log.take()
    idev.replace(two)
    assert bench.log.take() == ["attach a pt0->pt1", "respond a 1 INVALID"]
    idev.detach(9)
    assert bench.log.take() == ["pasid a 9 pt0->blocked", "respond a 1 INVALID"]
    assert not queue.ready()


def test_virtual_functions_and_page_requests(bench: Bench) -> None:  # devices 3.2 step 6
    idev = bench.bound()
    idev.device.vf_with_pri = True
    hwpt = bench.hwpt(idev, bench.ioas(), FAULT, fault_id=fault_queue(bench)[0])
    with expect(errno.EINVAL):
        idev.attach(hwpt)


def test_requests_name_the_device_of_the_first_attach(bench: Bench) -> None:  # devices 3.10
    a, b = (bench.bind(d) for d in bench.group("a", "b"))
    hwpt = bench.hwpt(a, bench.ioas())
    b.attach(hwpt)
    a.attach(hwpt)
    assert a.device.group is not None
    handle = a.device.group.handle(0)
    assert handle is not None
    assert handle.owner is b


# ------------------------------------------------------------------------------------------------------------ 9: no
# IOMMU


def test_devices_without_iommu_are_bookkeeping(bench: Bench) -> None:  # devices 9.1, 9.2
    idev, ioas = bench.noiommu(), bench.ioas()
    assert idev.igroup is not None
    assert idev.igroup.group is None
    bench.map(ioas, 0x1000, 0x2000)
    auto = idev.attach(ioas)
    assert bench.pinned_vm == 2
    assert bench.paging(auto).domain.iova_to_phys(0x1000)
    assert bench.log.take() == []
    with expect(errno.EINVAL):
        idev.attach(auto, 5)
    idev.detach()
    bench.quiet()


def test_without_the_build_option_they_cannot_be_bound(bench: Bench) -> None:  # devices 9.1
    bench.world.noiommu_driver = None
    with expect(errno.EINVAL):
        bench.noiommu()


def test_real_and_no_iommu_page_tables_mixed(bench: Bench) -> None:  # devices 9.2
    real, software, ioas = bench.bound(), bench.noiommu(), bench.ioas()
    own = bench.hwpt(software, ioas)
    with expect(errno.EINVAL):
        real.attach(own)
    auto = real.attach(ioas)
    assert software.attach(auto) == auto  # accepted, no test of the owner
    with expect(errno.ENODEV):
        real.replace(own)
    other = bench.ioas()
    first = bench.noiommu("m")
    bare = first.attach(other)
    with expect(errno.ENODEV):  # an automatic replace search stops with it
        real.replace(other)
    assert bench.bound("b").attach(other) != bare  # an automatic attach search skips it


def test_drivers_without_flags(bench: Bench) -> None:  # devices 4.3 steps 2, 8b
    idev, ioas = bench.bound(driver=PlainDriver(bench.log)), bench.ioas()
    idev.attach(ioas)
    assert idev.attached() is not None
    bench.refuses(errno.EOPNOTSUPP, u.iommu_hwpt_alloc(flags=FAULT, dev_id=idev.id, pt_id=ioas))
    assert isinstance(idev, engine_device.Device)
