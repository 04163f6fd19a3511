"""events 8, mock 4.6: event queues of a vIOMMU."""

from __future__ import annotations

import struct
from errno import EBUSY, EEXIST, EINVAL, ENOENT, ENOTTY, EOPNOTSUPP

from iommufd.testing.conformance import check
from iommufd.testing.conformance.common import unwritable
from iommufd.testing.conformance.viommu import Guest
from iommufd.testing.subject import Subject
from iommufd.uapi import iommufd as u
from iommufd.uapi import iommufd_test as t

KIND = t.IOMMU_VEVENTQ_TYPE_SELFTEST
IN = 0x41
LOST = "lost"


class Events(Guest):
    """A guest whose device raises events under virtual id 0x123456789; a queue for them."""

    def __init__(self, s: Subject, depth: int = 2) -> None:
        super().__init__(s)
        self.vdevice(self.viommu, 0x1_2345_6789)
        self.replace(self.nested())
        out = s.do(self.fd, self.queue_request(depth))
        self.id, self.queue = out.out_veventq_id, out.out_veventq_fd

    def queue_request(self, depth: int = 2, **fields: int) -> u.iommu_veventq_alloc:
        given = {"viommu_id": self.viommu, "type": KIND, **fields}
        return u.iommu_veventq_alloc(veventq_depth=depth, **given)

    def trigger(self, count: int = 1) -> None:
        for _ in range(count):
            self.s.do(self.fd, t.test_trigger_vevent(dev_id=self.dev))

    def read(self, count: int = 400) -> list[int | tuple[str, int]]:
        data = self.s.read(self.queue, count).out
        found: list[int | tuple[str, int]] = []
        at = 0
        while at < len(data):
            flags, sequence = struct.unpack_from("<II", data, at)
            if flags:
                found.append((LOST, sequence))
            else:
                found.append(sequence)
                self.s.expect(data[at + 8 : at + 12] == struct.pack("<I", 0x2345_6789), "the low half of the id")
            at += 8 if flags else 12
        return found


@check("events 8.1 row 1", "events 8.1 row 2", "events 8.1 row 3", "events 8.1 row 4", "events 8.1 row 6")
def what_a_queue_needs(s: Subject) -> None:
    g = Events(s)
    for fields in ({"flags": 1}, {"reserved": 1}, {"type": 0}):
        s.refuses(EOPNOTSUPP, g.fd, g.queue_request(0, viommu_id=99, **fields))
    for depth in (0, 2**19 + 1):
        s.refuses(EINVAL, g.fd, g.queue_request(depth, viommu_id=99))
    for bad in (99, g.parent):
        s.refuses(ENOENT, g.fd, g.queue_request(viommu_id=bad))
    s.refuses(EEXIST, g.fd, g.queue_request())
    unwritable(s, g.fd, g.queue_request(type=5))
    s.do(g.fd, g.queue_request(2**19, type=5))
    short = g.queue_request(type=6)
    short.size = 28
    s.do(g.fd, short)


@check("events 8.2 row 1", "events 8.2 row 3", "events 8.2 row 4", "events 8.2 row 5", "events 8.2 row 6")
def sequence_numbers_and_lost_events(s: Subject) -> None:
    g = Events(s)
    g.trigger()
    s.expect(g.read() == [0], "the first event has number 0")
    g.trigger(5)
    s.expect(g.read() == [1, 2, (LOST, 5)], "every lost one takes a number")
    g.trigger(3)
    s.expect(g.read(12) == [6], "one")
    g.trigger()
    s.expect(g.read() == [7, 9], "the mark goes when an event is stored")
    s.expect(g.read() == [], "no more")


@check("events 8.3 row 1", "events 8.3 row 2", "events 8.3 row 4", "events 8.3 row 5", "events 8.3 row 7")
def reading_whole_events(s: Subject) -> None:
    g = Events(s, depth=3)
    for count in (0, 7):
        s.expect(s.read(g.queue, count).errno == EINVAL, "no room for a header")
    s.expect(s.read(g.queue, 8).result == 0, "nothing there")
    g.trigger(3)
    s.expect(s.read(g.queue, 8).errno == EINVAL, "no room for the event")
    s.expect(g.read(19) == [0], "no header fits behind it")
    s.expect(g.read(20) == [1], "a header fits, an event does not")
    g.trigger(3)
    s.expect(g.read(36) == [2, 3, 4], "room appeared with what was read")
    s.expect(g.read(8) == [(LOST, 5)], "a mark is a header only")


@check("events 8.4")
def other_calls_on_a_queue(s: Subject) -> None:
    g = Events(s, depth=1)
    s.expect(s.poll(g.queue) == 0, "never OUT")
    g.trigger(2)
    s.expect(s.poll(g.queue) == IN, "an event")
    g.read(12)
    s.expect(s.poll(g.queue) == IN, "the mark")
    g.read(8)
    s.expect(s.poll(g.queue) == 0, "nothing")
    s.expect(s.write(g.queue, bytes(8)).errno == EINVAL, "nothing can be written")
    s.expect(s.ioctl(g.queue, 0x3B80, bytes(8)).errno == ENOTTY, "no ioctl")
    s.refuses(EBUSY, g.fd, u.iommu_destroy(id=g.id))
    g.trigger()
    s.close(g.queue)
    g.trigger()
    s.refuses(EEXIST, g.fd, g.queue_request())
    g.busy(g.viommu)
    g.destroy(g.id)
    s.refuses(EOPNOTSUPP, g.fd, t.test_trigger_vevent(dev_id=g.dev))
    g.queue = s.do(g.fd, g.queue_request()).out_veventq_fd
    g.trigger()
    s.expect(g.read() == [0], "a new queue counts from 0")


@check("mock 4.6 row 1", "mock 4.6 row 2", "mock 4.6 row 3", "mock 4.6 row 4", "mock 4.6 row 5", "events 7 stale")
def who_raises_events(s: Subject) -> None:
    g = Guest(s)
    request = t.test_trigger_vevent(dev_id=g.dev)
    for bad in (99, g.ioas):
        s.refuses(ENOENT, g.fd, t.test_trigger_vevent(dev_id=bad))
    vdev = g.vdevice(g.viommu, 0)
    s.refuses(ENOENT, g.fd, request)
    nested, again = g.nested(), g.nested()
    g.replace(nested)
    s.refuses(ENOENT, g.fd, request)  # virtual id 0 raises nothing
    g.destroy(vdev)
    vdev = g.vdevice(g.viommu, 3)
    g.replace(again)
    s.refuses(ENOENT, g.fd, request)  # the vIOMMU is the same: the id was not looked at again
    g.replace(g.ioas)
    g.replace(nested)
    s.refuses(EOPNOTSUPP, g.fd, request)
    queue = s.do(g.fd, u.iommu_veventq_alloc(viommu_id=g.viommu, type=KIND, veventq_depth=1)).out_veventq_fd
    s.do(g.fd, request)
    g.destroy(vdev)
    s.expect(s.read(queue, 12).out == struct.pack("<III", 0, 0, 3), "the event")
    s.do(g.fd, request)
    s.do(g.fd, request)
    s.expect(s.read(queue, 20).out == struct.pack("<IIIII", 0, 1, 3, 1, 2), "stale, and one lost")
