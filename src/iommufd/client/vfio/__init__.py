"""VFIO device files under iommufd: open, bind, attach, and drive a device (kernel: struct vfio_device_file).

:func:`open` is also ``Context.open_device`` and ``iommufd.vfio_open``.
"""

from iommufd.client.vfio.device import DeviceInfo, HotResetDevice, VFIODevice, open
from iommufd.client.vfio.dma_log import DmaLog
from iommufd.client.vfio.irqs import EventFd, Irq
from iommufd.client.vfio.migration import Migration, MigrationStream, PrecopyInfo
from iommufd.client.vfio.regions import Region

__all__ = [
    "DeviceInfo",
    "DmaLog",
    "EventFd",
    "HotResetDevice",
    "Irq",
    "Migration",
    "MigrationStream",
    "PrecopyInfo",
    "Region",
    "VFIODevice",
    "open",
]
