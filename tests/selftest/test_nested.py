"""Nested page tables of the mock hardware (events 11.2, 12; mock 2.3, 2.4, 4.8)."""

from __future__ import annotations

import errno
from struct import pack

import pytest

from iommufd.uapi import iommufd as u
from iommufd.uapi import iommufd_test as t
from tests.engine.fakes import ARRAY
from tests.selftest.mock import FAULT, IOTLB, NEST, PASID, Mock

TYPE = t.IOMMU_HWPT_INVALIDATE_DATA_SELFTEST


@pytest.fixture
def m() -> Mock:
    return Mock()


@pytest.fixture
def parent(m: Mock) -> int:
    return m.hwpt(NEST)


# -------------------------------------------------------------------------------------------------- on a nesting parent


@pytest.mark.parametrize("flags", [f for f in range(17) if f & ~(FAULT | PASID)])
def test_flags(m: Mock, parent: int, flags: int) -> None:  # mock-2.3-nested-1
    m.refuses(errno.EOPNOTSUPP, m.nested_cmd(parent, flags=flags))


def test_without_data(m: Mock, parent: int) -> None:  # mock-2.3-nested-1
    m.refuses(errno.EOPNOTSUPP, m.nested_cmd(parent, data_type=0, data_len=0))


def test_parents_that_are_none(m: Mock, parent: int) -> None:  # mock-2.3-nested-2
    m.refuses(errno.EINVAL, m.nested_cmd(m.auto, data_type=1))
    m.refuses(errno.EINVAL, m.nested_cmd(m.hwpt(), data_type=1))
    m.refuses(errno.EINVAL, m.nested_cmd(m.nested(parent)))


def test_data_type(m: Mock, parent: int) -> None:  # mock-2.3-nested-3
    m.refuses(errno.EOPNOTSUPP, m.nested_cmd(parent, data_type=1, data_len=3))


@pytest.mark.parametrize("length", [3, 9, 12])
def test_data_length(m: Mock, parent: int, length: int) -> None:  # mock-2.3-nested-4
    m.refuses(errno.EINVAL, m.nested_cmd(parent, data_len=length, data_uptr=0x10))


def test_data_that_cannot_be_read(m: Mock, parent: int) -> None:  # mock-2.3-nested-5
    m.refuses(errno.EFAULT, m.nested_cmd(parent, data_uptr=0x10))


@pytest.mark.parametrize("length", [4, 8])
def test_all_words_start_as_given(m: Mock, parent: int, length: int) -> None:  # mock 2.3
    assert m.iotlb(m.nested(parent, data_len=length)) == [IOTLB] * 4


def test_the_page_table_type_is_ignored(m: Mock, parent: int) -> None:  # events 12
    cmd = m.nested_cmd(parent)
    m.host.poke(ARRAY + 4, pack("<I", 99))
    m.do(cmd)


def test_references(m: Mock, parent: int) -> None:  # events 10
    nested = m.nested(parent)
    m.refuses(errno.EBUSY, u.iommu_destroy(id=parent))
    m.replace(nested)
    m.refuses(errno.EBUSY, u.iommu_destroy(id=nested))
    m.replace(m.ioas_id)
    m.destroy(nested)
    m.destroy(parent)


# ------------------------------------------------------------------------------------------------------------- checking


def test_check_iotlb(m: Mock, parent: int) -> None:  # mock 4.8
    nested = m.nested(parent)
    m.op_refuses(errno.ENOENT, t.test_md_check_iotlb(id=parent, iotlb=IOTLB))
    m.op_refuses(errno.ENOENT, t.test_md_check_iotlb(id=99, iotlb=IOTLB))
    m.op_refuses(errno.EINVAL, t.test_md_check_iotlb(id=nested, arm_id=4, iotlb=IOTLB))
    m.op_refuses(errno.EINVAL, t.test_md_check_iotlb(id=nested, arm_id=3, iotlb=IOTLB + 1))
    m.op(t.test_md_check_iotlb(id=nested, arm_id=3, iotlb=IOTLB))


# --------------------------------------------------------------------------------------------------- 11.2: invalidation


def entries(m: Mock, *given: tuple[int, int], length: int = 8) -> None:
    m.host.poke(ARRAY, b"".join(pack("<II", *entry).ljust(length, b"\0") for entry in given))


def cmd(hwpt: int, count: int, **more: int) -> u.iommu_hwpt_invalidate:
    given = {"data_uptr": ARRAY, "data_type": TYPE, "entry_len": 8, **more}
    return u.iommu_hwpt_invalidate(hwpt_id=hwpt, entry_num=count, **given)


def refused(m: Mock, number: int, given: u.iommu_hwpt_invalidate) -> int:
    """The entries handled before the error."""
    m.refuses(number, given)
    return m.after(u.iommu_hwpt_invalidate).entry_num


@pytest.mark.parametrize("count", [0, 1])
def test_invalidate_type(m: Mock, parent: int, count: int) -> None:  # events-11.2-1
    entries(m, (0, 0))
    nested = m.nested(parent)
    assert refused(m, errno.EINVAL, cmd(nested, count, data_type=TYPE - 1)) == 0
    assert m.iotlb(nested) == [IOTLB] * 4


def test_an_empty_array(m: Mock, parent: int) -> None:  # events-11.2-2
    assert m.do(cmd(m.nested(parent), 0, entry_len=3, data_uptr=0)).entry_num == 0


@pytest.mark.parametrize("length", [4, 16])
def test_entry_length(m: Mock, parent: int, length: int) -> None:  # events-11.2-2
    entries(m, (0, 0), length=length)
    assert refused(m, errno.EINVAL, cmd(m.nested(parent), 1, entry_len=length)) == 0


def test_entries_that_cannot_be_read(m: Mock, parent: int) -> None:  # events-11.2-3
    end = ARRAY + 0x100 * 4096
    m.host.poke(end - 16, pack("<IIII", 0, 0, 0, 2))
    nested = m.nested(parent)
    assert refused(m, errno.EFAULT, cmd(nested, 3, data_uptr=end - 16)) == 2
    assert m.iotlb(nested) == [0, IOTLB, 0, IOTLB]


def test_entry_flags_and_ids(m: Mock, parent: int) -> None:  # events-11.2-4 events-11.2-5
    nested = m.nested(parent)
    entries(m, (0, 1), (2, 0))
    assert refused(m, errno.EOPNOTSUPP, cmd(nested, 2)) == 1
    for flags in (0, t.IOMMU_TEST_INVALIDATE_FLAG_ALL):
        entries(m, (0, 2), (flags, 4))
        assert refused(m, errno.EINVAL, cmd(nested, 2)) == 1
    assert m.iotlb(nested) == [IOTLB, 0, 0, IOTLB]


def test_all_and_one(m: Mock, parent: int) -> None:  # events-11.2-6
    one, every = m.nested(parent), m.nested(parent)
    entries(m, (0, 3))
    assert m.do(cmd(one, 1)).entry_num == 1
    assert m.iotlb(one) == [IOTLB] * 3 + [0]
    entries(m, (1, 0))
    assert m.do(cmd(every, 1)).entry_num == 1
    assert m.iotlb(every) == [0] * 4
