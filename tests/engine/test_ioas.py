"""core 4.4-4.6 and 4.16: IOAS_ALLOC, IOVA_RANGES, ALLOW_IOVAS, VFIO_IOAS."""

from __future__ import annotations

import errno

import pytest

from iommufd.engine.fail import fail_rule
from iommufd.engine.ioas import IOAS
from iommufd.iommu.extent_domain import ExtentDomain
from iommufd.uapi import iommufd as u
from tests.engine.fakes import ARRAY, ULMAX, Caller, map_struct

ARRAY_END = ARRAY + 0x100 * 4096


def ranges(c: Caller, ioas: int, room: int, at: int = ARRAY) -> u.iommu_ioas_iova_ranges:
    return u.iommu_ioas_iova_ranges(ioas_id=ioas, num_iovas=room, allowed_iovas=at)


def pairs(c: Caller, count: int, at: int = ARRAY) -> list[tuple[int, int]]:
    data = c.host.peek(at, count * 16)
    return [
        (int.from_bytes(data[i : i + 8], "little"), int.from_bytes(data[i + 8 : i + 16], "little"))
        for i in range(0, len(data), 16)
    ]


def allow(c: Caller, ioas: int, *entries: tuple[int, int], at: int = ARRAY) -> u.iommu_ioas_allow_iovas:
    c.host.poke(at, b"".join(a.to_bytes(8, "little") + b.to_bytes(8, "little") for a, b in entries))
    return u.iommu_ioas_allow_iovas(ioas_id=ioas, num_iovas=len(entries), allowed_iovas=at)


class TestAlloc:
    """core 4.4."""

    def test_core_4_4_1(self, c: Caller) -> None:  # core-4.4-1
        c.refuses(errno.EOPNOTSUPP, u.iommu_ioas_alloc(flags=1))

    def test_core_4_4_2(self, c: Caller) -> None:  # core-4.4-2
        c.context.objects._next = 2**31
        c.refuses(errno.EBUSY, u.iommu_ioas_alloc())

    def test_core_4_4_2_no_memory(self, c: Caller) -> None:  # core-4.4-2
        with fail_rule(c.world, "IOAS_ALLOC:nth=1:ENOMEM"):
            c.refuses(errno.ENOMEM, u.iommu_ioas_alloc())
            assert not len(c.context.objects)
            assert c.ioas() == 1

    def test_core_4_4_4_a_new_one(self, c: Caller) -> None:  # core-4.4-4
        ioas = c.ioas()
        assert ioas == 1
        out = c.do(ranges(c, ioas, 1))
        assert (out.num_iovas, out.out_iova_alignment) == (1, 1)
        assert pairs(c, 1) == [(0, ULMAX)]
        assert c.do(u.iommu_option(option_id=1, op=1, object_id=ioas)).val64 == 1
        assert isinstance(c.context.objects.get(ioas), IOAS)


