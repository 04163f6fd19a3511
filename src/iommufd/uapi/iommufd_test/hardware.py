"""What mock hardware is, and what passes between it and a program: sizes, types, and the data of each."""

from __future__ import annotations

from iommufd.uapi.declare import Struct, field, struct, u32, u64

MOCK_APERTURE_START = 0x1000000
MOCK_APERTURE_LAST = 0x7FFFFFFF
MOCK_PAGE_SIZE = 2048
MOCK_HUGE_PAGE_SIZE = 512 * MOCK_PAGE_SIZE
MOCK_IOMMUPT_DEFAULT = 0
MOCK_IOMMUPT_HUGE = 1
MOCK_NESTED_DOMAIN_IOTLB_ID_MAX = 3
MOCK_NESTED_DOMAIN_IOTLB_NUM = 4
MOCK_DEV_CACHE_ID_MAX = 3
MOCK_DEV_CACHE_NUM = 4
MOCK_PASID_WIDTH = 20
IOMMU_TEST_PASID_RESERVED = 1024
IOMMU_TEST_IOTLB_DEFAULT = 0x0BADBEEF
IOMMU_TEST_DEV_CACHE_DEFAULT = 0x00BADDAD
IOMMU_TEST_INVALIDATE_FLAG_ALL = 1 << 0
IOMMU_TEST_HW_QUEUE_MAX = 2
IOMMU_HW_INFO_TYPE_SELFTEST = 0xFEEDBEEF
IOMMU_HW_INFO_SELFTEST_REGVAL = 0xDEADBEEF
IOMMU_HWPT_DATA_SELFTEST = 0xDEAD
IOMMU_HWPT_INVALIDATE_DATA_SELFTEST = 0xDEADBEEF
IOMMU_HWPT_INVALIDATE_DATA_SELFTEST_INVALID = 0xDADBEEF
IOMMU_VIOMMU_TYPE_SELFTEST = 0xDEADBEEF
IOMMU_VIOMMU_INVALIDATE_DATA_SELFTEST = 0xDEADBEEF
IOMMU_VEVENTQ_TYPE_SELFTEST = 0xBEEFBEEF
IOMMU_HW_QUEUE_TYPE_SELFTEST = 0xDEADBEEF


@struct(since="6.2")
class iommu_test_hw_info(Struct):
    """Hardware info of a mock device.

    ::

        struct iommu_test_hw_info {
            __u32 flags;
            __u32 test_reg;
        };
    """

    flags: u32
    test_reg: u32 = field(show="hex")


@struct(since="6.2")
class iommu_hwpt_selftest(Struct):
    """Data of HWPT_ALLOC on mock hardware.

    ::

        struct iommu_hwpt_selftest {
            __u32 iotlb;
            __u32 pagetable_type;
        };
    """

    iotlb: u32 = field(show="hex")
    pagetable_type: u32


@struct(since="6.2")
class iommu_hwpt_invalidate_selftest(Struct):
    """One request to invalidate a mock nested HWPT.

    ::

        struct iommu_hwpt_invalidate_selftest {
            __u32 flags;
            __u32 iotlb_id;
        };
    """

    flags: u32
    iotlb_id: u32


@struct(since="6.2")
class iommu_viommu_selftest(Struct):
    """Data of VIOMMU_ALLOC on mock hardware.

    ::

        struct iommu_viommu_selftest {
            __u32 in_data;
            __u32 out_data;
            __aligned_u64 out_mmap_offset;
            __aligned_u64 out_mmap_length;
        };
    """

    in_data: u32 = field(show="hex")
    out_data: u32 = field(show="hex")
    out_mmap_offset: u64
    out_mmap_length: u64


@struct(since="6.2")
class iommu_viommu_invalidate_selftest(Struct):
    """One request to invalidate a mock vIOMMU.

    ::

        struct iommu_viommu_invalidate_selftest {
            __u32 flags;
            __u32 vdev_id;
            __u32 cache_id;
        };
    """

    flags: u32
    vdev_id: u32
    cache_id: u32


@struct(since="6.2")
class iommu_viommu_event_selftest(Struct):
    """The event of TRIGGER_VEVENT.

    ::

        struct iommu_viommu_event_selftest {
            __u32 virt_id;
        };
    """

    virt_id: u32
