"""The /dev, /sys and debugfs of a machine as a real directory tree, for programs that list, link-follow and read it.

A program finds VFIO devices by looking: ``/sys/bus/pci/devices/*/vfio-dev``, ``iommu_group``, ``/dev/vfio/devices``.
Whoever runs it answers ``open`` on those paths with a real descriptor of this tree, so that reading and listing are
native (interposition 3). Invariants:

* The tree is made of the machine's :class:`~iommufd.machine.node.Node` s and nothing else: directories, files with
  text, relative or absolute symbolic links. A node that opens as a File (a device, a knob) is a placeholder, an empty
  file: it is there to be listed, never to be opened.
* Parents of a node exist without being nodes. What the host has in the same directories is not here: whoever lists
  one for a program adds it, unless the directory's node, or one above it, is the machine's ``whole``.
* Everything lies in one private temporary folder that :meth:`close` removes.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterable

from iommufd.machine.node import Node


class Tree:
    """The nodes of one machine as real files under :attr:`root`. Paths are absolute and without ``..`` or links."""

    def __init__(self, nodes: Iterable[Node] = ()) -> None:
        self._folder = os.path.realpath(tempfile.mkdtemp(prefix="iommufd-"))
        self.root = f"{self._folder}/tree"
        os.mkdir(self.root, 0o755)
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

    # --- looking

    def real(self, path: str) -> str:
        """Where ``path`` is, or would be, in the temporary folder."""
        return self.root + path if path != "/" else self.root

    def has(self, path: str) -> bool:
        """Whether the tree has the path (a link counts as such)."""
        return os.path.lexists(self.real(path))

    def virtual(self, real: str) -> str | None:
        """The path a program knows ``real`` by, for what :meth:`real` gave; None for anything else."""
        if real == self.root:
            return "/"
        return real[len(self.root) :] if real.startswith(self.root + "/") else None


def _remove(real: str) -> None:
    if os.path.isdir(real) and not os.path.islink(real):
        shutil.rmtree(real)
    elif os.path.lexists(real):
        os.unlink(real)
