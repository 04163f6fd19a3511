"""Plays programs on a machine in this process, with the player's arena and the player's words for answers."""

from __future__ import annotations

import ctypes
import mmap
import os
import select

from iommufd.client.backends.software import SoftwareBackend
from iommufd.machine.presets import preset
from iommufd.memory.accounting import shown_kb
from tools.fuzz.program import (
    ARENA,
    CLOSE,
    EXIT,
    FORK,
    IOCTL,
    LIMIT,
    MEMFD,
    MMAP,
    MPROTECT,
    MUNMAP,
    NEW,
    OPEN,
    PAGE,
    PAGES,
    PEEK,
    POKE,
    POLL,
    READ,
    STATUS,
    WRITE,
    Program,
    Step,
)
from tools.fuzz.second import Second

SCRATCH = ARENA + PAGES * PAGE
SIZE = PAGES * PAGE + 65536
READ_ONLY = SCRATCH + 32768
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_RW, _ANONYMOUS = 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10  # MAP_FIXED


class Stage:
    """One sequence's surroundings: a fresh machine, the arena, descriptor slots, perhaps a second process."""

    def __init__(self, machine: str = "mock@7.3.4") -> None:
        self.backend = SoftwareBackend(preset(machine))
        self.backend.owner.pretended = 2**64 - 1
        self.slots: dict[int, int] = {}
        self.second: Second | None = None
        self._own: set[int] = set()
        _libc.mmap(ARENA, SIZE, _RW, _ANONYMOUS, -1, 0)

    def close(self) -> None:
        """Takes everything away; the machine must be empty then."""
        self._end_second()
        for slot in sorted(self.slots, reverse=True):
            self._close(slot)
        self.backend.close_all()
        self.backend.owner.space.unmap(ARENA, ARENA + SIZE)
        self.backend.owner.host.close()
        _libc.munmap(ARENA, SIZE)

    def _end_second(self) -> None:
        if self.second is not None:
            self.second.end()
            self.second = None

    def _close(self, slot: int) -> int:
        fd = self.slots.pop(slot, -1)
        if fd < 0:
            return 9
        if fd in self._own:
            self._own.discard(fd)
            os.close(fd)
        else:
            self.backend.close(fd)
        return 0

    def play(self, step: Step) -> str:
        """The answer as the player prints it."""
        try:
            return self._play(step)
        except OSError as error:
            if step.kind == IOCTL:
                return f"E{error.errno} {self._after(step).hex()}"
            return f"E{error.errno}" + (" " if step.kind == READ else "")

    def _play(self, step: Step) -> str:
        if step.second and self.second is None:
            return ""
        slots = self.second.slots if step.second and self.second is not None else self.slots
        fd = slots.get(step.slot, -1)
        if step.kind == IOCTL:
            return self._ioctl(step, fd, slots)
        if step.second and self.second is not None:
            return self.second.play(step)
        if step.kind == FORK:
            self._end_second()
            self.second = Second(self.backend, self.slots, SIZE)
            return ""
        if step.kind == EXIT:
            self._end_second()
            return ""
        if step.kind == STATUS:
            space = self.backend.owner.space
            return f"{shown_kb(space.locked_vm)} {shown_kb(space.pinned_vm)} "
        if step.kind in (POKE, PEEK, LIMIT, MMAP, MUNMAP, MPROTECT):
            return self._memory(step)
        return self._descriptor(step, fd)

    def _descriptor(self, step: Step, fd: int) -> str:
        if step.kind == OPEN:
            self.slots[step.slot] = self.backend.open("/dev/iommu", os.O_RDWR)
            return "0"
        if step.kind == CLOSE:
            failed = self._close(step.slot)
            return f"E{failed}" if failed else "0"
        if step.kind == READ:
            data = self.backend.read(fd, step.numbers[0])
            return f"{len(data)} {data.hex()}"
        if step.kind == WRITE:
            return str(self.backend.write(fd, step.data))
        if step.kind == POLL:
            if fd < 0:
                return "0"
            events = select.POLLIN | select.POLLOUT | select.POLLRDNORM
            return str(self.backend.poll(fd, events, 0))
        assert step.kind == MEMFD, step
        self.slots[step.slot] = os.memfd_create("fuzz", os.MFD_CLOEXEC)
        self._own.add(self.slots[step.slot])
        os.ftruncate(self.slots[step.slot], step.numbers[0] * PAGE)
        return "0"

    def _memory(self, step: Step) -> str:
        if step.kind == POKE:
            ctypes.memmove(step.numbers[0], step.data, len(step.data))
            return ""
        if step.kind == PEEK:
            return " " + ctypes.string_at(*step.numbers).hex()
        if step.kind == LIMIT:
            owner = self.backend.owner
            owner.pretended = 0
            limit = step.numbers[0] * PAGE
            owner.process.use_limit(lambda _: limit)
            return ""
        first, count = step.numbers[:2]
        where = ARENA + first * PAGE
        if step.kind == MPROTECT:
            return f"E{ctypes.get_errno()}" if _libc.mprotect(where, count * PAGE, step.numbers[2]) else "0"
        self.backend.owner.space.unmap(where, where + count * PAGE)
        if step.kind == MUNMAP:
            return str(_libc.munmap(where, count * PAGE))
        slot = step.numbers[2]
        if slot == 255:
            _libc.mmap(where, count * PAGE, _RW, _ANONYMOUS, -1, 0)
            return ""
        got = _libc.mmap(where, count * PAGE, _RW, mmap.MAP_SHARED | 0x10, self.slots.get(slot, -1), 0)
        return "0" if got == where else f"E{ctypes.get_errno()}"

    # --- ioctls

    def _ioctl(self, step: Step, fd: int, slots: dict[int, int]) -> str:
        ioctl = self.backend.ioctl if self.second is None or not step.second else self.second.ioctl
        if step.address is not None:
            return f"{ioctl(fd, step.cmd, step.address)} "
        data = bytearray(step.data)
        for offset, slot in step.patches:
            data[offset : offset + 4] = slots.get(slot, -1).to_bytes(4, "little", signed=True)
        where = _place(step)
        self._store(step, where, bytes(data))
        before = set(self.backend.descriptors.numbers)
        if step.read_only:
            self._protect(step, where, mmap.PROT_READ)
        try:
            result = ioctl(fd, step.cmd, where)
        finally:
            if step.read_only:
                self._protect(step, where, _RW)
        if step.out is not None:
            slot, offset = step.out
            if offset == NEW:
                self.slots[slot] = next(iter(set(self.backend.descriptors.numbers) - before), -1)
            else:
                self.slots[slot] = int.from_bytes(ctypes.string_at(where + offset, 4), "little")
                ctypes.memmove(where + offset, bytes(4), 4)
        return f"{result} {self._after(step).hex()}"

    def _after(self, step: Step) -> bytes:
        """The struct as it is now, without the descriptors given in it."""
        if step.address is not None:
            return b""
        where, length = _place(step), len(step.data)
        second = self.second if step.second else None
        out = bytearray(ctypes.string_at(where, length) if second is None else second.load(where, length))
        for offset, _ in step.patches:
            out[offset : offset + 4] = bytes(4)
        return bytes(out)

    def _store(self, step: Step, where: int, data: bytes) -> None:
        if step.second and self.second is not None:
            self.second.store(where, data)
        else:
            ctypes.memmove(where, data, len(data))

    def _protect(self, step: Step, where: int, prot: int) -> None:
        if step.second and self.second is not None:
            self.second.protect(where, PAGE, prot)
        else:
            _libc.mprotect(where, PAGE, prot)


def _place(step: Step) -> int:
    return READ_ONLY if step.read_only else SCRATCH


def play(program: Program, machine: str = "mock@7.3.4") -> list[str]:
    """The answers of a whole program."""
    stage = Stage(machine)
    try:
        return [stage.play(step) for step in program.steps]
    finally:
        stage.close()
