"""The process a check works in: its memory, limits and capabilities; and children that do what they are told.

What differs between a kernel and a machine in this process, apart from the backend's calls, is a :class:`System`.

Invariant: a child starts as a fork, so it has the arena with the parent's bytes, and the parent's descriptors by the
same numbers. It runs nothing but :func:`serve` and ends with ``os._exit``.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import warnings
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from iommufd.client.backend import Backend

MAP_FIXED_NOREPLACE, MAP_NORESERVE, MADV_NOHUGEPAGE = 0x100000, 0x4000, 15

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong]


class OwnMemory:
    """This process's. Ordinary pages only: physical contiguity is not something two systems agree on."""

    def map(self, addr: int, length: int, prot: int, flags: int, fd: int = -1, offset: int = 0) -> None:
        got = libc.mmap(addr, length, prot, flags | MAP_FIXED_NOREPLACE | MAP_NORESERVE, fd, offset)
        if got != addr:
            raise OSError(ctypes.get_errno(), f"no memory for the arena at {addr:#x}")
        libc.madvise(addr, length, MADV_NOHUGEPAGE)

    def unmap(self, addr: int, length: int) -> None:
        libc.munmap(addr, length)

    def protect(self, addr: int, length: int, prot: int) -> int:
        return int(libc.mprotect(addr, length, prot))

    def store(self, addr: int, data: bytes) -> None:
        ctypes.memmove(addr, data, len(data))

    def load(self, addr: int, count: int) -> bytes:
        return ctypes.string_at(addr, count)


class Child:
    """A forked process: its memory, its ioctls, and what else it does when told. ``pid`` is 0 when it has ended."""

    def __init__(self) -> None:
        here, there = os.pipe(), os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # other threads: the child takes none of their locks
            self.pid = os.fork()
        if not self.pid:
            try:
                os.close(here[0])
                os.close(there[1])
                serve(there[0], here[1])
            finally:
                os._exit(0)
        os.close(here[1])
        os.close(there[0])
        self._from, self._to = os.fdopen(here[0]), os.fdopen(there[1], "w")

    def tell(self, *what: Any) -> Any:  # JSON there and back: of which types, the deed says
        """Has the child do one of :class:`_Deeds`; what it answers."""
        self._to.write(json.dumps(what) + "\n")
        self._to.flush()
        return json.loads(self._from.readline())

    def map(self, addr: int, length: int, prot: int, flags: int, fd: int = -1, offset: int = 0) -> None:
        self.tell("map", addr, length, prot, flags, fd, offset)

    def unmap(self, addr: int, length: int) -> None:
        self.tell("unmap", addr, length)

    def protect(self, addr: int, length: int, prot: int) -> int:
        return int(self.tell("protect", addr, length, prot))

    def store(self, addr: int, data: bytes) -> None:
        self.tell("store", addr, data.hex())

    def load(self, addr: int, count: int) -> bytes:
        return bytes.fromhex(self.tell("load", addr, count))

    def ioctl(self, fd: int, cmd: int, arg: int) -> int:
        result = int(self.tell("ioctl", fd, cmd, arg))
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return result

    def exit(self) -> None:
        """Ends the child and waits for that."""
        if self.pid:
            self._to.write(json.dumps(["exit"]) + "\n")
            self._to.close()
            self._from.close()
            os.waitpid(self.pid, 0)
            self.pid = 0


class _Deeds(OwnMemory):
    """What a child can do; arguments and answers are JSON."""

    def ioctl(self, fd: int, cmd: int, arg: int) -> int:
        result = int(libc.ioctl(fd, cmd, arg))
        return -ctypes.get_errno() if result < 0 else result

    def limit_memlock(self, size: int | None) -> None:
        limit_memlock(size)

    def set_capabilities(self, effective: tuple[int, int]) -> tuple[int, int]:
        return set_capabilities(effective)


def serve(orders: int, answers: int) -> None:
    """The life of a child: one JSON line an order, until there are no more."""
    deeds = _Deeds()
    with os.fdopen(orders) as source, os.fdopen(answers, "w") as sink:
        for line in source:
            name, *arguments = json.loads(line)
            if name == "exit":  # a later child has copies of our pipes: their end would not be seen
                return
            if name == "store":
                arguments[1] = bytes.fromhex(arguments[1])
            answer = getattr(deeds, name)(*arguments)
            sink.write(json.dumps(answer.hex() if isinstance(answer, bytes) else answer) + "\n")
            sink.flush()


def limit_memlock(size: int | None) -> None:
    """Sets the soft RLIMIT_MEMLOCK to ``size`` bytes, or to the hard limit."""
    hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard if size is None else size, hard))


def set_capabilities(effective: tuple[int, int]) -> tuple[int, int]:
    """The calling thread's effective capabilities (low word, high word) from now on; what they were."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; low words, then high words
    libc.capget(header, sets)
    before = sets[0], sets[3]
    sets[0], sets[3] = effective
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")
    return before


def open_numbers() -> set[int]:
    """The process's descriptors, but for the one that the look at them takes."""
    return {int(name) for name in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{name}")}


def locked_and_pinned(pid: int) -> tuple[int, int]:
    """VmLck and VmPin of a process in kB."""
    words = dict.fromkeys(("VmLck", "VmPin"), 0)
    with open(f"/proc/{pid}/status") as status:
        for line in status:
            name, _, value = line.partition(":")
            if name in words:
                words[name] = int(value.split()[0])
    return words["VmLck"], words["VmPin"]


class System:
    """The process as a kernel has it: nothing need be told to anybody. A machine in this process overrides."""

    def __init__(self, memory: OwnMemory | Child | None = None) -> None:
        self.memory = memory if memory is not None else OwnMemory()

    def before_unmap(self, start: int, end: int) -> None:
        """Called before memory of the arena goes away."""

    def before_exit(self) -> None:
        """Called before a child ends."""

    def numbers(self) -> set[int]:
        """The descriptors the program has, apart from those a machine in this process takes for itself."""
        return open_numbers()

    def real_path(self, path: str) -> str:
        """Where a path of /sys ends when all links are followed."""
        return os.path.realpath(path)

    def set_capabilities(self, effective: tuple[int, int]) -> tuple[int, int]:
        """The effective capabilities from now on; what they were."""
        if isinstance(self.memory, Child):
            low, high = self.memory.tell("set_capabilities", effective)
            return low, high
        return set_capabilities(effective)

    def limit_memlock(self, size: int | None) -> None:
        """The soft RLIMIT_MEMLOCK from now on."""
        if isinstance(self.memory, Child):
            self.memory.tell("limit_memlock", size)
        else:
            limit_memlock(size)

    def locked_and_pinned(self) -> tuple[int, int]:
        """VmLck and VmPin in kB."""
        return locked_and_pinned(self.memory.pid if isinstance(self.memory, Child) else os.getpid())

    def fork(self) -> tuple[Backend, System]:
        """A child: what its ioctls go through, and the system it is."""
        child = Child()
        return cast("Backend", child), System(child)  # ioctls are all that a check asks of a child
