"""devices 2-3, mock 3-4: what attaching, replacing and detaching leave behind, on mock devices."""

from __future__ import annotations

from errno import EADDRINUSE, EBUSY, EFAULT, EINVAL, ENOENT, ENOMEM

from iommufd.testing.conformance import check
from iommufd.testing.conformance.common import (
    APERTURE,
    free_ranges,
    ioas_alloc,
    map_fixed,
    mock_domain,
    open_ioas,
    unmap,
    unwritable,
)
from iommufd.testing.conformance.devices import DIRTY, FAULT, NEST, PASID, device, hwpt_alloc, hwpt_request
from iommufd.testing.subject import PAGE, Subject
from iommufd.uapi import iommufd as u
from iommufd.uapi import iommufd_test as t

attach, replace, detach = t.test_pasid_attach, t.test_pasid_replace, t.test_pasid_detach
where, rid_replace = t.test_pasid_check_hwpt, t.test_mock_domain_replace


class Rig:
    """A context with a PASID-capable mock device, attached to an IOAS; its ids."""

    def __init__(self, s: Subject) -> None:
        self.s = s
        self.fd, self.ioas = open_ioas(s)
        self.stdev, self.auto, self.dev = device(s, self.fd, self.ioas, t.MOCK_FLAGS_DEVICE_PASID)

    def hwpt(self, flags: int = 0) -> int:
        return hwpt_alloc(self.s, self.fd, self.dev, self.ioas, flags)

    def rid(self, hwpt: int) -> None:
        self.s.do(self.fd, rid_replace(id=self.stdev, pt_id=hwpt))

    def is_at(self, hwpt: int, pasid: int = 0) -> None:
        self.s.do(self.fd, where(id=self.stdev, pasid=pasid, hwpt_id=hwpt))


@check("devices 2.1 row 9", "devices 3.1 row 3", "devices 3.1 row 5", "mock 4.1 row 3", "devices 2.3 row 3")
def ids_and_counts_of_an_attached_device(s: Subject) -> None:
    """Test device, DEVICE, HWPT take ids in this order; the DEVICE is never the user's to destroy."""
    fd, ioas = open_ioas(s)
    stdev, hwpt, dev = mock_domain(s, fd, ioas)
    s.expect((stdev, dev, hwpt) == (ioas + 1, ioas + 2, ioas + 3), "the HWPT that was chosen has the last id")
    s.refuses(EBUSY, fd, u.iommu_destroy(id=dev))
    s.do(fd, detach(id=stdev))
    s.refuses(ENOENT, fd, u.iommu_destroy(id=hwpt))
    s.refuses(EBUSY, fd, u.iommu_destroy(id=dev))
    s.do(fd, u.iommu_destroy(id=stdev))
    s.refuses(ENOENT, fd, u.iommu_destroy(id=dev))


@check("devices 3.2 row 2", "mock 3 attach row 3", "devices 3.5 consequences")
def attaching_again_is_busy(s: Subject) -> None:
    r = Rig(s)
    other = ioas_alloc(s, r.fd)
    for pt in (r.auto, r.ioas, r.hwpt(), other):
        s.refuses(EBUSY, r.fd, attach(id=r.stdev, pasid=0, pt_id=pt))
    r.is_at(r.auto)
    hwpt = r.hwpt(PASID)
    r.rid(hwpt)
    s.do(r.fd, attach(id=r.stdev, pasid=7, pt_id=hwpt))
    for pt in (hwpt, r.hwpt(PASID), r.ioas, other):
        s.refuses(EBUSY, r.fd, attach(id=r.stdev, pasid=7, pt_id=pt))


@check("devices 3.2 row 10", "devices 3.6 row 11", "devices 3.7 row 5", "devices 3.4 row 6")
def attachments_are_counted(s: Subject) -> None:
    """The RID and each PASID hold a HWPT; whoever leaves last lets it go."""
    r = Rig(s)
    hwpt = r.hwpt(PASID)
    r.rid(hwpt)
    for pasid in (1, 2):
        s.do(r.fd, attach(id=r.stdev, pasid=pasid, pt_id=hwpt))
    for pasid in (1, 2, 0):
        s.refuses(EBUSY, r.fd, u.iommu_destroy(id=hwpt))
        s.do(r.fd, detach(id=r.stdev, pasid=pasid))
    s.do(r.fd, u.iommu_destroy(id=hwpt))


