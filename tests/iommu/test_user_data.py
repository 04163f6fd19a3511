"""The helpers by which drivers read a program's structs (devices 4.7): their errnos are what a program sees."""

from __future__ import annotations

import errno
from struct import pack

import pytest

from iommufd.errors import KernelError
from iommufd.iommu import user_data
from iommufd.iommu.user_data import UserArray, UserData
from iommufd.uapi.iommufd_test import iommu_viommu_invalidate_selftest as Entry
from iommufd.uapi.iommufd_test import iommu_viommu_selftest as Data

TYPE = 7
BASE = 0x1000


class Memory:
    """``data`` at BASE, nothing around it; counts what is read."""

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)
        self.reads = 0

    def read(self, addr: int, count: int) -> bytes:
        self.reads += 1
        at = addr - BASE
        if at < 0 or at + count > len(self.data):
            raise KernelError(errno.EFAULT, "outside")
        return bytes(self.data[at : at + count])

    def write(self, addr: int, data: bytes | bytearray | memoryview) -> None:
        self.read(addr, len(data))
        self.data[addr - BASE : addr - BASE + len(data)] = data


class refuses:
    """The block raises KernelError with that errno."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        assert isinstance(error, KernelError)
        assert errno.errorcode[error.errno] == errno.errorcode[self.number], error.why
        return True


# ----------------------------------------------------------------------------------------------------------- one struct


def test_one_type_then_length_then_memory() -> None:  # devices 4.7 (1)
    with refuses(errno.EINVAL):
        UserData(Memory(b""), TYPE + 1, BASE, 24).copy(TYPE, Data, 8)
    for length in (0, 7, 25):
        with refuses(errno.EINVAL):
            UserData(Memory(bytes(64)), TYPE, BASE, length).copy(TYPE, Data, 8)
    with refuses(errno.EFAULT):
        UserData(Memory(bytes(15)), TYPE, BASE, 16).copy(TYPE, Data, 8)


def test_one_missing_tail_is_zero() -> None:  # devices 4.7 (1)
    memory = Memory(pack("<IIQQ", 1, 2, 3, 4))
    assert UserData(memory, TYPE, BASE, 8).copy(TYPE, Data, 8) == Data(in_data=1, out_data=2)
    assert UserData(memory, TYPE, BASE, 24).copy(TYPE, Data, 8).out_mmap_length == 4


def test_copy_back() -> None:  # devices 4.7 (4)
    value = Data(in_data=1, out_data=2, out_mmap_offset=3, out_mmap_length=4)
    memory = Memory(bytes(24))
    UserData(memory, TYPE, BASE, 16).copy_back(TYPE, value, 8)
    assert memory.data == pack("<IIQQ", 1, 2, 3, 0)
    for length in (7, 25):
        with refuses(errno.EINVAL):
            UserData(memory, TYPE, BASE, length).copy_back(TYPE, value, 8)
    with refuses(errno.EINVAL):
        UserData(memory, TYPE + 1, BASE, 16).copy_back(TYPE, value, 8)
    with refuses(errno.EFAULT):
        UserData(Memory(bytes(8)), TYPE, BASE, 16).copy_back(TYPE, value, 8)


# ------------------------------------------------------------------------------------------------ one entry of an array


def array(memory: Memory, length: int, count: int, type: int = TYPE) -> UserArray:
    return UserArray(memory, type, BASE, length, count)


def test_entry() -> None:  # devices 4.7 (2)
    memory = Memory(pack("<6I", 1, 2, 3, 4, 5, 6))
    entries = array(memory, 12, 2)
    assert entries.entry(1, TYPE, Entry, 12) == Entry(flags=4, vdev_id=5, cache_id=6)
    assert array(memory, 8, 3).entry(2, TYPE, Entry, 4) == Entry(flags=5, vdev_id=6)
    for index in (-1, 2):
        with refuses(errno.EINVAL):
            entries.entry(index, TYPE, Entry, 12)
    with refuses(errno.EINVAL):
        array(memory, 12, 0).entry(0, TYPE, Entry, 12)
    with refuses(errno.EINVAL):
        entries.entry(0, TYPE + 1, Entry, 12)
    for length in (11, 13):
        with refuses(errno.EINVAL):
            array(memory, length, 1).entry(0, TYPE, Entry, 12)
    with refuses(errno.EFAULT):
        array(memory, 12, 3).entry(2, TYPE, Entry, 12)


# ---------------------------------------------------------------------------------------------------------- whole array


def test_all_type_and_emptiness() -> None:  # devices 4.7 (3)
    with refuses(errno.EINVAL):
        array(Memory(bytes(12)), 12, 1, TYPE + 1).all(TYPE, Entry)
    with refuses(errno.EINVAL):
        array(Memory(bytes(12)), 12, 0).all(TYPE, Entry)


def test_all_of_the_structs_size() -> None:  # devices 4.7 (3)
    memory = Memory(pack("<6I", 1, 2, 3, 4, 5, 6))
    assert [e.cache_id for e in array(memory, 12, 2).all(TYPE, Entry)] == [3, 6]
    assert memory.reads == 1
    with refuses(errno.EFAULT):
        array(memory, 12, 3).all(TYPE, Entry)


@pytest.mark.parametrize("chunk", [1, 40, 65536])
def test_all_shorter_and_longer(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:  # devices 4.7 (3)
    monkeypatch.setattr(user_data, "CHUNK", chunk)
    words = Memory(pack("<12I", *range(1, 13)))
    assert [(e.flags, e.vdev_id, e.cache_id) for e in array(words, 4, 3).all(TYPE, Entry)] == [
        (1, 0, 0),
        (2, 0, 0),
        (3, 0, 0),
    ]
    padded = Memory(b"".join(pack("<IIII", n, n, n, 0) for n in range(9)))
    assert [e.flags for e in array(padded, 16, 9).all(TYPE, Entry)] == list(range(9))
    padded.data[5 * 16 + 15] = 1
    with refuses(errno.E2BIG):
        array(padded, 16, 9).all(TYPE, Entry)
    with refuses(errno.E2BIG):  # entry 5, before entry 9 that cannot be read
        array(padded, 16, 10).all(TYPE, Entry)
    padded.data[5 * 16 + 15] = 0
    with refuses(errno.EFAULT):
        array(padded, 16, 10).all(TYPE, Entry)


def test_a_large_array_is_read_in_pieces() -> None:
    memory = Memory(bytes(16 * 50_000))
    assert len(array(memory, 16, 50_000).all(TYPE, Entry)) == 50_000
    assert memory.reads < 20
