"""VFIO device character devices under iommufd: bind, attach, detach."""

from __future__ import annotations

from enum import IntFlag

from iommufd.uapi.declare import Struct, field, s32, struct, u32, u64

VFIO_DEVICE_BIND_FLAG_TOKEN = 1 << 0


class vfio_device_bind_flags(IntFlag):
    """Flags of VFIO_DEVICE_BIND_IOMMUFD."""

    TOKEN = VFIO_DEVICE_BIND_FLAG_TOKEN


@struct(since="6.6")
class vfio_device_bind_iommufd(Struct):
    """Bind the device to an iommufd context; ``out_devid`` is its object id there.

    ::

        struct vfio_device_bind_iommufd {
            __u32 argsz;
            __u32 flags;
            __s32 iommufd;
            __u32 out_devid;
            __aligned_u64 token_uuid_ptr;
        };
    """

    argsz: u32
    flags: u32 = field(symbols=vfio_device_bind_flags)
    iommufd: s32
    out_devid: u32
    token_uuid_ptr: u64 = field(since="6.17")


VFIO_DEVICE_ATTACH_PASID = 1 << 0


class vfio_device_attach_flags(IntFlag):
    """Flags of VFIO_DEVICE_ATTACH_IOMMUFD_PT."""

    PASID = VFIO_DEVICE_ATTACH_PASID


@struct(since="6.6")
class vfio_device_attach_iommufd_pt(Struct):
    """Attach (or move) the device, or one PASID of it, to an IOAS or HWPT.

    ::

        struct vfio_device_attach_iommufd_pt {
            __u32 argsz;
            __u32 flags;
            __u32 pt_id;
            __u32 pasid;
        };
    """

    argsz: u32
    flags: u32 = field(symbols=vfio_device_attach_flags)
    pt_id: u32 = field(direction="inout")
    pasid: u32 = field(since="6.15")


VFIO_DEVICE_DETACH_PASID = 1 << 0


class vfio_device_detach_flags(IntFlag):
    """Flags of VFIO_DEVICE_DETACH_IOMMUFD_PT."""

    PASID = VFIO_DEVICE_DETACH_PASID


@struct(since="6.6")
class vfio_device_detach_iommufd_pt(Struct):
    """Detach the device, or one PASID of it.

    ::

        struct vfio_device_detach_iommufd_pt {
            __u32 argsz;
            __u32 flags;
            __u32 pasid;
        };
    """

    argsz: u32
    flags: u32 = field(symbols=vfio_device_detach_flags)
    pasid: u32 = field(since="6.15")
