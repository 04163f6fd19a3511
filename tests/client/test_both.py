"""The pytest plugin's own way to both systems, as a user of it has it: on the software machine, and in the oracle VM
(`make oracle`) on the kernel as well."""

from __future__ import annotations

import mmap

import pytest

import iommufd

pytestmark = pytest.mark.iommufd(backend="both")


def test_a_mapping_and_its_copy(iommufd_context: iommufd.Context, iommufd_backend: str) -> None:
    assert iommufd_context.backend.name == iommufd_backend
    with iommufd_context.alloc_ioas() as ioas, iommufd_context.alloc_ioas() as other:
        memory = mmap.mmap(-1, 8192)
        mapping = ioas.map(memory, 0x100000)
        with pytest.raises(FileExistsError):
            ioas.map(bytearray(4096), 0x101000)
        copy = ioas.copy_to(other, mapping, to=0x200000)
        mapping.unmap()
        assert (copy.live, other.unmap_all()) == (True, 8192)


def test_a_queue_that_is_closed_is_no_leak(iommufd_context: iommufd.Context) -> None:
    with iommufd_context.alloc_fault_queue() as queue:
        assert queue.read() == []
