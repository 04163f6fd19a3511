"""The command tables against core 1.4, vfio-compat 2 and devices 11, typed in by hand."""

from __future__ import annotations

import pytest

from iommufd.uapi import iommufd, iommufd_test, releases, vfio
from iommufd.uapi.commands import BY_NAME, BY_NUMBER, COMMANDS
from iommufd.uapi.vfio import commands as vfio_commands

# core 1.4: name, nr, min, full
CORE_1_4 = """
DESTROY 0x80 8 8
IOAS_ALLOC 0x81 12 12
IOAS_ALLOW_IOVAS 0x82 24 24
IOAS_COPY 0x83 40 40
IOAS_IOVA_RANGES 0x84 32 32
IOAS_MAP 0x85 40 40
IOAS_UNMAP 0x86 24 24
OPTION 0x87 24 24
VFIO_IOAS 0x88 12 12
HWPT_ALLOC 0x89 24 48
GET_HW_INFO 0x8a 32 40
HWPT_SET_DIRTY_TRACKING 0x8b 16 16
HWPT_GET_DIRTY_BITMAP 0x8c 48 48
HWPT_INVALIDATE 0x8d 32 32
FAULT_QUEUE_ALLOC 0x8e 16 16
IOAS_MAP_FILE 0x8f 40 40
VIOMMU_ALLOC 0x90 24 40
VDEVICE_ALLOC 0x91 24 24
IOAS_CHANGE_PROCESS 0x92 8 8
VEVENTQ_ALLOC 0x93 28 32
HW_QUEUE_ALLOC 0x94 40 40
IOAS_NOIOMMU_GET_PA 0x95 40 40
TEST_CMD 0xa0 68 72
"""
ROWS = [(n, int(nr, 16), int(low), int(full)) for n, nr, low, full in map(str.split, CORE_1_4.split("\n")[1:-1])]


@pytest.mark.parametrize(("name", "nr", "minimum", "full"), ROWS)
def test_command(name: str, nr: int, minimum: int, full: int) -> None:
    command = BY_NAME[f"IOMMU_{name}"]
    assert BY_NUMBER[0x3B00 | nr] is command
    assert command.nr == nr
    assert (command.minimum, command.struct.SIZE) == (minimum, full)
    assert command.struct.FIELDS[0].name == "size"
    assert command.since == command.struct.SINCE
    assert command.struct.size_in(command.since) >= command.minimum


def test_there_are_no_other_commands() -> None:
    assert [c.nr for c in COMMANDS] == [nr for _, nr, _, _ in ROWS]
    numbers = {n for n, v in vars(iommufd).items() if n.startswith("IOMMU_") and isinstance(v, int) and v >> 8 == 0x3B}
    assert numbers | {"IOMMU_TEST_CMD"} == BY_NAME.keys()


def test_vfio_numbers() -> None:
    """vfio-compat 2 and devices 11."""
    container = {c.name: c.number for c in vfio_commands.CONTAINER}
    assert container == {
        "VFIO_GET_API_VERSION": 0x3B64,
        "VFIO_CHECK_EXTENSION": 0x3B65,
        "VFIO_SET_IOMMU": 0x3B66,
        "VFIO_IOMMU_GET_INFO": 0x3B70,
        "VFIO_IOMMU_MAP_DMA": 0x3B71,
        "VFIO_IOMMU_UNMAP_DMA": 0x3B72,
        "VFIO_IOMMU_ENABLE": 0x3B73,
        "VFIO_IOMMU_DISABLE": 0x3B74,
        "VFIO_IOMMU_DIRTY_PAGES": 0x3B75,
    }
    device = {c.name: c.number for c in vfio_commands.DEVICE}
    assert device["VFIO_DEVICE_BIND_IOMMUFD"] == 0x3B76
    assert device["VFIO_DEVICE_ATTACH_IOMMUFD_PT"] == 0x3B77
    assert device["VFIO_DEVICE_DETACH_IOMMUFD_PT"] == 0x3B78


@pytest.mark.parametrize("table", [vfio_commands.CONTAINER, vfio_commands.GROUP, vfio_commands.DEVICE])
def test_vfio_tables(table: tuple[vfio_commands.VfioCommand, ...]) -> None:
    assert len({c.number for c in table}) == len(table)
    for command in table:
        assert (command.struct is None) == (command.argument != "struct")
        if command.struct is not None:
            assert command.struct.FIELDS[0].name == "argsz"


