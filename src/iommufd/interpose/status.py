"""What ``stat`` and ``statx`` say of our files, as bytes (kernel: struct stat of each architecture, struct statx).

Devices look as in devtmpfs, files without a path as the host's own anonymous inode looks.
"""

from __future__ import annotations

import os
import stat
import struct
import time
from dataclasses import dataclass

from iommufd.interpose.syscalls import HOST

# dev ino nlink mode uid gid pad rdev size blksize blocks, three times, unused
_X86_64 = struct.Struct("=QQQIIIIQqqqqQqQqQ24x")
# dev ino mode nlink uid gid rdev pad size blksize pad blocks, three times, unused
_AARCH64 = struct.Struct("=QQIIIIQQqiiqqQqQqQ8x")

# mask blksize attributes nlink uid gid mode ino size blocks attributes_mask, four times, rdev, dev, mnt_id, spare
_STATX = struct.Struct("=IIQIIIH2xQQQQ qI4x qI4x qI4x qI4x IIII Q104x")
STATX_BASIC_STATS = 0x7FF
BLOCK_SIZE = 4096


@dataclass(frozen=True, slots=True)
class Status:
    """The interesting fields; times are the machine's start, owner and group root's unless said."""

    mode: int
    dev: int
    ino: int
    rdev: int = 0
    nlink: int = 1
    size: int = 0
    uid: int = 0
    gid: int = 0
    seconds: int = 0


_START = int(time.time())
_DEVICE_FS = os.stat("/dev").st_dev


def of_node(path: str, mode: int, rdev: tuple[int, int], size: int = 0) -> Status:
    """A node of the machine at ``path``; its inode number is made from the path, so it stays the same."""
    inode = 2**31
    for byte in os.fsencode(path):
        inode = (inode * 31 + byte) % 2**31
    return Status(
        mode,
        _DEVICE_FS,
        inode + 2**31,
        os.makedev(*rdev),
        nlink=2 if stat.S_ISDIR(mode) else 1,
        size=size,
        seconds=_START,
    )


def of_host(path: str, no_follow: bool = False) -> Status | None:
    """A file of the host at an absolute path, its links left out of sight; None when there is none."""
    try:
        real = os.stat(path, follow_symlinks=not no_follow)
    except OSError:
        return None
    return Status(
        *(real.st_mode, real.st_dev, real.st_ino, real.st_rdev, real.st_nlink, real.st_size, real.st_uid, real.st_gid),
        seconds=int(real.st_mtime),
    )


def of_anonymous(inode_holder: int, size: int = 0) -> Status:
    """A file without a path: ``inode_holder`` is any descriptor of ours on the anonymous inode, say an inotify."""
    real = os.fstat(inode_holder)
    return Status(real.st_mode, real.st_dev, real.st_ino, size=size, seconds=_START)


def pack_stat(s: Status, arch: str = HOST.name) -> bytes:
    """struct stat of the architecture: 144 bytes on x86-64, 128 on aarch64."""
    times = (s.seconds, 0) * 3
    if arch == "aarch64":
        return _AARCH64.pack(s.dev, s.ino, s.mode, s.nlink, s.uid, s.gid, s.rdev, 0, s.size, BLOCK_SIZE, 0, 0, *times)
    return _X86_64.pack(s.dev, s.ino, s.nlink, s.mode, s.uid, s.gid, 0, s.rdev, s.size, BLOCK_SIZE, 0, *times)


def pack_statx(s: Status) -> bytes:
    """struct statx, 256 bytes, with the basic fields and no birth time."""
    now = (s.seconds, 0)
    return _STATX.pack(
        STATX_BASIC_STATS, BLOCK_SIZE, 0, s.nlink, s.uid, s.gid, s.mode, s.ino, s.size, 0, 0,
        *now, 0, 0, *now, *now,
        os.major(s.rdev), os.minor(s.rdev), os.major(s.dev), os.minor(s.dev), 0,
    )  # fmt: skip


def allows(mode: int, wanted: int, uid: int) -> bool:
    """Whether a root-owned file of this mode lets ``uid`` do ``wanted`` (4 read, 2 write, 1 execute, summed)."""
    if uid == 0:
        return not wanted & 1 or bool(mode & 0o111) or stat.S_ISDIR(mode)
    return mode & 7 & wanted == wanted
