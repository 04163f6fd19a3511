"""Hardware page tables: allocation data of each vendor, and cache invalidation requests."""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Annotated

from iommufd.uapi.declare import Struct, array, field, struct, u32, u64

IOMMU_HWPT_ALLOC_NEST_PARENT = 1 << 0
IOMMU_HWPT_ALLOC_DIRTY_TRACKING = 1 << 1
IOMMU_HWPT_FAULT_ID_VALID = 1 << 2
IOMMU_HWPT_ALLOC_PASID = 1 << 3


class iommufd_hwpt_alloc_flags(IntFlag):
    """enum iommufd_hwpt_alloc_flags"""

    NEST_PARENT = IOMMU_HWPT_ALLOC_NEST_PARENT
    DIRTY_TRACKING = IOMMU_HWPT_ALLOC_DIRTY_TRACKING
    FAULT_ID_VALID = IOMMU_HWPT_FAULT_ID_VALID
    PASID = IOMMU_HWPT_ALLOC_PASID


IOMMU_VTD_S1_SRE = 1 << 0
IOMMU_VTD_S1_EAFE = 1 << 1
IOMMU_VTD_S1_WPE = 1 << 2


class iommu_hwpt_vtd_s1_flags(IntFlag):
    """enum iommu_hwpt_vtd_s1_flags"""

    SRE = IOMMU_VTD_S1_SRE
    EAFE = IOMMU_VTD_S1_EAFE
    WPE = IOMMU_VTD_S1_WPE


@struct(since="6.7")
class iommu_hwpt_vtd_s1(Struct):
    """Data of a VT-d stage-1 HWPT (``IOMMU_HWPT_DATA_VTD_S1``).

    ::

        struct iommu_hwpt_vtd_s1 {
            __aligned_u64 flags;
            __aligned_u64 pgtbl_addr;
            __u32 addr_width;
            __u32 __reserved;
        };
    """

    flags: u64 = field(symbols=iommu_hwpt_vtd_s1_flags)
    pgtbl_addr: u64
    addr_width: u32
    reserved: u32


@struct(since="6.13")
class iommu_hwpt_arm_smmuv3(Struct):
    """Data of an SMMUv3 nested HWPT: the first two words of the stream table entry.

    ::

        struct iommu_hwpt_arm_smmuv3 {
            __aligned_le64 ste[2];
        };
    """

    ste: Annotated[tuple[int, ...], array("le64", 2)]


@struct(since="7.0")
class iommu_hwpt_amd_guest(Struct):
    """Data of an AMD nested HWPT: the guest device table entry.

    ::

        struct iommu_hwpt_amd_guest {
            __aligned_u64 dte[4];
        };
    """

    dte: Annotated[tuple[int, ...], array("u64", 4)]


IOMMU_HWPT_DATA_NONE = 0
IOMMU_HWPT_DATA_VTD_S1 = 1
IOMMU_HWPT_DATA_ARM_SMMUV3 = 2
IOMMU_HWPT_DATA_AMD_GUEST = 3


class iommu_hwpt_data_type(IntEnum):
    """enum iommu_hwpt_data_type"""

    NONE = IOMMU_HWPT_DATA_NONE
    VTD_S1 = IOMMU_HWPT_DATA_VTD_S1
    ARM_SMMUV3 = IOMMU_HWPT_DATA_ARM_SMMUV3
    AMD_GUEST = IOMMU_HWPT_DATA_AMD_GUEST


@struct(since="6.6")
class iommu_hwpt_alloc(Struct):
    """Make a HWPT on an IOAS, or a nested one on a parent HWPT or vIOMMU (``pt_id``).

    ::

        struct iommu_hwpt_alloc {
            __u32 size;
            __u32 flags;
            __u32 dev_id;
            __u32 pt_id;
            __u32 out_hwpt_id;
            __u32 __reserved;
            __u32 data_type;
            __u32 data_len;
            __aligned_u64 data_uptr;
            __u32 fault_id;
            __u32 __reserved2;
        };
    """

    size: u32
    flags: u32 = field(symbols=iommufd_hwpt_alloc_flags)
    dev_id: u32
    pt_id: u32
    out_hwpt_id: u32
    reserved: u32
    data_type: u32 = field(since="6.7", symbols=iommu_hwpt_data_type)
    data_len: u32 = field(since="6.7")
    data_uptr: u64 = field(since="6.7")
    fault_id: u32 = field(since="6.11")
    reserved2: u32 = field(since="6.11")


IOMMU_HWPT_INVALIDATE_DATA_VTD_S1 = 0
IOMMU_VIOMMU_INVALIDATE_DATA_ARM_SMMUV3 = 1


class iommu_hwpt_invalidate_data_type(IntEnum):
    """enum iommu_hwpt_invalidate_data_type"""

    VTD_S1 = IOMMU_HWPT_INVALIDATE_DATA_VTD_S1
    ARM_SMMUV3 = IOMMU_VIOMMU_INVALIDATE_DATA_ARM_SMMUV3


IOMMU_VTD_INV_FLAGS_LEAF = 1 << 0


class iommu_hwpt_vtd_s1_invalidate_flags(IntFlag):
    """enum iommu_hwpt_vtd_s1_invalidate_flags"""

    LEAF = IOMMU_VTD_INV_FLAGS_LEAF


@struct(since="6.8")
class iommu_hwpt_vtd_s1_invalidate(Struct):
    """One VT-d stage-1 request: ``npages`` 4 KiB pages from ``addr``.

    ::

        struct iommu_hwpt_vtd_s1_invalidate {
            __aligned_u64 addr;
            __aligned_u64 npages;
            __u32 flags;
            __u32 __reserved;
        };
    """

    addr: u64
    npages: u64 = field(show="dec")
    flags: u32 = field(symbols=iommu_hwpt_vtd_s1_invalidate_flags)
    reserved: u32


@struct(since="6.13")
class iommu_viommu_arm_smmuv3_invalidate(Struct):
    """One SMMUv3 request: a 16-byte command of the guest command queue.

    ::

        struct iommu_viommu_arm_smmuv3_invalidate {
            __aligned_le64 cmd[2];
        };
    """

    cmd: Annotated[tuple[int, ...], array("le64", 2)]


@struct(since="6.8")
class iommu_hwpt_invalidate(Struct):
    """Carry out ``entry_num`` requests; comes back as the number handled, on errors too.

    ::

        struct iommu_hwpt_invalidate {
            __u32 size;
            __u32 hwpt_id;
            __aligned_u64 data_uptr;
            __u32 data_type;
            __u32 entry_len;
            __u32 entry_num;
            __u32 __reserved;
        };
    """

    size: u32
    hwpt_id: u32
    data_uptr: u64
    data_type: u32 = field(symbols=iommu_hwpt_invalidate_data_type)
    entry_len: u32
    entry_num: u32 = field(direction="inout")
    reserved: u32
