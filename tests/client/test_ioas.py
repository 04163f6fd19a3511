"""IOAS: what can be mapped, how it is unmapped, and that nothing is left half-done."""

from __future__ import annotations

import array
import ctypes
import errno
import mmap
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import iommufd
from iommufd.testing.mock import APERTURE, MockAccess, MockDevice, reserve

from .conftest import MIB

# ------------------------------------------------------------------------------------------------------------- sources


def read(ioas: iommufd.IOAS, mapping: iommufd.Mapping) -> bytes:
    """What a device sees of a mapping."""
    with MockAccess(ioas) as dma:
        return dma.read(mapping)


BUFFERS: dict[str, Callable[[], Any]] = {
    "bytearray": lambda: bytearray(b"0123456789abcdef" * 8),
    "memoryview": lambda: memoryview(bytearray(b"0123456789abcdef" * 10))[16:144],
    "array.array": lambda: array.array("B", b"0123456789abcdef" * 8),
    "ctypes": lambda: (ctypes.c_char * 128).from_buffer_copy(b"0123456789abcdef" * 8),
    "numpy": lambda: np.frombuffer(bytearray(b"0123456789abcdef" * 8), np.uint64).reshape(4, 4),
    "numpy, columns first": lambda: np.asfortranarray(np.arange(32, dtype=np.float32).reshape(4, 8)),
}


@pytest.mark.parametrize("kind", BUFFERS)
def test_any_writable_buffer_can_be_mapped(ioas: iommufd.IOAS, kind: str) -> None:
    buffer = BUFFERS[kind]()
    mapping = ioas.map(buffer)
    assert mapping.length == memoryview(buffer).nbytes
    assert mapping.readable and mapping.writeable
    with MockAccess(ioas) as dma:
        assert dma.read(mapping) == bytes(memoryview(buffer).tobytes("A"))
        dma.write(mapping, b"WRITTEN!")
    assert memoryview(buffer).tobytes("A")[:8] == b"WRITTEN!"


READ_ONLY: dict[str, Callable[[], Any]] = {
    "bytes": lambda: b"constant",
    "memoryview": lambda: memoryview(bytearray(b"constant")).toreadonly(),
    "numpy": lambda: np.frombuffer(b"constant", np.uint8),
    "mmap": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ),
}


@pytest.mark.parametrize("kind", READ_ONLY)
def test_what_python_may_not_write_is_mapped_read_only(ioas: iommufd.IOAS, kind: str) -> None:
    buffer = READ_ONLY[kind]()
    mapping = ioas.map(buffer)
    assert not mapping.writeable
    with MockAccess(ioas) as dma:
        assert dma.read(mapping) == bytes(buffer)
        with pytest.raises(PermissionError):
            dma.write(mapping, b"x")
    with pytest.raises(ValueError, match="read-only: it cannot be mapped writeable"):
        ioas.map(buffer, writeable=True)
    assert ioas.mappings == [mapping]


def test_a_part_of_a_buffer(ioas: iommufd.IOAS) -> None:
    buffer = bytearray(b"head|body|tail")
    assert read(ioas, ioas.map(buffer, offset=5, length=4)) == b"body"
    assert read(ioas, ioas.map(buffer, offset=5)) == b"body|tail"
    assert read(ioas, ioas.map(buffer, length=4)) == b"head"


def test_an_address_with_a_length(ioas: iommufd.IOAS, memory: mmap.mmap) -> None:
    memory[:4096] = b"A" * 4096
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    mapping = ioas.map(address, length=4096)
    assert mapping.writeable
    assert read(ioas, mapping) == b"A" * 4096
    numpy_number = np.uint64(address)
    assert read(ioas, ioas.map(numpy_number, length=16, offset=8)) == b"A" * 16


@pytest.mark.parametrize("as_object", [True, False])
def test_a_memfd(ioas: iommufd.IOAS, as_object: bool) -> None:
    with open(os.memfd_create("test"), "r+b", buffering=0) as file:
        file.write(b"x" * 8192)
        mapping = ioas.map(file, offset=4096) if as_object else ioas.map_file(file.fileno(), offset=4096)
    assert mapping.length == 4096
    with MockAccess(ioas) as dma:
        assert dma.read(mapping.iova, 4) == b"xxxx"


