"""Plays programs on a machine in this process, with the player's arena and the player's words for answers."""

from __future__ import annotations

import ctypes
import mmap
import os
import select

from iommufd.client.backends.software import SoftwareBackend
from iommufd.machine.presets import preset
from tools.fuzz.program import (
    ARENA,
    CLOSE,
    IOCTL,
    LIMIT,
    MEMFD,
    MPROTECT,
    MUNMAP,
    OPEN,
    PAGE,
    PAGES,
    PEEK,
    POKE,
    POLL,
    READ,
    WRITE,
    Program,
    Step,
)

SCRATCH = ARENA + PAGES * PAGE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_RW, _ANONYMOUS = 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10  # MAP_FIXED


class Stage:
    """One sequence's surroundings: a fresh machine, the arena, descriptor slots."""

    def __init__(self, machine: str = "mock@7.3.4") -> None:
        self.backend = SoftwareBackend(preset(machine))
        self.backend.owner.pretended = 2**64 - 1
        self.slots: dict[int, int] = {}
        self._own: set[int] = set()
        _libc.mmap(ARENA, PAGES * PAGE + 65536, _RW, _ANONYMOUS, -1, 0)

    def close(self) -> None:
        """Takes everything away; the machine must be empty then."""
        for slot in sorted(self.slots, reverse=True):
            self._close(slot)
        self.backend.close_all()
        self.backend.owner.space.unmap(ARENA, SCRATCH + 65536)
        self.backend.owner.host.close()

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
            if step.kind == IOCTL and step.address is None:
                return f"E{error.errno} {self._blanked(step).hex()}"
            if step.kind == IOCTL:
                return f"E{error.errno} "
            return f"E{error.errno}" + (" " if step.kind == READ else "")

    def _blanked(self, step: Step) -> bytes:
        out = bytearray(ctypes.string_at(SCRATCH, len(step.data)))
        for offset, _ in step.patches:
            out[offset : offset + 4] = bytes(4)
        return bytes(out)

    def _play(self, step: Step) -> str:
        fd = self.slots.get(step.slot, -1)
        if step.kind == IOCTL:
            return self._ioctl(step, fd)
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
        if step.kind == MEMFD:
            self.slots[step.slot] = os.memfd_create("fuzz", os.MFD_CLOEXEC)
            self._own.add(self.slots[step.slot])
            os.ftruncate(self.slots[step.slot], step.numbers[0] * PAGE)
            return "0"
        return self._memory(step)

    def _memory(self, step: Step) -> str:
        first, count = step.numbers[:2]
        where = ARENA + first * PAGE
        if step.kind == MPROTECT:
            return str(_libc.mprotect(where, count * PAGE, step.numbers[2]))
        self.backend.owner.space.unmap(where, where + count * PAGE)
        if step.kind == MUNMAP:
            return str(_libc.munmap(where, count * PAGE))
        slot = step.numbers[2]
        if slot == 255:
            _libc.mmap(where, count * PAGE, _RW, _ANONYMOUS, -1, 0)
            return ""
        got = _libc.mmap(where, count * PAGE, _RW, mmap.MAP_SHARED | 0x10, self.slots.get(slot, -1), 0)
        return "0" if got == where else f"E{ctypes.get_errno()}"

    def _ioctl(self, step: Step, fd: int) -> str:
        if step.address is not None:
            return f"{self.backend.ioctl(fd, step.cmd, step.address)} "
        data = bytearray(step.data)
        for offset, slot in step.patches:
            data[offset : offset + 4] = self.slots.get(slot, -1).to_bytes(4, "little", signed=True)
        ctypes.memmove(SCRATCH, bytes(data), len(data))
        result = self.backend.ioctl(fd, step.cmd, SCRATCH)
        if step.out is not None:
            slot, offset = step.out
            if offset == 255:
                self.slots[slot] = result
                result = 1 if result else 0
            else:
                self.slots[slot] = int.from_bytes(ctypes.string_at(SCRATCH + offset, 4), "little")
                ctypes.memmove(SCRATCH + offset, bytes(4), 4)
        return f"{result} {self._blanked(step).hex()}"


def play(program: Program, machine: str = "mock@7.3.4") -> list[str]:
    """The answers of a whole program."""
    stage = Stage(machine)
    try:
        return [stage.play(step) for step in program.steps]
    finally:
        stage.close()
