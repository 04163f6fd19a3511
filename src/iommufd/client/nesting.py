"""What a guest's page table is, in each vendor's words: data for a nested HWPT (kernel: enum iommu_hwpt_data_type).

Addresses are the guest's physical ones, IOVAs of the nesting parent. Values are checked by the kernel's driver, not
here (some of them only when a device is attached), except that they must fit their fields.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from iommufd.client.numbers import U32, number
from iommufd.uapi import iommufd as u


class HwptData(Protocol):
    """The vendor's part of IOMMU_HWPT_ALLOC: ``data_type`` tells what ``pack()`` gives."""

    @property
    def data_type(self) -> int:
        """The number of the kind, of the header's enumeration."""
        ...

    def pack(self) -> bytes:
        """The bytes of the data, as the vendor's struct has them."""
        ...


@dataclass(frozen=True, slots=True)
class RawData:
    """Data of hardware this module does not know, as its struct has it."""

    data_type: int
    data: bytes

    def pack(self) -> bytes:
        """``data``, unchanged."""
        return self.data


@dataclass(frozen=True, slots=True)
class VTDStage1:
    """VT-d: a guest's first-stage table. ``struct iommu_hwpt_vtd_s1``.

    ``pgtbl_addr`` is its root; ``addr_width`` 48 for four levels, 57 for five. ``sre``: supervisor requests; ``eafe``:
    extended accessed flag; ``wpe``: supervisor writes honour write protection."""

    pgtbl_addr: int
    addr_width: int = 48
    sre: bool = False
    eafe: bool = False
    wpe: bool = False
    data_type: ClassVar[int] = u.IOMMU_HWPT_DATA_VTD_S1

    def pack(self) -> bytes:
        """The struct's bytes. ValueError for numbers that do not fit."""
        flags = (
            (u.IOMMU_VTD_S1_SRE if self.sre else 0)
            | (u.IOMMU_VTD_S1_EAFE if self.eafe else 0)
            | (u.IOMMU_VTD_S1_WPE if self.wpe else 0)
        )
        return u.iommu_hwpt_vtd_s1(
            flags=flags,
            pgtbl_addr=number(self.pgtbl_addr, "pgtbl_addr"),
            addr_width=number(self.addr_width, "addr_width", U32),
        ).pack()


@dataclass(frozen=True, slots=True)
class SMMUv3Stage:
    """SMMUv3, on a vIOMMU: the first two words of the guest's stream table entry. ``struct iommu_hwpt_arm_smmuv3``.

    :meth:`translate`, :meth:`bypass` and :meth:`abort` make the three kinds there are."""

    word0: int
    word1: int = 0
    data_type: ClassVar[int] = u.IOMMU_HWPT_DATA_ARM_SMMUV3

    def pack(self) -> bytes:
        """The struct's bytes. ValueError for numbers that do not fit."""
        return u.iommu_hwpt_arm_smmuv3(ste=(number(self.word0, "word0"), number(self.word1, "word1"))).pack()

    @classmethod
    def translate(
        cls,
        context_table: int,
        *,
        substreams_log2: int = 0,
        format: int = 0,
        default_substream: int = 0,
        cacheability: tuple[int, int, int] = (1, 1, 3),
        stall_disabled: bool = False,
        ats: int = 0,
    ) -> SMMUv3Stage:
        """Stage 1 by the context descriptors at ``context_table`` (64-byte aligned), 2**``substreams_log2`` of them.

        ``format``: S1Fmt (0 linear). ``default_substream``: S1DSS. ``cacheability``: S1CIR, S1COR, S1CSH of the table's
        memory. ``stall_disabled``: S1STALLD. ``ats``: EATS."""
        if number(context_table, "context_table", (1 << 52) - 1) & 63:
            raise ValueError(f"context_table {context_table:#x} is not a multiple of 64")
        inner, outer, shareability = cacheability
        word0 = (
            1
            | 5 << 1
            | number(format, "format", 2) << 4
            | context_table
            | number(substreams_log2, "substreams_log2", 31) << 59
        )
        word1 = (
            number(default_substream, "default_substream", 3)
            | number(inner, "inner cacheability", 3) << 2
            | number(outer, "outer cacheability", 3) << 4
            | number(shareability, "shareability", 3) << 6
            | int(stall_disabled) << 27
            | number(ats, "ats", 3) << 28
        )
        return cls(word0, word1)

    @classmethod
    def bypass(cls) -> SMMUv3Stage:
        """The guest's SMMU lets the stream through: only the parent translates."""
        return cls(1 | 4 << 1)

    @classmethod
    def abort(cls) -> SMMUv3Stage:
        """The guest's SMMU stops the stream."""
        return cls(1)


@dataclass(frozen=True, slots=True)
class AMDGuest:
    """AMD, on a vIOMMU: the guest's device table entry, four words. ``struct iommu_hwpt_amd_guest``.

    :meth:`translate` makes one from its fields."""

    dte: tuple[int, int, int, int]
    data_type: ClassVar[int] = u.IOMMU_HWPT_DATA_AMD_GUEST

    def pack(self) -> bytes:
        """The struct's bytes. ValueError for numbers that do not fit, or not four of them."""
        if len(self.dte) != 4:
            raise ValueError(f"a device table entry has 4 words, not {len(self.dte)}")
        return u.iommu_hwpt_amd_guest(dte=tuple(number(word, "dte") for word in self.dte)).pack()

    @classmethod
    def translate(
        cls, gcr3: int, *, domain_id: int = 0, levels: int = 4, glx: int = 0, ppr: bool = False, giov: bool = True
    ) -> AMDGuest:
        """Guest translation by the CR3 table at ``gcr3`` (4 KiB aligned), ``glx`` + 1 levels deep.

        ``levels`` of the page tables: 4 or 5. ``giov``: requests without PASID use PASID 0. ``ppr``: page requests."""
        if number(gcr3, "gcr3", (1 << 52) - 1) & 0xFFF:
            raise ValueError(f"gcr3 {gcr3:#x} is not a multiple of 4096")
        if levels not in (4, 5):
            raise ValueError(f"a guest page table has 4 or 5 levels, not {levels}")
        word0 = (
            0b11
            | int(ppr) << 52
            | int(giov) << 54
            | 1 << 55
            | number(glx, "glx", 3) << 56
            | (gcr3 >> 12 & 0b111) << 58
            | 0b11 << 61
        )
        word1 = number(domain_id, "domain_id", 0xFFFF) | (gcr3 >> 15 & 0xFFFF) << 16 | (gcr3 >> 31) << 43
        return cls((word0, word1, (levels - 4) << 54, 0))
