"""What the vendors' structs look like: page table data, invalidations, hardware information."""

from __future__ import annotations

import struct

import pytest

import iommufd
from iommufd.client.hw_info import decode


def words(data: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(data) // 8}Q", data)


# ------------------------------------------------------------------------------------------------- data of nested HWPTs


def test_vtd_stage_1() -> None:
    data = iommufd.VTDStage1(0x1234_5000, 57, sre=True, wpe=True)
    assert data.data_type == 1
    assert data.pack() == struct.pack("<QQII", 1 | 4, 0x1234_5000, 57, 0)
    assert iommufd.VTDStage1(0).pack() == struct.pack("<QQII", 0, 0, 48, 0)


def test_smmuv3_stream_table_entry() -> None:
    """Formats 8.2: V 0, Cfg 3:1, S1Fmt 5:4, S1ContextPtr 51:6, S1CDMax 63:59; S1DSS 1:0 ... EATS 29:28."""
    data = iommufd.SMMUv3Stage.translate(
        0xF_FFFF_FFFF_FFC0, substreams_log2=31, format=2, default_substream=2, ats=1, stall_disabled=True
    )
    assert data.data_type == 2
    low, high = words(data.pack())
    assert low == 1 | 5 << 1 | 2 << 4 | 0xF_FFFF_FFFF_FFC0 | 31 << 59
    assert high == 2 | 1 << 2 | 1 << 4 | 3 << 6 | 1 << 27 | 1 << 28
    assert words(iommufd.SMMUv3Stage.bypass().pack()) == (1 | 4 << 1, 0)
    assert words(iommufd.SMMUv3Stage.abort().pack()) == (1, 0)
    with pytest.raises(ValueError, match="0x20 is not a multiple of 64"):
        iommufd.SMMUv3Stage.translate(0x20)
    with pytest.raises(ValueError, match="format 3"):
        iommufd.SMMUv3Stage.translate(0, format=3)


def test_amd_device_table_entry() -> None:
    """Formats 8.3: GCR3 is in three pieces, [14:12] at 60:58, [30:15] at 31:16 and [51:31] at 63:43 of the next
    word."""
    gcr3 = 0xA_BCDE_F123_5000
    data = iommufd.AMDGuest.translate(gcr3, domain_id=7, levels=5, glx=2, ppr=True)
    assert data.data_type == 3
    w0, w1, w2, w3 = words(data.pack())
    assert (w0 >> 58 & 7) << 12 | (w1 >> 16 & 0xFFFF) << 15 | (w1 >> 43) << 31 == gcr3
    assert w0 & 3 == 3 and w0 >> 52 & 1 and w0 >> 54 & 3 == 3 and w0 >> 56 & 3 == 2 and w0 >> 61 & 3 == 3
    assert w1 & 0xFFFF == 7
    assert (w2, w3) == (1 << 54, 0)
    assert w0 >> 9 & 7 == 0 and w0 >> 12 & (1 << 40) - 1 == 0  # Mode and the host's root are the host's
    with pytest.raises(ValueError, match="4 or 5 levels, not 3"):
        iommufd.AMDGuest.translate(0, levels=3)
    with pytest.raises(ValueError, match="has 4 words, not 2"):
        iommufd.AMDGuest((1, 2)).pack()  # type: ignore[arg-type]  # wrong on purpose


# -------------------------------------------------------------------------------------------------------- invalidations


def test_vtd_invalidation() -> None:
    assert iommufd.VTDInvalidation.data_type == 0
    assert iommufd.VTDInvalidation().pack() == struct.pack("<QQII", 0, 2**64 - 1, 0, 0)
    assert iommufd.VTDInvalidation(0x5000, 4, leaf=True).pack() == struct.pack("<QQII", 0x5000, 4, 1, 0)


Invalidation = iommufd.SMMUv3Invalidation


@pytest.mark.parametrize(
    ("command", "expected"),
    [  # formats 9.2
        (Invalidation.tlbi_nh_all(), (0x10, 0)),
        (Invalidation.tlbi_nsnh_all(), (0x30, 0)),
        (Invalidation.tlbi_nh_asid(0xABCD), (0x11 | 0xABCD << 48, 0)),
        (Invalidation.tlbi_nh_va(3, 0x1234_5678, leaf=True), (0x12 | 3 << 48, 0x1234_5001)),
        (Invalidation.tlbi_nh_vaa(0x7000), (0x13, 0x7000)),
        (Invalidation.cfgi_cd(5, 9), (0x05 | 9 << 12 | 5 << 32, 1)),
        (Invalidation.cfgi_cd_all(5), (0x06 | 5 << 32, 0)),
        (Invalidation.atc_inv(5), (0x40 | 5 << 32, 52)),
        (Invalidation.atc_inv(5, 0x8000, 2, ssid=1), (0x40 | 1 << 11 | 1 << 12 | 5 << 32, 0x8002)),
    ],
)
def test_smmuv3_commands(command: iommufd.SMMUv3Invalidation, expected: tuple[int, int]) -> None:
    assert command.data_type == 1
    assert words(command.pack()) == expected


# -------------------------------------------------------------------------------------------------- hardware
# information


def test_vtd_registers() -> None:
    """Formats 12.12: the values of 11.1, field by field."""
    info = decode(1, struct.pack("<IIQQ", 1, 0, 0x91ED078C40780E06, 0x1EF9EA4F050C7))
    assert isinstance(info, iommufd.VTDInfo)
    assert info.erratum_772415 and info.domains == 65536 and info.max_guest_address_width == 57
    assert info.agaws == 0b01110 and info.zero_length_read and not info.caching_mode
    assert info.second_stage_2m and info.second_stage_1g and info.page_selective_invalidation
    assert info.first_stage_1g and info.first_stage_5_level and not info.posted_interrupts
    assert info.coherent_walk and info.queued_invalidation and info.device_tlb and info.snoop_control
    assert info.nested and info.page_requests and info.supervisor_requests and info.extended_accessed_flag
    assert info.pasid and info.pasid_bits == 20 and info.scalable_mode and info.first_stage and info.second_stage
    assert "nested" in repr(info) and "posted_interrupts" not in repr(info) and "_field" not in repr(info)


def test_smmuv3_registers() -> None:
    idr = (0x084D349B, 0x02738520, 0, 0x1500, 0, 0x00800075)
    info = decode(2, struct.pack("<II6III", 0, 0, *idr, 0x4871143B, 2))
    assert isinstance(info, iommufd.SMMUv3Info)
    assert info.idr == idr
    assert info.stage1 and info.stage2 and info.coherent_access and info.ats and info.pri and info.asid_16
    assert (info.table_formats, info.hardware_access_dirty, info.stall_model) == (2, 2, 0)
    assert (info.stream_bits, info.substream_bits, info.output_bits) == (32, 20, 48)
    assert info.force_write_back and info.range_invalidation and info.break_before_make_level == 2
    assert info.granule_4k and info.granule_16k and info.granule_64k and info.stall_max == 128
    assert (info.implementer, info.product) == (0x43B, 0x487)
    assert not info.repeat_tlbi_cfgi


def test_amd_registers() -> None:
    info = decode(4, struct.pack("<QQ", 0x150013000098DA, 0x808))
    assert isinstance(info, iommufd.AMDInfo)
    assert info.ppr and info.no_execute and info.guest_translation and info.host_dirty and info.gcr3_guest_physical
    assert (info.guest_levels, info.gcr3_levels, info.pasid_bits) == (5, 3, 20)
    assert not info.x2apic and not info.snp and not info.host_access


def test_others() -> None:
    assert decode(3, struct.pack("<IBBBB", 0, 1, 1, 4, 0)) == iommufd.Tegra241Info(0, 1, 1, 4)
    assert decode(0xFEEDBEEF, b"what it is") == b"what it is"
