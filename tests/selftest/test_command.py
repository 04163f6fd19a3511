"""Framing of the test command (mock-device 1) and its ops on devices, IOASes and page tables (4, 5)."""

from __future__ import annotations

import errno
from struct import pack

import pytest

from iommufd.engine.hwpt import HwptPaging
from iommufd.iommu.extent_domain import ExtentDomain
from iommufd.machine.presets import preset
from iommufd.uapi import iommufd as u
from iommufd.uapi import iommufd_test as t
from tests.engine.fakes import ARG, ARRAY, BUFFER, Caller
from tests.selftest.mock import DIRTY, PASID, Mock

PAGE = 4096
IOVA = t.MOCK_APERTURE_START


@pytest.fixture
def m() -> Mock:
    return Mock()


# ------------------------------------------------------------------------------------------------------------- framing


@pytest.mark.parametrize(("size", "number"), [(0, errno.EINVAL), (67, errno.EINVAL), (68, 0), (72, 0), (80, 0)])
def test_sizes(m: Mock, size: int, number: int) -> None:  # mock-device 1
    data = t.test_set_temp_memory_limit(size=size, op=9, limit=12, reserved=7, last=9).pack() + bytes(8)
    if number:
        m.raw_refuses(number, t.IOMMU_TEST_CMD, data)
    else:
        m.raw(t.IOMMU_TEST_CMD, data)


def test_bytes_behind_the_struct(m: Mock) -> None:  # mock-device 1
    data = t.test_set_temp_memory_limit(size=80, op=9, limit=12).pack() + b"\0\0\0\1\0\0\0\0"
    m.raw_refuses(errno.E2BIG, t.IOMMU_TEST_CMD, data)


@pytest.mark.parametrize("op", [0, 24, 0xFFFFFFFF])
def test_unknown_ops(m: Mock, op: int) -> None:  # mock-device 1
    m.raw_refuses(errno.EOPNOTSUPP, t.IOMMU_TEST_CMD, t.iommu_test_cmd(size=72, op=op).pack())


def test_the_default_machine_has_no_test_command() -> None:
    caller = Caller(preset("default").world)
    with pytest.raises(Exception, match="ENOTTY"):
        caller.raw(t.IOMMU_TEST_CMD, t.iommu_test_cmd(size=72, op=9).pack())


def test_responses_are_as_long_as_the_caller_said(m: Mock) -> None:  # mock-device 1
    m.host.poke(ARG + 68, b"\xee\xee\xee\xee")
    cmd = t.test_mock_domain(size=68, op=2, id=m.ioas_id)
    m.raw(t.IOMMU_TEST_CMD, cmd.pack()[:68])
    assert m.after(t.test_mock_domain).out_stdev_id
    assert bytes(m.host.peek(ARG + 68, 4)) == b"\xee\xee\xee\xee"


# ------------------------------------------------------------------------------------------------------------- devices


def test_ids_in_order(m: Mock) -> None:  # mock-device 4.1
    ioas = m.ioas()
    assert m.device(ioas) == (ioas + 1, ioas + 3, ioas + 2)
    m.refuses(errno.EBUSY, u.iommu_destroy(id=ioas + 2))
    m.refuses(errno.EBUSY, u.iommu_destroy(id=ioas + 3))
    m.destroy(ioas + 1)
    assert [obj.id for obj in m.context.objects] == [1, 2, 3, 4, ioas]


@pytest.mark.parametrize("flags", [2, 8, 0x80000000])
def test_device_flags_come_before_the_page_table(m: Mock, flags: int) -> None:  # mock-device 4.1 row 2
    before = m.ledger()
    m.op_refuses(errno.EINVAL, t.test_mock_domain_flags(id=99, dev_flags=flags))
    m.op_refuses(errno.ENOENT, t.test_mock_domain_flags(id=99, dev_flags=5))
    m.op_refuses(errno.EINVAL, t.test_mock_domain(id=m.stdev))
    assert m.ledger() == before


def test_an_answer_that_cannot_be_written_undoes_the_device(m: Mock) -> None:  # mock-device 4.1 row 5
    before = m.ledger()
    m.host.map(0x2000_0000, 1)
    m.host.poke(0x2000_0000, t.test_mock_domain(size=72, op=2, id=m.ioas_id).pack())
    m.host.protect(0x2000_0000, 1, 1)
    with pytest.raises(Exception, match="EFAULT"):
        m.context.ioctl(m.proc.task(), t.IOMMU_TEST_CMD, 0x2000_0000)
    assert m.ledger() == before