class TestIovaRanges:
    """core 4.5."""

    def test_core_4_5_1(self, c: Caller) -> None:  # core-4.5-1
        c.refuses(errno.EOPNOTSUPP, u.iommu_ioas_iova_ranges(ioas_id=99, reserved=1))

    def test_core_4_5_2(self, c: Caller) -> None:  # core-4.5-2
        c.refuses(errno.ENOENT, ranges(c, 99, 0))

    def test_core_4_5_3(self, c: Caller) -> None:  # core-4.5-3
        ioas = c.ioas()
        table = c.table(ioas)
        table.reserve(0x1000, 0x1FFF, None)
        struct = ranges(c, ioas, 2, at=ARRAY_END - 16)
        c.refuses(errno.EFAULT, struct)
        assert pairs(c, 1, ARRAY_END - 16) == [(0, 0xFFF)]  # the entry before stays written
        assert c.after(u.iommu_ioas_iova_ranges) == struct  # the struct is not updated

    def test_core_4_5_4(self, c: Caller) -> None:  # core-4.5-4
        ioas = c.ioas()
        table = c.table(ioas)
        for first, last in ((0x5000, 0x5FFF), (0x1000, 0x2FFF), (0x2000, 0x3FFF), (0x4000, 0x4FFF)):
            table.reserve(first, last, None)
        out = c.do(ranges(c, ioas, 5))
        assert out.num_iovas == 2
        assert pairs(c, 2) == [(0, 0xFFF), (0x6000, ULMAX)]

    def test_core_4_5_5(self, c: Caller) -> None:  # core-4.5-5
        ioas = c.ioas()
        c.table(ioas).reserve(0x1000, 0x1FFF, None)
        assert "2 ranges" in c.refuses(errno.EMSGSIZE, ranges(c, ioas, 1))
        assert c.after(u.iommu_ioas_iova_ranges).num_iovas == 2
        assert pairs(c, 2) == [(0, 0xFFF), (0, 0)]

    def test_no_room_never_touches_the_pointer(self, c: Caller) -> None:
        ioas = c.ioas()
        c.refuses(errno.EMSGSIZE, ranges(c, ioas, 0, at=0))
        assert c.after(u.iommu_ioas_iova_ranges).num_iovas == 1
        c.table(ioas).reserve(0, ULMAX, None)
        assert c.do(ranges(c, ioas, 0, at=0)).num_iovas == 0

    def test_areas_and_allowed_do_not_count(self, c: Caller) -> None:
        ioas = c.ioas()
        c.map(ioas, 0x10000, 4096)
        c.do(allow(c, ioas, (0x20000, 0x2FFFF)))
        c.do(ranges(c, ioas, 1))
        assert pairs(c, 1) == [(0, ULMAX)]

    def test_a_domain_brings_its_aperture_and_alignment(self, c: Caller) -> None:
        ioas = c.ioas()
        c.add_domain(ioas, ExtentDomain(0xFFFFF800, 0x1000000, 0x7FFFFFFF))
        out = c.do(ranges(c, ioas, 1))
        assert out.out_iova_alignment == 2048
        assert pairs(c, 1) == [(0x1000000, 0x7FFFFFFF)]


class TestAllowIovas:
    """core 4.6."""

    def test_core_4_6_1(self, c: Caller) -> None:  # core-4.6-1
        c.refuses(errno.EOPNOTSUPP, u.iommu_ioas_allow_iovas(ioas_id=99, reserved=1))

    def test_core_4_6_2(self, c: Caller) -> None:  # core-4.6-2
        c.refuses(errno.ENOENT, u.iommu_ioas_allow_iovas(ioas_id=99))

    def test_core_4_6_3(self, c: Caller) -> None:  # core-4.6-3
        ioas = c.ioas()
        struct = allow(c, ioas, (1, 2), (5, 6), at=ARRAY_END - 24)
        assert "entry 1" in c.refuses(errno.EFAULT, struct)

    def test_core_4_6_3_and_4_are_per_entry(self, c: Caller) -> None:  # core-4.6-3
        ioas = c.ioas()
        assert "entry 0" in c.refuses(errno.EINVAL, allow(c, ioas, (2, 2), (5, 6), at=ARRAY_END - 16))

    @pytest.mark.parametrize("entry", [(5, 5), (6, 5), (ULMAX, 0)])
    def test_core_4_6_4(self, c: Caller, entry: tuple[int, int]) -> None:  # core-4.6-4
        c.refuses(errno.EINVAL, allow(c, c.ioas(), entry))

    @pytest.mark.parametrize("entry", [(0x1FFF, 0x2500), (0x500, 0x1000), (0x1400, 0x1500), (0, ULMAX)])
    def test_core_4_6_5(self, c: Caller, entry: tuple[int, int]) -> None:  # core-4.6-5
        why = c.refuses(errno.EINVAL, allow(c, c.ioas(), (0x1000, 0x1FFF), entry))
        assert "[0x1000, 0x1fff]" in why

    def test_core_4_6_7(self, c: Caller) -> None:  # core-4.6-7
        ioas = c.ioas()
        c.table(ioas).reserve(0x3000, 0x3FFF, None)
        c.do(allow(c, ioas, (0x8000, 0x8FFF)))
        c.refuses(errno.EADDRINUSE, allow(c, ioas, (0x1000, 0x1FFF), (0x2000, 0x3000)))
        assert list(c.table(ioas).allowed) == [(0x8000, 0x8FFF)]

    def test_core_4_6_8(self, c: Caller) -> None:  # core-4.6-8
        ioas = c.ioas()
        c.map(ioas, 0x10000, 4096)  # existing areas are not examined
        c.do(allow(c, ioas, (0x4000, 0x4FFF), (0x2000, 0x2FFF), (0x3000, 0x3FFF)))
        assert list(c.table(ioas).allowed) == [(0x2000, 0x4FFF)]
        assert c.map(ioas, None, 4096) == 0x2000
        assert c.map(ioas, 0x9000, 4096) == 0x9000  # fixed maps may land outside
        c.do(u.iommu_ioas_allow_iovas(ioas_id=ioas, num_iovas=0, allowed_iovas=0))
        assert c.map(ioas, None, 4096) == 0x1000

    def test_an_error_keeps_the_previous_list(self, c: Caller) -> None:
        ioas = c.ioas()
        c.do(allow(c, ioas, (0x4000, 0x4FFF)))
        c.refuses(errno.EINVAL, allow(c, ioas, (0x1000, 0x1FFF), (0x9000, 0x9000)))
        assert list(c.table(ioas).allowed) == [(0x4000, 0x4FFF)]

    def test_many_entries(self, c: Caller) -> None:
        """More than are read at once."""
        ioas = c.ioas()
        entries = [(i * 0x1000, i * 0x1000 + 0xFF) for i in range(5000)]
        c.do(allow(c, ioas, *entries))
        assert list(c.table(ioas).allowed) == entries