@check("devices 3.7 row 1", "devices 3.7 row 2", "devices 3.6 row 1", "mock 3 replace row 2")
def detaching_what_is_not_attached(s: Subject) -> None:
    r = Rig(s)
    s.do(r.fd, detach(id=r.stdev, pasid=5))
    r.is_at(r.auto)
    s.do(r.fd, detach(id=r.stdev))
    s.do(r.fd, detach(id=r.stdev))
    r.is_at(0)
    s.refuses(EINVAL, r.fd, rid_replace(id=r.stdev, pt_id=r.ioas))
    s.refuses(EINVAL, r.fd, replace(id=r.stdev, pasid=5, pt_id=r.hwpt(PASID)))
    s.do(r.fd, attach(id=r.stdev, pt_id=r.ioas))


@check("mock 3 attach row 4", "mock 3 replace row 4", "devices 3.2 row 7", "devices 3.6 row 6", "devices 3.9")
def pasids_want_a_rid_that_knows_them(s: Subject) -> None:
    r = Rig(s)
    knowing, plain = r.hwpt(PASID), r.hwpt()
    r.rid(knowing)
    s.do(r.fd, attach(id=r.stdev, pasid=3, pt_id=knowing))
    for pt in (plain, r.ioas):
        s.refuses(EINVAL, r.fd, rid_replace(id=r.stdev, pt_id=pt))
        s.refuses(EINVAL, r.fd, replace(id=r.stdev, pasid=3, pt_id=pt))
    r.is_at(knowing)
    r.is_at(knowing, 3)
    s.do(r.fd, detach(id=r.stdev))
    for pt in (plain, r.ioas):
        s.refuses(EINVAL, r.fd, attach(id=r.stdev, pt_id=pt))
    s.do(r.fd, attach(id=r.stdev, pt_id=knowing))
    s.do(r.fd, detach(id=r.stdev, pasid=3))
    r.rid(plain)


@check("mock 3 attach row 8", "mock 3 replace row 5", "devices 3.2 row 9", "devices 3.6 row 8", "devices 3.4b row 6")
def what_the_hardware_refuses(s: Subject) -> None:
    """The driver's errno comes out, and the old attachment stays."""
    fd, ioas = open_ioas(s)
    _, _, able = mock_domain(s, fd, ioas)
    dirty, plain = hwpt_alloc(s, fd, able, ioas, DIRTY), hwpt_alloc(s, fd, able, ioas)
    stdev, _, _ = device(s, fd, plain, t.MOCK_FLAGS_DEVICE_NO_DIRTY)
    s.refuses(EINVAL, fd, rid_replace(id=stdev, pt_id=dirty))
    s.do(fd, where(id=stdev, hwpt_id=plain))
    s.do(fd, detach(id=stdev))
    s.refuses(EINVAL, fd, attach(id=stdev, pt_id=dirty))
    s.do(fd, where(id=stdev, hwpt_id=0))
    r = Rig(s)
    first, second = r.hwpt(PASID), r.hwpt(PASID)
    r.rid(first)
    s.do(r.fd, attach(id=r.stdev, pasid=1024, pt_id=first))
    s.refuses(ENOMEM, r.fd, replace(id=r.stdev, pasid=1024, pt_id=second))
    r.is_at(first, 1024)
    s.do(r.fd, u.iommu_destroy(id=second))


@check("mock 3 replace row 1", "mock 3 replace row 3", "devices 3.6 row 3")
def replacing_looks_and_then_compares(s: Subject) -> None:
    r = Rig(s)
    for pasid in (0, 9):
        s.refuses(ENOENT, r.fd, replace(id=r.stdev, pasid=pasid, pt_id=99))
        for wrong in (r.stdev, r.dev):
            s.refuses(EINVAL, r.fd, replace(id=r.stdev, pasid=pasid, pt_id=wrong))
    hwpt = r.hwpt(PASID)
    r.rid(hwpt)
    s.do(r.fd, attach(id=r.stdev, pasid=1024, pt_id=hwpt))
    for _ in range(3):  # the hardware, which would fail every second time, is not asked
        s.expect(s.do(r.fd, replace(id=r.stdev, pasid=1024, pt_id=hwpt)).pt_id == hwpt, "the same: nothing happens")
    s.expect(s.do(r.fd, rid_replace(id=r.stdev, pt_id=hwpt)).pt_id == hwpt, "the same for the RID")


