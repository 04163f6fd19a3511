"""Kinds of files behind mappings, where the host has no example of each."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from pathlib import Path

import pytest

from iommufd.memory import kinds as kinds_module
from iommufd.memory import proc
from iommufd.memory.kinds import Kinds, file_kind, internal_shmem_device, kernel_page_size
from iommufd.memory.proc import ProcHost
from iommufd.memory.vma import READ, SHARED, WRITE

P = 4096
NOWHERE = os.makedev(0, 4095)  # an internal mount that no mountinfo lists


def kind(kinds: Kinds, dev: int, ino: int = 5, name: str = "", page_size: int = P) -> str:
    return kinds.of(0x1000, 0x2000, dev, ino, name, page_size)


def test_by_name_and_device() -> None:
    kinds = Kinds(os.getpid())
    assert kind(kinds, 0, 0) == "anon"
    assert kind(kinds, 0, 0, "[heap]") == "anon"
    assert kind(kinds, 0, 0, "[vvar]") == "special"
    assert kind(kinds, 0, 0, "[vvar_vclock]") == "special"
    assert kind(kinds, NOWHERE, 5, "/secretmem (deleted)") == "special"
    assert kind(kinds, internal_shmem_device(), 5, "/memfd:x (deleted)") == "shmem"
    assert kind(kinds, internal_shmem_device(), 0, "/SYSV00000000 (deleted)") == "shmem"
    assert kind(kinds, NOWHERE, 5, "/anon_hugepage (deleted)", 2 << 20) == "hugetlbfs"
    assert kind(kinds, os.makedev(259, 4000), 5, "/a/disk/of/another/namespace") == "other"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("rd wr mr mw me ms io pf dd", "special"), ("rd io", "special"), ("rd pf", "special"), ("rd wr sh mm", "ramfs")],
)
def test_device_memory_shows_in_smaps(monkeypatch: pytest.MonkeyPatch, flags: str, expected: str) -> None:
    monkeypatch.setattr(kinds_module, "_of_smaps", lambda pid, start, end, key: flags.split())
    kinds = Kinds(os.getpid())
    assert kind(kinds, NOWHERE, 5, "anon_inode:[something]") == expected
    assert kind(kinds, os.stat("/proc/self/maps").st_dev, 5, "/proc/something") == expected


def test_flags_of_a_real_mapping() -> None:
    memory = mmap.mmap(-1, 1 << 22)  # shared: nothing the interpreter maps meanwhile can melt into it
    here = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    vma = ProcHost(os.getpid()).query(here)
    assert vma is not None
    flags = kinds_module._of_smaps(os.getpid(), vma.start, vma.end, "VmFlags:")
    assert {"rd", "wr"} <= set(flags)
    assert not {"io", "pf"} & set(flags)
    assert kinds_module._of_smaps(os.getpid(), 0x1000, 0x2000, "VmFlags:") == []
    assert kernel_page_size(os.getpid(), vma.start, vma.end) == P


def test_descriptors(tmp_path: Path) -> None:
    for path in ("/dev/null", "/proc/self", "/"):
        fd = os.open(path, os.O_RDONLY)
        assert file_kind(fd) == ("other", 0)
        os.close(fd)
    fd = os.memfd_create("x")
    assert file_kind(fd) == ("shmem", 0)
    os.close(fd)
    fd = os.memfd_create("x", os.MFD_HUGETLB)
    assert file_kind(fd) == ("hugetlbfs", 9)
    os.close(fd)


def test_a_segment_that_replaces_a_memfd_with_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Same place, same length, same device and inode number: only the name tells."""
    host = ProcHost(os.getpid())
    name = b"/memfd:x (deleted)\0"
    asked = []

    def ioctl(fd: int, request: int, question: bytearray) -> int:
        asked.append(request)
        size, at = proc._SIZE.unpack_from(question, proc._NAME_SIZE_AT)[0], proc._QUERY.unpack(question)[13]
        device = internal_shmem_device()
        proc._QUERY.pack_into(
            question, 0, 104, 0x10, 0x5000, 0x5000, 0x6000, READ | WRITE | SHARED, P, 0, 7,
            os.major(device), os.minor(device), len(name) if size else 0, 0, at, 0,
        )  # fmt: skip
        if size:
            ctypes.memmove(at, name, len(name))
        return 0

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    first = host.query(0x5000)
    assert first is not None
    assert host.query(0x5000) is first
    assert len(asked) == 3
    name = b"/SYSV00000000 (deleted)\0"
    second = host.query(0x5000)
    assert second is not None
    assert (first.file_key, second.file_key) == (
        (internal_shmem_device(), 7, ""),
        (internal_shmem_device(), 7, "/SYSV00000000 (deleted)"),
    )
