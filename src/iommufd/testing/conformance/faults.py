"""events 2-5: fault queues on mock devices."""

from __future__ import annotations

import struct
from errno import EBUSY, EINVAL, ENOENT, ENOTTY, EOPNOTSUPP, ESPIPE

from iommufd.testing.conformance import check
from iommufd.testing.conformance.common import mock_domain, open_ioas
from iommufd.testing.conformance.devices import FAULT, PASID, device, hwpt_alloc
from iommufd.testing.subject import Subject
from iommufd.uapi import iommufd as u
from iommufd.uapi import iommufd_test as t

IN, OUT = 0x41, 0x4


class Queue:
    """A context, a PASID-capable device on a HWPT with a fault queue."""

    def __init__(self, s: Subject, flags: int = t.MOCK_FLAGS_DEVICE_PASID) -> None:
        self.s = s
        self.fd, self.ioas = open_ioas(s)
        self.stdev, self.auto, self.dev = device(s, self.fd, self.ioas, flags)
        out = s.do(self.fd, u.iommu_fault_alloc())
        self.id, self.queue = out.out_fault_id, out.out_fault_fd
        self.hwpt = self.new_hwpt(FAULT | PASID)
        s.do(self.fd, t.test_mock_domain_replace(id=self.stdev, pt_id=self.hwpt))

    def new_hwpt(self, flags: int) -> int:
        return self.s.do(
            self.fd, u.iommu_hwpt_alloc(flags=flags, dev_id=self.dev, pt_id=self.ioas, fault_id=self.id)
        ).out_hwpt_id

    def trigger(self, grpid: int, addr: int = 0x1001, pasid: int = 0, perm: int = 3) -> None:
        self.s.do(self.fd, t.test_trigger_iopf(dev_id=self.dev, pasid=pasid, grpid=grpid, perm=perm, addr=addr))

    def answer(self, cookie: int, code: int = 0) -> bytes:
        return struct.pack("<II", cookie, code)


def fault(data: bytes) -> tuple[int, ...]:
    """flags, dev_id, pasid, grpid, perm, reserved, addr, length, cookie."""
    return struct.unpack("<IIIIIIQII", data)


@check("events 2 row 1", "events 2 row 6", "events 4.3")
def a_fresh_queue(s: Subject) -> None:
    fd = s.open()
    s.refuses(EOPNOTSUPP, fd, u.iommu_fault_alloc(flags=1))
    out = s.do(fd, u.iommu_fault_alloc())
    queue = out.out_fault_fd
    s.expect(s.poll(queue) == OUT, "OUT always, IN when something waits")
    s.expect(s.read(queue, 40).result == 0, "an empty queue reads nothing")
    s.expect(s.read(queue, 39).errno == ESPIPE, "whole messages only")
    s.expect(s.write(queue, b"").result == 0, "nothing to write is fine")
    s.expect(s.write(queue, b"1234567").errno == ESPIPE, "whole answers only")
    s.expect(s.write(queue, bytes(8)).errno == EINVAL, "cookie 0 is nobody's")
    s.expect(s.ioctl(queue, 0x3B81, bytes(12)).errno == ENOTTY, "no ioctl")
    s.refuses(EBUSY, fd, u.iommu_destroy(id=out.out_fault_id))
    s.close(queue)
    s.do(fd, u.iommu_destroy(id=out.out_fault_id))


