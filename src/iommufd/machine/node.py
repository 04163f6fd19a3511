"""Node: one path of a machine's file system (kernel: a dentry of devtmpfs, sysfs, debugfs)."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from iommufd.engine.file import File
    from iommufd.engine.task import Task

Opener = Callable[["Task | None", int], "File"]


@dataclass(frozen=True, slots=True)
class Node:
    """What there is at one path of a machine.

    ``mode`` carries the type bits; ``rdev`` is (major, minor) of a device. A node with an ``opener`` opens as a File of
    the machine; without one it is a directory, a regular file with ``text``, or a symbolic link to ``target``. A
    directory that is ``whole`` hides what the host has there. Owner and group are root's. The kernel makes /dev/iommu
    0660; here it is 0666, as an administrator makes it for those who may use it, because a software machine needs no
    guarding.
    """

    path: str
    mode: int
    rdev: tuple[int, int] = (0, 0)
    opener: Opener | None = None
    text: bytes = b""
    target: str = ""
    whole: bool = False

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)


def directory(path: str, *, whole: bool = False) -> Node:
    return Node(path, stat.S_IFDIR | 0o755, whole=whole)


def text_file(path: str, text: str | bytes, mode: int = 0o444) -> Node:
    """A file of /sys: str gets the newline every attribute ends with, bytes are taken as they are."""
    return Node(path, stat.S_IFREG | mode, text=text.encode() + b"\n" if isinstance(text, str) else text)


def link(path: str, to: str) -> Node:
    """A symbolic link at ``path`` to the absolute path ``to``, relative as the kernel makes them in /sys.

    There the last part of a link is always the name of what it leads to, also when it leads upwards."""
    target = os.path.relpath(to, os.path.dirname(path))
    if target.endswith(".."):
        target += f"/../{os.path.basename(to)}"
    return Node(path, stat.S_IFLNK | 0o777, target=target)
