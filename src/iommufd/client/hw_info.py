"""What the IOMMU behind a device is: IOMMU_GET_HW_INFO, with the vendor's registers taken apart.

Invariants: the raw registers are kept, and every decoded property is one bit field of one of them, declared with its
place. Fields that user space is not meant to rely on are not declared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, overload

from iommufd.client.buffers import Scratch
from iommufd.uapi import iommufd as u
from iommufd.uapi.iommufd import iommu_hw_info_type, iommufd_hw_capabilities

if TYPE_CHECKING:
    from iommufd.client.device import Device


class Bits:
    """Bits ``high`` to ``low`` of the register attribute ``register``, plus ``plus``."""

    __slots__ = ("mask", "name", "plus", "register", "shift", "where")

    def __init__(self, register: str, high: int, low: int, plus: int = 0, index: int | None = None) -> None:
        self.register = register
        self.where = index
        self.shift = low
        self.mask = (1 << (high - low + 1)) - 1
        self.plus = plus

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, obj: None, owner: type) -> Bits: ...
    @overload
    def __get__(self, obj: object, owner: type) -> int: ...
    def __get__(self, obj: object | None, owner: type) -> Bits | int:
        if obj is None:
            return self
        value = getattr(obj, self.register)
        if self.where is not None:
            value = value[self.where]
        return int(value >> self.shift & self.mask) + self.plus


class Bit:
    """One bit of a register attribute, as a bool."""

    __slots__ = ("bits",)

    def __init__(self, register: str, bit: int, index: int | None = None) -> None:
        self.bits = Bits(register, bit, bit, index=index)

    @overload
    def __get__(self, obj: None, owner: type) -> Bit: ...
    @overload
    def __get__(self, obj: object, owner: type) -> bool: ...
    def __get__(self, obj: object | None, owner: type) -> Bit | bool:
        if obj is None:
            return self
        return bool(self.bits.__get__(obj, owner))


class _Registers:
    """Shows the decoded fields, too."""

    def features(self) -> dict[str, int | bool]:
        """Everything decoded, by name."""
        found = vars(type(self)).items()
        names = (name for name, what in found if isinstance(what, Bits | Bit | property) and name[-6:] != "_field")
        return {name: getattr(self, name) for name in names}

    def __repr__(self) -> str:
        shown = (
            name if value is True else f"{name}={value}"
            for name, value in self.features().items()
            if value is not False
        )
        return f"<{type(self).__name__} {' '.join(shown)}>"


@dataclass(frozen=True, repr=False)
class VTDInfo(_Registers):
    """Intel VT-d: capability and extended capability registers (VT-d manual, 11.4.2 and 11.4.3)."""

    flags: int
    cap: int
    ecap: int

    erratum_772415 = Bit("flags", 0)
    domains_field = Bits("cap", 2, 0)
    caching_mode = Bit("cap", 7)
    agaws = Bits("cap", 12, 8)
    max_guest_address_width = Bits("cap", 21, 16, 1)
    zero_length_read = Bit("cap", 22)
    second_stage_2m = Bit("cap", 34)
    second_stage_1g = Bit("cap", 35)
    page_selective_invalidation = Bit("cap", 39)
    first_stage_1g = Bit("cap", 56)
    posted_interrupts = Bit("cap", 59)
    first_stage_5_level = Bit("cap", 60)
    coherent_walk = Bit("ecap", 0)
    queued_invalidation = Bit("ecap", 1)
    device_tlb = Bit("ecap", 2)
    interrupt_remapping = Bit("ecap", 3)
    pass_through = Bit("ecap", 6)
    snoop_control = Bit("ecap", 7)
    nested = Bit("ecap", 26)
    page_requests = Bit("ecap", 29)
    execute_requests = Bit("ecap", 30)
    supervisor_requests = Bit("ecap", 31)
    extended_accessed_flag = Bit("ecap", 34)
    pasid_bits_field = Bits("ecap", 39, 35, 1)
    pasid = Bit("ecap", 40)
    scalable_mode = Bit("ecap", 43)
    second_stage_dirty = Bit("ecap", 45)
    second_stage = Bit("ecap", 46)
    first_stage = Bit("ecap", 47)

    @property
    def domains(self) -> int:
        """How many domain ids there are."""
        return 1 << 4 + 2 * self.domains_field

    @property
    def pasid_bits(self) -> int:
        """Width of a PASID; 0 without PASIDs."""
        return self.pasid_bits_field if self.pasid else 0


@dataclass(frozen=True, repr=False)
class SMMUv3Info(_Registers):
    """Arm SMMUv3: identification registers (SMMUv3 manual, 6.3)."""

    flags: int
    idr: tuple[int, ...]
    iidr: int
    aidr: int

    repeat_tlbi_cfgi = Bit("flags", 0)
    stage2 = Bit("idr", 0, 0)
    stage1 = Bit("idr", 1, 0)
    table_formats = Bits("idr", 3, 2, index=0)
    coherent_access = Bit("idr", 4, 0)
    hardware_access_dirty = Bits("idr", 7, 6, index=0)
    ats = Bit("idr", 10, 0)
    asid_16 = Bit("idr", 12, 0)
    msi = Bit("idr", 13, 0)
    pri = Bit("idr", 16, 0)
    vmid_16 = Bit("idr", 18, 0)
    two_level_cd = Bit("idr", 19, 0)
    stall_model = Bits("idr", 25, 24, index=0)
    stream_bits = Bits("idr", 5, 0, index=1)
    substream_bits = Bits("idr", 10, 6, index=1)
    force_write_back = Bit("idr", 8, 3)
    range_invalidation = Bit("idr", 10, 3)
    break_before_make_level = Bits("idr", 12, 11, index=3)
    output_size_field = Bits("idr", 2, 0, index=5)
    granule_4k = Bit("idr", 4, 5)
    granule_16k = Bit("idr", 5, 5)
    granule_64k = Bit("idr", 6, 5)
    stall_max = Bits("idr", 31, 16, index=5)
    implementer = Bits("iidr", 11, 0)
    product = Bits("iidr", 31, 20)

    @property
    def output_bits(self) -> int:
        """Width of an output address."""
        return (32, 36, 40, 42, 44, 48, 52, 56)[self.output_size_field]


@dataclass(frozen=True, repr=False)
class AMDInfo(_Registers):
    """AMD: extended feature registers (AMD I/O virtualization manual, EFR and EFR2)."""

    efr: int
    efr2: int

    ppr = Bit("efr", 1)
    x2apic = Bit("efr", 2)
    no_execute = Bit("efr", 3)
    guest_translation = Bit("efr", 4)
    invalidate_all = Bit("efr", 6)
    guest_vapic = Bit("efr", 7)
    host_levels_field = Bits("efr", 11, 10)
    guest_levels_field = Bits("efr", 13, 12)
    gcr3_levels = Bits("efr", 15, 14, 1)
    pasid_bits = Bits("efr", 36, 32, 1)
    host_access = Bit("efr", 49)
    host_dirty = Bit("efr", 52)
    snp = Bit("efr", 63)
    gcr3_guest_physical = Bit("efr2", 3)

    @property
    def guest_levels(self) -> int:
        """Levels of a guest page table: 4 or 5."""
        return 4 + self.guest_levels_field


@dataclass(frozen=True)
class Tegra241Info:
    """NVIDIA's command queue virtualization beside an SMMUv3."""

    flags: int
    version: int
    log2vcmdqs: int
    log2vsids: int


