"""Calls on IOASes: mapping, ranges, options, and memory behind the mappings."""

from __future__ import annotations

import struct

from iommufd.uapi import iommufd as u
from iommufd.uapi import iommufd_test as t
from tools.fuzz.author import BUFFER, DMABUFS, MEMFDS, ULMAX, Author
from tools.fuzz.program import MEMFD, MMAP, MPROTECT, MUNMAP, PAGE, PEEK, Step


def ioas_alloc(a: Author) -> None:
    a.ask(u.iommu_ioas_alloc(flags=a.wrong(0, 1, 2**31)))


def destroy(a: Author) -> None:
    context = a.context()
    number = a.id_of("IOAS", "HWPT_PAGING", "HWPT_NESTED", "SELFTEST", "VIOMMU", "VDEVICE", "VEVENTQ", "HW_QUEUE")
    if context is not None:
        # destroying a test device whose PASIDs are attached makes the kernel leak (mock-device 4.1)
        for obj in context.objects:
            if obj.id == number and obj.kind == "SELFTEST" and a.attached.get((a.slot, number)):
                return
    a.ask(u.iommu_destroy(id=number))


def map(a: Author) -> None:
    flags = a.flags(7, 8) if a.chance(0.3) else a.r.choice((6, 7, 7, 7, 4, 5, 3))
    a.ask(
        u.iommu_ioas_map(
            flags=flags,
            ioas_id=a.id_of("IOAS"),
            reserved=a.wrong(0, 1),
            user_va=a.va(),
            length=a.size(),
            iova=a.iova(),
        )
    )


def map_file(a: Author) -> None:
    slot = a.free_slot(MEMFDS)
    if not a.by_second and slot not in a.slots and a.chance(0.5):
        a.write(Step(MEMFD, slot, (a.r.choice((1, 2, 4, 8)),)))
    value = u.iommu_ioas_map_file(
        flags=a.r.choice((6, 7, 7, 7, 4, 5, 3, 0, 15)) if a.chance(0.3) else a.r.choice((7, 7, 7, 6)),
        ioas_id=a.id_of("IOAS"),
        start=a.r.choice((0, 0, PAGE, 2 * PAGE, 7 * PAGE, 2048, 2**63, ULMAX)) if a.chance(0.6) else 0,
        length=a.size(),
        iova=a.iova(),
    )
    buffers = any(slot in a.slots for slot in DMABUFS) and a.chance(0.6)
    slot = a.used_slot(DMABUFS if buffers else MEMFDS)
    # a context that maps its own descriptor holds itself: it and its charges outlive the program, and spoil the next
    a.ask(value, patches=((12, slot or DMABUFS[-1]),))


def copy(a: Author) -> None:
    src, first, length = a.mapped()
    a.ask(
        u.iommu_ioas_copy(
            flags=a.flags(7, 8) if a.chance(0.2) else a.r.choice((6, 6, 7, 7, 5)),
            dst_ioas_id=a.id_of("IOAS"),
            src_ioas_id=src,
            length=a.wrong(length, 0, ULMAX),
            dst_iova=a.iova(),
            src_iova=first,
        )
    )


def unmap(a: Author) -> None:
    ioas, first, length = a.mapped()
    if a.chance(0.06):
        first, length = 0, ULMAX
    a.ask(u.iommu_ioas_unmap(ioas_id=ioas, iova=first, length=a.wrong(length, 0, ULMAX, ULMAX - 1)))


def ranges(a: Author) -> None:
    at = a.array(bytes(64))
    a.ask(
        u.iommu_ioas_iova_ranges(
            ioas_id=a.id_of("IOAS"), num_iovas=a.r.choice((0, 1, 2, 4)), reserved=a.wrong(0, 1), allowed_iovas=at
        )
    )
    a.write(Step(PEEK, numbers=(BUFFER, 64)))


def allow(a: Author) -> None:
    entries = []
    at = a.r.choice((0x10000, t.MOCK_APERTURE_START))
    for _ in range(a.r.randrange(4)):
        at += a.r.randrange(4) * PAGE
        size = a.r.choice((1, 2, PAGE, 4 * PAGE, 16 * PAGE))
        entries.append((at, at + size - 1))
        at += size
    a.r.shuffle(entries)
    where = a.array(b"".join(struct.pack("<QQ", *entry) for entry in entries) or bytes(16))
    a.ask(
        u.iommu_ioas_allow_iovas(
            ioas_id=a.id_of("IOAS"), num_iovas=len(entries), reserved=a.wrong(0, 1), allowed_iovas=where
        )
    )


def option(a: Author) -> None:
    option = a.wrong(u.IOMMU_OPTION_HUGE_PAGES if a.chance(0.7) else u.IOMMU_OPTION_RLIMIT_MODE, 2, 99)
    op = a.wrong(a.r.randrange(2), 2, 9)
    if option == u.IOMMU_OPTION_RLIMIT_MODE and op == 0 and a.program.grant == "sys_resource":
        return  # who keeps that capability where the program runs has lost it on the kernel
    a.ask(
        u.iommu_option(
            option_id=option,
            op=op,
            reserved=a.wrong(0, 1),
            object_id=a.id_of("IOAS") if option == u.IOMMU_OPTION_HUGE_PAGES else a.wrong(0, 1),
            val64=a.r.choice((0, 1, 0, 1, 2)),
        )
    )


def vfio_ioas(a: Author) -> None:
    a.ask(u.iommu_vfio_ioas(ioas_id=a.id_of("IOAS"), op=a.wrong(a.r.choice((0, 1, 1, 2)), 3), reserved=a.wrong(0, 1)))


def noiommu_pa(a: Author) -> None:
    ioas, iova, length = a.mapped()
    a.ask(
        u.iommu_ioas_noiommu_get_pa(
            flags=a.wrong(0, 1),
            ioas_id=ioas,
            reserved=a.wrong(0, 1),
            iova=a.wrong(iova, ULMAX),
            length=a.wrong(length, 0),
        )
    )


def memory(a: Author) -> None:
    """What is behind the program's addresses changes."""
    first, count = a.page(), a.r.choice((1, 1, 2, 4))
    what = a.r.randrange(5)
    if what == 0:
        a.write(Step(MUNMAP, numbers=(first, count)))
        if a.chance(0.7):
            a.write(Step(MMAP, numbers=(first, count, 255)))
    elif what == 1:
        a.write(Step(MPROTECT, numbers=(first, 1, a.r.choice((0, 1, 3, 3)))))
    elif what == 2:
        a.write(Step(MMAP, numbers=(first, count, 255)))
    elif what == 3 and not a.dirty:
        used = [slot for slot in MEMFDS if slot in a.slots]
        if used:
            a.write(Step(MMAP, numbers=(first, count, a.r.choice(used))))


CALLS = {
    ioas_alloc: 3,
    destroy: 8,
    map: 20,
    map_file: 5,
    copy: 6,
    unmap: 10,
    ranges: 2,
    allow: 2,
    option: 3,
    vfio_ioas: 1,
    noiommu_pa: 2,
    memory: 5,
}
