"""VEVENTQ (events 8): sequence numbers, lost events, whole events only."""

from __future__ import annotations

import errno
from struct import pack, unpack_from

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iommufd.engine.failpoints import SLAB
from iommufd.engine.file import POLLIN, POLLRDNORM
from iommufd.engine.veventq import MAX_DEPTH, SEQUENCE_MASK, VeventFile, VeventQueue
from iommufd.uapi import iommufd as u
from tests.engine.flat_task import BASE, SIZE, FlatTask, as_task, expect
from tests.engine.small_iommu import EVENT_TYPE, Rig

IDLE, READY = 0, POLLIN | POLLRDNORM
LOST = "lost"
BAD = BASE + SIZE


@pytest.fixture
def rig() -> Rig:
    return Rig()


class Queue:
    """A vEVENTQ of a vIOMMU; events carry one u32 as the mock hardware's do."""

    def __init__(self, rig: Rig, depth: int = 2) -> None:
        self.rig = rig
        self.task = rig.task
        self.viommu = rig.viommu_object(rig.viommu())
        out = rig.do(alloc(self.viommu.id, depth=depth))
        self.fd = out.out_veventq_fd
        file = rig.task.file(self.fd)
        assert isinstance(file, VeventFile)
        self.file = file
        self.object = file.veventq
        self.polls: list[int] = []
        file.poll_changed = self.polls.append

    def report(self, count: int = 1, data: bytes = b"\1\0\0\0") -> None:
        for _ in range(count):
            self.viommu.report_event(EVENT_TYPE, data)

    def read(self, count: int, addr: int = BASE) -> int:
        return self.file.read(as_task(self.task), addr, count)

    def events(self, count: int = 4096) -> list[int | tuple[str, int]]:
        """What one read gives: sequence numbers, lost ones marked."""
        done, at = self.read(count), 0
        found: list[int | tuple[str, int]] = []
        while at < done:
            flags, sequence = unpack_from("<II", self.task.memory, at)
            if flags == u.IOMMU_VEVENTQ_FLAG_LOST_EVENTS:
                found.append((LOST, sequence))
                at += 8
            else:
                assert flags == 0
                assert self.task.memory[at + 8 : at + 12] == b"\1\0\0\0"
                found.append(sequence)
                at += 12
        assert at == done
        return found


def alloc(viommu: int, depth: int = 2, **fields: int) -> u.iommu_veventq_alloc:
    return u.iommu_veventq_alloc(viommu_id=viommu, veventq_depth=depth, **{"type": EVENT_TYPE, **fields})


# ------------------------------------------------------------------------------------------------------ 8.1: allocation


@pytest.mark.parametrize("fields", [{"flags": 1}, {"reserved": 1}, {"type": 0}])
def test_flags_reserved_and_the_default_type(rig: Rig, fields: dict[str, int]) -> None:  # events-8.1-1
    rig.fails(errno.EOPNOTSUPP, alloc(99, depth=0, **fields))


@pytest.mark.parametrize("depth", [0, MAX_DEPTH + 1])
def test_depth_before_lookup(rig: Rig, depth: int) -> None:  # events-8.1-2
    rig.fails(errno.EINVAL, alloc(99, depth))


def test_lookup(rig: Rig) -> None:  # events-8.1-3
    rig.fails(errno.ENOENT, alloc(99))
    rig.fails(errno.ENOENT, alloc(rig.dev))


def test_one_queue_per_type(rig: Rig) -> None:  # events-8.1-4
    viommu, other = rig.viommu(), rig.viommu()
    rig.do(alloc(viommu))
    rig.fails(errno.EEXIST, alloc(viommu))
    rig.do(alloc(other))
    rig.do(alloc(viommu, type=5))  # any type that is not 0


def test_no_descriptor_left_frees_the_type(rig: Rig) -> None:  # events-8.1-5
    viommu = rig.viommu()
    rig.task.files_limit = len(rig.task.files)
    rig.fails(errno.EMFILE, alloc(viommu))
    rig.task.files_limit += 1
    rig.do(alloc(viommu))


def test_undone_when_the_answer_cannot_be_written(rig: Rig) -> None:  # events-8.1-6
    viommu = rig.viommu()
    rig.fails_unwritten(alloc(viommu))
    rig.do(alloc(viommu))


