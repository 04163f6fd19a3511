"""VFIO devices: what a device is made of, its regions and interrupts, reset; and the PCI numbering of both."""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Annotated

from iommufd.uapi.declare import Struct, array, field, s32, struct, u8, u16, u32, u64

VFIO_DEVICE_FLAGS_RESET = 1 << 0
VFIO_DEVICE_FLAGS_PCI = 1 << 1
VFIO_DEVICE_FLAGS_PLATFORM = 1 << 2
VFIO_DEVICE_FLAGS_AMBA = 1 << 3
VFIO_DEVICE_FLAGS_CCW = 1 << 4
VFIO_DEVICE_FLAGS_AP = 1 << 5
VFIO_DEVICE_FLAGS_FSL_MC = 1 << 6
VFIO_DEVICE_FLAGS_CAPS = 1 << 7
VFIO_DEVICE_FLAGS_CDX = 1 << 8


class vfio_device_flags(IntFlag):
    """Flags of VFIO_DEVICE_GET_INFO."""

    RESET = VFIO_DEVICE_FLAGS_RESET
    PCI = VFIO_DEVICE_FLAGS_PCI
    PLATFORM = VFIO_DEVICE_FLAGS_PLATFORM
    AMBA = VFIO_DEVICE_FLAGS_AMBA
    CCW = VFIO_DEVICE_FLAGS_CCW
    AP = VFIO_DEVICE_FLAGS_AP
    FSL_MC = VFIO_DEVICE_FLAGS_FSL_MC
    CAPS = VFIO_DEVICE_FLAGS_CAPS
    CDX = VFIO_DEVICE_FLAGS_CDX


@struct(since="6.2")
class vfio_device_info(Struct):
    """Kind of device, number of regions and interrupts; a capability chain may follow.

    ::

        struct vfio_device_info {
            __u32 argsz;
            __u32 flags;
            __u32 num_regions;
            __u32 num_irqs;
            __u32 cap_offset;
            __u32 pad;
        };
    """

    argsz: u32 = field(direction="inout")
    flags: u32 = field(symbols=vfio_device_flags, direction="out")
    num_regions: u32 = field(direction="out")
    num_irqs: u32 = field(direction="out")
    cap_offset: u32 = field(direction="out")
    pad: u32 = field(direction="out")


VFIO_DEVICE_INFO_CAP_PCI_ATOMIC_COMP = 5

VFIO_PCI_ATOMIC_COMP32 = 1 << 0
VFIO_PCI_ATOMIC_COMP64 = 1 << 1
VFIO_PCI_ATOMIC_COMP128 = 1 << 2


class vfio_pci_atomic_flags(IntFlag):
    """Flags of the PCI_ATOMIC_COMP capability."""

    COMP32 = VFIO_PCI_ATOMIC_COMP32
    COMP64 = VFIO_PCI_ATOMIC_COMP64
    COMP128 = VFIO_PCI_ATOMIC_COMP128


@struct(since="6.5")
class vfio_device_info_cap_pci_atomic_comp(Struct):
    """Atomic completer sizes of the root port.

    ::

        struct vfio_device_info_cap_pci_atomic_comp {
            struct vfio_info_cap_header header;
            __u32 flags;
            __u32 reserved;
        };
    """

    header_id: u16 = field(c_name="header.id")
    header_version: u16 = field(c_name="header.version")
    header_next: u32 = field(c_name="header.next")
    flags: u32 = field(symbols=vfio_pci_atomic_flags)
    reserved: u32 = field(c_name="reserved")


VFIO_REGION_INFO_FLAG_READ = 1 << 0
VFIO_REGION_INFO_FLAG_WRITE = 1 << 1
VFIO_REGION_INFO_FLAG_MMAP = 1 << 2
VFIO_REGION_INFO_FLAG_CAPS = 1 << 3


