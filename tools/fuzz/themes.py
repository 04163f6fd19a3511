"""What a program is about: how it begins, so that the calls of its theme can succeed, and which calls it favours."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from iommufd.uapi import iommufd as u
from iommufd.uapi import iommufd_test as t
from tools.fuzz.author import ACCESSES, DMABUFS, MEMFDS, QUEUES, Author
from tools.fuzz.calls import Call, events, hwpt, ioas, processes, selftest, vfio
from tools.fuzz.program import ARENA, FORK, LIMIT, MEMFD, NEW, OPEN, PAGE, Step

RW = u.IOMMU_IOAS_MAP_READABLE | u.IOMMU_IOAS_MAP_WRITEABLE
FIXED = RW | u.IOMMU_IOAS_MAP_FIXED_IOVA
APERTURE = t.MOCK_APERTURE_START


def nothing(a: Author) -> None:
    pass


def ordinary_user(a: Author) -> None:
    """From here on the first process has no capabilities, and little memory to lock."""
    a.memlock = a.r.choice((0, 1, 2, 4, 16))
    a.write(Step(LIMIT, numbers=(a.memlock,)))


def perhaps_ordinary_user(a: Author) -> None:
    if a.chance(0.4):
        ordinary_user(a)


def single_pages(a: Author) -> None:
    a.dirty = True


def viommu(a: Author) -> None:
    a.ask(u.iommu_ioas_map(flags=FIXED, ioas_id=1, user_va=ARENA, length=PAGE, iova=APERTURE))
    a.ask(u.iommu_hwpt_alloc(flags=1, dev_id=3, pt_id=1))
    a.ask(u.iommu_viommu_alloc(type=t.IOMMU_VIOMMU_TYPE_SELFTEST, dev_id=3, hwpt_id=5))
    a.ask(u.iommu_vdevice_alloc(viommu_id=6, dev_id=3, virt_id=0x99))
    a.ask(nested(a, parent=6, length=8))
    a.ask(u.iommu_veventq_alloc(viommu_id=6, type=t.IOMMU_VEVENTQ_TYPE_SELFTEST, veventq_depth=2), out=(QUEUES[0], 24))
    a.ask(t.test_mock_domain_replace(id=2, pt_id=8))


def nested(a: Author, parent: int, length: int) -> u.iommu_hwpt_alloc:
    data = a.array(struct.pack("<II", 2, 0))
    return u.iommu_hwpt_alloc(
        dev_id=3, pt_id=parent, data_type=t.IOMMU_HWPT_DATA_SELFTEST, data_len=length, data_uptr=data
    )


def nested_pair(a: Author) -> None:
    a.ask(u.iommu_hwpt_alloc(flags=1, dev_id=3, pt_id=1))
    a.ask(nested(a, parent=5, length=4))


def tracked(a: Author) -> None:
    a.ask(u.iommu_hwpt_alloc(flags=2, dev_id=3, pt_id=1))
    for i in range(3):
        at = i * PAGE
        a.ask(u.iommu_ioas_map(flags=FIXED, ioas_id=1, user_va=ARENA + at, length=PAGE, iova=APERTURE + at))
    a.ask(u.iommu_hwpt_set_dirty_tracking(flags=1, hwpt_id=5))


def faulting(a: Author) -> None:
    a.ask(u.iommu_fault_alloc(), out=(QUEUES[0], 12))
    for _ in range(2):
        a.ask(u.iommu_hwpt_alloc(flags=12, dev_id=3, pt_id=1, fault_id=5))
    a.ask(t.test_mock_domain_replace(id=2, pt_id=6))


def access(a: Author) -> None:
    a.ask(u.iommu_ioas_map(flags=FIXED, ioas_id=1, user_va=ARENA, length=4 * PAGE, iova=APERTURE))
    a.ask(t.test_create_access(id=1, flags=1), out=(ACCESSES[0], 16))


def container(a: Author) -> None:
    a.ask(u.iommu_vfio_ioas(op=1, ioas_id=1))


def buffers(a: Author) -> None:
    """A dma-buf in two IOASes, one of them without a domain; perhaps taken back already."""
    a.ask(t.test_dmabuf_get(length=4 * PAGE, open_flags=2), out=(DMABUFS[0], NEW))
    a.ask(u.iommu_ioas_alloc())
    for number, length in ((1, 2 * PAGE), (5, 4 * PAGE)):
        value = u.iommu_ioas_map_file(flags=FIXED, ioas_id=number, length=length, iova=APERTURE)
        a.ask(value, patches=((12, DMABUFS[0]),))
    a.ask(t.test_create_access(id=1, flags=a.r.randrange(2)), out=(ACCESSES[0], 16))
    if a.chance(0.3):
        a.ask(t.test_dmabuf_revoke(revoked=a.r.choice((1, 0))), patches=((16, DMABUFS[0]),))


def unpaid(a: Author) -> None:
    """IOAS 5 without a domain: nobody pays for its mappings until they are copied."""
    a.ask(u.iommu_ioas_alloc())
    for i in range(2):
        va = ARENA + 3 * i * PAGE
        a.ask(u.iommu_ioas_map(flags=FIXED, ioas_id=5, user_va=va, length=2 * PAGE, iova=APERTURE + 30 * i * PAGE))


def odd(a: Author) -> None:
    """IOAS 5 without a domain, with areas of any alignment and of memory that is not there; little room in IOAS 1."""
    a.ask(u.iommu_ioas_alloc())
    for i in range(4):
        va = a.r.choice((ARENA, ARENA, ARENA + i * PAGE, ARENA + 2048, ARENA + 1, 0, ARENA - PAGE))
        length = a.r.choice((PAGE, PAGE, PAGE, 100, 2 * PAGE))
        a.ask(u.iommu_ioas_map(flags=FIXED, ioas_id=5, user_va=va, length=length, iova=APERTURE + 4 * i * PAGE))
    if a.chance(0.7):
        allowed = a.array(struct.pack("<QQ", APERTURE + 64 * PAGE, APERTURE + 66 * PAGE - 1))
        a.ask(u.iommu_ioas_allow_iovas(ioas_id=1, num_iovas=1, allowed_iovas=allowed))
        for _ in range(a.r.randrange(3)):
            a.ask(u.iommu_ioas_map(flags=RW, ioas_id=1, user_va=ARENA + 9 * PAGE, length=PAGE))


def crowd(a: Author) -> None:
    """More than a hundred touching areas, each with a pin of its own, unmapped at once (core 4.12 d)."""
    a.ask(t.test_create_access(id=1, flags=1), out=(ACCESSES[0], 16))
    count = a.r.choice((99, 101, 103))
    for i in range(count):
        va, iova = ARENA + i * PAGE, APERTURE + i * PAGE
        a.exactly(u.iommu_ioas_map(flags=FIXED, ioas_id=1, user_va=va, length=PAGE, iova=iova))
        a.exactly(t.test_access_pages(iova=iova, length=PAGE), ((8, ACCESSES[0]),))
    a.exactly(u.iommu_ioas_unmap(ioas_id=1, iova=APERTURE, length=count * PAGE))
    a.length += 2 * count


def payers(a: Author) -> None:
    """Who pays for pinned files: an ordinary user, by uid; or by process; or root, with an ordinary user beside."""
    who = a.r.choice(("user", "user", "process", "root"))
    if who == "process":
        a.write(Step(OPEN, 0))
        a.exactly(u.iommu_option(option_id=u.IOMMU_OPTION_RLIMIT_MODE, op=u.IOMMU_OPTION_OP_SET, val64=1))
    if who != "root":
        a.memlock = a.r.choice((2, 4, 4, 16))
        a.write(Step(LIMIT, numbers=(a.memlock,)))


def heirs(a: Author) -> None:
    """A pinned file, and a second process that may take it over."""
    a.write(Step(MEMFD, MEMFDS[0], (8,)))
    for i in range(a.r.choice((1, 2))):
        length = a.r.choice((PAGE, 2 * PAGE, 3 * PAGE))
        value = u.iommu_ioas_map_file(
            flags=FIXED, ioas_id=1, start=i * PAGE, length=length, iova=APERTURE + 8 * i * PAGE
        )
        a.ask(value, patches=((12, MEMFDS[0]),))
    a.write(Step(FORK))
    if a.memlock is not None or a.chance(0.5):
        processes.limit_second(a)
    for _ in range(a.r.randrange(3)):
        a.by_second = a.chance(0.6)
        processes.change_process(a)
        a.by_second = False


@dataclass(frozen=True)
class Theme:
    """``first`` comes before anything is open, ``preamble`` when there are IOAS 1, test device 2, DEVICE 3 and the
    automatic HWPT 4; ``device_flags`` are the test device's; ``shunned`` calls are not made."""

    favourites: tuple[Call, ...] = ()
    preamble: Callable[[Author], None] = nothing
    first: Callable[[Author], None] = nothing
    device_flags: tuple[int, ...] = (0, 0, 4, 1)
    shunned: tuple[Call, ...] = ()


