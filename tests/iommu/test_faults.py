"""Where a page request goes (events 3.2, 3.3) and who answers the hardware."""

from __future__ import annotations

import errno

import pytest

from iommufd.errors import KernelError
from iommufd.iommu.device import Device
from iommufd.iommu.domain import BaseDomain, IopfHandler, Kind
from iommufd.iommu.driver import Capability, Iommu
from iommufd.iommu.faults import (
    LAST_PAGE,
    PASID_VALID,
    AttachHandle,
    FaultGroup,
    FaultSource,
    IopfQueue,
    PageRequest,
    ResponseCode,
    report_device_fault,
)
from iommufd.iommu.group import Group

QUEUE = IopfQueue("hardware")


def fake_domain(kind: Kind = Kind.PAGING, handler: IopfHandler | None = None) -> BaseDomain:
    domain = BaseDomain(kind)
    domain.iopf_handler = handler
    return domain


class FakeDriver:
    name = "fake"
    blocked_domain = None
    identity_domain = None

    def __init__(self, user_pasid_table: bool = False) -> None:
        self.user_pasid_table = user_pasid_table
        self.responses: list[tuple[int, int]] = []  # (grpid, code)

    def capable(self, device: Device, capability: Capability) -> bool:
        return True

    def page_response(self, device: Device, request: PageRequest, code: ResponseCode) -> None:
        assert request.flags & LAST_PAGE
        self.responses.append((request.grpid, code))


class Rig:
    """One device whose group's handles the test sets."""

    def __init__(self, *, user_pasid_table: bool = False) -> None:
        self.driver = FakeDriver(user_pasid_table)
        self.device = Device("dev", driver=self.driver, iommu=Iommu("fake"))
        self.group = Group("0", fake_domain(Kind.BLOCKED))
        self.group.add(self.device)
        self.source = FaultSource()
        self.device.fault_source = self.source
        self.groups: list[FaultGroup] = []

    def attach(self, pasid: int, *, queue: bool = True, kind: Kind = Kind.PAGING) -> AttachHandle:
        handle = AttachHandle(fake_domain(kind, self.groups.append if queue else None), "owner", pasid)
        self.group.handles[pasid] = handle
        self.source.domain_changes(QUEUE, handle.domain, None)
        return handle

    def report(self, *, pasid: int = 0, grpid: int = 1, addr: int = 0x1000, last: bool = True) -> None:
        flags = (PASID_VALID if pasid else 0) | (LAST_PAGE if last else 0)
        report_device_fault(self.device, PageRequest(flags=flags, pasid=pasid, grpid=grpid, perm=1, addr=addr))

    def dropped(self, *, pasid: int = 0, grpid: int = 1, last: bool = True) -> bool:
        before = len(self.groups)
        with pytest.raises(KernelError) as caught:
            self.report(pasid=pasid, grpid=grpid, last=last)
        assert caught.value.errno == errno.EINVAL
        return len(self.groups) == before


# ------------------------------------------------------------------------------------------------ 3.3: which attachment


def test_pasid_goes_to_the_attachment_of_that_pasid() -> None:  # events-3.3-1
    rig = Rig()
    rig.attach(0)
    handle = rig.attach(7)
    rig.report(pasid=7)
    assert [g.handle for g in rig.groups] == [handle]


def test_pasid_without_attachment_is_dropped_with_a_paging_rid() -> None:  # events-3.3-2
    rig = Rig(user_pasid_table=True)
    rig.attach(0)
    assert rig.dropped(pasid=7)


def test_pasid_without_attachment_goes_to_a_nested_rid() -> None:  # events-3.3-2
    rig = Rig(user_pasid_table=True)
    handle = rig.attach(0, kind=Kind.NESTED)
    rig.report(pasid=7)
    assert [g.handle for g in rig.groups] == [handle]


def test_nested_rid_takes_foreign_pasids_only_if_the_guest_owns_the_pasid_table() -> None:  # events-3.3-2
    rig = Rig(user_pasid_table=False)
    rig.attach(0, kind=Kind.NESTED)
    assert rig.dropped(pasid=7)


def test_without_pasid_it_is_the_rid() -> None:  # events-3.3-3
    rig = Rig()
    rig.attach(7)
    assert rig.dropped()
    handle = rig.attach(0)
    rig.report()
    assert [g.handle for g in rig.groups] == [handle]


def test_no_second_attempt_when_the_pasid_has_no_queue() -> None:  # events-3.3-4
    rig = Rig(user_pasid_table=True)
    rig.attach(0, kind=Kind.NESTED)
    rig.attach(7, queue=False)
    assert rig.dropped(pasid=7)


def test_a_device_that_is_not_registered_is_dropped() -> None:  # events-3.3-5
    rig = Rig()
    handle = rig.attach(0)
    rig.source.domain_changes(QUEUE, None, handle.domain)
    assert rig.dropped()