def test_replace_and_its_answer(m: Mock) -> None:  # mock-device 4.2
    hwpt = m.hwpt()
    m.op_refuses(errno.ENOENT, t.test_mock_domain_replace(id=m.dev, pt_id=hwpt))
    assert m.op(t.test_mock_domain_replace(id=m.stdev, pt_id=hwpt)).pt_id == hwpt
    auto = m.op(t.test_mock_domain_replace(id=m.stdev, pt_id=m.ioas_id)).pt_id
    assert auto not in (hwpt, m.ioas_id)
    m.host.map(0x2000_0000, 1)
    m.host.poke(0x2000_0000, t.test_mock_domain_replace(size=72, op=10, id=m.stdev, pt_id=hwpt).pack())
    m.host.protect(0x2000_0000, 1, 1)
    with pytest.raises(Exception, match="EFAULT"):
        m.context.ioctl(m.proc.task(), t.IOMMU_TEST_CMD, 0x2000_0000)
    m.refuses(errno.EBUSY, u.iommu_destroy(id=hwpt))  # the replacement stays


def test_pasid_ops(m: Mock) -> None:  # mock-device 4.3, 4.4
    hwpt, plain = m.hwpt(PASID), m.hwpt()
    check = t.test_pasid_check_hwpt
    m.replace(hwpt)
    for cmd in (t.test_pasid_attach(id=99), t.test_pasid_replace(id=99), t.test_pasid_detach(id=99), check(id=99)):
        m.op_refuses(errno.ENOENT, cmd)
    m.op(check(id=m.stdev, pasid=5))
    assert m.op(t.test_pasid_attach(id=m.stdev, pasid=5, pt_id=hwpt)).pt_id == hwpt
    m.op_refuses(errno.EINVAL, check(id=m.stdev, pasid=5))
    m.op(check(id=m.stdev, pasid=5, hwpt_id=hwpt))
    m.op(check(id=m.stdev, pasid=0, hwpt_id=hwpt))
    m.op_refuses(errno.ENOENT, check(id=m.stdev, pasid=5, hwpt_id=99))
    m.op_refuses(errno.EINVAL, check(id=m.stdev, pasid=5, hwpt_id=m.ioas_id))
    m.op_refuses(errno.EINVAL, check(id=m.stdev, pasid=5, hwpt_id=plain))
    m.op_refuses(errno.EINVAL, check(id=m.stdev, pasid=6, hwpt_id=hwpt))
    m.op_refuses(errno.EBUSY, t.test_pasid_attach(id=m.stdev, pasid=0, pt_id=hwpt))
    m.op_refuses(errno.EINVAL, t.test_pasid_attach(id=m.stdev, pasid=1 << 20, pt_id=hwpt))
    m.op(t.test_pasid_detach(id=m.stdev, pasid=5))
    m.op(t.test_pasid_detach(id=m.stdev, pasid=5))


def test_an_answer_that_cannot_be_written_undoes_the_pasid(m: Mock) -> None:  # mock-device 4.3
    hwpt = m.hwpt(PASID)
    m.replace(hwpt)
    m.host.map(0x2000_0000, 1)
    m.host.poke(0x2000_0000, t.test_pasid_attach(size=72, op=18, id=m.stdev, pasid=5, pt_id=hwpt).pack())
    m.host.protect(0x2000_0000, 1, 1)
    with pytest.raises(Exception, match="EFAULT"):
        m.context.ioctl(m.proc.task(), t.IOMMU_TEST_CMD, 0x2000_0000)
    m.op(t.test_pasid_check_hwpt(id=m.stdev, pasid=5))


