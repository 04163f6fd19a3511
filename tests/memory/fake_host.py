"""A process made of VMAs and bytes, for AddressSpace: every kind of mapping, none of it real."""

from __future__ import annotations

import errno
import os
from typing import Any

from iommufd.memory.frames import PAGE_SIZE
from iommufd.memory.vma import READ, SHARED, WRITE, Vma

P = PAGE_SIZE


class FakeHost:
    """See iommufd.memory.vma.Host. ``files`` are descriptors by inode; ``sizes`` how long a file is, by inode.

    Shared mappings of one inode in several hosts share ``contents`` by inode; private memory is per host."""

    shared: dict[int, bytearray]

    def __init__(self, shared: dict[int, bytearray] | None = None) -> None:
        self.vmas: list[Vma] = []
        self.private: dict[int, bytearray] = {}  # page number -> bytes
        self.shared = {} if shared is None else shared
        self.files: dict[int, int] = {}
        self.sizes: dict[int, int] = {}
        self.peeks = 0
        self.dead = False
        self.locked = 0

    def map(self, start: int, npages: int, flags: int = READ | WRITE, **more: Any) -> Vma:  # Any: more of Vma
        self.forget(start, npages)
        vma = Vma(start, start + npages * P, flags, **more)
        self.vmas = sorted([*self.vmas, vma], key=lambda v: v.start)
        return vma

    def share(self, start: int, npages: int, ino: int, *, offset: int = 0, flags: int = READ | WRITE) -> Vma:
        size = self.sizes.setdefault(ino, 1 << 20)
        self.shared.setdefault(ino, bytearray(size))
        return self.map(start, npages, flags | SHARED, kind="shmem", dev=1, ino=ino, offset=offset)

    def forget(self, start: int, npages: int) -> None:
        """What munmap does."""
        end = start + npages * P
        kept: list[Vma] = []
        for vma in self.vmas:
            for low, high in ((vma.start, min(vma.end, start)), (max(vma.start, end), vma.end)):
                if low < high:
                    offset = vma.offset + low - vma.start
                    kept.append(
                        Vma(
                            low,
                            high,
                            vma.flags,
                            kind=vma.kind,
                            dev=vma.dev,
                            ino=vma.ino,
                            offset=offset,
                            name=vma.name,
                            page_size=vma.page_size,
                        )
                    )
        self.vmas = sorted(kept, key=lambda v: v.start)
        self.private = {page: data for page, data in self.private.items() if not start <= page * P < end}

    def query(self, va: int) -> Vma | None:
        if self.dead:
            raise ProcessLookupError(errno.ESRCH, "gone")
        return next((vma for vma in self.vmas if vma.end > va), None)

    def _page(self, va: int) -> tuple[bytearray, int] | None:
        vma = self.query(va)
        if vma is None or vma.start > va:
            return None
        if vma.flags & SHARED:
            at = vma.offset + va - vma.start
            return (self.shared[vma.ino], at) if at < self.sizes[vma.ino] else None
        if vma.ino and vma.ino in self.sizes and vma.offset + va - vma.start >= self.sizes[vma.ino]:
            return None
        return self.private.setdefault(va // P, bytearray(P)), va % P

    def peek(self, va: int, count: int) -> bytes:
        self.peeks += 1
        out = b""
        while count and not self.dead:
            found = self._page(va)
            if found is None:
                break
            n = min(count, P - va % P)
            out += bytes(found[0][found[1] : found[1] + n])
            va, count = va + n, count - n
        return out

    def poke(self, va: int, data: bytes | bytearray | memoryview) -> int:
        done = 0
        while done < len(data) and not self.dead:
            found = self._page(va + done)
            if found is None:
                break
            n = min(len(data) - done, P - (va + done) % P)
            found[0][found[1] : found[1] + n] = data[done : done + n]
            done += n
        return done

    def _allowed(self, va: int, count: int, need: int) -> int:
        at = va
        while at < va + count:
            vma = self.query(at)
            if vma is None or vma.start > at or not vma.flags & need:
                break
            at = min(vma.end, va + count)
        return at - va

    def read(self, va: int, count: int) -> bytes:
        return self.peek(va, self._allowed(va, count, READ))

    def write(self, va: int, data: bytes | bytearray | memoryview) -> int:
        return self.poke(va, data[: self._allowed(va, len(data), WRITE)])

    def touched(self, va: int, end: int) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        for vma in self.vmas:
            low, high = max(va, vma.start), min(end, vma.end)
            if low >= high:
                continue
            if vma.ino:
                found.append((low, high))
            else:
                found += [(p * P, p * P + P) for p in sorted(self.private) if low <= p * P < high]
        return found

    def open_file(self, vma: Vma) -> int | None:
        fd = self.files.get(vma.ino)
        return None if fd is None else os.dup(fd)

    def mlocked_pages(self) -> int:
        return self.locked

    def alive(self) -> bool:
        return not self.dead

    def exec_coming(self) -> None:
        pass

    def close(self) -> None:
        self.dead = True
