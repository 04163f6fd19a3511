"""TextFile: a small file of /proc, /sys or debugfs whose text is made when it is read (kernel: the ``show`` and
``store`` of an attribute)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from iommufd.engine.file import File, Pending
from iommufd.errors import KernelError

if TYPE_CHECKING:
    from iommufd.engine.task import Task

WRITE_LIMIT = 4096
"""Bytes of one write that are looked at: a page, as for the kernel's attributes."""


class TextFile(File):
    """Subclasses give ``show`` (the whole text) and, if it can be written, ``store`` (what one write brought)."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.link = path
        self._position = 0

    def show(self) -> bytes:
        raise KernelError(errno.EIO, f"{self.link} cannot be read")

    def store(self, data: bytes) -> None:
        raise KernelError(errno.EIO, f"{self.link} cannot be written")

    def read(self, task: Task, addr: int, count: int, pos: int | None = None) -> int:
        start = self._position if pos is None else pos
        data = self.show()[start : start + count]
        if data:
            task.write(addr, data)
        if pos is None:
            self._position += len(data)
        return len(data)

    def write(self, task: Task, addr: int, count: int, pos: int | None = None) -> int | Pending:
        self.store(task.read(addr, min(count, WRITE_LIMIT)))
        if pos is None:
            self._position += count
        return count
