"""The backends themselves: the eight calls on the operating system's files and on a machine's."""

from __future__ import annotations

import errno
import fcntl
import gc
import mmap
import os
import select
import struct
import termios
import threading

import pytest

import iommufd
from iommufd.client.backends.kernel import KernelBackend
from iommufd.client.backends.software import SoftwareBackend, software
from iommufd.testing.mock import MockDevice, alloc_viommu
from iommufd.uapi import iommufd as u

# -------------------------------------------------------------------------------------------------------------- kernel


def test_kernel_files() -> None:
    backend = KernelBackend()
    assert "Linux" in repr(backend)
    fd = backend.open("/proc/self/mem", os.O_RDONLY)
    assert not os.get_inheritable(fd) and backend.fileno(fd) == fd
    data = b"found by address"
    held = mmap.mmap(-1, 4096)
    held[: len(data)] = data
    from iommufd.client.buffers import where

    address, _ = where(held)
    assert backend.read(fd, len(data), address) == data
    backend.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        backend.read(fd, 1)
    with pytest.raises(FileNotFoundError):
        backend.open("/dev/none", os.O_RDWR)


def test_kernel_ioctl_poll_and_mmap() -> None:
    backend = KernelBackend()
    reader, writer = os.pipe()
    assert backend.poll(reader, select.POLLIN, 0) == 0
    assert backend.poll(reader, select.POLLIN, 0.01) == 0
    assert backend.write(writer, b"12345") == 5
    assert backend.poll(reader, select.POLLIN, None) == select.POLLIN
    waiting = bytearray(4)
    assert backend.ioctl(reader, termios.FIONREAD, waiting) == 0
    assert struct.unpack("<I", waiting) == (5,)
    address_of = mmap.mmap(-1, 4096)
    from iommufd.client.buffers import where

    assert backend.ioctl(reader, termios.FIONREAD, where(address_of)[0]) == 0  # an address, 64 bits of it
    assert address_of[:4] == waiting
    with pytest.raises(OSError, match="Bad address"):
        backend.ioctl(reader, termios.FIONREAD, 8)
    os.close(reader)
    os.close(writer)
    memfd = os.memfd_create("x")
    os.ftruncate(memfd, 8192)
    view = backend.mmap(memfd, 4096, 3, mmap.MAP_SHARED, 4096)
    view[:2] = b"ab"
    assert backend.read(memfd, 2, 4096) == b"ab"
    assert backend.write(memfd, b"c", 4096) == 1
    assert view[0] == ord("c")
    os.close(memfd)


def test_kernel_ioctls_in_one_go() -> None:
    backend = KernelBackend()
    reader, writer = os.pipe()
    os.write(writer, b"123")
    data, done = bytearray(12), [1]
    backend.ioctl_many(reader, termios.FIONREAD, data, 4, done)
    assert (done, struct.unpack("<3I", data)) == ([3], (0, 3, 3))
    done = [0]
    os.close(reader)
    os.close(writer)
    with pytest.raises(OSError, match="Bad file descriptor"):
        backend.ioctl_many(reader, termios.FIONREAD, data, 4, done)
    assert done == [0]
    data.append(1)  # nothing holds it


# ------------------------------------------------------------------------------------------------------------ software


@pytest.fixture
def backend() -> SoftwareBackend:
    return software(iommufd.Machine("test"))


def test_descriptors_are_ordinary_numbers(backend: SoftwareBackend) -> None:
    fd = backend.open("/dev/iommu", os.O_RDWR)
    assert os.fstat(fd) and not os.get_inheritable(fd)
    data = bytearray(struct.pack("<III", 12, 0, 0))
    twin = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
    assert backend.ioctl(twin, u.IOMMU_IOAS_ALLOC, data) == 0  # by inode
    assert data[8:] == (1).to_bytes(4, "little")
    backend.close(twin)
    assert backend.ioctl(fd, u.IOMMU_IOAS_ALLOC, data) == 0
    backend.close(fd)
    for call in (lambda: backend.close(fd), lambda: backend.ioctl(fd, 1, 0), lambda: backend.read(0, 1)):
        with pytest.raises(iommufd.IommufdError, match="is not one of this machine's") as at:
            call()
        assert at.value.errno == errno.EBADF
    assert backend.machine.contexts == []
    with pytest.raises(FileNotFoundError, match="machine test has no /dev/none"):
        backend.open("/dev/none", os.O_RDWR)


def test_the_struct_may_be_memory(backend: SoftwareBackend) -> None:
    fd = backend.open("/dev/iommu", os.O_RDWR)
    memory = mmap.mmap(-1, 4096)
    memory[:12] = struct.pack("<III", 12, 0, 0)
    from iommufd.client.buffers import where

    assert backend.ioctl(fd, u.IOMMU_IOAS_ALLOC, where(memory)[0]) == 0
    assert memory[8] == 1
    with pytest.raises(iommufd.IommufdError) as at:
        backend.ioctl(fd, u.IOMMU_IOAS_ALLOC, 0)
    assert at.value.errno == errno.EFAULT
    with pytest.raises(iommufd.IommufdError) as at:
        backend.ioctl(fd, u.IOMMU_IOAS_ALLOC, bytearray(2))
    assert at.value.errno == errno.EFAULT
    backend.close_all()


def test_listing(backend: SoftwareBackend) -> None:
    assert "iommu" in backend.listdir("/dev")
    with pytest.raises(FileNotFoundError):
        backend.listdir("/sys/bus/none")
    backend.machine.close()


def test_a_read_only_descriptor_of_the_machine(backend: SoftwareBackend) -> None:
    fd = backend.open("/dev/iommu", os.O_RDONLY)
    assert backend.poll(fd, select.POLLIN | select.POLLOUT, 0) == select.POLLIN | select.POLLOUT
    for call in (lambda: backend.read(fd, 4), lambda: backend.write(fd, b"1"), lambda: backend.read(fd, 4, 0)):
        with pytest.raises(iommufd.IommufdError):
            call()
    backend.close(fd)


def test_device_memory_outlives_its_descriptor() -> None:
    """The mapping holds the file; when both are gone, so is the memory."""

    def memfds() -> int:
        gc.collect()
        found = 0
        for number in os.listdir("/proc/self/fd"):
            try:
                found += "memfd:iommufd" in os.readlink(f"/proc/self/fd/{number}")
            except FileNotFoundError:  # the one that listed them
                continue
        return found

    machine_before = memfds()
    context = iommufd.open(machine="mock")
    device = MockDevice(context, context.alloc_ioas())
    parent = context.alloc_ioas().alloc_hwpt(device, nest_parent=True)
    view = alloc_viommu(parent, device, 0x77).mmap()
    context.close()
    assert view[0] == 0x77
    view[1] = 0x78
    assert memfds() > machine_before
    del view
    assert memfds() == machine_before


def test_capabilities_are_those_of_the_calling_thread(backend: SoftwareBackend) -> None:
    effective = 0
    with open("/proc/thread-self/status", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("CapEff"):
                effective = int(line.split()[1], 16)
    native = os.stat("/proc/self/ns/user").st_ino == 0xEFFFFFFD
    task = backend.task()
    for capability in (0, 14, 21, 31, 32, 39, 40):
        assert task.capable(capability) == (native and bool(effective >> capability & 1))
    assert task.tid == threading.get_native_id()
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(backend.task().capable(14))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(answers) == {task.capable(14)}