@check("events 3.1 row 2", "events 3.1 row 4", "events 3.1 row 5")
def connecting_a_queue(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    _, _, dev = mock_domain(s, fd, ioas)
    s.refuses(EOPNOTSUPP, fd, u.iommu_hwpt_alloc(flags=5, dev_id=dev, pt_id=ioas, fault_id=99))
    s.refuses(ENOENT, fd, u.iommu_hwpt_alloc(flags=4, dev_id=dev, pt_id=ioas, fault_id=99))
    s.refuses(ENOENT, fd, u.iommu_hwpt_alloc(flags=4, dev_id=dev, pt_id=ioas, fault_id=ioas))
    out = s.do(fd, u.iommu_fault_alloc())
    hwpt = s.do(fd, u.iommu_hwpt_alloc(flags=4, dev_id=dev, pt_id=ioas, fault_id=out.out_fault_id)).out_hwpt_id
    s.close(out.out_fault_fd)
    s.refuses(EBUSY, fd, u.iommu_destroy(id=out.out_fault_id))
    s.do(fd, u.iommu_destroy(id=hwpt))
    s.do(fd, u.iommu_destroy(id=out.out_fault_id))


@check("events 3.3 row 3", "events 3.3 row 8", "events 3.4", "events 4.1 row 4", "events 4.2 row 5")
def a_fault_is_read_and_answered(s: Subject) -> None:
    q = Queue(s)
    q.trigger(7)
    s.expect(s.poll(q.queue) == IN | OUT, "something waits")
    got = fault(s.read(q.queue, 40).out)
    s.expect(got == (2, q.dev, 0, 7, 3, 0, 0x1001, 0, 1), f"the message {got}")
    s.expect(s.poll(q.queue) == OUT, "groups awaiting an answer do not count")
    s.expect(s.write(q.queue, q.answer(1, 2)).errno == EINVAL, "code 2 is none")
    s.expect(s.write(q.queue, q.answer(2)).errno == EINVAL, "nobody has cookie 2")
    s.expect(s.write(q.queue, q.answer(1, 1)).result == 8, "answered")
    s.expect(s.write(q.queue, q.answer(1)).errno == EINVAL, "once")


@check("events 4.1 row 1", "events 4.1 row 3", "events 4.1 row 6", "events 4.2 row 4")
def many_faults(s: Subject) -> None:
    q = Queue(s)
    for group in range(5):
        q.trigger(group, addr=group << 12)
    s.expect(s.read(q.queue, 0).errno == EINVAL, "no room for the first group")
    s.expect(s.read(q.queue, 80).result == 80, "two groups")
    s.expect(s.write(q.queue, q.answer(2)).result == 8, "the second first")
    rest = s.read(q.queue, 400).out
    s.expect([fault(rest[i : i + 40])[8] for i in range(0, 120, 40)] == [2, 3, 4], "cookie 2 is handed out again")
    s.expect(s.write(q.queue, q.answer(1) + q.answer(9) + q.answer(3)).result == 8, "up to the bad one")
    s.expect(s.write(q.queue, q.answer(3) + q.answer(4)).result == 16, "both")


@check("events 3.3 row 1", "events 3.3 row 2", "events 3.3 row 4", "events 3.4")
def faults_with_a_pasid(s: Subject) -> None:
    q = Queue(s)
    q.trigger(1, pasid=5)
    s.expect(s.read(q.queue, 40).result == 0, "no attachment of that PASID: dropped")
    s.do(q.fd, t.test_pasid_attach(id=q.stdev, pasid=5, pt_id=q.hwpt))
    q.trigger(2, pasid=5)
    got = fault(s.read(q.queue, 40).out)
    s.expect(got[:4] == (3, q.dev, 5, 2), "flags 3, the PASID")
    plain = hwpt_alloc(s, q.fd, q.dev, q.ioas, PASID)
    s.do(q.fd, t.test_pasid_attach(id=q.stdev, pasid=6, pt_id=plain))
    q.trigger(3, pasid=6)
    s.expect(s.read(q.queue, 40).result == 0, "its domain has no queue: dropped")


@check("events 5 detach", "events 5 replace", "events 5 failed replace", "events 5 same")
def pending_faults_and_attachments(s: Subject) -> None:
    q = Queue(s)
    second = q.new_hwpt(FAULT | PASID)
    q.trigger(1)
    q.trigger(2)
    cookie = fault(s.read(q.queue, 40).out)[8]
    s.do(q.fd, t.test_mock_domain_replace(id=q.stdev, pt_id=q.hwpt))
    s.expect(s.poll(q.queue) == IN | OUT, "replace by the same: nothing is lost")
    s.refuses(ENOENT, q.fd, t.test_mock_domain_replace(id=q.stdev, pt_id=99))
    s.expect(s.poll(q.queue) == IN | OUT, "a failed replace: nothing is lost")
    s.do(q.fd, t.test_mock_domain_replace(id=q.stdev, pt_id=second))
    s.expect(s.poll(q.queue) == OUT, "the old attachment's faults are gone")
    s.expect(s.write(q.queue, q.answer(cookie)).errno == EINVAL, "and its cookies unknown")
    q.trigger(3)
    s.do(q.fd, t.test_pasid_attach(id=q.stdev, pasid=9, pt_id=second))
    q.trigger(4, pasid=9)
    s.do(q.fd, t.test_pasid_detach(id=q.stdev, pasid=9))
    s.expect(fault(s.read(q.queue, 400).out)[3] == 3, "only the PASID's went")
    q.trigger(5)
    s.do(q.fd, u.iommu_destroy(id=q.stdev))
    s.expect(s.read(q.queue, 400).result == 0, "the device took its own along")


@check("events 2 context", "events 4.3 last close")
def the_queue_keeps_the_context(s: Subject) -> None:
    q = Queue(s)
    q.trigger(1)
    s.close(q.fd)
    s.expect(s.read(q.queue, 40).result == 40, "still readable")
    s.expect(s.write(q.queue, q.answer(1)).result == 8, "and writable")
