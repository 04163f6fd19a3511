"""VFIO_DEVICE_FEATURE: one ioctl, many features, each with its own payload behind the common head."""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Annotated

from iommufd.uapi.declare import Struct, array, field, s32, struct, u32, u64

VFIO_DEVICE_FEATURE_MASK = 0xFFFF

VFIO_DEVICE_FEATURE_GET = 1 << 16
VFIO_DEVICE_FEATURE_SET = 1 << 17
VFIO_DEVICE_FEATURE_PROBE = 1 << 18


class vfio_device_feature_flags(IntFlag):
    """Flags of VFIO_DEVICE_FEATURE above the feature number."""

    GET = VFIO_DEVICE_FEATURE_GET
    SET = VFIO_DEVICE_FEATURE_SET
    PROBE = VFIO_DEVICE_FEATURE_PROBE


VFIO_DEVICE_FEATURE_PCI_VF_TOKEN = 0
VFIO_DEVICE_FEATURE_MIGRATION = 1
VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE = 2
VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY = 3
VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP = 4
VFIO_DEVICE_FEATURE_LOW_POWER_EXIT = 5
VFIO_DEVICE_FEATURE_DMA_LOGGING_START = 6
VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP = 7
VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT = 8
VFIO_DEVICE_FEATURE_MIG_DATA_SIZE = 9
VFIO_DEVICE_FEATURE_BUS_MASTER = 10
VFIO_DEVICE_FEATURE_DMA_BUF = 11
VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2 = 12
VFIO_DEVICE_FEATURE_ZPCI_ERROR = 13


class vfio_device_feature_id(IntEnum):
    """The feature, low 16 bits of ``flags``."""

    PCI_VF_TOKEN = VFIO_DEVICE_FEATURE_PCI_VF_TOKEN
    MIGRATION = VFIO_DEVICE_FEATURE_MIGRATION
    MIG_DEVICE_STATE = VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE
    LOW_POWER_ENTRY = VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY
    LOW_POWER_ENTRY_WITH_WAKEUP = VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP
    LOW_POWER_EXIT = VFIO_DEVICE_FEATURE_LOW_POWER_EXIT
    DMA_LOGGING_START = VFIO_DEVICE_FEATURE_DMA_LOGGING_START
    DMA_LOGGING_STOP = VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP
    DMA_LOGGING_REPORT = VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT
    MIG_DATA_SIZE = VFIO_DEVICE_FEATURE_MIG_DATA_SIZE
    BUS_MASTER = VFIO_DEVICE_FEATURE_BUS_MASTER
    DMA_BUF = VFIO_DEVICE_FEATURE_DMA_BUF
    MIG_PRECOPY_INFOv2 = VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2
    ZPCI_ERROR = VFIO_DEVICE_FEATURE_ZPCI_ERROR


@struct(since="6.2")
class vfio_device_feature(Struct):
    """The head; the payload of the feature follows.

    ::

        struct vfio_device_feature {
            __u32 argsz;
            __u32 flags;
            __u8 data[];
        };
    """

    argsz: u32
    flags: u32 = field(show="hex")
    data: Annotated[bytes, array("u8", 0)]


VFIO_MIGRATION_STOP_COPY = 1 << 0
VFIO_MIGRATION_P2P = 1 << 1
VFIO_MIGRATION_PRE_COPY = 1 << 2


class vfio_migration_flags(IntFlag):
    """Flags of the MIGRATION feature."""

    STOP_COPY = VFIO_MIGRATION_STOP_COPY
    P2P = VFIO_MIGRATION_P2P
    PRE_COPY = VFIO_MIGRATION_PRE_COPY


@struct(since="6.2")
class vfio_device_feature_migration(Struct):
    """Payload of MIGRATION.

    ::

        struct vfio_device_feature_migration {
            __aligned_u64 flags;
        };
    """

    flags: u64 = field(symbols=vfio_migration_flags)


VFIO_DEVICE_STATE_ERROR = 0
VFIO_DEVICE_STATE_STOP = 1
VFIO_DEVICE_STATE_RUNNING = 2
VFIO_DEVICE_STATE_STOP_COPY = 3
VFIO_DEVICE_STATE_RESUMING = 4
VFIO_DEVICE_STATE_RUNNING_P2P = 5
VFIO_DEVICE_STATE_PRE_COPY = 6
VFIO_DEVICE_STATE_PRE_COPY_P2P = 7


class vfio_device_mig_state(IntEnum):
    """enum vfio_device_mig_state"""

    ERROR = VFIO_DEVICE_STATE_ERROR
    STOP = VFIO_DEVICE_STATE_STOP
    RUNNING = VFIO_DEVICE_STATE_RUNNING
    STOP_COPY = VFIO_DEVICE_STATE_STOP_COPY
    RESUMING = VFIO_DEVICE_STATE_RESUMING
    RUNNING_P2P = VFIO_DEVICE_STATE_RUNNING_P2P
    PRE_COPY = VFIO_DEVICE_STATE_PRE_COPY
    PRE_COPY_P2P = VFIO_DEVICE_STATE_PRE_COPY_P2P


