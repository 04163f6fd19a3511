"""IOMMU_GET_HW_INFO: what the IOMMU behind a bound device is, with one data struct per vendor."""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Annotated

from iommufd.uapi.declare import Struct, array, field, struct, u8, u32, u64

IOMMU_HW_INFO_VTD_ERRATA_772415_SPR17 = 1 << 0


class iommu_hw_info_vtd_flags(IntFlag):
    """enum iommu_hw_info_vtd_flags"""

    ERRATA_772415_SPR17 = IOMMU_HW_INFO_VTD_ERRATA_772415_SPR17


@struct(since="6.6")
class iommu_hw_info_vtd(Struct):
    """VT-d: raw capability and extended capability registers.

    ::

        struct iommu_hw_info_vtd {
            __u32 flags;
            __u32 __reserved;
            __aligned_u64 cap_reg;
            __aligned_u64 ecap_reg;
        };
    """

    flags: u32 = field(symbols=iommu_hw_info_vtd_flags)
    reserved: u32
    cap_reg: u64
    ecap_reg: u64


IOMMU_HW_INFO_ARM_SMMUV3_ERRATA_REPEAT_TLBI_CFGI = 1 << 0


class iommu_hw_info_arm_smmuv3_flags(IntFlag):
    """enum iommu_hw_info_arm_smmuv3_flags"""

    ERRATA_REPEAT_TLBI_CFGI = IOMMU_HW_INFO_ARM_SMMUV3_ERRATA_REPEAT_TLBI_CFGI


@struct(since="6.13")
class iommu_hw_info_arm_smmuv3(Struct):
    """SMMUv3: raw identification registers.

    ::

        struct iommu_hw_info_arm_smmuv3 {
            __u32 flags;
            __u32 __reserved;
            __u32 idr[6];
            __u32 iidr;
            __u32 aidr;
        };
    """

    flags: u32 = field(symbols=iommu_hw_info_arm_smmuv3_flags)
    reserved: u32
    idr: Annotated[tuple[int, ...], array("u32", 6)]
    iidr: u32
    aidr: u32


@struct(since="6.17")
class iommu_hw_info_tegra241_cmdqv(Struct):
    """Tegra241 CMDQV: fields of its PARAM register.

    ::

        struct iommu_hw_info_tegra241_cmdqv {
            __u32 flags;
            __u8 version;
            __u8 log2vcmdqs;
            __u8 log2vsids;
            __u8 __reserved;
        };
    """

    flags: u32
    version: u8
    log2vcmdqs: u8
    log2vsids: u8
    reserved: u8


@struct(since="7.0")
class iommu_hw_info_amd(Struct):
    """AMD: raw extended feature registers.

    ::

        struct iommu_hw_info_amd {
            __aligned_u64 efr;
            __aligned_u64 efr2;
        };
    """

    efr: u64
    efr2: u64


IOMMU_HW_INFO_TYPE_NONE = 0
IOMMU_HW_INFO_TYPE_DEFAULT = 0
IOMMU_HW_INFO_TYPE_INTEL_VTD = 1
IOMMU_HW_INFO_TYPE_ARM_SMMUV3 = 2
IOMMU_HW_INFO_TYPE_TEGRA241_CMDQV = 3
IOMMU_HW_INFO_TYPE_AMD = 4


class iommu_hw_info_type(IntEnum):
    """enum iommu_hw_info_type"""

    NONE = IOMMU_HW_INFO_TYPE_NONE
    DEFAULT = IOMMU_HW_INFO_TYPE_DEFAULT
    INTEL_VTD = IOMMU_HW_INFO_TYPE_INTEL_VTD
    ARM_SMMUV3 = IOMMU_HW_INFO_TYPE_ARM_SMMUV3
    TEGRA241_CMDQV = IOMMU_HW_INFO_TYPE_TEGRA241_CMDQV
    AMD = IOMMU_HW_INFO_TYPE_AMD


IOMMU_HW_CAP_DIRTY_TRACKING = 1 << 0
IOMMU_HW_CAP_PCI_PASID_EXEC = 1 << 1
IOMMU_HW_CAP_PCI_PASID_PRIV = 1 << 2
IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED = 1 << 3


class iommufd_hw_capabilities(IntFlag):
    """enum iommufd_hw_capabilities"""

    DIRTY_TRACKING = IOMMU_HW_CAP_DIRTY_TRACKING
    PCI_PASID_EXEC = IOMMU_HW_CAP_PCI_PASID_EXEC
    PCI_PASID_PRIV = IOMMU_HW_CAP_PCI_PASID_PRIV
    PCI_ATS_NOT_SUPPORTED = IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED


IOMMU_HW_INFO_FLAG_INPUT_TYPE = 1 << 0


class iommufd_hw_info_flags(IntFlag):
    """enum iommufd_hw_info_flags"""

    INPUT_TYPE = IOMMU_HW_INFO_FLAG_INPUT_TYPE


@struct(since="6.6")
class iommu_hw_info(Struct):
    """Type, capabilities and vendor data of the IOMMU behind ``dev_id``.

    ::

        struct iommu_hw_info {
            __u32 size;
            __u32 flags;
            __u32 dev_id;
            __u32 data_len;
            __aligned_u64 data_uptr;
            union {
                __u32 in_data_type;
                __u32 out_data_type;
            };
            __u8 out_max_pasid_log2;
            __u8 __reserved[3];
            __aligned_u64 out_capabilities;
        };
    """

    size: u32
    flags: u32 = field(symbols=iommufd_hw_info_flags)
    dev_id: u32
    data_len: u32 = field(direction="inout")
    data_uptr: u64
    out_data_type: u32 = field(symbols=iommu_hw_info_type)
    in_data_type: u32 = field(since="6.17", symbols=iommu_hw_info_type, union="out_data_type")
    out_max_pasid_log2: u8 = field(since="6.15")
    reserved: Annotated[bytes, array("u8", 3)]
    out_capabilities: u64 = field(since="6.7", symbols=iommufd_hw_capabilities)
