"""IO address spaces: allocation, IOVA ranges, map, copy, unmap, and the options.

Intervals of IOVA are inclusive (``start`` to ``last``); ``length`` counts bytes.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

from iommufd.uapi.declare import Struct, field, s32, struct, u16, u32, u64


@struct(since="6.2")
class iommu_destroy(Struct):
    """Destroy the object ``id``.

    ::

        struct iommu_destroy {
            __u32 size;
            __u32 id;
        };
    """

    size: u32
    id: u32


@struct(since="6.2")
class iommu_ioas_alloc(Struct):
    """Make an empty IO address space.

    ::

        struct iommu_ioas_alloc {
            __u32 size;
            __u32 flags;
            __u32 out_ioas_id;
        };
    """

    size: u32
    flags: u32
    out_ioas_id: u32


@struct(since="6.2")
class iommu_iova_range(Struct):
    """One inclusive IOVA interval, an element of ``allowed_iovas`` arrays.

    ::

        struct iommu_iova_range {
            __aligned_u64 start;
            __aligned_u64 last;
        };
    """

    start: u64
    last: u64


@struct(since="6.2")
class iommu_ioas_iova_ranges(Struct):
    """The IOVA intervals that may be mapped now; ``num_iovas`` is the array length in and the number of intervals out.

    ::

        struct iommu_ioas_iova_ranges {
            __u32 size;
            __u32 ioas_id;
            __u32 num_iovas;
            __u32 __reserved;
            __aligned_u64 allowed_iovas;
            __aligned_u64 out_iova_alignment;
        };
    """

    size: u32
    ioas_id: u32
    num_iovas: u32 = field(direction="inout")
    reserved: u32
    allowed_iovas: u64
    out_iova_alignment: u64


@struct(since="6.2")
class iommu_ioas_allow_iovas(Struct):
    """Reserve ``num_iovas`` intervals against later narrowing by devices.

    ::

        struct iommu_ioas_allow_iovas {
            __u32 size;
            __u32 ioas_id;
            __u32 num_iovas;
            __u32 __reserved;
            __aligned_u64 allowed_iovas;
        };
    """

    size: u32
    ioas_id: u32
    num_iovas: u32
    reserved: u32
    allowed_iovas: u64


IOMMU_IOAS_MAP_FIXED_IOVA = 1 << 0
IOMMU_IOAS_MAP_WRITEABLE = 1 << 1
IOMMU_IOAS_MAP_READABLE = 1 << 2


class iommufd_ioas_map_flags(IntFlag):
    """enum iommufd_ioas_map_flags"""

    FIXED_IOVA = IOMMU_IOAS_MAP_FIXED_IOVA
    WRITEABLE = IOMMU_IOAS_MAP_WRITEABLE
    READABLE = IOMMU_IOAS_MAP_READABLE


@struct(since="6.2")
class iommu_ioas_map(Struct):
    """Map the caller's memory at ``user_va``; ``iova`` is an output unless FIXED_IOVA.

    ::

        struct iommu_ioas_map {
            __u32 size;
            __u32 flags;
            __u32 ioas_id;
            __u32 __reserved;
            __aligned_u64 user_va;
            __aligned_u64 length;
            __aligned_u64 iova;
        };
    """

    size: u32
    flags: u32 = field(symbols=iommufd_ioas_map_flags)
    ioas_id: u32
    reserved: u32
    user_va: u64
    length: u64 = field(show="dec")
    iova: u64 = field(direction="inout")


@struct(since="7.3")
class iommu_ioas_noiommu_get_pa(Struct):
    """The physical address behind ``iova`` of an IOAS used by no-IOMMU devices.

    ::

        struct iommu_ioas_noiommu_get_pa {
            __u32 size;
            __u32 flags;
            __u32 ioas_id;
            __u32 __reserved;
            __aligned_u64 iova;
            __aligned_u64 length;
            __aligned_u64 out_phys;
        };
    """

    size: u32
    flags: u32
    ioas_id: u32
    reserved: u32
    iova: u64
    length: u64 = field(direction="inout", show="dec")
    out_phys: u64


@struct(since="6.13")
class iommu_ioas_map_file(Struct):
    """Map bytes of a memfd or dma-buf; ``iova`` is an output unless FIXED_IOVA.

    ::

        struct iommu_ioas_map_file {
            __u32 size;
            __u32 flags;
            __u32 ioas_id;
            __s32 fd;
            __aligned_u64 start;
            __aligned_u64 length;
            __aligned_u64 iova;
        };
    """

    size: u32
    flags: u32 = field(symbols=iommufd_ioas_map_flags)
    ioas_id: u32
    fd: s32
    start: u64
    length: u64 = field(show="dec")
    iova: u64 = field(direction="inout")


@struct(since="6.2")
class iommu_ioas_copy(Struct):
    """Map again, in ``dst_ioas_id``, memory that ``src_ioas_id`` has mapped.

    ::

        struct iommu_ioas_copy {
            __u32 size;
            __u32 flags;
            __u32 dst_ioas_id;
            __u32 src_ioas_id;
            __aligned_u64 length;
            __aligned_u64 dst_iova;
            __aligned_u64 src_iova;
        };
    """

    size: u32
    flags: u32 = field(symbols=iommufd_ioas_map_flags)
    dst_ioas_id: u32
    src_ioas_id: u32
    length: u64 = field(show="dec")
    dst_iova: u64 = field(direction="inout")
    src_iova: u64


@struct(since="6.2")
class iommu_ioas_unmap(Struct):
    """Unmap whole areas; ``length`` comes back as the bytes unmapped.

    ::

        struct iommu_ioas_unmap {
            __u32 size;
            __u32 ioas_id;
            __aligned_u64 iova;
            __aligned_u64 length;
        };
    """

    size: u32
    ioas_id: u32
    iova: u64
    length: u64 = field(direction="inout", show="dec")


IOMMU_OPTION_RLIMIT_MODE = 0
IOMMU_OPTION_HUGE_PAGES = 1


class iommufd_option(IntEnum):
    """enum iommufd_option"""

    RLIMIT_MODE = IOMMU_OPTION_RLIMIT_MODE
    HUGE_PAGES = IOMMU_OPTION_HUGE_PAGES


IOMMU_OPTION_OP_SET = 0
IOMMU_OPTION_OP_GET = 1


class iommufd_option_ops(IntEnum):
    """enum iommufd_option_ops"""

    SET = IOMMU_OPTION_OP_SET
    GET = IOMMU_OPTION_OP_GET


@struct(since="6.2")
class iommu_option(Struct):
    """Get or set one option; ``object_id`` where the option belongs to an object.

    ::

        struct iommu_option {
            __u32 size;
            __u32 option_id;
            __u16 op;
            __u16 __reserved;
            __u32 object_id;
            __aligned_u64 val64;
        };
    """

    size: u32
    option_id: u32 = field(symbols=iommufd_option)
    op: u16 = field(symbols=iommufd_option_ops)
    reserved: u16
    object_id: u32
    val64: u64 = field(direction="inout", show="dec")


IOMMU_VFIO_IOAS_GET = 0
IOMMU_VFIO_IOAS_SET = 1
IOMMU_VFIO_IOAS_CLEAR = 2


class iommufd_vfio_ioas_op(IntEnum):
    """enum iommufd_vfio_ioas_op"""

    GET = IOMMU_VFIO_IOAS_GET
    SET = IOMMU_VFIO_IOAS_SET
    CLEAR = IOMMU_VFIO_IOAS_CLEAR


@struct(since="6.2")
class iommu_vfio_ioas(Struct):
    """Get, set or clear the IOAS that VFIO compatibility uses.

    ::

        struct iommu_vfio_ioas {
            __u32 size;
            __u32 ioas_id;
            __u16 op;
            __u16 __reserved;
        };
    """

    size: u32
    ioas_id: u32 = field(direction="inout")
    op: u16 = field(symbols=iommufd_vfio_ioas_op)
    reserved: u16


@struct(since="6.13")
class iommu_ioas_change_process(Struct):
    """Move the pinned-memory charge of every file mapping to the calling process.

    ::

        struct iommu_ioas_change_process {
            __u32 size;
            __u32 __reserved;
        };
    """

    size: u32
    reserved: u32
