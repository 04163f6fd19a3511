"""Which release brought what: the sources of every ``since`` in this room, and the releases of single values.

A ``since`` is the release whose merge window took the change into Linus Torvalds' tree:

====  ===================================================================================================  ==========
rel.  what came, and the merge (or, where marked c, the commit) that says so                               date
====  ===================================================================================================  ==========
6.2   iommufd itself: merge 08cdc2157966                                                                   2022-12-14
6.6   HWPT_ALLOC, GET_HW_INFO, VFIO cdev with replace: merge 4debf77169ee and vfio-v6.6-rc1                2023-08-30
6.7   dirty tracking, nesting parents, VT-d stage 1 (the header in 03476e687eb0 has all three)             2023-11
6.8   HWPT_INVALIDATE, test op MD_CHECK_IOTLB: merge 86c4d58a99ab                                          2024-01-18
6.11  fault queues: merge ef7c8f2b1fb4                                                                     2024-07-19
6.13  IOAS_MAP_FILE, IOAS_CHANGE_PROCESS, vIOMMU, vDEVICE, SMMUv3 nesting: merge 341d041daae5              2024-11-21
6.15  vEVENTQ (c e36ba5ab808e), PASID-compatible HWPTs and out_max_pasid_log2 (commits of 25 and 28 March) 2025-03
6.17  HW_QUEUE (c 2238ddc2b056), vIOMMU data, hw_info input type, Tegra241; VFIO bind token (c 86624ba3)   2025-07
6.19  VFIO dma-buf export (c 5d74781ebc86) and its import by IOAS_MAP_FILE, with the test dma-bufs         2025-12
7.0   AMD hw_info and guest page tables (commits of 18 January)                                            2026-02
7.1   ATS_NOT_SUPPORTED (c a11661a58c06), the SMMUv3 erratum flag (Will Deacon's merge of 9 April)         2026-04
7.1   VFIO precopy info v2 and its REINIT (series v3 of 17 March, taken by Alex Williamson)                2026-04
7.2   VFIO zPCI errors: series v13 was discussed on 14 April, after the pull for 7.1; in the header of 7.3 2026-06
7.3   IOAS_NOIOMMU_GET_PA: series v10 is of July 2026, the 7.2 pull of 17 June held fixes only             2026-08
====  ===================================================================================================  ==========

VFIO: PCI_ATOMIC_COMP 6.5, BUS_MASTER 6.7, PASID attach 6.15; what is older than iommufd is marked 6.2.
"""

from __future__ import annotations

from collections.abc import Iterable

from iommufd.uapi.declare import Release, show_release

# Values younger than the enum or flag set they belong to; a value not named here came with its enum.
VALUES: dict[str, Release] = {
    "IOMMU_HWPT_ALLOC_NEST_PARENT": (6, 7),
    "IOMMU_HWPT_ALLOC_DIRTY_TRACKING": (6, 7),
    "IOMMU_HWPT_FAULT_ID_VALID": (6, 11),
    "IOMMU_HWPT_ALLOC_PASID": (6, 15),
    "IOMMU_HWPT_DATA_VTD_S1": (6, 7),
    "IOMMU_HWPT_DATA_ARM_SMMUV3": (6, 13),
    "IOMMU_HWPT_DATA_AMD_GUEST": (7, 0),
    "IOMMU_HWPT_INVALIDATE_DATA_VTD_S1": (6, 8),
    "IOMMU_VIOMMU_INVALIDATE_DATA_ARM_SMMUV3": (6, 13),
    "IOMMU_HW_INFO_TYPE_DEFAULT": (6, 17),
    "IOMMU_HW_INFO_TYPE_INTEL_VTD": (6, 6),
    "IOMMU_HW_INFO_TYPE_ARM_SMMUV3": (6, 13),
    "IOMMU_HW_INFO_TYPE_TEGRA241_CMDQV": (6, 17),
    "IOMMU_HW_INFO_TYPE_AMD": (7, 0),
    "IOMMU_HW_INFO_VTD_ERRATA_772415_SPR17": (6, 7),
    "IOMMU_HW_INFO_ARM_SMMUV3_ERRATA_REPEAT_TLBI_CFGI": (7, 1),
    "IOMMU_HW_INFO_FLAG_INPUT_TYPE": (6, 17),
    "IOMMU_HW_CAP_DIRTY_TRACKING": (6, 7),
    "IOMMU_HW_CAP_PCI_PASID_EXEC": (6, 15),
    "IOMMU_HW_CAP_PCI_PASID_PRIV": (6, 15),
    "IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED": (7, 1),
    "IOMMU_VIOMMU_TYPE_TEGRA241_CMDQV": (6, 17),
    "IOMMU_VEVENTQ_TYPE_TEGRA241_CMDQV": (6, 17),
    "VFIO_DEVICE_BIND_FLAG_TOKEN": (6, 17),
    "VFIO_DEVICE_ATTACH_PASID": (6, 15),
    "VFIO_DEVICE_DETACH_PASID": (6, 15),
    "VFIO_DEVICE_FEATURE_BUS_MASTER": (6, 7),
    "VFIO_DEVICE_FEATURE_DMA_BUF": (6, 19),
    "VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2": (7, 1),
    "VFIO_DEVICE_FEATURE_ZPCI_ERROR": (7, 2),
    "VFIO_PRECOPY_INFO_REINIT": (7, 1),
}


def why_not_there(name: str, at: Release) -> str:
    """The sentence for a value that release ``at`` did not have yet."""
    return f"{name} came with Linux {show_release(VALUES[name])}; this machine is Linux {show_release(at)}"


def later(names: Iterable[str], at: Release) -> tuple[str, ...]:
    """Those of ``names`` (C constants) that release ``at`` did not have yet."""
    return tuple(name for name in names if VALUES.get(name, at) > at)