def test_younger_values_exist_and_are_younger_than_iommufd() -> None:
    for name, since in releases.VALUES.items():
        assert hasattr(iommufd, name) or hasattr(vfio, name)
        assert (6, 2) < since <= (7, 3)


# mock device 1.1: op, name, members of the arm, ! marks those the op gives back
MOCK_1_1 = """
1 ADD_RESERVED | 16 start u64, 24 length u64
2 MOCK_DOMAIN | 16 out_stdev_id u32, 20 out_hwpt_id u32, 24 out_idev_id u32 | yes
3 MD_CHECK_MAP | 16 iova u64, 24 length u64, 32 uptr u64
4 MD_CHECK_REFS | 16 length u64, 24 uptr u64, 32 refs u32
5 CREATE_ACCESS | 16 out_access_fd u32, 20 flags u32 | yes
6 DESTROY_ACCESS_PAGES | 16 access_pages_id u32
7 ACCESS_PAGES | 16 flags u32, 20 out_access_pages_id u32, 24 iova u64, 32 length u64, 40 uptr u64 | yes
8 ACCESS_RW | 16 iova u64, 24 length u64, 32 uptr u64, 40 flags u32
9 SET_TEMP_MEMORY_LIMIT | 16 limit u32
10 MOCK_DOMAIN_REPLACE | 16 pt_id u32 | yes
11 ACCESS_REPLACE_IOAS | 16 ioas_id u32
12 MOCK_DOMAIN_FLAGS | 16 out_stdev_id u32, 20 out_hwpt_id u32, 24 out_idev_id u32, 28 dev_flags u32 | yes
13 DIRTY | 16 flags u32, 24 iova u64, 32 length u64, 40 page_size u64, 48 uptr u64, 56 out_nr_dirty u64 | yes
14 MD_CHECK_IOTLB | 16 id u32, 20 iotlb u32
15 TRIGGER_IOPF | 16 dev_id u32, 20 pasid u32, 24 grpid u32, 28 perm u32, 32 addr u64
16 DEV_CHECK_CACHE | 16 id u32, 20 cache u32
17 TRIGGER_VEVENT | 16 dev_id u32
18 PASID_ATTACH | 16 pasid u32, 20 pt_id u32 | yes
19 PASID_REPLACE | 16 pasid u32, 20 pt_id u32 | yes
20 PASID_DETACH | 16 pasid u32
21 PASID_CHECK_HWPT | 16 pasid u32, 20 hwpt_id u32
22 DMABUF_GET | 16 length u32, 20 open_flags u32
23 DMABUF_REVOKE | 16 dmabuf_fd s32, 20 revoked u32
"""
OPS = [[part.strip() for part in line.split("|")] for line in MOCK_1_1.split("\n")[1:-1]]


@pytest.mark.parametrize("row", OPS, ids=lambda row: row[0])
def test_op_of_the_test_command(row: list[str]) -> None:
    number, name = row[0].split()
    op = getattr(iommufd_test, f"IOMMU_TEST_OP_{name}")
    assert op == int(number)
    arm = iommufd_test.ARMS[op]
    head = [(0, "size", "u32"), (4, "op", "u32"), (8, "id", "u32"), (12, "__reserved", "u32")]
    expected = [(int(at), member, ctype) for at, member, ctype in (m.split() for m in row[1].split(", "))]
    assert [(f.offset, f.c_name, f.ctype.name) for f in arm.FIELDS] == [*head, *expected, (64, "last", "u32")]
    assert arm.SIZE == 72
    assert issubclass(arm, iommufd_test.iommu_test_cmd)
    assert (op in iommufd_test.RESPONDS) == (len(row) == 3)


def test_there_are_no_other_ops() -> None:
    assert list(iommufd_test.ARMS) == list(range(1, 24))
    assert [int(op) for op in iommufd_test.iommu_test_op] == list(range(1, 24))


