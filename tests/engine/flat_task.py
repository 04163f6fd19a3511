"""A Task with one flat piece of memory and a descriptor table: enough for queues, which need no address space."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, cast

from iommufd.errors import KernelError

if TYPE_CHECKING:
    from iommufd.engine.file import File
    from iommufd.engine.task import Task

BASE = 0x10000
SIZE = 0x10000


class FlatTask:
    """Memory ``[BASE, BASE + SIZE)``, everything else is EFAULT; descriptors from 3 on, below ``files_limit``."""

    tid = 1
    # Any, not None: whoever uses them here is told at run time
    space: Any = None
    process: Any = None

    def __init__(self) -> None:
        self.memory = bytearray(SIZE)
        self.files: dict[int, File | None] = {0: None, 1: None, 2: None}
        self.cloexec: set[int] = set()
        self.files_limit = 1024
        self.write_protected = False

    def read_upto(self, addr: int, count: int) -> bytes:
        at = addr - BASE
        return bytes(self.memory[at : at + count]) if 0 <= at < SIZE else b""

    def read_into(self, addr: int, buffer: bytearray | memoryview) -> None:
        buffer[:] = self.read(addr, len(buffer))

    def read(self, addr: int, count: int) -> bytes:
        data = self.read_upto(addr, count)
        if len(data) < count:
            raise KernelError(errno.EFAULT, f"[{addr:#x}, +{count:#x}) cannot be read")
        return data

    def write_upto(self, addr: int, data: bytes | bytearray | memoryview) -> int:
        at = addr - BASE
        if self.write_protected:
            return 0
        count = min(len(data), SIZE - at) if 0 <= at < SIZE else 0
        self.memory[at : at + count] = data[:count]
        return count

    def write(self, addr: int, data: bytes | bytearray | memoryview) -> None:
        if self.write_upto(addr, data) < len(data):
            raise KernelError(errno.EFAULT, f"[{addr:#x}, +{len(data):#x}) cannot be written")

    def capable(self, capability: int) -> bool:
        return False

    def file(self, fd: int) -> File:
        found = self.files.get(fd)
        if found is None:
            raise KernelError(errno.EBADF, f"descriptor {fd} is not open")
        return found

    def reserve_fd(self, cloexec: bool) -> int:
        fd = next(n for n in range(len(self.files) + 1) if n not in self.files)
        if fd >= self.files_limit:
            raise KernelError(errno.EMFILE, f"no descriptor below {self.files_limit} is free")
        self.files[fd] = None
        if cloexec:
            self.cloexec.add(fd)
        return fd

    def install_fd(self, fd: int, file: File) -> None:
        self.files[fd] = file

    def release_fd(self, fd: int) -> None:
        del self.files[fd]
        self.cloexec.discard(fd)

    def close(self, fd: int) -> None:
        file = self.files.pop(fd)
        assert file is not None
        file.put()


def as_task(task: FlatTask) -> Task:
    return cast("Task", task)  # as far as the commands tested with it go


class expect:
    """The block raises KernelError with that errno."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        assert isinstance(error, KernelError), f"{errno.errorcode[self.number]} expected, not {error!r}"
        assert errno.errorcode[error.errno] == errno.errorcode[self.number], error.why
        return True