VendorInfo: TypeAlias = VTDInfo | SMMUv3Info | Tegra241Info | AMDInfo | bytes


@dataclass(frozen=True)
class HwInfo:
    """Answer of IOMMU_GET_HW_INFO. ``data`` is the vendor's part, decoded, or its bytes when ``type`` is not known."""

    type: iommu_hw_info_type | int
    capabilities: iommufd_hw_capabilities
    max_pasid_log2: int
    data: VendorInfo

    @property
    def dirty_tracking(self) -> bool:
        """Whether HWPTs may be made with ``dirty_tracking=True``."""
        return bool(self.capabilities & u.IOMMU_HW_CAP_DIRTY_TRACKING)

    @property
    def ats(self) -> bool:
        """Whether the device may cache translations (unknown to kernels before 7.1, which say True)."""
        return not self.capabilities & u.IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED


def get_hw_info(device: Device, type: int | None) -> HwInfo:
    """See :meth:`Device.hw_info`."""
    room = 256
    while True:
        memory = Scratch(length=room)
        answer = device._do(
            u.iommu_hw_info(
                flags=0 if type is None else u.IOMMU_HW_INFO_FLAG_INPUT_TYPE,
                dev_id=device._id,
                data_len=room,
                data_uptr=memory.address,
                out_data_type=type or 0,
            )
        )
        if answer.data_len <= room:
            break
        room = answer.data_len
    data = memory.bytes(answer.data_len)
    try:
        kind: iommu_hw_info_type | int = iommu_hw_info_type(answer.out_data_type)
    except ValueError:
        kind = answer.out_data_type
    capabilities = iommufd_hw_capabilities(answer.out_capabilities)
    return HwInfo(kind, capabilities, answer.out_max_pasid_log2, decode(kind, data))


def decode(type: int, data: bytes) -> VendorInfo:
    """The vendor's part of the answer; ``data`` itself for a type this module does not know."""
    if type == u.IOMMU_HW_INFO_TYPE_INTEL_VTD:
        vtd = u.iommu_hw_info_vtd.unpack(data)
        return VTDInfo(vtd.flags, vtd.cap_reg, vtd.ecap_reg)
    if type == u.IOMMU_HW_INFO_TYPE_ARM_SMMUV3:
        smmu = u.iommu_hw_info_arm_smmuv3.unpack(data)
        return SMMUv3Info(smmu.flags, tuple(smmu.idr), smmu.iidr, smmu.aidr)
    if type == u.IOMMU_HW_INFO_TYPE_TEGRA241_CMDQV:
        cmdqv = u.iommu_hw_info_tegra241_cmdqv.unpack(data)
        return Tegra241Info(cmdqv.flags, cmdqv.version, cmdqv.log2vcmdqs, cmdqv.log2vsids)
    if type == u.IOMMU_HW_INFO_TYPE_AMD:
        amd = u.iommu_hw_info_amd.unpack(data)
        return AMDInfo(amd.efr, amd.efr2)
    return data
