"""The system calls that name a path (kernel: fs/open.c, fs/stat.c, fs/readlink.c as a program sees them).

A call whose path cannot be read, or leads to nothing of ours, proceeds natively. Errors are the kernel's, in its order.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from iommufd.engine.file import File
from iommufd.errors import KernelError
from iommufd.interpose import status
from iommufd.interpose.caller import memory_of
from iommufd.interpose.paths import AT_FDCWD, Place, Resolver
from iommufd.interpose.status import Status
from iommufd.interpose.trap import ANSWERED, PROCEED, Trap, fd_of, signed32

if TYPE_CHECKING:
    from iommufd.engine.task import Task
    from iommufd.interpose.carriers import Carrier, Carriers
    from iommufd.interpose.descriptors import Descriptors
    from iommufd.interpose.processes import Processes, Thread
    from iommufd.interpose.trap import Answered, Proceed
    from iommufd.machine.machine import Machine
    from iommufd.machine.node import Node

_Packer = Callable[[Status], bytes]

AT_SYMLINK_NOFOLLOW, AT_EMPTY_PATH, AT_EACCESS = 0x100, 0x1000, 0x200
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_FLAGS = 0x3F
OPEN_HOW_SIZE = 24
O_LARGEFILE = 0o400000 if os.uname().machine == "aarch64" else 0o100000
OPEN_FLAGS = (
    os.O_ACCMODE | os.O_CREAT | os.O_EXCL | os.O_NOCTTY | os.O_TRUNC | os.O_APPEND | os.O_NONBLOCK | os.O_SYNC
    | os.O_DSYNC | os.O_ASYNC | os.O_DIRECT | O_LARGEFILE | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NOATIME | os.O_CLOEXEC
    | os.O_PATH | os.O_TMPFILE
)  # fmt: skip


class PathOnly(File):
    """A file opened with O_PATH: it can be looked at and nothing else."""

    def __init__(self, link: str) -> None:
        super().__init__()
        self.link = link
        self.mode = 0

    def ioctl(self, task: Task, cmd: int, arg: int) -> int:
        raise KernelError(errno.EBADF, "the descriptor was opened with O_PATH")


def unguarded(node: Node) -> bool:
    """The machine's switches (fault injection, attributes that are written) are root's, and everybody is root there."""
    return node.opener is not None and stat.S_ISREG(node.mode)


class PathCalls:
    """Handlers of the path calls; each returns an answer or raises KernelError."""

    def __init__(
        self,
        machine: Machine,
        processes: Processes,
        descriptors: Descriptors,
        carriers: Carriers,
        resolver: Resolver,
    ) -> None:
        self._machine = machine
        self._world = machine.world
        self._processes = processes
        self._descriptors = descriptors
        self._carriers = carriers
        self.resolver = resolver

    # ---- shared

    def _place(self, trap: Trap, dirfd: int, addr: int, follow: bool, *, listing: bool = False) -> Place | None:
        """Where the path at ``addr`` leads, None to proceed."""
        try:
            path = memory_of(trap.tid).read_string(addr)
        except KernelError:
            return None
        dirfd = fd_of(dirfd)
        if not path or not self.resolver.maybe_ours(trap.tid, dirfd, path, listing=listing):
            return None
        try:
            return self.resolver.resolve(trap.tid, self._processes.tgid_of(trap.tid), dirfd, path, follow)
        except OSError:
            return None

    def _not_directory(self, place: Place) -> None:
        if place.not_directory:
            raise KernelError(errno.ENOTDIR, f"{place.path} is not a directory")

    # ---- open

    def open(self, trap: Trap) -> int | Proceed | Answered:
        return self._open(trap, AT_FDCWD, trap.args[0], trap.args[1], 0)

    def creat(self, trap: Trap) -> int | Proceed | Answered:
        return self._open(trap, AT_FDCWD, trap.args[0], os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0)

    def openat(self, trap: Trap) -> int | Proceed | Answered:
        return self._open(trap, trap.args[0], trap.args[1], trap.args[2], 0)

    def openat2(self, trap: Trap) -> int | Proceed | Answered:
        how = memory_of(trap.tid).read_upto(trap.args[2], OPEN_HOW_SIZE)
        if trap.args[3] < OPEN_HOW_SIZE or len(how) < OPEN_HOW_SIZE:
            return PROCEED
        flags, mode, resolve = (int.from_bytes(how[at : at + 8], "little") for at in (0, 8, 16))
        if flags & ~OPEN_FLAGS or mode & ~0o7777 or (mode and not flags & os.O_CREAT) or resolve & ~RESOLVE_FLAGS:
            return PROCEED  # the kernel refuses these before it looks at the path
        return self._open(trap, trap.args[0], trap.args[1], flags, resolve)

    def _open(self, trap: Trap, dirfd: int, addr: int, flags: int, resolve: int) -> int | Proceed | Answered:
        follow = not flags & os.O_NOFOLLOW and not (flags & os.O_CREAT and flags & os.O_EXCL)
        place = self._place(trap, dirfd, addr, follow, listing=bool(flags & os.O_DIRECTORY))
        if place is None:
            return PROCEED
        if place.status_of is not None and place.node is None:
            return self._open_status(trap, place.status_of, flags)
        if place.node is None and not place.directory and not place.union and place.carrier is None:
            return PROCEED
        if resolve & RESOLVE_NO_SYMLINKS and place.linked:
            raise KernelError(errno.ELOOP, "the path has a symbolic link and RESOLVE_NO_SYMLINKS")
        if place.carrier is not None:
            self._not_directory(place)
            if not follow:
                return PROCEED
            return self._reopen(trap, place.carrier, flags)
        if flags & os.O_CREAT and flags & os.O_EXCL and not place.union:
            raise KernelError(errno.EEXIST, f"{place.path} exists")
        if place.directory or place.union:
            return self._open_directory(trap, place, flags)
        assert place.node is not None
        self._not_directory(place)
        if stat.S_ISLNK(place.node.mode):
            raise KernelError(errno.ELOOP, f"{place.path} is a symbolic link")
        return self._open_node(trap, place.node, flags)

    def _open_node(self, trap: Trap, node: Node, flags: int) -> int | Proceed | Answered:
        began = time.perf_counter()
        try:
            return self._try_open_node(trap, node, flags, began)
        except KernelError as error:
            self._tell_open(trap, node, flags, None, -1, error, began)
            raise

    def _tell_open(
        self, trap: Trap, node: Node, flags: int, file: File | None, fd: int, error: KernelError | None, began: float
    ) -> None:
        if self._world.instruments:
            fields: dict[str, object] = {"path": node.path, "flags": flags, "file": file, "result": fd, "error": error}
            us = (time.perf_counter() - began) * 1e6
            self._world.event("open", task=self._processes.thread(trap.tid).task, us=us, **fields)

    def _try_open_node(self, trap: Trap, node: Node, flags: int, began: float) -> int | Proceed | Answered:
        thread = self._processes.thread(trap.tid)
        task = thread.task
        task.notification = trap.number
        cloexec = bool(flags & os.O_CLOEXEC)
        path = node.path
        if flags & os.O_DIRECTORY:
            raise KernelError(errno.ENOTDIR, f"{path} is not a directory")
        if flags & os.O_PATH:
            self._descriptors.give(task, self._carriers.make(PathOnly(path), path, os.O_PATH), cloexec)
            return ANSWERED
        wanted = (4, 2, 6, 6)[flags & os.O_ACCMODE]
        if not status.allows(node.mode, wanted, 0 if unguarded(node) else thread.effective_uid()):
            raise KernelError(errno.EACCES, f"{path} has mode {stat.S_IMODE(node.mode):o}")
        if node.opener is None:
            return self._open_text(trap, thread, node, flags)
        file = self._machine.open(path, task, flags)
        if file is None:
            raise KernelError(errno.ENXIO, f"{path} cannot be opened any more")
        fd = self._descriptors.give(task, self._carriers.make(file, path, flags), cloexec)
        self._tell_open(trap, node, flags, file, fd, None, began)
        return ANSWERED

    def _open_text(self, trap: Trap, thread: Thread, node: Node, flags: int) -> Answered:
        if flags & os.O_ACCMODE:
            raise KernelError(errno.EACCES, f"{node.path} is not to be written")
        source = os.open(self._machine.tree.real(node.path), os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._descriptors.give_source(thread.task, source, bool(flags & os.O_CLOEXEC), 0, low=True)
        finally:
            os.close(source)
        return ANSWERED

    def _reopen(self, trap: Trap, carrier: Carrier, flags: int) -> int | Proceed | Answered:
        """An open of /proc/PID/fd/N: a device is opened anew, a file without a path cannot be."""
        node = self._machine.node(carrier.path) if carrier.path else None
        if node is None:
            raise KernelError(errno.ENXIO, f"{carrier.file.link} cannot be opened again")
        return self._open_node(trap, node, flags)

    def _open_directory(self, trap: Trap, place: Place, flags: int) -> int | Proceed | Answered:
        if flags & os.O_ACCMODE or flags & os.O_CREAT:
            if place.union:
                return PROCEED
            raise KernelError(errno.EISDIR, f"{place.path} is a directory")
        thread = self._processes.thread(trap.tid)
        thread.task.notification = trap.number
        real = place.path if place.union else self._machine.tree.real(place.path)
        try:
            source = os.open(real, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return PROCEED
        try:
            self._descriptors.give_source(thread.task, source, bool(flags & os.O_CLOEXEC), 0)
        finally:
            os.close(source)
        return ANSWERED

    def _open_status(self, trap: Trap, tgid: int, flags: int) -> Proceed | Answered:
        """/proc/PID/status with VmPin and VmLck as the machine has charged them, where that is not zero."""
        group = self._processes.groups.get(tgid)
        space = group.space if group is not None else None
        if space is None or flags & os.O_ACCMODE or flags & os.O_PATH or not (space.pinned_vm or space.locked_vm):
            return PROCEED
        try:
            with open(f"/proc/{tgid}/status", "rb") as real:
                text = add_pinned(real.read(), space.pinned_vm, space.locked_vm)
        except OSError:
            return PROCEED
        thread = self._processes.thread(trap.tid)
        thread.task.notification = trap.number
        memory = os.memfd_create("status", os.MFD_CLOEXEC)
        try:
            os.write(memory, text)
            source = os.open(f"/proc/self/fd/{memory}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                self._descriptors.give_source(thread.task, source, bool(flags & os.O_CLOEXEC), 0, low=True)
            finally:
                os.close(source)
        finally:
            os.close(memory)
        return ANSWERED

    # ---- stat

    def stat(self, trap: Trap) -> int | Proceed:
        return self._stat(trap, AT_FDCWD, trap.args[0], 0, trap.args[1], status.pack_stat)

    def lstat(self, trap: Trap) -> int | Proceed:
        return self._stat(trap, AT_FDCWD, trap.args[0], AT_SYMLINK_NOFOLLOW, trap.args[1], status.pack_stat)

    def newfstatat(self, trap: Trap) -> int | Proceed:
        dirfd, addr, buffer, flags = trap.args[:4]
        return self._stat(trap, dirfd, addr, flags, buffer, status.pack_stat)

    def statx(self, trap: Trap) -> int | Proceed:
        dirfd, addr, flags, _, buffer = trap.args[:5]
        return self._stat(trap, dirfd, addr, flags, buffer, status.pack_statx)

    def fstat(self, trap: Trap) -> int | Proceed:
        return self._stat_fd(trap, fd_of(trap.args[0]), trap.args[1], status.pack_stat)

    def _stat(self, trap: Trap, dirfd: int, addr: int, flags: int, buffer: int, pack: _Packer) -> int | Proceed:
        place = self._place(trap, dirfd, addr, not flags & AT_SYMLINK_NOFOLLOW)
        if place is None:
            if flags & AT_EMPTY_PATH and self._path_is_empty(trap, addr):
                return self._stat_fd(trap, fd_of(dirfd), buffer, pack)
            return PROCEED
        found = self._status_of(place, bool(flags & AT_SYMLINK_NOFOLLOW))
        if found is None:
            return PROCEED
        return self._write_status(trap, buffer, pack(found))

    def _path_is_empty(self, trap: Trap, addr: int) -> bool:
        return addr == 0 or memory_of(trap.tid).read_upto(addr, 1) == b"\0"

    def _stat_fd(self, trap: Trap, fd: int, buffer: int, pack: _Packer) -> int | Proceed:
        carrier = self._descriptors.at(trap.tid, fd)
        if carrier is not None:
            return self._write_status(trap, buffer, pack(self._carrier_status(carrier)))
        path = self.resolver.directory_behind(trap.tid, fd)
        if path is None or self.resolver.is_union(path):
            return PROCEED
        return self._write_status(trap, buffer, pack(status.of_node(path, stat.S_IFDIR | 0o755, (0, 0))))

    def _write_status(self, trap: Trap, buffer: int, data: bytes) -> int:
        if memory_of(trap.tid).write_upto(buffer, data) != len(data):
            raise KernelError(errno.EFAULT, f"the status cannot be written to {buffer:#x}")
        return 0

    def _status_of(self, place: Place, no_follow: bool) -> Status | None:
        self._not_directory(place)
        if place.carrier is not None:
            return None if no_follow else self._carrier_status(place.carrier)
        if place.node is not None:
            node = place.node
            size = len(node.target) if stat.S_ISLNK(node.mode) else len(node.text)
            return status.of_node(node.path, node.mode, node.rdev, size)
        if place.directory:
            return status.of_node(place.path, stat.S_IFDIR | 0o755, (0, 0))
        return status.of_host(place.path, no_follow) if place.detour else None

    def _carrier_status(self, carrier: Carrier) -> Status:
        node = self._machine.node(carrier.path) if carrier.path else None
        if node is None:
            return status.of_anonymous(self._carriers.inotify, carrier.file.size)
        return status.of_node(node.path, node.mode, node.rdev, len(node.text))

    # ---- access

    def access(self, trap: Trap) -> int | Proceed:
        return self._access(trap, AT_FDCWD, trap.args[0], trap.args[1], 0)

    def faccessat(self, trap: Trap) -> int | Proceed:
        return self._access(trap, trap.args[0], trap.args[1], trap.args[2], 0)

    def faccessat2(self, trap: Trap) -> int | Proceed:
        return self._access(trap, trap.args[0], trap.args[1], trap.args[2], trap.args[3])

    def _access(self, trap: Trap, dirfd: int, addr: int, mode: int, flags: int) -> int | Proceed:
        if mode & ~7:
            return PROCEED
        place = self._place(trap, dirfd, addr, not flags & AT_SYMLINK_NOFOLLOW)
        if place is None:
            return PROCEED
        found = self._status_of(place, bool(flags & AT_SYMLINK_NOFOLLOW))
        if found is None:
            return PROCEED
        thread = self._processes.thread(trap.tid)
        uid = thread.effective_uid() if flags & AT_EACCESS else thread.real_uid()
        if place.node is not None and unguarded(place.node):
            uid = 0
        if not status.allows(found.mode, mode & 7, uid):
            raise KernelError(errno.EACCES, f"{place.path} has mode {stat.S_IMODE(found.mode):o}")
        return 0

    # ---- readlink, extended attributes

    def readlink(self, trap: Trap) -> int | Proceed:
        return self._readlink(trap, AT_FDCWD, *trap.args[:3])

    def readlinkat(self, trap: Trap) -> int | Proceed:
        return self._readlink(trap, *trap.args[:4])

    def _readlink(self, trap: Trap, dirfd: int, addr: int, buffer: int, size: int) -> int | Proceed:
        place = self._place(trap, dirfd, addr, False)
        if place is None or signed32(size) <= 0:
            return PROCEED
        if place.carrier is not None and not place.not_directory:
            target = place.carrier.path or place.carrier.file.link
        elif place.node is not None and not place.not_directory and stat.S_ISLNK(place.node.mode):
            target = place.node.target
        elif place.node is not None or place.directory:
            self._not_directory(place)
            raise KernelError(errno.EINVAL, f"{place.path} is not a symbolic link")
        else:
            return PROCEED
        data = os.fsencode(target)[: signed32(size)]
        if memory_of(trap.tid).write_upto(buffer, data) != len(data):
            raise KernelError(errno.EFAULT, f"the link cannot be written to {buffer:#x}")
        return len(data)

    def getxattr(self, trap: Trap) -> int | Proceed:
        return self._xattr(trap, True, errno.ENODATA)

    def lgetxattr(self, trap: Trap) -> int | Proceed:
        return self._xattr(trap, False, errno.ENODATA)

    def listxattr(self, trap: Trap) -> int | Proceed:
        return self._xattr(trap, True, 0)

    def llistxattr(self, trap: Trap) -> int | Proceed:
        return self._xattr(trap, False, 0)

    def _xattr(self, trap: Trap, follow: bool, number: int) -> int | Proceed:
        place = self._place(trap, AT_FDCWD, trap.args[0], follow)
        if place is None or self._status_of(place, not follow) is None:
            return PROCEED
        if number:
            raise KernelError(number, f"{place.path} has no extended attributes")
        return 0


def add_pinned(text: bytes, pinned_pages: int, locked_pages: int) -> bytes:
    """The text of /proc/PID/status with the machine's pages added to its VmPin and VmLck lines."""
    from iommufd.memory.accounting import shown_kb

    lines = []
    for line in text.split(b"\n"):
        name = line.partition(b":")[0]
        pages = {b"VmPin": pinned_pages, b"VmLck": locked_pages}.get(name, 0)
        if pages:
            kb = int(line.split()[1]) + shown_kb(pages)
            line = b"%s:\t%8d kB" % (name, kb % 2**64)
        lines.append(line)
    return b"\n".join(lines)