def test_the_head_alone_leaves_the_arm_out() -> None:
    raw = iommufd_test.test_access_rw(size=72, op=8, id=3, iova=0x1000, length=10, uptr=0x7000, flags=5).pack()
    assert iommufd_test.iommu_test_cmd.unpack(raw) == iommufd_test.iommu_test_cmd(size=72, op=8, id=3)
    assert iommufd_test.ARMS[8].unpack(raw).pack() == raw


# mock device 1.2
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MOCK_APERTURE_START", 0x1000000),
        ("MOCK_APERTURE_LAST", 0x7FFFFFFF),
        ("MOCK_PAGE_SIZE", 2048),
        ("MOCK_HUGE_PAGE_SIZE", 1048576),
        ("MOCK_IOMMUPT_DEFAULT", 0),
        ("MOCK_IOMMUPT_HUGE", 1),
        ("MOCK_FLAGS_ACCESS_WRITE", 1),
        ("MOCK_FLAGS_ACCESS_SYZ", 0x10000),
        ("MOCK_ACCESS_RW_WRITE", 1),
        ("MOCK_ACCESS_RW_SLOW_PATH", 4),
        ("MOCK_FLAGS_ACCESS_CREATE_NEEDS_PIN_PAGES", 1),
        ("MOCK_FLAGS_DEVICE_NO_DIRTY", 1),
        ("MOCK_FLAGS_DEVICE_PASID", 4),
        ("MOCK_NESTED_DOMAIN_IOTLB_ID_MAX", 3),
        ("MOCK_NESTED_DOMAIN_IOTLB_NUM", 4),
        ("MOCK_DEV_CACHE_ID_MAX", 3),
        ("MOCK_DEV_CACHE_NUM", 4),
        ("IOMMU_TEST_PASID_RESERVED", 1024),
        ("MOCK_PASID_WIDTH", 20),
        ("IOMMU_HW_INFO_TYPE_SELFTEST", 0xFEEDBEEF),
        ("IOMMU_HW_INFO_SELFTEST_REGVAL", 0xDEADBEEF),
        ("IOMMU_HWPT_DATA_SELFTEST", 0xDEAD),
        ("IOMMU_TEST_IOTLB_DEFAULT", 0x0BADBEEF),
        ("IOMMU_TEST_DEV_CACHE_DEFAULT", 0x00BADDAD),
        ("IOMMU_HWPT_INVALIDATE_DATA_SELFTEST", 0xDEADBEEF),
        ("IOMMU_HWPT_INVALIDATE_DATA_SELFTEST_INVALID", 0xDADBEEF),
        ("IOMMU_VIOMMU_TYPE_SELFTEST", 0xDEADBEEF),
        ("IOMMU_VIOMMU_INVALIDATE_DATA_SELFTEST", 0xDEADBEEF),
        ("IOMMU_HW_QUEUE_TYPE_SELFTEST", 0xDEADBEEF),
        ("IOMMU_VEVENTQ_TYPE_SELFTEST", 0xBEEFBEEF),
        ("IOMMU_TEST_INVALIDATE_FLAG_ALL", 1),
        ("IOMMU_TEST_HW_QUEUE_MAX", 2),
    ],
)
def test_constant_of_the_mock_device(name: str, value: int) -> None:
    assert getattr(iommufd_test, name) == value


# mock device 1.2, second table
@pytest.mark.parametrize(
    ("name", "size", "members"),
    [
        ("iommu_test_hw_info", 8, "0 flags, 4 test_reg"),
        ("iommu_hwpt_selftest", 8, "0 iotlb, 4 pagetable_type"),
        ("iommu_hwpt_invalidate_selftest", 8, "0 flags, 4 iotlb_id"),
        ("iommu_viommu_selftest", 24, "0 in_data, 4 out_data, 8 out_mmap_offset, 16 out_mmap_length"),
        ("iommu_viommu_invalidate_selftest", 12, "0 flags, 4 vdev_id, 8 cache_id"),
        ("iommu_viommu_event_selftest", 4, "0 virt_id"),
    ],
)
def test_struct_of_the_mock_device(name: str, size: int, members: str) -> None:
    cls = getattr(iommufd_test, name)
    assert size == cls.SIZE
    assert ", ".join(f"{f.offset} {f.c_name}" for f in cls.FIELDS) == members