FILES_ONLY = (ioas.map, vfio.vfio)  # a mapping of memory would settle every CHANGE_PROCESS
THEMES: dict[str, Theme] = {
    "plain": Theme(),
    "viommu": Theme(
        (
            events.viommu,
            events.vdevice,
            events.veventq,
            hwpt.hwpt_nested,
            hwpt.invalidate,
            events.trigger,
            events.queue_io,
            selftest.replace,
        ),
        viommu,
    ),
    "hw_queue": Theme((events.hw_queue, ioas.unmap, events.viommu, ioas.destroy), viommu),
    "nested": Theme((hwpt.hwpt_nested, hwpt.invalidate, selftest.checks, selftest.replace), nested_pair),
    "dirty": Theme((hwpt.dirty_calls,), tracked, single_pages),
    "pasid": Theme((selftest.pasid, events.trigger, selftest.replace), faulting, device_flags=(4,)),
    "fault": Theme(
        (events.trigger, events.queue_io, events.fault_alloc, selftest.replace, selftest.pasid),
        faulting,
        device_flags=(4,),
    ),
    "access": Theme((selftest.access_pages, selftest.access_rw, selftest.access_other, ioas.unmap), access),
    "vfio": Theme((vfio.vfio,), container),
    "limited": Theme(
        (ioas.map, ioas.copy, selftest.access_pages, hwpt.hwpt_alloc, selftest.mock_domain, ioas.option),
        unpaid,
        ordinary_user,
    ),
    "odd": Theme(
        (ioas.copy, ioas.option, ioas.map_file, selftest.create_access, selftest.replace),
        odd,
        perhaps_ordinary_user,
    ),
    "crowd": Theme((ioas.unmap, selftest.access_pages), crowd),
    "buffers": Theme(
        (
            selftest.dmabuf,
            ioas.map_file,
            ioas.copy,
            ioas.unmap,
            ioas.noiommu_pa,
            selftest.access_pages,
            selftest.access_rw,
            processes.change_process,
        ),
        buffers,
    ),
    "heirs": Theme(
        (processes.change_process, processes.by_second, ioas.map_file, processes.exit_second, ioas.copy),
        heirs,
        payers,
        shunned=FILES_ONLY,
    ),
}
DRAWN = ("plain", *THEMES)  # a plain program is as likely as two others