@pytest.mark.parametrize("depth", [1, MAX_DEPTH])
def test_allocation(rig: Rig, depth: int) -> None:  # events 8.1
    queue = Queue(rig, depth)
    assert queue.file.link == "anon_inode:[iommufd-viommu-event]"
    assert queue.file.mode == 2
    assert queue.fd in rig.task.cloexec
    rig.fails(errno.EBUSY, u.iommu_destroy(id=queue.object.id))
    rig.task.close(queue.fd)
    rig.destroy(queue.object.id)


# ---------------------------------------------------------------------------------------------------------- 8.2: events


def test_without_a_queue_no_sequence_is_consumed(rig: Rig) -> None:  # events-8.2-1
    queue = Queue(rig)
    with expect(errno.EOPNOTSUPP):
        queue.viommu.report_event(EVENT_TYPE + 1, b"data")
    queue.report()
    assert queue.events() == [0]


def test_an_event_has_data() -> None:  # devices 10.6
    queue = Queue(Rig())
    with expect(errno.EINVAL):
        queue.report(data=b"")


def test_no_memory_for_an_event(rig: Rig) -> None:  # events-8.2-2
    queue = Queue(rig)
    queue.report()
    rig.world.fail = lambda point, task: point == SLAB
    with expect(errno.ENOMEM):
        queue.report()
    rig.world.fail = None
    assert queue.events() == [0, (LOST, 1)]


def test_no_memory_for_a_copy_of_the_lost_mark(rig: Rig) -> None:  # events-8.3-3
    queue = Queue(rig, depth=1)
    queue.report(2)
    rig.world.fail = lambda point, task: point == SLAB
    assert queue.events() == [0]
    with expect(errno.ENOMEM):
        queue.read(8)
    rig.world.fail = None
    assert queue.events() == [(LOST, 1)]


def test_a_full_queue_loses_and_says_so_at_the_end(rig: Rig) -> None:  # events-8.2-3 events-8.2-5 events-8.2-6
    queue = Queue(rig, depth=2)
    queue.report(6)
    assert queue.events() == [0, 1, (LOST, 5)]


def test_the_lost_mark_goes_when_an_event_is_stored(rig: Rig) -> None:  # events-8.2-5
    queue = Queue(rig, depth=2)
    queue.report(3)
    assert queue.events(12) == [0]
    queue.report()
    assert queue.events() == [1, 3]


def test_what_was_seen_on_a_kernel(rig: Rig) -> None:  # events-8.2-4, the observed sequence
    queue = Queue(rig, depth=2)
    queue.report()
    queue.events()
    queue.report(5)
    assert queue.events() == [1, 2, (LOST, 5)]
    queue.report(3)
    assert queue.events(12) == [6]
    queue.report()
    assert queue.events() == [7, 9]


def test_sequence_numbers_wrap_at_31_bits(rig: Rig) -> None:  # events-8.2-6
    queue = Queue(rig)
    queue.object.sequence = SEQUENCE_MASK
    queue.report(2)
    assert queue.events() == [SEQUENCE_MASK, 0]


# ------------------------------------------------------------------------------------------------------------ 8.3: read


@pytest.mark.parametrize("count", [0, 7])
def test_room_for_a_header(rig: Rig, count: int) -> None:  # events-8.3-1
    with expect(errno.EINVAL):
        Queue(rig).read(count)


def test_an_empty_queue_reads_nothing(rig: Rig) -> None:  # events-8.3-2
    assert Queue(rig).read(8) == 0


def test_rest_too_small_for_a_header(rig: Rig) -> None:  # events-8.3-4
    queue = Queue(rig)
    queue.report(2)
    assert queue.read(19) == 12
    assert queue.events() == [1]


def test_an_event_that_does_not_fit(rig: Rig) -> None:  # events-8.3-5
    queue = Queue(rig)
    queue.report(2)
    with expect(errno.EINVAL):
        queue.read(8)
    assert queue.read(20) == 12
    assert queue.events() == [1]


def test_a_lost_mark_fits_a_header(rig: Rig) -> None:  # events 8.3
    queue = Queue(rig, depth=1)
    queue.report(2)
    assert queue.read(12) == 12
    assert queue.events(8) == [(LOST, 1)]


def test_a_bad_buffer_loses_nothing(rig: Rig) -> None:  # events-8.3-6
    queue = Queue(rig, depth=1)
    queue.report(2)
    with expect(errno.EFAULT):
        queue.read(100, BAD)
    assert queue.read(100, BAD - 12) == 12
    with expect(errno.EFAULT):
        queue.read(100, BAD)
    assert queue.events() == [(LOST, 1)]


