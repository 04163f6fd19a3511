"""FAULT: reading page requests and writing responses (events 2, 3.4, 4, 5)."""

from __future__ import annotations

import errno
import threading
from contextlib import suppress
from struct import pack

import pytest

from iommufd.engine.context import Context
from iommufd.engine.dispatch import build_table
from iommufd.engine.failpoints import SLAB
from iommufd.engine.fault import ROWS, FaultFile, FaultQueue
from iommufd.engine.file import POLLIN, POLLOUT, POLLRDNORM
from iommufd.engine.object import Object
from iommufd.engine.world import World
from iommufd.errors import KernelError
from iommufd.iommu.device import Device
from iommufd.iommu.domain import BaseDomain, Kind
from iommufd.iommu.driver import Capability
from iommufd.iommu.faults import LAST_PAGE, PASID_VALID, AttachHandle, FaultGroup, PageRequest, ResponseCode
from iommufd.uapi.iommufd import IOMMU_FAULT_QUEUE_ALLOC, iommu_fault_alloc, iommu_hwpt_pgfault
from tests.engine.flat_task import BASE, SIZE, FlatTask, as_task, expect

IDLE, READY = POLLOUT, POLLOUT | POLLIN | POLLRDNORM
BAD = BASE + SIZE + 0x1000


class RecordingDriver:
    name = "recording"
    blocked_domain = None
    identity_domain = None
    user_pasid_table = False

    def __init__(self) -> None:
        self.responses: list[tuple[int, int]] = []  # (grpid, code)

    def capable(self, device: Device, capability: Capability) -> bool:
        return True

    def page_response(self, device: Device, request: PageRequest, code: ResponseCode) -> None:
        self.responses.append((request.grpid, code))


class Rig:
    """A context with one fault queue and its descriptor; groups are put into it as the IOMMU layer does."""

    def __init__(self) -> None:
        self.world = World()
        self.world.table = build_table(ROWS, (7, 3))
        self.context = Context(self.world)
        self.task = FlatTask()
        self.driver = RecordingDriver()
        self.device = Device("dev", driver=self.driver)
        self.owner = self.context.objects.reserve(Object(self.context))
        self.handle = self.attach()
        self.fd = self.alloc()
        file = self.task.file(self.fd)
        assert isinstance(file, FaultFile)
        self.file = file
        self.fault = file.fault
        self.polls: list[int] = []
        file.poll_changed = self.polls.append

    def attach(self, pasid: int = 0) -> AttachHandle:
        return AttachHandle(BaseDomain(Kind.PAGING), self.owner, pasid)

    def alloc(self, *, flags: int = 0, arg: int = BASE) -> int:
        size = iommu_fault_alloc.SIZE
        self.task.write_upto(arg, iommu_fault_alloc(size=size, flags=flags).pack())
        result = self.context.ioctl(as_task(self.task), IOMMU_FAULT_QUEUE_ALLOC, arg)
        assert result == 0
        return iommu_fault_alloc.unpack(self.task.read(arg, size)).out_fault_fd

    def report(
        self, *addrs: int, grpid: int = 1, pasid: int = 0, perm: int = 1, handle: AttachHandle | None = None
    ) -> None:
        """One group of as many requests as there are addresses."""
        flags = PASID_VALID if pasid else 0
        requests = [PageRequest(flags=flags, pasid=pasid, grpid=grpid, perm=perm, addr=a) for a in addrs]
        requests[-1].flags |= LAST_PAGE
        self.fault.deliver(FaultGroup(self.device, requests, handle or self.handle))

    def read(self, count: int, addr: int = BASE) -> int:
        return self.file.read(as_task(self.task), addr, count)

    def messages(self, count: int) -> list[iommu_hwpt_pgfault]:
        size = iommu_hwpt_pgfault.SIZE
        done = self.read(count * size)
        assert done % size == 0
        return [iommu_hwpt_pgfault.unpack(self.task.read(BASE + at, size)) for at in range(0, done, size)]

    def respond(self, *responses: tuple[int, int], count: int | None = None, addr: int = BASE) -> int:
        data = b"".join(pack("<II", cookie, code) for cookie, code in responses)
        self.task.write_upto(addr, data)
        return self.file.write(as_task(self.task), addr, len(data) if count is None else count)


