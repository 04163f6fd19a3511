"""PciFunction: what is behind a VFIO PCI device: its configuration space, its BARs, its interrupts.

A device model derives from it and implements registers; one that does not is memory and silence: BARs of kind MEMORY
work, registers read as all ones, as an absent device does. Invariants:

* Accesses arrive in the widths hardware would see: naturally aligned, 8, 4, 2 or 1 bytes.
* Memory of a BAR lies at the BAR's own offset of the device file (:data:`REGION_SHIFT`), in a file in memory, so that a
  program can map it. It is zero after a reset.
* Model code runs on the caller's thread with no lock of the engine held.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from iommufd.vfio.interrupts import Interrupts
from iommufd.vfio.pci_config import BarKind, ConfigSpace, PciLayout

if TYPE_CHECKING:
    from iommufd.vfio.pci_config import Bar

REGION_SHIFT = 40
"""Region ``index`` begins at offset ``index << 40`` of the device file."""
STORE_SIZE = 6 << REGION_SHIFT

_KEEP_SIZE_PUNCH_HOLE = 0x3
_libc = ctypes.CDLL(None)


def pieces(offset: int, count: int) -> Iterator[tuple[int, int]]:
    """``[offset, offset + count)`` as (offset, width) of aligned accesses of 8, 4, 2 and 1 bytes, ascending."""
    end = offset + count
    while offset < end:
        width = 8
        while offset % width or width > end - offset:
            width >>= 1
        yield offset, width
        offset += width


class PciFunction:
    """One function. ``name`` is its address, ``DDDD:BB:DD.F``; ``addresses`` are where its BARs are on the bus.

    ``interrupts`` is how a model reaches the owner; :attr:`resettable` whether VFIO_DEVICE_RESET works."""

    def __init__(self, layout: PciLayout, name: str = "0000:00:00.0", addresses: dict[int, int] | None = None) -> None:
        self.layout = layout
        self.name = name
        self.addresses = dict(addresses or {})
        self.config = ConfigSpace(layout, addresses)
        self.interrupts = Interrupts(self.config)
        self._store = -1
        self._own_store = False

    @property
    def resettable(self) -> bool:
        """By default: an Express function with FLR."""
        return self.layout.express and self.layout.flr

    # --- for models to override

    def read_register(self, bar: int, offset: int, width: int) -> int:
        """A register of BAR ``bar``; ``width`` is 8, 4, 2 or 1 and divides ``offset``."""
        return (1 << 8 * width) - 1

    def write_register(self, bar: int, offset: int, width: int, value: int) -> None:
        """A write to a register of BAR ``bar``."""

    def reset(self) -> None:
        """Back to power-on: registers and memory. The owner's configuration space and interrupts are not the
        model's."""
        self.clear_memory()

    def opened(self) -> None:
        """The first user gets the device; KernelError refuses it."""

    def closed(self) -> None:
        """The last user gave it back; the function has been reset."""

    # --- regions, called by the device file

    def bar_read(self, bar: int, offset: int, count: int) -> bytes:
        """``count`` bytes of a BAR, inside it. A MSI-X table reads as all ones: it is VFIO's."""
        data = self._bar_read(bar, offset, count)
        hidden = self._msix_part(bar, offset, count)
        if hidden:
            start, end = hidden
            data = data[:start] + b"\xff" * (end - start) + data[end:]
        return data

    def bar_write(self, bar: int, offset: int, data: bytes) -> None:
        """Writes into a BAR, inside it, but not into a MSI-X table."""
        hidden = self._msix_part(bar, offset, len(data))
        if hidden:
            start, end = hidden
            self._bar_write(bar, offset, data[:start])
            self._bar_write(bar, offset + end, data[end:])
        else:
            self._bar_write(bar, offset, data)

    def only_table(self, bar: int, offset: int, count: int) -> bool:
        """Whether an access stays within the MSI-X table, and so never reaches the device."""
        return self._msix_part(bar, offset, count) == (0, count)

    def _msix_part(self, bar: int, offset: int, count: int) -> tuple[int, int] | None:
        """Which of ``count`` bytes at ``offset`` are the MSI-X table, as a slice."""
        layout = self.layout
        if not layout.msix or bar != layout.msix_bar:
            return None
        start = max(layout.msix_offset - offset, 0)
        end = min(layout.msix_offset + 16 * layout.msix - offset, count)
        return (start, end) if start < end else None

    def _bar_read(self, bar: int, offset: int, count: int) -> bytes:
        if self._is_memory(bar):
            data = os.pread(self.store(), count, (bar << REGION_SHIFT) + offset)
            return data.ljust(count, b"\0")
        return b"".join(
            (self.read_register(bar, at, width) & ((1 << 8 * width) - 1)).to_bytes(width, "little")
            for at, width in pieces(offset, count)
        )

    def _bar_write(self, bar: int, offset: int, data: bytes) -> None:
        if not data:
            return
        if self._is_memory(bar):
            os.pwrite(self.store(), data, (bar << REGION_SHIFT) + offset)
            return
        for at, width in pieces(offset, len(data)):
            value = int.from_bytes(data[at - offset : at - offset + width], "little")
            self.write_register(bar, at, width, value)

    def _is_memory(self, bar: int) -> bool:
        found = self.layout.bar(bar)
        return found is not None and found.kind is BarKind.MEMORY

    def rom_read(self, offset: int, count: int) -> bytes:
        """The expansion ROM, filled up with zeros to its BAR's size."""
        return self.layout.rom[offset : offset + count].ljust(count, b"\0")

    # --- memory of BARs

    def bar_mapped(self, bar: int) -> Bar | None:
        """The BAR if a program may map it."""
        found = self.layout.bar(bar)
        return found if found is not None and found.kind is BarKind.MEMORY and found.size >= 4096 else None

    def store(self) -> int:
        """The file behind memory BARs."""
        if self._store < 0:
            self._store = os.memfd_create("vfio-pci", os.MFD_CLOEXEC)
            self._own_store = True
            os.ftruncate(self._store, STORE_SIZE)
        return self._store

    def lend_store(self, fd: int) -> bool:
        """Memory moves into the file ``fd``, which a program maps, unless another such file has it already.

        Whether it is there now. The file's owner keeps it open until :meth:`take_store_back`."""
        if self._store == fd:
            return True
        if self._store >= 0 and not self._own_store:
            return False
        if os.fstat(fd).st_size < STORE_SIZE:
            os.ftruncate(fd, STORE_SIZE)
        self._move(fd)
        self._store, self._own_store = fd, False
        return True

    def take_store_back(self, fd: int) -> None:
        """The file ``fd`` is about to go; memory that was in it moves out."""
        if self._store == fd and not self._own_store:
            own = os.memfd_create("vfio-pci", os.MFD_CLOEXEC)
            os.ftruncate(own, STORE_SIZE)
            self._move(own)
            self._store, self._own_store = own, True

    def _move(self, fd: int) -> None:
        if self._store < 0:
            return
        for index, bar in enumerate(self.layout.bars):
            if bar is not None and bar.kind is BarKind.MEMORY:
                _copy(self._store, fd, index << REGION_SHIFT, bar.size)
        if self._own_store:
            os.close(self._store)

    def drop_store(self) -> None:
        """Memory is given up; what comes next is zero."""
        if self._own_store:
            os.close(self._store)
        self._store, self._own_store = -1, False

    def clear_memory(self) -> None:
        """Every memory BAR reads as zero; mappings a program has stay valid."""
        if self._store < 0:
            return
        for index, bar in enumerate(self.layout.bars):
            if bar is not None and bar.kind is BarKind.MEMORY:
                _punch(self._store, index << REGION_SHIFT, bar.size)


def _punch(fd: int, offset: int, count: int) -> None:
    """Gives the bytes back; they read as zero afterwards."""
    if _libc.fallocate(fd, _KEEP_SIZE_PUNCH_HOLE, ctypes.c_int64(offset), ctypes.c_int64(count)):
        os.pwrite(fd, bytes(count), offset)


def _copy(source: int, target: int, offset: int, count: int) -> None:
    """Copies what of ``[offset, offset + count)`` is not a hole."""
    end = offset + count
    while offset < end:
        try:
            start = os.lseek(source, offset, os.SEEK_DATA)
        except OSError:  # only a hole is left
            return
        stop = min(os.lseek(source, start, os.SEEK_HOLE), end)
        while start < stop:
            data = os.pread(source, min(stop - start, 1 << 20), start)
            os.pwrite(target, data, start)
            start += len(data)
        offset = max(stop, start)