def test_a_dropped_request_is_answered_invalid_once_and_only_at_the_end_of_its_group() -> None:
    rig = Rig()
    assert rig.dropped(grpid=3, last=False)
    assert rig.driver.responses == []
    assert rig.dropped(grpid=3)
    assert rig.driver.responses == [(3, ResponseCode.INVALID)]


# -------------------------------------------------------------------------------------------------- 3.3: partial groups


def test_partial_requests_are_invisible() -> None:  # events-3.3-6
    rig = Rig()
    rig.attach(0)
    rig.report(last=False)
    assert rig.groups == []
    assert rig.driver.responses == []


def test_a_group_is_its_partials_in_arrival_order_then_the_last() -> None:  # events-3.3-7
    rig = Rig()
    rig.attach(0)
    rig.report(grpid=1, addr=0x1000, last=False)
    rig.report(grpid=2, addr=0x2000, last=False)
    rig.report(grpid=1, addr=0x3000, last=False)
    rig.report(grpid=1, addr=0x4000)
    (group,) = rig.groups
    assert [r.addr for r in group.requests] == [0x1000, 0x3000, 0x4000]
    rig.report(grpid=2, addr=0x5000)
    assert [r.addr for r in rig.groups[1].requests] == [0x2000, 0x5000]
    rig.report(grpid=1, addr=0x6000)  # the partials left the list
    assert [r.addr for r in rig.groups[2].requests] == [0x6000]


def test_partials_are_matched_by_group_not_by_pasid() -> None:  # events-3.3-7
    rig = Rig()
    rig.attach(0)
    handle = rig.attach(7)
    rig.report(grpid=1, addr=0x1000, last=False)
    rig.report(grpid=1, addr=0x2000, pasid=7)
    (group,) = rig.groups
    assert [r.addr for r in group.requests] == [0x1000, 0x2000]
    assert group.handle is handle


def test_a_handler_that_refuses_makes_the_answer_failure() -> None:  # devices 10.6
    rig = Rig()

    def refuse(group: FaultGroup) -> None:
        raise KernelError(errno.EINVAL, "the attach is over")

    rig.attach(0).domain.iopf_handler = refuse
    rig.report(grpid=5)
    assert rig.driver.responses == [(5, ResponseCode.FAILURE)]


def test_a_group_answers_for_its_last_request() -> None:
    rig = Rig()
    rig.attach(0)
    rig.report(grpid=9, last=False)
    rig.report(grpid=9)
    rig.groups[0].respond(ResponseCode.SUCCESS)
    assert rig.driver.responses == [(9, ResponseCode.SUCCESS)]


# ---------------------------------------------------------------------------------------------------- 3.2: registration


def state(source: FaultSource) -> tuple[IopfQueue | None, int]:
    return source.queue, source.attachments


def test_registered_while_one_attachment_has_a_queue() -> None:  # events 3.2 (1) events 3.2 (2) events 3.2 (4)
    source, faulting, plain = FaultSource(), fake_domain(handler=lambda group: None), fake_domain()
    source.domain_changes(QUEUE, plain, None)  # events 3.2 (3)
    assert state(source) == (None, 0)
    source.domain_changes(QUEUE, faulting, plain)
    source.domain_changes(QUEUE, faulting, None)  # a PASID
    assert state(source) == (QUEUE, 2)
    source.domain_changes(QUEUE, None, faulting)
    assert state(source) == (QUEUE, 1)
    source.domain_changes(QUEUE, plain, faulting)
    assert state(source) == (None, 0)


def test_unregistering_drops_incomplete_groups() -> None:  # events 3.2 (4)
    rig = Rig()
    handle = rig.attach(0)
    rig.report(addr=0x1000, last=False)
    rig.source.domain_changes(QUEUE, None, handle.domain)
    rig.attach(0)
    rig.report(addr=0x2000)
    assert [r.addr for r in rig.groups[0].requests] == [0x2000]


def test_replacing_one_faulting_domain_by_another_never_unregisters() -> None:  # events 3.2
    rig = Rig()
    old = rig.attach(0)
    rig.report(addr=0x1000, last=False)
    new = fake_domain(handler=rig.groups.append)
    rig.source.domain_changes(QUEUE, new, old.domain)
    rig.group.handles[0] = AttachHandle(new, "owner")
    rig.report(addr=0x2000)
    assert [r.addr for r in rig.groups[0].requests] == [0x1000, 0x2000]


def test_enabling_fails_without_a_hardware_queue() -> None:  # events 3.2 (1)
    source, faulting = FaultSource(), fake_domain(handler=lambda group: None)
    with pytest.raises(KernelError) as caught:
        source.domain_changes(None, faulting, None)
    assert caught.value.errno == errno.ENODEV
    assert source.attachments == 0


def test_enabling_fails_when_registered_elsewhere() -> None:  # events 3.2 (1)
    source, faulting = FaultSource(), fake_domain(handler=lambda group: None)
    source.queue = IopfQueue("another")
    with pytest.raises(KernelError) as caught:
        source.domain_changes(QUEUE, faulting, None)
    assert caught.value.errno == errno.EBUSY
    assert source.attachments == 0