class vfio_region_info_flags(IntFlag):
    """Flags of VFIO_DEVICE_GET_REGION_INFO."""

    READ = VFIO_REGION_INFO_FLAG_READ
    WRITE = VFIO_REGION_INFO_FLAG_WRITE
    MMAP = VFIO_REGION_INFO_FLAG_MMAP
    CAPS = VFIO_REGION_INFO_FLAG_CAPS


@struct(since="6.2")
class vfio_region_info(Struct):
    """Region ``index``: its size and where it is in the device file.

    ::

        struct vfio_region_info {
            __u32 argsz;
            __u32 flags;
            __u32 index;
            __u32 cap_offset;
            __aligned_u64 size;
            __aligned_u64 offset;
        };
    """

    argsz: u32 = field(direction="inout")
    flags: u32 = field(symbols=vfio_region_info_flags, direction="out")
    index: u32
    cap_offset: u32 = field(direction="out")
    size: u64 = field(direction="out", show="dec")
    offset: u64 = field(direction="out")


VFIO_REGION_INFO_CAP_SPARSE_MMAP = 1
VFIO_REGION_INFO_CAP_TYPE = 2
VFIO_REGION_INFO_CAP_MSIX_MAPPABLE = 3
VFIO_REGION_TYPE_PCI_VENDOR_TYPE = 1 << 31
VFIO_REGION_TYPE_PCI_VENDOR_MASK = 0xFFFF


@struct(since="6.2")
class vfio_region_sparse_mmap_area(Struct):
    """One part of a region that can be mapped.

    ::

        struct vfio_region_sparse_mmap_area {
            __aligned_u64 offset;
            __aligned_u64 size;
        };
    """

    offset: u64
    size: u64 = field(show="dec")


@struct(since="6.2")
class vfio_region_info_cap_sparse_mmap(Struct):
    """The SPARSE_MMAP capability; ``nr_areas`` areas follow.

    ::

        struct vfio_region_info_cap_sparse_mmap {
            struct vfio_info_cap_header header;
            __u32 nr_areas;
            __u32 reserved;
            struct vfio_region_sparse_mmap_area areas[];
        };
    """

    header_id: u16 = field(c_name="header.id")
    header_version: u16 = field(c_name="header.version")
    header_next: u32 = field(c_name="header.next")
    nr_areas: u32
    reserved: u32 = field(c_name="reserved")


@struct(since="6.2")
class vfio_region_info_cap_type(Struct):
    """The TYPE capability of device specific regions.

    ::

        struct vfio_region_info_cap_type {
            struct vfio_info_cap_header header;
            __u32 type;
            __u32 subtype;
        };
    """

    header_id: u16 = field(c_name="header.id")
    header_version: u16 = field(c_name="header.version")
    header_next: u32 = field(c_name="header.next")
    type: u32
    subtype: u32


VFIO_IRQ_INFO_EVENTFD = 1 << 0
VFIO_IRQ_INFO_MASKABLE = 1 << 1
VFIO_IRQ_INFO_AUTOMASKED = 1 << 2
VFIO_IRQ_INFO_NORESIZE = 1 << 3


class vfio_irq_info_flags(IntFlag):
    """Flags of VFIO_DEVICE_GET_IRQ_INFO."""

    EVENTFD = VFIO_IRQ_INFO_EVENTFD
    MASKABLE = VFIO_IRQ_INFO_MASKABLE
    AUTOMASKED = VFIO_IRQ_INFO_AUTOMASKED
    NORESIZE = VFIO_IRQ_INFO_NORESIZE


@struct(since="6.2")
class vfio_irq_info(Struct):
    """Interrupt ``index``: how many there are and how they behave.

    ::

        struct vfio_irq_info {
            __u32 argsz;
            __u32 flags;
            __u32 index;
            __u32 count;
        };
    """

    argsz: u32
    flags: u32 = field(symbols=vfio_irq_info_flags, direction="out")
    index: u32
    count: u32 = field(direction="out")