def test_the_failing_pasid(m: Mock) -> None:  # mock-device 2.5
    one, two = m.hwpt(PASID), m.hwpt(PASID)
    m.replace(one)
    number = t.IOMMU_TEST_PASID_RESERVED
    attach, replace = t.test_pasid_attach, t.test_pasid_replace
    m.op(attach(id=m.stdev, pasid=number, pt_id=one))
    m.op_refuses(errno.ENOMEM, replace(id=m.stdev, pasid=number, pt_id=two))
    m.op(t.test_pasid_check_hwpt(id=m.stdev, pasid=number, hwpt_id=one))
    m.op(replace(id=m.stdev, pasid=number, pt_id=one))  # the same: the driver is not asked
    m.op(replace(id=m.stdev, pasid=number, pt_id=two))
    m.op_refuses(errno.ENOMEM, replace(id=m.stdev, pasid=number, pt_id=one))
    m.op(t.test_pasid_detach(id=m.stdev, pasid=number))
    m.op(attach(id=m.stdev, pasid=number, pt_id=one))


def test_a_device_without_dirty_tracking(m: Mock) -> None:  # mock-device 2.3 row 2, 2.4 row 1
    stdev, _, dev = m.device(flags=t.MOCK_FLAGS_DEVICE_NO_DIRTY | t.MOCK_FLAGS_DEVICE_PASID)
    m.refuses(errno.EOPNOTSUPP, u.iommu_hwpt_alloc(flags=DIRTY, dev_id=dev, pt_id=m.ioas_id))
    tracking = m.hwpt(DIRTY | PASID)
    m.op_refuses(errno.EINVAL, t.test_mock_domain_replace(id=stdev, pt_id=tracking))
    m.replace(m.hwpt(PASID), stdev)
    m.op(t.test_pasid_attach(id=stdev, pasid=5, pt_id=tracking))  # the PASID path does not look


@pytest.mark.parametrize(
    ("data", "number"),
    [
        ({"data_type": 1, "data_len": 8}, errno.EOPNOTSUPP),
        ({"data_len": 3}, errno.EINVAL),
        ({"data_len": 9}, errno.EINVAL),
        ({"data_len": 8, "data_uptr": 1}, errno.EFAULT),
        ({"data_len": 8, "kind": 2}, errno.EOPNOTSUPP),
        ({"data_len": 4, "kind": 2}, 0),  # the type is not read
        ({"data_len": 8, "kind": 1}, 0),
    ],
)
def test_paging_data(m: Mock, data: dict[str, int], number: int) -> None:  # mock-device 2.3 rows 4-7
    m.host.poke(ARRAY, pack("<II", 0, data.pop("kind", 0)))
    given = {"data_type": t.IOMMU_HWPT_DATA_SELFTEST, "data_uptr": ARRAY, **data}
    cmd = u.iommu_hwpt_alloc(dev_id=m.dev, pt_id=m.ioas_id, **given)
    if number:
        m.refuses(number, cmd)
    else:
        m.do(cmd)


# ------------------------------------------------------------------------------------------------------ IOAS and
# domains


def test_add_reserved(m: Mock) -> None:  # mock-device 5.1
    ioas = m.ioas()
    m.op_refuses(errno.EINVAL, t.test_add_reserved(id=99))
    m.op_refuses(errno.EOVERFLOW, t.test_add_reserved(id=99, start=2**64 - 1, length=2))
    m.op_refuses(errno.ENOENT, t.test_add_reserved(id=99, start=0, length=1))
    m.map(ioas, 0x5000, PAGE)
    m.op_refuses(errno.EADDRINUSE, t.test_add_reserved(id=ioas, start=0x5FFF, length=1))
    m.op(t.test_add_reserved(id=ioas, start=0x7001, length=3))
    m.op(t.test_add_reserved(id=ioas, start=0x7000, length=0x1000))


def check(m: Mock, **fields: int) -> t.test_md_check_map:
    return t.test_md_check_map(**{"id": m.auto, "iova": IOVA, "length": 4 * PAGE, "uptr": BUFFER, **fields})


def test_check_map(m: Mock) -> None:  # mock-device 5.2
    m.map(m.ioas_id, IOVA, 4 * PAGE)
    m.map(m.ioas_id, IOVA + 4 * PAGE, 4 * PAGE, va=BUFFER + 4 * PAGE)
    m.op(check(m))
    m.op(check(m, length=8 * PAGE))
    m.op(check(m, length=0))
    m.op(check(m, iova=IOVA + 0x800, uptr=BUFFER + 0x800, length=0x1000))
    m.op_refuses(errno.EINVAL, check(m, iova=IOVA + 0x800))
    for wrong in ({"iova": IOVA + 1}, {"length": 1}, {"uptr": BUFFER + 1}, {"uptr": 2**64 - 0x800, "length": PAGE}):
        m.op_refuses(errno.EINVAL, check(m, **wrong))
    m.op_refuses(errno.ENOENT, check(m, id=m.ioas_id))
    m.op_refuses(errno.EINVAL, check(m, uptr=BUFFER + PAGE))
    m.op_refuses(errno.EINVAL, check(m, length=9 * PAGE))  # unmapped translates to nothing
    m.host.unmap(BUFFER + 3 * PAGE, 1)
    m.op_refuses(errno.EFAULT, check(m))
    m.op_refuses(errno.EINVAL, check(m, iova=IOVA + PAGE))  # the first page decides


