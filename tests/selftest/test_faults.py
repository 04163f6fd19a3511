"""Page requests end to end: mock device, page table with a queue, descriptor (events 3, 5; mock 4.5)."""

from __future__ import annotations

import errno
from struct import pack

import pytest

from iommufd.engine.file import POLLIN
from iommufd.engine.ledger import difference
from iommufd.errors import KernelError
from iommufd.iommu.faults import LAST_PAGE, IopfQueue, PageRequest, report_device_fault
from iommufd.uapi import iommufd as u
from iommufd.uapi import iommufd_test as t
from tests.selftest.mock import FAULT, NEST, PASID, Mock


class Rig(Mock):
    """The device is on a page table with a fault queue."""

    def __init__(self) -> None:
        super().__init__()
        made = self.do(u.iommu_fault_alloc())
        self.queue, self.fd = made.out_fault_id, made.out_fault_fd
        self.faulting = self.hwpt(FAULT | PASID, fault_id=self.queue)
        self.replace(self.faulting)

    def trigger(self, grpid: int = 1, *, pasid: int = 0, dev: int = 0, addr: int = 0x1001, perm: int = 3) -> None:
        self.op(t.test_trigger_iopf(dev_id=dev or self.dev, pasid=pasid, grpid=grpid, addr=addr, perm=perm))

    def messages(self) -> list[u.iommu_hwpt_pgfault]:
        data = self.queue_read(self.fd, 4000)
        return [u.iommu_hwpt_pgfault.unpack(data[at : at + 40]) for at in range(0, len(data), 40)]

    def pending(self) -> bool:
        return bool(self.proc.installed[self.fd].poll() & POLLIN)

    def unknown(self, cookie: int) -> None:
        with pytest.raises(KernelError) as caught:
            self.queue_write(self.fd, pack("<II", cookie, 0))
        assert caught.value.errno == errno.EINVAL


@pytest.fixture
def r() -> Rig:
    return Rig()


# -------------------------------------------------------------------------------------------- 3.1: queue and page table


def test_a_nesting_parent_has_no_queue(r: Rig) -> None:  # events-3.1-2 mock-2.3-paging-3
    r.refuses(errno.EOPNOTSUPP, u.iommu_hwpt_alloc(flags=FAULT | NEST, dev_id=r.dev, pt_id=r.ioas_id, fault_id=99))


def test_the_queue_is_looked_up_last(r: Rig) -> None:  # events-3.1-1 events-3.1-3 events-3.1-4
    before = r.ledger()
    r.refuses(errno.ENOENT, u.iommu_hwpt_alloc(flags=FAULT | 16, dev_id=99, pt_id=99, fault_id=99))
    r.refuses(errno.EINVAL, u.iommu_hwpt_alloc(flags=FAULT | 16, dev_id=r.dev, pt_id=99, fault_id=99))
    r.refuses(errno.EOPNOTSUPP, u.iommu_hwpt_alloc(flags=FAULT | 16, dev_id=r.dev, pt_id=r.ioas_id, fault_id=99))
    given = u.iommu_hwpt_alloc(flags=FAULT, dev_id=r.dev, pt_id=r.ioas_id, fault_id=99, data_type=1, data_len=8)
    r.refuses(errno.EOPNOTSUPP, given)
    for wrong in (99, r.ioas_id):
        r.refuses(errno.ENOENT, u.iommu_hwpt_alloc(flags=FAULT, dev_id=r.dev, pt_id=r.ioas_id, fault_id=wrong))
    assert difference(before, r.ledger()) == []
    r.hwpt(fault_id=99)  # ignored without the flag


def test_page_tables_keep_the_queue(r: Rig) -> None:  # events-3.1-5 events 5 (8)
    second = r.hwpt(FAULT, fault_id=r.queue)
    r.close(r.fd)
    r.refuses(errno.EBUSY, u.iommu_destroy(id=r.queue))
    r.destroy(second)
    r.replace(r.ioas_id)
    r.refuses(errno.EBUSY, u.iommu_destroy(id=r.queue))
    r.destroy(r.faulting)
    r.destroy(r.queue)


