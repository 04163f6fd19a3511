"""VFIO containers of type 1 (``/dev/vfio/vfio``), as an iommufd descriptor serves them."""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Annotated

from iommufd.uapi.declare import Struct, array, field, struct, u16, u32, u64

VFIO_API_VERSION = 0

VFIO_TYPE1_IOMMU = 1
VFIO_SPAPR_TCE_IOMMU = 2
VFIO_TYPE1v2_IOMMU = 3
VFIO_DMA_CC_IOMMU = 4
VFIO_EEH = 5
VFIO_SPAPR_TCE_v2_IOMMU = 7
VFIO_NOIOMMU_IOMMU = 8
VFIO_UNMAP_ALL = 9
VFIO_UPDATE_VADDR = 10


class vfio_extension(IntEnum):
    """Arguments of VFIO_CHECK_EXTENSION and VFIO_SET_IOMMU."""

    TYPE1_IOMMU = VFIO_TYPE1_IOMMU
    SPAPR_TCE_IOMMU = VFIO_SPAPR_TCE_IOMMU
    TYPE1v2_IOMMU = VFIO_TYPE1v2_IOMMU
    DMA_CC_IOMMU = VFIO_DMA_CC_IOMMU
    EEH = VFIO_EEH
    SPAPR_TCE_v2_IOMMU = VFIO_SPAPR_TCE_v2_IOMMU
    NOIOMMU_IOMMU = VFIO_NOIOMMU_IOMMU
    UNMAP_ALL = VFIO_UNMAP_ALL
    UPDATE_VADDR = VFIO_UPDATE_VADDR


@struct(since="6.2")
class vfio_info_cap_header(Struct):
    """Head of each element of a capability chain; ``next`` counts from the start of the info struct, 0 ends it.

    ::

        struct vfio_info_cap_header {
            __u16 id;
            __u16 version;
            __u32 next;
        };
    """

    id: u16
    version: u16
    next: u32


VFIO_IOMMU_INFO_PGSIZES = 1 << 0
VFIO_IOMMU_INFO_CAPS = 1 << 1


class vfio_iommu_info_flags(IntFlag):
    """Flags of VFIO_IOMMU_GET_INFO."""

    PGSIZES = VFIO_IOMMU_INFO_PGSIZES
    CAPS = VFIO_IOMMU_INFO_CAPS


@struct(since="6.2")
class vfio_iommu_type1_info(Struct):
    """What the container can map; a capability chain follows.

    ::

        struct vfio_iommu_type1_info {
            __u32 argsz;
            __u32 flags;
            __aligned_u64 iova_pgsizes;
            __u32 cap_offset;
            __u32 pad;
        };
    """

    argsz: u32 = field(direction="inout")
    flags: u32 = field(symbols=vfio_iommu_info_flags, direction="out")
    iova_pgsizes: u64 = field(direction="out")
    cap_offset: u32 = field(direction="out")
    pad: u32 = field(direction="out")


VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE = 1
VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION = 2
VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL = 3


@struct(since="6.2")
class vfio_iova_range(Struct):
    """One inclusive IOVA interval of the IOVA_RANGE capability.

    ::

        struct vfio_iova_range {
            __u64 start;
            __u64 end;
        };
    """

    start: u64
    end: u64


@struct(since="6.2")
class vfio_iommu_type1_info_cap_iova_range(Struct):
    """The IOVA_RANGE capability; ``nr_iovas`` intervals follow.

    ::

        struct vfio_iommu_type1_info_cap_iova_range {
            struct vfio_info_cap_header header;
            __u32 nr_iovas;
            __u32 reserved;
            struct vfio_iova_range iova_ranges[];
        };
    """

    header_id: u16 = field(c_name="header.id")
    header_version: u16 = field(c_name="header.version")
    header_next: u32 = field(c_name="header.next")
    nr_iovas: u32
    reserved: u32 = field(c_name="reserved")


@struct(since="6.2")
class vfio_iommu_type1_info_cap_migration(Struct):
    """The MIGRATION capability of the native container.

    ::

        struct vfio_iommu_type1_info_cap_migration {
            struct vfio_info_cap_header header;
            __u32 flags;
            __u64 pgsize_bitmap;
            __u64 max_dirty_bitmap_size;
        };
    """

    header_id: u16 = field(c_name="header.id")
    header_version: u16 = field(c_name="header.version")
    header_next: u32 = field(c_name="header.next")
    flags: u32
    pgsize_bitmap: u64
    max_dirty_bitmap_size: u64


