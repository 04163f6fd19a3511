"""From a device's address to its VFIO device file, by way of /sys (kernel: the class ``vfio-dev``)."""

from __future__ import annotations

import errno
import os
import re
from typing import TYPE_CHECKING

from iommufd.client.errors import IommufdError

if TYPE_CHECKING:
    from collections.abc import Callable

    from iommufd.client.backend import Backend

_ADDRESS = re.compile(r"(?:([0-9a-fA-F]{4,8}):)?([0-9a-fA-F]{2}:[01][0-9a-fA-F]\.[0-7])")
PCI = "/sys/bus/pci/devices"
DEVICES = "/dev/vfio/devices"


def device_file(where: str | os.PathLike[str], backend: Backend) -> str:
    """The path of the device file that ``where`` means: a path, or a PCI address (``0000:01:00.0``, ``01:00.0``).

    IommufdError ENOENT when there is no such device, ENODEV when no VFIO driver has it; ValueError for neither form."""
    text = os.fsdecode(where)
    if text.startswith("/"):
        return text
    match = _ADDRESS.fullmatch(text)
    if match is None:
        raise ValueError(f'{text!r} is neither a device file nor a PCI address like "0000:01:00.0"')
    address = f"{match[1] or '0000'}:{match[2]}".lower()
    names = _list(backend, f"{PCI}/{address}/vfio-dev")
    if names:
        listed = _list(backend, DEVICES) or []
        for name in (names[0], f"noiommu-{names[0]}"):
            if name in listed:
                return f"{DEVICES}/{name}"
        return f"{DEVICES}/{names[0]}"
    if _list(backend, f"{PCI}/{address}") is None:
        raise IommufdError(errno.ENOENT, f"there is no PCI device {address}")
    raise IommufdError(
        errno.ENODEV,
        f"no VFIO driver has the PCI device {address}: write vfio-pci to {PCI}/{address}/driver_override, unbind its "
        f"driver, then write {address} to /sys/bus/pci/drivers_probe",
    )


def _list(backend: Backend, path: str) -> list[str] | None:
    """The names in a directory of the backend's system, sorted; None when there is none."""
    # a software machine has a /sys of its own
    own: Callable[[str], list[str]] = getattr(backend, "listdir", os.listdir)
    try:
        return sorted(own(path))
    except OSError:
        return None