def test_room_appears_when_an_event_was_read(rig: Rig) -> None:  # events-8.3-7
    queue = Queue(rig, depth=1)
    queue.report()
    assert queue.object.num_events == 1
    queue.events()
    queue.report()
    assert queue.events() == [1]


def test_an_event_of_any_length(rig: Rig) -> None:
    queue = Queue(rig)
    queue.report(data=b"x" * 33)
    assert queue.read(41) == 41
    assert queue.task.read(BASE, 41) == pack("<II", 0, 0) + b"x" * 33


class Interrupting(FlatTask):
    """A task in whose writes something else happens."""

    def write(self, addr: int, data: bytes | bytearray | memoryview) -> None:
        then, self.then = self.then, lambda: None
        then()
        super().write(addr, data)

    then = staticmethod(lambda: None)


def test_events_that_arrive_during_a_read(rig: Rig) -> None:  # events 8.3
    queue = Queue(rig, depth=1)
    task = Interrupting()
    queue.task = task
    queue.report()
    task.then = queue.report  # the event being read still counts: this one is lost
    assert queue.events(12) == [0]
    assert queue.events(8) == [(LOST, 1)]
    queue.report(2)
    queue.events(12)
    task.then = queue.report  # while LOST 3 is being read, event 4 is stored
    assert queue.events(8) == [(LOST, 3)]
    assert queue.events() == [4]
    queue.report(2)
    queue.events(12)
    queue.object.depth = 0
    task.then = queue.report  # while LOST 6 is being read, another is lost
    assert queue.events(8) == [(LOST, 6)]
    assert queue.events(8) == [(LOST, 7)]


# ---------------------------------------------------------------------------------------------------------- 8.4: others


def test_poll(rig: Rig) -> None:  # events 8.4 (1)
    queue = Queue(rig, depth=1)
    assert queue.file.poll() == IDLE
    queue.report(2)
    queue.events(12)
    assert queue.file.poll() == READY  # LOST is something to read
    queue.events(8)
    assert queue.polls == [READY, READY, READY, IDLE]


def test_other_calls(rig: Rig) -> None:  # events 8.4 (2) events 8.4 (3)
    queue, task = Queue(rig), as_task(rig.task)
    with expect(errno.EINVAL):
        queue.file.write(task, BASE, 8)
    with expect(errno.ESPIPE):
        queue.file.write(task, BASE, 8, 0)
    with expect(errno.ESPIPE):
        queue.file.read(task, BASE, 8, 0)
    with expect(errno.ESPIPE):
        queue.file.lseek(task)
    with expect(errno.ENOTTY):
        queue.file.ioctl(task, u.IOMMU_DESTROY, BASE)
    with expect(errno.ENODEV):
        queue.file.mmap(task, 0, 4096, 3, True)


def test_a_closed_queue_goes_on_until_destroyed(rig: Rig) -> None:  # events 8.4 (4)
    queue = Queue(rig)
    rig.task.close(queue.fd)
    queue.report()
    rig.fails(errno.EEXIST, alloc(queue.viommu.id))
    rig.destroy(queue.object.id)
    with expect(errno.EOPNOTSUPP):
        queue.report()
    again = rig.do(alloc(queue.viommu.id)).out_veventq_id
    fresh = rig.object(again)
    assert isinstance(fresh, VeventQueue)
    assert fresh.sequence == 0


# --------------------------------------------------------------------------------------------------------- any sequence


@given(
    depth=st.integers(1, 4),
    steps=st.lists(st.one_of(st.just("report"), st.sampled_from([8, 12, 20, 24, 64])), max_size=40),
)
def test_against_the_rules_as_written(depth: int, steps: list[object]) -> None:
    """The rules of 8.2 and 8.3 word by word, on one list, against the queue."""
    queue = Queue(Rig(), depth)
    listed: list[int | tuple[str, int]] = []
    sequence = 0
    for step in steps:
        if step == "report":
            queue.report()
            full = sum(isinstance(entry, int) for entry in listed) == depth
            if listed and not isinstance(listed[-1], int):
                listed.pop()
            listed.append((LOST, sequence) if full else sequence)
            sequence += 1
            continue
        assert isinstance(step, int)
        fitting: list[int | tuple[str, int]] = []
        left = step
        while listed and left >= (12 if isinstance(listed[0], int) else 8):
            left -= 12 if isinstance(listed[0], int) else 8
            fitting.append(listed.pop(0))
        if listed and not fitting:
            with expect(errno.EINVAL):
                queue.read(step)
        else:
            assert queue.events(step) == fitting
        assert queue.file.poll() == (READY if listed else IDLE)
