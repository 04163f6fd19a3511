"""HW_QUEUE (events 9): guest pages pinned, locked and consecutive for as long as the queue lives."""

from __future__ import annotations

import errno
from contextlib import suppress
from typing import cast

import pytest

from iommufd.engine.access import Access
from iommufd.engine.fail import sweep
from iommufd.engine.failpoints import SLAB
from iommufd.engine.hw_queue import HwQueue, page_span
from iommufd.engine.ioas import IOAS
from iommufd.engine.ledger import Ledger, difference, take
from iommufd.errors import KernelError
from iommufd.memory.frames import PAGE_SIZE
from iommufd.memory.space import READ, WRITE
from iommufd.uapi import iommufd as u
from tests.engine.fakes import ARG, BUFFER, Caller, TestDmaBuf, pinned_frames
from tests.engine.flat_task import expect
from tests.engine.small_iommu import QUEUE_TYPE, FullOps, Log, PlainOps, Rig

P = PAGE_SIZE
HUGE = 512 * P
HUGE_VA = 0x4000_0000
IOVA = 0x1000_0000


class Guest:
    """A vIOMMU whose parent's IOAS maps 16 ordinary pages at IOVA and one huge page at ``huge``."""

    def __init__(self) -> None:
        self.rig = Rig()
        self.world = self.rig.world
        self.context = self.rig.context
        self.caller = Caller(self.world, context=self.context)
        self.caller.host.map(HUGE_VA, 512, kind="hugetlbfs", page_size=HUGE)
        self.ioas = self.rig.ioas
        self.caller.map(self.ioas, IOVA, 16 * P)
        self.huge = IOVA + HUGE
        self.caller.map(self.ioas, self.huge, HUGE, HUGE_VA)
        self.viommu = self.rig.viommu_object(self.rig.viommu())
        self.log = self.rig.log
        self.log.calls.clear()

    def cmd(self, iova: int = IOVA, length: int = P, **fields: int) -> u.iommu_hw_queue_alloc:
        given = {"viommu_id": self.viommu.id, "type": QUEUE_TYPE, **fields}
        return u.iommu_hw_queue_alloc(nesting_parent_iova=iova, length=length, **given)

    def alloc(self, iova: int = IOVA, length: int = P, **fields: int) -> HwQueue:
        number = self.caller.do(self.cmd(iova, length, **fields)).out_hw_queue_id
        return self.rig.find(number, HwQueue)

    def ledger(self) -> Ledger:
        return take(self.world, [self.context], [self.caller.proc.process])

    def refuses(self, number: int, iova: int = IOVA, length: int = P, **fields: int) -> str:
        """The ioctl fails and leaves everything as it was."""
        before = self.ledger()
        why = self.caller.refuses(number, self.cmd(iova, length, **fields))
        assert difference(before, self.ledger()) == []
        return why

    def destroy(self, number: int) -> None:
        self.caller.do(u.iommu_destroy(id=number))


@pytest.fixture
def guest() -> Guest:
    return Guest()


# --------------------------------------------------------------------------------------------------------------- checks


@pytest.mark.parametrize("fields", [{"flags": 1}, {"type": 0}])
def test_flags_and_the_default_type(guest: Guest, fields: dict[str, int]) -> None:  # events-9-1
    guest.refuses(errno.EOPNOTSUPP, length=0, **fields)


def test_an_empty_queue(guest: Guest) -> None:  # events-9-2
    guest.refuses(errno.EINVAL, iova=2**64 - 1, length=0)


def test_a_queue_beyond_64_bits(guest: Guest) -> None:  # events-9-3
    guest.refuses(errno.EOVERFLOW, iova=2, length=2**64 - 1, viommu_id=99)


def test_lookup(guest: Guest) -> None:  # events-9-4
    guest.refuses(errno.ENOENT, viommu_id=99, type=99)
    guest.refuses(errno.ENOENT, viommu_id=guest.rig.parent)


def test_types_the_driver_does_not_know(guest: Guest) -> None:  # events-9-5
    guest.refuses(errno.EOPNOTSUPP, iova=0x99, length=2**63, type=QUEUE_TYPE + 1)
    guest.viommu.ops = PlainOps()
    guest.refuses(errno.EOPNOTSUPP)


def test_no_memory_for_the_object(guest: Guest) -> None:  # events-9-6
    guest.world.fail = lambda point, task: point == SLAB
    guest.refuses(errno.ENOMEM, iova=0, length=2**64 - 1)
    guest.refuses(errno.EOPNOTSUPP, type=99)


def test_more_pages_than_can_be_counted(guest: Guest) -> None:  # events-9-7
    guest.refuses(errno.ERANGE, iova=0, length=2**64 - 1)
    guest.refuses(errno.ERANGE, iova=1, length=2**64 - 1)
    with expect(errno.ERANGE):
        page_span(0xFFF, 2**64 - 0xFFE - P)
    assert page_span(0xFFF, 1) == (0, P)
    assert page_span(0x1001, P) == (0x1000, 2 * P)


