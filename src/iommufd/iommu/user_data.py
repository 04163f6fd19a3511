"""Driver-private structs that arrive through an ioctl, and the helpers that copy them (devices.md 4.7).

The errnos of these helpers are what a client sees, so every driver uses them. The kernel names: struct iommu_user_data,
iommu_user_data_array, iommu_copy_struct_from_user and friends.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Protocol, TypeVar

from iommufd.errors import KernelError

if TYPE_CHECKING:
    from iommufd.uapi.declare import Struct

CHUNK = 65536  # bytes of an array read at a time

S = TypeVar("S", bound="Struct")


class UserMemory(Protocol):
    """The caller's memory; KernelError EFAULT where it is not accessible."""

    def read(self, addr: int, count: int) -> bytes: ...

    def write(self, addr: int, data: bytes | bytearray | memoryview) -> None: ...


class UserData:
    """One struct of the caller: its ``type`` as the caller named it, its address and its length in bytes."""

    __slots__ = ("length", "memory", "type", "uptr")

    def __init__(self, memory: UserMemory, type: int, uptr: int, length: int) -> None:
        self.memory = memory
        self.type = type
        self.uptr = uptr
        self.length = length

    def check(self, wanted: int, struct: type[Struct], minimum: int) -> None:
        """devices.md 4.7 row 1: the type, then ``minimum <= length <= sizeof`` (a longer struct is EINVAL, never
        E2BIG)."""
        if self.type != wanted:
            raise KernelError(errno.EINVAL, f"user data of type {self.type:#x} where {wanted:#x} is wanted")
        if not minimum <= self.length <= struct.SIZE:
            raise KernelError(
                errno.EINVAL, f"user data of {self.length} bytes; {struct.C_NAME} takes {minimum} to {struct.SIZE}"
            )

    def copy(self, wanted: int, struct: type[S], minimum: int) -> S:
        """The struct, its missing tail zero. EINVAL by :meth:`check`, then EFAULT."""
        self.check(wanted, struct, minimum)
        return struct.unpack(self.memory.read(self.uptr, self.length))

    def copy_back(self, wanted: int, value: Struct, minimum: int) -> None:
        """devices.md 4.7 row 4: writes the leading ``length`` bytes of ``value``; EINVAL by :meth:`check`, then
        EFAULT."""
        self.check(wanted, type(value), minimum)
        self.memory.write(self.uptr, value.pack()[: self.length])


class UserArray:
    """``entry_num`` structs of ``entry_len`` bytes each at ``uptr``. A driver sets ``entry_num`` to what it handled."""

    __slots__ = ("entry_len", "entry_num", "memory", "type", "uptr")

    def __init__(self, memory: UserMemory, type: int, uptr: int, entry_len: int, entry_num: int) -> None:
        self.memory = memory
        self.type = type
        self.uptr = uptr
        self.entry_len = entry_len
        self.entry_num = entry_num

    def entry(self, index: int, wanted: int, struct: type[S], minimum: int) -> S:
        """Entry ``index`` alone (devices.md 4.7 row 2)."""
        if not 0 <= index < self.entry_num:
            raise KernelError(errno.EINVAL, f"entry {index} of an array of {self.entry_num}")
        one = UserData(self.memory, self.type, self.uptr + self.entry_len * index, self.entry_len)
        return one.copy(wanted, struct, minimum)

    def all(self, wanted: int, struct: type[S]) -> list[S]:
        """Every entry (devices.md 4.7 row 3): shorter entries are zero-extended, a longer entry's tail must be zero."""
        if self.type != wanted:
            raise KernelError(errno.EINVAL, f"an array of type {self.type:#x} where {wanted:#x} is wanted")
        if self.entry_num == 0:
            raise KernelError(errno.EINVAL, "an empty array")
        size, read = struct.SIZE, self.memory.read
        if self.entry_len == size:
            data = read(self.uptr, size * self.entry_num)
            return [struct.unpack(data[at : at + size]) for at in range(0, len(data), size)]
        entries: list[S] = []
        for index in range(0, self.entry_num, self._step):
            entries += self._some(index, min(self._step, self.entry_num - index), struct)
        return entries

    @property
    def _step(self) -> int:
        """How many entries are read at a time."""
        return max(1, CHUNK // self.entry_len)

    def _some(self, first: int, count: int, struct: type[S]) -> list[S]:
        """Entries ``[first, first + count)``; a bad entry is reported before a later one that is unreadable."""
        length, size = self.entry_len, struct.SIZE
        try:
            data = self.memory.read(self.uptr + length * first, length * count)
        except KernelError:
            if count == 1:
                raise
            return [entry for index in range(first, first + count) for entry in self._some(index, 1, struct)]
        if length > size:
            for index in range(count):
                if data[index * length + size : (index + 1) * length].strip(b"\0"):
                    raise KernelError(
                        errno.E2BIG, f"entry {first + index} has nonzero bytes after the {size} of {struct.C_NAME}"
                    )
        used = min(length, size)
        return [struct.unpack(data[at : at + used]) for at in range(0, length * count, length)]
