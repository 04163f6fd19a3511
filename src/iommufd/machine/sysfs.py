"""The /dev, /sys and debugfs of a machine as a real directory tree, for programs that list, link-follow and read it.

A program finds VFIO devices by looking: ``/sys/bus/pci/devices/*/vfio-dev``, ``iommu_group``, ``/dev/vfio/devices``.
Whoever runs it answers ``open`` on those paths with a real descriptor of this tree, so that reading and listing are
native (interposition 3). Invariants:

* The tree is made of the machine's :class:`~iommufd.machine.node.Node` s and nothing else: directories, files with
  text, relative or absolute symbolic links. A node that opens as a File (a device, a knob) is a placeholder, an empty
  file: it is there to be listed, never to be opened.
* Parents of a node exist without being nodes. A directory that also exists on the host shows both (:meth:`listing`),
  unless its node, or that of a directory above it, says it is the machine's ``whole``.
* Everything lies in one private temporary folder that :meth:`close` removes.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable, Iterable

from iommufd.machine.node import Node


class Tree:
    """The nodes of one machine as real files under :attr:`root`. Paths are absolute and without ``..`` or links."""

    def __init__(self, nodes: Iterable[Node] = ()) -> None:
        self._folder = os.path.realpath(tempfile.mkdtemp(prefix="iommufd-"))
        self.root = f"{self._folder}/tree"
        self._union = f"{self._folder}/union"
        os.mkdir(self.root, 0o755)
        os.mkdir(self._union, 0o755)
        self._whole: set[str] = set()
        self._lock = threading.Lock()
        for node in nodes:
            self.add(node)

    def close(self) -> None:
        """Removes the folder; descriptors already opened in it stay valid."""
        shutil.rmtree(self._folder, ignore_errors=True)

    # --- content

    def add(self, node: Node) -> None:
        """Puts the node into the tree, its parents included; one of the same path is replaced."""
        real = self.real(node.path)
        with self._lock:
            os.makedirs(os.path.dirname(real), exist_ok=True)
            if stat.S_ISDIR(node.mode):
                os.makedirs(real, exist_ok=True)
                (self._whole.add if node.whole else self._whole.discard)(node.path)
                return
            _remove(real)
            if stat.S_ISLNK(node.mode):
                os.symlink(node.target, real)
                return
            with open(real, "wb") as file:
                file.write(node.text)
            os.chmod(real, stat.S_IMODE(node.mode))

    def remove(self, path: str) -> None:
        """Takes the path, and what is below it, out of the tree. Directories above it stay."""
        with self._lock:
            _remove(self.real(path))
            self._whole = {kept for kept in self._whole if kept != path and not kept.startswith(path + "/")}

    # --- looking

    def real(self, path: str) -> str:
        """Where ``path`` is, or would be, in the temporary folder."""
        return self.root + path if path != "/" else self.root

    def has(self, path: str) -> bool:
        """Whether the tree has the path (a link counts as such)."""
        return os.path.lexists(self.real(path))

    def virtual(self, real: str) -> str | None:
        """The path a program knows ``real`` by, for what :meth:`real` or :meth:`listing` gave; None for anything
        else."""
        for prefix in (self.root, self._union):
            if real == prefix:
                return "/"
            if real.startswith(prefix + "/"):
                return real[len(prefix) :]
        return None

    def is_whole(self, path: str) -> bool:
        """Whether the host's content of the directory is hidden."""
        while path not in self._whole:
            if path == "/":
                return False
            path = os.path.dirname(path)
        return True

    def listing(self, path: str) -> str:
        """A real directory that lists what a program is to see in the directory ``path`` of the tree.

        The tree's own when the host has no such directory or the machine has it whole; otherwise one made now, with a
        placeholder of the right type for each entry of the host. Entries that cannot be listed are left out."""
        if self.is_whole(path):
            return self.real(path)
        try:
            host = list(os.scandir(path))
        except OSError:
            return self.real(path)
        union = self._union + path if path != "/" else self._union
        with self._lock:
            os.makedirs(union, exist_ok=True)
            wanted: dict[str, Callable[[str], None]] = {}
            for entry in host:
                wanted[entry.name] = _placeholder(entry)
            with os.scandir(self.real(path)) as own:
                for entry in own:
                    wanted[entry.name] = _placeholder(entry)
            present = set(os.listdir(union))
            for name in present - wanted.keys():
                _remove(f"{union}/{name}")
            for name in wanted.keys() - present:
                wanted[name](f"{union}/{name}")
        return union


def _placeholder(entry: os.DirEntry[str]) -> Callable[[str], None]:
    """What makes an entry of the same type elsewhere."""
    if entry.is_symlink():
        try:
            target = os.readlink(entry.path)
        except OSError:
            target = entry.path
        return lambda at: os.symlink(target, at)
    if entry.is_dir(follow_symlinks=False):
        return lambda at: os.mkdir(at, 0o755)
    return lambda at: os.close(os.open(at, os.O_CREAT | os.O_WRONLY, 0o644))


def _remove(real: str) -> None:
    if os.path.isdir(real) and not os.path.islink(real):
        shutil.rmtree(real)
    elif os.path.lexists(real):
        os.unlink(real)