@pytest.fixture
def rig() -> Rig:
    return Rig()


# -------------------------------------------------------------------------------------------------------- 2: allocation


def test_flags_are_not_supported(rig: Rig) -> None:  # events-2-1
    with expect(errno.EOPNOTSUPP):
        rig.alloc(flags=1)


def test_no_memory_for_the_object(rig: Rig) -> None:  # events-2-2
    objects, references = len(rig.context.objects), rig.context.references
    rig.world.fail = lambda point, task: point == SLAB
    with expect(errno.ENOMEM):
        rig.alloc()
    assert (len(rig.context.objects), rig.context.references) == (objects, references)


def test_no_descriptor_left(rig: Rig) -> None:  # events-2-4
    rig.task.files_limit = len(rig.task.files)
    objects, references = len(rig.context.objects), rig.context.references
    with expect(errno.EMFILE):
        rig.alloc()
    assert len(rig.context.objects) == objects
    assert rig.context.references == references


def test_nothing_remains_when_the_answer_cannot_be_written(rig: Rig) -> None:  # events-2-5
    objects, references, files = len(rig.context.objects), rig.context.references, dict(rig.task.files)

    rig.task.write(BASE, iommu_fault_alloc(size=iommu_fault_alloc.SIZE).pack())
    rig.task.write_protected = True
    with expect(errno.EFAULT):
        rig.context.ioctl(as_task(rig.task), IOMMU_FAULT_QUEUE_ALLOC, BASE)
    assert len(rig.context.objects) == objects
    assert rig.context.references == references
    assert rig.task.files == files


def test_allocation(rig: Rig) -> None:  # events-2-2 events-2-3 events-2-6
    assert rig.file.link == "anon_inode:[iommufd-pgfault]"
    assert rig.file.mode == 2
    assert rig.fd in rig.task.cloexec
    assert rig.context.objects.get(rig.fault.id, FaultQueue) is rig.fault


def test_the_file_keeps_queue_and_context(rig: Rig) -> None:  # events 2, 5-8
    with expect(errno.EBUSY):
        rig.context.objects.destroy(rig.fault.id)
    rig.context.put()  # the program closes /dev/iommu
    rig.report(0x1000)
    assert len(rig.messages(1)) == 1
    rig.task.close(rig.fd)
    assert rig.context.references == 0
    assert len(rig.context.objects) == 0


# --------------------------------------------------------------------------------------------------------- 3.4 messages


def test_message_contents(rig: Rig) -> None:  # events 3.4
    rig.report(0x1001, 0x2002, grpid=77, pasid=9, perm=0xF)
    first, last = rig.messages(2)
    assert first == iommu_hwpt_pgfault(
        flags=PASID_VALID, dev_id=rig.owner.id, pasid=9, grpid=77, perm=0xF, addr=0x1001, cookie=1
    )
    assert (last.flags, last.addr, last.cookie) == (PASID_VALID | LAST_PAGE, 0x2002, 1)


# ------------------------------------------------------------------------------------------------------------- 4.1 read


@pytest.mark.parametrize("count", [1, 39, 41, 2**31, 2**63])
def test_read_wants_whole_messages(rig: Rig, count: int) -> None:  # events-4.1-1
    rig.report(0x1000)
    with expect(errno.ESPIPE):
        rig.read(count)


def test_read_of_nothing(rig: Rig) -> None:  # events-4.1-2 events-4.1-3
    assert rig.read(0) == 0
    assert rig.read(40) == 0
    rig.report(0x1000)
    with expect(errno.EINVAL):
        rig.read(0)


def test_a_group_is_never_split(rig: Rig) -> None:  # events-4.1-3
    rig.report(0x1000, 0x2000)
    with expect(errno.EINVAL):
        rig.read(40)
    rig.report(0x3000, grpid=2)
    assert rig.read(80) == 80
    rig.report(0x4000, 0x5000, grpid=3)
    assert rig.read(80) == 40  # the second group has two messages and does not fit any more
    assert rig.read(80) == 80


def test_cookies_are_the_lowest_free_number(rig: Rig) -> None:  # events-4.1-4
    for grpid in range(4):
        rig.report(0x1000, grpid=grpid)
    assert [m.cookie for m in rig.messages(3)] == [1, 2, 3]
    assert rig.respond((2, 0)) == 8
    assert [m.cookie for m in rig.messages(1)] == [2]
    assert rig.respond((1, 0), (2, 0), (3, 0)) == 24
    rig.report(0x1000)
    assert [m.cookie for m in rig.messages(1)] == [1]


