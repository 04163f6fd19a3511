"""Devices: attach, replace, detach, PASIDs; what goes with what when things are closed."""

from __future__ import annotations

import errno
import mmap

import pytest

import iommufd
from iommufd.testing.mock import APERTURE, MockDevice, huge_data, nested_data
from iommufd.uapi import iommufd_test as t


def test_attach_replace_detach(context: iommufd.Context, ioas: iommufd.IOAS, memory: mmap.mmap) -> None:
    ioas.map(memory, APERTURE)
    device = MockDevice(context, ioas)
    first = device.hwpt
    assert isinstance(first, iommufd.HWPT) and first.automatic and first.ioas is ioas
    assert device.attached_to(first)
    assert ioas.devices == [device]

    other = context.alloc_ioas()
    second = device.replace(other)
    assert second is device.hwpt is not first
    assert first.closed  # the kernel's own page table went with its last device
    assert ioas.devices == [] and other.devices == [device]

    device.detach()
    assert device.hwpts == {} and second.closed
    assert device.attached_to(None)
    device.detach()  # never fails

    table = other.alloc_hwpt(device)
    assert device.attach(table) is table
    assert device.hwpts == {0: table}
    assert table.devices == [device]
    assert device.replace(table) is table
    assert not table.closed


def test_what_the_kernel_calls_attach_and_replace(context: iommufd.Context, ioas: iommufd.IOAS) -> None:
    device = MockDevice(context, ioas)
    with pytest.raises(iommufd.IommufdError, match=r"use replace\(\)") as at:
        device.attach(ioas)
    assert at.value.errno == errno.EBUSY
    device.detach()
    with pytest.raises(iommufd.IommufdError, match=r"use attach\(\)") as at:
        device.replace(ioas)
    assert at.value.errno == errno.EINVAL


def test_a_failed_replace_changes_nothing(context: iommufd.Context, ioas: iommufd.IOAS) -> None:
    device = MockDevice(context, ioas, dirty=False)
    before = device.hwpt
    other = context.alloc_ioas()
    other.map(bytearray(4096), 0x1000)  # below what the device reaches
    with pytest.raises(iommufd.IommufdError) as at:
        device.replace(other)
    assert at.value.errno == errno.EADDRINUSE
    assert before is not None
    assert device.hwpt is before and not before.closed
    assert other.devices == [] and ioas.devices == [device]


def test_two_devices_share_the_page_table(context: iommufd.Context, ioas: iommufd.IOAS) -> None:
    first, second = MockDevice(context, ioas), MockDevice(context, ioas)
    assert first.hwpt is second.hwpt
    first.close()
    assert second.hwpt is not None and not second.hwpt.closed
    second.detach()
    assert len(context.objects) == 2


def test_pasids(context: iommufd.Context, ioas: iommufd.IOAS) -> None:
    device = MockDevice(context, ioas, pasid=True)
    assert device.hw_info().max_pasid_log2 == 20
    table = ioas.alloc_hwpt(device, pasid=True)
    device.replace(table)
    other = context.alloc_ioas().alloc_hwpt(device, pasid=True)
    assert device.attach(other, pasid=7) is other
    assert device.attached_to(other, 7)
    assert device.hwpts == {0: table, 7: other}
    assert device.replace(table, pasid=7) is table
    assert table.devices == [device]
    with pytest.raises(ValueError, match="PASID 0 is the device itself"):
        device.attach(table, pasid=0)
    with pytest.raises(ValueError, match="pasid -1"):
        device.attach(table, pasid=-1)
    device.detach(pasid=7)
    assert device.attached_to(None, 7)
    assert "PASID" not in repr(device)
    device.attach(other, pasid=9)
    device.close()  # PASIDs first, or the kernel would leak them
    other.destroy()
    table.destroy()


def test_hw_info(context: iommufd.Context, ioas: iommufd.IOAS) -> None:
    info = MockDevice(context, ioas).hw_info()
    assert info.type == t.IOMMU_HW_INFO_TYPE_SELFTEST
    assert info.data == bytes(4) + t.IOMMU_HW_INFO_SELFTEST_REGVAL.to_bytes(4, "little")
    assert info.dirty_tracking and not info.ats
    assert not MockDevice(context, ioas, dirty=False).hw_info().dirty_tracking
    with pytest.raises(iommufd.IommufdError) as at:
        context.devices[0].hw_info(type=3)
    assert at.value.errno == errno.EOPNOTSUPP


def test_a_device_that_others_bound(context: iommufd.Context, ioas: iommufd.IOAS) -> None:
    """Its IOMMU can be asked, page tables made; only who bound it attaches it."""
    mock = MockDevice(context, ioas)
    known = context.adopt(iommufd.Device, mock.number)
    assert known.hw_info() == mock.hw_info()
    table = ioas.alloc_hwpt(known)
    with pytest.raises(iommufd.IommufdError, match="bound by someone else") as at:
        known.attach(table)
    assert at.value.errno == errno.EOPNOTSUPP
    with pytest.raises(iommufd.IommufdError) as at:
        known.destroy()
    assert at.value.errno == errno.EBUSY
    known.close()
    assert not mock.closed


def test_closing_takes_what_depends_on_it(context: iommufd.Context, ioas: iommufd.IOAS) -> None:
    """close() goes leaves first; destroy() is the bare IOMMU_DESTROY."""
    device = MockDevice(context, ioas)
    parent = ioas.alloc_hwpt(device, nest_parent=True)
    nested = parent.alloc_nested(device, nested_data())
    device.replace(nested)
    for held in (ioas, parent, nested, device):
        with pytest.raises(iommufd.IommufdError) as at:
            held.destroy()
        assert at.value.errno == errno.EBUSY
        assert not held.closed
    ioas.close()
    assert parent.closed and nested.closed and ioas.closed
    assert not device.closed and device.hwpt is None
    assert context.objects == [device]
    ioas.close()
    nested.close()


def test_a_page_table_of_another_format(context: iommufd.Context, ioas: iommufd.IOAS) -> None:
    device = MockDevice(context, ioas)
    other = context.alloc_ioas()
    other.alloc_hwpt(device, data=huge_data())
    assert other.iova_alignment == 4096
    assert other.iova_ranges() == [(0, 0x3FFFFFFFFF)]


def test_only_things_of_this_context(context: iommufd.Context, ioas: iommufd.IOAS, system: str) -> None:
    device = MockDevice(context, ioas)
    with iommufd.open("mock" if system == "software" else None) as stranger:
        theirs = stranger.alloc_ioas()
        with pytest.raises(ValueError, match="not of the same context"):
            device.replace(theirs)
        with pytest.raises(ValueError, match="not of the same context"):
            theirs.alloc_hwpt(device)
        with pytest.raises(ValueError, match="not of the same context"):
            ioas.alloc_hwpt(device, fault_queue=stranger.alloc_fault_queue())
    with pytest.raises(TypeError, match="attached to an IOAS or a HWPT, not int"):
        device.replace(ioas.id)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(TypeError, match="device is a Device, not IOAS"):
        ioas.alloc_hwpt(ioas)  # type: ignore[arg-type]  # wrong on purpose
    assert len(ioas.context.objects) == 3
