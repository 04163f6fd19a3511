"""Carriers: what a program really holds where it believes to hold a file of the machine (kernel: struct file).

Invariants:

* One carrier an open: a memfd (contexts, accesses, devices: always ready, natively mappable) or a pipe (queues:
  readiness is a byte in it). The descriptor the program gets is a fresh open description of that inode, because the
  memfd as made never reports its close. The supervisor keeps ``memory``, its own end, and nothing else open.
* Identity is the inode ``(st_dev, st_ino)``: it survives dup, fork, exec, SCM_RIGHTS and a re-open through /proc.
* Release is the death of the inode outside the supervisor: inotify reports the close of the last descriptor, mapping
  and message in flight, before the process that closed it can make its next trapped call. A lease on a memfd, which
  only its sole holder gets, settles the doubt a re-opened description leaves.
* The File's reference held by the program lives here and is dropped exactly once.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from iommufd.engine.file import POLLIN, POLLOUT
from iommufd.errors import KernelError
from iommufd.interpose.libc import IN_CLOSE_NOWRITE, IN_CLOSE_WRITE, inotify_add_watch, inotify_init, inotify_rm_watch

if TYPE_CHECKING:
    from iommufd.engine.file import File

FIONREAD: Final = 0x541B
_EVENT = struct.Struct("=iIII")  # wd s32, mask u32, cookie u32, len u32
IN_Q_OVERFLOW, IN_IGNORED = 0x4000, 0x8000
QUEUE_TOKENS = 1024
ROOM = 6  # descriptors of ours that making a carrier takes at most

Key = tuple[int, int]


class Carrier:
    """One projected open file. ``path`` is the node it was opened by ("" for files that have none).

    ``client`` is the descriptor to give to a program, open until :meth:`Carriers.handed_over`; ``flags`` are the open
    flags it was opened with. ``mapped`` counts the mappings the File knows of, by offset."""

    __slots__ = ("client", "file", "flags", "key", "mapped", "memory", "path", "queue", "tokens", "watch")

    def __init__(self, file: File, path: str, flags: int) -> None:
        self.file = file
        self.path = path
        self.flags = flags
        self.queue = file.carrier == "queue"
        self.mapped: dict[int, int] = {}
        self.memory = -1
        self.client = -1
        self.watch = -1
        self.tokens = 0
        self.key: Key = (0, 0)

    def poll_changed(self, mask: int) -> None:
        """Makes the pipe readable or not; every post is a new edge for EPOLLET (the engine serialises these calls)."""
        if mask & POLLIN:
            if self.tokens < QUEUE_TOKENS:
                self.tokens += 1
                with contextlib.suppress(BlockingIOError):  # full: it is readable, which is all it says
                    os.write(self.memory, b"!")
        elif self.tokens:
            self.tokens = 0
            with contextlib.suppress(BlockingIOError):  # the program has read it
                os.read(self.memory, 4 * QUEUE_TOKENS)


class Carriers:
    """All carriers of one supervisor. Any thread; ``released(carrier)`` is told of each release, after the file's
    put."""

    def __init__(self, released: Callable[[Carrier], None] = lambda carrier: None) -> None:
        self.inotify = inotify_init()
        self.by_key: dict[Key, Carrier] = {}
        self._by_watch: dict[int, Carrier] = {}
        self.doubtful: set[Carrier] = set()
        self.draining = False  # releases were reported to somebody who has not performed them all yet
        self._released = released
        self._draining = threading.RLock()

    def make(self, file: File, path: str = "", flags: int = os.O_RDWR) -> Carrier:
        """A carrier for ``file``, taking the caller's reference to it. KernelError ENFILE when we are out of files."""
        carrier = Carrier(file, path, flags)
        try:
            if carrier.queue:
                self._make_pipe(carrier)
            else:
                self._make_memory(carrier)
        except OSError as error:
            if carrier.watch in self._by_watch:
                self._forget(carrier)
            for fd in (carrier.memory, carrier.client):
                if fd >= 0:
                    os.close(fd)
            file.put()
            raise KernelError(errno.ENFILE, f"the supervisor can open no more files: {error.strerror}") from None
        return carrier

    def check_room(self) -> None:
        """KernelError ENFILE when we have no descriptors left for the next carrier."""
        spare: list[int] = []
        try:
            while len(spare) < ROOM:
                spare.append(os.dup(self.inotify))
        except OSError as error:
            raise KernelError(errno.ENFILE, f"the supervisor can open no more files: {error.strerror}") from None
        finally:
            for fd in spare:
                os.close(fd)

    def _make_memory(self, carrier: Carrier) -> None:
        file = carrier.file
        made = os.memfd_create("iommufd", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:  # ours is a re-opened description too: as made it counts as no writer, and a lease would count wrong
            own = carrier.memory = os.open(f"/proc/self/fd/{made}", os.O_RDWR | os.O_CLOEXEC)
        finally:
            os.close(made)
        if file.mappable:
            file.memory_fd = own
        else:  # a descriptor moved out of the trapped range then reads nothing and cannot write
            fcntl.fcntl(own, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
        link = f"/proc/self/fd/{own}"
        self._watch(carrier, link)
        # always read-write: the program's access mode is enforced and shown by the trapped calls
        carrier.client = os.open(link, os.O_RDWR | os.O_CLOEXEC)

    def _make_pipe(self, carrier: Carrier) -> None:
        file = carrier.file
        reader, writer = os.pipe2(os.O_CLOEXEC)
        try:
            link = f"/proc/self/fd/{reader}"
            carrier.memory = os.open(link, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
            both = bool(file.poll() & POLLOUT)  # a read-only end is never writable, as some queues are not
            carrier.client = os.open(link, (os.O_RDWR if both else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK)
            os.set_blocking(carrier.client, True)
        finally:
            os.close(reader)
            os.close(writer)
        self._watch(carrier, f"/proc/self/fd/{carrier.memory}")
        file.poll_changed = carrier.poll_changed
        carrier.poll_changed(file.poll())

    def _watch(self, carrier: Carrier, link: str) -> None:
        status = os.fstat(carrier.memory)
        carrier.key = (status.st_dev, status.st_ino)
        carrier.watch = inotify_add_watch(self.inotify, link, IN_CLOSE_WRITE | IN_CLOSE_NOWRITE)
        self._by_watch[carrier.watch] = carrier
        self.by_key[carrier.key] = carrier

    def handed_over(self, carrier: Carrier) -> None:
        """Closes our copy of the program's descriptor. If nobody received one, this is the last close."""
        client, carrier.client = carrier.client, -1
        if client >= 0:
            os.close(client)

    def drain(self) -> None:
        """Performs every release reported so far; one that another thread is performing is waited for, a second at
        most."""
        if not self._draining.acquire(timeout=1.0):
            return
        try:
            self.draining = True
            candidates = set(self.doubtful)
            while True:
                try:
                    data = os.read(self.inotify, 65536)
                except BlockingIOError:
                    break
                candidates |= self._closed(data)
            for carrier in candidates:
                self._settle(carrier)
        finally:
            self.draining = False
            self._draining.release()

    def _closed(self, data: bytes) -> set[Carrier]:
        found: set[Carrier] = set()
        at = 0
        while at < len(data):
            watch, mask, _, length = _EVENT.unpack_from(data, at)
            at += _EVENT.size + length
            if mask & IN_Q_OVERFLOW:
                found.update(list(self._by_watch.values()))
            elif not mask & IN_IGNORED:
                carrier = self._by_watch.get(watch)
                if carrier is not None:
                    found.add(carrier)
        return found

    def _settle(self, carrier: Carrier) -> None:
        if carrier.watch not in self._by_watch:
            self.doubtful.discard(carrier)
            return
        if carrier.client >= 0 or not _sole_holder(carrier):
            self.doubtful.add(carrier)
            return
        self.doubtful.discard(carrier)
        self._release(carrier)

    def _release(self, carrier: Carrier) -> None:
        self._forget(carrier)
        try:
            for offset, known in carrier.mapped.items():  # a mapping would have kept the carrier
                for _ in range(known):
                    carrier.file.mapping_closed(offset)
            carrier.file.put()
        finally:
            os.close(carrier.memory)
            self._released(carrier)

    def _forget(self, carrier: Carrier) -> None:
        del self._by_watch[carrier.watch]
        del self.by_key[carrier.key]
        carrier.file.poll_changed = None
        with contextlib.suppress(OSError):  # it went with the inode
            inotify_rm_watch(self.inotify, carrier.watch)

    def close(self) -> None:
        """Releases everything that is left, whoever holds it: the end of the supervisor."""
        self.drain()
        for carrier in list(self._by_watch.values()):
            self.handed_over(carrier)
            self._release(carrier)
        os.close(self.inotify)


def _sole_holder(carrier: Carrier) -> bool:
    """Whether nobody but us has the carrier open or mapped."""
    if carrier.queue:
        return True  # a pipe cannot be leased; its last close is reported once
    try:
        fcntl.fcntl(carrier.memory, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except BlockingIOError:
        return False
    except OSError:
        return True  # leases are not to be had here: believe the event
    fcntl.fcntl(carrier.memory, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return True
