"""Dirty tracking of a paging HWPT."""

from __future__ import annotations

from enum import IntFlag

from iommufd.uapi.declare import Struct, field, struct, u32, u64

IOMMU_HWPT_DIRTY_TRACKING_ENABLE = 1


class iommufd_hwpt_set_dirty_tracking_flags(IntFlag):
    """enum iommufd_hwpt_set_dirty_tracking_flags"""

    ENABLE = IOMMU_HWPT_DIRTY_TRACKING_ENABLE


@struct(since="6.7")
class iommu_hwpt_set_dirty_tracking(Struct):
    """Start or stop dirty tracking.

    ::

        struct iommu_hwpt_set_dirty_tracking {
            __u32 size;
            __u32 flags;
            __u32 hwpt_id;
            __u32 __reserved;
        };
    """

    size: u32
    flags: u32 = field(symbols=iommufd_hwpt_set_dirty_tracking_flags)
    hwpt_id: u32
    reserved: u32


IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR = 1


class iommufd_hwpt_get_dirty_bitmap_flags(IntFlag):
    """enum iommufd_hwpt_get_dirty_bitmap_flags"""

    NO_CLEAR = IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR


@struct(since="6.7")
class iommu_hwpt_get_dirty_bitmap(Struct):
    """OR the dirty state of an IOVA range into the caller's bitmap at ``data``, one bit per ``page_size``.

    ::

        struct iommu_hwpt_get_dirty_bitmap {
            __u32 size;
            __u32 hwpt_id;
            __u32 flags;
            __u32 __reserved;
            __aligned_u64 iova;
            __aligned_u64 length;
            __aligned_u64 page_size;
            __aligned_u64 data;
        };
    """

    size: u32
    hwpt_id: u32
    flags: u32 = field(symbols=iommufd_hwpt_get_dirty_bitmap_flags)
    reserved: u32
    iova: u64
    length: u64 = field(show="dec")
    page_size: u64 = field(show="dec")
    data: u64
