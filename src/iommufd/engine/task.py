"""Task: the calling thread, valid for one call. What outlives the call is split off into Process, AddressSpace, User.

The engine never asks whether the caller is its own process or another one; both implement this protocol.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from iommufd.engine.file import File
    from iommufd.memory.accounting import Process
    from iommufd.memory.hostfile import HostFile
    from iommufd.memory.space import AddressSpace

CAP_IPC_LOCK, CAP_SYS_RAWIO, CAP_SYS_RESOURCE = 14, 17, 24
CAPABILITIES = {"ipc_lock": CAP_IPC_LOCK, "sys_rawio": CAP_SYS_RAWIO, "sys_resource": CAP_SYS_RESOURCE}  # all we ask


class Task(Protocol):
    """The calling thread. All addresses are the caller's virtual addresses, 0 <= addr < 2**64."""

    @property
    def tid(self) -> int: ...

    @property
    def space(self) -> AddressSpace: ...

    @property
    def process(self) -> Process:
        """The thread group: limits, user."""
        ...

    def read(self, addr: int, count: int) -> bytes:
        """Exactly ``count`` bytes at ``addr`` under the caller's page protections; else KernelError(EFAULT)."""
        ...

    def read_into(self, addr: int, buffer: bytearray | memoryview) -> None:
        """As :meth:`read`, into all of a writable, contiguous buffer: for large copies that are to be repeated."""
        ...

    def read_upto(self, addr: int, count: int) -> bytes:
        """The readable leading bytes of ``[addr, addr+count)``: fewer, or none, where the memory ends."""
        ...

    def write(self, addr: int, data: bytes | bytearray | memoryview) -> None:
        """Writes all of ``data``; EFAULT if any of it cannot be written (a leading part may have been)."""
        ...

    def write_upto(self, addr: int, data: bytes | bytearray | memoryview) -> int:
        """Writes the leading bytes that can be written and returns how many."""
        ...

    def capable(self, capability: int) -> bool:
        """Whether the thread has the capability in the initial user namespace (effective set)."""
        ...

    def file(self, fd: int) -> File | HostFile:
        """The open file behind the caller's descriptor: one of ours, or a file of the host.

        KernelError(EBADF) when not open, negative, or opened with O_PATH. The returned HostFile is the caller's of this
        method to close (``HostFile.close``) unless it is handed on to something that keeps it."""
        ...

    def reserve_fd(self, cloexec: bool) -> int:
        """A free descriptor number for :meth:`install_fd`; KernelError(EMFILE) when there is none."""
        ...

    def install_fd(self, fd: int, file: File) -> None:
        """Makes ``fd`` name ``file`` (the caller's reference moves to the descriptor). Cannot fail."""
        ...

    def release_fd(self, fd: int) -> None:
        """Gives a reserved, not installed number back."""
        ...
