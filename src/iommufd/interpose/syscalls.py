"""System call numbers as data, for the architectures the interposer knows.

One table a machine, names as in the kernel's own tables. A name missing from a table does not exist there (aarch64 has
only the ``*at`` forms). Only the calls a filter or a handler mentions are listed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

AUDIT_ARCH_X86_64 = 0xC000003E
AUDIT_ARCH_AARCH64 = 0xC00000B7


@dataclass(frozen=True, slots=True)
class Arch:
    """One system call ABI: ``token`` is seccomp_data.arch, ``numbers`` the call numbers by name."""

    name: str
    token: int
    numbers: dict[str, int]


X86_64 = Arch(
    "x86_64",
    AUDIT_ARCH_X86_64,
    {
        "read": 0, "write": 1, "open": 2, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "lseek": 8, "mmap": 9,
        "munmap": 11, "brk": 12, "ioctl": 16, "pread64": 17, "pwrite64": 18, "readv": 19, "writev": 20, "access": 21,
        "mremap": 25, "madvise": 28, "shmat": 30, "dup": 32, "dup2": 33, "sendfile": 40, "execve": 59, "exit": 60,
        "shmdt": 67, "fcntl": 72, "fsync": 74, "fdatasync": 75, "ftruncate": 77, "getdents": 78, "creat": 85,
        "readlink": 89, "fchmod": 91, "fchown": 93, "setuid": 105, "setreuid": 113, "setresuid": 117, "setfsuid": 122,
        "capset": 126, "pivot_root": 155, "chroot": 161, "readahead": 187, "getxattr": 191, "lgetxattr": 192,
        "listxattr": 194, "llistxattr": 195, "getdents64": 217, "fadvise64": 221, "exit_group": 231, "openat": 257,
        "newfstatat": 262, "readlinkat": 267, "faccessat": 269, "unshare": 272, "splice": 275, "sync_file_range": 277,
        "fallocate": 285, "dup3": 292, "preadv": 295, "pwritev": 296, "setns": 308, "kcmp": 312, "seccomp": 317,
        "execveat": 322, "copy_file_range": 326, "preadv2": 327, "pwritev2": 328, "statx": 332, "pidfd_open": 434,
        "close_range": 436, "openat2": 437, "pidfd_getfd": 438, "faccessat2": 439, "process_madvise": 440,
    },
)  # fmt: skip

AARCH64 = Arch(
    "aarch64",
    AUDIT_ARCH_AARCH64,
    {
        "getxattr": 8, "lgetxattr": 9, "listxattr": 11, "llistxattr": 12, "dup": 23, "dup3": 24, "fcntl": 25,
        "ioctl": 29, "pivot_root": 41, "ftruncate": 46, "fallocate": 47, "faccessat": 48, "chroot": 51, "fchmod": 52,
        "fchown": 55, "openat": 56, "close": 57, "getdents64": 61, "lseek": 62, "read": 63, "write": 64, "readv": 65,
        "writev": 66, "pread64": 67, "pwrite64": 68, "preadv": 69, "pwritev": 70, "sendfile": 71, "splice": 76,
        "readlinkat": 78, "newfstatat": 79, "fstat": 80, "fsync": 82, "fdatasync": 83, "sync_file_range": 84,
        "capset": 91, "exit": 93, "exit_group": 94, "unshare": 97, "setreuid": 145, "setuid": 146, "setresuid": 147,
        "setfsuid": 151, "shmat": 196, "shmdt": 197, "readahead": 213, "brk": 214, "munmap": 215, "mremap": 216,
        "execve": 221, "mmap": 222, "fadvise64": 223, "madvise": 233, "setns": 268, "kcmp": 272, "seccomp": 277,
        "execveat": 281, "copy_file_range": 285, "preadv2": 286, "pwritev2": 287, "statx": 291, "pidfd_open": 434,
        "close_range": 436, "openat2": 437, "pidfd_getfd": 438, "faccessat2": 439, "process_madvise": 440,
    },
)  # fmt: skip

ARCHES: dict[str, Arch] = {arch.name: arch for arch in (X86_64, AARCH64)}


def host_arch() -> Arch | None:
    """The table of the machine we run on, None when it is not one we know."""
    return ARCHES.get(os.uname().machine)


HOST: Arch = host_arch() or X86_64


def name_of(nr: int) -> str:
    """The system call with that number, the number itself where we know none."""
    return next((name for name, value in HOST.numbers.items() if value == nr), str(nr))