class TestReservations:
    """core 4.3: what vetoes what."""

    def test_an_area_vetoes(self, c: Caller) -> None:
        ioas = c.ioas()
        c.map(ioas, 0x3000, 0x1000)
        with pytest.raises(Exception, match=r"\[0x3fff, 0x4fff\].*\[0x3000, 0x3fff\]"):
            c.table(ioas).reserve(0x3FFF, 0x4FFF, None)

    def test_an_allowed_range_vetoes(self, c: Caller) -> None:
        ioas = c.ioas()
        c.do(allow(c, ioas, (0x3000, 0x3FFF)))
        with pytest.raises(Exception, match="allowed"):
            c.table(ioas).reserve(0x2000, 0x3000, None)

    def test_owners(self, c: Caller) -> None:
        """Reservations overlap; removing an owner removes only its own."""
        ioas, a, b = c.ioas(), object(), object()
        table = c.table(ioas)
        table.reserve(0x1000, 0x2FFF, a)
        table.reserve(0x2000, 0x3FFF, b)
        table.reserve(0x1000, 0x1FFF, a)
        table.remove_reserved(a)
        c.map(ioas, 0x1000, 4096)
        c.refuses(errno.EINVAL, map_struct(ioas, 0x2000, 4096))


class TestVfioIoas:
    """core 4.16."""

    def test_reserved(self, c: Caller) -> None:
        c.refuses(errno.EOPNOTSUPP, u.iommu_vfio_ioas(op=0, reserved=1))

    def test_get(self, c: Caller) -> None:
        c.refuses(errno.ENODEV, u.iommu_vfio_ioas(op=0))
        ioas = c.ioas()
        c.do(u.iommu_vfio_ioas(op=1, ioas_id=ioas))
        assert c.do(u.iommu_vfio_ioas(op=0)).ioas_id == ioas

    def test_set(self, c: Caller) -> None:
        c.refuses(errno.ENOENT, u.iommu_vfio_ioas(op=1, ioas_id=5))

    def test_clear(self, c: Caller) -> None:
        c.do(u.iommu_vfio_ioas(op=2))
        c.do(u.iommu_vfio_ioas(op=1, ioas_id=c.ioas()))
        c.do(u.iommu_vfio_ioas(op=2))
        c.refuses(errno.ENODEV, u.iommu_vfio_ioas(op=0))

    def test_other_op(self, c: Caller) -> None:
        c.refuses(errno.EOPNOTSUPP, u.iommu_vfio_ioas(op=3))

    def test_takes_no_count(self, c: Caller) -> None:
        """core 2.4, 2.5 row 3."""
        ioas = c.ioas()
        c.do(u.iommu_vfio_ioas(op=1, ioas_id=ioas))
        c.do(u.iommu_destroy(id=ioas))
        c.refuses(errno.ENODEV, u.iommu_vfio_ioas(op=0))