@struct(since="6.2")
class vfio_iommu_type1_info_dma_avail(Struct):
    """The DMA_AVAIL capability: how many more mappings are allowed.

    ::

        struct vfio_iommu_type1_info_dma_avail {
            struct vfio_info_cap_header header;
            __u32 avail;
        };
    """

    header_id: u16 = field(c_name="header.id")
    header_version: u16 = field(c_name="header.version")
    header_next: u32 = field(c_name="header.next")
    avail: u32


VFIO_DMA_MAP_FLAG_READ = 1 << 0
VFIO_DMA_MAP_FLAG_WRITE = 1 << 1
VFIO_DMA_MAP_FLAG_VADDR = 1 << 2


class vfio_dma_map_flags(IntFlag):
    """Flags of VFIO_IOMMU_MAP_DMA."""

    READ = VFIO_DMA_MAP_FLAG_READ
    WRITE = VFIO_DMA_MAP_FLAG_WRITE
    VADDR = VFIO_DMA_MAP_FLAG_VADDR


@struct(since="6.2")
class vfio_iommu_type1_dma_map(Struct):
    """Map the caller's memory at ``vaddr`` to ``iova``.

    ::

        struct vfio_iommu_type1_dma_map {
            __u32 argsz;
            __u32 flags;
            __u64 vaddr;
            __u64 iova;
            __u64 size;
        };
    """

    argsz: u32
    flags: u32 = field(symbols=vfio_dma_map_flags)
    vaddr: u64
    iova: u64
    size: u64 = field(show="dec")


VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP = 1 << 0
VFIO_DMA_UNMAP_FLAG_ALL = 1 << 1
VFIO_DMA_UNMAP_FLAG_VADDR = 1 << 2


class vfio_dma_unmap_flags(IntFlag):
    """Flags of VFIO_IOMMU_UNMAP_DMA."""

    GET_DIRTY_BITMAP = VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP
    ALL = VFIO_DMA_UNMAP_FLAG_ALL
    VADDR = VFIO_DMA_UNMAP_FLAG_VADDR


@struct(since="6.2")
class vfio_bitmap(Struct):
    """A dirty bitmap: ``size`` bytes at ``data``, one bit per ``pgsize``.

    ::

        struct vfio_bitmap {
            __u64 pgsize;
            __u64 size;
            __u64 __user *data;
        };
    """

    pgsize: u64 = field(show="dec")
    size: u64 = field(show="dec")
    data: u64


@struct(since="6.2")
class vfio_iommu_type1_dma_unmap(Struct):
    """Unmap a range; ``size`` comes back as the bytes unmapped.

    ::

        struct vfio_iommu_type1_dma_unmap {
            __u32 argsz;
            __u32 flags;
            __u64 iova;
            __u64 size;
            __u8 data[];
        };
    """

    argsz: u32
    flags: u32 = field(symbols=vfio_dma_unmap_flags)
    iova: u64
    size: u64 = field(direction="inout", show="dec")
    data: Annotated[bytes, array("u8", 0)]


VFIO_IOMMU_DIRTY_PAGES_FLAG_START = 1 << 0
VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP = 1 << 1
VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP = 1 << 2


class vfio_dirty_pages_flags(IntFlag):
    """Flags of VFIO_IOMMU_DIRTY_PAGES."""

    START = VFIO_IOMMU_DIRTY_PAGES_FLAG_START
    STOP = VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP
    GET_BITMAP = VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP


@struct(since="6.2")
class vfio_iommu_type1_dirty_bitmap(Struct):
    """Head of VFIO_IOMMU_DIRTY_PAGES (native container only).

    ::

        struct vfio_iommu_type1_dirty_bitmap {
            __u32 argsz;
            __u32 flags;
            __u8 data[];
        };
    """

    argsz: u32
    flags: u32 = field(symbols=vfio_dirty_pages_flags)
    data: Annotated[bytes, array("u8", 0)]


@struct(since="6.2")
class vfio_iommu_type1_dirty_bitmap_get(Struct):
    """What follows the head when GET_BITMAP is set.

    ::

        struct vfio_iommu_type1_dirty_bitmap_get {
            __u64 iova;
            __u64 size;
            struct vfio_bitmap bitmap;
        };
    """

    iova: u64
    size: u64 = field(show="dec")
    bitmap_pgsize: u64 = field(c_name="bitmap.pgsize", show="dec")
    bitmap_size: u64 = field(c_name="bitmap.size", show="dec")
    bitmap_data: u64 = field(c_name="bitmap.data")
