"""What kind of file is behind a descriptor or a mapping, as far as pinning cares.

Kinds: 'anon' (no file), 'shmem' (tmpfs, memfd, shared anonymous, SysV), 'hugetlbfs', 'ramfs', 'other' (a file system
that tracks dirty pages), 'special' (VM_IO, VM_PFNMAP or secretmem: cannot be pinned). A device number says it for
ordinary file systems; only mappings of devices and of file systems without files in memory need a look into smaps.
"""

from __future__ import annotations

import ctypes
import os
import stat

from iommufd.memory.frames import PAGE_SHIFT

TMPFS_MAGIC, HUGETLBFS_MAGIC, RAMFS_MAGIC, DMA_BUF_MAGIC = 0x01021994, 0x958458F6, 0x858458F6, 0x444D4142

_BY_TYPE = {"tmpfs": "shmem", "hugetlbfs": "hugetlbfs", "ramfs": "ramfs", "rootfs": "ramfs"}
# Mounted file systems whose mappings may be device memory.
_ODD_TYPES = frozenset({"devtmpfs", "sysfs", "proc", "debugfs", "tracefs", "cgroup", "cgroup2", "bpf", "configfs"})
_SPECIAL_NAMES = ("[vvar", "[vsyscall", "/secretmem")

_libc = ctypes.CDLL(None)
_libc.fstatfs.argtypes = [ctypes.c_int, ctypes.c_void_p]


def file_kind(fd: int) -> tuple[str, int]:
    """The kind of the file behind ``fd`` ('shmem', 'hugetlbfs', 'ramfs', 'dmabuf' or 'other'), the order of its
    pages."""
    buffer = bytearray(256)  # not a ctypes array: each length would be a type, and types are cyclic garbage
    if _libc.fstatfs(fd, ctypes.addressof(ctypes.c_char.from_buffer(buffer))):
        return "other", 0
    magic, block = (int.from_bytes(buffer[at : at + 8], "little") for at in (0, 8))  # f_type, f_bsize
    if magic != DMA_BUF_MAGIC and not stat.S_ISREG(os.fstat(fd).st_mode):
        return "other", 0  # a device node or a folder
    if magic == HUGETLBFS_MAGIC:
        return "hugetlbfs", block.bit_length() - 1 - PAGE_SHIFT
    return {TMPFS_MAGIC: "shmem", RAMFS_MAGIC: "ramfs", DMA_BUF_MAGIC: "dmabuf"}.get(magic, "other"), 0


def internal_shmem_device() -> int:
    """st_dev of the kernel's own tmpfs mount, where memfds, shared anonymous memory and SysV segments live."""
    fd = os.memfd_create("device", os.MFD_CLOEXEC)
    try:
        return os.fstat(fd).st_dev
    finally:
        os.close(fd)


class Kinds:
    """Kinds of mappings of process ``pid``; remembers device numbers."""

    __slots__ = ("_devices", "_pid")

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._devices: dict[int, str] = {}

    def of(self, start: int, end: int, dev: int, ino: int, name: str, page_size: int) -> str:
        """The kind of the mapping ``[start, end)`` of file (``dev``, ``ino``), called ``name`` in /proc/PID/maps."""
        if page_size > 1 << PAGE_SHIFT:
            return "hugetlbfs"
        if name.startswith(_SPECIAL_NAMES):
            return "special"
        if not ino and not dev:
            return "anon"
        kind = self._devices.get(dev)
        if kind is None:
            kind = self._look_up(dev)
        if kind == "odd":
            flags = _of_smaps(self._pid, start, end, "VmFlags:")
            if "io" in flags or "pf" in flags:
                return "special"
            return "ramfs"  # nothing here is ever written back
        return kind

    def _look_up(self, dev: int) -> str:
        devices = self._devices
        devices[internal_shmem_device()] = "shmem"
        try:
            with open(f"/proc/{self._pid}/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
                for line in mounts:
                    fields, _, rest = line.partition(" - ")
                    major, _, minor = fields.split()[2].partition(":")
                    kind = rest.split()[0]
                    number = os.makedev(int(major), int(minor))
                    devices[number] = "odd" if kind in _ODD_TYPES else _BY_TYPE.get(kind, "other")
        except OSError:  # closed to us: as if nothing were mounted
            pass
        # Not mounted here: a disk of another mount namespace, or an internal mount (anonymous inodes, DRM, dma-buf).
        return devices.setdefault(dev, "other" if os.major(dev) else "odd")


def _of_smaps(pid: int, start: int, end: int, key: str) -> list[str]:
    """The words that /proc/PID/smaps has under ``key`` for one mapping; none when it is gone or closed to us."""
    header = f"{start:08x}-{end:08x} "
    try:
        with open(f"/proc/{pid}/smaps", encoding="utf-8", errors="surrogateescape") as lines:
            for line in lines:
                if line.startswith(header):
                    break
            for line in lines:
                if line.startswith(key):
                    return line.split()[1:]
    except OSError:  # as if it were not there
        pass
    return []


def kernel_page_size(pid: int, start: int, end: int) -> int:
    """The page size of a mapping from smaps, for kernels without PROCMAP_QUERY."""
    words = _of_smaps(pid, start, end, "KernelPageSize:")
    return int(words[0]) << 10 if words else 1 << PAGE_SHIFT