def test_automatic_page_tables_have_none(r: Rig) -> None:  # events 3.1
    r.replace(r.ioas_id)
    r.trigger()
    assert not r.pending()


# --------------------------------------------------------------------------------------------------- 3.2: fault sources


def test_attachments_with_a_queue_are_counted(r: Rig) -> None:  # events 3.2
    source, plain = r.core().fault_source, r.hwpt(PASID)
    assert source.attachments == 1
    r.op(t.test_pasid_attach(id=r.stdev, pasid=1, pt_id=r.faulting))
    r.op(t.test_pasid_attach(id=r.stdev, pasid=2, pt_id=plain))
    assert source.attachments == 2
    r.op(t.test_pasid_replace(id=r.stdev, pasid=2, pt_id=r.faulting))
    r.replace(plain)
    assert source.attachments == 2
    r.op(t.test_pasid_detach(id=r.stdev, pasid=1))
    r.op(t.test_pasid_detach(id=r.stdev, pasid=2))
    assert (source.attachments, source.queue) == (0, None)


@pytest.mark.parametrize("number", [errno.ENODEV, errno.EBUSY])
def test_enabling_that_fails_leaves_the_old_attachment(r: Rig, number: int) -> None:  # events 3.2 mock-2.4-4
    r.replace(r.ioas_id)
    core = r.core()
    assert core.iommu is not None
    if number == errno.ENODEV:
        core.iommu.iopf_queue = None
    else:
        core.fault_source.queue = IopfQueue("another")
    before = r.ledger()
    r.op_refuses(number, t.test_mock_domain_replace(id=r.stdev, pt_id=r.faulting))
    assert difference(before, r.ledger()) == []
    r.op_refuses(errno.EINVAL, t.test_pasid_check_hwpt(id=r.stdev, hwpt_id=r.faulting))


# --------------------------------------------------------------------------------------------------------- 3.3: routing


def test_trigger_lookup(r: Rig) -> None:  # mock 4.5
    r.op_refuses(errno.ENOENT, t.test_trigger_iopf(dev_id=99))
    r.op_refuses(errno.ENOENT, t.test_trigger_iopf(dev_id=r.stdev))


def test_rid_and_pasids(r: Rig) -> None:  # events-3.3-1 events-3.3-2 events-3.3-3 events-3.3-4, mock 4.5
    r.trigger(1)
    r.trigger(2, pasid=5)  # paging domain on the RID: dropped
    r.op(t.test_pasid_attach(id=r.stdev, pasid=5, pt_id=r.faulting))
    r.trigger(3, pasid=5)
    r.op(t.test_pasid_attach(id=r.stdev, pasid=6, pt_id=r.hwpt(PASID)))
    r.trigger(4, pasid=6)  # no queue: dropped
    found = [(m.flags, m.grpid, m.pasid, m.dev_id, m.addr, m.perm) for m in r.messages()]
    assert found == [(2, 1, 0, r.dev, 0x1001, 3), (3, 3, 5, r.dev, 0x1001, 3)]


def test_a_nested_rid_takes_pasids_of_the_guest(r: Rig) -> None:  # events-3.3-2
    r.replace(r.nested(r.hwpt(NEST), flags=FAULT, fault_id=r.queue))
    r.trigger(8, pasid=5)
    assert [(m.flags, m.pasid) for m in r.messages()] == [(3, 5)]


def test_a_detached_rid(r: Rig) -> None:  # events-3.3-3
    r.op(t.test_pasid_attach(id=r.stdev, pasid=5, pt_id=r.faulting))
    r.op(t.test_pasid_detach(id=r.stdev, pasid=0))
    r.trigger()
    assert not r.pending()
    r.trigger(pasid=5)
    assert r.pending()


def test_messages_name_the_attached_device(r: Rig) -> None:  # events 3.4
    stdev, _, dev = r.device()
    r.replace(r.faulting, stdev)  # allocated for the first device
    r.trigger(dev=dev)
    assert [m.dev_id for m in r.messages()] == [dev]


