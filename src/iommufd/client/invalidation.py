"""Entries of IOMMU_HWPT_INVALIDATE: which cached translations of a guest's tables go (kernel: iommufd_hwpt_invalidate).

Each vendor has its own entry; all entries of one call are of one kind. Fields are checked by the kernel, not here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from iommufd.client.buffers import Scratch
from iommufd.client.calls import pack, packed
from iommufd.client.errors import IommufdError, invalidation_error
from iommufd.client.numbers import U32, U64, items, number
from iommufd.uapi import iommufd as u

if TYPE_CHECKING:
    from iommufd.client.objects import Object


class Entry(Protocol):
    """One request: ``data_type`` tells the kernel what ``pack()`` gives."""

    @property
    def data_type(self) -> int:
        """The number of the kind, of the header's enumeration."""
        ...

    def pack(self) -> bytes:
        """The bytes of an entry, as the vendor's struct has them."""
        ...


@dataclass(frozen=True, slots=True)
class RawEntry:
    """A request of hardware this module does not know: ``data`` as the vendor's struct has it."""

    data_type: int
    data: bytes

    def pack(self) -> bytes:
        """``data``, unchanged."""
        return self.data


@dataclass(frozen=True, slots=True)
class VTDInvalidation:
    """VT-d, on a nested HWPT: ``npages`` pages of 4 KiB from ``addr``; by default everything.

    ``leaf``: only the last level has changed. The kernel widens a range to an aligned power of two."""

    addr: int = 0
    npages: int = U64
    leaf: bool = False
    data_type: ClassVar[int] = u.IOMMU_HWPT_INVALIDATE_DATA_VTD_S1

    def pack(self) -> bytes:
        """The struct's bytes. ValueError for numbers that do not fit."""
        flags = u.IOMMU_VTD_INV_FLAGS_LEAF if self.leaf else 0
        return pack(u.iommu_hwpt_vtd_s1_invalidate(addr=self.addr, npages=self.npages, flags=flags))


@dataclass(frozen=True, slots=True)
class SMMUv3Invalidation:
    """SMMUv3, on a vIOMMU: one command of the guest's queue, two words. The class methods make those that are allowed.

    Stream ids are the guest's own (``virt_id`` of the vDEVICE); the VMID is the kernel's to fill in. (SMMUv3 manual,
    chapter 4.)"""

    low: int
    high: int = 0
    data_type: ClassVar[int] = u.IOMMU_VIOMMU_INVALIDATE_DATA_ARM_SMMUV3

    def pack(self) -> bytes:
        """The command's two words. ValueError for numbers that do not fit."""
        return struct.pack("<QQ", number(self.low, "low"), number(self.high, "high"))

    @classmethod
    def tlbi_nh_all(cls) -> SMMUv3Invalidation:
        """All stage-1 translations of the guest."""
        return cls(0x10)

    @classmethod
    def tlbi_nsnh_all(cls) -> SMMUv3Invalidation:
        """The same, as a guest that thinks it has the whole SMMU says it."""
        return cls(0x30)

    @classmethod
    def tlbi_nh_asid(cls, asid: int) -> SMMUv3Invalidation:
        """Those of one address space of the guest."""
        return cls(0x11 | number(asid, "asid", 0xFFFF) << 48)

    @classmethod
    def tlbi_nh_va(cls, asid: int, va: int, *, leaf: bool = False) -> SMMUv3Invalidation:
        """That of one virtual address of one address space."""
        return cls(0x12 | number(asid, "asid", 0xFFFF) << 48, number(va, "va") & ~0xFFF | leaf)

    @classmethod
    def tlbi_nh_vaa(cls, va: int, *, leaf: bool = False) -> SMMUv3Invalidation:
        """That of one virtual address in all address spaces."""
        return cls(0x13, number(va, "va") & ~0xFFF | leaf)

    @classmethod
    def cfgi_cd(cls, sid: int, ssid: int = 0, *, leaf: bool = True) -> SMMUv3Invalidation:
        """The cached context descriptor of a stream and substream."""
        return cls(0x05 | number(ssid, "ssid", 0xFFFFF) << 12 | number(sid, "sid", U32) << 32, int(leaf))

    @classmethod
    def cfgi_cd_all(cls, sid: int) -> SMMUv3Invalidation:
        """All context descriptors of a stream."""
        return cls(0x06 | number(sid, "sid", U32) << 32)

    @classmethod
    def atc_inv(cls, sid: int, addr: int = 0, log2_pages: int = 52, ssid: int | None = None) -> SMMUv3Invalidation:
        """What the device itself has cached: 2**``log2_pages`` pages at ``addr`` (52: everything)."""
        low = 0x40 | number(sid, "sid", U32) << 32
        if ssid is not None:
            low |= 1 << 11 | number(ssid, "ssid", 0xFFFFF) << 12
        return cls(low, number(addr, "addr") & ~0xFFF | number(log2_pages, "log2_pages", 63))


def invalidate(target: Object, entries: Iterable[Entry]) -> int:
    """IOMMU_HWPT_INVALIDATE on a nested HWPT or a vIOMMU; how many entries were handled (all, or it raises)."""
    entries = items(entries, "entries")
    if not entries:
        return 0
    requests = [packed(entry, "entry of an invalidation", "data_type") for entry in entries]
    kind, length = entries[0].data_type, len(requests[0])
    if any(entry.data_type != kind for entry in entries) or any(len(data) != length for data in requests):
        raise ValueError("all entries of one invalidation are of one kind")
    memory = Scratch(b"".join(requests))
    query = u.iommu_hwpt_invalidate(
        size=u.iommu_hwpt_invalidate.SIZE,
        hwpt_id=target._id,
        data_uptr=memory.address,
        data_type=number(kind, "data_type", U32),
        entry_len=length,
        entry_num=number(len(entries), "the number of entries", U32),
    )
    data = bytearray(query.pack())
    try:
        target.context.ioctl(u.IOMMU_HWPT_INVALIDATE, data)
    except IommufdError as error:
        if target.closed:
            raise target._gone(error) from None
        handled = u.iommu_hwpt_invalidate.unpack(data).entry_num
        if handled >= len(entries):  # the call failed before the entries were looked at
            handled = 0
        raise invalidation_error(error.errno or 0, error.why, error.request, handled) from None
    return u.iommu_hwpt_invalidate.unpack(data).entry_num
