"""The VFIO client against the real vfio-pci: QEMU's edu device in the oracle VM (`make oracle`).

What test_vfio_features.py can only hold against the header is answered here by a kernel, as far as this device goes.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import iommufd
from iommufd.uapi import vfio as v

pytestmark = pytest.mark.oracle

EDU = ("0x1234", "0x11e8")
IDENTITY, INVERTED = 0x00, 0x04  # registers: a constant; what was written, with every bit the other way round
RAISE, ACKNOWLEDGE = 0x60, 0x64


def edu() -> list[str]:
    """The addresses of the edu devices that vfio-pci has: one on the root bus, two behind a conventional bridge."""
    found = []
    for path in sorted(Path("/sys/bus/pci/devices").glob("*")):
        ids = tuple((path / name).read_text().strip() for name in ("vendor", "device"))
        if ids == EDU and (path / "vfio-dev").exists():
            found.append(path.name)
    if not found:
        pytest.skip("no edu device is bound to vfio-pci")
    return found


@pytest.fixture
def device() -> Iterator[iommufd.VFIODevice]:
    with iommufd.open(backend="kernel") as context:
        opened = context.open_device(edu()[0])
        opened.config.write_int(4, opened.config.read_int(4, 2) | 2, 2)  # memory decoding
        yield opened


def test_features_it_has_not(device: iommufd.VFIODevice) -> None:
    calls: list[Callable[[], Any]] = [
        device.migration.flags,
        lambda: device.migration.state,
        lambda: device.migration.set_state(v.VFIO_DEVICE_STATE_STOP),
        device.migration.data_size,
        lambda: device.dma_log.start([(0, 4096)]),
        device.dma_log.stop,
        lambda: device.dma_log.read(0, 4096),
        lambda: device.set_vf_token(bytes(16)),
    ]
    for call in calls:
        with pytest.raises(iommufd.IommufdError) as at:
            call()
        assert at.value.errno == errno.ENOTTY, at.value
    assert not device.dma_log.supported
    assert not device.has_feature(v.VFIO_DEVICE_FEATURE_MIGRATION, v.VFIO_DEVICE_FEATURE_GET)


def test_low_power(device: iommufd.VFIODevice) -> None:
    assert device.has_feature(v.VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY, v.VFIO_DEVICE_FEATURE_SET)
    device.low_power_entry()
    with pytest.raises(iommufd.IommufdError) as at:
        device.low_power_entry()
    assert at.value.errno == errno.EINVAL
    device.low_power_exit()
    with iommufd.EventFd() as event:
        device.low_power_entry(event)
        assert device.config.read_int(0) == 0x11E8_1234  # asleep or not, it answers
    device.low_power_exit()


def test_an_eventfd_writes_a_register(device: iommufd.VFIODevice) -> None:
    bar = device.bar(0)
    assert bar.read_int(IDENTITY) & 0xFF == 0xED
    with iommufd.EventFd() as bell:
        bar.write_on(bell, INVERTED, 0x1234_5678)
        with pytest.raises(FileExistsError, match=r"VFIO_DEVICE_IOEVENTFD\("):
            bar.write_on(bell, INVERTED, 0x1234_5678)
        bell.signal()
        assert bar.read_int(INVERTED) == ~0x1234_5678 & 0xFFFF_FFFF
        bar.stop_write_on(INVERTED, 0x1234_5678)
        bar.write_int(INVERTED, 0)
        bell.signal()
        assert bar.read_int(INVERTED) == 0xFFFF_FFFF
        with pytest.raises(iommufd.IommufdError) as at:
            bar.stop_write_on(INVERTED, 0x1234_5678)
        assert at.value.errno == errno.ENODEV
        with pytest.raises(iommufd.IommufdError) as at:
            device.config.write_on(bell, 0x3C, 0, 1)  # the configuration space is no BAR
        assert at.value.errno == errno.EINVAL


def test_intx_is_masked_when_it_came_and_unmasked_by_an_eventfd(device: iommufd.VFIODevice) -> None:
    irq, bar = device.irq(v.VFIO_PCI_INTX_IRQ_INDEX), device.bar(0)
    assert irq.count == 1 and irq.flags & v.vfio_irq_info_flags.AUTOMASKED
    (event,) = irq.enable()
    with iommufd.EventFd() as resample:
        irq.unmask_on([resample])
        bar.write_int(RAISE, 1)
        assert event.wait(10) == 1
        bar.write_int(ACKNOWLEDGE, 1)
        bar.write_int(RAISE, 1)
        assert event.wait(0.2) == 0  # masked since it came
        resample.signal()
        assert event.wait(10) == 1
        bar.write_int(ACKNOWLEDGE, 1)
        with pytest.raises(iommufd.IommufdError) as at:
            irq.mask_on([resample])
        assert at.value.errno == errno.ENOTTY
        irq.unmask_on([None])
    irq.trigger(only=[False])
    assert event.take() == 0
    irq.trigger(only=[True])
    assert event.take() == 1
    irq.disable()
    event.close()


def test_a_bus_is_reset_by_who_has_all_of_it() -> None:
    alone, first, second = edu()
    with iommufd.open(backend="kernel") as context:
        with pytest.raises(iommufd.IommufdError) as at:
            context.open_device(alone).hot_reset_devices()
        assert at.value.errno == errno.ENODEV  # a root bus cannot be reset
        one = context.open_device(first)
        assert {reset.address: reset.device_id for reset in one.hot_reset_devices()} == {first: one.id, second: 0}
        assert all(reset.owned for reset in one.hot_reset_devices())  # its neighbour shares its IOMMU group
        one.hot_reset()
        with iommufd.open(backend="kernel") as other, pytest.raises(PermissionError):
            other.open_device(second)
