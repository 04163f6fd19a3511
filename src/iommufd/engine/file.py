"""File: an open file of the software machine, whoever holds it.

``/dev/iommu``, fault and event queues, mock access files, dma-bufs and VFIO devices are all Files. A File outlives
every descriptor that names it; :meth:`File.release` runs once, when the last reference (descriptor, mapping, message in
flight, kernel-internal reference) is gone. Descriptors are the business of whoever projects the File: the
interposer (a carrier descriptor in the program) or the in-process backend.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from iommufd.errors import KernelError

if TYPE_CHECKING:
    from iommufd.engine.task import Task

POLLIN, POLLOUT, POLLRDNORM, POLLWRNORM = 0x001, 0x004, 0x040, 0x100
PROT_WRITE, PROT_EXEC = 2, 4
ALWAYS_READY = POLLIN | POLLOUT | POLLRDNORM | POLLWRNORM


class Pending:
    """A deferred answer: a call whose result is not known when its handler returns.

    The handler returns it instead of an int; whoever answers the caller registers one callback with :meth:`then`, and
    the engine completes it once, from any thread, with :meth:`finish` (a result) or :meth:`fail` (a KernelError).
    A caller that is killed meanwhile is told to the engine with :meth:`drop`.
    """

    __slots__ = ("_done", "_lock", "_on_drop", "dropped", "error", "result")

    def __init__(self, on_drop: Callable[[], None] | None = None) -> None:
        self.result: int | None = None
        self.error: KernelError | None = None
        self.dropped = False
        self._done: Callable[[Pending], None] | None = None
        self._lock = threading.Lock()
        self._on_drop = on_drop

    def then(self, done: Callable[[Pending], None]) -> None:
        """Calls ``done(self)`` once the answer is there (at once if it already is)."""
        with self._lock:
            if self.result is None and self.error is None:
                self._done = done
                return
        done(self)

    def watched(self, tell: Callable[[Pending], None]) -> Pending:
        """A Pending with the same answer, completed after ``tell(self)``."""
        outer = Pending(self.drop)

        def done(answered: Pending) -> None:
            tell(answered)
            outer._complete(answered.result, answered.error)

        self.then(done)
        return outer

    def finish(self, result: int) -> None:
        self._complete(result, None)

    def fail(self, error: KernelError) -> None:
        self._complete(None, error)

    def _complete(self, result: int | None, error: KernelError | None) -> None:
        with self._lock:
            if self.result is not None or self.error is not None:
                return
            self.result, self.error = result, error
            done, self._done = self._done, None
        if done is not None:
            done(self)

    def drop(self) -> None:
        """The caller is gone; nobody will read the answer."""
        self.dropped = True
        if self._on_drop is not None:
            self._on_drop()


class File:
    """Base of all Files; the defaults are those of a file without the operation (the kernel's errnos).

    ``link`` is what ``/proc/self/fd/N`` shows. ``carrier`` says how the interposer represents it in the program:
    ``"memory"`` (always ready, can be mapped) or ``"queue"`` (readiness changes; :meth:`poll_changed` is set then).
    ``references`` counts descriptors-holders plus kernel-internal references; see :meth:`get` and :meth:`put`.
    ``memory_fd`` is a memfd (or -1) that whoever projects a ``mappable`` file sets before its first call: what
    :meth:`mmap` grants must lie in it at the same offset, so that the program's own mmap can be let through.
    """

    link: str = "anon_inode:[iommufd]"
    carrier: ClassVar[str] = "memory"
    mappable: ClassVar[bool] = False
    memory_fd: int = -1
    mode: int = 2  # open access mode: 0 O_RDONLY, 1 O_WRONLY, 2 O_RDWR
    size: int = 0  # bytes, as fstat shows them

    def __init__(self) -> None:
        self.references = 1
        self._reference_lock = threading.Lock()
        self.poll_changed: Callable[[int], None] | None = None  # set by the projector; called with the new poll mask

    def get(self) -> None:
        """One more reference (a kernel-internal one, or a further projection)."""
        with self._reference_lock:
            self.references += 1

    def hold(self) -> bool:
        """One more reference unless the last one went already, as it may when another thread closes the descriptor
        that a call was made with; whether there is one."""
        with self._reference_lock:
            if self.references <= 0:
                return False
            self.references += 1
            return True

    def put(self) -> None:
        """One reference less; the last one runs :meth:`release`."""
        with self._reference_lock:
            self.references -= 1
            last = self.references == 0
        if last:
            self.release()

    def ioctl(self, task: Task, cmd: int, arg: int) -> int | Pending:
        """One ioctl; ``arg`` is the raw third argument. Returns the non-negative result or raises KernelError."""
        raise KernelError(errno.ENOTTY, f"{self.link} has no ioctl {cmd:#x}")

    def read(self, task: Task, addr: int, count: int, pos: int | None = None) -> int | Pending:
        """read (``pos`` None) or pread into the caller's memory at ``addr``; returns bytes."""
        raise KernelError(errno.EINVAL, f"{self.link} cannot be read")

    def write(self, task: Task, addr: int, count: int, pos: int | None = None) -> int | Pending:
        """write (``pos`` None) or pwrite from the caller's memory at ``addr``; returns bytes."""
        raise KernelError(errno.EINVAL, f"{self.link} cannot be written")

    def lseek(self, task: Task, offset: int = 0, whence: int = 0) -> int:
        """The new position. ``offset`` is signed; ``whence`` 0 SEEK_SET, 1 SEEK_CUR, 2 SEEK_END."""
        raise KernelError(errno.ESPIPE, f"{self.link} has no position")

    def poll(self) -> int:
        """The current poll mask (POLLIN and so on)."""
        return ALWAYS_READY

    def mmap(self, task: Task, offset: int, length: int, prot: int, shared: bool) -> tuple[int, int]:
        """Checks a mapping and returns ``(fd, offset)`` of the memory behind it; ``length`` is whole pages.

        A mapping holds the file. The one granted here is counted from now on: :meth:`mapping_closed` when it is gone,
        or could not be made."""
        raise KernelError(errno.ENODEV, f"{self.link} cannot be mapped")

    def mapping_opened(self, offset: int) -> None:
        """The mapping made at ``offset`` was copied (fork) or split: there is one more."""
        self.get()

    def mapping_closed(self, offset: int) -> None:
        """A mapping made at ``offset``, or one of its pieces, is gone."""
        self.put()

    def release(self) -> None:
        """The last reference went. Never fails."""


def may_map(file: File, offset: int, length: int, prot: int, shared: bool) -> None:
    """What the VFS decides of a mapping before ``file`` is asked (kernel: do_mmap). ``length`` is whole pages.

    EOVERFLOW beyond the last offset, EACCES for what the open mode does not allow, EPERM for code of an anonymous
    inode."""
    if offset + length > 2**64 - 1:
        raise KernelError(errno.EOVERFLOW, f"offset {offset:#x}+{length:#x} ends beyond the last offset")
    if file.mode in (1, 3):
        raise KernelError(errno.EACCES, "a descriptor that cannot be read cannot be mapped")
    if file.mode == 0 and shared and prot & PROT_WRITE:
        raise KernelError(errno.EACCES, "PROT_WRITE on a descriptor opened O_RDONLY")
    if prot & PROT_EXEC and file.link.startswith("anon_inode:"):
        raise KernelError(errno.EPERM, f"{file.link} cannot be mapped with PROT_EXEC")