VFIO_IRQ_SET_DATA_NONE = 1 << 0
VFIO_IRQ_SET_DATA_BOOL = 1 << 1
VFIO_IRQ_SET_DATA_EVENTFD = 1 << 2
VFIO_IRQ_SET_ACTION_MASK = 1 << 3
VFIO_IRQ_SET_ACTION_UNMASK = 1 << 4
VFIO_IRQ_SET_ACTION_TRIGGER = 1 << 5


class vfio_irq_set_flags(IntFlag):
    """Flags of VFIO_DEVICE_SET_IRQS: one kind of data, one action."""

    DATA_NONE = VFIO_IRQ_SET_DATA_NONE
    DATA_BOOL = VFIO_IRQ_SET_DATA_BOOL
    DATA_EVENTFD = VFIO_IRQ_SET_DATA_EVENTFD
    ACTION_MASK = VFIO_IRQ_SET_ACTION_MASK
    ACTION_UNMASK = VFIO_IRQ_SET_ACTION_UNMASK
    ACTION_TRIGGER = VFIO_IRQ_SET_ACTION_TRIGGER


VFIO_IRQ_SET_DATA_TYPE_MASK = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_DATA_BOOL | VFIO_IRQ_SET_DATA_EVENTFD
VFIO_IRQ_SET_ACTION_TYPE_MASK = VFIO_IRQ_SET_ACTION_MASK | VFIO_IRQ_SET_ACTION_UNMASK | VFIO_IRQ_SET_ACTION_TRIGGER


@struct(since="6.2")
class vfio_irq_set(Struct):
    """Act on ``count`` interrupts from ``start``; their data follows.

    ::

        struct vfio_irq_set {
            __u32 argsz;
            __u32 flags;
            __u32 index;
            __u32 start;
            __u32 count;
            __u8 data[];
        };
    """

    argsz: u32
    flags: u32 = field(symbols=vfio_irq_set_flags)
    index: u32
    start: u32
    count: u32
    data: Annotated[bytes, array("u8", 0)]


VFIO_PCI_BAR0_REGION_INDEX = 0
VFIO_PCI_BAR1_REGION_INDEX = 1
VFIO_PCI_BAR2_REGION_INDEX = 2
VFIO_PCI_BAR3_REGION_INDEX = 3
VFIO_PCI_BAR4_REGION_INDEX = 4
VFIO_PCI_BAR5_REGION_INDEX = 5
VFIO_PCI_ROM_REGION_INDEX = 6
VFIO_PCI_CONFIG_REGION_INDEX = 7
VFIO_PCI_VGA_REGION_INDEX = 8


class vfio_pci_region_index(IntEnum):
    """Regions of a PCI device."""

    BAR0 = VFIO_PCI_BAR0_REGION_INDEX
    BAR1 = VFIO_PCI_BAR1_REGION_INDEX
    BAR2 = VFIO_PCI_BAR2_REGION_INDEX
    BAR3 = VFIO_PCI_BAR3_REGION_INDEX
    BAR4 = VFIO_PCI_BAR4_REGION_INDEX
    BAR5 = VFIO_PCI_BAR5_REGION_INDEX
    ROM = VFIO_PCI_ROM_REGION_INDEX
    CONFIG = VFIO_PCI_CONFIG_REGION_INDEX
    VGA = VFIO_PCI_VGA_REGION_INDEX


VFIO_PCI_NUM_REGIONS = 9

VFIO_PCI_INTX_IRQ_INDEX = 0
VFIO_PCI_MSI_IRQ_INDEX = 1
VFIO_PCI_MSIX_IRQ_INDEX = 2
VFIO_PCI_ERR_IRQ_INDEX = 3
VFIO_PCI_REQ_IRQ_INDEX = 4


