"""The text of a call, as --explain, --trace and decode show it."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iommufd.errors import errno_name
from iommufd.observe.format import decoded, show_bytes, show_call, struct_of
from iommufd.observe.pointers import POINTERS, elements
from iommufd.observe.record import KINDS, Memory, Record
from iommufd.uapi import iommufd as u
from iommufd.uapi import iommufd_test as t
from iommufd.uapi import vfio as v
from iommufd.uapi.commands import COMMANDS
from iommufd.uapi.declare import Struct
from iommufd.uapi.vfio import commands as vfio


def ioctl(number: int, value: Struct | None = None, out: Struct | None = None, **more: Any) -> str:
    record = Record("ioctl")
    record.fd, record.number, record.arg = 3, number, 0x7FFD0010
    if value is not None:
        record.raw, record.size = value.pack(), value.SIZE
    if out is not None:
        record.out = out.pack()
    for name, given_value in more.items():
        setattr(record, name, given_value)
    if record.errno:
        record.result = -1
    return show_call(record)


MAP = u.iommu_ioas_map(size=40, flags=7, ioas_id=1, user_va=0x7F0E5C000000, length=4096, iova=0x1000)


def test_a_refused_map() -> None:
    text = ioctl(u.IOMMU_IOAS_MAP, MAP, errno=errno.EEXIST, why="IOVA 0x1000 overlaps the area [0x0, 0x1fff]")
    assert text == (
        "ioctl(3, IOMMU_IOAS_MAP, {size=40, flags=FIXED_IOVA|WRITEABLE|READABLE, ioas_id=1, user_va=0x7f0e5c000000, "
        "length=4096, iova=0x1000}) = -1 EEXIST (File exists)  # IOVA 0x1000 overlaps the area [0x0, 0x1fff]"
    )


def test_what_comes_back_stands_behind_an_arrow() -> None:
    alloc = u.iommu_ioas_alloc(size=12)
    assert ioctl(u.IOMMU_IOAS_ALLOC, alloc, u.iommu_ioas_alloc(size=12, out_ioas_id=2)) == (
        "ioctl(3, IOMMU_IOAS_ALLOC, {size=12, flags=0} => {out_ioas_id=2}) = 0"
    )


def test_a_member_given_and_returned_is_repeated_only_when_it_changed() -> None:
    unmap = u.iommu_ioas_unmap(size=24, ioas_id=1, iova=0, length=2**64 - 1)
    done = u.iommu_ioas_unmap(size=24, ioas_id=1, iova=0, length=8192)
    assert ioctl(u.IOMMU_IOAS_UNMAP, unmap, done) == (
        "ioctl(3, IOMMU_IOAS_UNMAP, {size=24, ioas_id=1, iova=0x0, length=0xffffffffffffffff} => {length=8192}) = 0"
    )
    assert ioctl(u.IOMMU_IOAS_UNMAP, done, done) == (
        "ioctl(3, IOMMU_IOAS_UNMAP, {size=24, ioas_id=1, iova=0x0, length=8192}) = 0"
    )


def test_reserved_members_appear_when_they_are_wrong() -> None:
    wrong = u.iommu_option(size=24, option_id=1, op=1, reserved=5, object_id=2)
    assert "op=GET, __reserved=5, object_id=2" in ioctl(u.IOMMU_OPTION, wrong, errno=errno.EOPNOTSUPP)
    assert "reserved" not in ioctl(u.IOMMU_OPTION, u.iommu_option(size=24))


def test_a_shorter_struct_of_an_older_program() -> None:
    whole = u.iommu_hwpt_alloc(size=24, flags=8, dev_id=1, pt_id=2)
    text = ioctl(u.IOMMU_HWPT_ALLOC, raw=whole.pack()[:24], size=24)
    assert text == "ioctl(3, IOMMU_HWPT_ALLOC, {size=24, flags=PASID, dev_id=1, pt_id=2}) = 0"


def test_before_the_struct_was_read() -> None:
    assert ioctl(u.IOMMU_IOAS_MAP, errno=errno.EFAULT) == (
        "ioctl(3, IOMMU_IOAS_MAP, 0x7ffd0010) = -1 EFAULT (Bad address)"
    )
    assert ioctl(u.IOMMU_IOAS_MAP, size=8, errno=errno.EINVAL) == (
        "ioctl(3, IOMMU_IOAS_MAP, {size=8}) = -1 EINVAL (Invalid argument)"
    )


def test_a_number_nobody_knows() -> None:
    assert ioctl(0x3B99, errno=errno.ENOTTY) == (
        "ioctl(3, 0x3b99, 0x7ffd0010) = -1 ENOTTY (Inappropriate ioctl for device)"
    )


def test_the_test_command_shows_the_arm_of_its_op() -> None:
    rw = t.test_access_rw(size=72, op=8, id=3, iova=0x1000000, length=16, uptr=0x7F00, flags=5)
    assert ioctl(t.IOMMU_TEST_CMD, rw) == (
        "ioctl(3, IOMMU_TEST_CMD, {size=72, op=ACCESS_RW, id=3, iova=0x1000000, length=16, uptr=0x7f00, "
        "flags=WRITE|SLOW_PATH}) = 0"
    )
    check = t.test_md_check_iotlb(size=72, op=14, id=9, arm_id=3, iotlb=0xBADBEEF)
    assert "op=MD_CHECK_IOTLB, id=9, id=3, iotlb=0xbadbeef}" in ioctl(t.IOMMU_TEST_CMD, check)
    assert ioctl(t.IOMMU_TEST_CMD, t.iommu_test_cmd(size=72, op=77)).endswith("{size=72, op=0x4d, id=0}) = 0")


def test_memory_behind_a_pointer_replaces_the_address() -> None:
    allow = u.iommu_ioas_allow_iovas(size=24, ioas_id=1, num_iovas=2, allowed_iovas=0x7F00)
    data = u.iommu_iova_range(start=0, last=0xFFF).pack() + u.iommu_iova_range(start=0x2000, last=0x2FFF).pack()
    memory = (Memory("allowed_iovas", 0x7F00, 32, data),)
    assert ioctl(u.IOMMU_IOAS_ALLOW_IOVAS, allow, memory=memory) == (
        "ioctl(3, IOMMU_IOAS_ALLOW_IOVAS, {size=24, ioas_id=1, num_iovas=2, "
        "allowed_iovas=[{start=0x0, last=0xfff}, {start=0x2000, last=0x2fff}]}) = 0"
    )


def test_long_arrays_are_cut() -> None:
    allow = u.iommu_ioas_allow_iovas(size=24, num_iovas=20, allowed_iovas=0x7F00)
    memory = (Memory("allowed_iovas", 0x7F00, 320, bytes(320)),)
    text = ioctl(u.IOMMU_IOAS_ALLOW_IOVAS, allow, memory=memory)
    assert text.count("{start=0x0") == 8
    assert text.endswith("}, ...]}) = 0")


@pytest.mark.parametrize(
    ("data_type", "value", "shown"),
    [
        (1, u.iommu_hwpt_vtd_s1(flags=5, pgtbl_addr=0x1000, addr_width=48), "{flags=SRE|WPE, pgtbl_addr=0x1000, addr"),
        (2, u.iommu_hwpt_arm_smmuv3(ste=(1, 2)), "{ste=[0x1, 0x2]}"),
        (0xDEAD, t.iommu_hwpt_selftest(iotlb=0xBADBEEF), "{iotlb=0xbadbeef, pagetable_type=0}"),
        (9, t.iommu_hwpt_selftest(iotlb=1), "<8 bytes: 0100000000000000>"),
    ],
)
def test_vendor_data_is_decoded(data_type: int, value: Struct, shown: str) -> None:
    alloc = u.iommu_hwpt_alloc(size=48, data_type=data_type, data_len=value.SIZE, data_uptr=0x7F00)
    memory = (Memory("data_uptr", 0x7F00, value.SIZE, value.pack()),)
    assert f"data_uptr={shown}" in ioctl(u.IOMMU_HWPT_ALLOC, alloc, memory=memory)


def test_hardware_info_is_decoded_by_the_type_returned() -> None:
    ask = u.iommu_hw_info(size=40, dev_id=1, data_len=24, data_uptr=0x7F00)
    answer = u.iommu_hw_info(size=40, dev_id=1, data_len=24, data_uptr=0x7F00, out_data_type=1, out_capabilities=9)
    vtd = u.iommu_hw_info_vtd(cap_reg=0xC9, ecap_reg=0xF4)
    text = ioctl(u.IOMMU_GET_HW_INFO, ask, answer, out_memory=(Memory("data_uptr", 0x7F00, 24, vtd.pack()),))
    assert "=> {data_uptr={flags=0, cap_reg=0xc9, ecap_reg=0xf4}, out_data_type=INTEL_VTD, " in text
    assert text.endswith("out_max_pasid_log2=0, out_capabilities=DIRTY_TRACKING|PCI_ATS_NOT_SUPPORTED}) = 0")


def test_vfio_numbers_mean_what_the_file_means() -> None:
    info = v.vfio_iommu_type1_info(argsz=24)
    assert ioctl(0x3B70, info).startswith("ioctl(3, VFIO_IOMMU_GET_INFO, {argsz=24})")
    reset = v.vfio_pci_hot_reset_info(argsz=12)
    assert ioctl(0x3B70, reset, kind="device").startswith("ioctl(3, VFIO_DEVICE_GET_PCI_HOT_RESET_INFO, {argsz=12})")
    assert ioctl(v.VFIO_CHECK_EXTENSION, arg=3, result=1) == "ioctl(3, VFIO_CHECK_EXTENSION, VFIO_TYPE1v2_IOMMU) = 1"
    assert ioctl(v.VFIO_CHECK_EXTENSION, arg=77) == "ioctl(3, VFIO_CHECK_EXTENSION, 0x4d) = 0"
    assert ioctl(v.VFIO_GET_API_VERSION) == "ioctl(3, VFIO_GET_API_VERSION) = 0"
    assert ioctl(v.VFIO_GROUP_SET_CONTAINER, kind="group", raw=bytes([9, 0, 0, 0])).startswith(
        "ioctl(3, VFIO_GROUP_SET_CONTAINER, [9])"
    )
    assert '"0000:00:01.0"' in ioctl(v.VFIO_GROUP_GET_DEVICE_FD, kind="group", raw=b"0000:00:01.0\0", result=5)
    assert r'"a\nb\""' in ioctl(v.VFIO_GROUP_GET_DEVICE_FD, kind="group", raw=b'a\nb"')


def other(call: str, **more: Any) -> str:
    record = Record(call)
    record.fd = 3
    for name, value in more.items():
        setattr(record, name, value)
    return show_call(record)


def test_the_other_calls() -> None:
    record = Record("open")
    record.path, record.flags, record.result = "/dev/iommu", 0o2000002, 3
    assert show_call(record) == 'open("/dev/iommu", O_RDWR|O_CLOEXEC) = 3'
    assert other("close") == "close(3) = 0"
    assert other("mmap", size=4096, flags=3, offset=0x1000, result=BASE) == (
        "mmap(NULL, 4096, PROT_READ|PROT_WRITE, MAP_SHARED, 3, 0x1000) = 0x7f0000000000"
    )
    assert other("read", arg=0x7F00, size=40, errno=errno.EAGAIN) == (
        "read(3, 0x7f00, 40) = -1 EAGAIN (Resource temporarily unavailable)"
    )


BASE = 0x7F0000000000


def test_what_is_read_from_and_written_to_queues() -> None:
    fault = u.iommu_hwpt_pgfault(flags=2, dev_id=3, perm=1, addr=0x2000, cookie=9)
    assert other("read", kind="fault", raw=fault.pack(), size=400, result=40) == (
        "read(3, [{flags=LAST_PAGE, dev_id=3, pasid=0, grpid=0, perm=READ, addr=0x2000, length=0, cookie=9}], 400) = 40"
    )
    answer = u.iommu_hwpt_page_response(cookie=9, code=1)
    assert other("write", kind="fault", raw=answer.pack(), size=8, result=8) == (
        "write(3, [{cookie=9, code=INVALID}], 8) = 8"
    )
    event = u.iommufd_vevent_header(sequence=4).pack() + bytes([0x34, 0x12, 0, 0])
    assert other("read", kind="veventq", raw=event, size=64, result=12) == (
        "read(3, [{flags=0, sequence=4}, <4 bytes: 34120000>], 64) = 12"
    )


def test_a_file_without_known_descriptor_is_named_by_kind_and_serial_number() -> None:
    assert ioctl(u.IOMMU_DESTROY, u.iommu_destroy(size=8, id=1), fd=None, file=2) == (
        "ioctl(iommu#2, IOMMU_DESTROY, {size=8, id=1}) = 0"
    )


def test_errno_names_are_those_of_the_manuals() -> None:
    assert [errno_name(n) for n in (95, 35, 11, 77, 99999)] == ["EOPNOTSUPP", "EDEADLK", "EAGAIN", "EBADFD", "99999"]


def test_bytes() -> None:
    assert show_bytes(bytes(4)) == "<4 bytes: 00000000>"
    assert show_bytes(bytes(100)) == f"<100 bytes: {'00' * 32}...>"
    assert show_bytes(b"\1", 9) == "<9 bytes: 01...>"


def test_decoded_members_for_machines() -> None:
    assert decoded(MAP) == {
        "size": 40,
        "flags": "FIXED_IOVA|WRITEABLE|READABLE",
        "ioas_id": 1,
        "__reserved": 0,
        "user_va": "0x7f0e5c000000",
        "length": 4096,
        "iova": "0x1000",
    }


NUMBERS = [c.number for c in COMMANDS] + [c.number for c in (*vfio.CONTAINER, *vfio.GROUP, *vfio.DEVICE)]


@given(
    st.sampled_from(KINDS),
    st.sampled_from(NUMBERS) | st.integers(0, 2**32 - 1),
    st.sampled_from(["iommu", "container", "group", "device", "fault", "veventq", "file"]),
    st.binary(max_size=100),
    st.binary(max_size=100),
    st.integers(0, 2**64 - 1),
    st.integers(0, 200),
)
def test_any_bytes_give_one_line(
    call: str, number: int, kind: str, raw: bytes, out: bytes, arg: int, error: int
) -> None:
    record = Record(call)
    record.number, record.kind, record.raw, record.out, record.arg = number, kind, raw, out, arg
    record.errno, record.size, record.flags = error, len(raw), arg & 0xFFFFFFFF
    record.path = record.why = raw.decode("latin1")
    cls = struct_of(number, kind, raw)
    if cls in POINTERS and raw:
        record.memory = (Memory(POINTERS[cls].field, arg, len(out), out),)
    text = show_call(record)
    assert "\n" not in text
    assert text.startswith(f"{call}(")


@given(st.sampled_from(list(POINTERS)), st.data())
def test_pointer_rules_hold_for_any_struct(cls: type[Struct], data: st.DataObject) -> None:
    value = cls.unpack(data.draw(st.binary(min_size=cls.SIZE, max_size=cls.SIZE)))
    pointer = POINTERS[cls]
    assert pointer.field in [f.name for f in cls.FIELDS]
    assert pointer.size(value) >= 0
    assert pointer.read(value) or pointer.written(value)
    memory = data.draw(st.binary(max_size=64))
    if pointer.stride(value) or pointer.element(value) is None or not memory:
        found = elements(pointer, value, memory)
        stride = pointer.stride(value)
        assert found is None or not stride or len(found) == -(-len(memory) // stride)
