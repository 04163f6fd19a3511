"""The second process of a program played in this process: a forked child, and what it is to the machine.

Invariants: it has the descriptors of the moment it was forked, each held until it ends, and fresh memory at the arena's
addresses. Its calls are made here, on its memory.
"""

from __future__ import annotations

import errno
import mmap
import os
from typing import TYPE_CHECKING, NoReturn

from iommufd.client.backends.software.own_task import task_class
from iommufd.errors import KernelError
from iommufd.memory.accounting import shown_kb
from iommufd.testing.software import ChildProcess
from iommufd.testing.system import Child
from tools.fuzz.program import ARENA, LIMIT, MMAP, MPROTECT, MUNMAP, PAGE, PEEK, POKE, STATUS, Step

if TYPE_CHECKING:
    from iommufd.client.backends.software import SoftwareBackend
    from iommufd.engine.file import File

_RW, _FRESH = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
OURS = 1 << 20  # descriptors of the machine, in the second process: this and their slot


class Second:
    """A child of this process on ``backend``'s machine; ``slots`` are the first process's."""

    def __init__(self, backend: SoftwareBackend, slots: dict[int, int], size: int) -> None:
        self._backend = backend
        self._files: dict[int, File] = {}
        self._own: list[int] = []
        self.slots: dict[int, int] = {}
        for slot, fd in slots.items():
            file = backend.descriptors.find(fd)
            if file is not None:
                file.get()
                self._files[OURS + slot] = file
                self.slots[slot] = OURS + slot
            elif fd >= 0:
                self.slots[slot] = os.dup(fd)  # before the fork, so that the number means the same there
                self._own.append(self.slots[slot])
        self._child = Child()
        self._child.unmap(ARENA, size)
        self._child.map(ARENA, size, _RW, _FRESH)
        self.owner = ChildProcess(backend, self._child.pid)
        self._task = task_class(self.owner, self)  # type: ignore[arg-type]  # descriptors as far as a task asks

    def end(self) -> None:
        """Ends the child and waits for that; its descriptors go then."""
        self.owner.space.gone()
        self._child.exit()
        for file in self._files.values():
            file.put()
            self._backend.descriptors.drop_memory(file)
        for fd in self._own:
            os.close(fd)

    # --- what a task asks of its descriptors

    def find(self, fd: int) -> File | None:
        return self._files.get(fd)

    def reserve(self, cloexec: bool) -> NoReturn:
        raise AssertionError("the second process makes no descriptors")

    # --- steps

    def ioctl(self, fd: int, cmd: int, arg: int) -> int:
        """As :meth:`SoftwareBackend.ioctl`."""
        file = self._files.get(fd)
        if file is None:
            raise OSError(9, "not a descriptor of the machine")
        try:
            result = file.ioctl(self._task(None), cmd, arg)
        except KernelError as error:
            raise OSError(error.errno, error.why) from None
        assert isinstance(result, int), "the second process waits for nothing"
        return result

    def store(self, addr: int, data: bytes) -> None:
        self._child.store(addr, data)

    def load(self, addr: int, count: int) -> bytes:
        return self._child.load(addr, count)

    def protect(self, addr: int, length: int, prot: int) -> int:
        return self._child.protect(addr, length, prot)

    def play(self, step: Step) -> str:
        """The answer of a step that is about the process itself."""
        if step.kind == POKE:
            self.store(step.numbers[0], step.data)
            return ""
        if step.kind == PEEK:
            return " " + self.load(*step.numbers).hex()
        if step.kind == LIMIT:
            self.owner.pretended = 0
            limit = step.numbers[0] * PAGE
            self.owner.process.use_limit(lambda _: limit)
            return ""
        if step.kind == STATUS:
            space = self.owner.space
            return f"{shown_kb(space.locked_vm)} {shown_kb(space.pinned_vm)} "
        assert step.kind in (MMAP, MUNMAP, MPROTECT), step
        first, count = step.numbers[:2]
        where, length = ARENA + first * PAGE, count * PAGE
        if step.kind == MPROTECT:
            failed = self.protect(where, length, step.numbers[2])
            return f"E{errno.ENOMEM}" if failed else "0"  # there is a hole, nothing else can be wrong
        self.owner.space.unmap(where, where + length)
        self._child.unmap(where, length)
        if step.kind == MUNMAP:
            return "0"
        if step.numbers[2] == 255:
            self._child.map(where, length, _RW, _FRESH)
            return ""
        self._child.map(where, length, _RW, mmap.MAP_SHARED, self.slots[step.numbers[2]])
        return "0"
