"""Vma and Host: what an AddressSpace has to know about a process, and whom it asks.

The kernel objects are ``vm_area_struct`` and the mm's page tables. The rules of :func:`check_pin` are those of
get_user_pages (core 5.5).
"""

from __future__ import annotations

import errno
from typing import Protocol

from iommufd.errors import KernelError
from iommufd.memory.frames import PAGE_SHIFT, PAGE_SIZE

READ, WRITE, EXEC, SHARED = 1, 2, 4, 8  # Vma.flags, the values of PROCMAP_QUERY_VMA_*

FileKey = tuple[int, int, str]  # st_dev, st_ino, and the name of a SysV segment, whose number is its own


class Vma:
    """One mapping ``[start, end)`` as /proc tells it.

    ``flags`` are READ, WRITE, EXEC, SHARED. ``dev`` (as st_dev), ``ino`` and ``offset`` (bytes) are those of the file,
    0 without one. ``kind`` is one of those in :mod:`iommufd.memory.kinds`. Never changed after construction.
    """

    __slots__ = ("dev", "end", "flags", "ino", "kind", "name", "offset", "page_size", "start")

    def __init__(
        self,
        start: int,
        end: int,
        flags: int,
        *,
        kind: str = "anon",
        dev: int = 0,
        ino: int = 0,
        offset: int = 0,
        name: str = "",
        page_size: int = PAGE_SIZE,
    ) -> None:
        self.start = start
        self.end = end
        self.flags = flags
        self.kind = kind
        self.dev = dev
        self.ino = ino
        self.offset = offset
        self.name = name
        self.page_size = page_size

    def __repr__(self) -> str:
        letters = "".join(c if self.flags & bit else "-" for c, bit in (("r", READ), ("w", WRITE), ("x", EXEC)))
        shared = "s" if self.flags & SHARED else "p"
        return f"{self.start:#x}-{self.end:#x} {letters}{shared} {self.kind} {self.name}".rstrip()

    @property
    def file_key(self) -> FileKey:
        """What names the file behind a shared mapping."""
        return self.dev, self.ino, self.name if self.name.startswith("/SYSV") else ""

    @property
    def order(self) -> int:
        """Pages of one block are ``1 << order``: 0, or 9 for 2 MiB huge pages."""
        return self.page_size.bit_length() - 1 - PAGE_SHIFT


class Host(Protocol):
    """The process behind an AddressSpace. Methods may be called by several threads at once."""

    def query(self, va: int) -> Vma | None:
        """The VMA that contains ``va``, else the next above it; None when there is none. ProcessLookupError when the
        address space is gone (exit or exec)."""
        ...

    def read(self, va: int, count: int) -> bytes:
        """The leading bytes of ``[va, va + count)`` that can be read under the page protections, perhaps none."""
        ...

    def write(self, va: int, data: bytes | bytearray | memoryview) -> int:
        """Writes the leading bytes that can be written under the page protections; how many."""
        ...

    def peek(self, va: int, count: int) -> bytes:
        """As ``read``, whatever the protections are: what a device sees."""
        ...

    def poke(self, va: int, data: bytes | bytearray | memoryview) -> int:
        """As ``write``, whatever the protections are."""
        ...

    def touched(self, va: int, end: int) -> list[tuple[int, int]]:
        """The parts ``(start, end)`` of ``[va, end)`` that may hold something else than zeroes."""
        ...

    def open_file(self, vma: Vma) -> int | None:
        """A new descriptor of the file (``vma.dev``, ``vma.ino``), or None when the process has none to offer."""
        ...

    def exec_coming(self) -> None:
        """An exec is about to be tried; what copies by process number must stop doing so."""
        ...

    def mlocked_pages(self) -> int:
        """Pages the process itself has locked (mlock)."""
        ...

    def alive(self) -> bool:
        """False once the address space has been given up by exit or exec."""
        ...

    def close(self) -> None:
        """Nothing is asked any more."""
        ...


def check_pin(vma: Vma, va: int, write: bool, long_term: bool) -> None:
    """Whether a page of ``vma`` may be pinned (``long_term``) or faulted in (core 5.5); KernelError(EFAULT) if not."""
    if vma.kind == "special":
        raise KernelError(errno.EFAULT, f"address {va:#x} lies in a mapping without pages to pin, {vma!r}")
    if write:
        if not vma.flags & WRITE:
            raise KernelError(errno.EFAULT, f"address {va:#x} is to be written and lies in {vma!r}")
        if long_term and vma.flags & SHARED and vma.kind == "other":
            raise KernelError(
                errno.EFAULT, f"address {va:#x} is to be written by a device and lies in a shared file mapping, {vma!r}"
            )
    elif not vma.flags & READ:
        raise KernelError(errno.EFAULT, f"address {va:#x} is to be read and lies in {vma!r}")
