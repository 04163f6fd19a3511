"""Virtual IOMMUs and what belongs to them: virtual devices, virtual event queues, hardware queues."""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Annotated

from iommufd.uapi.declare import Struct, array, field, struct, u32, u64

IOMMU_VIOMMU_TYPE_DEFAULT = 0
IOMMU_VIOMMU_TYPE_ARM_SMMUV3 = 1
IOMMU_VIOMMU_TYPE_TEGRA241_CMDQV = 2


class iommu_viommu_type(IntEnum):
    """enum iommu_viommu_type"""

    DEFAULT = IOMMU_VIOMMU_TYPE_DEFAULT
    ARM_SMMUV3 = IOMMU_VIOMMU_TYPE_ARM_SMMUV3
    TEGRA241_CMDQV = IOMMU_VIOMMU_TYPE_TEGRA241_CMDQV


@struct(since="6.17")
class iommu_viommu_tegra241_cmdqv(Struct):
    """Where page 0 of the virtual interface can be mapped on the iommufd descriptor.

    ::

        struct iommu_viommu_tegra241_cmdqv {
            __aligned_u64 out_vintf_mmap_offset;
            __aligned_u64 out_vintf_mmap_length;
        };
    """

    out_vintf_mmap_offset: u64
    out_vintf_mmap_length: u64


@struct(since="6.13")
class iommu_viommu_alloc(Struct):
    """Make a vIOMMU on the IOMMU of ``dev_id`` over a nesting parent.

    ::

        struct iommu_viommu_alloc {
            __u32 size;
            __u32 flags;
            __u32 type;
            __u32 dev_id;
            __u32 hwpt_id;
            __u32 out_viommu_id;
            __u32 data_len;
            __u32 __reserved;
            __aligned_u64 data_uptr;
        };
    """

    size: u32
    flags: u32
    type: u32 = field(symbols=iommu_viommu_type)
    dev_id: u32
    hwpt_id: u32
    out_viommu_id: u32
    data_len: u32 = field(since="6.17")
    reserved: u32 = field(since="6.17")
    data_uptr: u64 = field(since="6.17")


@struct(since="6.13")
class iommu_vdevice_alloc(Struct):
    """Give a bound device its id (``virt_id``) within a vIOMMU.

    ::

        struct iommu_vdevice_alloc {
            __u32 size;
            __u32 viommu_id;
            __u32 dev_id;
            __u32 out_vdevice_id;
            __aligned_u64 virt_id;
        };
    """

    size: u32
    viommu_id: u32
    dev_id: u32
    out_vdevice_id: u32
    virt_id: u64


IOMMU_VEVENTQ_FLAG_LOST_EVENTS = 1 << 0


class iommu_veventq_flag(IntFlag):
    """enum iommu_veventq_flag"""

    LOST_EVENTS = IOMMU_VEVENTQ_FLAG_LOST_EVENTS


@struct(since="6.15")
class iommufd_vevent_header(Struct):
    """What precedes each event in a vEVENTQ.

    ::

        struct iommufd_vevent_header {
            __u32 flags;
            __u32 sequence;
        };
    """

    flags: u32 = field(symbols=iommu_veventq_flag)
    sequence: u32


IOMMU_VEVENTQ_TYPE_DEFAULT = 0
IOMMU_VEVENTQ_TYPE_ARM_SMMUV3 = 1
IOMMU_VEVENTQ_TYPE_TEGRA241_CMDQV = 2


class iommu_veventq_type(IntEnum):
    """enum iommu_veventq_type"""

    DEFAULT = IOMMU_VEVENTQ_TYPE_DEFAULT
    ARM_SMMUV3 = IOMMU_VEVENTQ_TYPE_ARM_SMMUV3
    TEGRA241_CMDQV = IOMMU_VEVENTQ_TYPE_TEGRA241_CMDQV


@struct(since="6.15")
class iommu_vevent_arm_smmuv3(Struct):
    """One SMMUv3 event record.

    ::

        struct iommu_vevent_arm_smmuv3 {
            __aligned_le64 evt[4];
        };
    """

    evt: Annotated[tuple[int, ...], array("le64", 4)]


@struct(since="6.17")
class iommu_vevent_tegra241_cmdqv(Struct):
    """The error map of the virtual command queues.

    ::

        struct iommu_vevent_tegra241_cmdqv {
            __aligned_le64 lvcmdq_err_map[2];
        };
    """

    lvcmdq_err_map: Annotated[tuple[int, ...], array("le64", 2)]


@struct(since="6.15")
class iommu_veventq_alloc(Struct):
    """Make an event queue of a vIOMMU and a descriptor for it.

    ::

        struct iommu_veventq_alloc {
            __u32 size;
            __u32 flags;
            __u32 viommu_id;
            __u32 type;
            __u32 veventq_depth;
            __u32 out_veventq_id;
            __u32 out_veventq_fd;
            __u32 __reserved;
        };
    """

    size: u32
    flags: u32
    viommu_id: u32
    type: u32 = field(symbols=iommu_veventq_type)
    veventq_depth: u32
    out_veventq_id: u32
    out_veventq_fd: u32
    reserved: u32


IOMMU_HW_QUEUE_TYPE_DEFAULT = 0
IOMMU_HW_QUEUE_TYPE_TEGRA241_CMDQV = 1


class iommu_hw_queue_type(IntEnum):
    """enum iommu_hw_queue_type"""

    DEFAULT = IOMMU_HW_QUEUE_TYPE_DEFAULT
    TEGRA241_CMDQV = IOMMU_HW_QUEUE_TYPE_TEGRA241_CMDQV


@struct(since="6.17")
class iommu_hw_queue_alloc(Struct):
    """Make a hardware-accelerated queue in guest memory.

    ::

        struct iommu_hw_queue_alloc {
            __u32 size;
            __u32 flags;
            __u32 viommu_id;
            __u32 type;
            __u32 index;
            __u32 out_hw_queue_id;
            __aligned_u64 nesting_parent_iova;
            __aligned_u64 length;
        };
    """

    size: u32
    flags: u32
    viommu_id: u32
    type: u32 = field(symbols=iommu_hw_queue_type)
    index: u32
    out_hw_queue_id: u32
    nesting_parent_iova: u64
    length: u64 = field(show="dec")
