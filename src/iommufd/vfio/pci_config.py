"""PCI configuration space as vfio-pci shows it to the owner of a device (kernel: vfio-pci's virtual config space).

What is read and written is one image: the function's own registers, with those VFIO keeps to itself made harmless.
Invariants:

* A register is described once, by its value and the bits a write may change; everything a write brings about beyond
  that is one of the few effects in :meth:`ConfigSpace.write`.
* BARs behave as hardware does when sized: the bits below the size, and the type bits, never change.
* Nothing a program writes survives the last close of the device (:meth:`ConfigSpace.restore`).

Source of the rules: PCI Local Bus 3.0 chapter 6, PCI Express 5.0 chapter 7; where VFIO differs, what Linux 7.3.4
answered on QEMU's edu and e1000e functions.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from enum import Enum

from iommufd.errors import KernelError

VENDOR_ID, DEVICE_ID, COMMAND, STATUS, REVISION, CACHE_LINE = 0x00, 0x02, 0x04, 0x06, 0x08, 0x0C
HEADER_TYPE, BAR0, SUBSYSTEM_VENDOR, SUBSYSTEM_ID, ROM_BAR = 0x0E, 0x10, 0x2C, 0x2E, 0x30
CAPABILITIES, INTERRUPT_LINE, INTERRUPT_PIN = 0x34, 0x3C, 0x3D

COMMAND_IO, COMMAND_MEMORY, COMMAND_MASTER, COMMAND_SERR, COMMAND_INTX_DISABLE = 0x1, 0x2, 0x4, 0x100, 0x400
STATUS_CAP_LIST = 0x10
CAP_PM, CAP_MSI, CAP_EXPRESS, CAP_MSIX = 0x01, 0x05, 0x10, 0x11
MSI_ENABLE, MSI_64BIT = 0x1, 0x80
MSIX_ENABLE = 0x8000
DEVCAP_ROLE_BASED_ERRORS, DEVCAP_FLR = 0x8000, 1 << 28
DEVCTL_PAYLOAD, DEVCTL_READRQ, DEVCTL_FLR = 0xE0, 0x7000, 0x8000
PM_NO_SOFT_RESET = 0x8
D0, D3HOT = 0, 3

CONVENTIONAL_SIZE, EXPRESS_SIZE = 256, 4096


class BarKind(Enum):
    """What is behind a BAR."""

    MEMORY = "memory"  # memory of the device, which a program may map
    REGISTERS = "registers"  # memory-mapped registers: every access reaches the model
    IO = "io"  # I/O ports


@dataclass(frozen=True, slots=True)
class Bar:
    """One base address register: ``size`` bytes, a power of two, at least 16 (4 for I/O)."""

    size: int
    kind: BarKind = BarKind.REGISTERS
    wide: bool = False  # a 64-bit BAR, which takes the next one too
    prefetchable: bool = False

    def __post_init__(self) -> None:
        smallest = 4 if self.kind is BarKind.IO else 16
        if self.size < smallest or self.size & (self.size - 1):
            raise ValueError(f"a BAR of {self.size} bytes; it must be a power of two, at least {smallest}")

    @property
    def type_bits(self) -> int:
        """The low bits of the register, which say what kind it is (PCI 3.0, 6.2.5.1)."""
        if self.kind is BarKind.IO:
            return 1
        return (4 if self.wide else 0) | (8 if self.prefetchable else 0)

    @property
    def mask(self) -> int:
        """The address bits that can be changed, as 64 bits."""
        return -self.size & (2**64 - 1)


@dataclass(frozen=True, slots=True)
class PciLayout:
    """What a PCI function is made of; its configuration space follows from it.

    ``bars`` by index, None where there is none. ``interrupt_pin`` 1 is INTA, 0 none. ``msi`` is 0, 1, 2, 4 ... 32
    vectors, ``msix`` 0 to 2048 vectors whose table lies in BAR ``msix_bar`` at ``msix_offset``. ``express`` makes it
    a PCI Express endpoint with 4096 bytes of configuration space, ``flr`` gives that a function-level reset."""

    vendor: int = 0x1AF4
    device: int = 0x10F0
    class_code: int = 0xFF0000
    revision: int = 0
    subsystem_vendor: int = 0x1AF4
    subsystem_device: int = 0x1100
    bars: tuple[Bar | None, ...] = ()
    rom: bytes = b""
    interrupt_pin: int = 1
    msi: int = 1
    msix: int = 0
    msix_bar: int = 0
    msix_offset: int = 0
    express: bool = True
    flr: bool = True
    power_management: bool = True

    def __post_init__(self) -> None:
        if len(self.bars) > 6:
            raise ValueError(f"{len(self.bars)} BARs; a function has 6")
        for index, bar in enumerate(self.bars):
            if bar is not None and bar.wide and (index == 5 or (len(self.bars) > index + 1 and self.bars[index + 1])):
                raise ValueError(f"BAR {index} is 64 bits wide and needs the next one")
        if self.msi not in (0, 1, 2, 4, 8, 16, 32):
            raise ValueError(f"{self.msi} MSI vectors; there can be 0, 1, 2, 4, 8, 16 or 32")
        if not 0 <= self.msix <= 2048:
            raise ValueError(f"{self.msix} MSI-X vectors; there can be 0 to 2048")
        if self.msix:
            bar = self.bar(self.msix_bar)
            if bar is None or self.msix_offset % 8 or self.pending_offset + (self.msix + 63) // 64 * 8 > bar.size:
                raise ValueError(f"the MSI-X table at {self.msix_offset:#x} does not fit BAR {self.msix_bar}")

    def bar(self, index: int) -> Bar | None:
        """BAR ``index``, None when there is none."""
        return self.bars[index] if index < len(self.bars) else None

    @property
    def pending_offset(self) -> int:
        """Where in BAR ``msix_bar`` the MSI-X pending bits are: behind the table."""
        return (self.msix_offset + 16 * self.msix + 7) & ~7

    @property
    def rom_size(self) -> int:
        """Bytes of the ROM BAR: the image's, rounded up to a power of two of at least 2 KiB; 0 without an image."""
        return max(2048, 1 << (len(self.rom) - 1).bit_length()) if self.rom else 0

    @property
    def config_size(self) -> int:
        """Bytes of configuration space: 4096 of a PCI Express function, 256 of a conventional one."""
        return EXPRESS_SIZE if self.express else CONVENTIONAL_SIZE


