"""core 3: IOMMU_OPTION."""

from __future__ import annotations

import errno

import pytest

from iommufd.engine.task import CAP_SYS_RESOURCE
from iommufd.iommu.extent_domain import ExtentDomain
from iommufd.memory.accounting import Mode
from iommufd.memory.space import READ
from iommufd.uapi import iommufd as u
from tests.engine.fakes import ARG, BUFFER, Caller

RLIMIT, HUGE, SET, GET = 0, 1, 0, 1


@pytest.fixture
def c() -> Caller:
    return Caller(caps=[CAP_SYS_RESOURCE])


def option(option_id: int, op: int, object_id: int = 0, val64: int = 0, reserved: int = 0) -> u.iommu_option:
    return u.iommu_option(option_id=option_id, op=op, object_id=object_id, val64=val64, reserved=reserved)


def test_core_3_1(c: Caller) -> None:  # core-3-1
    c.refuses(errno.EOPNOTSUPP, option(RLIMIT, GET, reserved=1))


def test_core_3_2(c: Caller) -> None:  # core-3-2
    c.refuses(errno.EOPNOTSUPP, option(2, GET))


@pytest.mark.parametrize("op", [SET, GET])
def test_core_3_4(c: Caller, op: int) -> None:  # core-3-4
    """val64 cannot be written: EFAULT, the effect stays."""
    c.host.poke(ARG, option(RLIMIT, op, val64=1).pack())
    struct = option(RLIMIT, op, val64=1)
    struct.size = 24
    c.host.poke(ARG, struct.pack())
    c.host.protect(ARG, 1, READ)
    with pytest.raises(Exception, match="EFAULT"):
        c.context.ioctl(c.proc.task(), 0x3B87, ARG)
    assert (c.context.account_mode is Mode.MM) == (op == SET)


def test_only_val64_is_written(c: Caller) -> None:  # core-3-3
    struct = option(RLIMIT, GET, val64=77)
    struct.size = 24
    c.raw(0x3B87, struct.pack())
    assert c.host.peek(ARG, 16) == struct.pack()[:16]
    assert c.after(u.iommu_option).val64 == 0


class TestRlimitMode:
    def test_core_3_rlimit_1(self, c: Caller) -> None:  # core-3-rlimit-1
        c.refuses(errno.EOPNOTSUPP, option(RLIMIT, GET, object_id=1))

    def test_core_3_rlimit_2(self, c: Caller) -> None:  # core-3-rlimit-2
        c.proc.caps.clear()
        assert c.do(option(RLIMIT, GET, val64=9)).val64 == 0

    def test_core_3_rlimit_3(self, c: Caller) -> None:  # core-3-rlimit-3
        """EPERM beats EBUSY beats EINVAL."""
        c.ioas()
        c.proc.caps.clear()
        c.refuses(errno.EPERM, option(RLIMIT, SET, val64=2))

    def test_core_3_rlimit_4(self, c: Caller) -> None:  # core-3-rlimit-4
        ioas = c.ioas()
        c.refuses(errno.EBUSY, option(RLIMIT, SET, val64=2))
        c.do(u.iommu_destroy(id=ioas))
        c.do(option(RLIMIT, SET, val64=1))

    def test_core_3_rlimit_5(self, c: Caller) -> None:  # core-3-rlimit-5
        c.refuses(errno.EINVAL, option(RLIMIT, SET, val64=2))
        for value in (1, 0):
            assert c.do(option(RLIMIT, SET, val64=value)).val64 == value
            assert c.do(option(RLIMIT, GET)).val64 == value

    def test_core_3_rlimit_6(self, c: Caller) -> None:  # core-3-rlimit-6
        c.refuses(errno.EOPNOTSUPP, option(RLIMIT, 2))


class TestHugePages:
    def test_core_3_huge_1(self, c: Caller) -> None:  # core-3-huge-1
        c.refuses(errno.ENOENT, option(HUGE, 7, object_id=3))

    def test_core_3_huge_2(self, c: Caller) -> None:  # core-3-huge-2
        ioas = c.ioas()
        assert c.do(option(HUGE, GET, ioas)).val64 == 1
        c.do(option(HUGE, SET, ioas, 0))
        assert c.do(option(HUGE, GET, ioas)).val64 == 0

    def test_core_3_huge_3(self, c: Caller) -> None:  # core-3-huge-3
        """Already off: success also where row 4 would refuse."""
        ioas = c.ioas()
        c.do(option(HUGE, SET, ioas, 0))
        c.add_domain(ioas)
        c.map(ioas, 0x1000, 0x1000)
        c.do(option(HUGE, SET, ioas, 0))

    def test_core_3_huge_4(self, c: Caller) -> None:  # core-3-huge-4
        ioas = c.ioas()
        c.add_domain(ioas)
        c.do(option(HUGE, SET, ioas, 0))
        c.do(option(HUGE, SET, ioas, 1))
        c.map(ioas, 0x1000, 0x1000)
        c.refuses(errno.EINVAL, option(HUGE, SET, ioas, 0))

    @pytest.mark.parametrize(("iova", "va", "length"), [(0x800, 0, 4096), (0, 0x800, 4096), (0, 0, 0x1800)])
    def test_core_3_huge_5(self, c: Caller, iova: int, va: int, length: int) -> None:  # core-3-huge-5
        ioas = c.ioas()
        c.map(ioas, iova, length, BUFFER + va)
        c.refuses(errno.EADDRINUSE, option(HUGE, SET, ioas, 0))
        assert c.do(option(HUGE, GET, ioas)).val64 == 1

    def test_core_3_huge_6(self, c: Caller) -> None:  # core-3-huge-6
        ioas = c.ioas()
        c.map(ioas, 0x1000, 0x1000)
        c.do(option(HUGE, SET, ioas, 0))
        assert c.table(ioas).iova_alignment == 4096

    def test_core_3_huge_7(self, c: Caller) -> None:  # core-3-huge-7
        """Always possible; the alignment may fall, existing entries stay as they are."""
        ioas = c.ioas()
        c.do(option(HUGE, SET, ioas, 0))
        domain = c.add_domain(ioas, ExtentDomain(0xFFFFF800))
        c.map(ioas, 0x10000, 0x4000)
        c.do(option(HUGE, SET, ioas, 1))
        assert c.table(ioas).iova_alignment == 2048
        assert domain.entry(0x10000) == (0x10000, 4096)

    def test_core_3_huge_8(self, c: Caller) -> None:  # core-3-huge-8
        c.refuses(errno.EINVAL, option(HUGE, SET, c.ioas(), 2))

    def test_core_3_huge_9(self, c: Caller) -> None:  # core-3-huge-9
        c.refuses(errno.EOPNOTSUPP, option(HUGE, 2, c.ioas()))
