"""Mapping memory of an iommufd descriptor (core 1.7, events 9.1)."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os

import pytest

from iommufd.engine.context import Context
from iommufd.engine.mmap import O_RDONLY, O_WRONLY, MmapRegion
from iommufd.engine.object import Object
from iommufd.engine.world import World
from tests.engine.flat_task import FlatTask, as_task, expect

P = mmap.PAGESIZE
READ, WRITE, EXEC = 1, 2, 4


class Rig:
    """A context with one published object that owns regions."""

    def __init__(self) -> None:
        self.context = Context(World())
        self.owner = self.make_owner()

    def make_owner(self) -> Object:
        owner = self.context.objects.reserve(Object(self.context))
        self.context.objects.publish(owner)
        return owner

    def region(self, pages: int) -> MmapRegion:
        return self.context.store.add(self.owner, pages * P)

    def mmap(
        self, offset: int, length: int = 2 * P, *, prot: int = READ | WRITE, shared: bool = True
    ) -> tuple[int, int]:
        return self.context.mmap(as_task(FlatTask()), offset, length, prot, shared)


@pytest.fixture
def rig() -> Rig:
    return Rig()


# --------------------------------------------------------------------------------------------------------- registration


@pytest.mark.parametrize("length", [0, 1, P - 1, P + 1, -P])
def test_a_region_is_whole_pages(rig: Rig, length: int) -> None:  # events 9.1
    with expect(errno.EINVAL):
        rig.context.store.add(rig.owner, length)


def test_first_fit_from_one_page_on(rig: Rig) -> None:  # events 9.1
    first, second, third = (rig.region(2) for _ in range(3))
    assert [r.offset for r in (first, second, third)] == [0x1000, 0x3000, 0x5000]
    rig.context.store.remove(second)
    assert rig.region(3).offset == 0x7000
    assert rig.region(1).offset == 0x3000
    assert rig.region(1).offset == 0x4000


def test_no_room(rig: Rig) -> None:  # events 9.1
    with expect(errno.EBUSY):
        rig.context.store.add(rig.owner, 1 << 63)


def test_memory_starts_as_zero_also_when_it_was_used_before(rig: Rig) -> None:
    region = rig.region(2)
    region.write(P - 1, b"xy")
    assert region.read(P - 2, 4) == b"\0xy\0"
    rig.context.store.remove(region)
    again = rig.region(2)
    assert again.offset == region.offset
    assert again.read(0, 2 * P) == bytes(2 * P)


@pytest.mark.parametrize(("at", "count"), [(-1, 1), (2 * P, 1), (P, P + 1)])
def test_a_region_has_ends(rig: Rig, at: int, count: int) -> None:
    region = rig.region(2)
    with pytest.raises(ValueError, match="outside"):
        region.read(at, count)
    with pytest.raises(ValueError, match="outside"):
        region.write(at, bytes(count))


# --------------------------------------------------------------------------------------------------------------- checks


def test_offset_must_be_aligned(rig: Rig) -> None:  # events-9.1-0
    rig.region(2)
    with expect(errno.EINVAL):
        rig.mmap(0x1001)


@pytest.mark.parametrize(
    ("mode", "prot", "shared", "number"),
    [
        (O_WRONLY, READ, True, errno.EACCES),
        (O_WRONLY, WRITE, False, errno.EACCES),
        (O_RDONLY, READ | WRITE, True, errno.EACCES),
        (O_RDONLY, READ, True, errno.EINVAL),  # the VFS drops the shared property
        (O_RDONLY, READ | WRITE, False, errno.EINVAL),
    ],
)
def test_open_modes(rig: Rig, mode: int, prot: int, shared: bool, number: int) -> None:  # events-9.1-0 events-9.1-1
    rig.context.mode = mode
    with expect(number):
        rig.mmap(0x1000, prot=prot, shared=shared)


def test_private_and_executable(rig: Rig) -> None:  # events-9.1-1 events-9.1-2; core-1.7-2 core-1.7-3
    with expect(errno.EINVAL):  # before any offset check
        rig.mmap(0x1000, prot=READ | EXEC, shared=False)
    with expect(errno.EPERM):
        rig.mmap(0x1000, prot=READ | EXEC)


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 2 * P), (0x3000, 2 * P), (0x2000, P), (0x2000, 2 * P), (0x1000, P), (0x1000, 3 * P), (2**63, P)],
)
def test_only_a_whole_region(
    rig: Rig, offset: int, length: int
) -> None:  # events-9.1-3 events-9.1-4; core-1.7-4 core-1.7-5
    rig.region(2)
    with expect(errno.ENXIO):
        rig.mmap(offset, length)


def test_an_owner_that_is_not_there_yet(rig: Rig) -> None:  # events-9.1-3
    owner = rig.context.objects.reserve(Object(rig.context))
    region = rig.context.store.add(owner, P)
    with expect(errno.ENXIO):
        rig.mmap(region.offset, P)


def test_the_mapping_is_the_regions_memory(rig: Rig) -> None:  # events-9.1-5
    region = rig.region(2)
    region.write(0, b"device")
    fd, offset = rig.mmap(region.offset)
    assert offset == region.offset  # the descriptor's own offset, so that a program can map natively
    with mmap.mmap(fd, 2 * P, offset=offset) as memory:
        assert memory[:6] == b"device"
        memory[P : P + 7] = b"program"
        assert region.read(P, 7) == b"program"


# ----------------------------------------------------------------------------------------------------------- references


def test_every_mapping_holds_owner_and_context(rig: Rig) -> None:  # events 9.1, core 1.7
    region = rig.region(2)
    references = rig.context.references
    rig.mmap(region.offset)
    rig.context.mapping_opened(region.offset)  # fork, or a split
    assert (rig.owner.users, rig.context.references, region.mappings) == (3, references + 2, 2)
    rig.context.mapping_closed(region.offset)
    with expect(errno.EBUSY):
        rig.context.objects.destroy(rig.owner.id)
    rig.context.mapping_closed(region.offset)
    assert (rig.owner.users, rig.context.references, region.mappings) == (1, references, 0)
    rig.context.objects.destroy(rig.owner.id)


def test_a_mapping_keeps_the_context_open(rig: Rig) -> None:  # events 9.1
    region = rig.region(2)
    fd, offset = rig.mmap(region.offset)
    rig.context.put()  # the program closes the descriptor
    with mmap.mmap(fd, 2 * P, offset=offset) as memory:
        memory[0] = 1
    assert region.read(0, 1) == b"\1"
    rig.context.mapping_closed(offset)
    assert len(rig.context.objects) == 0
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_file_given_by_the_projector(rig: Rig) -> None:
    given = os.memfd_create("carrier")
    try:
        rig.context.memory_fd = given
        region = rig.region(2)
        region.write(0, b"x")
        assert rig.mmap(region.offset) == (given, region.offset)
        assert os.pread(given, 1, region.offset) == b"x"
        rig.context.mapping_closed(region.offset)
        rig.context.put()
        os.fstat(given)  # it is the projector's to close
    finally:
        os.close(given)


def test_the_context_may_outlive_the_projectors_descriptor(rig: Rig) -> None:
    """An access or a queue keeps the context when its own descriptor has gone; its regions must still come apart."""
    given = os.memfd_create("carrier")
    rig.context.memory_fd = given
    region = rig.region(2)
    os.close(given)
    taken = os.open("/dev/null", os.O_RDWR)  # the number is somebody else's by now
    try:
        region.write(0, b"x")
        assert region.read(0, 1) == b"x"
        rig.context.store.remove(region)
        assert not len(rig.context.store.regions)
    finally:
        os.close(taken)


def test_a_sealed_file_is_used_as_it_is(rig: Rig) -> None:
    given = os.memfd_create("carrier", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(given, 0x4000)
        fcntl.fcntl(given, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
        rig.context.memory_fd = given
        assert rig.region(2).offset == 0x1000
        with expect(errno.EBUSY):
            rig.region(2)
        assert rig.region(1).offset == 0x3000
    finally:
        os.close(given)