class ConfigSpace:
    """One function's configuration space. ``addresses`` are where the platform put its BARs (index 6: the ROM).

    ``reset_requested`` is set by a write that asks for a function-level reset; whoever wrote takes it back.
    ``msi_vectors`` and ``msix_enabled`` are set while the owner has those interrupts configured."""

    def __init__(self, layout: PciLayout, addresses: dict[int, int] | None = None, line: int = 11) -> None:
        self.layout = layout
        self.size = layout.config_size
        self.value = bytearray(self.size)
        self.writable = bytearray(self.size)
        self.msi_at = self.msix_at = self.express_at = self.pm_at = 0
        self.msi_vectors = 0
        self.reset_requested = False
        self._header(addresses or {}, line)
        self._capabilities()
        self._initial = bytes(self.value)

    # --- making it

    def _put(self, at: int, value: int, size: int, writable: int = 0) -> None:
        self.value[at : at + size] = value.to_bytes(size, "little")
        self.writable[at : at + size] = writable.to_bytes(size, "little")

    def _get(self, at: int, size: int) -> int:
        return int.from_bytes(self.value[at : at + size], "little")

    def _header(self, addresses: dict[int, int], line: int) -> None:
        layout = self.layout
        self._put(VENDOR_ID, layout.vendor, 2)
        self._put(DEVICE_ID, layout.device, 2)
        enabled = COMMAND_IO | COMMAND_MEMORY | COMMAND_SERR  # as firmware and the probe of vfio-pci leave it
        self._put(COMMAND, enabled, 2, enabled | COMMAND_MASTER | COMMAND_INTX_DISABLE)
        self._put(REVISION, layout.class_code << 8 | layout.revision, 4)
        self._put(CACHE_LINE, 0, 1, 0xFF)
        self._put(SUBSYSTEM_VENDOR, layout.subsystem_vendor, 2)
        self._put(SUBSYSTEM_ID, layout.subsystem_device, 2)
        for index, bar in enumerate(layout.bars):
            if bar is not None:
                self._put(BAR0 + 4 * index, *_low(addresses.get(index, 0) | bar.type_bits, bar.mask))
                if bar.wide:
                    self._put(BAR0 + 4 * index + 4, *_low(addresses.get(index, 0) >> 32, bar.mask >> 32))
        if layout.rom_size:
            self._put(ROM_BAR, *_low(addresses.get(6, 0), -layout.rom_size & 0xFFFFFFFF | 1))
        self._put(INTERRUPT_LINE, line if layout.interrupt_pin else 0xFF, 1, 0xFF)
        self._put(INTERRUPT_PIN, layout.interrupt_pin, 1)

    def _capabilities(self) -> None:
        layout = self.layout
        link = CAPABILITIES
        at = 0x40

        def begin(number: int, size: int) -> int:
            nonlocal link, at
            here = at
            self._put(link, here, 1)
            self._put(here, number, 2)
            link, at = here + 1, here + (size + 3) // 4 * 4
            return here

        if layout.power_management:
            self.pm_at = begin(CAP_PM, 8)
            self._put(self.pm_at + 2, 3, 2)  # version 3, D0 and D3 only, no PME
            self._put(self.pm_at + 4, PM_NO_SOFT_RESET, 2, 3)
        if layout.msi:
            self.msi_at = begin(CAP_MSI, 14)
            capable = (layout.msi.bit_length() - 1) << 1
            self._put(self.msi_at + 2, MSI_64BIT | capable, 2, 0xFF)
            self._put(self.msi_at + 4, 0, 8, 2**64 - 1)  # all bits, as the owner's own record of them
            self._put(self.msi_at + 12, 0, 2, 0xFFFF)
        if layout.msix:
            self.msix_at = begin(CAP_MSIX, 12)
            self._put(self.msix_at + 2, layout.msix - 1, 2)
            self._put(self.msix_at + 4, layout.msix_offset | layout.msix_bar, 4)
            self._put(self.msix_at + 8, layout.pending_offset | layout.msix_bar, 4)
        if layout.express:
            self.express_at = begin(CAP_EXPRESS, 0x3C)
            self._put(self.express_at + 2, 2, 2)  # version 2, an endpoint
            self._put(self.express_at + 4, DEVCAP_ROLE_BASED_ERRORS | (DEVCAP_FLR if layout.flr else 0), 4)
            self._put(self.express_at + 8, 0, 2, DEVCTL_PAYLOAD | DEVCTL_READRQ)
            self._put(self.express_at + 12, 0x11, 4)  # one lane at 2.5 GT/s
            self._put(self.express_at + 18, 0x11, 2)
        if link != CAPABILITIES:
            self._put(STATUS, STATUS_CAP_LIST, 2)

    # --- using it

    def check(self, offset: int, count: int) -> None:
        """EFAULT unless ``[offset, offset + count)`` is inside."""
        if offset + count > self.size:
            raise KernelError(
                errno.EFAULT, f"bytes [{offset:#x}, {offset + count:#x}) of a configuration space of {self.size:#x}"
            )

    def read(self, offset: int, count: int) -> bytes:
        """EFAULT beyond the end."""
        self.check(offset, count)
        return bytes(self.value[offset : offset + count])

    def write(self, offset: int, data: bytes) -> None:
        """Changes what may be changed; EFAULT beyond the end."""
        self.check(offset, len(data))
        state = self.power_state
        for at, new in enumerate(data, offset):
            mask = self.writable[at]
            self.value[at] = self.value[at] & ~mask | new & mask
        end = offset + len(data)
        if self.pm_at and offset <= self.pm_at + 4 < end and self.power_state not in (D0, D3HOT):
            self.value[self.pm_at + 4] = self.value[self.pm_at + 4] & ~3 | state  # it has no D1 and D2
        if self.msi_at and offset <= self.msi_at + 2 < end:
            self._settle_msi()
        control = self.express_at + 9  # the byte with the reset bit of DEVCTL
        if self.express_at and self.layout.flr and offset <= control < end:
            self.reset_requested |= bool(data[control - offset] & DEVCTL_FLR >> 8)

    def _settle_msi(self) -> None:
        """VFIO: enabled only while the owner has vectors configured, and never for more of them."""
        flags = self.value[self.msi_at + 2]
        if not self.msi_vectors:
            flags &= ~(MSI_ENABLE | 0x70)
        else:
            most = (self.msi_vectors - 1).bit_length()
            flags = flags & ~0x70 | min(flags >> 4 & 7, most) << 4
        self.value[self.msi_at + 2] = flags

    def set_msi(self, vectors: int) -> None:
        """The owner configured (or, with 0, gave up) MSI vectors."""
        self.msi_vectors = vectors
        if self.msi_at:
            self._settle_msi()

    def set_msix(self, enabled: bool) -> None:
        """The owner configured or gave up MSI-X: the enable bit shows it, and cannot be written."""
        if self.msix_at:
            flags = self._get(self.msix_at + 2, 2) & ~MSIX_ENABLE
            self._put(self.msix_at + 2, flags | MSIX_ENABLE if enabled else flags, 2)

    def restore(self) -> None:
        """As before anybody opened the device."""
        self.value[:] = self._initial
        self.msi_vectors = 0
        self.reset_requested = False

    @property
    def command(self) -> int:
        """The command register."""
        return self._get(COMMAND, 2)

    @property
    def power_state(self) -> int:
        """0 (D0, awake) to 3 (D3hot), of the power management capability."""
        return self.value[self.pm_at + 4] & 3 if self.pm_at else D0

    def wake(self) -> None:
        """Back to D0, as VFIO does before it resets the function."""
        if self.pm_at:
            self.value[self.pm_at + 4] &= ~3

    @property
    def line_disabled(self) -> bool:
        """Whether the owner keeps the interrupt line silent (Interrupt Disable of the command register)."""
        return bool(self.command & COMMAND_INTX_DISABLE)

    @property
    def memory_enabled(self) -> bool:
        """Whether memory BARs answer: COMMAND says so and the function is not asleep."""
        return bool(self.command & COMMAND_MEMORY) and self.power_state == D0

    @property
    def bus_master(self) -> bool:
        """Whether the function may do DMA."""
        return bool(self.command & COMMAND_MASTER) and self.power_state == D0


def _low(value: int, mask: int) -> tuple[int, int, int]:
    """(value, size, writable) of a 32-bit address register."""
    return value & 0xFFFFFFFF, 4, mask & 0xFFFFFFFF