def test_check_map_of_another_drivers_page_table(m: Mock) -> None:  # mock-device 5.2 row 2
    m.find(m.auto, HwptPaging).domain = ExtentDomain(0x1000)
    m.op_refuses(errno.EINVAL, check(m))


def test_pages_moved_under_a_mapping(m: Mock) -> None:  # mock-device 5.2: identity, not contents
    m.map(m.ioas_id, IOVA, 4 * PAGE)
    m.proc.unmap(BUFFER + PAGE, 1)
    m.host.map(BUFFER + PAGE, 1)
    m.op_refuses(errno.EINVAL, check(m))
    m.op(check(m, length=PAGE))


def test_check_refs(m: Mock) -> None:  # mock-device 5.3
    refs = t.test_md_check_refs
    for wrong in ({"length": 1}, {"uptr": BUFFER + 1}, {"uptr": 2**64 - PAGE, "length": 2 * PAGE}):
        m.op_refuses(errno.EINVAL, refs(**{"uptr": BUFFER, "length": PAGE, **wrong}))
    m.op_refuses(errno.EFAULT, refs(uptr=0xDEAD_0000, length=PAGE))
    m.op(refs(uptr=BUFFER, length=4 * PAGE))
    m.map(m.ioas_id, IOVA, 2 * PAGE)
    m.map(m.ioas_id, IOVA + 0x100000, 2 * PAGE)
    m.op(refs(uptr=BUFFER, length=2 * PAGE, refs=2))
    m.op_refuses(errno.EIO, refs(uptr=BUFFER, length=3 * PAGE, refs=2))


@pytest.mark.parametrize(("limit", "number"), [(0, errno.EINVAL), (11, errno.EINVAL), (12, 0)])
def test_temp_memory_limit(m: Mock, limit: int, number: int) -> None:  # mock-device 5.5
    if number:
        m.op_refuses(number, t.test_set_temp_memory_limit(id=99, limit=limit))
    else:
        m.op(t.test_set_temp_memory_limit(id=99, limit=limit))


def test_marking_dirty_pages(m: Mock) -> None:  # mock-device 5.4
    hwpt = m.hwpt(DIRTY)
    m.map(m.ioas_id, IOVA, 8 * PAGE)

    def mark(**fields: int) -> t.test_dirty:
        wanted = {"id": hwpt, "iova": IOVA, "length": 16 * PAGE, "page_size": PAGE, "uptr": ARRAY, **fields}
        return t.test_dirty(**wanted)

    for wrong in ({"page_size": 0}, {"length": 0}, {"iova": 1}, {"length": PAGE + 1}, {"uptr": 0}):
        m.op_refuses(errno.EINVAL, mark(id=99, **wrong))
    m.op_refuses(errno.EOVERFLOW, mark(id=99, length=((16 << 23) + 1) * PAGE))
    m.op_refuses(errno.ENOENT, mark(id=99))
    m.op_refuses(errno.EINVAL, mark())  # not enabled
    m.do(u.iommu_hwpt_set_dirty_tracking(hwpt_id=hwpt, flags=1))
    m.op_refuses(errno.EFAULT, mark(uptr=0xDEAD_0000))
    m.host.poke(ARRAY, b"\x03\x81")
    assert m.op(mark()).out_nr_dirty == 4  # two of them on addresses nothing is mapped at
    m.host.poke(ARRAY, bytes(8))
    get = u.iommu_hwpt_get_dirty_bitmap(hwpt_id=hwpt, iova=IOVA, length=8 * PAGE, page_size=PAGE, data=ARRAY)
    m.do(get)
    assert bytes(m.host.peek(ARRAY, 8)) == b"\x03" + bytes(7)
