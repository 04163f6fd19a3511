"""From the engine's Call to a Record: what an instrument keeps of an ioctl, before and after the handler.

Reading the caller's memory is allowed here (instruments run with no lock held) and must never harm the call: whatever
cannot be read is left out.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from iommufd.errors import KernelError
from iommufd.observe.pointers import POINTERS
from iommufd.observe.record import Memory, NewFile, Record
from iommufd.uapi.declare import members
from iommufd.uapi.iommufd import iommu_ioas_map

if TYPE_CHECKING:
    from iommufd.engine.dispatch import Call
    from iommufd.engine.file import File
    from iommufd.engine.task import Task
    from iommufd.uapi.declare import Struct

MOST_MEMORY = 1 << 16  # bytes kept behind one pointer

_KINDS = (
    ("/dev/iommu", "iommu"),
    ("/dev/vfio/vfio", "container"),
    ("/dev/vfio/devices/", "device"),
    ("/dev/vfio/", "group"),
    ("anon_inode:[vfio-device]", "device"),
    ("anon_inode:[iommufd-pgfault]", "fault"),
    ("anon_inode:[iommufd-viommu-event]", "veventq"),
    ("/dmabuf:", "dmabuf"),
)


def kind_of(file: File) -> str:
    """What sort of file it is, from its name; ``"file"`` when unknown."""
    for beginning, kind in _KINDS:
        if file.link.startswith(beginning):
            return kind
    return "file"


class Files:
    """Serial numbers of open files, from 1, in the order they were first seen; never used twice."""

    def __init__(self) -> None:
        self._numbers: weakref.WeakKeyDictionary[File, int] = weakref.WeakKeyDictionary()
        self._last = 0

    def number(self, file: File) -> int:
        known = self._numbers.get(file)
        if known is None:
            self._last += 1
            known = self._numbers[file] = self._last
        return known


def read_memory(task: Task, value: Struct, written: bool) -> tuple[Memory, ...]:
    """What the struct's pointer leads to: what the call reads, or with ``written`` what it has written."""
    pointer = POINTERS.get(type(value))
    if pointer is None or not (pointer.written if written else pointer.read)(value):
        return ()
    addr, size = getattr(value, pointer.field), pointer.size(value)
    if not addr or not size:
        return ()
    try:
        data = task.read_upto(addr, min(size, MOST_MEMORY))
    except (KernelError, OSError):
        data = b""
    return (Memory(pointer.field, addr, size, bytes(data)),)


def told_where(given: Struct, returned: Struct) -> Struct:
    """``given``, whose pointer and size are the caller's, with the type of what the call put there."""
    if hasattr(given, "out_data_type"):
        members(given).out_data_type = members(returned).out_data_type
    return given


def huge_page_size(task: Task, value: Struct) -> int:
    """The page size of the memory an IOAS_MAP names, if it is in huge pages; 0 otherwise."""
    if not isinstance(value, iommu_ioas_map):
        return 0
    try:
        vma = task.space.host.query(value.user_va)
    except (KernelError, OSError):
        return 0
    return vma.page_size if vma is not None and vma.order and vma.start <= value.user_va else 0


def who(record: Record, task: Task | None) -> None:
    """Notes the calling thread, and the descriptor where the task knows it."""
    if task is not None:
        record.tid = task.tid
        record.pid = task.process.tgid
        record.fd = getattr(task, "fd", None)


def outcome(record: Record, result: int | None, error: KernelError | None) -> None:
    if error is None:
        record.result = result
    else:
        record.result, record.errno, record.why = -1, error.errno, error.why


def start_ioctl(call: Call, files: Files) -> Record:
    """Everything that is known of the call before its handler runs."""
    record = Record("ioctl")
    who(record, call.task)
    record.file = files.number(call.context)
    record.kind = kind_of(call.context)
    record.number, record.arg, record.size, record.raw = call.number, call.arg, call.size, call.raw
    return record


def finish_ioctl(record: Record, call: Call, result: int, error: KernelError | None, files: Files) -> None:
    """What came of it: the result, and the struct if the call gave anything back in it."""
    outcome(record, result, error)
    value = call.cmd
    if not record.raw or value is None:
        return
    now = value.pack()[: len(record.raw)]
    if error is None or now != record.raw:
        record.out = now
    if error is None:
        record.files = tuple(NewFile(fd, files.number(file), kind_of(file)) for fd, file in call.new_file)