@struct(since="6.2")
class vfio_device_feature_mig_state(Struct):
    """Payload of MIG_DEVICE_STATE.

    ::

        struct vfio_device_feature_mig_state {
            __u32 device_state;
            __s32 data_fd;
        };
    """

    device_state: u32 = field(symbols=vfio_device_mig_state)
    data_fd: s32 = field(direction="out")


@struct(since="6.2")
class vfio_device_low_power_entry_with_wakeup(Struct):
    """Payload of LOW_POWER_ENTRY_WITH_WAKEUP.

    ::

        struct vfio_device_low_power_entry_with_wakeup {
            __s32 wakeup_eventfd;
            __u32 reserved;
        };
    """

    wakeup_eventfd: s32
    reserved: u32 = field(c_name="reserved")


@struct(since="6.2")
class vfio_device_feature_dma_logging_control(Struct):
    """Payload of DMA_LOGGING_START: an array of ranges at ``ranges``.

    ::

        struct vfio_device_feature_dma_logging_control {
            __aligned_u64 page_size;
            __u32 num_ranges;
            __u32 __reserved;
            __aligned_u64 ranges;
        };
    """

    page_size: u64 = field(show="dec")
    num_ranges: u32
    reserved: u32
    ranges: u64


@struct(since="6.2")
class vfio_device_feature_dma_logging_range(Struct):
    """One range of that array.

    ::

        struct vfio_device_feature_dma_logging_range {
            __aligned_u64 iova;
            __aligned_u64 length;
        };
    """

    iova: u64
    length: u64 = field(show="dec")


@struct(since="6.2")
class vfio_device_feature_dma_logging_report(Struct):
    """Payload of DMA_LOGGING_REPORT: dirty bits into the bitmap at ``bitmap``.

    ::

        struct vfio_device_feature_dma_logging_report {
            __aligned_u64 iova;
            __aligned_u64 length;
            __aligned_u64 page_size;
            __aligned_u64 bitmap;
        };
    """

    iova: u64
    length: u64 = field(show="dec")
    page_size: u64 = field(show="dec")
    bitmap: u64


@struct(since="6.2")
class vfio_device_feature_mig_data_size(Struct):
    """Payload of MIG_DATA_SIZE.

    ::

        struct vfio_device_feature_mig_data_size {
            __aligned_u64 stop_copy_length;
        };
    """

    stop_copy_length: u64 = field(show="dec")


VFIO_DEVICE_FEATURE_CLEAR_MASTER = 0
VFIO_DEVICE_FEATURE_SET_MASTER = 1


class vfio_bus_master_op(IntEnum):
    """What to do with bus mastering."""

    CLEAR_MASTER = VFIO_DEVICE_FEATURE_CLEAR_MASTER
    SET_MASTER = VFIO_DEVICE_FEATURE_SET_MASTER


@struct(since="6.7")
class vfio_device_feature_bus_master(Struct):
    """Payload of BUS_MASTER.

    ::

        struct vfio_device_feature_bus_master {
            __u32 op;
        };
    """

    op: u32 = field(symbols=vfio_bus_master_op)


@struct(since="6.19")
class vfio_region_dma_range(Struct):
    """One range of a region to export as dma-buf.

    ::

        struct vfio_region_dma_range {
            __u64 offset;
            __u64 length;
        };
    """

    offset: u64
    length: u64 = field(show="dec")


@struct(since="6.19")
class vfio_device_feature_dma_buf(Struct):
    """Payload of DMA_BUF; ``nr_ranges`` ranges follow.

    ::

        struct vfio_device_feature_dma_buf {
            __u32 region_index;
            __u32 open_flags;
            __u32 flags;
            __u32 nr_ranges;
            struct vfio_region_dma_range dma_ranges[];
        };
    """

    region_index: u32
    open_flags: u32
    flags: u32
    nr_ranges: u32


VFIO_PRECOPY_INFO_REINIT = 1 << 0


class vfio_precopy_info_flags(IntFlag):
    """Flags of VFIO_MIG_GET_PRECOPY_INFO."""

    REINIT = VFIO_PRECOPY_INFO_REINIT


@struct(since="6.2")
class vfio_precopy_info(Struct):
    """What is left to copy (ioctl of the migration data descriptor).

    ::

        struct vfio_precopy_info {
            __u32 argsz;
            __u32 flags;
            __aligned_u64 initial_bytes;
            __aligned_u64 dirty_bytes;
        };
    """

    argsz: u32
    flags: u32 = field(symbols=vfio_precopy_info_flags, direction="out")
    initial_bytes: u64 = field(direction="out", show="dec")
    dirty_bytes: u64 = field(direction="out", show="dec")
