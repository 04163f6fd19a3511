"""Pinned-page accounting (core 6): who pays for a pinned page, and when that is too much.

Invariants: only pages newly pinned are charged and only pages really unpinned are uncharged, by the caller's count. The
limit is read at that moment. All modes move ``pinned_vm`` (VmPin) of the paying address space; USER moves the user's
``locked_pages`` besides, MM the space's ``locked_vm`` (VmLck). Nothing is changed when a charge fails.

The kernel objects are ``user_struct.locked_vm``, ``mm_struct.locked_vm`` and ``mm_struct.pinned_vm``.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import resource
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from iommufd.errors import KernelError
from iommufd.memory.frames import PAGE_SHIFT

if TYPE_CHECKING:
    from iommufd.memory.space import AddressSpace


class Mode(enum.IntEnum):
    """Account mode of a pages object, chosen when it is created and kept."""

    NONE = 0
    USER = 1
    MM = 2


class User:
    """A uid and the pages charged to it, whichever of its processes pinned them."""

    __slots__ = ("locked_pages", "uid")

    def __init__(self, uid: int) -> None:
        self.uid = uid
        self.locked_pages = 0

    def __repr__(self) -> str:
        return f"User({self.uid}, locked_pages={self.locked_pages})"


def memlock_of(pid: int) -> int | None:
    """RLIMIT_MEMLOCK (soft) of a live process in bytes, None for infinite. OSError when it is gone or hidden."""
    try:
        soft = resource.prlimit(pid, resource.RLIMIT_MEMLOCK)[0]
        return None if soft == resource.RLIM_INFINITY else soft
    except PermissionError:
        with open(f"/proc/{pid}/limits", encoding="ascii") as limits:
            for line in limits:
                if line.startswith("Max locked memory"):
                    word = line.split()[3]
                    return None if word == "unlimited" else int(word)
        raise


class Process:
    """A thread group: whose limit counts and which user pays. ``limit`` reads RLIMIT_MEMLOCK (for tests)."""

    __slots__ = ("_known", "_limit", "space", "tgid", "user")

    def __init__(
        self, tgid: int, user: User, space: AddressSpace, limit: Callable[[int], int | None] = memlock_of
    ) -> None:
        self.tgid = tgid
        self.user = user
        self.space = space
        self._limit = limit
        self._known: int | None = 0
        self.memlock_limit()

    def use_limit(self, limit: Callable[[int], int | None]) -> None:
        """Reads RLIMIT_MEMLOCK with ``limit`` from now on (for tests)."""
        self._limit = limit

    def memlock_limit(self) -> int | None:
        """RLIMIT_MEMLOCK in bytes, None for infinite: now, or as last seen when the process has exited."""
        with contextlib.suppress(OSError, ValueError):  # exited
            self._known = self._limit(self.tgid)
        return self._known


def over_limit(charged: int, new: int, limit: int | None) -> bool:
    """core 6.1: whether ``charged + new`` pages exceed ``limit`` bytes, rounded down to pages; None is infinite."""
    return limit is not None and charged + new > limit >> PAGE_SHIFT


_lock = threading.Lock()


def charge(mode: Mode, process: Process, user: User, space: AddressSpace, pages: int) -> None:
    """Charges ``pages`` newly pinned pages; ENOMEM over the limit. A space that is gone can still be charged, within
    the limit its process had (seen on 7.3.4)."""
    if mode is Mode.NONE:
        with _lock:
            space.pinned_vm += pages
        return
    limit = process.memlock_limit()
    if mode is Mode.USER:
        with _lock:
            if over_limit(user.locked_pages, pages, limit):
                raise KernelError(errno.ENOMEM, _sentence(f"uid {user.uid}", user.locked_pages, pages, limit))
            user.locked_pages += pages
            space.pinned_vm += pages
        return
    own = space.mlocked_pages() if space.alive else 0
    with _lock:
        if over_limit(space.locked_vm + own, pages, limit):
            raise KernelError(errno.ENOMEM, _sentence(f"process {process.tgid}", space.locked_vm + own, pages, limit))
        space.locked_vm += pages
        space.pinned_vm += pages


def uncharge(
    mode: Mode, process: Process, user: User, space: AddressSpace, pages: int, *, although_gone: bool = False
) -> bool:
    """Takes back ``pages``. False when MM mode finds the space gone: nothing is released then (core 6.2), unless
    ``although_gone``."""
    with _lock:
        if mode is Mode.USER:
            user.locked_pages -= pages
        elif mode is Mode.MM:
            if not space.alive and not although_gone:
                return False
            space.locked_vm -= pages
        space.pinned_vm -= pages
    return True


def must_move(mode: Mode, user: User, space: AddressSpace, new_user: User, new_space: AddressSpace) -> bool:
    """core 4.13: whether CHANGE_PROCESS has to move the charge of a pages object to the caller."""
    if mode is Mode.MM:
        return space is not new_space
    if mode is Mode.USER:
        return user is not new_user or space is not new_space
    return False


def shown_kb(pages: int) -> int:
    """A page counter as /proc/PID/status shows it in kB: an unsigned long, so one below zero is huge."""
    return (pages << (PAGE_SHIFT - 10)) % 2**64


def _sentence(who: str, charged: int, new: int, limit: int | None) -> str:
    pages = (limit or 0) >> PAGE_SHIFT
    return f"{who} has {charged} locked pages and {new} more exceed RLIMIT_MEMLOCK of {pages} pages"
