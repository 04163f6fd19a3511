"""Backend: the eight calls that are all the client needs of an operating system.

Nothing else distinguishes the real ``/dev/iommu`` from the software one. Descriptors are ordinary numbers of the
calling process in both, so ``os.fstat``, ``select`` and passing them inside structs work alike. Errors are ``OSError``
with the kernel's errno; the software backend raises :class:`~iommufd.client.errors.IommufdError` s whose ``why`` says
more. A backend of one's own is checked by ``iommufd.testing``'s conformance functions.
"""

from __future__ import annotations

from typing import Protocol


class Backend(Protocol):
    """An operating system as the client sees it; ``fd`` is always one that this backend returned."""

    name: str

    def open(self, path: str, flags: int) -> int:
        """Opens ``path`` with ``os.O_*`` flags; returns a descriptor. OSError ENOENT when there is no such device."""
        ...

    def ioctl(self, fd: int, cmd: int, arg: bytearray | int) -> int:
        """One ioctl. ``arg`` is the struct itself, changed in place, or a raw number (an address, or a value).

        Pointers inside the struct are addresses of this process. Returns the call's result, 0 or more."""
        ...

    def read(self, fd: int, count: int, offset: int | None = None) -> bytes:
        """Up to ``count`` bytes, perhaps none: read(2), or pread(2) when an ``offset`` is given."""
        ...

    def write(self, fd: int, data: bytes, offset: int | None = None) -> int:
        """Bytes taken: write(2), or pwrite(2) when an ``offset`` is given."""
        ...

    def poll(self, fd: int, events: int, timeout: float | None) -> int:
        """Waits up to ``timeout`` seconds (None: forever) for any of ``events``; the ready mask, 0 on timeout."""
        ...

    def mmap(self, fd: int, length: int, prot: int, flags: int, offset: int) -> memoryview:
        """Maps device memory; the mapping goes when the last view of it does. ``length`` in bytes, page multiples."""
        ...

    def close(self, fd: int) -> None:
        """Closes the descriptor; the last one of a file releases it."""
        ...

    def fileno(self, fd: int) -> int:
        """The number other system calls know the descriptor by (identity in both backends)."""
        ...


METHODS = ("open", "ioctl", "read", "write", "poll", "mmap", "close", "fileno")


def check_calls(backend: object) -> None:
    """TypeError unless ``backend`` has the eight calls."""
    missing = [name for name in METHODS if not callable(getattr(backend, name, None))]
    if missing:
        raise TypeError(f"{type(backend).__name__} is no backend: it lacks {', '.join(missing)}")
