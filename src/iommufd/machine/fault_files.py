"""The files through which a program injects faults: /proc/PID/fail-nth and debugfs' fail_iommufd and failslab.

They are to :class:`~iommufd.engine.fail.Injector` what the kernel's are to its fault attributes, byte for byte as Linux 7.3
reads and writes them, with one freedom: anybody may open them, because a software machine has no administrator.

* ``/proc/PID/fail-nth``, ``/proc/PID/task/TID/fail-nth`` and ``make-it-fail`` beside them belong to one task; the open file
  keeps meaning that task, also in a forked child, and answers ESRCH once the task is gone.
* ``/sys/kernel/debug/fail_iommufd/`` and ``failslab/``: one file per knob.
"""

from __future__ import annotations

import errno
import re
import stat
from typing import TYPE_CHECKING, ClassVar

from iommufd.engine.fail import MAX_NTH, FaultAttr, birth_of
from iommufd.engine.file import File
from iommufd.errors import KernelError

if TYPE_CHECKING:
    from iommufd.engine.fail import Injector
    from iommufd.engine.task import Task
    from iommufd.machine.machine import Machine

DEBUGFS = "/sys/kernel/debug"

_PROC = re.compile(r"/proc/(\d+)(?:/task/(\d+))?/(fail-nth|make-it-fail)")
_WRITE_LIMIT = 4096  # more is never a number; the kernel looks at a few dozen bytes


def parse_number(data: bytes, low: int, high: int) -> int:
    """The kernel's kstrto functions with base 0: one optional ``+`` (``-`` if ``low`` is negative), 0x and 0 prefixes, one
    optional newline; what follows a NUL is ignored. KernelError EINVAL for anything else, ERANGE outside [low, high]."""
    text = data.partition(b"\0")[0]
    text = text.removesuffix(b"\n")
    match = re.fullmatch(rb"([+-]?)(?:0[xX]([0-9a-fA-F]+)|(0[0-7]*)|([1-9][0-9]*))", text)
    if match is None or (match[1] == b"-" and low >= 0):
        raise KernelError(errno.EINVAL, f"{data[:40]!r} is not a number")
    value = int(match[2], 16) if match[2] else int(match[3], 8) if match[3] else int(match[4])
    value = -value if match[1] == b"-" else value
    if not low <= value <= high:
        raise KernelError(errno.ERANGE, f"{value} is not between {low} and {high}")
    return value


class TextFile(File):
    """A small file with a position: ``show`` makes its text, ``store`` takes what is written, at whatever position."""

    def __init__(self) -> None:
        super().__init__()
        self._position = 0

    def show(self) -> bytes:
        raise NotImplementedError

    def store(self, data: bytes) -> None:
        raise NotImplementedError

    def read(self, task: Task, addr: int, count: int, pos: int | None = None) -> int:
        start = self._position if pos is None else pos
        data = self.show()[start : start + count]
        if data:
            task.write(addr, data)
        if pos is None:
            self._position += len(data)
        return len(data)

    def write(self, task: Task, addr: int, count: int, pos: int | None = None) -> int:
        self.store(task.read(addr, min(count, _WRITE_LIMIT)))
        if pos is None:
            self._position += count
        return count
