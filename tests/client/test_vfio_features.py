"""What a VFIO device has beyond regions and interrupts: the bytes of each call, as linux/vfio.h lays them out.

The machine's own functions have few of these features, so a backend stands in that writes down what it is asked and
answers what it was told to.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID

import numpy as np
import pytest

import iommufd
from iommufd.uapi import vfio as v

GET, SET, PROBE = 1 << 16, 1 << 17, 1 << 18
FEATURE, BIND, REGION_INFO, IRQ_INFO, SET_IRQS = 0x3B75, 0x3B76, 0x3B6C, 0x3B6D, 0x3B6E
IOEVENTFD, PRECOPY = 0x3B74, 0x3B79
TOKEN = UUID("00112233-4455-6677-8899-aabbccddeeff")


class Recording:
    """A backend with one device, which does what ``answers`` says: a function for a feature (or an ioctl's number)."""

    name = "recording"

    def __init__(self) -> None:
        self.calls: list[tuple[int, bytes]] = []
        self.answers: dict[int, Callable[[bytearray], int]] = {}
        self.bytes = b""
        self.written: list[bytes] = []

    def open(self, path: str, flags: int) -> int:
        return os.open("/dev/null", os.O_RDWR)

    def close(self, fd: int) -> None:
        os.close(fd)

    def fileno(self, fd: int) -> int:
        return fd

    def read(self, fd: int, count: int, offset: int | None = None) -> bytes:
        if fd < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        data, self.bytes = self.bytes[:count], self.bytes[count:]
        return data

    def write(self, fd: int, data: bytes, offset: int | None = None) -> int:
        self.written.append(data)
        return len(data)

    def poll(self, fd: int, events: int, timeout: float | None) -> int:
        return events if self.bytes else 0

    def mmap(self, fd: int, length: int, prot: int, flags: int, offset: int) -> memoryview:
        raise OSError(errno.EINVAL, "")

    def ioctl(self, fd: int, cmd: int, arg: bytearray | int) -> int:
        assert isinstance(arg, bytearray)
        if fd < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        if cmd == BIND:
            arg[12:16] = struct.pack("<I", 9)
        elif cmd == REGION_INFO:  # 64 KiB at 1 << 40
            arg[:32] = struct.pack("<IIIIQQ", 32, 3, arg[8], 0, 0x10000, 1 << 40)
        elif cmd == IRQ_INFO:
            arg[:16] = struct.pack("<IIII", 16, 3, arg[8], 4)
        else:
            self.calls.append((cmd, bytes(arg)))
            assert int.from_bytes(arg[:4], "little") == len(arg)  # argsz
            answer = self.answers.get(arg[4] if cmd == FEATURE else cmd)
            if answer is not None:
                return answer(arg)
            if cmd != SET_IRQS:
                raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
        return 0

    @property
    def last(self) -> bytes:
        """What the last call sent, behind ``argsz``."""
        return self.calls[-1][1][4:]


@pytest.fixture
def backend() -> Recording:
    return Recording()


@pytest.fixture
def device(backend: Recording) -> Iterator[iommufd.VFIODevice]:
    with iommufd.open(backend=backend) as context:
        yield context.open_device("/dev/vfio/devices/vfio0")


def done(arg: bytearray) -> int:
    return 0


def fails(number: int) -> Callable[[bytearray], int]:
    def answer(arg: bytearray) -> int:
        raise OSError(number, os.strerror(number))

    return answer


# ----------------------------------------------------------------------------------------------------------- migration


def test_what_a_device_can_do_to_migrate(device: iommufd.VFIODevice, backend: Recording) -> None:
    backend.answers[1] = lambda arg: arg.__setitem__(slice(8, 16), struct.pack("<Q", 0b101)) or 0
    assert device.migration.flags() == v.vfio_migration_flags.STOP_COPY | v.vfio_migration_flags.PRE_COPY
    assert backend.last == struct.pack("<IQ", GET | 1, 0)
    backend.answers[9] = lambda arg: arg.__setitem__(slice(8, 16), struct.pack("<Q", 1 << 33)) or 0
    assert device.migration.data_size() == 1 << 33
    assert backend.last == struct.pack("<IQ", GET | 9, 0)
    backend.answers[12] = done
    device.migration.enable_reinit()
    assert backend.last == struct.pack("<I", SET | 12)
    assert "vfio0" in repr(device.migration)


def test_states(device: iommufd.VFIODevice, backend: Recording) -> None:
    backend.answers[2] = lambda arg: arg.__setitem__(slice(8, 16), struct.pack("<Ii", 3, -1)) or 0
    assert device.migration.state is v.vfio_device_mig_state.STOP_COPY
    assert backend.last == struct.pack("<IIi", GET | 2, 0, -1)
    assert device.migration.set_state(v.vfio_device_mig_state.STOP) is None  # no session begins
    assert backend.last == struct.pack("<IIi", SET | 2, 1, -1)
    backend.answers[2] = fails(errno.EIO)
    with pytest.raises(iommufd.IommufdError) as at:
        device.migration.set_state(v.VFIO_DEVICE_STATE_RESUMING)
    assert at.value.request == "VFIO_DEVICE_FEATURE(SET MIG_DEVICE_STATE, device_state=RESUMING, data_fd=-1)"
    with pytest.raises(ValueError, match="state -1"):
        device.migration.set_state(-1)


def test_a_session(device: iommufd.VFIODevice, backend: Recording) -> None:
    fd = os.open("/dev/null", os.O_RDWR)
    backend.answers[2] = lambda arg: arg.__setitem__(slice(8, 16), struct.pack("<Ii", 6, fd)) or 0
    stream = device.migration.set_state(v.vfio_device_mig_state.PRE_COPY)
    assert stream is not None
    with stream:
        assert stream.fileno() == fd
        backend.bytes = b"state"
        assert stream.wait(0)
        assert (stream.read(3), stream.read(), stream.read()) == (b"sta", b"te", b"")
        assert not stream.wait(0)
        assert stream.write(memoryview(b"other")) == 5
        assert backend.written == [b"other"]
        backend.answers[PRECOPY] = lambda arg: arg.__setitem__(slice(4, 24), struct.pack("<IQQ", 1, 70, 8)) or 0
        info = stream.precopy_info()
        assert (info.initial_bytes, info.dirty_bytes, info.reinit) == (70, 8, True)
        assert backend.last == struct.pack("<IQQ", 0, 0, 0)
        backend.answers[PRECOPY] = fails(errno.EINVAL)
        with pytest.raises(iommufd.IommufdError, match=r"EINVAL to VFIO_MIG_GET_PRECOPY_INFO\("):
            stream.precopy_info()
    assert stream.closed and repr(stream) == "<MigrationStream, closed>"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    for call in (stream.read, stream.fileno, stream.precopy_info, stream.__enter__):
        with pytest.raises(iommufd.IommufdError, match="the migration stream is closed"):
            call()


def test_a_forgotten_stream_is_told_and_closed(device: iommufd.VFIODevice, backend: Recording) -> None:
    fd = os.open("/dev/null", os.O_RDWR)
    backend.answers[2] = lambda arg: arg.__setitem__(slice(8, 16), struct.pack("<Ii", 4, fd)) or 0
    with pytest.warns(ResourceWarning, match="unclosed <MigrationStream fd"):
        device.migration.set_state(v.vfio_device_mig_state.RESUMING)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


# ------------------------------------------------------------------------------------------------------------- DMA log


def test_a_log_is_started_with_its_ranges(device: iommufd.VFIODevice, backend: Recording) -> None:
    seen: list[bytes] = []

    def start(arg: bytearray) -> int:
        if len(arg) == 8:  # a probe
            return 0
        page_size, count, reserved, ranges = struct.unpack("<QIIQ", arg[8:])
        seen.append(struct.pack("<QII", page_size, count, reserved) + ctypes.string_at(ranges, 16 * count))
        arg[8:16] = struct.pack("<Q", 65536)
        return 0

    backend.answers[6] = start
    assert device.dma_log.start([(0x1000, 0x2000), (0x10000, 0x1000)]) == 65536
    assert seen == [struct.pack("<QIIQQQQ", 4096, 2, 0, 0x1000, 0x2000, 0x10000, 0x1000)]
    assert backend.last[:4] == struct.pack("<I", SET | 6)
    assert device.dma_log.supported
    assert backend.last == struct.pack("<I", PROBE | SET | 6)
    backend.answers[7] = done
    device.dma_log.stop()
    assert backend.last == struct.pack("<I", SET | 7)
    for ranges, error in (([5], TypeError), ([(1, 2, 3)], TypeError), ([(-1, 1)], ValueError), ([("a", 1)], TypeError)):
        with pytest.raises(error, match=r"range to watch|iova"):
            device.dma_log.start(ranges)  # type: ignore[arg-type]  # wrong on purpose


def test_a_log_is_read_as_pages(device: iommufd.VFIODevice, backend: Recording) -> None:
    def report(arg: bytearray) -> int:
        iova, length, page_size, bitmap = struct.unpack("<QQQQ", arg[8:])
        assert (iova, length, page_size) == (0x100000, 70 * 4096 - 1, 4096)
        words = (ctypes.c_uint64 * 2).from_address(bitmap)
        assert list(words) == [0, 0]  # a report sets bits and clears none
        words[0], words[1] = 1 << 0 | 1 << 63, 1 << 5 | 1 << 6  # bit 70 is behind the end
        return 0

    backend.answers[8] = report
    dirty = device.dma_log.read(0x100000, 70 * 4096 - 1)
    assert (dirty.dtype, dirty.shape) == (np.dtype(bool), (70,))
    assert np.flatnonzero(dirty).tolist() == [0, 63, 69]
    assert backend.last[:4] == struct.pack("<I", GET | 8)
    for length, page_size in ((4096, 3), (4096, 0)):
        with pytest.raises(ValueError, match=r"page_size \d is not a power of two"):
            device.dma_log.read(0, length, page_size)
    with pytest.raises(MemoryError):
        device.dma_log.read(0, 2**64 - 1, 1)
    with pytest.raises(TypeError, match="an IOVA needs a length"):
        device.dma_log.read(0)


# ------------------------------------------------------------------------------------------------- power, tokens, more


def test_low_power(device: iommufd.VFIODevice, backend: Recording) -> None:
    backend.answers |= {3: done, 4: done, 5: done}
    device.low_power_entry()
    assert backend.last == struct.pack("<I", SET | 3)
    with iommufd.EventFd() as event:
        for wakeup in (event, event.fileno()):
            device.low_power_entry(wakeup)
            assert backend.last == struct.pack("<IiI", SET | 4, event.fileno(), 0)
    device.low_power_exit()
    assert backend.last == struct.pack("<I", SET | 5)
    with pytest.raises(TypeError, match="wakeup is an EventFd or a descriptor, not str"):
        device.low_power_entry("now")  # type: ignore[arg-type]  # wrong on purpose


def test_a_vf_token(device: iommufd.VFIODevice, backend: Recording) -> None:
    backend.answers[0] = done
    for token in (TOKEN, TOKEN.bytes):
        device.set_vf_token(token)
        assert backend.last == struct.pack("<I", SET | 0) + bytes.fromhex("00112233445566778899aabbccddeeff")
    with pytest.raises(ValueError, match="a token has 16 bytes, not 3"):
        device.set_vf_token(b"abc")
    with pytest.raises(TypeError, match="a token is 16 bytes or a UUID, not str"):
        device.set_vf_token(str(TOKEN))  # type: ignore[arg-type]  # wrong on purpose


def test_a_dmabuf_of_a_region(device: iommufd.VFIODevice, backend: Recording) -> None:
    backend.answers[11] = lambda arg: 77
    assert device.export_dmabuf(2) == 77
    flags = os.O_RDWR | os.O_CLOEXEC
    assert backend.last == struct.pack("<IIIIIQQ", GET | 11, 2, flags, 0, 1, 0, 0x10000)
    device.export_dmabuf(device.region(0), [(0, 4096), (8192, 4096)])
    assert backend.last == struct.pack("<IIIIIQQQQ", GET | 11, 0, flags, 0, 2, 0, 4096, 8192, 4096)


def test_bus_master_of_what_is_no_pci_device(device: iommufd.VFIODevice, backend: Recording) -> None:
    backend.answers[10] = done
    device.set_bus_master(True)
    assert [call[1][4:] for call in backend.calls] == [
        struct.pack("<I", PROBE | SET | 10),
        struct.pack("<II", SET | 10, 1),
    ]


def test_features_by_number(device: iommufd.VFIODevice, backend: Recording) -> None:
    backend.answers[200] = lambda arg: arg.__setitem__(slice(8, 10), b"ab") or 0
    assert device.feature(GET | 200, bytes(3)) == b"ab\0"
    backend.answers[201] = fails(errno.EACCES)
    with pytest.raises(PermissionError, match=r"EACCES to VFIO_DEVICE_FEATURE\(SET 201\)"):
        device.feature(SET | 201, b"x")
    with pytest.raises(PermissionError):
        device.has_feature(201)
    assert not device.has_feature(202)
    for call in (
        lambda: device.feature(1 << 32),
        lambda: device.has_feature(-1),
        lambda: device.has_feature(1 << 16),
        lambda: device.get_feature(1 << 16, v.vfio_device_feature_migration()),
        lambda: device.set_feature(1, v.vfio_device_feature_mig_state(device_state=1 << 32)),
    ):
        with pytest.raises(ValueError, match=r"flags|feature|device_state"):
            call()
    for wrong in (
        lambda: device.feature(GET, "text"),  # type: ignore[arg-type]  # wrong on purpose
        lambda: device.has_feature("MIGRATION"),  # type: ignore[arg-type]  # wrong on purpose
        lambda: device.get_feature(1, b""),  # type: ignore[type-var]  # wrong on purpose
        lambda: device.set_feature(1, 5),  # type: ignore[arg-type]  # wrong on purpose
    ):
        with pytest.raises(TypeError, match=r"payload|feature"):
            wrong()


# ------------------------------------------------------------------------------------------------- ioeventfd, SET_IRQS


def test_an_eventfd_that_writes_a_register(device: iommufd.VFIODevice, backend: Recording) -> None:
    backend.answers[IOEVENTFD] = done
    bar = device.bar(1)
    with iommufd.EventFd() as event:
        bar.write_on(event, 0x40, 0x1234, 2)
        assert backend.last == struct.pack("<IQQiI", 2, (1 << 40) + 0x40, 0x1234, event.fileno(), 0)
        bar.write_on(event.fileno(), 0x48, 2**64 - 1, 8)
        assert backend.last == struct.pack("<IQQiI", 8, (1 << 40) + 0x48, 2**64 - 1, event.fileno(), 0)
    bar.stop_write_on(0x40, 0x1234, 2)
    assert backend.last == struct.pack("<IQQiI", 2, (1 << 40) + 0x40, 0x1234, -1, 0)
    for arguments in ((7, 0, 1 << 8, 1), (7, 0, 0, 3), (7, 0xFFFE, 0, 4), (-1, 0, 0, 4), (7, -1, 0, 4), (-2, 0, 0, 4)):
        with pytest.raises(ValueError, match=r"value|1, 2, 4 or 8|has 0x10000|event|offset"):
            bar.write_on(*arguments)


def test_what_is_done_to_interrupts(device: iommufd.VFIODevice, backend: Recording) -> None:
    none, booleans, eventfd, mask, unmask, trigger = (1 << bit for bit in range(6))
    irq = device.irq(2)
    assert irq.count == 4
    actions: dict[int, Callable[..., None]] = {mask: irq.mask, unmask: irq.unmask, trigger: irq.trigger}
    for flag, action in actions.items():
        action(1, 2)
        assert backend.last == struct.pack("<IIII", none | flag, 2, 1, 2)
        action(1, only=[True, 0, "yes"])
        assert backend.last == struct.pack("<IIII", booleans | flag, 2, 1, 3) + bytes((1, 0, 1))
    with iommufd.EventFd() as event:
        fd = event.fileno()
        setters: dict[int, Callable[..., None]] = {
            mask: irq.mask_on,
            unmask: irq.unmask_on,
            trigger: irq.set_eventfds,
        }
        for flag, setter in setters.items():
            setter([event, None, fd, -1], start=0)
            assert backend.last == struct.pack("<IIIIiiii", eventfd | flag, 2, 0, 4, fd, -1, fd, -1)
    irq.disable()
    assert backend.last == struct.pack("<IIII", none | trigger, 2, 0, 0)
    with pytest.raises(ValueError, match="an eventfd -2"):
        irq.set_eventfds([-2])
    with pytest.raises(TypeError, match="an eventfd is an EventFd or a descriptor, not str"):
        irq.mask_on(["no"])  # type: ignore[list-item]  # wrong on purpose


def test_enabling_that_fails_leaves_no_eventfds(device: iommufd.VFIODevice, backend: Recording) -> None:
    backend.answers[SET_IRQS] = fails(errno.ENOSPC)
    irq = device.irq(2)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(iommufd.IommufdError, match="ENOSPC to VFIO_DEVICE_SET_IRQS"):
        irq.enable()
    assert os.listdir("/proc/self/fd") == before


# ------------------------------------------------------------------------------------------------ the machine's devices


@pytest.fixture
def simple() -> Iterator[iommufd.VFIODevice]:
    with iommufd.open(machine="pci") as context:
        yield context.open_device("0000:00:03.0")


def test_what_a_simple_function_has_not(simple: iommufd.VFIODevice) -> None:
    calls: list[Callable[[], Any]] = [
        simple.migration.flags,
        lambda: simple.migration.state,
        lambda: simple.migration.set_state(1),
        simple.migration.data_size,
        lambda: simple.dma_log.start([(0, 4096)]),
        simple.dma_log.stop,
        lambda: simple.dma_log.read(0, 4096),
        lambda: simple.set_vf_token(TOKEN),
        lambda: simple.export_dmabuf(0),
        lambda: simple.bar(0).write_on(0, 0, 0),
        lambda: simple.bar(0).stop_write_on(0, 0),
    ]
    for call in calls:
        with pytest.raises(iommufd.IommufdError) as at:
            call()
        assert at.value.errno == errno.ENOTTY
    assert not simple.dma_log.supported


def test_power_of_a_simple_function(simple: iommufd.VFIODevice) -> None:
    assert simple.has_feature(v.VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY, v.VFIO_DEVICE_FEATURE_SET)
    simple.low_power_entry()
    with pytest.raises(iommufd.IommufdError) as at:
        simple.low_power_entry()
    assert at.value.errno == errno.EINVAL
    simple.low_power_exit()
    with iommufd.EventFd() as event:
        simple.low_power_entry(event)
        assert simple.config.read_int(0, 2) == 0x1AF4
    simple.low_power_exit()


def test_intx_is_unmasked_by_an_eventfd(simple: iommufd.VFIODevice) -> None:
    irq = simple.irq(v.VFIO_PCI_INTX_IRQ_INDEX)
    assert irq.flags & v.vfio_irq_info_flags.AUTOMASKED
    with iommufd.EventFd() as resample:
        events = irq.enable()
        irq.unmask_on([resample])
        with pytest.raises(iommufd.IommufdError) as at:  # no device masks by eventfd
            irq.mask_on([resample])
        assert at.value.errno == errno.ENOTTY
        irq.unmask_on([None])
        irq.trigger(only=[False])
        assert events[0].take() == 0
        irq.trigger(only=[True])
        assert events[0].take() == 1
        irq.disable()