def test_a_file_opened_for_reading_is_mapped_read_only(ioas: iommufd.IOAS) -> None:
    fd = os.memfd_create("test")
    os.ftruncate(fd, 4096)
    readonly = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    assert not ioas.map_file(readonly).writeable
    assert ioas.map_file(readonly, writeable=True).writeable  # the kernel does not compare
    os.close(fd)
    os.close(readonly)


def test_where_it_is_mapped(ioas: iommufd.IOAS, memory: mmap.mmap) -> None:
    chosen = ioas.map(memory)
    given = ioas.map(memory, 0x7000_0000)
    assert chosen.iova and not chosen.iova % 4096
    assert (given.iova, given.last) == (0x7000_0000, 0x7000_0000 + MIB - 1)
    assert ioas.mappings == sorted([chosen, given], key=lambda m: m.iova)
    with pytest.raises(FileExistsError) as at:
        ioas.map(memory, 0x7000_0000 + 4096)
    assert isinstance(at.value, iommufd.IommufdError)
    assert "IOMMU_IOAS_MAP(flags=FIXED_IOVA|WRITEABLE|READABLE, ioas_id=1, user_va=0x" in at.value.request
    assert len(ioas.mappings) == 2


# ------------------------------------------------------------------------------------------------- the buffer's life


def test_a_mapping_keeps_its_buffer_in_place(ioas: iommufd.IOAS, memory: mmap.mmap) -> None:
    growing = bytearray(4096)
    kept = ioas.map(growing)
    with pytest.raises(BufferError):
        growing.append(1)
    ioas.map(memory)
    with pytest.raises(BufferError):
        memory.close()
    kept.unmap()
    growing.append(1)
    ioas.unmap_all()
    memory.close()


def test_a_mapping_that_nobody_keeps_lives_on(ioas: iommufd.IOAS) -> None:
    iova = ioas.map(bytearray(b"still here")).iova
    with MockAccess(ioas) as dma:
        assert dma.read(iova, 10) == b"still here"


def test_an_address_that_is_gone_is_a_fault_not_a_crash(context: iommufd.Context, ioas: iommufd.IOAS) -> None:
    memory = mmap.mmap(-1, MIB)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    memory.close()
    ioas.map(address, APERTURE, MIB)  # nobody looks yet
    with MockAccess(ioas) as dma, pytest.raises(iommufd.IommufdError) as at:
        dma.read(APERTURE, 16)
    assert at.value.errno == errno.EFAULT
    with pytest.raises(iommufd.IommufdError) as at:
        MockDevice(context, ioas)
    assert at.value.errno == errno.EFAULT
    assert context.devices == []
    ioas.unmap_all()
    MockDevice(context, ioas)


@pytest.mark.parametrize("how", ["unmap", "with", "ioas", "context"])
def test_the_buffer_is_free_again_however_the_mapping_ends(how: str, system: str) -> None:
    buffer = bytearray(4096)
    with iommufd.open("mock" if system == "software" else None) as context:
        ioas = context.alloc_ioas()
        mapping = ioas.map(buffer)
        if how == "unmap":
            mapping.unmap()
        elif how == "with":
            with mapping:
                pass
        elif how == "ioas":
            ioas.close()
    assert not mapping.live
    buffer.append(1)


# ----------------------------------------------------------------------------------------------------------- unmapping


def test_unmap_takes_a_mapping_a_range_or_everything(ioas: iommufd.IOAS, memory: mmap.mmap) -> None:
    pages = [ioas.map(memory, APERTURE + i * 4096, 4096, i * 4096) for i in range(8)]
    pages[0].unmap()
    assert ioas.unmap(pages[1]) == 4096
    assert ioas.unmap(pages[2].iova, 3 * 4096) == 3 * 4096
    assert [m.live for m in pages] == [False] * 5 + [True] * 3
    assert ioas.unmap(0, 1 << 40) == 3 * 4096
    assert ioas.mappings == []
    assert ioas.unmap_all() == 0
    for mapping in pages:
        with pytest.raises(iommufd.IommufdError, match="is unmapped") as at:
            mapping.unmap()
        assert at.value.errno == errno.EBADF