def test_more_pages_than_can_be_listed(guest: Guest) -> None:  # events-9-8
    most = (2**31 - 1) // 8 * P
    guest.refuses(errno.ENOENT, length=most)  # goes on to row 15
    guest.refuses(errno.ENOMEM, length=most + 1)


def test_it_takes_two_object_numbers(guest: Guest) -> None:  # events-9-9
    queue = guest.alloc()
    access = guest.rig.object(queue.id + 1)
    assert isinstance(access, Access)
    assert access.internal
    guest.caller.refuses(errno.EBUSY, u.iommu_destroy(id=access.id))
    guest.destroy(queue.id)
    assert guest.caller.ioas() == queue.id


def test_existing_areas_must_be_page_aligned(guest: Guest) -> None:  # events-9-10
    other = guest.rig.do(u.iommu_ioas_alloc()).out_ioas_id
    guest.caller.map(other, IOVA, 0x800, BUFFER + 0x800)
    table = guest.viommu.hwpt.ioas
    guest.viommu.hwpt.ioas = guest.rig.find(other, IOAS)
    before = guest.ledger()
    guest.caller.refuses(errno.EADDRINUSE, guest.cmd())
    assert difference(before, guest.ledger()) == []
    guest.viommu.hwpt.ioas = table


def test_the_alignment_of_the_ioas_is_raised_meanwhile(guest: Guest) -> None:  # events-9-10
    table = guest.caller.table(guest.ioas)
    assert table.iova_alignment == P  # the small IOMMU has no smaller pages
    queue = guest.alloc()
    assert queue.access is not None
    assert queue.access.iova_alignment == P
    assert len(table.accesses) == 1
    guest.destroy(queue.id)
    assert len(table.accesses) == 0


def test_the_last_address(guest: Guest) -> None:  # events-9-11
    guest.refuses(errno.ENOENT, iova=0xFFFFFFFFFFFFF001, length=100)


def test_an_area_that_refuses_access(guest: Guest) -> None:  # events-9-12
    guest.caller.area(guest.ioas, IOVA).prevent_access = True
    guest.refuses(errno.EINVAL)


def test_an_area_inside_a_page_of_memory(guest: Guest) -> None:  # events-9-12
    guest.caller.map(guest.ioas, 0x5000_0000, P, BUFFER)
    guest.caller.area(guest.ioas, 0x5000_0000).start = 0x10
    guest.refuses(errno.EINVAL, iova=0x5000_0000)


def test_an_area_without_read_permission(guest: Guest) -> None:  # events-9-13
    guest.caller.map(guest.ioas, 0x5000_0000, P, flags=u.IOMMU_IOAS_MAP_WRITEABLE)
    guest.refuses(errno.EPERM, iova=0x5000_0000)


def test_a_read_only_area_will_do(guest: Guest) -> None:  # events-9-13
    guest.caller.host.map(HUGE_VA + HUGE, 1, READ)
    guest.caller.map(guest.ioas, 0x5000_0000, P, HUGE_VA + HUGE, flags=u.IOMMU_IOAS_MAP_READABLE)
    guest.alloc(0x5000_0000)


def test_a_dma_buf(guest: Guest) -> None:  # events-9-14
    dmabuf = TestDmaBuf(guest.world, 4)
    guest.caller.proc.files[50] = lambda: dmabuf
    guest.caller.do(u.iommu_ioas_map_file(flags=7, ioas_id=guest.ioas, fd=50, start=0, length=4 * P, iova=0x5000_0000))
    guest.refuses(errno.EINVAL, iova=0x5000_0000)


def test_a_hole(guest: Guest) -> None:  # events-9-15
    guest.refuses(errno.ENOENT, iova=0)
    guest.refuses(errno.ENOENT, iova=IOVA + 15 * P, length=2 * P)
    guest.refuses(errno.ENOENT, iova=IOVA + 16 * P - 1, length=2)
    assert guest.log.calls == []  # pinning precedes the driver, whatever the index


def test_pages_that_are_not_consecutive(guest: Guest) -> None:  # events-9-16
    guest.refuses(errno.EFAULT, length=16 * P)
    guest.refuses(errno.EFAULT, iova=IOVA + P - 1, length=2)
    assert guest.log.calls == []


@pytest.mark.parametrize(
    ("iova", "length", "offset"),
    [(0, HUGE, 0), (0x10, HUGE - 0x10, 0x10), (HUGE - P, P, HUGE - P), (3 * P + 5, 2 * P, 3 * P + 5)],
)
def test_a_huge_page(guest: Guest, iova: int, length: int, offset: int) -> None:  # events-9-16 events-9-17
    queue = guest.alloc(guest.huge + iova, length, index=1)
    base = guest.viommu.parent_domain.iova_to_phys(guest.huge)
    assert guest.log.calls == [("hw_queue_init", 1, base + offset)]
    assert (queue.base_iova, queue.length) == (guest.huge + iova, length)


def test_the_driver_may_refuse(guest: Guest) -> None:  # events-9-17
    guest.log.failures["hw_queue_init"] = errno.ENOSPC
    guest.refuses(errno.ENOSPC)
    assert guest.log.names() == ["hw_queue_init"]  # no destroy for what was never made


