"""IOMMU_GET_HW_INFO: what the IOMMU of a device is and can do (devices.md 5)."""

from __future__ import annotations

import errno

from iommufd.engine.device import Device
from iommufd.engine.dispatch import Call, Handler, Respond
from iommufd.errors import KernelError
from iommufd.iommu.device import Device as CoreDevice
from iommufd.iommu.driver import Capability, HasHwInfo, HwInfo
from iommufd.uapi import iommufd as u
from iommufd.uapi import releases
from iommufd.uapi.commands import BY_NAME, Command

INPUT_TYPE = u.IOMMU_HW_INFO_FLAG_INPUT_TYPE
ZEROS = 1 << 20  # bytes of the caller's buffer cleared at a time


def get_hw_info(call: Call) -> None:
    """IOMMU_GET_HW_INFO; a truncated copy is a success, ``data_len`` becomes what there was to copy."""
    cmd = call.cmd
    assert isinstance(cmd, u.iommu_hw_info)
    known = 0 if releases.later(("IOMMU_HW_INFO_FLAG_INPUT_TYPE",), call.world.kernel) else INPUT_TYPE
    if cmd.flags & ~known:  # step 1
        raise KernelError(errno.EOPNOTSUPP, f"unknown flags {cmd.flags & ~known:#x}")
    if any(cmd.reserved):  # step 2
        raise KernelError(errno.EOPNOTSUPP, f"__reserved {cmd.reserved.hex()} is not 0")
    given = bool(cmd.flags & INPUT_TYPE)
    requested = cmd.in_data_type if given else u.IOMMU_HW_INFO_TYPE_DEFAULT  # step 3
    idev = call.get(cmd.dev_id, Device)  # step 4
    device, driver = idev.device, idev.device.driver
    if driver is None:  # step 5
        raise KernelError(errno.EOPNOTSUPP, f"{device.name} has no IOMMU")
    info = HwInfo(u.IOMMU_HW_INFO_TYPE_NONE, b"")  # step 8
    if isinstance(driver, HasHwInfo):
        info = driver.hw_info(device, requested)  # step 6
        if info.type == u.IOMMU_HW_INFO_TYPE_NONE:  # step 7
            raise KernelError(errno.EOPNOTSUPP, f"driver {driver.name} gives information of no type")
    room, there = cmd.data_len, len(info.data)
    if room:
        call.task.write(cmd.data_uptr, info.data[:room])  # step 9
        for at in range(there, room, ZEROS):  # step 10
            call.task.write(cmd.data_uptr + at, bytes(min(ZEROS, room - at)))
    cmd.data_len = there  # step 11
    cmd.out_data_type = info.type
    cmd.out_capabilities = capabilities(device)  # step 12
    cmd.out_max_pasid_log2 = max(device.max_pasids.bit_length() - 1, 0)


def capabilities(device: CoreDevice) -> int:
    """``out_capabilities`` of a device that has an IOMMU."""
    driver = device.driver
    assert driver is not None
    bits = 0
    if driver.capable(device, Capability.DIRTY_TRACKING):
        bits |= u.IOMMU_HW_CAP_DIRTY_TRACKING
    if device.pci and device.max_pasids:
        if device.pasid_exec:
            bits |= u.IOMMU_HW_CAP_PCI_PASID_EXEC
        if device.pasid_priv:
            bits |= u.IOMMU_HW_CAP_PCI_PASID_PRIV
    if not driver.capable(device, Capability.PCI_ATS_SUPPORTED):
        bits |= u.IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED
    return bits


ROWS: list[tuple[Command, Handler, Respond]] = [
    (BY_NAME["IOMMU_GET_HW_INFO"], get_hw_info, Respond.ON_SUCCESS),
]
