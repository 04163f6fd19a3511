"""VFIODevice: a device file bound to a context (kernel: struct vfio_device_file).

Invariants: before BIND the kernel refuses every call, so opening and binding are one step here. Unbinding is closing
the file; mappings of regions keep it open behind us. Detaching is implied by it.
"""

from __future__ import annotations

import errno
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar
from uuid import UUID

from iommufd.client.buffers import Scratch
from iommufd.client.device import Device
from iommufd.client.errors import IommufdError
from iommufd.client.handle import Handle
from iommufd.client.numbers import U32, instance, number
from iommufd.client.vfio import feature
from iommufd.client.vfio.chain import DeviceHandle, ask, chain, query
from iommufd.client.vfio.discovery import device_file
from iommufd.client.vfio.dma_log import DmaLog
from iommufd.client.vfio.irqs import Irq, descriptor
from iommufd.client.vfio.migration import Migration
from iommufd.client.vfio.regions import Region
from iommufd.uapi import vfio as v

if TYPE_CHECKING:
    from collections.abc import Sequence

    from iommufd.client.buffers import HasFileno
    from iommufd.client.context import Context
    from iommufd.uapi.declare import Struct

S = TypeVar("S", bound="Struct")


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """VFIO_DEVICE_GET_INFO: what kind of device, and how many regions and interrupts it has."""

    flags: v.vfio_device_flags
    num_regions: int
    num_irqs: int
    pci_atomic: v.vfio_pci_atomic_flags | None


@dataclass(frozen=True, slots=True)
class HotResetDevice:
    """A device that a hot reset of another resets too; ``address`` is its PCI address.

    ``device_id``: its number in this context; 0 when it has none but shares the IOMMU group of a device that has, and
    so belongs to this context as well; -1 when it does not, which prevents the reset."""

    device_id: int
    address: str

    @property
    def owned(self) -> bool:
        """Whether it may be reset with the others."""
        return self.device_id != v.VFIO_PCI_DEVID_NOT_OWNED


def open(where: str | os.PathLike[str], context: Context, *, token: bytes | UUID | None = None) -> VFIODevice:
    """Opens a VFIO device and binds it to ``context``: DMA is blocked from now on, until it is attached.

    ``where``: a PCI address (``"0000:01:00.0"``, found through /sys) or a device file (``/dev/vfio/devices/vfio0``).
    ``token``: the secret that a VF asks for whose PF is a user-space driver's (:meth:`VFIODevice.set_vf_token`).

    IommufdError ENODEV when no VFIO driver has the device, EACCES when the file may not be opened, EPERM when its group
    is in other use or its interrupts are not isolated, EBUSY when it is open through its group (devices 11.2)."""
    from iommufd.client.context import Context

    instance(context, Context, "context")
    if context.closed:
        raise context.failure(None)
    path = device_file(where, context.backend)
    try:
        fd = context.backend.open(path, os.O_RDWR)
    except OSError as error:
        why = error.why if isinstance(error, IommufdError) else error.strerror
        raise IommufdError(error.errno or 0, f"{path} cannot be opened: {why}", f"open {path}") from None
    handle = DeviceHandle(context.backend, fd, f"VFIO device {where}")
    try:
        return VFIODevice(context, _bind(handle, context, token), handle, path)
    except BaseException:
        handle.close_fd()
        raise


def token_bytes(token: bytes | UUID) -> bytes:
    """The 16 bytes of a VF token. TypeError for what is none, ValueError for another length."""
    if isinstance(token, UUID):
        return token.bytes
    if not isinstance(token, bytes | bytearray):
        raise TypeError(f"a token is 16 bytes or a UUID, not {type(token).__name__}")
    if len(token) != 16:
        raise ValueError(f"a token has 16 bytes, not {len(token)}")
    return bytes(token)


def _bind(handle: Handle, context: Context, token: bytes | UUID | None) -> int:
    flags, uuid = 0, Scratch()
    if token is not None:
        flags, uuid = v.VFIO_DEVICE_BIND_FLAG_TOKEN, Scratch(token_bytes(token))
    return ask(
        handle,
        v.VFIO_DEVICE_BIND_IOMMUFD,
        v.vfio_device_bind_iommufd(
            argsz=v.vfio_device_bind_iommufd.SIZE,
            flags=flags,
            iommufd=context.fileno(),
            token_uuid_ptr=uuid.address if flags else 0,
        ),
    ).out_devid


