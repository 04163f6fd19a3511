"""VFIO groups (``/dev/vfio/N``)."""

from __future__ import annotations

from enum import IntFlag

from iommufd.uapi.declare import Struct, field, struct, u32

VFIO_GROUP_FLAGS_VIABLE = 1 << 0
VFIO_GROUP_FLAGS_CONTAINER_SET = 1 << 1


class vfio_group_flags(IntFlag):
    """Flags of VFIO_GROUP_GET_STATUS."""

    VIABLE = VFIO_GROUP_FLAGS_VIABLE
    CONTAINER_SET = VFIO_GROUP_FLAGS_CONTAINER_SET


@struct(since="6.2")
class vfio_group_status(Struct):
    """Whether the group can be used, and whether it is.

    ::

        struct vfio_group_status {
            __u32 argsz;
            __u32 flags;
        };
    """

    argsz: u32
    flags: u32 = field(symbols=vfio_group_flags, direction="out")
