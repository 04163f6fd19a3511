"""Calls on page tables: made, asked what is dirty, invalidated."""

from __future__ import annotations

import struct

from iommufd.uapi import iommufd as u
from iommufd.uapi import iommufd_test as t
from tools.fuzz.author import BUFFER, ULMAX, Author
from tools.fuzz.program import PAGE, PEEK, Step


def hwpt_alloc(a: Author) -> None:
    data = struct.pack("<II", a.r.choice((0, 7)), a.wrong(a.r.choice((0, 0, 0, 1)), 2))
    length = a.r.choice((0, 0, 0, 4, 8, 8, 3, 9))
    a.ask(
        u.iommu_hwpt_alloc(
            flags=a.r.choice((0, 0, 1, 1, 2, 4, 8, 12, 9, 10, 5, 16)),
            dev_id=a.id_of("DEVICE"),
            pt_id=a.id_of("IOAS"),
            reserved=a.wrong(0, 1),
            data_type=a.wrong(t.IOMMU_HWPT_DATA_SELFTEST if length else 0, 0, 1, t.IOMMU_HWPT_DATA_SELFTEST),
            data_len=length,
            data_uptr=a.array(data + bytes(8)) if length else 0,
            fault_id=a.id_of("FAULT"),
        )
    )


def hwpt_nested(a: Author) -> None:
    a.ask(
        u.iommu_hwpt_alloc(
            flags=a.r.choice((0, 0, 4, 8, 12, 1, 2)),
            dev_id=a.id_of("DEVICE"),
            pt_id=a.id_of("HWPT_PAGING", "VIOMMU", "VIOMMU"),
            data_type=a.wrong(t.IOMMU_HWPT_DATA_SELFTEST, 0, 1),
            data_len=a.wrong(a.r.choice((4, 8)), 0, 3, 9),
            data_uptr=a.array(struct.pack("<II", a.r.randrange(4), 0)),
            fault_id=a.id_of("FAULT"),
        )
    )


def hw_info(a: Author) -> None:
    a.ask(
        u.iommu_hw_info(
            flags=a.wrong(a.r.randrange(2), 2),
            dev_id=a.id_of("DEVICE"),
            data_len=a.r.choice((0, 4, 8, 16)),
            data_uptr=a.array(b"\xff" * 24),
            out_data_type=a.r.choice((0, t.IOMMU_HW_INFO_TYPE_SELFTEST, 1)),
        )
    )
    a.write(Step(PEEK, numbers=(BUFFER, 32)))


def dirty_calls(a: Author) -> None:
    """Tracking on and off, marks, and the bitmap, read in full only where it cannot depend on contiguity."""
    what = a.r.randrange(3)
    if what == 0:
        hwpt = a.id_of("HWPT_PAGING")
        a.ask(u.iommu_hwpt_set_dirty_tracking(flags=a.wrong(a.r.choice((1, 1, 0)), 2), hwpt_id=hwpt))
        return
    ioas, iova, length = a.mapped()
    hwpt = a.hwpt_of(ioas)
    size = a.r.choice((2048, 2048, PAGE, 2 * PAGE, 0, 3000))
    if what == 1 and a.dirty:
        bits = a.array(a.r.randbytes(4))
        a.ask(
            t.test_dirty(
                id=hwpt,
                iova=iova - iova % (size or 1),
                length=size * a.r.choice((1, 4, 16)),
                page_size=size,
                uptr=bits,
            )
        )
        return
    at = a.array(bytes(32))
    a.ask(
        u.iommu_hwpt_get_dirty_bitmap(
            hwpt_id=hwpt,
            flags=a.wrong(a.r.randrange(2), 2),
            reserved=a.wrong(0, 1),
            iova=iova,
            length=a.wrong(length, 0, ULMAX),
            page_size=size,
            data=at,
        )
    )
    if a.dirty and at > PAGE and at < 2**47:
        a.write(Step(PEEK, numbers=(at, 8)))


def invalidate(a: Author) -> None:
    nested = a.chance(0.5)
    entries = a.r.randrange(4)
    if nested:
        data = b"".join(
            struct.pack("<II", a.wrong(a.r.randrange(2), 2), a.wrong(a.r.randrange(4), 4)) for _ in range(entries)
        )
        width = 8
    else:
        data = b"".join(
            struct.pack("<III", a.wrong(a.r.randrange(2), 2), a.r.randrange(4), a.wrong(1, 4)) for _ in range(entries)
        )
        width = 12
    a.ask(
        u.iommu_hwpt_invalidate(
            hwpt_id=a.id_of("HWPT_NESTED" if nested else "VIOMMU"),
            data_uptr=a.array(data + bytes(16)),
            data_type=a.wrong(t.IOMMU_HWPT_INVALIDATE_DATA_SELFTEST, t.IOMMU_HWPT_INVALIDATE_DATA_SELFTEST_INVALID, 0),
            entry_len=a.wrong(width, 0, 4, 16, 5000),
            entry_num=a.wrong(entries, 2**20),
            reserved=a.wrong(0, 1),
        )
    )


CALLS = {hwpt_alloc: 8, hwpt_nested: 6, hw_info: 2, dirty_calls: 8, invalidate: 3}