class VFIODevice(Device):
    """A bound VFIO device: attach it like any :class:`Device`, drive it through its regions and interrupts."""

    _adoptable = False

    def __init__(self, context: Context, number: int, handle: Handle, path: str) -> None:
        self._handle = handle
        self.path = path
        self._regions: dict[int, Region] = {}
        super().__init__(context, number)

    def fileno(self) -> int:
        """The descriptor of the device file."""
        return self._handle.fileno()

    # ------------------------------------------------------------------------------------------------------- attaching

    def _attach_pt(self, pt_id: int, pasid: int) -> int:
        question = v.vfio_device_attach_iommufd_pt(
            flags=v.VFIO_DEVICE_ATTACH_PASID if pasid else 0, pt_id=pt_id, pasid=pasid
        )
        return ask(self._handle, v.VFIO_DEVICE_ATTACH_IOMMUFD_PT, question, None if pasid else 12).pt_id

    _replace_pt = _attach_pt  # in VFIO attaching what is attached replaces

    def _detach_pt(self, pasid: int) -> None:
        question = v.vfio_device_detach_iommufd_pt(flags=v.VFIO_DEVICE_DETACH_PASID if pasid else 0, pasid=pasid)
        ask(self._handle, v.VFIO_DEVICE_DETACH_IOMMUFD_PT, question, None if pasid else 8)

    def _unbind(self) -> None:
        self._handle.close_fd()

    # --------------------------------------------------------------------------------------------------------- device

    def info(self) -> DeviceInfo:
        """What kind of device it is, and how many regions and interrupts it has."""
        answer, data = query(self._handle, v.VFIO_DEVICE_GET_INFO, v.vfio_device_info())
        atomic = None
        if answer.flags & v.VFIO_DEVICE_FLAGS_CAPS:
            for kind, at in chain(data, answer.cap_offset):
                if kind == v.VFIO_DEVICE_INFO_CAP_PCI_ATOMIC_COMP:
                    found = v.vfio_device_info_cap_pci_atomic_comp.unpack(data[at:])
                    atomic = v.vfio_pci_atomic_flags(found.flags)
        return DeviceInfo(v.vfio_device_flags(answer.flags), answer.num_regions, answer.num_irqs, atomic)

    def region(self, index: int) -> Region:
        """Region ``index``; of a PCI device a ``vfio_pci_region_index``. EINVAL when it has none of that number."""
        self._check()
        found = self._regions.get(number(index, "index", U32))
        if found is None:
            found = self._regions[index] = Region(self._handle, index)
        return found

    @property
    def regions(self) -> list[Region]:
        """The regions that are not empty."""
        found = []
        for index in range(self.info().num_regions):
            try:
                region = self.region(index)
            except IommufdError as error:
                if error.errno != errno.EINVAL:  # a number the device does not use (VGA, say)
                    raise
                continue
            if region.size:
                found.append(region)
        return found

    def bar(self, index: int) -> Region:
        """Base address register ``index`` of a PCI device."""
        return self.region(v.VFIO_PCI_BAR0_REGION_INDEX + number(index, "index", 5))

    @property
    def config(self) -> Region:
        """The configuration space of a PCI device."""
        return self.region(v.VFIO_PCI_CONFIG_REGION_INDEX)

    def irq(self, index: int) -> Irq:
        """Interrupt ``index``; of a PCI device a ``vfio_pci_irq_index``."""
        return Irq(self._handle, index)

    def reset(self) -> None:
        """Resets the device alone (VFIO_DEVICE_RESET). ENOTTY or EINVAL when it cannot be reset by itself."""
        self._handle.ioctl(v.VFIO_DEVICE_RESET, 0)

    def hot_reset_devices(self) -> list[HotResetDevice]:
        """The devices that a reset of the bus would reset (VFIO_DEVICE_GET_PCI_HOT_RESET_INFO)."""
        room = 32
        step = v.vfio_pci_dependent_device.SIZE
        while True:
            head = v.vfio_pci_hot_reset_info(argsz=12 + room * step)
            data = bytearray(head.pack().ljust(head.argsz, b"\0"))
            try:
                self._handle.ioctl(v.VFIO_DEVICE_GET_PCI_HOT_RESET_INFO, data)
                break
            except IommufdError as error:
                if error.errno != errno.ENOSPC:
                    raise
                room = v.vfio_pci_hot_reset_info.unpack(data).count + 8
        answer = v.vfio_pci_hot_reset_info.unpack(data)
        found = []
        for i in range(answer.count):
            device = v.vfio_pci_dependent_device.unpack(data[12 + i * step :])
            devid = device.devid - (1 << 32) if device.devid >> 31 else device.devid
            slot, function = device.devfn >> 3, device.devfn & 7
            found.append(HotResetDevice(devid, f"{device.segment:04x}:{device.bus:02x}:{slot:02x}.{function}"))
        return found

    def hot_reset(self) -> None:
        """Resets the bus; every device on it must belong to this context (VFIO_DEVICE_PCI_HOT_RESET)."""
        self._handle.ioctl(v.VFIO_DEVICE_PCI_HOT_RESET, bytearray(struct.pack("<III", 12, 0, 0)))

    # ------------------------------------------------------------------------------------------------------- features

    @property
    def migration(self) -> Migration:
        """Saving and resuming the device's state."""
        return Migration(self._handle)

    @property
    def dma_log(self) -> DmaLog:
        """The device's own record of where it writes."""
        return DmaLog(self._handle)

    def low_power_entry(self, wakeup: HasFileno | int | None = None) -> None:
        """Lets the device go to a low power state, from which any access through this API wakes it for a moment.

        ``wakeup``: an :class:`EventFd` (or what has a descriptor of one) that is told when the device woke, after which
        it stays awake (features LOW_POWER_ENTRY, LOW_POWER_ENTRY_WITH_WAKEUP). Mapped regions cannot be accessed until
        :meth:`low_power_exit`. EINVAL when it may already."""
        if wakeup is None:
            feature.put(self._handle, v.VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY)
            return
        feature.put(
            self._handle,
            v.VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP,
            v.vfio_device_low_power_entry_with_wakeup(wakeup_eventfd=descriptor(wakeup, "wakeup")),
        )

    def low_power_exit(self) -> None:
        """The device stays awake from now on (feature LOW_POWER_EXIT)."""
        feature.put(self._handle, v.VFIO_DEVICE_FEATURE_LOW_POWER_EXIT)

    def set_vf_token(self, token: bytes | UUID) -> None:
        """The secret (16 bytes, or a UUID) that who opens a VF of this PF must give as ``token`` (feature
        PCI_VF_TOKEN).

        ENOTTY for a device without SR-IOV enabled, EBUSY while a VF is open."""
        self.feature(v.VFIO_DEVICE_FEATURE_PCI_VF_TOKEN | v.VFIO_DEVICE_FEATURE_SET, token_bytes(token))

    def feature(self, flags: int, payload: bytes = b"") -> bytes:
        """VFIO_DEVICE_FEATURE as it is: ``flags`` is the feature with GET, SET and PROBE; the payload afterwards.

        ENOTTY when the device has no such feature."""
        return feature.call(self._handle, flags, instance(payload, bytes, "payload"))[0]

    def has_feature(self, feature_id: int, ways: int = 0) -> bool:
        """Whether the device has a feature (a ``vfio_device_feature_id``) for all of ``ways``
        (``vfio_device_feature_flags`` GET, SET)."""
        return feature.probe(self._handle, feature_id, ways)

    def get_feature(self, feature_id: int, payload: S) -> S:
        """Reads a feature: ``payload``, a struct of :mod:`iommufd.uapi.vfio`, as it came back."""
        return feature.get(self._handle, feature_id, payload)

    def set_feature(self, feature_id: int, payload: S | None = None) -> S | None:
        """Sets a feature: ``payload`` as it came back."""
        return feature.put(self._handle, feature_id, payload)

    def set_bus_master(self, enabled: bool) -> None:
        """Lets the device do DMA, or not (feature BUS_MASTER, Linux 6.7; PCI devices without it: the command
        register)."""
        op = v.VFIO_DEVICE_FEATURE_SET_MASTER if enabled else v.VFIO_DEVICE_FEATURE_CLEAR_MASTER
        if self.has_feature(v.VFIO_DEVICE_FEATURE_BUS_MASTER, v.VFIO_DEVICE_FEATURE_SET):
            self.set_feature(v.VFIO_DEVICE_FEATURE_BUS_MASTER, v.vfio_device_feature_bus_master(op=op))
            return
        command = self.config.read_int(4, 2)
        self.config.write_int(4, command | 4 if enabled else command & ~4, 2)

    def export_dmabuf(self, region: Region | int, ranges: Sequence[tuple[int, int]] | None = None) -> int:
        """A dma-buf of ``(offset, length)`` parts of a region, by default all of it, as a descriptor the caller closes.

        :meth:`IOAS.map_file` maps it for other devices: peer-to-peer DMA (feature DMA_BUF, Linux 6.19)."""
        if not isinstance(region, Region):
            region = self.region(region)
        parts = [(0, region.size)] if ranges is None else list(ranges)
        payload = v.vfio_device_feature_dma_buf(
            region_index=region.index, open_flags=os.O_RDWR | os.O_CLOEXEC, nr_ranges=len(parts)
        ).pack()
        for offset, length in parts:
            payload += v.vfio_region_dma_range(offset=number(offset, "offset"), length=number(length, "length")).pack()
        return feature.call(self._handle, v.VFIO_DEVICE_FEATURE_DMA_BUF | v.VFIO_DEVICE_FEATURE_GET, payload)[1]

    def _describe(self) -> str:
        return f"{self.path}, {super()._describe()}"
