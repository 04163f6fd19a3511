"""Which number names which file: the descriptors a program holds on files of the machine (kernel: files_struct).

Numbers come from ``[base, top)``, the range the filter traps, as long as the program's limit and the range allow, else
they are the lowest free. A program may hold its descriptor at any number and in any process; what a number means is
found by inode, and remembered for the trapped range only.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import threading
from typing import TYPE_CHECKING

from iommufd.errors import KernelError
from iommufd.interpose.caller import say_unreadable
from iommufd.interpose.notify import Gone, Listener

if TYPE_CHECKING:
    from iommufd.engine.file import File
    from iommufd.interpose.caller import RemoteTask
    from iommufd.interpose.carriers import Carrier, Carriers
    from iommufd.interpose.processes import Thread
    from iommufd.memory.physical import Physical


class Descriptors:
    """Numbers of one supervised tree. ``physical`` is the machine's memory, for host files handed over."""

    def __init__(
        self, listener: Listener, carriers: Carriers, physical: Physical, base: int, top: int, granted: int = 0
    ) -> None:
        self.granted = granted  # capabilities every caller has on this machine
        self.listener = listener
        self.carriers = carriers
        self.physical = physical
        self.base = base
        self.top = top
        self._choosing = threading.Lock()  # from choosing a number to having taken it

    def find(self, thread: Thread, fd: int) -> Carrier | None:
        """The carrier behind the caller's ``fd``, None when it is closed or a file of the host."""
        files = thread.files
        carrier = files.get(fd)
        if carrier is not None:
            return carrier
        carrier = self.at(thread.tid, fd)
        if carrier is not None and fd not in files and self.base <= fd < self.top and not thread.group.private_files:
            files[fd] = carrier
        return carrier

    def at(self, tid: int, fd: int) -> Carrier | None:
        """The same without any record of the thread: by inode."""
        if not self.carriers.by_key:
            return None
        try:
            return self.behind(f"/proc/{tid}/fd/{fd}")
        except PermissionError:
            say_unreadable(tid)
        except OSError:  # closed, or the thread is gone
            pass
        return None

    def behind(self, link: str) -> Carrier | None:
        """The carrier a link in /proc/PID/fd leads to. OSError when there is no such link, or we may not follow it."""
        status = os.stat(link)
        return self.carriers.by_key.get((status.st_dev, status.st_ino))

    # ---- choosing numbers

    def free_number(self, thread: Thread, lowest: int = 0) -> int:
        """A number to hand out, at least ``lowest``; KernelError EMFILE when the program's limit leaves none."""
        group, tid = thread.group, thread.tid
        limit = self._limit(group.tgid)
        files, reserved = group.files, group.reserved
        for number in range(max(self.base, lowest), min(self.top, limit)):
            if files.get(number) is None and number not in reserved and not is_open(tid, number):
                return number
        taken = open_numbers(tid)
        for number in range(lowest, limit):
            if number not in taken and number not in reserved:
                return number
        raise KernelError(errno.EMFILE, f"no descriptor below the limit of {limit} is free")

    def _limit(self, tgid: int) -> int:
        try:
            soft = resource.prlimit(tgid, resource.RLIMIT_NOFILE)[0]
        except (OSError, ValueError):
            return self.top
        return soft if soft != resource.RLIM_INFINITY else 2**31

    def reserve(self, thread: Thread, cloexec: bool) -> int:
        """Promises a number to the call in flight. KernelError EMFILE, or ENFILE when we have none for our own end."""
        self.carriers.check_room()
        with self._choosing:
            number = self.free_number(thread)
            thread.group.reserved[number] = cloexec
        return number

    def unreserve(self, thread: Thread, fd: int) -> None:
        thread.group.reserved.pop(fd, None)

    # ---- giving descriptors

    def install(self, task: RemoteTask, fd: int, file: File) -> None:
        """Makes the promised number name ``file``, taking its reference; a caller killed meanwhile gets none."""
        group = task.thread.group
        cloexec = group.reserved.pop(fd, True)
        try:
            carrier = self.carriers.make(file)
        except KernelError:
            return  # there was room when the number was promised: the program finds it closed
        try:
            self.listener.add_fd(task.notification, carrier.client, fd, cloexec, send=False)
            self.note(task.thread, fd, carrier)
        except (Gone, OSError):
            pass  # the handover below is then the last close, and releases the file
        finally:
            self.carriers.handed_over(carrier)

    def give(self, task: RemoteTask, carrier: Carrier, cloexec: bool, *, low: bool = False) -> int:
        """Answers the call in flight with a new descriptor of ``carrier`` and returns its number; Gone when the
        caller was killed.

        ``low`` asks for the lowest free number, as a real open gives. KernelError EMFILE when there is none."""
        try:
            fd = self.give_source(task, carrier.client, cloexec, 0, low=low)
            self.note(task.thread, fd, carrier)
            return fd
        finally:
            self.carriers.handed_over(carrier)

    def give_source(self, task: RemoteTask, source: int, cloexec: bool, lowest: int, *, low: bool = False) -> int:
        """Answers the call in flight with a descriptor of our ``source``; as :meth:`give`."""
        with self._choosing:
            at = None if low else self.free_number(task.thread, lowest)
            try:
                return self.listener.add_fd(task.notification, source, at, cloexec, send=True)
            except OSError as error:
                if error.errno == errno.EBADF and at is not None:  # the limit was lowered this instant
                    with contextlib.suppress(OSError):  # EMFILE, below
                        return self.listener.add_fd(task.notification, source, None, cloexec, send=True)
                raise KernelError(errno.EMFILE, f"the program cannot take a descriptor: {error.strerror}") from None

    def note(self, thread: Thread, fd: int, carrier: Carrier) -> None:
        """Remembers what we have just put at a number."""
        if self.base <= fd < self.top and not thread.group.private_files:
            thread.files[fd] = carrier


def is_open(tid: int, fd: int) -> bool:
    """Whether the number is open in the thread's table."""
    return os.access(f"/proc/{tid}/fd/{fd}", os.F_OK, follow_symlinks=False)


def open_numbers(tid: int) -> set[int]:
    """Every open number of the thread's table; empty when the host does not tell."""
    try:
        return {int(name) for name in os.listdir(f"/proc/{tid}/fd")}
    except OSError:
        return set()


def descriptor_flags(tid: int, fd: int) -> int | None:
    """The open flags of the caller's descriptor as the host kernel has them, None when it is closed."""
    try:
        with open(f"/proc/{tid}/fdinfo/{fd}", "rb") as info:
            for line in info:
                if line.startswith(b"flags:"):
                    return int(line.split()[1], 8)
    except OSError:  # no such descriptor, or no such thread any more
        pass
    return None
