"""``IOMMU_TEST_CMD`` and its ops: the structs and flags of what a program asks of the mock hardware.

The C struct is a head (size, op, id), a union of 48 bytes at 16, and ``last`` at 64. Here each op has a class of its
own with head and tail inherited from :class:`iommu_test_cmd`, all 72 bytes long; :data:`ARMS` leads from op to class.
The docstring of each shows its arm of the union. Where an arm has a member ``id`` of its own it is the attribute
``arm_id``.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

from iommufd.uapi.declare import IO, Struct, field, s32, struct, u32, u64
from iommufd.uapi.iommufd.faults import iommu_hwpt_pgfault_perm
from iommufd.uapi.iommufd.numbers import IOMMUFD_TYPE

IOMMU_TEST_CMD = IO(IOMMUFD_TYPE, 0x80 + 32)

IOMMU_TEST_OP_ADD_RESERVED = 1
IOMMU_TEST_OP_MOCK_DOMAIN = 2
IOMMU_TEST_OP_MD_CHECK_MAP = 3
IOMMU_TEST_OP_MD_CHECK_REFS = 4
IOMMU_TEST_OP_CREATE_ACCESS = 5
IOMMU_TEST_OP_DESTROY_ACCESS_PAGES = 6
IOMMU_TEST_OP_ACCESS_PAGES = 7
IOMMU_TEST_OP_ACCESS_RW = 8
IOMMU_TEST_OP_SET_TEMP_MEMORY_LIMIT = 9
IOMMU_TEST_OP_MOCK_DOMAIN_REPLACE = 10
IOMMU_TEST_OP_ACCESS_REPLACE_IOAS = 11
IOMMU_TEST_OP_MOCK_DOMAIN_FLAGS = 12
IOMMU_TEST_OP_DIRTY = 13
IOMMU_TEST_OP_MD_CHECK_IOTLB = 14
IOMMU_TEST_OP_TRIGGER_IOPF = 15
IOMMU_TEST_OP_DEV_CHECK_CACHE = 16
IOMMU_TEST_OP_TRIGGER_VEVENT = 17
IOMMU_TEST_OP_PASID_ATTACH = 18
IOMMU_TEST_OP_PASID_REPLACE = 19
IOMMU_TEST_OP_PASID_DETACH = 20
IOMMU_TEST_OP_PASID_CHECK_HWPT = 21
IOMMU_TEST_OP_DMABUF_GET = 22
IOMMU_TEST_OP_DMABUF_REVOKE = 23


class iommu_test_op(IntEnum):
    """Values of ``op``."""

    ADD_RESERVED = IOMMU_TEST_OP_ADD_RESERVED
    MOCK_DOMAIN = IOMMU_TEST_OP_MOCK_DOMAIN
    MD_CHECK_MAP = IOMMU_TEST_OP_MD_CHECK_MAP
    MD_CHECK_REFS = IOMMU_TEST_OP_MD_CHECK_REFS
    CREATE_ACCESS = IOMMU_TEST_OP_CREATE_ACCESS
    DESTROY_ACCESS_PAGES = IOMMU_TEST_OP_DESTROY_ACCESS_PAGES
    ACCESS_PAGES = IOMMU_TEST_OP_ACCESS_PAGES
    ACCESS_RW = IOMMU_TEST_OP_ACCESS_RW
    SET_TEMP_MEMORY_LIMIT = IOMMU_TEST_OP_SET_TEMP_MEMORY_LIMIT
    MOCK_DOMAIN_REPLACE = IOMMU_TEST_OP_MOCK_DOMAIN_REPLACE
    ACCESS_REPLACE_IOAS = IOMMU_TEST_OP_ACCESS_REPLACE_IOAS
    MOCK_DOMAIN_FLAGS = IOMMU_TEST_OP_MOCK_DOMAIN_FLAGS
    DIRTY = IOMMU_TEST_OP_DIRTY
    MD_CHECK_IOTLB = IOMMU_TEST_OP_MD_CHECK_IOTLB
    TRIGGER_IOPF = IOMMU_TEST_OP_TRIGGER_IOPF
    DEV_CHECK_CACHE = IOMMU_TEST_OP_DEV_CHECK_CACHE
    TRIGGER_VEVENT = IOMMU_TEST_OP_TRIGGER_VEVENT
    PASID_ATTACH = IOMMU_TEST_OP_PASID_ATTACH
    PASID_REPLACE = IOMMU_TEST_OP_PASID_REPLACE
    PASID_DETACH = IOMMU_TEST_OP_PASID_DETACH
    PASID_CHECK_HWPT = IOMMU_TEST_OP_PASID_CHECK_HWPT
    DMABUF_GET = IOMMU_TEST_OP_DMABUF_GET
    DMABUF_REVOKE = IOMMU_TEST_OP_DMABUF_REVOKE


MOCK_FLAGS_ACCESS_WRITE = 1 << 0
MOCK_FLAGS_ACCESS_SYZ = 1 << 16
MOCK_ACCESS_RW_WRITE = 1 << 0
MOCK_ACCESS_RW_SLOW_PATH = 1 << 2
MOCK_FLAGS_ACCESS_CREATE_NEEDS_PIN_PAGES = 1 << 0
MOCK_FLAGS_DEVICE_NO_DIRTY = 1 << 0
MOCK_FLAGS_DEVICE_PASID = 1 << 2


class mock_flags_access(IntFlag):
    """Flags of ACCESS_PAGES."""

    WRITE = MOCK_FLAGS_ACCESS_WRITE
    SYZ = MOCK_FLAGS_ACCESS_SYZ


class mock_access_rw_flags(IntFlag):
    """Flags of ACCESS_RW."""

    WRITE = MOCK_ACCESS_RW_WRITE
    SLOW_PATH = MOCK_ACCESS_RW_SLOW_PATH


class mock_flags_access_create(IntFlag):
    """Flags of CREATE_ACCESS."""

    NEEDS_PIN_PAGES = MOCK_FLAGS_ACCESS_CREATE_NEEDS_PIN_PAGES


class mock_flags_device(IntFlag):
    """Flags of MOCK_DOMAIN_FLAGS."""

    NO_DIRTY = MOCK_FLAGS_DEVICE_NO_DIRTY
    PASID = MOCK_FLAGS_DEVICE_PASID


@struct(since="6.2", size=72)
class iommu_test_cmd(Struct):
    """The head every op shares; the union at 16 is not part of it.

    ::

        struct iommu_test_cmd {
            __u32 size;
            __u32 op;
            __u32 id;
            __u32 __reserved;
            __u32 last;
        };
    """

    size: u32
    op: u32 = field(symbols=iommu_test_op)
    id: u32
    reserved: u32
    last: u32 = field(offset=64)


@struct(since="6.2", size=72)
class test_add_reserved(iommu_test_cmd):
    """Reserve the IOVA interval of ``length`` bytes at ``start`` in the IOAS ``id``.

    ::

        struct { __aligned_u64 start; __aligned_u64 length; } add_reserved;
    """

    start: u64 = field(offset=16)
    length: u64 = field(show="dec")


@struct(since="6.2", size=72)
class test_mock_domain(iommu_test_cmd):
    """Make a mock device and attach it to ``id`` (IOAS or HWPT).

    ::

        struct { __u32 out_stdev_id; __u32 out_hwpt_id; __u32 out_idev_id; } mock_domain;
    """

    out_stdev_id: u32 = field(offset=16)
    out_hwpt_id: u32
    out_idev_id: u32


@struct(since="6.2", size=72)
class test_md_check_map(iommu_test_cmd):
    """Compare what the HWPT ``id`` translates ``[iova, iova+length)`` to with the pages behind ``uptr``.

    ::

        struct { __aligned_u64 iova; __aligned_u64 length; __aligned_u64 uptr; } check_map;
    """

    iova: u64 = field(offset=16)
    length: u64 = field(show="dec")
    uptr: u64


@struct(since="6.2", size=72)
class test_md_check_refs(iommu_test_cmd):
    """Check that every page of ``[uptr, uptr+length)`` is pinned ``refs`` times.

    ::

        struct { __aligned_u64 length; __aligned_u64 uptr; __u32 refs; } check_refs;
    """

    length: u64 = field(offset=16, show="dec")
    uptr: u64
    refs: u32


@struct(since="6.2", size=72)
class test_create_access(iommu_test_cmd):
    """Make an access to the IOAS ``id`` and a descriptor for it.

    ::

        struct { __u32 out_access_fd; __u32 flags; } create_access;
    """

    out_access_fd: u32 = field(offset=16)
    flags: u32 = field(symbols=mock_flags_access_create)


@struct(since="6.2", size=72)
class test_destroy_access_pages(iommu_test_cmd):
    """Unpin what ACCESS_PAGES pinned.

    ::

        struct { __u32 access_pages_id; } destroy_access_pages;
    """

    access_pages_id: u32 = field(offset=16)


@struct(since="6.2", size=72)
class test_access_pages(iommu_test_cmd):
    """Pin ``[iova, iova+length)`` through the access ``id`` and compare with the pages behind ``uptr``.

    ::

        struct {
            __u32 flags;
            __u32 out_access_pages_id;
            __aligned_u64 iova;
            __aligned_u64 length;
            __aligned_u64 uptr;
        } access_pages;
    """

    flags: u32 = field(offset=16, symbols=mock_flags_access)
    out_access_pages_id: u32
    iova: u64
    length: u64 = field(show="dec")
    uptr: u64


@struct(since="6.2", size=72)
class test_access_rw(iommu_test_cmd):
    """Copy between ``uptr`` and the IOVA range through the access ``id``.

    ::

        struct { __aligned_u64 iova; __aligned_u64 length; __aligned_u64 uptr; __u32 flags; } access_rw;
    """

    iova: u64 = field(offset=16)
    length: u64 = field(show="dec")
    uptr: u64
    flags: u32 = field(symbols=mock_access_rw_flags)


@struct(since="6.2", size=72)
class test_set_temp_memory_limit(iommu_test_cmd):
    """Limit the temporary memory of pinning loops, so that small tests reach their edges.

    ::

        struct { __u32 limit; } memory_limit;
    """

    limit: u32 = field(offset=16)


@struct(since="6.6", size=72)
class test_mock_domain_replace(iommu_test_cmd):
    """Attach the mock device ``id`` to ``pt_id`` instead.

    ::

        struct { __u32 pt_id; } mock_domain_replace;
    """

    pt_id: u32 = field(offset=16, direction="inout")


@struct(since="6.6", size=72)
class test_access_replace_ioas(iommu_test_cmd):
    """Move the access ``id`` to ``ioas_id``.

    ::

        struct { __u32 ioas_id; } access_replace_ioas;
    """

    ioas_id: u32 = field(offset=16)


@struct(since="6.7", size=72)
class test_mock_domain_flags(iommu_test_cmd):
    """MOCK_DOMAIN with device flags.

    ::

        struct {
            __u32 out_stdev_id;
            __u32 out_hwpt_id;
            __u32 out_idev_id;
            __u32 dev_flags;
        } mock_domain_flags;
    """

    out_stdev_id: u32 = field(offset=16)
    out_hwpt_id: u32
    out_idev_id: u32
    dev_flags: u32 = field(symbols=mock_flags_device)


@struct(since="6.7", size=72)
class test_dirty(iommu_test_cmd):
    """Mark IOVAs of the HWPT ``id`` dirty from the bitmap at ``uptr``.

    ::

        struct {
            __u32 flags;
            __aligned_u64 iova;
            __aligned_u64 length;
            __aligned_u64 page_size;
            __aligned_u64 uptr;
            __aligned_u64 out_nr_dirty;
        } dirty;
    """

    flags: u32 = field(offset=16)
    iova: u64
    length: u64 = field(show="dec")
    page_size: u64 = field(show="dec")
    uptr: u64
    out_nr_dirty: u64 = field(show="dec")


@struct(since="6.8", size=72)
class test_md_check_iotlb(iommu_test_cmd):
    """Check one word of the nested HWPT ``id``.

    ::

        struct { __u32 id; __u32 iotlb; } check_iotlb;
    """

    arm_id: u32 = field(offset=16, c_name="id")
    iotlb: u32 = field(show="hex")


@struct(since="6.11", size=72)
class test_trigger_iopf(iommu_test_cmd):
    """Let the device ``dev_id`` send one page request.

    ::

        struct { __u32 dev_id; __u32 pasid; __u32 grpid; __u32 perm; __aligned_u64 addr; } trigger_iopf;
    """

    dev_id: u32 = field(offset=16)
    pasid: u32
    grpid: u32
    perm: u32 = field(symbols=iommu_hwpt_pgfault_perm)
    addr: u64


@struct(since="6.13", size=72)
class test_dev_check_cache(iommu_test_cmd):
    """Check one word of the mock device ``id``.

    ::

        struct { __u32 id; __u32 cache; } check_dev_cache;
    """

    arm_id: u32 = field(offset=16, c_name="id")
    cache: u32 = field(show="hex")


@struct(since="6.15", size=72)
class test_trigger_vevent(iommu_test_cmd):
    """Let the device ``dev_id`` report one virtual event.

    ::

        struct { __u32 dev_id; } trigger_vevent;
    """

    dev_id: u32 = field(offset=16)


@struct(since="6.15", size=72)
class test_pasid_attach(iommu_test_cmd):
    """Attach a PASID of the mock device ``id``.

    ::

        struct { __u32 pasid; __u32 pt_id; } pasid_attach;
    """

    pasid: u32 = field(offset=16)
    pt_id: u32 = field(direction="inout")


@struct(since="6.15", size=72)
class test_pasid_replace(iommu_test_cmd):
    """Attach a PASID of the mock device ``id`` to another page table.

    ::

        struct { __u32 pasid; __u32 pt_id; } pasid_replace;
    """

    pasid: u32 = field(offset=16)
    pt_id: u32 = field(direction="inout")


@struct(since="6.15", size=72)
class test_pasid_detach(iommu_test_cmd):
    """Detach a PASID of the mock device ``id``.

    ::

        struct { __u32 pasid; } pasid_detach;
    """

    pasid: u32 = field(offset=16)


@struct(since="6.15", size=72)
class test_pasid_check_hwpt(iommu_test_cmd):
    """Check which HWPT a PASID of the mock device ``id`` is attached to.

    ::

        struct { __u32 pasid; __u32 hwpt_id; } pasid_check;
    """

    pasid: u32 = field(offset=16)
    hwpt_id: u32


@struct(since="6.19", size=72)
class test_dmabuf_get(iommu_test_cmd):
    """Make a dma-buf of ``length`` bytes; the result is its descriptor.

    ::

        struct { __u32 length; __u32 open_flags; } dmabuf_get;
    """

    length: u32 = field(offset=16)
    open_flags: u32 = field(show="hex")


@struct(since="6.19", size=72)
class test_dmabuf_revoke(iommu_test_cmd):
    """Revoke (or restore) a dma-buf made by DMABUF_GET.

    ::

        struct { __s32 dmabuf_fd; __u32 revoked; } dmabuf_revoke;
    """

    dmabuf_fd: s32 = field(offset=16)
    revoked: u32


ARMS: dict[int, type[Struct]] = {
    IOMMU_TEST_OP_ADD_RESERVED: test_add_reserved,
    IOMMU_TEST_OP_MOCK_DOMAIN: test_mock_domain,
    IOMMU_TEST_OP_MD_CHECK_MAP: test_md_check_map,
    IOMMU_TEST_OP_MD_CHECK_REFS: test_md_check_refs,
    IOMMU_TEST_OP_CREATE_ACCESS: test_create_access,
    IOMMU_TEST_OP_DESTROY_ACCESS_PAGES: test_destroy_access_pages,
    IOMMU_TEST_OP_ACCESS_PAGES: test_access_pages,
    IOMMU_TEST_OP_ACCESS_RW: test_access_rw,
    IOMMU_TEST_OP_SET_TEMP_MEMORY_LIMIT: test_set_temp_memory_limit,
    IOMMU_TEST_OP_MOCK_DOMAIN_REPLACE: test_mock_domain_replace,
    IOMMU_TEST_OP_ACCESS_REPLACE_IOAS: test_access_replace_ioas,
    IOMMU_TEST_OP_MOCK_DOMAIN_FLAGS: test_mock_domain_flags,
    IOMMU_TEST_OP_DIRTY: test_dirty,
    IOMMU_TEST_OP_MD_CHECK_IOTLB: test_md_check_iotlb,
    IOMMU_TEST_OP_TRIGGER_IOPF: test_trigger_iopf,
    IOMMU_TEST_OP_DEV_CHECK_CACHE: test_dev_check_cache,
    IOMMU_TEST_OP_TRIGGER_VEVENT: test_trigger_vevent,
    IOMMU_TEST_OP_PASID_ATTACH: test_pasid_attach,
    IOMMU_TEST_OP_PASID_REPLACE: test_pasid_replace,
    IOMMU_TEST_OP_PASID_DETACH: test_pasid_detach,
    IOMMU_TEST_OP_PASID_CHECK_HWPT: test_pasid_check_hwpt,
    IOMMU_TEST_OP_DMABUF_GET: test_dmabuf_get,
    IOMMU_TEST_OP_DMABUF_REVOKE: test_dmabuf_revoke,
}
"""The struct of each op."""


def arm_of(raw: bytes | bytearray) -> type[Struct]:
    """The struct that ``raw``, which begins as an iommu_test_cmd, is by its op; iommu_test_cmd for an unknown one."""
    return ARMS.get(int.from_bytes(raw[4:8], "little"), iommu_test_cmd)


RESPONDS = frozenset(
    {
        IOMMU_TEST_OP_MOCK_DOMAIN,
        IOMMU_TEST_OP_CREATE_ACCESS,
        IOMMU_TEST_OP_ACCESS_PAGES,
        IOMMU_TEST_OP_MOCK_DOMAIN_REPLACE,
        IOMMU_TEST_OP_MOCK_DOMAIN_FLAGS,
        IOMMU_TEST_OP_DIRTY,
        IOMMU_TEST_OP_PASID_ATTACH,
        IOMMU_TEST_OP_PASID_REPLACE,
    }
)
"""Ops that copy the struct back to the caller on success; the others never write it."""
