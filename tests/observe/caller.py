"""A caller with a little memory, and a machine whose commands do what the test says: observers need no more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from iommufd.engine.context import Context
from iommufd.engine.dispatch import Handler, Respond, build_table
from iommufd.engine.file import File
from iommufd.engine.instrument import Instrument
from iommufd.engine.task import Task
from iommufd.engine.world import World
from iommufd.errors import KernelError
from iommufd.uapi.commands import BY_NAME
from iommufd.uapi.declare import Struct

BASE = 0x7F0000000000


class Process:
    tgid = 100


class Memory:
    """A Task: one readable and writable block at BASE; nothing else is mapped."""

    def __init__(self, size: int = 0x1000, fd: int | None = 3) -> None:
        self.bytes = bytearray(size)
        self.tid = 101
        self.process = Process()
        self.fd = fd
        self.next_fd = 7

    def read_upto(self, addr: int, count: int) -> bytes:
        at = addr - BASE
        return bytes(self.bytes[at : at + count]) if 0 <= at < len(self.bytes) else b""

    def read(self, addr: int, count: int) -> bytes:
        data = self.read_upto(addr, count)
        if len(data) < count:
            raise KernelError(14, f"{addr:#x} cannot be read")
        return data

    def write(self, addr: int, data: bytes) -> None:
        if not 0 <= addr - BASE <= len(self.bytes) - len(data):
            raise KernelError(14, f"{addr:#x} cannot be written")
        self.bytes[addr - BASE : addr - BASE + len(data)] = data

    def reserve_fd(self, cloexec: bool) -> int:
        self.next_fd += 1
        return self.next_fd

    def install_fd(self, fd: int, file: File) -> None:
        pass

    def release_fd(self, fd: int) -> None:
        pass


class Engine:
    """``Engine(IOMMU_IOAS_ALLOC=handler)``: one context with these commands, watched by ``instruments``."""

    def __init__(
        self, instruments: Sequence[Instrument], respond: Respond = Respond.ON_SUCCESS, **rows: Handler
    ) -> None:
        self.world = World()
        self.world.table = build_table([(BY_NAME[name], handler, respond) for name, handler in rows.items()], (7, 3))
        self.world.top_nr = 0xA0
        self.world.instruments.extend(instruments)
        self.context = Context(self.world)
        self.task = Memory()

    @property
    def as_task(self) -> Task:
        """Its memory and ids, which are all that these calls use of a task."""
        return cast("Task", self.task)

    def ioctl(self, number: int, value: Struct | bytes | None = None, at: int = BASE) -> Any:
        """Places the struct and calls; returns the result, or the KernelError."""
        if value is not None:
            self.task.write(at, value if isinstance(value, bytes) else value.pack())
        try:
            return self.context.ioctl(self.as_task, number, at)
        except KernelError as error:
            return error