def test_a_bad_buffer_loses_nothing(rig: Rig) -> None:  # events-4.1-5
    rig.report(0x1000, grpid=1)
    rig.report(0x2000, grpid=2)
    with expect(errno.EFAULT):
        rig.read(80, BAD)
    assert rig.read(80, BASE + SIZE - 40) == 40
    (message,) = rig.messages(1)
    assert (message.grpid, message.cookie) == (2, 2)


def test_read_takes_as_many_groups_as_fit(rig: Rig) -> None:  # events-4.1-6
    for grpid in range(5):
        rig.report(0x1000, grpid=grpid)
    assert [m.grpid for m in rig.messages(3)] == [0, 1, 2]
    assert [m.grpid for m in rig.messages(3)] == [3, 4]


# ------------------------------------------------------------------------------------------------------------ 4.2 write


@pytest.mark.parametrize("count", [1, 7, 9])
def test_write_wants_whole_responses(rig: Rig, count: int) -> None:  # events-4.2-1
    with expect(errno.ESPIPE):
        rig.respond((1, 0), count=count)


def test_write_of_nothing(rig: Rig) -> None:  # events 4.2
    assert rig.respond(count=0) == 0


def test_write_from_bad_memory(rig: Rig) -> None:  # events-4.2-2
    with expect(errno.EFAULT):
        rig.respond((1, 0), addr=BAD)


@pytest.mark.parametrize("code", [2, 3, 0xFFFFFFFF])
def test_write_wants_a_known_code(rig: Rig, code: int) -> None:  # events-4.2-3
    rig.report(0x1000)
    rig.messages(1)
    with expect(errno.EINVAL):
        rig.respond((1, code))
    assert rig.fault.awaiting == 1


@pytest.mark.parametrize("cookie", [0, 1, 99])
def test_write_wants_a_cookie_that_was_read(rig: Rig, cookie: int) -> None:  # events-4.2-4
    rig.report(0x1000)
    with expect(errno.EINVAL):
        rig.respond((cookie, 0))


@pytest.mark.parametrize("code", [ResponseCode.SUCCESS, ResponseCode.INVALID])
def test_a_response_reaches_the_hardware_once(rig: Rig, code: ResponseCode) -> None:  # events-4.2-5
    rig.report(0x1000, 0x2000, grpid=5)
    rig.messages(2)
    assert rig.respond((1, code)) == 8
    assert rig.driver.responses == [(5, code)]
    with expect(errno.EINVAL):
        rig.respond((1, code))


def test_an_error_after_a_response_reports_what_was_done(rig: Rig) -> None:  # events 4.2
    rig.report(0x1000, grpid=1)
    rig.report(0x1000, grpid=2)
    rig.messages(2)
    assert rig.respond((2, 1), (9, 0), (1, 0)) == 8
    assert rig.driver.responses == [(2, ResponseCode.INVALID)]
    assert rig.respond((1, 0), addr=BASE + SIZE - 8, count=16) == 8


# ----------------------------------------------------------------------------------------------------------- 4.3 others


def test_poll(rig: Rig) -> None:  # events 4.3 (1)
    assert rig.file.poll() == IDLE
    rig.report(0x1000)
    assert rig.file.poll() == READY
    rig.messages(1)
    assert rig.file.poll() == IDLE  # waiting for a response does not count
    assert rig.polls == [READY, IDLE]


def test_every_group_is_announced(rig: Rig) -> None:
    rig.report(0x1000)
    rig.report(0x1000)
    assert rig.polls == [READY, READY]  # an edge each, for EPOLLET
    rig.messages(1)
    assert rig.polls[2:] == [READY]


def test_positions_and_other_calls(rig: Rig) -> None:  # events 4.3 (2) events 4.3 (3) events 4.3 (4)
    task = as_task(rig.task)
    with expect(errno.ESPIPE):
        rig.file.read(task, BASE, 40, 0)
    with expect(errno.ESPIPE):
        rig.file.write(task, BASE, 8, 0)
    with expect(errno.ESPIPE):
        rig.file.lseek(task)
    with expect(errno.ENOTTY):
        rig.file.ioctl(task, IOMMU_FAULT_QUEUE_ALLOC, BASE)
    with expect(errno.ENODEV):
        rig.file.mmap(task, 0, 4096, 3, True)


