"""Many maps in one go do what as many calls do: the same IOVAs, the same areas, the same error at the same element."""

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import iommufd
from iommufd.client.backends.software import SoftwareBackend
from iommufd.engine.context import Context
from iommufd.engine.ioas import IOAS
from iommufd.engine.map_array import BATCH
from iommufd.machine.presets import preset

MAP, ALLOC = 0x3B85, 0x3B81
FIXED, WRITE, READ = 1, 2, 4
ULMAX = 2**64 - 1
VA = 0x7F00_0000_0000


class Rig:
    """A fresh machine with two IOASes, numbers 1 and 2."""

    def __init__(self) -> None:
        self.backend = SoftwareBackend(preset("mock"))
        self.fd = self.backend.open("/dev/iommu", 2)
        for _ in range(2):
            self.backend.ioctl(self.fd, ALLOC, bytearray(struct.pack("<III", 12, 0, 0)))

    def close(self) -> None:
        self.backend.close_all()
        self.backend.owner.host.close()

    def areas(self) -> list[list[tuple[int, int, int, int, int, bool]]]:
        """Of each IOAS: first, last, offset, protection, base and rights of its memory."""
        context = self.backend.descriptors.files[self.fd]
        assert isinstance(context, Context)
        return [
            [
                (first, last, area.start, area.prot, area.pages.base, area.pages.writable)
                for first, last, area in ioas.io_pagetable.areas
                if area.pages is not None
            ]
            for ioas in context.objects
            if isinstance(ioas, IOAS)
        ]


def one_by_one(rig: Rig, data: bytearray) -> tuple[int, int]:
    """(elements done, errno of the next)."""
    for at in range(0, len(data), 40):
        one = data[at : at + 40]
        try:
            rig.backend.ioctl(rig.fd, MAP, one)
        except iommufd.IommufdError as error:
            return at // 40, error.errno or 0
        data[at : at + 40] = one
    return len(data) // 40, 0


def all_at_once(rig: Rig, data: bytearray) -> tuple[int, int]:
    done = [0]
    try:
        rig.backend.ioctl_many(rig.fd, MAP, data, 40, done)
    except iommufd.IommufdError as error:
        return done[0], error.errno or 0
    return done[0], 0


def element(
    flags: int = READ | WRITE,
    va: int = VA,
    length: int = 4096,
    iova: int = 0,
    ioas: int = 1,
    size: int = 40,
    rsvd: int = 0,
) -> bytes:
    return struct.pack("<IIIIQQQ", size, flags, ioas, rsvd, va, length, iova)


good = st.builds(
    element,
    flags=st.sampled_from([READ, WRITE, READ | WRITE, FIXED | READ, FIXED | READ | WRITE]),
    va=st.integers(VA, VA + 0x10000),
    length=st.integers(1, 0x5000),
    iova=st.integers(0, 64).map(lambda n: n * 0x800),
)
odd = st.builds(
    element,
    flags=st.sampled_from([0, FIXED, 8, READ, FIXED | READ]),
    va=st.sampled_from([0, VA, ULMAX - 4096, ULMAX]),
    length=st.sampled_from([0, 1, 4096, ULMAX - 4096, ULMAX - 4097, ULMAX]),
    iova=st.sampled_from([0, 0x1000, ULMAX - 1, ULMAX]),
    ioas=st.sampled_from([1, 1, 2, 3]),
    size=st.sampled_from([40, 40, 39, 48]),
    rsvd=st.sampled_from([0, 0, 1]),
)


@settings(max_examples=60)
@given(st.lists(st.one_of(good, good, good, odd), max_size=12))
def test_as_many_calls(elements: list[bytes]) -> None:
    first, second = Rig(), Rig()
    try:
        once, each = bytearray(b"".join(elements)), bytearray(b"".join(elements))
        assert all_at_once(first, once) == one_by_one(second, each)
        assert once == each
        assert first.areas() == second.areas()
    finally:
        first.close()
        second.close()


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_more_than_one_batch(rig: Rig) -> None:
    data = bytearray(
        b"".join(element(FIXED | READ, VA + i * 4096, iova=0x10000 + i * 8192) for i in range(3 * BATCH + 5))
    )
    assert all_at_once(rig, data) == (3 * BATCH + 5, 0)
    assert len(rig.areas()[0]) == 3 * BATCH + 5


def test_it_stops_at_the_first_refusal(rig: Rig) -> None:
    data = bytearray(element() * 3 + element(FIXED | READ, iova=VA & 0xFFFFF000 or 0x1000) + element())
    data[3 * 40 + 32 : 3 * 40 + 40] = struct.pack("<Q", 0x1000)
    assert all_at_once(rig, data) == (3, errno.EEXIST)
    assert len(rig.areas()[0]) == 3


def test_with_a_domain_and_when_watched_each_is_a_call(rig: Rig) -> None:
    """An instrument sees every one of them."""
    from iommufd.engine.instrument import Instrument

    class Count(Instrument):
        maps = 0

        def event(self, name: str, **fields: object) -> None:
            self.maps += name == "map"

    count = Count()
    rig.backend.machine.world.instruments.append(count)
    assert all_at_once(rig, bytearray(element() * 5)) == (5, 0)
    assert count.maps == 5
    rig.backend.machine.world.instruments.clear()
    memory = bytearray(72)
    struct.pack_into("<III", memory, 0, 72, 2, 2)
    rig.backend.ioctl(rig.fd, 0x3BA0, memory)  # a mock device on IOAS 2: its maps pin
    bad = bytearray(element(ioas=2, va=0x1000, length=4096) * 2)
    assert all_at_once(rig, bad) == (0, errno.EFAULT)


def test_nothing_and_nobody(rig: Rig) -> None:
    assert all_at_once(rig, bytearray()) == (0, 0)
    assert all_at_once(rig, bytearray(element(ioas=9))) == (0, errno.ENOENT)
    done = [0]
    with pytest.raises(iommufd.IommufdError) as at:
        rig.backend.ioctl_many(-1, MAP, bytearray(element()), 40, done)
    assert at.value.errno == errno.EBADF
    short = bytearray(struct.pack("<III", 12, 0, 0) * 3)
    rig.backend.ioctl_many(rig.fd, ALLOC, short, 12, done)
    assert done == [3] and struct.unpack("<9I", short)[2::3] == (3, 4, 5)
