"""VFIO_DEVICE_FEATURE: one ioctl, many features, of which a device has some (kernel: vfio_ioctl_device_feature).

Invariants: a feature that the device has not is ENOTTY, a way (GET, SET) that the feature has not is EINVAL; probing
changes nothing. What each feature means is in ``linux/vfio.h``.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING, TypeVar

from iommufd.client.calls import fields, pack
from iommufd.client.errors import IommufdError
from iommufd.client.numbers import U32, instance, number
from iommufd.uapi import vfio as v
from iommufd.uapi.declare import Struct

if TYPE_CHECKING:
    from iommufd.client.handle import Handle

S = TypeVar("S", bound=Struct)
HEAD = v.vfio_device_feature.SIZE
GET, SET, PROBE = v.VFIO_DEVICE_FEATURE_GET, v.VFIO_DEVICE_FEATURE_SET, v.VFIO_DEVICE_FEATURE_PROBE

PAYLOADS: dict[int, type[Struct]] = {
    v.VFIO_DEVICE_FEATURE_MIGRATION: v.vfio_device_feature_migration,
    v.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE: v.vfio_device_feature_mig_state,
    v.VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP: v.vfio_device_low_power_entry_with_wakeup,
    v.VFIO_DEVICE_FEATURE_DMA_LOGGING_START: v.vfio_device_feature_dma_logging_control,
    v.VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT: v.vfio_device_feature_dma_logging_report,
    v.VFIO_DEVICE_FEATURE_MIG_DATA_SIZE: v.vfio_device_feature_mig_data_size,
    v.VFIO_DEVICE_FEATURE_BUS_MASTER: v.vfio_device_feature_bus_master,
    v.VFIO_DEVICE_FEATURE_DMA_BUF: v.vfio_device_feature_dma_buf,
}


def call(handle: Handle, flags: int, payload: bytes = b"") -> tuple[bytes, int]:
    """The ioctl as it is: the payload as it came back, and the call's result (a descriptor, for some)."""
    data = bytearray(struct.pack("<II", HEAD + len(payload), number(flags, "flags", U32)) + payload)
    result = handle.ioctl(v.VFIO_DEVICE_FEATURE, data)
    return bytes(data[HEAD:]), result


def probe(handle: Handle, feature: int, ways: int = 0) -> bool:
    """Whether the device has ``feature`` for all of ``ways`` (GET, SET)."""
    flags = number(feature, "feature", v.VFIO_DEVICE_FEATURE_MASK) | number(ways, "ways", U32) | PROBE
    try:
        call(handle, flags)
    except IommufdError as error:
        if error.errno in (errno.ENOTTY, errno.EINVAL):
            return False
        raise
    return True


def get(handle: Handle, feature: int, payload: S) -> S:
    """Reads ``feature``: ``payload`` as it came back."""
    flags = number(feature, "feature", v.VFIO_DEVICE_FEATURE_MASK) | GET
    data = pack(instance(payload, Struct, "payload"))
    return type(payload).unpack(call(handle, flags, data)[0])


def put(handle: Handle, feature: int, payload: S | None = None) -> S | None:
    """Sets ``feature``: ``payload`` as it came back."""
    flags = number(feature, "feature", v.VFIO_DEVICE_FEATURE_MASK) | SET
    if payload is None:
        call(handle, flags)
        return None
    data = pack(instance(payload, Struct, "payload"))
    return type(payload).unpack(call(handle, flags, data)[0])


def show(data: bytes | bytearray) -> str:
    """The call as a person reads it: ``VFIO_DEVICE_FEATURE(SET MIG_DEVICE_STATE, device_state=STOP, data_fd=-1)``."""
    flags = int.from_bytes(data[4:8], "little")
    wanted = flags & v.VFIO_DEVICE_FEATURE_MASK
    known = wanted in list(v.vfio_device_feature_id)
    words = [way.name or "" for way in v.vfio_device_feature_flags if flags & way]
    words.append(v.vfio_device_feature_id(wanted).name if known else str(wanted))
    kind = PAYLOADS.get(wanted)
    payload = data[HEAD:]
    told = f", {fields(kind.unpack(payload))}" if kind is not None and len(payload) >= kind.SIZE else ""
    return f"VFIO_DEVICE_FEATURE({' '.join(words)}{told})"