def test_partial_groups(r: Rig) -> None:  # events-3.3-6 events-3.3-7
    for addr, flags in ((0x1000, 0), (0x2000, 0), (0x3000, LAST_PAGE)):
        assert not r.pending()
        report_device_fault(r.core(), PageRequest(flags=flags, pasid=0, grpid=4, perm=1, addr=addr))
    found = r.messages()
    assert [(m.addr, m.flags, m.cookie) for m in found] == [(0x1000, 0, 1), (0x2000, 0, 1), (0x3000, 2, 1)]


# ------------------------------------------------------------------------------------- 5: pending requests and attaches


def waiting(r: Rig, pasid: int = 0) -> int:
    """One group read and not answered, one not read; the cookie of the first."""
    r.trigger(1, pasid=pasid)
    (message,) = r.messages()
    r.trigger(2, pasid=pasid)
    return message.cookie


def test_detach(r: Rig) -> None:  # events 5 (1)
    r.op(t.test_pasid_attach(id=r.stdev, pasid=5, pt_id=r.faulting))
    cookie = waiting(r, pasid=5)
    r.trigger(3)
    r.op(t.test_pasid_detach(id=r.stdev, pasid=5))
    r.unknown(cookie)
    assert [m.grpid for m in r.messages()] == [3]  # events 5 (5)
    cookie = waiting(r)
    r.op(t.test_pasid_detach(id=r.stdev, pasid=0))
    r.unknown(cookie)
    assert not r.pending()


def test_replace_by_another_with_the_same_queue(r: Rig) -> None:  # events 5 (2)
    cookie = waiting(r)
    r.replace(r.hwpt(FAULT, fault_id=r.queue))
    r.unknown(cookie)
    assert not r.pending()
    r.trigger(3)
    assert [m.grpid for m in r.messages()] == [3]


def test_replace_by_itself(r: Rig) -> None:  # events 5 (3)
    cookie = waiting(r)
    r.replace(r.faulting)
    assert r.queue_write(r.fd, pack("<II", cookie, 0)) == 8
    assert r.pending()


def test_failed_replace(r: Rig) -> None:  # events 5 (4)
    r.op(t.test_pasid_attach(id=r.stdev, pasid=t.IOMMU_TEST_PASID_RESERVED, pt_id=r.faulting))
    cookie = waiting(r, pasid=t.IOMMU_TEST_PASID_RESERVED)
    other = r.hwpt(FAULT | PASID, fault_id=r.queue)
    r.op_refuses(errno.ENOMEM, t.test_pasid_replace(id=r.stdev, pasid=t.IOMMU_TEST_PASID_RESERVED, pt_id=other))
    assert r.queue_write(r.fd, pack("<II", cookie, 0)) == 8
    assert r.pending()


def test_other_devices_are_untouched(r: Rig) -> None:  # events 5 (5)
    stdev, _, dev = r.device()
    r.replace(r.faulting, stdev)
    cookie = waiting(r)
    r.trigger(7, dev=dev)
    r.replace(r.ioas_id)
    r.unknown(cookie)
    assert [m.dev_id for m in r.messages()] == [dev]


def test_destroying_the_device(r: Rig) -> None:  # events 5 (6)
    cookie = waiting(r)
    r.destroy(r.stdev)
    r.unknown(cookie)
    assert not r.pending()


def test_the_page_table_cannot_go_first(r: Rig) -> None:  # events 5 (7)
    waiting(r)
    r.refuses(errno.EBUSY, u.iommu_destroy(id=r.faulting))


def test_closing_everything_with_requests_pending(r: Rig) -> None:  # events 5 (9)
    waiting(r)
    r.context.put()
    assert len(r.context.objects) > 0  # the queue's descriptor keeps it
    assert len(r.messages()) == 1
    r.close(r.fd)
    assert r.context.references == 0
    assert len(r.context.objects) == 0