def test_undone_when_the_answer_cannot_be_written(guest: Guest) -> None:  # events-9-18
    given = guest.cmd()
    given.size = given.SIZE
    before = guest.ledger()
    guest.caller.host.poke(ARG, given.pack())
    guest.caller.host.protect(ARG, 1, READ)
    with expect(errno.EFAULT):
        guest.context.ioctl(guest.caller.proc.task(), u.IOMMU_HW_QUEUE_ALLOC, ARG)
    guest.caller.host.protect(ARG, 1, READ | WRITE)
    assert guest.log.names() == ["hw_queue_init", "hw_queue_destroy"]
    assert difference(before, guest.ledger()) == []


@pytest.mark.parametrize("release", ["everything", "nothing"])
def test_nothing_leaks_whatever_fails(guest: Guest, release: str) -> None:  # core 10, mock 10
    """Each injected failure undoes the whole call; without a domain holding them the pages are pinned here."""
    if release == "nothing":
        guest.caller.table(guest.ioas).remove_domain(guest.viommu.hwpt.domain)
    before = guest.ledger()
    failed = 0
    for shot in sweep(guest.world, tid=guest.caller.proc.task().tid):
        with suppress(KernelError):  # the injected one
            guest.destroy(guest.alloc().id)
        failed += shot.fired
        assert difference(before, guest.ledger()) == []
    assert failed >= 1
    if release == "nothing":
        guest.caller.table(guest.ioas).add_domain(guest.viommu.hwpt.domain, None)


# ---------------------------------------------------------------------------------------------------- while it exists


def test_its_areas_cannot_be_unmapped(guest: Guest) -> None:  # events 9
    queue = guest.alloc()
    guest.caller.refuses(errno.EBUSY, u.iommu_ioas_unmap(ioas_id=guest.ioas, iova=IOVA, length=16 * P))
    guest.caller.refuses(errno.EBUSY, u.iommu_ioas_unmap(ioas_id=guest.ioas, iova=0, length=2**64 - 1))
    assert guest.caller.areas(guest.ioas)[0][0] == IOVA
    guest.destroy(queue.id)
    guest.caller.unmap(guest.ioas, 0, 2**64 - 1)
    assert pinned_frames(guest.world) == 0


def test_the_lock_is_tested_before_pins(guest: Guest) -> None:  # events 9
    called: list[int] = []
    access = guest.caller.access(guest.ioas, unmap=lambda iova, length: called.append(iova))
    access.pin_pages(IOVA, P, False)
    guest.alloc()
    guest.caller.refuses(errno.EBUSY, u.iommu_ioas_unmap(ioas_id=guest.ioas, iova=IOVA, length=16 * P))
    assert called == []
    access.pin_pages(IOVA + P, P, False)  # the area stays accessible


def test_its_pages_stay_pinned(guest: Guest) -> None:  # events 9
    queue = guest.alloc()
    assert queue.access is not None
    chunk_pins = pinned_frames(guest.world)
    guest.caller.table(guest.ioas).remove_domain(guest.viommu.hwpt.domain)
    assert pinned_frames(guest.world) == 1
    guest.caller.table(guest.ioas).add_domain(guest.viommu.hwpt.domain, None)
    assert pinned_frames(guest.world) == chunk_pins


def test_it_keeps_its_viommu(guest: Guest) -> None:  # events 10
    queue = guest.alloc()
    guest.caller.refuses(errno.EBUSY, u.iommu_destroy(id=guest.viommu.id))
    guest.destroy(queue.id)
    guest.destroy(guest.viommu.id)


def test_destroy_tells_the_driver_first(guest: Guest) -> None:  # events 9, destroy order
    before = guest.ledger()
    queue = guest.alloc()
    pinned_at_hook: list[bool] = []
    ops = guest.viommu.ops
    assert isinstance(ops, FullOps)

    def hook(name: str, *_: object) -> None:
        if name == "hw_queue_destroy":
            assert queue.access is not None
            pinned_at_hook.append(queue.access.ioas is not None)

    ops.log = cast("Log", hook)  # it is only called
    guest.destroy(queue.id)
    assert pinned_at_hook == [True]
    assert difference(before, guest.ledger()) == []


# --------------------------------------------------------------------------------------------------------- dependencies


def test_a_queue_another_depends_on_stays(guest: Guest) -> None:  # events 9, dependency helper
    first, second = guest.alloc(), guest.alloc(IOVA + P)
    second.depend(first)
    guest.caller.refuses(errno.EBUSY, u.iommu_destroy(id=first.id))
    second.undepend(first)
    guest.destroy(first.id)


def test_dependencies_that_make_no_sense(guest: Guest) -> None:  # events 9, devices 10.6
    first = guest.alloc()
    other = guest.rig.viommu_object(guest.rig.viommu())
    foreign = guest.alloc(IOVA + P, viommu_id=other.id)
    for on in (first, foreign, guest.viommu):
        with expect(errno.EINVAL):
            first.depend(on)  # type: ignore[arg-type]  # a vIOMMU is no queue: wrong on purpose
