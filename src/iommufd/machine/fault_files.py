"""The files through which a program injects faults: /proc/PID/fail-nth and debugfs' fail_iommufd and failslab.

They are to :class:`~iommufd.engine.fail.Injector` what the kernel's are to its fault attributes, byte for byte as Linux
7.3 reads and writes them, with one freedom: anybody may open them, because a software machine has no administrator.

* ``/proc/PID/fail-nth``, ``/proc/PID/task/TID/fail-nth`` and ``make-it-fail`` beside them belong to one task; the open
  file keeps meaning that task, also in a forked child, and answers ESRCH once the task is gone.
* ``/sys/kernel/debug/fail_iommufd/`` and ``failslab/``: one file per knob.
"""

from __future__ import annotations

import errno
import re
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING

from iommufd.engine.fail import MAX_NTH, FaultAttr, birth_of
from iommufd.errors import KernelError
from iommufd.machine.node import Node, directory
from iommufd.machine.text_file import TextFile

if TYPE_CHECKING:
    from iommufd.engine.fail import Injector
    from iommufd.machine.machine import Machine

DEBUGFS = "/sys/kernel/debug"

_PROC = re.compile(r"/proc/(\d+)(?:/task/(\d+))?/(fail-nth|make-it-fail)")
_NUMBER = re.compile(rb"([+-]?)(?:0[xX]([0-9a-fA-F]+)|(0[0-7]*)|([1-9][0-9]*))\n?")


def parse_number(data: bytes, low: int, high: int, looked_at: int) -> int:
    """A number as the kernel's kstrto functions with base 0 read it, which see no more than ``looked_at`` bytes.

    One optional ``+`` (``-`` if ``low`` is negative), prefixes 0x and 0, one optional newline; what follows a NUL is
    ignored. KernelError EINVAL for anything else, ERANGE outside ``[low, high]``."""
    match = _NUMBER.fullmatch(data[:looked_at].partition(b"\0")[0])
    if match is None or (match[1] == b"-" and low >= 0):
        raise KernelError(errno.EINVAL, f"{data[:40]!r} is not a number")
    value = int(match[2], 16) if match[2] else int(match[3], 8) if match[3] else int(match[4])
    value = -value if match[1] == b"-" else value
    if not low <= value <= high:
        raise KernelError(errno.ERANGE, f"{value} is not between {low} and {high}")
    return value


def parse_bool(data: bytes) -> bool | None:
    """A boolean as debugfs takes it: y, t, 1 and on; n, f, 0 and off; None for anything else, which changes nothing."""
    head = data[:2].lower()
    if head[:1] in (b"y", b"t", b"1") or head == b"on":
        return True
    if head[:1] in (b"n", b"f", b"0") or head == b"of":
        return False
    return None


class _TaskFile(TextFile):
    """One of the two files of a task. ``birth`` tells the task from a later one with the same number."""

    def __init__(self, injector: Injector, tid: int, path: str) -> None:
        super().__init__(path)
        self.injector = injector
        self.tid = tid
        self._birth = birth_of(tid)

    def check(self) -> None:
        if birth_of(self.tid) != self._birth:
            raise KernelError(errno.ESRCH, f"task {self.tid} has ended")


class FailNth(_TaskFile):
    """``fail-nth``: write N and the task's N-th point fails; reads what is left, 0 when it has fired."""

    def show(self) -> bytes:
        self.check()
        return b"%d\n" % self.injector.remaining(self.tid)

    def store(self, data: bytes) -> None:
        nth = parse_number(data, 0, MAX_NTH, 34)
        self.check()
        self.injector.arm(self.tid, nth)


class MakeItFail(_TaskFile):
    """``make-it-fail``: 1 lets a fault attribute with ``task-filter`` see the task (and its children)."""

    def show(self) -> bytes:
        self.check()
        return b"%d\n" % self.injector.filtered(self.tid)

    def store(self, data: bytes) -> None:
        value = parse_number(data, -(2**31), 2**31 - 1, 12)
        if value not in (0, 1):
            raise KernelError(errno.EINVAL, f"make-it-fail is 0 or 1, not {value}")
        self.check()
        self.injector.filter(self.tid, bool(value))


class Knob(TextFile):
    """One knob of a fault attribute in debugfs, an attribute of :class:`~iommufd.engine.fail.FaultAttr`."""

    def __init__(self, injector: Injector, attr: FaultAttr, name: str, path: str) -> None:
        super().__init__(path)
        self.injector = injector
        self.attr = attr
        self.name = name

    def show(self) -> bytes:
        value = getattr(self.attr, self.name)
        return (b"Y\n" if value else b"N\n") if isinstance(value, bool) else b"%d\n" % value

    def store(self, data: bytes) -> None:
        value: int | bool | None
        if isinstance(getattr(self.attr, self.name), bool):
            value = parse_bool(data)
            if value is None:
                return
        elif self.name in ("times", "space"):  # an atomic_t: written as 64 bits, kept as 32
            value = parse_number(data, -(2**63), 2**63 - 1, 23)
            value = (value + 2**31) % 2**32 - 2**31
        else:
            value = parse_number(data, 0, 2**64 - 1, 23)
            if self.name.startswith("verbose_"):  # a u32
                value %= 2**32
        self.injector.configure(self.attr, **{self.name: value})


def knobs(attr: FaultAttr) -> Iterator[tuple[str, str]]:
    """(file, attribute) of every knob the kernel shows for ``attr``."""
    for name in FaultAttr.__slots__:
        if name in ("name", "seen") or (name in ("ignore_gfp_wait", "cache_filter") and attr.name != "failslab"):
            continue
        yield name if name.startswith("verbose") else name.replace("_", "-"), name


def mount(machine: Machine) -> None:
    """Adds the files to a machine whose kernel was built with CONFIG_FAULT_INJECTION and its debugfs entries."""
    injector = machine.world.injector
    machine.add_node(directory(DEBUGFS, whole=True))
    for attr in (injector.fail_iommufd, injector.failslab):
        machine.add_node(directory(f"{DEBUGFS}/{attr.name}"))
        for file, name in knobs(attr):
            path = f"{DEBUGFS}/{attr.name}/{file}"

            def knob(task: object, flags: int, attr: FaultAttr = attr, name: str = name, path: str = path) -> Knob:
                return Knob(injector, attr, name, path)

            machine.add_node(Node(path, stat.S_IFREG | 0o600, opener=knob))

    def claim(path: str) -> Node | None:
        match = _PROC.fullmatch(path)
        if match is None:
            return None
        tid = int(match[2] or match[1])
        if birth_of(tid) is None:
            return None
        kind = FailNth if match[3] == "fail-nth" else MakeItFail
        return Node(path, stat.S_IFREG | 0o644, opener=lambda task, flags: kind(injector, tid, path))

    machine.add_claim(claim)
