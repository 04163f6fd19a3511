"""Every command as one row of data: number, struct, smallest accepted size, release.

The dispatch table, the decoder and the support page read these rows; nothing about a command is stated twice.
``minimum`` is the byte after the last mandatory member (core 1.4); the full size a release knows is
``struct.size_in(release)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from iommufd.uapi import iommufd as u
from iommufd.uapi import iommufd_test as t
from iommufd.uapi.declare import Release, Struct, release


class Command(NamedTuple):
    """One command: ``number`` is the full 32-bit ioctl number, ``minimum`` in bytes, ``since`` the first release that
    has it. ``arm``: which struct the caller's bytes are, where that depends on them."""

    name: str
    number: int
    struct: type[Struct]
    minimum: int
    since: Release
    arm: Callable[[bytes], type[Struct]] | None = None

    @property
    def nr(self) -> int:
        return self.number & 0xFF


def _command(
    name: str, struct: type[Struct], minimum: int, since: str, arm: Callable[[bytes], type[Struct]] | None = None
) -> Command:
    number = getattr(u, name) if hasattr(u, name) else getattr(t, name)
    return Command(name, number, struct, minimum, release(since), arm)


COMMANDS: tuple[Command, ...] = (
    _command("IOMMU_DESTROY", u.iommu_destroy, 8, "6.2"),
    _command("IOMMU_IOAS_ALLOC", u.iommu_ioas_alloc, 12, "6.2"),
    _command("IOMMU_IOAS_ALLOW_IOVAS", u.iommu_ioas_allow_iovas, 24, "6.2"),
    _command("IOMMU_IOAS_COPY", u.iommu_ioas_copy, 40, "6.2"),
    _command("IOMMU_IOAS_IOVA_RANGES", u.iommu_ioas_iova_ranges, 32, "6.2"),
    _command("IOMMU_IOAS_MAP", u.iommu_ioas_map, 40, "6.2"),
    _command("IOMMU_IOAS_UNMAP", u.iommu_ioas_unmap, 24, "6.2"),
    _command("IOMMU_OPTION", u.iommu_option, 24, "6.2"),
    _command("IOMMU_VFIO_IOAS", u.iommu_vfio_ioas, 12, "6.2"),
    _command("IOMMU_HWPT_ALLOC", u.iommu_hwpt_alloc, 24, "6.6"),
    _command("IOMMU_GET_HW_INFO", u.iommu_hw_info, 32, "6.6"),
    _command("IOMMU_HWPT_SET_DIRTY_TRACKING", u.iommu_hwpt_set_dirty_tracking, 16, "6.7"),
    _command("IOMMU_HWPT_GET_DIRTY_BITMAP", u.iommu_hwpt_get_dirty_bitmap, 48, "6.7"),
    _command("IOMMU_HWPT_INVALIDATE", u.iommu_hwpt_invalidate, 32, "6.8"),
    _command("IOMMU_FAULT_QUEUE_ALLOC", u.iommu_fault_alloc, 16, "6.11"),
    _command("IOMMU_IOAS_MAP_FILE", u.iommu_ioas_map_file, 40, "6.13"),
    _command("IOMMU_VIOMMU_ALLOC", u.iommu_viommu_alloc, 24, "6.13"),
    _command("IOMMU_VDEVICE_ALLOC", u.iommu_vdevice_alloc, 24, "6.13"),
    _command("IOMMU_IOAS_CHANGE_PROCESS", u.iommu_ioas_change_process, 8, "6.13"),
    _command("IOMMU_VEVENTQ_ALLOC", u.iommu_veventq_alloc, 28, "6.15"),
    _command("IOMMU_HW_QUEUE_ALLOC", u.iommu_hw_queue_alloc, 40, "6.17"),
    _command("IOMMU_IOAS_NOIOMMU_GET_PA", u.iommu_ioas_noiommu_get_pa, 40, "7.3"),
    _command("IOMMU_TEST_CMD", t.iommu_test_cmd, 68, "6.2", t.arm_of),
)

BY_NUMBER: dict[int, Command] = {command.number: command for command in COMMANDS}
BY_NAME: dict[str, Command] = {command.name: command for command in COMMANDS}