def test_a_range_that_cuts_a_mapping_unmaps_nothing_of_it(ioas: iommufd.IOAS, memory: mmap.mmap) -> None:
    mapping = ioas.map(memory, APERTURE)
    with pytest.raises(FileNotFoundError):
        ioas.unmap(APERTURE + 4096, 4096)
    assert mapping.live and ioas.mappings == [mapping]
    with pytest.raises(FileNotFoundError):
        ioas.unmap(0x7000_0000, 4096)


def test_unmapped_by_someone_else(context: iommufd.Context, ioas: iommufd.IOAS) -> None:
    """The kernel is asked once; the mapping is over either way."""
    from iommufd.uapi.iommufd import iommu_ioas_unmap

    buffer = bytearray(4096)
    mapping = ioas.map(buffer)
    context.do(iommu_ioas_unmap(ioas_id=ioas.id, iova=mapping.iova, length=4096))
    with pytest.raises(FileNotFoundError):
        mapping.unmap()
    assert not mapping.live
    buffer.append(1)


# ------------------------------------------------------------------------------------------------------------ map_many


def test_map_many(ioas: iommufd.IOAS, memory: mmap.mmap) -> None:
    pages = [memoryview(memory)[i * 4096 : (i + 1) * 4096] for i in range(16)]
    given = ioas.map_many(pages, [APERTURE + 2 * i * 4096 for i in range(16)])
    assert [m.iova for m in given] == [APERTURE + 2 * i * 4096 for i in range(16)]
    chosen = ioas.map_many([b"read-only", bytearray(8), memory])
    assert [m.length for m in chosen] == [9, 8, MIB]
    assert [m.writeable for m in chosen] == [False, True, True]
    assert len(ioas.mappings) == 19
    assert ioas.map_many([]) == []
    pages.clear()


def test_map_many_is_all_or_nothing(ioas: iommufd.IOAS) -> None:
    buffers = [bytearray(4096) for _ in range(4)]
    taken = ioas.map(bytearray(4096), 0x3000)
    with pytest.raises(FileExistsError) as at:
        ioas.map_many(buffers, [0x10000, 0x20000, 0x30000, 0x3000])
    assert isinstance(at.value, iommufd.IommufdError)
    assert "iova=0x3000" in at.value.request
    with pytest.raises(TypeError, match="str is neither a buffer"):
        ioas.map_many([*buffers, "text"])  # type: ignore[list-item]  # wrong on purpose
    with pytest.raises(ValueError, match="iova -1"):
        ioas.map_many(buffers, [0x10000, 0x20000, 0x30000, -1])
    with pytest.raises(ValueError, match="4 sources and 1 IOVA"):
        ioas.map_many(buffers, [0])
    assert ioas.mappings == [taken]
    with pytest.raises(FileNotFoundError):
        ioas.unmap(0x10000, 0x30000)
    for buffer in buffers:
        buffer.append(1)


# ---------------------------------------------------------------------------------------------------------------- copy


def test_copy_to(context: iommufd.Context, ioas: iommufd.IOAS) -> None:
    other = context.alloc_ioas()
    buffer = bytearray(b"shared" + bytes(8186))
    mapping = ioas.map(buffer, 0x10000)
    whole = ioas.copy_to(other, mapping, to=0x50000)
    part = ioas.copy_to(other, 0x10000 + 4096, 4096)
    same = ioas.copy_to(ioas, mapping, writeable=False)
    assert (whole.iova, whole.length, part.length, same.writeable) == (0x50000, 8192, 4096, False)
    assert other.mappings == sorted([whole, part], key=lambda m: m.iova)
    with MockAccess(other) as dma:
        assert dma.read(whole.iova, 6) == b"shared"
    ioas.unmap_all()
    with pytest.raises(BufferError):
        buffer.append(1)  # the copies hold it
    other.unmap_all()
    buffer.append(1)


def test_a_copy_has_no_more_rights_than_the_original(context: iommufd.Context, ioas: iommufd.IOAS) -> None:
    other = context.alloc_ioas()
    mapping = ioas.map(b"constant")
    assert not ioas.copy_to(other, mapping).writeable
    with pytest.raises(PermissionError):
        ioas.copy_to(other, mapping, writeable=True)
    with pytest.raises(FileNotFoundError):
        ioas.copy_to(other, 0x7000_0000, 4096)
    with pytest.raises(TypeError, match="an IOVA needs a length"):
        ioas.copy_to(other, mapping.iova)
    with pytest.raises(TypeError, match="target is an IOAS"):
        ioas.copy_to(3, mapping)  # type: ignore[arg-type]  # wrong on purpose
    assert len(other.mappings) == 1


