"""Linux's IOMMU user API, complete in user space: one API for the kernel's ``/dev/iommu`` and for a software one.

::

    import iommufd

    with iommufd.open(machine="mock") as context, context.alloc_ioas() as ioas:
        mapping = ioas.map(bytearray(4096))
        print(hex(mapping.iova))

Names are imported on first use; ``import iommufd`` itself loads nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from iommufd.client.backend import Backend
    from iommufd.client.context import Context, adopt, open
    from iommufd.client.device import Device
    from iommufd.client.errors import InvalidationError, IommufdError
    from iommufd.client.fault_queue import FaultGroup, FaultQueue, PageRequest
    from iommufd.client.hw_info import AMDInfo, HwInfo, SMMUv3Info, Tegra241Info, VTDInfo
    from iommufd.client.hwpt import HWPT, NestedHWPT
    from iommufd.client.invalidation import RawEntry, SMMUv3Invalidation, VTDInvalidation
    from iommufd.client.ioas import IOAS, IovaRange
    from iommufd.client.mapping import Mapping
    from iommufd.client.nesting import AMDGuest, RawData, SMMUv3Stage, VTDStage1
    from iommufd.client.veventq import LostEvents, SMMUv3Event, VEvent, VEventQueue
    from iommufd.client.vfio import (
        DeviceInfo,
        DmaLog,
        EventFd,
        HotResetDevice,
        Irq,
        Migration,
        MigrationStream,
        PrecopyInfo,
        Region,
        VFIODevice,
    )
    from iommufd.client.vfio import open as vfio_open
    from iommufd.client.viommu import VIOMMU, HWQueue, VDevice
    from iommufd.machine.machine import Machine

_HOME = {
    "AMDGuest": "client.nesting",
    "AMDInfo": "client.hw_info",
    "Backend": "client.backend",
    "Context": "client.context",
    "Device": "client.device",
    "DeviceInfo": "client.vfio",
    "DmaLog": "client.vfio",
    "EventFd": "client.vfio",
    "FaultGroup": "client.fault_queue",
    "FaultQueue": "client.fault_queue",
    "HWPT": "client.hwpt",
    "HWQueue": "client.viommu",
    "HotResetDevice": "client.vfio",
    "HwInfo": "client.hw_info",
    "IOAS": "client.ioas",
    "InvalidationError": "client.errors",
    "IommufdError": "client.errors",
    "IovaRange": "client.ioas",
    "Irq": "client.vfio",
    "LostEvents": "client.veventq",
    "Machine": "machine.machine",
    "Mapping": "client.mapping",
    "Migration": "client.vfio",
    "MigrationStream": "client.vfio",
    "NestedHWPT": "client.hwpt",
    "PageRequest": "client.fault_queue",
    "PrecopyInfo": "client.vfio",
    "RawData": "client.nesting",
    "RawEntry": "client.invalidation",
    "Region": "client.vfio",
    "SMMUv3Event": "client.veventq",
    "SMMUv3Info": "client.hw_info",
    "SMMUv3Invalidation": "client.invalidation",
    "SMMUv3Stage": "client.nesting",
    "Tegra241Info": "client.hw_info",
    "VDevice": "client.viommu",
    "VEvent": "client.veventq",
    "VEventQueue": "client.veventq",
    "VFIODevice": "client.vfio",
    "VIOMMU": "client.viommu",
    "VTDInfo": "client.hw_info",
    "VTDInvalidation": "client.invalidation",
    "VTDStage1": "client.nesting",
    "adopt": "client.context",
    "open": "client.context",
    "vfio_open": "client.vfio",
}

__all__ = [
    "HWPT",
    "IOAS",
    "VIOMMU",
    "AMDGuest",
    "AMDInfo",
    "Backend",
    "Context",
    "Device",
    "DeviceInfo",
    "DmaLog",
    "EventFd",
    "FaultGroup",
    "FaultQueue",
    "HWQueue",
    "HotResetDevice",
    "HwInfo",
    "InvalidationError",
    "IommufdError",
    "IovaRange",
    "Irq",
    "LostEvents",
    "Machine",
    "Mapping",
    "Migration",
    "MigrationStream",
    "NestedHWPT",
    "PageRequest",
    "PrecopyInfo",
    "RawData",
    "RawEntry",
    "Region",
    "SMMUv3Event",
    "SMMUv3Info",
    "SMMUv3Invalidation",
    "SMMUv3Stage",
    "Tegra241Info",
    "VDevice",
    "VEvent",
    "VEventQueue",
    "VFIODevice",
    "VTDInfo",
    "VTDInvalidation",
    "VTDStage1",
    "adopt",
    "open",
    "vfio_open",
]


def __getattr__(name: str) -> object:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{home}"), "open" if name == "vfio_open" else name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
