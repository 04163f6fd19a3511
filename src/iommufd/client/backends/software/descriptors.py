"""Numbers of this process that name Files of one machine.

A file that is always ready is represented by a memfd, a queue by a pipe that holds one byte while the queue is
readable, so ``select``, ``os.fstat`` and passing numbers inside structs work as with a kernel.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading

from iommufd.engine.file import POLLIN, File
from iommufd.errors import KernelError


class Descriptors:
    """The numbers of this process that name Files of one machine."""

    def __init__(self) -> None:
        self.files: dict[int, File] = {}
        self._inodes: dict[tuple[int, int], File] = {}
        self._wakers: dict[int, tuple[int, threading.Lock]] = {}  # queue number -> (our end of its pipe, lock)
        self._reserved: dict[int, None] = {}
        self._lock = threading.Lock()

    def find(self, fd: int) -> File | None:
        """The File behind ``fd``, also through a duplicate the program made; None when it is not one of ours."""
        file = self.files.get(fd)
        if file is not None:
            return file
        if fd < 0 or fd > 2**31 - 1:
            return None
        try:
            status = os.fstat(fd)
        except OSError:
            return None
        return self._inodes.get((status.st_dev, status.st_ino))

    def reserve(self, cloexec: bool) -> int:
        """A number that nobody else gets; KernelError EMFILE when there is none."""
        try:
            fd = os.open("/dev/null", os.O_RDONLY | (os.O_CLOEXEC if cloexec else 0))
        except OSError as error:
            raise KernelError(error.errno or errno.EMFILE, "the process has no free descriptor") from None
        self._reserved[fd] = None
        return fd

    def unreserve(self, fd: int) -> None:
        del self._reserved[fd]
        os.close(fd)

    def install(self, fd: int, file: File) -> None:
        """The reserved number now names ``file``; the file's reference moves to it."""
        del self._reserved[fd]
        inheritable = os.get_inheritable(fd)
        if file.carrier == "queue":
            reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            both = os.open(f"/proc/self/fd/{reader}", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
            os.close(reader)
            os.close(writer)
            os.dup2(both, fd, inheritable)
            lock = threading.Lock()
            self._wakers[fd] = (both, lock)
            file.poll_changed = lambda mask: _signal(both, lock, bool(mask & POLLIN))
            file.poll_changed(file.poll())
        else:
            own = os.memfd_create("iommufd", os.MFD_CLOEXEC)
            os.dup2(own, fd, inheritable)
            if file.mappable:
                file.memory_fd = own
            else:
                os.close(own)
        self.files[fd] = file
        status = os.fstat(fd)
        self._inodes[(status.st_dev, status.st_ino)] = file

    def add(self, file: File, cloexec: bool = True) -> int:
        """Reserves and installs in one step; the file's reference is dropped if there is no number."""
        try:
            fd = self.reserve(cloexec)
        except KernelError:
            file.put()
            raise
        self.install(fd, file)
        return fd

    def close(self, fd: int) -> bool:
        """Closes a number handed out here, or a duplicate of one; False when it is neither."""
        file = self.files.pop(fd, None)
        if file is None:
            if self.find(fd) is None:
                return False
            os.close(fd)
            return True
        status = os.fstat(fd)
        self._inodes.pop((status.st_dev, status.st_ino), None)
        waker = self._wakers.pop(fd, None)
        if waker is not None:
            file.poll_changed = None
            os.close(waker[0])
        os.close(fd)
        file.put()
        self.drop_memory(file)
        return True

    def drop_memory(self, file: File) -> None:
        """Closes the memory of a mappable file once nothing refers to the file: no number, no mapping."""
        with self._lock:
            if file.references or file.memory_fd < 0:
                return
            memory, file.memory_fd = file.memory_fd, -1
        os.close(memory)

    def forget(self) -> None:
        """In a forked child: the numbers name nothing any more. The files are the parent's; nothing is released."""
        self.files.clear()
        self._inodes.clear()

    @property
    def numbers(self) -> list[int]:
        """The open ones, ascending."""
        return sorted(self.files)


def _signal(pipe: int, lock: threading.Lock, readable: bool) -> None:
    """Puts one byte into the queue's pipe, or takes it out."""
    with lock:
        with contextlib.suppress(BlockingIOError):  # it is empty already
            os.read(pipe, 16)
        if readable:
            os.write(pipe, b"!")