class vfio_pci_irq_index(IntEnum):
    """Interrupts of a PCI device."""

    INTX = VFIO_PCI_INTX_IRQ_INDEX
    MSI = VFIO_PCI_MSI_IRQ_INDEX
    MSIX = VFIO_PCI_MSIX_IRQ_INDEX
    ERR = VFIO_PCI_ERR_IRQ_INDEX
    REQ = VFIO_PCI_REQ_IRQ_INDEX


VFIO_PCI_NUM_IRQS = 5

VFIO_PCI_DEVID_OWNED = 0
VFIO_PCI_DEVID_NOT_OWNED = -1


@struct(since="6.2")
class vfio_pci_dependent_device(Struct):
    """One device that a hot reset would reset too.

    ::

        struct vfio_pci_dependent_device {
            union {
                __u32 group_id;
                __u32 devid;
            };
            __u16 segment;
            __u8 bus;
            __u8 devfn;
        };
    """

    group_id: u32
    devid: u32 = field(union="group_id")
    segment: u16
    bus: u8
    devfn: u8


VFIO_PCI_HOT_RESET_FLAG_DEV_ID = 1 << 0
VFIO_PCI_HOT_RESET_FLAG_DEV_ID_OWNED = 1 << 1


class vfio_pci_hot_reset_flags(IntFlag):
    """Flags of VFIO_DEVICE_GET_PCI_HOT_RESET_INFO."""

    DEV_ID = VFIO_PCI_HOT_RESET_FLAG_DEV_ID
    DEV_ID_OWNED = VFIO_PCI_HOT_RESET_FLAG_DEV_ID_OWNED


@struct(since="6.2")
class vfio_pci_hot_reset_info(Struct):
    """Which devices a hot reset would reset; ``count`` of them follow.

    ::

        struct vfio_pci_hot_reset_info {
            __u32 argsz;
            __u32 flags;
            __u32 count;
            struct vfio_pci_dependent_device devices[];
        };
    """

    argsz: u32 = field(direction="inout")
    flags: u32 = field(symbols=vfio_pci_hot_reset_flags, direction="out")
    count: u32 = field(direction="out")


@struct(since="6.2")
class vfio_pci_hot_reset(Struct):
    """Reset the bus; ``count`` group descriptors that prove ownership follow (none for bound cdevs).

    ::

        struct vfio_pci_hot_reset {
            __u32 argsz;
            __u32 flags;
            __u32 count;
            __s32 group_fds[];
        };
    """

    argsz: u32
    flags: u32
    count: u32
    group_fds: Annotated[tuple[int, ...], array("s32", 0)]


VFIO_DEVICE_IOEVENTFD_8 = 1 << 0
VFIO_DEVICE_IOEVENTFD_16 = 1 << 1
VFIO_DEVICE_IOEVENTFD_32 = 1 << 2
VFIO_DEVICE_IOEVENTFD_64 = 1 << 3


class vfio_device_ioeventfd_flags(IntFlag):
    """Access width of VFIO_DEVICE_IOEVENTFD."""

    WIDTH_8 = VFIO_DEVICE_IOEVENTFD_8
    WIDTH_16 = VFIO_DEVICE_IOEVENTFD_16
    WIDTH_32 = VFIO_DEVICE_IOEVENTFD_32
    WIDTH_64 = VFIO_DEVICE_IOEVENTFD_64


VFIO_DEVICE_IOEVENTFD_SIZE_MASK = 0xF


@struct(since="6.2")
class vfio_device_ioeventfd(Struct):
    """Write ``data`` at ``offset`` whenever the eventfd fires; fd -1 stops it.

    ::

        struct vfio_device_ioeventfd {
            __u32 argsz;
            __u32 flags;
            __aligned_u64 offset;
            __aligned_u64 data;
            __s32 fd;
            __u32 reserved;
        };
    """

    argsz: u32
    flags: u32 = field(symbols=vfio_device_ioeventfd_flags)
    offset: u64
    data: u64
    fd: s32
    reserved: u32 = field(c_name="reserved")