def test_a_closed_queue_still_takes_groups(rig: Rig) -> None:  # events 4.3 (5)
    rig.report(0x1000)
    rig.task.close(rig.fd)
    rig.report(0x2000)
    assert rig.fault.ready()
    rig.context.objects.destroy(rig.fault.id)
    assert rig.driver.responses == [(1, ResponseCode.INVALID)] * 2  # events 5 (8): leftovers


# ---------------------------------------------------------------------------------- 5: pending groups, end of an attach


def test_the_end_of_an_attach_answers_read_and_unread_groups(rig: Rig) -> None:  # events 5 (1)
    rig.report(0x1000, grpid=1)
    (message,) = rig.messages(1)
    rig.report(0x2000, grpid=2)
    rig.polls.clear()
    rig.fault.discard(rig.handle)
    assert sorted(rig.driver.responses) == [(1, ResponseCode.INVALID), (2, ResponseCode.INVALID)]
    assert rig.file.poll() == IDLE
    assert rig.polls == [IDLE]
    with expect(errno.EINVAL):
        rig.respond((message.cookie, 0))


def test_other_attachments_are_untouched(rig: Rig) -> None:  # events 5 (2) events 5 (5)
    other = rig.attach(pasid=3)
    rig.report(0x1000, grpid=1)
    rig.report(0x2000, grpid=2, handle=other)
    rig.report(0x3000, grpid=3)
    rig.fault.discard(rig.handle)
    assert [m.grpid for m in rig.messages(3)] == [2]
    rig.fault.discard(rig.handle)  # nothing of it is left
    assert rig.fault.awaiting == 1
    assert rig.respond((1, 0)) == 8


def test_cookies_of_discarded_groups_are_free_again(rig: Rig) -> None:  # events 5 (1)
    other = rig.attach()
    rig.report(0x1000)
    rig.report(0x1000, handle=other)
    assert [m.cookie for m in rig.messages(2)] == [1, 2]
    rig.fault.discard(rig.handle)
    rig.report(0x1000, handle=other)
    assert [m.cookie for m in rig.messages(1)] == [1]


def test_nothing_arrives_for_an_ended_attach(rig: Rig) -> None:  # events 5 (1)
    rig.fault.discard(rig.handle)
    with expect(errno.EINVAL):
        rig.report(0x1000)
    assert not rig.fault.ready()


# ---------------------------------------------------------------------------------------------------------- concurrency


def test_every_group_is_answered_once_whatever_races(rig: Rig, fast_switches: None) -> None:
    """Reporters, readers that answer, and an attach that ends: each group gets exactly one response."""
    rounds, reporters = 150, 2
    handles = [rig.attach(pasid) for pasid in range(reporters)]
    refused = [0] * reporters
    done = threading.Event()

    def reporter(n: int) -> None:
        for i in range(rounds):
            try:
                rig.report(0x1000, grpid=n * rounds + i, handle=handles[n])
            except KernelError:
                refused[n] += 1
                rig.driver.responses.append((n * rounds + i, ResponseCode.FAILURE))

    def reader(task: FlatTask) -> None:
        while not done.is_set() or rig.fault.ready():
            count = rig.file.read(as_task(task), BASE, 400)
            for at in range(0, count, 40):
                cookie = iommu_hwpt_pgfault.unpack(task.read(BASE + at, 40)).cookie
                task.write(BASE + 0x1000, pack("<II", cookie, 0))
                with suppress(KernelError):  # discarded meanwhile
                    rig.file.write(as_task(task), BASE + 0x1000, 8)

    threads = [threading.Thread(target=reporter, args=(n,)) for n in range(reporters)]
    readers = [threading.Thread(target=reader, args=(FlatTask(),)) for _ in range(2)]
    for thread in threads + readers:
        thread.start()
    rig.fault.discard(handles[1])
    for thread in threads:
        thread.join()
    done.set()
    for thread in readers:
        thread.join()
    assert sorted(grpid for grpid, _ in rig.driver.responses) == list(range(rounds * reporters))
    assert rig.fault.awaiting == 0
    assert refused[0] == 0
