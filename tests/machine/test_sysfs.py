"""machine/sysfs.py: the tree a program lists, follows and reads."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from iommufd.machine.node import Node, directory, link, text_file
from iommufd.machine.sysfs import Tree


@pytest.fixture
def tree() -> Iterator[Tree]:
    made = Tree()
    yield made
    made.close()


def test_parents_appear_with_their_children(tree: Tree) -> None:
    tree.add(text_file("/sys/devices/pci0000:00/0000:00:03.0/vendor", "0x1234"))
    assert tree.has("/sys/devices/pci0000:00")
    assert Path(tree.real("/sys/devices/pci0000:00/0000:00:03.0/vendor")).read_text() == "0x1234\n"


def test_links_are_relative_and_lead_inside(tree: Tree) -> None:
    tree.add(text_file("/sys/devices/pci0000:00/0000:00:03.0/vendor", "0x1234"))
    tree.add(link("/sys/bus/pci/devices/0000:00:03.0", "/sys/devices/pci0000:00/0000:00:03.0"))
    at = tree.real("/sys/bus/pci/devices/0000:00:03.0")
    assert os.readlink(at) == "../../../devices/pci0000:00/0000:00:03.0"
    assert Path(at, "vendor").read_text() == "0x1234\n"


def test_binary_and_modes(tree: Tree) -> None:
    tree.add(text_file("/sys/x/config", bytes(range(64)), 0o644))
    at = tree.real("/sys/x/config")
    assert Path(at).read_bytes() == bytes(range(64))
    assert stat.S_IMODE(os.stat(at).st_mode) == 0o644


def test_a_device_is_listed_as_a_placeholder(tree: Tree) -> None:
    tree.add(Node("/dev/vfio/devices/vfio0", stat.S_IFCHR | 0o600, (511, 0)))
    assert os.listdir(tree.real("/dev/vfio/devices")) == ["vfio0"]


def test_a_node_replaces_what_was_there(tree: Tree) -> None:
    tree.add(text_file("/sys/a", "1"))
    tree.add(text_file("/sys/a", "2"))
    assert Path(tree.real("/sys/a")).read_text() == "2\n"
    tree.add(link("/sys/a", "/sys/b"))
    assert os.readlink(tree.real("/sys/a")) == "b"


def test_removal_takes_what_is_below(tree: Tree) -> None:
    tree.add(directory("/sys/d"))
    tree.add(text_file("/sys/d/e/f", "1"))
    tree.remove("/sys/d")
    assert not tree.has("/sys/d")
    assert tree.has("/sys")


def test_real_paths_lead_back(tree: Tree) -> None:
    for path in ("/", "/dev", "/sys/bus/pci"):
        assert tree.virtual(tree.real(path)) == path
    assert tree.virtual("/tmp") is None
    assert tree.virtual(tree.root + "x") is None


def test_nothing_is_left(tree: Tree) -> None:
    tree.add(text_file("/sys/a", "1"))
    folder = os.path.dirname(tree.root)
    tree.close()
    assert not os.path.exists(folder)
