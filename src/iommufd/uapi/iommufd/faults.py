"""IO page faults: the queue, the records read from it and the responses written to it."""

from __future__ import annotations

from enum import IntEnum, IntFlag

from iommufd.uapi.declare import Struct, field, struct, u32, u64

IOMMU_PGFAULT_FLAGS_PASID_VALID = 1 << 0
IOMMU_PGFAULT_FLAGS_LAST_PAGE = 1 << 1


class iommu_hwpt_pgfault_flags(IntFlag):
    """enum iommu_hwpt_pgfault_flags"""

    PASID_VALID = IOMMU_PGFAULT_FLAGS_PASID_VALID
    LAST_PAGE = IOMMU_PGFAULT_FLAGS_LAST_PAGE


IOMMU_PGFAULT_PERM_READ = 1 << 0
IOMMU_PGFAULT_PERM_WRITE = 1 << 1
IOMMU_PGFAULT_PERM_EXEC = 1 << 2
IOMMU_PGFAULT_PERM_PRIV = 1 << 3


class iommu_hwpt_pgfault_perm(IntFlag):
    """enum iommu_hwpt_pgfault_perm"""

    READ = IOMMU_PGFAULT_PERM_READ
    WRITE = IOMMU_PGFAULT_PERM_WRITE
    EXEC = IOMMU_PGFAULT_PERM_EXEC
    PRIV = IOMMU_PGFAULT_PERM_PRIV


@struct(since="6.11")
class iommu_hwpt_pgfault(Struct):
    """One page request, as read from a fault queue.

    ::

        struct iommu_hwpt_pgfault {
            __u32 flags;
            __u32 dev_id;
            __u32 pasid;
            __u32 grpid;
            __u32 perm;
            __u32 __reserved;
            __aligned_u64 addr;
            __u32 length;
            __u32 cookie;
        };
    """

    flags: u32 = field(symbols=iommu_hwpt_pgfault_flags)
    dev_id: u32
    pasid: u32
    grpid: u32
    perm: u32 = field(symbols=iommu_hwpt_pgfault_perm)
    reserved: u32
    addr: u64
    length: u32
    cookie: u32


IOMMUFD_PAGE_RESP_SUCCESS = 0
IOMMUFD_PAGE_RESP_INVALID = 1


class iommufd_page_response_code(IntEnum):
    """enum iommufd_page_response_code"""

    SUCCESS = IOMMUFD_PAGE_RESP_SUCCESS
    INVALID = IOMMUFD_PAGE_RESP_INVALID


@struct(since="6.11")
class iommu_hwpt_page_response(Struct):
    """The answer to a group of page requests, as written to a fault queue.

    ::

        struct iommu_hwpt_page_response {
            __u32 cookie;
            __u32 code;
        };
    """

    cookie: u32
    code: u32 = field(symbols=iommufd_page_response_code)


@struct(since="6.11")
class iommu_fault_alloc(Struct):
    """Make a fault queue and a descriptor for it.

    ::

        struct iommu_fault_alloc {
            __u32 size;
            __u32 flags;
            __u32 out_fault_id;
            __u32 out_fault_fd;
        };
    """

    size: u32
    flags: u32
    out_fault_id: u32
    out_fault_fd: u32