@check("mock 3 replace row 6", "devices 3.6 row 9", "devices 3.3 row 5", "devices 3.4b row 8")
def faults_go_to_the_newest_attachment(s: Subject) -> None:
    """A HWPT's faults are routed to its queue from the attach on, and dropped when it is replaced."""
    r = Rig(s)
    queues, hwpts = [], []
    for _ in range(2):
        out = s.do(r.fd, u.iommu_fault_alloc())
        queues.append(out.out_fault_fd)
        asked = u.iommu_hwpt_alloc(flags=FAULT | PASID, dev_id=r.dev, pt_id=r.ioas, fault_id=out.out_fault_id)
        hwpts.append(s.do(r.fd, asked).out_hwpt_id)

    def fault(group: int, pasid: int) -> None:
        s.do(r.fd, t.test_trigger_iopf(dev_id=r.dev, pasid=pasid, grpid=group, perm=1, addr=APERTURE))

    fault(1, 0)
    r.rid(hwpts[0])
    s.expect(s.read(queues[0], 40).result == 0, "a fault before the attach is nobody's")
    s.do(r.fd, attach(id=r.stdev, pasid=4, pt_id=hwpts[0]))
    fault(2, 0)
    fault(3, 4)
    r.rid(hwpts[1])
    got = s.read(queues[0], 400).out
    s.expect(len(got) == 40 and got[12] == 3, "only the PASID's fault is left")
    fault(4, 0)
    s.expect(s.read(queues[1], 400).out[12] == 4, "the RID's next one goes to the other queue")
    s.do(r.fd, replace(id=r.stdev, pasid=4, pt_id=hwpts[1]))
    s.expect(s.write(queues[0], got[36:40] + bytes(4)).errno == EINVAL, "what was read has been answered")
    fault(5, 4)
    s.expect(s.read(queues[1], 400).out[12] == 5, "and so does the PASID's")
    s.do(r.fd, detach(id=r.stdev, pasid=4))
    fault(6, 4)
    s.expect(s.read(queues[1], 400).result == 0, "detached: nobody's again")


@check("mock 4.4 row 1", "mock 4.4 row 2", "mock 4.4 row 3", "mock 4.4 row 4", "mock 4.4 row 5")
def asking_what_is_attached(s: Subject) -> None:
    r = Rig(s)
    hwpt, other = r.hwpt(PASID), r.hwpt(PASID)
    s.refuses(ENOENT, r.fd, where(id=r.dev, hwpt_id=0))
    s.refuses(EINVAL, r.fd, where(id=r.stdev, hwpt_id=0))
    s.do(r.fd, where(id=r.stdev, pasid=6, hwpt_id=0))
    s.refuses(ENOENT, r.fd, where(id=r.stdev, pasid=6, hwpt_id=99))
    for wrong in (r.ioas, r.dev, r.stdev):
        s.refuses(EINVAL, r.fd, where(id=r.stdev, hwpt_id=wrong))
    s.refuses(EINVAL, r.fd, where(id=r.stdev, pasid=6, hwpt_id=hwpt))
    r.rid(hwpt)
    s.do(r.fd, attach(id=r.stdev, pasid=6, pt_id=other))
    r.is_at(hwpt)
    r.is_at(other, 6)
    s.refuses(EINVAL, r.fd, where(id=r.stdev, pasid=6, hwpt_id=hwpt))
    s.refuses(EINVAL, r.fd, where(id=r.stdev, hwpt_id=other))


@check("mock 4.1 row 4", "devices 3.5 row 3a", "devices 4.3 row 10", "devices 4.3 row 11")
def an_attach_that_cannot_fill_its_hwpt_is_undone(s: Subject) -> None:
    r = Rig(s)
    bad = ioas_alloc(s, r.fd)
    s.munmap(s.page(5), PAGE)
    map_fixed(s, r.fd, bad, s.page(5), PAGE, APERTURE)
    s.do(r.fd, detach(id=r.stdev))
    s.refuses(EFAULT, r.fd, attach(id=r.stdev, pt_id=bad))
    r.is_at(0)
    s.refuses(EFAULT, r.fd, t.test_mock_domain(id=bad))
    unmap(s, r.fd, bad, APERTURE, PAGE)
    map_fixed(s, r.fd, bad, s.page(0), PAGE, 0x1000)
    s.refuses(EADDRINUSE, r.fd, attach(id=r.stdev, pt_id=bad))
    s.expect(free_ranges(s, r.fd, bad) == ([(0, 2**64 - 1)], 1), "the page table went with its ranges")
    s.do(r.fd, attach(id=r.stdev, pt_id=r.ioas))


@check("devices 3.5 row 4", "devices 4.4 row 2")
def automatic_means_automatic(s: Subject) -> None:
    """It may be attached by its id, and cannot be a parent; a HWPT made by hand is never chosen."""
    r = Rig(s)
    manual = r.hwpt()
    other, chosen, _ = mock_domain(s, r.fd, r.ioas)
    s.expect(chosen == r.auto, "the automatic one, not the one made by hand")
    s.refuses(EINVAL, r.fd, hwpt_request(s, r.dev, r.auto, 0, bytes(4)))
    s.do(r.fd, rid_replace(id=other, pt_id=manual))
    s.do(r.fd, rid_replace(id=other, pt_id=r.auto))
    s.do(r.fd, u.iommu_destroy(id=r.stdev))
    s.do(r.fd, where(id=other, hwpt_id=r.auto))
    s.do(r.fd, u.iommu_destroy(id=other))
    s.refuses(ENOENT, r.fd, u.iommu_destroy(id=r.auto))
    s.do(r.fd, u.iommu_destroy(id=manual))


