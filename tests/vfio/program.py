"""A program with VFIO devices in front of it: raw ioctls on the files of a software machine, in this process."""

from __future__ import annotations

import os
import struct
from typing import Any, TypeAlias

from iommufd.client.backends.software import SoftwareBackend
from iommufd.client.backends.software.own_task import STRUCT
from iommufd.engine.context import Context
from iommufd.errors import KernelError, errno_name
from iommufd.machine.machine import Machine
from iommufd.vfio.device_file import DeviceFile

CONFIG = 7 << 40
GET_INFO, REGION_INFO, IRQ_INFO, SET_IRQS, RESET = 0x3B6B, 0x3B6C, 0x3B6D, 0x3B6E, 0x3B6F
HOT_RESET_INFO, HOT_RESET, FEATURE, BIND, ATTACH, DETACH = 0x3B70, 0x3B71, 0x3B75, 0x3B76, 0x3B77, 0x3B78
GET_STATUS, SET_CONTAINER, UNSET_CONTAINER, GET_DEVICE_FD = 0x3B67, 0x3B68, 0x3B69, 0x3B6A
BAD = 0x10  # an address nobody has


Answer: TypeAlias = Any
"""A result (a number, a tuple, bytes), or the errno's name: a test compares it with what it expects."""


class Program:
    """``call`` and the rest give results, or the errno's name as text; structs come back changed in place."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.backend = SoftwareBackend(machine)

    def close_all(self) -> None:
        self.backend.close_all()
        self.machine.close()

    def open(self, path: str, flags: int = os.O_RDWR) -> Answer:
        try:
            return self.backend.open(path, flags)
        except OSError as error:
            return errno_name(error.errno or 0)

    def cdev(self, address: str) -> Answer:
        return self.open(f"/dev/vfio/devices/{self.machine.pci[address].node}")

    def group(self, address: str) -> Answer:
        return self.open(f"/dev/vfio/{self.machine.pci[address].group.node}")

    def close(self, fd: int) -> None:
        self.backend.close(fd)

    def call(self, fd: int, cmd: int, arg: bytearray | int = 0) -> Answer:
        try:
            return self.backend.ioctl(fd, cmd, arg)
        except OSError as error:
            return errno_name(error.errno or 0)

    def ask(self, fd: int, cmd: int, layout: str, *values: int) -> Answer:
        """A struct of ``layout``; its fields as they came back, or the errno's name."""
        buffer = bytearray(struct.pack("<" + layout, *values))
        result = self.call(fd, cmd, buffer)
        return struct.unpack("<" + layout, buffer) if result == 0 else result

    # --- iommufd

    def iommufd(self) -> int:
        return int(self.open("/dev/iommu"))

    def context(self, fd: int) -> Context:
        file = self.backend.descriptors.find(fd)
        assert isinstance(file, Context)
        return file

    def file(self, fd: int) -> DeviceFile:
        file = self.backend.descriptors.find(fd)
        assert isinstance(file, DeviceFile)
        return file

    def ioas(self, iommufd: int) -> int:
        return int(self.ask(iommufd, 0x3B81, "III", 12, 0, 0)[2])

    def hwpt(self, iommufd: int, dev: int, pt: int, flags: int = 0) -> Answer:
        """HWPT_ALLOC; the id, or the errno's name."""
        answer = self.ask(iommufd, 0x3B89, "IIIIIIIIQII", 48, flags, dev, pt, 0, 0, 0, 0, 0, 0, 0)
        return answer[4] if isinstance(answer, tuple) else answer

    def map(self, iommufd: int, ioas: int, va: int, length: int, iova: int) -> Answer:
        return self.call(iommufd, 0x3B85, bytearray(struct.pack("<IIIIQQQ", 40, 7, ioas, 0, va, length, iova)))

    def destroy(self, iommufd: int, number: int) -> Answer:
        return self.call(iommufd, 0x3B80, bytearray(struct.pack("<II", 8, number)))

    def set_compat(self, iommufd: int, ioas: int, op: int = 1) -> Answer:
        return self.call(iommufd, 0x3B88, bytearray(struct.pack("<IIHH", 12, ioas, op, 0)))

    # --- device files

    def bind(self, fd: int, iommufd: int, argsz: int = 16, flags: int = 0) -> Answer:
        """The DEVICE id, or the errno's name."""
        answer = self.ask(fd, BIND, "IIiIQ", argsz, flags, iommufd, 0, 0)
        return answer[3] if isinstance(answer, tuple) else answer

    def bound(self, address: str, iommufd: int) -> tuple[int, int]:
        """A descriptor bound to ``iommufd``, and the DEVICE id."""
        fd = self.cdev(address)
        number = self.bind(fd, iommufd)
        assert isinstance(number, int), number
        return fd, number

    def attach(self, fd: int, pt: int, pasid: int | None = None) -> Answer:
        """The HWPT id, or the errno's name."""
        answer = self.ask(fd, ATTACH, "IIII", 16, pasid is not None, pt, pasid or 0)
        return answer[2] if isinstance(answer, tuple) else answer

    def detach(self, fd: int, pasid: int | None = None) -> Answer:
        return self.call(fd, DETACH, bytearray(struct.pack("<III", 12, pasid is not None, pasid or 0)))

    def read(self, fd: int, offset: int, count: int) -> Answer:
        """pread."""
        buffer = bytearray(count)
        return self._move(fd, buffer, offset, count, writing=False)

    def write(self, fd: int, offset: int, data: bytes) -> Answer:
        """pwrite."""
        return self._move(fd, bytearray(data), offset, len(data), writing=True)

    def _move(self, fd: int, buffer: bytearray, offset: int, count: int, *, writing: bool) -> Answer:
        file, task = self.file(fd), self.backend.task(buffer)
        try:
            done = (file.write if writing else file.read)(task, STRUCT, count, offset)
        except KernelError as error:
            return errno_name(error.errno)
        return done if writing else bytes(buffer[:done])

    def config(self, fd: int, at: int, count: int) -> int:
        return int.from_bytes(self.read(fd, CONFIG + at, count), "little")

    def set_config(self, fd: int, at: int, value: int, count: int) -> None:
        assert self.write(fd, CONFIG + at, value.to_bytes(count, "little")) == count

    def irqs(self, fd: int, flags: int, index: int, start: int, count: int, data: bytes = b"") -> Answer:
        head = struct.pack("<IIIII", 20 + len(data), flags, index, start, count)
        return self.call(fd, SET_IRQS, bytearray(head + data))


def eventfds(*fds: int) -> bytes:
    return struct.pack(f"<{len(fds)}i", *fds)


def value(fd: int) -> int:
    """What an eventfd has counted since the last look."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0
