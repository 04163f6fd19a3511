"""Region: one piece of a device's memory or registers (kernel: VFIO_DEVICE_GET_REGION_INFO)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from iommufd.client.buffers import piece
from iommufd.client.errors import IommufdError
from iommufd.client.numbers import U32, number, size
from iommufd.client.vfio.chain import ask, chain, query
from iommufd.client.vfio.irqs import descriptor
from iommufd.uapi import vfio as v

if TYPE_CHECKING:
    from iommufd.client.buffers import HasFileno
    from iommufd.client.handle import Handle

PAGE_SIZE = 4096


class Region:
    """Region ``index`` of a device: ``size`` bytes at ``offset`` of the device file.

    ``areas`` are the parts that can be mapped, ``(offset, size)`` within the region. ``type`` is ``(type, subtype)``
    of a region that is specific to the device, else None. ``msix_mappable``: a mapping may contain the MSI-X table."""

    def __init__(self, handle: Handle, index: int) -> None:
        self._handle = handle
        info, data = query(handle, v.VFIO_DEVICE_GET_REGION_INFO, v.vfio_region_info(index=number(index, "index", U32)))
        self.index = index
        self.size: int = info.size
        self.offset: int = info.offset
        self.flags: v.vfio_region_info_flags = v.vfio_region_info_flags(info.flags)
        self.type: tuple[int, int] | None = None
        self.msix_mappable = False
        whole = [(0, info.size)] if info.flags & v.VFIO_REGION_INFO_FLAG_MMAP else []
        self.areas: list[tuple[int, int]] = whole
        if info.flags & v.VFIO_REGION_INFO_FLAG_CAPS:
            for kind, at in chain(data, info.cap_offset):
                self._capability(kind, data[at:])

    def _capability(self, kind: int, data: bytes) -> None:
        if kind == v.VFIO_REGION_INFO_CAP_SPARSE_MMAP:
            sparse = v.vfio_region_info_cap_sparse_mmap.unpack(data)
            step = v.vfio_region_sparse_mmap_area.SIZE
            areas = [
                v.vfio_region_sparse_mmap_area.unpack(data[sparse.SIZE + i * step :]) for i in range(sparse.nr_areas)
            ]
            self.areas = [(area.offset, area.size) for area in areas if area.size]
        elif kind == v.VFIO_REGION_INFO_CAP_TYPE:
            found = v.vfio_region_info_cap_type.unpack(data)
            self.type = found.type, found.subtype
        elif kind == v.VFIO_REGION_INFO_CAP_MSIX_MAPPABLE:
            self.msix_mappable = True

    @property
    def readable(self) -> bool:
        """Whether :meth:`read` is possible."""
        return bool(self.flags & v.VFIO_REGION_INFO_FLAG_READ)

    @property
    def writeable(self) -> bool:
        """Whether :meth:`write` is possible."""
        return bool(self.flags & v.VFIO_REGION_INFO_FLAG_WRITE)

    @property
    def mappable(self) -> bool:
        """Whether some of it can be mapped: :attr:`areas`."""
        return bool(self.areas)

    def read(self, offset: int, count: int) -> bytes:
        """``count`` bytes at ``offset``. The kernel makes accesses of 8, 4, 2 or 1 bytes of it, as aligned as can be.

        ValueError outside the region; IommufdError EIO when the device answers less."""
        self._inside(offset, count)
        data = b""
        while len(data) < count:
            more = self._handle.read(count - len(data), self.offset + offset + len(data))
            if not more:
                raise IommufdError(errno.EIO, f"{self!r} gave {len(data)} of {count} bytes at {offset:#x}")
            data += more
        return data

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Writes ``data`` at ``offset``; as :meth:`read`."""
        left = piece(data)
        self._inside(offset, len(left))
        while left:
            done = self._handle.write(left, self.offset + offset)
            if not done:
                raise IommufdError(errno.EIO, f"{self!r} took nothing of {len(left)} bytes at {offset:#x}")
            left, offset = left[done:], offset + done

    def read_int(self, offset: int, width: int = 4) -> int:
        """A little-endian register of ``width`` bytes (1, 2, 4, 8), read at once."""
        return int.from_bytes(self.read(offset, _width(width)), "little")

    def write_int(self, offset: int, value: int, width: int = 4) -> None:
        """Writes a little-endian register of ``width`` bytes at once."""
        self.write(offset, number(value, "value", (1 << 8 * _width(width)) - 1).to_bytes(width, "little"))

    def mmap(self, offset: int = 0, length: int | None = None, *, writeable: bool | None = None) -> memoryview:
        """Maps (a part of) the region: reads and writes of the view go straight to the device. Whole pages.

        The mapping keeps the device bound until its last view is gone; a reset leaves it in place. ValueError for
        what is not within one of :attr:`areas`."""
        offset = number(offset, "offset")
        if length is None:
            length = next((size for at, size in self.areas if at == offset), self.size - offset)
        self._inside(offset, length)
        if not any(at <= offset and offset + length <= at + size for at, size in self.areas):
            raise ValueError(f"[{offset:#x}, {offset + length - 1:#x}] of {self!r} cannot be mapped")
        return self._handle.mmap(
            length, self.offset + offset, writeable=self.writeable if writeable is None else writeable
        )

    def write_on(self, event: HasFileno | int, offset: int, value: int, width: int = 4) -> None:
        """The kernel writes ``value`` to the register at ``offset`` (as :meth:`write_int`) whenever ``event``, an
        :class:`EventFd`, is signalled: a guest's doorbell without a detour (VFIO_DEVICE_IOEVENTFD).

        ENOTTY when the device has no such thing, EINVAL outside of BARs and on the MSI-X table, EEXIST when there is
        one for this offset, value and width already."""
        fd = descriptor(event, "event")
        if fd < 0:
            raise ValueError("event is a descriptor, not -1: stop_write_on() ends it")
        self._ioeventfd(fd, offset, value, width)

    def stop_write_on(self, offset: int, value: int, width: int = 4) -> None:
        """Ends the :meth:`write_on` of the same offset, value and width. ENODEV when there is none."""
        self._ioeventfd(-1, offset, value, width)

    def _ioeventfd(self, fd: int, offset: int, value: int, width: int) -> None:
        self._inside(offset, _width(width))
        question = v.vfio_device_ioeventfd(
            flags=width,  # VFIO_DEVICE_IOEVENTFD_8 and so on are the widths in bytes
            offset=self.offset + offset,
            data=number(value, "value", (1 << 8 * width) - 1),
            fd=fd,
        )
        ask(self._handle, v.VFIO_DEVICE_IOEVENTFD, question)

    def _inside(self, offset: int, count: int) -> None:
        if number(offset, "offset") + number(count, "count") > self.size or not count:
            raise ValueError(f"{count} bytes at {offset:#x}: {self!r} has {self.size:#x}")

    def __repr__(self) -> str:
        rights = "".join(
            letter for letter, has in (("r", self.readable), ("w", self.writeable), ("m", self.mappable)) if has
        )
        return f"<Region {self.index}: {size(self.size)}{', ' + rights if rights else ''}>"


def _width(width: int) -> int:
    if number(width, "width") not in (1, 2, 4, 8):
        raise ValueError(f"a register has 1, 2, 4 or 8 bytes, not {width}")
    return width