@check("devices 4.2 row 6", "devices 4.2 row 7", "devices 4.2 row 8", "devices 4.2 row 9")
def a_hwpt_is_undone_when_its_queue_or_answer_fails(s: Subject) -> None:
    r = Rig(s)
    before = free_ranges(s, r.fd, r.ioas)
    for wrong in (99, r.ioas, r.dev):
        s.refuses(ENOENT, r.fd, u.iommu_hwpt_alloc(flags=FAULT, dev_id=r.dev, pt_id=r.ioas, fault_id=wrong))
    out = s.do(r.fd, u.iommu_fault_alloc())
    asked = {"dev_id": r.dev, "pt_id": r.ioas, "fault_id": out.out_fault_id}
    s.close(out.out_fault_fd)
    unwritable(s, r.fd, u.iommu_hwpt_alloc(flags=FAULT, **asked))
    s.do(r.fd, u.iommu_destroy(id=out.out_fault_id))
    s.expect(free_ranges(s, r.fd, r.ioas) == before, "nothing is left")
    hwpt = s.do(r.fd, u.iommu_hwpt_alloc(dev_id=r.dev, pt_id=r.ioas, fault_id=99)).out_hwpt_id
    r.rid(hwpt)


@check("devices 4.3 row 7", "devices 4.3 row 12", "devices 4.4 row 3", "devices 4.4 row 4")
def page_tables_hold_what_they_are_made_of(s: Subject) -> None:
    fd = s.open()
    ioas, spare = ioas_alloc(s, fd), ioas_alloc(s, fd)
    stdev, _, dev = device(s, fd, spare, t.MOCK_FLAGS_DEVICE_PASID)
    parent = hwpt_alloc(s, fd, dev, ioas, NEST)
    s.refuses(EBUSY, fd, u.iommu_destroy(id=ioas))
    s.expect(free_ranges(s, fd, ioas)[1] == 2048, "it is one of the IOAS's page tables")
    nested = hwpt_alloc(s, fd, dev, parent, PASID, (9).to_bytes(4, "little"))
    s.refuses(EBUSY, fd, u.iommu_destroy(id=parent))
    s.do(fd, rid_replace(id=stdev, pt_id=nested))
    s.do(fd, attach(id=stdev, pasid=2, pt_id=nested))
    s.do(fd, detach(id=stdev, pasid=2))
    s.do(fd, rid_replace(id=stdev, pt_id=spare))
    for number in (nested, parent, ioas):
        s.do(fd, u.iommu_destroy(id=number))


@check("mock 4.1 row 5", "mock 4.2", "mock 4.3", "devices 5 row 13", "devices 5 row 9")
def answers_that_cannot_be_written(s: Subject) -> None:
    """Attaching is undone, replacing is not."""
    r = Rig(s)
    unwritable(s, r.fd, t.test_mock_domain(id=r.ioas))
    s.expect(ioas_alloc(s, r.fd) == 5, "all three ids are free again")
    hwpt = r.hwpt(PASID)
    unwritable(s, r.fd, rid_replace(id=r.stdev, pt_id=hwpt))
    r.is_at(hwpt)
    unwritable(s, r.fd, attach(id=r.stdev, pasid=1, pt_id=hwpt))
    r.is_at(0, 1)
    other = r.hwpt(PASID)
    s.do(r.fd, attach(id=r.stdev, pasid=1, pt_id=hwpt))
    unwritable(s, r.fd, replace(id=r.stdev, pasid=1, pt_id=other))
    r.is_at(other, 1)
    unwritable(s, r.fd, u.iommu_hw_info(dev_id=r.dev))


@check("devices 5 row 12")
def the_short_answer_has_no_capabilities(s: Subject) -> None:
    r = Rig(s)
    full = s.do(r.fd, u.iommu_hw_info(dev_id=r.dev))
    s.expect((full.out_capabilities, full.out_max_pasid_log2) == (9, 20), "dirty tracking, no ATS, 2^20 PASIDs")
    answer = s.ioctl(r.fd, 0x3B8A, u.iommu_hw_info(size=32, dev_id=r.dev).pack()[:32] + b"\xaa" * 8)
    s.expect(answer.out[32:] == b"\xaa" * 8 and answer.out[28] == 20, "32 bytes, and no more")
