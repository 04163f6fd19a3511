"""Which system call is answered by whom: one table, built once a supervisor.

Invariants: every call the filter traps has a row, or proceeds as if it had not been trapped; names a host does not have
are left out. A call on a path and one on a descriptor may be the same call (fstat by path is newfstatat).
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from iommufd.interpose.credentials import Credentials
from iommufd.interpose.filecalls import FileCalls
from iommufd.interpose.pathcalls import PathCalls
from iommufd.interpose.syscalls import HOST
from iommufd.interpose.trap import PROCEED, Trap

if TYPE_CHECKING:
    from iommufd.engine.file import Pending
    from iommufd.interpose.trap import Answered, Proceed
    from iommufd.interpose.unmaps import Unmaps

Handler = Callable[[Trap], "int | Pending | Proceed | Answered"]

FILE_CALLS = (
    "ioctl", "read", "write", "pread64", "pwrite64", "readv", "writev", "preadv", "pwritev", "preadv2", "pwritev2",
    "lseek", "close", "close_range", "dup", "dup2", "fcntl", "getdents", "getdents64",
)  # fmt: skip
PATH_CALLS = (
    "open", "creat", "openat", "openat2", "stat", "lstat", "fstat", "newfstatat", "statx", "access", "faccessat",
    "faccessat2", "readlink", "readlinkat", "getxattr", "lgetxattr", "listxattr", "llistxattr",
)  # fmt: skip


def handlers(files: FileCalls, paths: PathCalls, others: Credentials, unmaps: Unmaps) -> dict[int, Handler]:
    """The table, by system call number of this host."""

    def mmap(trap: Trap) -> int | Pending | Proceed | Answered:
        result = files.mmap(trap)
        return unmaps.mmap(trap) if result is PROCEED else result

    table: dict[str, Handler] = {
        "mmap": mmap,
        "ftruncate": files.refuse(errno.EINVAL, "this file has no length"),
        "fallocate": files.refuse(errno.ENODEV, "this file has no blocks"),
        "fsync": files.refuse(errno.EINVAL, "this file cannot be synchronised"),
        "fdatasync": files.refuse(errno.EINVAL, "this file cannot be synchronised"),
        "readahead": files.refuse(errno.EINVAL, "this file cannot be read ahead"),
        "sync_file_range": files.refuse(errno.ESPIPE, "this file has no ranges"),
        "fadvise64": files.accept,
        "fchmod": files.change_owner_or_mode,
        "fchown": files.change_owner_or_mode,
        "sendfile": files.splice(1),
        "splice": files.splice(2),
        "copy_file_range": files.splice(2),
        "dup3": files.dup2,
        "unshare": others.unshare,
        "setns": others.namespaces,
        "chroot": others.root,
        "pivot_root": others.root,
        **dict.fromkeys(("setuid", "setreuid", "setresuid", "setfsuid", "capset"), others.credentials),
    }
    for owner, names in (
        (files, FILE_CALLS),
        (paths, PATH_CALLS),
        (unmaps, ("munmap", "mremap", "madvise", "process_madvise", "brk", "shmat", "shmdt")),
        (unmaps, ("execve", "execveat", "exit_group")),
    ):
        for name in names:
            table[name] = getattr(owner, name)
    return {HOST.numbers[name]: handler for name, handler in table.items() if name in HOST.numbers}
