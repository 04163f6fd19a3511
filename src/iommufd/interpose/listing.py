"""Listing: reading a directory in which entries of ours and of the host stand together (kernel: struct
linux_dirent64)."""

from __future__ import annotations

import errno
import os
import struct

from iommufd.errors import KernelError

_HEAD = struct.Struct("=QqHB")  # d_ino, d_off, d_reclen, d_type; then the name, NUL, up to a multiple of 8
_OLD_HEAD = struct.Struct("=QQH")  # the record of getdents: the type stands in its last byte
SEEK_SET, SEEK_CUR = 0, 1


class Listing:
    """One descriptor's way through a directory: a snapshot taken at the start, an index as position."""

    __slots__ = ("_entries", "path", "position")

    def __init__(self, path: str, entries: list[tuple[str, int, int]]) -> None:
        self.path = path
        self.position = 0
        dots = [(".", 1, 4), ("..", 1, 4)]
        self._entries = [(os.fsencode(name), inode, kind) for name, inode, kind in [*dots, *entries]]

    def read(self, room: int, *, old: bool = False) -> bytes:
        """The next records that fit into ``room`` bytes, b"" at the end; KernelError EINVAL when not one fits."""
        out = bytearray()
        while self.position < len(self._entries):
            name, inode, kind = self._entries[self.position]
            record = self._record(name, inode, kind, old)
            if len(out) + len(record) > room:
                if not out:
                    raise KernelError(errno.EINVAL, f"no record fits into {room} bytes")
                break
            out += record
            self.position += 1
        return bytes(out)

    def _record(self, name: bytes, inode: int, kind: int, old: bool) -> bytes:
        following = self.position + 1
        if old:
            size = -(-(_OLD_HEAD.size + len(name) + 2) // 8) * 8
            body = _OLD_HEAD.pack(inode, following, size) + name
            return body + bytes(size - len(body) - 1) + bytes((kind,))
        size = -(-(_HEAD.size + len(name) + 1) // 8) * 8
        body = _HEAD.pack(inode, following, size, kind) + name
        return body + bytes(size - len(body))

    def seek(self, offset: int, whence: int) -> int:
        """lseek: positions are indexes, as d_off told them."""
        if whence not in (SEEK_SET, SEEK_CUR):
            raise KernelError(errno.EINVAL, f"a directory cannot be sought with whence {whence}")
        target = offset + (self.position if whence == SEEK_CUR else 0)
        if target < 0:
            raise KernelError(errno.EINVAL, f"position {target} is negative")
        self.position = target
        return target
