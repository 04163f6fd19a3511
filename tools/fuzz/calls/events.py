"""Calls on fault queues, vIOMMUs and what belongs to them, and what makes events."""

from __future__ import annotations

import struct

from iommufd.uapi import iommufd as u
from iommufd.uapi import iommufd_test as t
from tools.fuzz.author import BUFFER, QUEUES, ULMAX, Author
from tools.fuzz.program import PAGE, PEEK, POLL, READ, WRITE, Step


def fault_alloc(a: Author) -> None:
    slot = a.free_slot(QUEUES)
    a.ask(u.iommu_fault_alloc(flags=a.wrong(0, 1)), out=(slot, 12))


def queue_io(a: Author) -> None:
    slot = a.used_slot(QUEUES)
    what = a.r.randrange(4)
    if what == 0:
        a.write(Step(POLL, slot))
    elif what == 1:
        cookie = a.r.randrange(4)
        data = b"".join(struct.pack("<II", cookie + i, a.wrong(0, 1, 2)) for i in range(a.r.randrange(3)))
        a.write(Step(WRITE, slot, data=data + bytes(a.wrong(0, 1, 4))))
    else:
        a.write(Step(READ, slot, (a.wrong(a.r.choice((40, 80, 400, 12, 24, 64)), 0, 1, 8, 41),)))


def viommu(a: Author) -> None:
    length = a.r.choice((0, 24, 8, 16, 7, 25))
    at = a.array(struct.pack("<IIQQ", 5, 0, 0, 0) + bytes(8))
    a.ask(
        u.iommu_viommu_alloc(
            flags=a.wrong(0, 1),
            type=a.wrong(t.IOMMU_VIOMMU_TYPE_SELFTEST, 0, 1),
            dev_id=a.id_of("DEVICE"),
            hwpt_id=a.id_of("HWPT_PAGING"),
            data_len=length,
            data_uptr=at,
        )
    )
    a.write(Step(PEEK, numbers=(BUFFER, 32)))


def vdevice(a: Author) -> None:
    a.ask(
        u.iommu_vdevice_alloc(
            viommu_id=a.id_of("VIOMMU"),
            dev_id=a.id_of("DEVICE"),
            virt_id=a.r.choice((0, 1, 2, 0x99, ULMAX, 2**32 + 1)),
        )
    )


def veventq(a: Author) -> None:
    slot = a.free_slot(QUEUES)
    a.ask(
        u.iommu_veventq_alloc(
            flags=a.wrong(0, 1),
            viommu_id=a.id_of("VIOMMU"),
            type=a.wrong(t.IOMMU_VEVENTQ_TYPE_SELFTEST, 0, 1),
            veventq_depth=a.wrong(a.r.choice((1, 2, 8)), 0, 2**32 - 1),
            reserved=a.wrong(0, 1),
        ),
        out=(slot, 24),
    )


def hw_queue(a: Author) -> None:
    _, iova, length = a.mapped()
    a.ask(
        u.iommu_hw_queue_alloc(
            flags=a.wrong(0, 1),
            viommu_id=a.id_of("VIOMMU"),
            type=a.wrong(t.IOMMU_HW_QUEUE_TYPE_SELFTEST, 0, 1),
            index=a.r.choice((0, 0, 1, 1, 2)),
            nesting_parent_iova=iova,
            length=a.wrong(min(length, PAGE), 0, length),
        )
    )


def trigger(a: Author) -> None:
    device = a.id_of("DEVICE")
    context = a.context()
    if context is None or not any(o.id == device for o in context.objects):
        device = 99
    if a.chance(0.6):
        a.ask(
            t.test_trigger_iopf(
                dev_id=device, pasid=a.r.choice((0, 0, 1, 5)), grpid=a.r.randrange(3), perm=3, addr=0x1001
            )
        )
    else:
        a.ask(t.test_trigger_vevent(dev_id=device))


CALLS = {fault_alloc: 3, queue_io: 6, viommu: 3, vdevice: 4, veventq: 3, hw_queue: 4, trigger: 8}
