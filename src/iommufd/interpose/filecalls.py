"""The system calls on a descriptor, where it names a file of the machine (kernel: fs/read_write.c, fcntl.c, file.c).

Every handler first finds the file; a descriptor of the host's proceeds natively. What the File itself does not decide
has the kernel's answer for a character device or an anonymous inode.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from iommufd.engine.file import File, may_map
from iommufd.errors import KernelError
from iommufd.interpose.descriptors import descriptor_flags
from iommufd.interpose.filter import MAP_ANONYMOUS
from iommufd.interpose.libc import pidfd_getfd, pidfd_open
from iommufd.interpose.listing import Listing
from iommufd.interpose.trap import ANSWERED, PROCEED, Trap, fd_of, signed32, signed64

if TYPE_CHECKING:
    from iommufd.engine.file import Pending
    from iommufd.engine.world import World
    from iommufd.interpose.caller import RemoteTask
    from iommufd.interpose.carriers import Carrier
    from iommufd.interpose.descriptors import Descriptors
    from iommufd.interpose.mappings import Mappings
    from iommufd.interpose.paths import Resolver
    from iommufd.interpose.processes import Processes
    from iommufd.interpose.trap import Answered, Proceed

Handler = Callable[[Trap], "int | Pending | Proceed | Answered"]

# Generic ioctls that the VFS answers before the driver sees them, and answers rightly for a carrier.
FIGETBSZ, FIONBIO, FIONCLEX, FIOCLEX, FIOASYNC, FS_IOC_FIEMAP = 2, 0x5421, 0x5450, 0x5451, 0x5452, 0xC020660B
FIOQSIZE = 0x5460
FREEZE = (0xC0045877, 0xC0045878)  # FIFREEZE, FITHAW
GENERIC_IOCTLS = frozenset((FIGETBSZ, FIONBIO, FIONCLEX, FIOCLEX, FIOASYNC, FS_IOC_FIEMAP))

F_DUPFD, F_GETFL, F_SETFL, F_SETLEASE, F_NOTIFY, F_DUPFD_CLOEXEC = 0, 3, 4, 1024, 1026, 1030
F_SETPIPE_SZ, F_GETPIPE_SZ, F_ADD_SEALS, F_GET_SEALS = 1031, 1032, 1033, 1034
FCNTL_ERRORS = {
    F_SETLEASE: errno.EINVAL,
    F_NOTIFY: errno.ENOTDIR,
    F_SETPIPE_SZ: errno.EBADF,
    F_GETPIPE_SZ: errno.EBADF,
    F_ADD_SEALS: errno.EINVAL,
    F_GET_SEALS: errno.EINVAL,
}
O_LARGEFILE = 0o400000 if os.uname().machine == "aarch64" else 0o100000

MAX_RW_COUNT = 0x7FFFF000
UIO_MAXIOV = 1024
PAGE_MASK = 0xFFF
USER_END = 2**63  # no address of user space lies above, however many levels page tables have
CLOSE_RANGE_UNSHARE, CLOSE_RANGE_CLOEXEC = 2, 4


class FileCalls:
    """Handlers of the descriptor calls; each returns an answer or raises KernelError."""

    def __init__(
        self, world: World, processes: Processes, descriptors: Descriptors, resolver: Resolver, mappings: Mappings
    ) -> None:
        self._world = world
        self._processes = processes
        self._descriptors = descriptors
        self._resolver = resolver
        self._mappings = mappings

    def _find(self, trap: Trap, fd: int) -> tuple[Carrier, RemoteTask] | None:
        thread = self._processes.thread(trap.tid)
        carrier = self._descriptors.find(thread, fd)
        if carrier is None:
            return None
        task = thread.task
        task.notification = trap.number
        task.fd = fd
        return carrier, task

    # ---- ioctl

    def ioctl(self, trap: Trap) -> int | Pending | Proceed:
        found = self._find(trap, fd_of(trap.args[0]))
        cmd = trap.args[1] & 0xFFFFFFFF
        if found is None or cmd in GENERIC_IOCTLS:
            return PROCEED
        carrier, task = found
        if cmd == FIOQSIZE and not carrier.flags & os.O_PATH:
            raise KernelError(errno.ENOTTY, "FIOQSIZE is for files and directories")
        if cmd in FREEZE and not carrier.flags & os.O_PATH:
            may = task.thread.effective_uid() == 0
            raise KernelError(errno.EOPNOTSUPP if may else errno.EPERM, "no file system that could be frozen")
        if carrier.mapped:
            self._mappings.settle(carrier, trap.tid)
        if self._world.instruments:
            from iommufd.observe import watch

            return watch.ioctl(self._world, carrier.file, task, cmd, trap.args[2])
        return carrier.file.ioctl(task, cmd, trap.args[2])

    # ---- read, write, lseek

    def read(self, trap: Trap) -> int | Pending | Proceed:
        return self._transfer(trap, False, [(trap.args[1], trap.args[2])], None)

    def write(self, trap: Trap) -> int | Pending | Proceed:
        return self._transfer(trap, True, [(trap.args[1], trap.args[2])], None)

    def pread64(self, trap: Trap) -> int | Pending | Proceed:
        return self._transfer(trap, False, [(trap.args[1], trap.args[2])], signed64(trap.args[3]))

    def pwrite64(self, trap: Trap) -> int | Pending | Proceed:
        return self._transfer(trap, True, [(trap.args[1], trap.args[2])], signed64(trap.args[3]))

    def readv(self, trap: Trap) -> int | Pending | Proceed:
        return self._transfer(trap, False, None, None)

    def writev(self, trap: Trap) -> int | Pending | Proceed:
        return self._transfer(trap, True, None, None)

    def preadv(self, trap: Trap) -> int | Pending | Proceed:
        return self._transfer(trap, False, None, signed64(trap.args[3]))

    def pwritev(self, trap: Trap) -> int | Pending | Proceed:
        return self._transfer(trap, True, None, signed64(trap.args[3]))

    def preadv2(self, trap: Trap) -> int | Pending | Proceed:
        position = signed64(trap.args[3])
        return self._transfer(trap, False, None, None if position == -1 else position)

    def pwritev2(self, trap: Trap) -> int | Pending | Proceed:
        position = signed64(trap.args[3])
        return self._transfer(trap, True, None, None if position == -1 else position)

    def _transfer(
        self, trap: Trap, writing: bool, pieces: list[tuple[int, int]] | None, position: int | None
    ) -> int | Pending | Proceed:
        fd = fd_of(trap.args[0])
        found = self._find(trap, fd)
        if found is None:
            return PROCEED
        carrier, task = found
        file = carrier.file
        if position is not None and position < 0:
            raise KernelError(errno.EINVAL, f"position {position} is negative")
        if carrier.flags & os.O_PATH or file.mode == (os.O_RDONLY if writing else os.O_WRONLY):
            raise _bad(trap, f"is not open for {'writing' if writing else 'reading'}")
        operation = file.write if writing else file.read
        if self._world.instruments:
            from iommufd.observe import watch

            operation = partial(watch.write if writing else watch.read, self._world, file)
        if pieces is None:
            if _missing(file, writing):
                return operation(task, 0, 0, position)
            pieces = self._iovecs(task, trap.args[1], trap.args[2])
        if not _missing(file, writing):
            for addr, count in pieces:
                if addr + count > USER_END:
                    raise KernelError(errno.EFAULT, f"{addr:#x}+{count:#x} is not an address of user space")
        done = 0
        for addr, count in pieces:
            count = min(count, MAX_RW_COUNT - done)
            try:
                moved = operation(task, addr, count, None if position is None else position + done)
            except KernelError:
                if done:
                    break
                raise
            if not isinstance(moved, int):
                return moved
            done += moved
            if moved < count:
                break
        return done

    def _iovecs(self, task: RemoteTask, addr: int, count: int) -> list[tuple[int, int]]:
        """struct iovec { void *base; size_t len; } × count; files of ours are read piece by piece, as the kernel
        does."""
        count &= 0xFFFFFFFF
        if count > UIO_MAXIOV:
            raise KernelError(errno.EINVAL, f"{count} pieces are more than {UIO_MAXIOV}")
        raw = task.read(addr, 16 * count)
        words = [int.from_bytes(raw[at : at + 8], "little") for at in range(0, len(raw), 8)]
        pieces = list(zip(words[::2], words[1::2], strict=True))
        if any(length >= 2**63 for _, length in pieces):
            raise KernelError(errno.EINVAL, "a piece has a negative length")
        return pieces

    def lseek(self, trap: Trap) -> int | Proceed:
        fd = fd_of(trap.args[0])
        found = self._find(trap, fd)
        if found is not None:
            if found[0].flags & os.O_PATH:
                raise _bad(trap, "was opened with O_PATH")
            if trap.args[2] & 0xFFFFFFFF > os.SEEK_HOLE:
                raise KernelError(errno.EINVAL, f"whence {trap.args[2] & 0xFFFFFFFF} is not known")
            return found[0].file.lseek(found[1], signed64(trap.args[1]), trap.args[2] & 0xFFFFFFFF)
        listing = self._listing(trap, fd)
        return PROCEED if listing is None else listing.seek(signed64(trap.args[1]), trap.args[2] & 0xFFFFFFFF)

    # ---- calls a device or an anonymous inode has not

    def refuse(self, number: int, why: str) -> Handler:
        """A handler that fails with ``number`` on files of ours."""

        def handler(trap: Trap) -> int | Proceed:
            if self._find(trap, fd_of(trap.args[0])) is None:
                return PROCEED
            raise KernelError(number, why)

        return handler

    def accept(self, trap: Trap) -> int | Proceed:
        """A handler that does nothing on files of ours."""
        return PROCEED if self._find(trap, fd_of(trap.args[0])) is None else 0

    def change_owner_or_mode(self, trap: Trap) -> int | Proceed:
        """fchmod, fchown: root's files; root may, and nothing is changed."""
        if self._find(trap, fd_of(trap.args[0])) is None:
            return PROCEED
        if self._processes.thread(trap.tid).effective_uid() != 0:
            raise KernelError(errno.EPERM, "the file belongs to root")
        return 0

    def splice(self, second: int) -> Handler:
        """sendfile, splice, copy_file_range: neither end can be one of ours. ``second`` is the other descriptor's
        place."""

        def handler(trap: Trap) -> int | Proceed:
            for argument in (0, second):
                if self._find(trap, fd_of(trap.args[argument])) is not None:
                    raise KernelError(errno.EINVAL, "data cannot be spliced to or from this file")
            return PROCEED

        return handler

    # ---- numbers: close, dup, fcntl

    def close(self, trap: Trap) -> Proceed:
        fd = fd_of(trap.args[0])
        if self._world.instruments and (found := self._find(trap, fd)) is not None:
            self._processes.closing[trap.tid] = found
        self._processes.number_closed(fd)
        return PROCEED

    def close_range(self, trap: Trap) -> Proceed:
        first, last, flags = (arg & 0xFFFFFFFF for arg in trap.args[:3])
        if flags & CLOSE_RANGE_UNSHARE:
            self._processes.tables_unshared(trap.tid)
        if not flags & CLOSE_RANGE_CLOEXEC:
            low, high = max(first, self._descriptors.base), min(last, self._descriptors.top - 1)
            for fd in range(low, high + 1):
                self._processes.number_closed(fd)
        return PROCEED

    def dup2(self, trap: Trap) -> Proceed:
        """The number that may be replaced is forgotten; the kernel does the rest."""
        if fd_of(trap.args[0]) != fd_of(trap.args[1]):
            self._processes.number_closed(fd_of(trap.args[1]))
        return PROCEED

    def dup(self, trap: Trap) -> int | Proceed | Answered:
        return self._duplicate(trap, 0, False)

    def fcntl(self, trap: Trap) -> int | Proceed | Answered:
        fd, cmd = fd_of(trap.args[0]), trap.args[1] & 0xFFFFFFFF
        if cmd in (F_DUPFD, F_DUPFD_CLOEXEC):
            return self._duplicate(trap, trap.args[2] & 0xFFFFFFFF, cmd == F_DUPFD_CLOEXEC)
        direct = cmd == F_SETFL and trap.args[2] & os.O_DIRECT
        if cmd != F_GETFL and cmd not in FCNTL_ERRORS and not direct:
            return PROCEED
        found = self._find(trap, fd)
        if found is None:
            return PROCEED
        carrier = found[0]
        if direct:
            if carrier.flags & os.O_PATH:
                return PROCEED
            raise KernelError(errno.EINVAL, "O_DIRECT is not for this kind of file")
        if cmd == F_GETFL:
            native = descriptor_flags(trap.tid, fd)
            if native is None:
                return PROCEED
            if carrier.flags & os.O_PATH:
                return os.O_PATH
            large = O_LARGEFILE if carrier.path else 0
            kept = os.O_APPEND | os.O_NONBLOCK | os.O_ASYNC | os.O_DIRECT | os.O_NOATIME
            return native & kept | carrier.file.mode | large
        number = FCNTL_ERRORS[cmd]
        raise KernelError(number, f"fcntl {cmd} is not for this kind of file")

    def _duplicate(self, trap: Trap, lowest: int, cloexec: bool) -> int | Proceed | Answered:
        """A duplicate goes to the trapped range too, so that reads, writes and listings of it reach us."""
        fd = fd_of(trap.args[0])
        thread = self._processes.thread(trap.tid)
        task = thread.task
        task.notification = trap.number
        carrier = self._descriptors.find(thread, fd)
        if carrier is None and self._resolver.directory_behind(trap.tid, fd) is None:
            return PROCEED
        if lowest >= self._descriptors.top:
            return PROCEED
        try:
            pidfd = pidfd_open(task.thread.group.tgid)
            try:
                source = pidfd_getfd(pidfd, fd)
            finally:
                os.close(pidfd)
        except OSError:
            return PROCEED  # not allowed here: the program gets a low number
        try:
            number = self._descriptors.give_source(task, source, cloexec, lowest)
            if carrier is not None:
                self._descriptors.note(thread, number, carrier)
        finally:
            os.close(source)
        return ANSWERED

    # ---- mmap, directories

    def mmap(self, trap: Trap) -> Proceed:
        """core 1.7: the File checks; what it grants lies in the carrier at the same offset, so the kernel maps that."""
        _, length, prot, flags, fd, offset = trap.args
        if flags & MAP_ANONYMOUS:
            return PROCEED
        found = self._find(trap, fd_of(fd))
        if found is None or offset & PAGE_MASK:
            return PROCEED
        carrier, task = found
        if carrier.flags & os.O_PATH:
            raise KernelError(errno.EBADF, f"descriptor {signed32(fd)} was opened with O_PATH")
        if length == 0 or length >= 2**63:
            return PROCEED
        length = (length + PAGE_MASK) & ~PAGE_MASK
        if flags & 0xF not in (1, 2, 3):
            return PROCEED  # neither shared nor private
        shared = flags & 0xF != 2
        may_map(carrier.file, offset, length, prot, shared)
        if self._world.instruments:
            from iommufd.observe import watch

            memory, at = watch.mmap(self._world, carrier.file, task, offset, length, prot, shared)
        else:
            memory, at = carrier.file.mmap(task, offset, length, prot, shared)
        if memory != carrier.memory or at != offset:
            raise KernelError(errno.ENODEV, "the memory behind this file cannot be mapped into another process")
        self._mappings.granted(carrier, offset, trap.tid)
        return PROCEED

    def getdents64(self, trap: Trap) -> int | Proceed:
        return self._getdents(trap, False)

    def getdents(self, trap: Trap) -> int | Proceed:
        return self._getdents(trap, True)

    def _getdents(self, trap: Trap, old: bool) -> int | Proceed:
        fd = fd_of(trap.args[0])
        found = self._find(trap, fd)
        if found is not None:
            raise KernelError(errno.ENOTDIR, f"{found[0].file.link} is not a directory")
        listing = self._listing(trap, fd)
        if listing is None:
            return PROCEED
        before = listing.position
        data = listing.read(trap.args[2] & 0xFFFFFFFF, old=old)
        try:
            self._processes.thread(trap.tid).task.write(trap.args[1], data)
        except KernelError:
            listing.position = before
            raise
        return len(data)

    def _listing(self, trap: Trap, fd: int) -> Listing | None:
        group = self._processes.thread(trap.tid).group
        listing = group.listings.get(fd)
        if listing is None or (listing.position == 0):
            path = self._resolver.directory_behind(trap.tid, fd)
            if path is None:
                return None
            listing = group.listings[fd] = Listing(path, self._resolver.entries(path))
        return listing


def _bad(trap: Trap, why: str) -> KernelError:
    return KernelError(errno.EBADF, f"descriptor {signed32(trap.args[0])} {why}")


def _missing(file: File, writing: bool) -> bool:
    """Whether the file has no such operation at all (the vectored calls then fail before they look at the pieces)."""
    return type(file).write is File.write if writing else type(file).read is File.read
