"""Where the pointers inside the structs lead: which member, how many bytes, what they hold, who writes them.

Three readers: the trace (what memory a replay needs), the formatter (what to show instead of an address) and whoever
replays. Pointers that only name memory to be mapped (``user_va``) are not here: nothing reads or writes through them
during the call. Sources: the members' meaning in the published header and the mock device chapter, section 1.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from iommufd.uapi import iommufd as u
from iommufd.uapi import iommufd_test as t
from iommufd.uapi.declare import Struct

Vendor = dict[int, type[Struct]]

HWPT_DATA: Vendor = {
    u.IOMMU_HWPT_DATA_VTD_S1: u.iommu_hwpt_vtd_s1,
    u.IOMMU_HWPT_DATA_ARM_SMMUV3: u.iommu_hwpt_arm_smmuv3,
    u.IOMMU_HWPT_DATA_AMD_GUEST: u.iommu_hwpt_amd_guest,
    t.IOMMU_HWPT_DATA_SELFTEST: t.iommu_hwpt_selftest,
}
HW_INFO: Vendor = {
    u.IOMMU_HW_INFO_TYPE_INTEL_VTD: u.iommu_hw_info_vtd,
    u.IOMMU_HW_INFO_TYPE_ARM_SMMUV3: u.iommu_hw_info_arm_smmuv3,
    u.IOMMU_HW_INFO_TYPE_TEGRA241_CMDQV: u.iommu_hw_info_tegra241_cmdqv,
    u.IOMMU_HW_INFO_TYPE_AMD: u.iommu_hw_info_amd,
    t.IOMMU_HW_INFO_TYPE_SELFTEST: t.iommu_test_hw_info,
}
VIOMMU_DATA: Vendor = {
    u.IOMMU_VIOMMU_TYPE_TEGRA241_CMDQV: u.iommu_viommu_tegra241_cmdqv,
    t.IOMMU_VIOMMU_TYPE_SELFTEST: t.iommu_viommu_selftest,
}
# data_type and entry_len together: the mock HWPT and the mock vIOMMU share a type
INVALIDATE: dict[tuple[int, int], type[Struct]] = {
    (u.IOMMU_HWPT_INVALIDATE_DATA_VTD_S1, 24): u.iommu_hwpt_vtd_s1_invalidate,
    (u.IOMMU_VIOMMU_INVALIDATE_DATA_ARM_SMMUV3, 16): u.iommu_viommu_arm_smmuv3_invalidate,
    (t.IOMMU_HWPT_INVALIDATE_DATA_SELFTEST, 8): t.iommu_hwpt_invalidate_selftest,
    (t.IOMMU_VIOMMU_INVALIDATE_DATA_SELFTEST, 12): t.iommu_viommu_invalidate_selftest,
}


S: TypeAlias = Any
"""The struct that a row of :data:`POINTERS` is of: its functions use members that other structs have not."""


class Pointer(NamedTuple):
    """``field`` leads to ``size(s)`` bytes: read by the call (``read(s)``), written by it (``written(s)``), or both.

    ``element(s)`` is the struct found there, None for plain bytes; ``stride(s)`` the distance of two elements of an
    array, 0 when there is a single one."""

    field: str
    size: Callable[[S], int]
    read: Callable[[S], bool]
    written: Callable[[S], bool]
    element: Callable[[S], type[Struct] | None]
    stride: Callable[[S], int]


def _yes(s: S) -> bool:
    return True


def _no(s: S) -> bool:
    return False


def _nothing(s: S) -> None:
    return None


def _single(s: S) -> int:
    return 0


def _bits(length: int, page_size: int) -> int:
    """Bytes of a bitmap with one bit per ``page_size`` of ``length``."""
    return -(-(length // page_size) // 8) if page_size else 0


def _ranges(s: S) -> int:
    return int(s.num_iovas) * u.iommu_iova_range.SIZE


def _range(s: S) -> type[Struct]:
    return u.iommu_iova_range


POINTERS: dict[type[Struct], Pointer] = {
    u.iommu_ioas_allow_iovas: Pointer("allowed_iovas", _ranges, _yes, _no, _range, lambda s: 16),
    u.iommu_ioas_iova_ranges: Pointer("allowed_iovas", _ranges, _no, _yes, _range, lambda s: 16),
    u.iommu_hwpt_alloc: Pointer(
        "data_uptr", lambda s: s.data_len, _yes, _no, lambda s: HWPT_DATA.get(s.data_type), _single
    ),
    u.iommu_hwpt_invalidate: Pointer(
        "data_uptr",
        lambda s: s.entry_len * s.entry_num,
        _yes,
        _no,
        lambda s: INVALIDATE.get((s.data_type, s.entry_len)),
        lambda s: s.entry_len,
    ),
    u.iommu_viommu_alloc: Pointer(
        "data_uptr", lambda s: s.data_len, _yes, _yes, lambda s: VIOMMU_DATA.get(s.type), _single
    ),
    u.iommu_hw_info: Pointer(
        "data_uptr", lambda s: s.data_len, _no, _yes, lambda s: HW_INFO.get(s.out_data_type), _single
    ),
    u.iommu_hwpt_get_dirty_bitmap: Pointer(
        "data", lambda s: _bits(s.length, s.page_size), _yes, _yes, _nothing, _single
    ),
    t.test_access_rw: Pointer(
        "uptr",
        lambda s: s.length,
        lambda s: bool(s.flags & t.MOCK_ACCESS_RW_WRITE),
        lambda s: not s.flags & t.MOCK_ACCESS_RW_WRITE,
        _nothing,
        _single,
    ),
    t.test_dirty: Pointer("uptr", lambda s: _bits(s.length, s.page_size), _yes, _no, _nothing, _single),
}


def elements(pointer: Pointer, owner: Struct, data: bytes) -> list[Struct] | None:
    """What ``data`` holds, as structs; None when it is plain bytes. A last element that is cut short reads
    zero-extended."""
    cls = pointer.element(owner)
    if cls is None:
        return None
    stride = pointer.stride(owner)
    if stride == 0:
        return [cls.unpack(data)] if data else []
    return [cls.unpack(data[at : at + stride]) for at in range(0, len(data), stride)]
