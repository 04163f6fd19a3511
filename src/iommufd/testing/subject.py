"""Subject: something that claims to be a kernel, driven at the level "open, ioctl with these bytes, compare".

A conformance check is a function of a Subject. Everything it does is a *step* (an ioctl, a poke into memory, a mapping)
with fixed addresses inside one arena, and every step's answer is written down. The steps and answers of a run on the
real kernel are a transcript; playing the same check on another backend must give the same transcript. Descriptors
differ between systems, so a transcript names them by order of appearance (``fd0``, ``fd1``).

Where a field of a struct holds a descriptor is data: :data:`FD_FIELDS`.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import resource
import select
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from iommufd.errors import errno_name
from iommufd.testing.system import Child, System
from iommufd.uapi import iommufd_test as t
from iommufd.uapi.commands import COMMANDS
from iommufd.uapi.declare import Struct, members

if TYPE_CHECKING:
    from iommufd.client.backend import Backend

Step: TypeAlias = list[Any]
"""What was asked and what was said: whatever :mod:`json` can write."""
Transcript: TypeAlias = list[Step]

ARENA = 0x1000_0000_0000  # where a check's memory lives: the same address on every system
ARENA_SIZE = 64 << 20
PAGE = 4096
SCRATCH = ARENA + ARENA_SIZE - 64 * PAGE  # structs and bitmaps of the harness itself
IOCTL_PAGE = SCRATCH

# (command, op or None) -> offsets of u32/s32 fields that hold a descriptor: given by the caller, or handed out
_GIVEN: dict[tuple[int, int | None], tuple[int, ...]] = {
    (0x3B8F, None): (12,),  # IOAS_MAP_FILE.fd
    (0x3BA0, 6): (8,),  # DESTROY_ACCESS_PAGES.id
    (0x3BA0, 7): (8,),  # ACCESS_PAGES.id
    (0x3BA0, 8): (8,),  # ACCESS_RW.id
    (0x3BA0, 11): (8,),  # ACCESS_REPLACE_IOAS.id
    (0x3BA0, 23): (16,),  # DMABUF_REVOKE.dmabuf_fd
    (0x3B68, None): (0,),  # VFIO_GROUP_SET_CONTAINER
    (0x3B6E, None): (20, 24),  # VFIO_DEVICE_SET_IRQS.data
    (0x3B71, None): (12, 16),  # VFIO_DEVICE_PCI_HOT_RESET.group_fds
    (0x3B75, None): (8,),  # VFIO_DEVICE_FEATURE, entry into low power with a wake-up: its eventfd
    (0x3B76, None): (8,),  # VFIO_DEVICE_BIND_IOMMUFD.iommufd
}
_HANDED: dict[tuple[int, int | None], tuple[int, ...]] = {
    (0x3B8E, None): (12,),  # FAULT_QUEUE_ALLOC.out_fault_fd
    (0x3B93, None): (24,),  # VEVENTQ_ALLOC.out_veventq_fd
    (0x3BA0, 5): (16,),  # CREATE_ACCESS.out_access_fd
}
_RETURNS_FD = {(0x3BA0, 22), (0x3B6A, None)}  # DMABUF_GET, VFIO_GROUP_GET_DEVICE_FD


class Mismatch(AssertionError):
    """The subject answered otherwise than the check expects."""


def shown(data: bytes) -> str:
    """Bytes for a transcript: hexadecimal, with a long tail of one repeated byte as ``(byte)*count``."""
    if len(data) >= 64:
        head = data.rstrip(data[-1:])
        if len(data) - len(head) >= 32:
            return f"{head.hex()}({data[-1]:02x})*{len(data) - len(head)}"
    return data.hex()


class Answer:
    """What one call said: ``result`` (0 or more), or -1 and ``errno``; ``out`` is the struct afterwards."""

    __slots__ = ("errno", "out", "result")

    def __init__(self, result: int, number: int, out: bytes = b"") -> None:
        self.result = result
        self.errno = number
        self.out = out


S = TypeVar("S", bound=Struct)

_NUMBERS: dict[type[Struct], int] = {command.struct: command.number for command in COMMANDS}
_OPS: dict[type[Struct], int] = {arm: op for op, arm in t.ARMS.items()}


def number_of(struct: Struct) -> int:
    """The ioctl number a struct belongs to (IOMMU_TEST_CMD for every arm of the test command)."""
    return t.IOMMU_TEST_CMD if type(struct) in _OPS else _NUMBERS[type(struct)]


def struct_of(cmd: int, data: bytes) -> Struct | bytes:
    """The struct that ``data`` is to the command ``cmd``; the bytes themselves when nothing knows it."""
    if cmd == t.IOMMU_TEST_CMD and len(data) >= 8:
        arm = t.ARMS.get(int.from_bytes(data[4:8], "little"))
        return data if arm is None else arm.unpack(data)
    kind = next((struct for struct, number in _NUMBERS.items() if number == cmd), None)
    return data if kind is None else kind.unpack(data)


def filled(struct: S) -> S:
    """``struct`` with ``size`` (and ``op`` of a test command) filled in where the check left them zero."""
    fill = members(struct)  # every command has a size
    if fill.size == 0:
        fill.size = struct.SIZE
    if type(struct) in _OPS and fill.op == 0:
        fill.op = _OPS[type(struct)]
    return struct


class Subject:
    """A backend with an arena of memory, and the transcript of what it was asked and said.

    ``system`` is the process the check works in; ``parent`` the subject this one is a forked child of.
    """

    def __init__(self, backend: Backend, system: System | None = None, parent: Subject | None = None) -> None:
        self.backend = backend
        self.system = system if system is not None else System()
        self.parent = parent
        self._children: list[Subject] = []
        self._memory = self.system.memory
        self._labels: dict[int, str] = {} if parent is None else parent._labels
        self.transcript: Transcript = []
        self._named = 0
        self._own: set[int] = set()
        self._views: list[memoryview] = []
        if parent is None:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            self._memory.map(ARENA, ARENA_SIZE, mmap.PROT_READ | mmap.PROT_WRITE, flags)

    # --- life

    def finish(self) -> None:
        """Closes every descriptor the check left open and takes the arena away."""
        self._views.clear()
        for child in self._children:
            child._end()
        for fd in sorted(self._labels, reverse=True):
            self._close(fd)
        self._labels.clear()
        self._unmap(ARENA, ARENA_SIZE)

    def _note(self, step: Step, answer: object) -> None:
        if self.parent is not None:
            self.parent._note(["child", *step], answer)
            return
        self.transcript.append([*step, answer])

    # --- descriptors

    def _label(self, fd: int) -> str:
        if self.parent is not None:
            return self.parent._label(fd)
        label = f"fd{self._named}"
        self._named += 1
        self._labels[fd] = label
        return label

    def open(self, path: str = "/dev/iommu", flags: int = os.O_RDWR) -> int:
        """Opens a device; Mismatch unless that works."""
        try:
            fd = self.backend.open(path, flags)
        except OSError as error:
            self._note(["open", path, flags], errno_name(error.errno or 0))
            raise Mismatch(f"open({path!r}) failed with {errno_name(error.errno or 0)}") from error
        self._note(["open", path, flags], self._label(fd))
        return fd

    def open_group(self, device: str, expected: int = 0) -> int:
        """Opens the VFIO group that ``device`` ("vfio1") is in; with ``expected``, that must fail so (-1 then).

        Group numbers are the system's own affair, so the transcript has the device's name."""
        number = os.path.basename(self.system.real_path(f"/sys/class/vfio-dev/{device}/device/iommu_group"))
        fd, got = -1, 0
        try:
            prefix = "noiommu-" if device.startswith("noiommu-") else ""
            fd = self.backend.open(f"/dev/vfio/{prefix}{number}", os.O_RDWR)
        except OSError as error:
            got = error.errno or 0
        self._note(["open_group", device], errno_name(got) if got else self._label(fd))
        self.expect(got == expected, f"the group of {device}: {errno_name(got)}, expected {errno_name(expected)}")
        return fd

    def open_fails(self, expected: int, path: str, flags: int = os.O_RDWR) -> None:
        """Opens a device and expects ``errno``."""
        got = 0
        try:
            fd = self.backend.open(path, flags)
            self._label(fd)
        except OSError as error:
            got = error.errno or 0
        self._note(["open", path, flags], errno_name(got))
        self.expect(
            errno_name(got) == errno_name(expected),
            f"open({path!r}): {errno_name(got)}, expected {errno_name(expected)}",
        )

    def memfd(self, size: int, *, flags: int = 0) -> int:
        """A memfd of ``size`` bytes (a file of the host, not of the machine)."""
        fd = os.memfd_create("conformance", flags | os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        self._own.add(fd)
        self._note(["memfd", size, flags], self._label(fd))
        return fd

    def ftruncate(self, fd: int, size: int) -> None:
        self._note(["ftruncate", self._labels[fd], size], 0)
        os.ftruncate(fd, size)

    def pipe(self) -> tuple[int, int]:
        """A pipe: descriptors that are neither memory nor a device."""
        pair = os.pipe()
        self._own.update(pair)
        self._note(["pipe"], [self._label(fd) for fd in pair])
        return pair

    def eventfd(self) -> int:
        """An eventfd that does not block."""
        fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._own.add(fd)
        self._note(["eventfd"], self._label(fd))
        return fd

    def signals(self, eventfd: int) -> int:
        """How often an eventfd was signalled since the last look."""
        try:
            count = os.eventfd_read(eventfd)
        except BlockingIOError:
            count = 0
        self._note(["signals", self._labels[eventfd]], count)
        return count

    def dma_buf(self, fd: int, length: int, flags: int = 2) -> int:
        """A dma-buf of the test exporter. Its number is found by what is new among the process's own: 7.3.4 does not
        report it."""
        before = self.system.numbers()
        self.do(fd, t.test_dmabuf_get(length=length, open_flags=flags))
        new = list(self.system.numbers() - before)
        self.expect(len(new) == 1, f"one new descriptor, not {new}")
        self._note(["dma_buf"], self._label(new[0]))
        return new[0]

    @contextlib.contextmanager
    def without_capabilities(self) -> Iterator[None]:
        """Within it the calling thread has no effective capability."""
        self._note(["capabilities", 0], 0)
        before = self.system.set_capabilities((0, 0))
        try:
            yield
        finally:
            self.system.set_capabilities(before)
            self._note(["capabilities", 1], 0)

    @contextlib.contextmanager
    def memlock(self, pages: int) -> Iterator[None]:
        """Within it RLIMIT_MEMLOCK is ``pages`` pages."""
        self._note(["memlock", pages], 0)
        self.system.limit_memlock(pages * PAGE)
        try:
            yield
        finally:
            self.system.limit_memlock(None)
            self._note(["memlock", None], 0)

    def pages_locked_and_pinned(self) -> tuple[int, int]:
        """VmLck and VmPin of the process, in pages."""
        locked, pinned = (kb * 1024 // PAGE for kb in self.system.locked_and_pinned())
        self._note(["locked and pinned"], [locked, pinned])
        return locked, pinned

    # --- other processes

    def fork(self) -> Subject:
        """A forked process with a copy of the arena and the same descriptors; it can make ioctls and use memory."""
        self._note(["fork"], 0)
        child = Subject(*self.system.fork(), parent=self)
        self._children.append(child)
        return child

    def exit(self) -> None:
        """Ends a child."""
        self._note(["exit"], 0)
        self._end()

    def _end(self) -> None:
        child = self.system.memory
        if isinstance(child, Child) and child.pid:
            self.system.before_exit()
            child.exit()

    @contextlib.contextmanager
    def no_free_descriptors(self) -> Iterator[None]:
        """Within it the process gets no further descriptor (RLIMIT_NOFILE is at the lowest free number)."""
        lowest = os.dup(0)
        os.close(lowest)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._note(["no_free_descriptors"], 0)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    def close(self, fd: int) -> None:
        self._note(["close", self._labels.pop(fd)], 0)
        self._close(fd)

    def _close(self, fd: int) -> None:
        if fd in self._own:
            self._own.discard(fd)
            os.close(fd)
        else:
            self.backend.close(fd)

    # --- memory

    def _unmap(self, addr: int, length: int) -> None:
        self.system.before_unmap(addr, addr + length)
        self._memory.unmap(addr, length)

    def page(self, number: int) -> int:
        """The address of the arena's page ``number``."""
        return ARENA + number * PAGE

    def munmap(self, addr: int, length: int) -> None:
        self._note(["munmap", addr, length], 0)
        self._unmap(addr, length)

    def mmap(
        self, addr: int, length: int, prot: int = 3, *, fd: int = -1, offset: int = 0, shared: bool = False
    ) -> None:
        """Puts fresh anonymous memory, or ``fd``, at ``addr`` in the arena, in place of what was there."""
        self._note(["mmap", addr, length, prot, self._labels.get(fd), offset, shared], 0)
        self._unmap(addr, length)
        kind = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
        self._memory.map(addr, length, prot, kind | (mmap.MAP_ANONYMOUS if fd < 0 else 0), fd, offset)

    def mprotect(self, addr: int, length: int, prot: int) -> None:
        self._note(["mprotect", addr, length, prot], self._memory.protect(addr, length, prot))

    def poke(self, addr: int, data: bytes) -> None:
        """Writes memory directly, as the program itself would."""
        if len(data) <= 65536:
            self._note(["poke", addr, shown(data)], 0)
        self._memory.store(addr, data)

    def poke_fd(self, addr: int, fd: int) -> None:
        """Writes the number of a descriptor; the transcript has its name."""
        self._note(["poke_fd", addr, self._labels[fd]], 0)
        self._memory.store(addr, fd.to_bytes(4, "little"))

    def peek(self, addr: int, count: int) -> bytes:
        """Reads memory directly."""
        data = self._memory.load(addr, count)
        if count <= 65536:
            self._note(["peek", addr, count], shown(data))
        return data

    # --- ioctls

    def _with_labels(self, data: bytes | bytearray, offsets: Sequence[int]) -> Step:
        """``data`` for the transcript: descriptors at ``offsets`` replaced by zero bytes and listed by label."""
        out, names = bytearray(data), []
        for offset in offsets:
            if offset + 4 <= len(out):
                label = self._labels.get(int.from_bytes(out[offset : offset + 4], "little"))
                if label is not None:
                    out[offset : offset + 4] = bytes(4)
                    names.append([offset, label])
        return [shown(bytes(out)), names]

    def ioctl(
        self,
        fd: int,
        cmd: int,
        data: bytes = b"",
        *,
        at: int | None = None,
        poke: bool = True,
        hide: Sequence[tuple[int, int]] = (),
    ) -> Answer:
        """One ioctl whose argument is memory: ``data`` is put at ``at`` (a page of the harness), and read back after.

        With ``poke=False`` nothing is written or read: ``at`` is only a number. ``hide``: (offset, count) of what comes
        back and differs from system to system; the transcript has zeros there."""
        where = IOCTL_PAGE if at is None else at
        key: tuple[int, int | None] = (cmd, None)
        if cmd == 0x3BA0 and len(data) >= 8:
            key = (cmd, int.from_bytes(data[4:8], "little"))
        if poke:
            self._memory.store(where, data)
        result, number = -1, 0
        try:
            result = self.backend.ioctl(fd, cmd, where)
        except OSError as error:
            number = error.errno or 0
        out = self._memory.load(where, len(data)) if poke else b""
        handed = _HANDED.get(key, ()) if result >= 0 else ()
        for offset in handed:
            if offset + 4 <= len(out):
                self._label(int.from_bytes(out[offset : offset + 4], "little"))
        said: int | str = result if result >= 0 else errno_name(number)
        if result > 0 and key in _RETURNS_FD:
            said = self._label(result)
        told = bytearray(out)
        for start, count in hide:
            told[start : start + count] = bytes(len(told[start : start + count]))
        self._note(
            ["ioctl", self._labels.get(fd, "?"), f"{cmd:#x}", where, *self._with_labels(data, _GIVEN.get(key, ()))],
            [said, *self._with_labels(told, (*_GIVEN.get(key, ()), *handed))],
        )
        return Answer(result, number, out)

    def ask(self, fd: int, struct: Struct) -> Answer:
        """One ioctl with a struct; ``size`` and ``op`` are filled in when zero. Nothing is expected of the answer."""
        return self.ioctl(fd, number_of(struct), filled(struct).pack())

    def do(self, fd: int, struct: S) -> S:
        """One ioctl that must succeed; the struct as it came back."""
        answer = self.ask(fd, struct)
        self.expect(answer.result >= 0, f"{struct!r} failed with {errno_name(answer.errno)}")
        return type(struct).unpack(answer.out)

    def refuses(self, expected: int, fd: int, struct: S) -> S:
        """One ioctl that must fail with ``expected``; the struct as it is afterwards."""
        answer = self.ask(fd, struct)
        got = errno_name(answer.errno) if answer.result < 0 else f"success ({answer.result})"
        self.expect(answer.errno == expected, f"{struct!r}: {got}, expected {errno_name(expected)}")
        return type(struct).unpack(answer.out)

    # --- reading, writing, polling

    def read(self, fd: int, count: int, offset: int | None = None) -> Answer:
        try:
            data = self.backend.read(fd, count, offset)
            answer = Answer(len(data), 0, data)
        except OSError as error:
            answer = Answer(-1, error.errno or 0)
        said = shown(answer.out) if answer.result >= 0 else errno_name(answer.errno)
        self._note(["read", self._labels[fd], count, *([] if offset is None else [offset])], said)
        return answer

    def write(self, fd: int, data: bytes, offset: int | None = None) -> Answer:
        try:
            answer = Answer(self.backend.write(fd, data, offset), 0)
        except OSError as error:
            answer = Answer(-1, error.errno or 0)
        said = answer.result if answer.result >= 0 else errno_name(answer.errno)
        self._note(["write", self._labels[fd], data.hex(), *([] if offset is None else [offset])], said)
        return answer

    def poll(self, fd: int, *, wrnorm: bool = False) -> int:
        """The ready mask now, of IN, OUT, RDNORM, ERR and HUP; of WRNORM too if asked for, which the pipes that stand
        for queues under ``iommufd run`` always add (docs/deviations.md)."""
        events = select.POLLIN | select.POLLOUT | select.POLLRDNORM | (select.POLLWRNORM if wrnorm else 0)
        mask = self.backend.poll(fd, events, 0)
        self._note(["poll", self._labels[fd], *([events] if wrnorm else [])], mask)
        return mask

    def mmap_device(self, fd: int, length: int, prot: int, flags: int, offset: int) -> memoryview | None:
        """Maps a device's memory; None (and the errno in the transcript) when that fails."""
        step = ["mmap_device", self._labels[fd], length, prot, flags, offset]
        try:
            view = self.backend.mmap(fd, length, prot, flags, offset)
        except OSError as error:
            self._note(step, errno_name(error.errno or 0))
            return None
        self._note(step, 0)
        self._views.append(view)
        return view

    def unmap_device(self, view: memoryview) -> None:
        """Takes a mapping made by :meth:`mmap_device` away."""
        self._note(["unmap_device"], 0)
        self._views = [kept for kept in self._views if kept is not view]
        view.release()

    # --- judging

    def expect(self, truth: bool, sentence: str) -> None:
        """Mismatch with ``sentence`` unless ``truth``."""
        if not truth:
            raise Mismatch(sentence)