def test_contexts_do_not_mix(context: iommufd.Context, ioas: iommufd.IOAS, system: str) -> None:
    mapping = ioas.map(b"mine")
    with iommufd.open("mock" if system == "software" else None) as stranger:
        theirs = stranger.alloc_ioas()
        with pytest.raises(ValueError, match="of one context"):
            ioas.copy_to(theirs, mapping)
        with pytest.raises(ValueError, match="is not of"):
            theirs.unmap(mapping)


# ------------------------------------------------------------------------------------------------- ranges and options


def test_ranges(context: iommufd.Context, ioas: iommufd.IOAS) -> None:
    assert ioas.iova_ranges() == [(0, 2**64 - 1)]
    assert ioas.iova_alignment == 1
    for i in range(100):  # more than one query has room for
        reserve(ioas, 0x1_0000_0000 + i * 0x2000, 0x1000)
    ranges = ioas.iova_ranges()
    assert len(ranges) == 101
    assert ranges[1] == iommufd.IovaRange(0x1_0000_1000, 0x1_0000_1FFF)
    assert repr(ranges[1]) == "[0x100001000, 0x100001fff]"
    other = context.alloc_ioas()
    MockDevice(context, other)
    assert other.iova_ranges() == [(APERTURE, 0x7FFFFFFF)]
    assert other.iova_alignment == 2048


def test_allow(ioas: iommufd.IOAS) -> None:
    ioas.allow([(0x5000, 0x5FFF), (0x9000, 0xFFFF)])
    assert ioas.map(mmap.mmap(-1, 4096)).iova == 0x5000
    with pytest.raises(iommufd.IommufdError) as at:
        ioas.map(mmap.mmap(-1, MIB))
    assert at.value.errno == errno.ENOSPC
    with pytest.raises(iommufd.IommufdError) as at:
        ioas.allow([(0, 10), (5, 20)])
    assert at.value.errno == errno.EINVAL
    ioas.allow([])
    ioas.map(mmap.mmap(-1, MIB))


def test_options(context: iommufd.Context, ioas: iommufd.IOAS) -> None:
    assert ioas.huge_pages
    ioas.huge_pages = False
    assert not ioas.huge_pages
    assert ioas.iova_alignment == 4096
    ioas.huge_pages = True
    assert context.rlimit_mode == 0
    with pytest.raises(iommufd.IommufdError) as at:
        context.rlimit_mode = 1
    assert at.value.errno in (errno.EPERM, errno.EBUSY)  # core 3: privilege first, then the IOAS
    seen = [context.vfio_ioas]
    context.vfio_ioas = ioas
    seen.append(context.vfio_ioas)
    context.vfio_ioas = None
    assert [*seen, context.vfio_ioas] == [None, ioas.number, None]


def test_change_process(context: iommufd.Context, ioas: iommufd.IOAS) -> None:
    fd = os.memfd_create("test")
    os.ftruncate(fd, 4096)
    ioas.map_file(fd)
    os.close(fd)
    context.change_process()
    ioas.map(bytearray(8))
    with pytest.raises(iommufd.IommufdError) as at:
        context.change_process()
    assert at.value.errno == errno.EINVAL


def test_how_it_shows(context: iommufd.Context, ioas: iommufd.IOAS) -> None:
    mapping = ioas.map(bytearray(1536), 0x1000, writeable=False)
    assert repr(mapping) == "<Mapping [0x1000, 0x15ff] r-, 1.5 KiB, IOAS 1>"
    assert repr(ioas) == "<IOAS 1: 1 mapping, 1.5 KiB>"
    mapping.unmap()
    assert repr(mapping) == "<Mapping [0x1000, 0x15ff] r-, 1.5 KiB, unmapped>"
    ioas.close()
    assert repr(ioas) == "<IOAS 1: closed>"
    assert repr(context).startswith("<Context fd ")
    assert repr(context).endswith(": 0 objects>")
