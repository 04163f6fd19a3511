"""VFIO device files: found by address, bound, attached; regions, interrupts, reset, features.

On the machine "pci", whose functions have memory and interrupts. The same client drives a real PCI device in the oracle
VM: examples/vfio_edu.py.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import os
from collections.abc import Iterator

import pytest

import iommufd
from iommufd.client.backends.kernel import KernelBackend
from iommufd.client.vfio.chain import chain
from iommufd.client.vfio.discovery import device_file
from iommufd.uapi import vfio as v

ALONE, FIRST, SECOND = "0000:00:03.0", "0000:01:00.0", "0000:01:00.1"


@pytest.fixture
def context() -> Iterator[iommufd.Context]:
    with iommufd.open(machine="pci") as opened:
        yield opened


@pytest.fixture
def device(context: iommufd.Context) -> iommufd.VFIODevice:
    return context.open_device(ALONE)


# ------------------------------------------------------------------------------------------------------------- opening


def test_a_device_is_found_by_address_or_path(context: iommufd.Context) -> None:
    path = device_file("00:03.0", context.backend)
    assert path == device_file(ALONE.upper(), context.backend)
    with iommufd.vfio_open(path, context) as device:
        assert device.path == path
        assert context.devices == [device]
    assert context.devices == [] and device.closed
    assert context.open_device(ALONE).path == path


@pytest.mark.parametrize(
    ("where", "error", "match"),
    [
        ("0000:7f:00.0", FileNotFoundError, "there is no PCI device 0000:7f:00.0"),
        ("0000:00:1c.0", iommufd.IommufdError, "no VFIO driver has the PCI device 0000:00:1c.0: write vfio-pci to"),
        ("/dev/vfio/devices/vfio99", FileNotFoundError, "vfio99 cannot be opened"),
        ("eth0", ValueError, "neither a device file nor a PCI address"),
        ("0000:01:00.8", ValueError, "neither a device file nor a PCI address"),
    ],
)
def test_what_cannot_be_opened(context: iommufd.Context, where: str, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        context.open_device(where)
    assert context.objects == []


def test_opening_twice(context: iommufd.Context, device: iommufd.VFIODevice) -> None:
    with pytest.raises(iommufd.IommufdError) as at:
        context.open_device(ALONE)
    assert at.value.errno == errno.EINVAL
    assert at.value.request.startswith("VFIO_DEVICE_BIND_IOMMUFD(")
    with pytest.raises(ValueError, match="a token has 16 bytes, not 3"):
        context.open_device(FIRST, token=b"abc")
    with pytest.raises(TypeError, match="context is a Context, not IOAS"):
        iommufd.vfio_open(FIRST, context.alloc_ioas())  # type: ignore[arg-type]  # wrong on purpose
    device.close()
    assert context.open_device(ALONE).id


def test_attaching(context: iommufd.Context, device: iommufd.VFIODevice) -> None:
    ioas, other = context.alloc_ioas(), context.alloc_ioas()
    first = device.attach(ioas)
    assert isinstance(first, iommufd.HWPT) and first.automatic and ioas.iova_alignment == 4096
    with pytest.raises(iommufd.IommufdError) as at:  # VFIO alone would replace
        device.attach(other)
    assert at.value.errno == errno.EBUSY
    table = other.alloc_hwpt(device)
    assert device.replace(table) is table and first.closed
    device.detach()
    device.detach()
    assert device.attach(table) is table
    with pytest.raises(iommufd.IommufdError) as at:
        device.replace(context.adopt(iommufd.HWPT, 77))
    assert (at.value.errno, at.value.request) == (
        errno.ENOENT,
        "VFIO_DEVICE_ATTACH_IOMMUFD_PT(flags=0, pt_id=77, pasid=0)",
    )
    assert device.hwpt is table
    device.close()
    assert table.devices == []


def test_a_pasid(context: iommufd.Context, device: iommufd.VFIODevice) -> None:
    ioas = context.alloc_ioas()
    table = ioas.alloc_hwpt(device, pasid=True)
    device.attach(table)
    device.attach(table, pasid=5)
    assert device.hwpts == {0: table, 5: table}
    device.detach(pasid=5)
    assert device.hwpts == {0: table}


def test_the_context_closes_its_devices(context: iommufd.Context, device: iommufd.VFIODevice) -> None:
    fd = device.fileno()
    ioas = context.alloc_ioas()
    device.attach(ioas)
    backend = context.backend
    context.close()
    assert device.closed
    with pytest.raises(iommufd.IommufdError, match="is closed"):
        device.region(0)
    with iommufd.open(backend=backend) as again:
        assert again.open_device(ALONE).fileno() <= fd


# ------------------------------------------------------------------------------------------------------------- regions


def test_info(device: iommufd.VFIODevice) -> None:
    info = device.info()
    assert info.flags & v.VFIO_DEVICE_FLAGS_PCI
    assert (info.num_regions, info.num_irqs) == (9, 5)
    assert [region.index for region in device.regions] == [0, 1, v.VFIO_PCI_CONFIG_REGION_INDEX]
    assert [region.size for region in device.regions] == [0x10000, 0x1000, 4096]
    assert repr(device.bar(0)) == "<Region 0: 64 KiB, rwm>"


def test_registers(device: iommufd.VFIODevice) -> None:
    bar = device.bar(0)
    assert device.region(0) is bar
    bar.write(0x10, b"0123456789")
    assert bar.read(0x10, 10) == b"0123456789"
    bar.write_int(0x40, 0x1122_3344_5566_7788, 8)
    assert bar.read_int(0x44) == 0x1122_3344
    assert bar.read_int(0x40, 1) == 0x88
    for call in (
        lambda: bar.read(0x10000, 1),
        lambda: bar.read(0xFFFF, 2),
        lambda: bar.read(-1, 1),
        lambda: bar.read(0, 0),
        lambda: bar.write(0xFFFF, b"ab"),
        lambda: bar.read_int(0, 3),
        lambda: bar.write_int(0, 1 << 32),
        lambda: bar.write_int(0, -1),
        lambda: device.bar(6),
    ):
        with pytest.raises(ValueError, match=r"has 0x10000|offset -1|1, 2, 4 or 8|value|index"):
            call()
    with pytest.raises(iommufd.IommufdError):
        device.region(40)


def test_the_configuration_space(device: iommufd.VFIODevice) -> None:
    config = device.config
    assert config.read_int(0, 2) not in (0, 0xFFFF)
    device.set_bus_master(True)
    assert config.read_int(4, 2) & 4
    device.set_bus_master(False)
    assert not config.read_int(4, 2) & 4


def test_a_mapped_region(device: iommufd.VFIODevice) -> None:
    bar = device.bar(0)
    config = device.config
    config.write_int(4, config.read_int(4, 2) | 2, 2)  # memory decoding
    view = bar.mmap()
    assert len(view) == 0x10000
    view[8:12] = b"mmap"
    assert bar.read(8, 4) == b"mmap"
    bar.write_int(12, 7)
    assert view[12] == 7
    part = bar.mmap(0x1000, 0x1000, writeable=False)
    assert part.readonly and len(part) == 0x1000
    with pytest.raises(ValueError, match=r"of <Region 1: 4 KiB, rw> cannot be mapped"):
        device.bar(1).mmap()
    with pytest.raises(ValueError, match="8192 bytes at 0xf000"):
        bar.mmap(0xF000, 0x2000)
    with pytest.raises(ValueError, match="cannot be mapped"):
        config.mmap()
    view.release()
    part.release()
    gc.collect()


# ---------------------------------------------------------------------------------------------------------- interrupts


def test_interrupts(device: iommufd.VFIODevice) -> None:
    irq = device.irq(v.VFIO_PCI_MSIX_IRQ_INDEX)
    assert irq.count == 4 and irq.flags & v.VFIO_IRQ_INFO_EVENTFD
    assert repr(irq) == "<Irq 2: 4 vectors, EVENTFD>"
    events = irq.enable(2)
    irq.trigger(1)
    assert (events[0].take(), events[1].wait(10)) == (0, 1)
    assert events[1].wait(0.01) == 0
    irq.trigger(0, 2)
    irq.trigger(0, 1)
    assert (events[0].wait(10), events[1].wait(10)) == (2, 1)

    async def main() -> int:
        asyncio.get_running_loop().call_later(0.02, irq.trigger, 0)
        return await asyncio.wait_for(events[0].wait_async(), 10)

    assert asyncio.run(main()) == 1
    irq.disable()
    with pytest.raises(iommufd.IommufdError):
        irq.trigger(0)
    with pytest.raises(iommufd.IommufdError) as at:
        irq.enable(5)
    assert at.value.errno == errno.EINVAL
    with pytest.raises(ValueError, match="count -1"):
        irq.enable(-1)
    with events[0] as event:
        assert event.fileno() >= 0
    for call in (event.fileno, event.take, event.signal, event.wait):
        with pytest.raises(iommufd.IommufdError, match="the eventfd is closed") as at:
            call()
        assert at.value.errno == errno.EBADF


def test_reset(device: iommufd.VFIODevice, context: iommufd.Context) -> None:
    device.bar(0).write(0, b"x")
    device.reset()
    first = context.open_device(FIRST)
    assert {d.address: d.device_id for d in first.hot_reset_devices()} == {FIRST: first.id, SECOND: 0}
    assert all(d.owned for d in first.hot_reset_devices())
    second = context.open_device(SECOND)
    assert {d.device_id for d in first.hot_reset_devices()} == {first.id, second.id}
    first.hot_reset()


def test_features(device: iommufd.VFIODevice) -> None:
    assert not device.has_feature(v.VFIO_DEVICE_FEATURE_MIGRATION, v.VFIO_DEVICE_FEATURE_GET)
    with pytest.raises(iommufd.IommufdError) as at:
        device.get_feature(v.VFIO_DEVICE_FEATURE_MIGRATION, v.vfio_device_feature_migration())
    assert at.value.errno == errno.ENOTTY
    assert at.value.request == "VFIO_DEVICE_FEATURE(GET MIGRATION, flags=0)"
    with pytest.raises(ValueError, match="flags -1"):
        device.feature(-1)


# --------------------------------------------------------------------------------------- answers with chains behind
# them


class Chains(KernelBackend):
    """A backend with one device whose answers have capabilities: what our machine's functions do not have."""

    name = "chains"

    def open(self, path: str, flags: int) -> int:
        return os.open("/dev/null", os.O_RDWR)

    def ioctl(self, fd: int, cmd: int, arg: bytearray | int) -> int:
        if not isinstance(arg, bytearray):
            raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
        if cmd == v.VFIO_DEVICE_BIND_IOMMUFD:
            arg[12:16] = (9).to_bytes(4, "little")
            return 0
        if cmd == v.VFIO_DEVICE_GET_REGION_INFO:
            # a long chain: the type, then 40 sparse areas of which one is empty, then MSI-X
            areas = b"".join(
                v.vfio_region_sparse_mmap_area(offset=i * 0x2000, size=0x1000 if i else 0).pack() for i in range(40)
            )
            first = v.vfio_region_info_cap_type(
                header_id=2, header_version=1, header_next=48, type=0x8000_1234, subtype=3
            )
            second = v.vfio_region_info_cap_sparse_mmap(header_id=1, header_version=1, header_next=704, nr_areas=40)
            third = bytes((3, 0, 1, 0, 0, 0, 0, 0))
            tail = first.pack().ljust(16, b"\0") + second.pack() + areas + third
            info = v.vfio_region_info(argsz=32 + len(tail), flags=0xF, cap_offset=32, size=0x100000, offset=1 << 40)
            answer = info.pack() + tail
        elif cmd == v.VFIO_DEVICE_GET_INFO:
            atomic = v.vfio_device_info_cap_pci_atomic_comp(header_id=5, header_version=1, flags=3)
            answer = (
                v.vfio_device_info(argsz=40, flags=0x82, num_regions=1, num_irqs=1, cap_offset=24).pack()
                + atomic.pack()
            )
        else:
            raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
        if int.from_bytes(arg[:4], "little") < len(answer):  # no room: the caller learns how much is needed
            arg[:24] = answer[:4] + arg[4:16] + bytes(8)
            return 0
        arg[: len(answer)] = answer
        return 0


def test_capabilities() -> None:
    with iommufd.open(backend=Chains()) as context:
        device = context.open_device("/dev/vfio/devices/vfio0")
        region = device.region(0)
        assert region.type == (0x8000_1234, 3) and region.msix_mappable
        assert region.areas == [(i * 0x2000, 0x1000) for i in range(1, 40)]
        with pytest.raises(ValueError, match="cannot be mapped"):
            region.mmap()
        assert device.info().pci_atomic == v.vfio_pci_atomic_flags.COMP32 | v.vfio_pci_atomic_flags.COMP64
        with pytest.raises(iommufd.IommufdError, match="the kernel answered ENOTTY to VFIO_DEVICE_RESET"):
            device.reset()


def test_a_chain_that_bites_its_tail_ends() -> None:
    data = bytes(24) + bytes((1, 0, 1, 0, 32, 0, 0, 0)) + bytes((2, 0, 1, 0, 24, 0, 0, 0))
    assert list(chain(data, 24)) == [(1, 24), (2, 32)]
    assert list(chain(data, 0)) == []
    assert list(chain(data, 1000)) == []
