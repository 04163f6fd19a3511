"""Where a path of the caller leads: the machine's paths first, the host's second (kernel: namei).

Invariants:

* A path that the host resolves and that names nothing of ours is let through after one look (most calls of most
  programs). Only what the host does not have, what mentions a name of ours, and ``/proc`` is walked component by
  component.
* The walk starts where the caller stands (its cwd or directory descriptor) and reads ``/proc/self`` and
  ``/proc/thread-self`` as the caller's.
* ``..`` is taken of the resolved path, links are followed as the kernel does, forty at most.
* No security claim is made: the caller can change its string after we read it.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from iommufd.interpose.carriers import Carrier
    from iommufd.interpose.descriptors import Descriptors
    from iommufd.machine.machine import Machine
    from iommufd.machine.node import Node

AT_FDCWD = 0xFFFFFF9C  # -100 as an unsigned 32-bit descriptor
MAX_LINKS = 40

_PROC_FD = re.compile(r"/proc/\d+(?:/task/\d+)?/fd/\d+")
_PROC_STATUS = re.compile(r"/proc/(\d+)(?:/task/\d+)?/status")


class Place:
    """Where a path leads. ``path`` is absolute, without links; one of the others says what there is of ours.

    ``node``: a node of the machine; ``directory``: a directory of ours; ``union``: one of the host's that lacks
    entries of ours; ``carrier``: an open file reached through /proc/PID/fd; ``not_directory``: the path goes on
    behind a file; ``detour``: it goes up again from a directory of ours, so that the host cannot follow it."""

    __slots__ = ("carrier", "detour", "directory", "linked", "node", "not_directory", "path", "slash", "union")

    def __init__(self, path: str) -> None:
        self.path = path
        self.node: Node | None = None
        self.directory = False
        self.union = False
        self.carrier: Carrier | None = None
        self.not_directory = False
        self.slash = False
        self.linked = False
        self.detour = False

    @property
    def status_of(self) -> int | None:
        """The process whose /proc/PID/status this is."""
        match = _PROC_STATUS.fullmatch(self.path)
        return int(match[1]) if match else None


class Resolver:
    """Path look-ups of one supervised tree on one machine."""

    def __init__(self, machine: Machine, descriptors: Descriptors) -> None:
        self._machine = machine
        self._descriptors = descriptors
        self._generation = -1
        self._directories: set[str] = set()  # every directory that has a node in it or below
        self._own_directories: set[str] = set()  # those the host does not have, or that are nodes
        self._wholes: set[str] = set()  # those that hide what the host has there
        self._unions: set[str] = set()  # those the host has, without something of ours in them
        self._union_inodes: set[tuple[int, int]] = set()
        self._names: re.Pattern[bytes] = re.compile(b"")
        self._shadowed = False
        self.foreign_roots = False  # somebody called chroot, pivot_root, setns or unshare
        self.refresh()

    def refresh(self) -> None:
        """Takes the machine's present set of paths."""
        if self._generation == self._machine.generation:
            return
        self._generation = self._machine.generation
        nodes = self._machine.paths()
        directories = {"/"}
        names: set[str] = set()
        self._shadowed = False
        for path, node in nodes.items():
            if node.is_directory:
                directories.add(path)
            elif os.path.lexists(path):
                self._shadowed = True
            above = path
            while above not in ("", "/"):
                if above in nodes or not os.path.lexists(above):
                    names.add(os.path.basename(above))
                above = os.path.dirname(above)
                directories.add(above)
        self._directories = directories
        self._wholes = {path for path, node in nodes.items() if node.whole}
        own = {path for path in directories if path in nodes or self._hidden(path) or not os.path.isdir(path)}
        lacking = {os.path.dirname(path) for path in (*nodes, *own) if not os.path.lexists(path)}
        self._own_directories = own
        self._unions = lacking - own
        self._union_inodes = {_inode(path) for path in self._unions}
        pattern = b"|".join(re.escape(os.fsencode(name)) for name in sorted(names))
        self._names = re.compile(
            b"(?:^|/)(?:" + pattern + b")(?:/|$)"  # a name of ours
            b"|(?:^|/)(?:proc|self|thread-self)/|^/dev/(?:fd|std)|^[0-9]+$"  # what means something else to the caller
        )

    # ---- the quick look

    def maybe_ours(self, tid: int, dirfd: int, path: bytes, *, listing: bool = False) -> bool:
        """False when the path certainly leads to nothing of ours; ``listing``: to no directory we have to list
        either."""
        if self._names.search(path) is not None:
            return True
        if path[:1] == b"/":
            full = path
        elif dirfd == AT_FDCWD:
            full = b"/proc/%d/cwd/%b" % (tid, path)
        else:
            full = b"/proc/%d/fd/%d/%b" % (tid, dirfd, path)
        if self._shadowed or self.foreign_roots:
            return True
        if os.access(full, os.F_OK):
            return listing and _inode(full) in self._union_inodes
        if os.access(full, os.F_OK, follow_symlinks=False):
            return True  # a link into nothing (of the host's)
        above = full.rstrip(b"/").rpartition(b"/")[0]
        return bool(above) and not os.access(above, os.F_OK)

    # ---- the walk

    def resolve(self, tid: int, tgid: int, dirfd: int, path: bytes, follow: bool = True) -> Place | None:
        """Where the path leads; None when only the host can tell (it does not exist, or is none of our business)."""
        text = os.fsdecode(path)
        root = self._foreign_root(tid) if self.foreign_roots else ""
        here = "/" if text[:1] == "/" else self._base(tid, dirfd, root)
        if here is None or not text:
            return None
        own_proc = f"/proc/{tgid}/"  # by its number here, whatever it has in a namespace of its own
        todo = [part for part in reversed(text.split("/")) if part not in ("", ".")]
        place = Place(here)
        place.slash = text.endswith(("/", "/.", "/.."))
        links = 0
        machine, directories = self._machine, self._directories
        while todo:
            part = todo.pop()
            if part == "..":
                if here in self._own_directories and not root:
                    place.detour = True
                here = os.path.dirname(here)
                continue
            candidate = f"/{part}" if here == "/" else f"{here}/{part}"
            last = not todo
            if here == "/proc" and part in ("self", "thread-self"):
                if last and not follow and not place.slash:
                    return None
                here = f"/proc/{tgid}" if part == "self" else f"/proc/{tgid}/task/{tid}"
                continue
            target: str | None = None
            node = machine.node(candidate)
            if node is not None:
                if stat.S_ISLNK(node.mode):
                    if last and not follow and not place.slash:
                        return self._node_place(place, candidate, node)
                    target = node.target
                elif node.is_directory:
                    here = candidate
                    continue
                else:
                    place.not_directory = not last or place.slash
                    return self._node_place(place, candidate, node)
            elif candidate in directories:
                here = candidate
                continue
            else:
                if self._hidden(candidate):
                    return None
                real = candidate if candidate.startswith(own_proc) else root + candidate
                try:
                    mode = os.lstat(real).st_mode
                except OSError:
                    return None
                if stat.S_ISLNK(mode):
                    if last and not follow and not place.slash:
                        place.path, place.carrier = candidate, self._carrier_at(candidate, real)
                        return place
                    carrier = self._carrier_at(candidate, real)
                    if carrier is not None:
                        place.path, place.carrier, place.not_directory = candidate, carrier, not last or place.slash
                        return place
                    try:
                        target = os.readlink(real)
                    except OSError:
                        return None
                    if candidate.startswith("/proc/") and not target.startswith("/"):
                        return None  # a magic link to something without a path
                elif last or stat.S_ISDIR(mode):
                    here = candidate
                    continue
                else:
                    return None
            links += 1
            if links > MAX_LINKS:
                return None
            place.linked = True
            if target[:1] == "/":
                here = "/"
                target = self._virtual(target)
            todo += [p for p in reversed(target.split("/")) if p not in ("", ".")]
        place.path = here
        place.node = machine.node(here)
        place.directory = here in self._own_directories
        place.union = here in self._unions
        return place

    def _node_place(self, place: Place, path: str, node: Node) -> Place:
        place.path, place.node = path, node
        return place

    def _carrier_at(self, path: str, real: str) -> Carrier | None:
        """The open file behind a link in some /proc/PID/fd; ``real`` is where we find the link."""
        return self._descriptors.behind(real) if _PROC_FD.fullmatch(path) else None

    def _hidden(self, path: str) -> bool:
        """Whether the host's file lies in a directory of which the machine shows only its own."""
        above = os.path.dirname(path)
        while above not in ("", "/"):
            if above in self._wholes:
                return True
            above = os.path.dirname(above)
        return False

    def _virtual(self, real: str) -> str:
        """The path a program knows by, for one that may lie in the machine's temporary tree."""
        if "/iommufd-" in real:
            return self._machine.tree.virtual(real) or real
        return real

    def _base(self, tid: int, dirfd: int, root: str = "") -> str | None:
        link = f"/proc/{tid}/cwd" if dirfd == AT_FDCWD else f"/proc/{tid}/fd/{dirfd}"
        try:
            text = os.readlink(link)
        except OSError:
            return None
        if text[:1] != "/" or text.endswith(" (deleted)"):
            return None
        if root:  # links tell paths from our root
            with contextlib.suppress(OSError):  # the thread has gone
                top = os.readlink(root)
                if text == top or text.startswith(top.rstrip("/") + "/"):
                    text = text[len(top.rstrip("/")) :] or "/"
        return self._virtual(text)

    def _foreign_root(self, tid: int) -> str:
        """The prefix under which we see the caller's root."""
        prefix = f"/proc/{tid}/root"
        try:
            theirs, ours = os.stat(prefix + "/"), os.stat("/")
            if (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino) and os.readlink(
                f"/proc/{tid}/ns/mnt"
            ) == os.readlink("/proc/self/ns/mnt"):
                return ""
        except OSError:
            return ""
        return prefix

    # ---- listings

    def directory_behind(self, tid: int, fd: int) -> str | None:
        """The directory of ours (or with something of ours in it) that the caller's descriptor is open on."""
        path = self._base(tid, fd)
        return path if path is not None and (path in self._own_directories or path in self._unions) else None

    def is_union(self, path: str) -> bool:
        """Whether the host has the directory too."""
        return path in self._unions

    def entries(self, path: str) -> list[tuple[str, int, int]]:
        """What a program sees in a directory of ours: (name, inode, d_type), the host's own entries included."""
        found: dict[str, tuple[int, int]] = {}
        node = self._machine.node(path)
        whole = node is not None and node.whole
        if not whole and not self._hidden(path):
            try:
                with os.scandir(path) as host:
                    for entry in host:
                        found[entry.name] = (entry.inode(), _type_of(entry))
            except OSError:  # the host has no such directory: ours are all there is
                pass
        from iommufd.interpose.status import of_node

        prefix = path if path.endswith("/") else path + "/"
        nodes = self._machine.paths()
        for other in [*nodes, *self._directories]:
            if other.startswith(prefix) and len(other) > len(prefix):
                name = other[len(prefix) :].partition("/")[0]
                own = nodes.get(prefix + name)
                if own is not None or name not in found:
                    mode = own.mode if own is not None else stat.S_IFDIR | 0o755
                    found[name] = (of_node(prefix + name, mode, (0, 0)).ino, stat.S_IFMT(mode) >> 12)
        return [(name, inode, kind) for name, (inode, kind) in found.items()]


def _inode(path: str | bytes) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0
    return status.st_dev, status.st_ino


def _type_of(entry: os.DirEntry[str]) -> int:
    try:
        return stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode) >> 12
    except OSError:
        return 0
