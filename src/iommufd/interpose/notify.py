"""The seccomp notification device (kernel: struct seccomp_notif, seccomp_notif_resp, seccomp_notif_addfd).

One :class:`Listener` per tree of supervised processes. A notification is alive from RECV until its answer; with
WAIT_KILLABLE_RECV only SIGKILL can end it earlier, and then answering raises ENOENT, which is no error.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import struct
from typing import Final

RECV: Final = 0xC0502100
SEND: Final = 0xC0182101
ID_VALID: Final = 0x40082102
ADDFD: Final = 0x40182103
SET_FLAGS: Final = 0x40082104

SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP = 1
FLAG_CONTINUE = 1
ADDFD_SETFD, ADDFD_SEND = 1, 2

SECCOMP_SET_MODE_FILTER = 1
FILTER_FLAG_NEW_LISTENER, FILTER_FLAG_WAIT_KILLABLE_RECV = 8, 32

# id u64, pid u32, flags u32, nr s32, arch u32, instruction_pointer u64, args u64[6]
NOTIF: Final = struct.Struct("=QIIiIQ6Q")
NOTIF_SIZE: Final = 80
# id u64, val s64, error s32, flags u32
RESP: Final = struct.Struct("=QqiI")
RESP_SIZE: Final = 24
_ADDFD = struct.Struct("=QIIII")  # id u64, flags u32, srcfd u32, newfd u32, newfd_flags u32


class Gone(Exception):
    """The calling thread was killed: nobody waits for this answer any more."""


class Listener:
    """The supervisor's end. Threads may use it at once, each with its own buffers."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def set_sync_wake_up(self) -> bool:
        """Asks that answering and being asked switch threads on one CPU; False on kernels before 6.6."""
        try:
            fcntl.ioctl(self.fd, SET_FLAGS, SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP)  # the flag is passed by value
        except OSError:
            return False
        return True

    def answer(self, number: int, value: int) -> None:
        """The call returns ``value``; a negative one is an errno."""
        self._send(RESP.pack(number, 0, value, 0) if value < 0 else RESP.pack(number, value, 0, 0))

    def proceed(self, number: int) -> None:
        """The kernel executes the call as if it had not been trapped."""
        self._send(RESP.pack(number, 0, 0, FLAG_CONTINUE))

    def _send(self, response: bytes) -> None:
        try:
            fcntl.ioctl(self.fd, SEND, response)
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise Gone from None
            raise

    def add_fd(self, number: int, source: int, at: int | None, cloexec: bool, *, send: bool) -> int:
        """Gives the calling process a descriptor of our ``source`` at ``at`` (None: the lowest free) and returns it.

        ``send`` answers the call with that number in the same step. OSError EBADF when ``at`` is beyond the process's
        limit, EMFILE when it has no descriptor left; Gone when it was killed. Whatever was open at ``at`` is closed."""
        flags = (ADDFD_SEND if send else 0) | (0 if at is None else ADDFD_SETFD)
        request = _ADDFD.pack(number, flags, source, at or 0, os.O_CLOEXEC if cloexec else 0)
        while True:
            try:
                got: int = fcntl.ioctl(self.fd, ADDFD, bytearray(request))
                return got
            except OSError as error:
                if error.errno == errno.ENOENT:
                    raise Gone from None
                if error.errno != errno.EINTR:
                    raise

    def valid(self, number: int) -> bool:
        """Whether somebody still waits for the answer."""
        try:
            fcntl.ioctl(self.fd, ID_VALID, number.to_bytes(8, "little"))
        except OSError:
            return False
        return True

    def over(self) -> bool:
        """Whether the last task under the filter is gone."""
        poller = select.poll()
        poller.register(self.fd, 0)
        return any(events & select.POLLHUP for _, events in poller.poll(0))

    def close(self) -> None:
        os.close(self.fd)
