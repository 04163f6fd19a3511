"""Every VFIO ioctl as one row of data, a table per kind of file: VFIO gives the same number to each kind again."""

from __future__ import annotations

from typing import NamedTuple

from iommufd.uapi import vfio as v
from iommufd.uapi.declare import Release, Struct, release


class VfioCommand(NamedTuple):
    """One VFIO ioctl. ``struct`` is None where the argument is a plain number (``argument`` "value"), a pointer to one
    C int ("int"), or a string ("string"); ``argument`` "none": not looked at."""

    name: str
    number: int
    struct: type[Struct] | None
    since: Release
    argument: str = "struct"


def _vfio(name: str, struct: type[Struct] | None = None, since: str = "6.2", argument: str = "struct") -> VfioCommand:
    return VfioCommand(name, getattr(v, name), struct, release(since), argument)


CONTAINER: tuple[VfioCommand, ...] = (
    _vfio("VFIO_GET_API_VERSION", argument="none"),
    _vfio("VFIO_CHECK_EXTENSION", argument="value"),
    _vfio("VFIO_SET_IOMMU", argument="value"),
    _vfio("VFIO_IOMMU_GET_INFO", v.vfio_iommu_type1_info),
    _vfio("VFIO_IOMMU_MAP_DMA", v.vfio_iommu_type1_dma_map),
    _vfio("VFIO_IOMMU_UNMAP_DMA", v.vfio_iommu_type1_dma_unmap),
    _vfio("VFIO_IOMMU_ENABLE", argument="none"),
    _vfio("VFIO_IOMMU_DISABLE", argument="none"),
    _vfio("VFIO_IOMMU_DIRTY_PAGES", v.vfio_iommu_type1_dirty_bitmap),
)
GROUP: tuple[VfioCommand, ...] = (
    _vfio("VFIO_GROUP_GET_STATUS", v.vfio_group_status),
    _vfio("VFIO_GROUP_SET_CONTAINER", argument="int"),
    _vfio("VFIO_GROUP_UNSET_CONTAINER", argument="none"),
    _vfio("VFIO_GROUP_GET_DEVICE_FD", argument="string"),
)
DEVICE: tuple[VfioCommand, ...] = (
    _vfio("VFIO_DEVICE_GET_INFO", v.vfio_device_info),
    _vfio("VFIO_DEVICE_GET_REGION_INFO", v.vfio_region_info),
    _vfio("VFIO_DEVICE_GET_IRQ_INFO", v.vfio_irq_info),
    _vfio("VFIO_DEVICE_SET_IRQS", v.vfio_irq_set),
    _vfio("VFIO_DEVICE_RESET", argument="none"),
    _vfio("VFIO_DEVICE_GET_PCI_HOT_RESET_INFO", v.vfio_pci_hot_reset_info),
    _vfio("VFIO_DEVICE_PCI_HOT_RESET", v.vfio_pci_hot_reset),
    _vfio("VFIO_DEVICE_IOEVENTFD", v.vfio_device_ioeventfd),
    _vfio("VFIO_DEVICE_FEATURE", v.vfio_device_feature),
    _vfio("VFIO_DEVICE_BIND_IOMMUFD", v.vfio_device_bind_iommufd, "6.6"),
    _vfio("VFIO_DEVICE_ATTACH_IOMMUFD_PT", v.vfio_device_attach_iommufd_pt, "6.6"),
    _vfio("VFIO_DEVICE_DETACH_IOMMUFD_PT", v.vfio_device_detach_iommufd_pt, "6.6"),
)
