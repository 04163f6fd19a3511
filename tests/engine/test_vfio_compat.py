"""engine/vfio_compat.py against vfio-compat.md sections 1-8 and 10.1.

What the real kernel was seen to answer is replayed by tests/conformance; here are the rules themselves, and what only a
kernel object can bring about (no-IOMMU mode, privileges, write-back under failure)."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iommufd.client.backends.software import SoftwareBackend
from iommufd.engine.context import Context
from iommufd.engine.ioas import IOAS
from iommufd.engine.task import CAP_SYS_RAWIO
from iommufd.engine.vfio_compat import (
    compat_ioas_create,
    compat_ioas_id,
    compat_ioctl,
    compat_set_no_iommu,
    info_writes,
    iova_pgsizes,
)
from iommufd.errors import KernelError, errno_name
from iommufd.machine.machine import Machine
from iommufd.uapi import iommufd as u
from tests.engine.fakes import ARG, BUFFER, Background, Caller, Gate, TestDmaBuf, frames_of

P = 4096
ULMAX = 2**64 - 1
ALL = [(0, ULMAX)]
CHECK_EXTENSION, SET_IOMMU, GET_INFO, MAP_DMA, UNMAP_DMA = 0x3B65, 0x3B66, 0x3B70, 0x3B71, 0x3B72


# --- section 6: the rules


@pytest.mark.parametrize(
    ("bitmaps", "alignment", "sizes"),
    [
        ([], 1, 0xFFFFFFFFFFFFF000),  # no domain
        ([0x1FFFFFF800], 2048, 0x1FFFFFF000),  # the mock's default domain
        ([0x1FFFFFF800], 4096, 0x1FFFFFF000),  # large pages disabled changes nothing
        ([0x100800 | 0x1000], 2048, 0x101000),  # the mock's huge domain
        ([0x1FFFFFF800, 0x101800], 2048, 0x101000),  # both
        ([0x40201000], 4096, 0x40201000),  # VT-d
        ([0x40201000, 0x1000], 4096, 0x1000),
        ([0x40200000, 0x1000], 4096, 4096),  # nothing in common: the alignment
        ([0x800], 2048, 4096),
    ],
)
def test_vfio_6_pgsizes(bitmaps: list[int], alignment: int, sizes: int) -> None:
    assert iova_pgsizes(bitmaps, alignment) == sizes


def _info(argsz: int, ranges: list[tuple[int, int]], pgsizes: int = 0xFFFFFFFFFFFFF000) -> str:
    """The buffer afterwards, as hexadecimal with ``..`` for what was not written."""
    buffer: list[int | None] = [None] * 256
    for offset, data in info_writes(argsz, pgsizes, ranges):
        buffer[offset : offset + len(data)] = data
    while buffer and buffer[-1] is None:
        buffer.pop()
    return "".join(".." if byte is None else f"{byte:02x}" for byte in buffer)


def test_vfio_6_bytes_of_the_whole_chain() -> None:
    assert _info(72, ALL) == (
        "480000000300000000f0ffffffffffff1800000000000000"
        "0300010028000000ffffffff........"
        "010001000000000001000000000000000000000000000000ffffffffffffffff"
    )


def test_vfio_6_partial_buffers() -> None:
    head = "480000000300000000f0ffffffffffff0000000000000000"
    assert _info(40, ALL) == head + "0300010028000000ffffffff"
    assert _info(39, ALL) == head + "0300010000000000ffffffff"
    assert _info(36, ALL) == head + "0300010000000000ffffffff"
    assert _info(35, ALL) == head
    assert _info(20, ALL) == head[:40]
    assert _info(16, ALL) == head[:32]
    # 32 bytes behind offset 40 fit one range, but not the head of a capability with two
    two = [(0, 0xFFF), (0x2000, 0x2FFF)]
    assert _info(72, two) == (
        "580000000300000000f0ffffffffffff0000000000000000"
        "0300010028000000ffffffff........" + "." * 32 + "0000000000000000ff0f000000000000"
    )


def test_vfio_6_nothing_free() -> None:
    assert _info(56, []) == (
        "380000000300000000f0ffffffffffff1800000000000000"
        "0300010028000000ffffffff........"
        "01000100000000000000000000000000"
    )


@given(st.integers(16, 400), st.lists(st.tuples(st.integers(0, ULMAX), st.integers(0, ULMAX)), max_size=12))
def test_vfio_6_nothing_is_written_beyond_argsz(argsz: int, ranges: list[tuple[int, int]]) -> None:
    writes = info_writes(argsz, 0x1000, ranges)
    assert max(offset + len(data) for offset, data in writes) <= argsz
    argsz_out, _flags, _sizes, cap_offset = struct.unpack_from("<IIQI", writes[-1][1].ljust(24, b"\0"))
    assert argsz_out == 56 + 16 * len(ranges)
    assert (cap_offset == 24) == (argsz >= max(argsz_out, 20))


# --- on a context


class _Caller:
    """A program with one iommufd descriptor, and the context behind it."""

    def __init__(self, machine: Machine, fd: int, backend: SoftwareBackend) -> None:
        self.machine = machine
        self.backend = backend
        self.fd = fd
        (self.context,) = machine.contexts

    def call(self, cmd: int, arg: bytearray | int) -> int:
        """The result, or minus the errno."""
        try:
            return self.backend.ioctl(self.fd, cmd, arg)
        except OSError as error:
            return -(error.errno or 0)

    def ioas(self) -> int:
        b = bytearray(struct.pack("<III", 12, 0, 0))
        assert self.call(0x3B81, b) == 0
        return int(struct.unpack("<III", b)[2])

    def set_compat(self, ioas: int) -> None:
        assert self.call(0x3B88, bytearray(struct.pack("<IIHH", 12, ioas, 1, 0))) == 0

    def map(self, vaddr: int, iova: int, size: int) -> int:
        return self.call(MAP_DMA, bytearray(struct.pack("<IIQQQ", 32, 3, vaddr, iova, size)))

    def unmap(self, iova: int, size: int, flags: int = 0) -> tuple[int, int]:
        """(result, size afterwards)."""
        b = bytearray(struct.pack("<IIQQ", 24, flags, iova, size))
        result = self.call(UNMAP_DMA, b)
        return result, struct.unpack("<IIQQ", b)[3]


@pytest.fixture
def caller() -> Iterator[_Caller]:
    machine = Machine("test")
    backend = SoftwareBackend(machine)
    made = _Caller(machine, backend.open("/dev/iommu", os.O_RDWR), backend)
    yield made
    backend.close_all()
    machine.close()


@pytest.fixture
def context(caller: _Caller) -> Context:
    return caller.context


def _fails(number: int) -> pytest.RaisesExc[KernelError]:
    return pytest.RaisesExc(KernelError, check=lambda error: error.errno == number)


def test_vfio_1_row_1_any_other_command_leaves_its_argument_alone(caller: _Caller) -> None:
    for cmd in (0x3B67, 0x3B68, 0x3B6A, 0x3B6F, 0x3B73, 0x3B74, 0x3B75, 0x3B76, 0xC0003B64, 0x3C64, 0x3BFF):
        assert caller.call(cmd, 0) == -errno.ENOTTY, hex(cmd)


def test_vfio_1_1_a_destroyed_ioas_is_no_compat_ioas(caller: _Caller) -> None:
    ioas = caller.ioas()
    caller.set_compat(ioas)
    assert caller.call(CHECK_EXTENSION, 4) == 1  # vacuously
    assert caller.call(0x3B80, bytearray(struct.pack("<II", 8, ioas))) == 0
    assert caller.call(CHECK_EXTENSION, 4) == -errno.ENODEV
    assert caller.context.compat_ioas is None


def test_vfio_3_no_reference_is_held(caller: _Caller) -> None:
    ioas = caller.ioas()
    caller.set_compat(ioas)
    assert caller.map(0x1000, 0x1000, P) == 0
    assert caller.unmap(0x1000, P) == (0, P)
    assert caller.context.compat_ioas is not None
    assert (caller.context.compat_ioas.users, caller.context.compat_ioas.wait) == (1, 1)


@pytest.mark.parametrize("noiommu", [True, False])
def test_vfio_4_8_noiommu_is_a_build_option(noiommu: bool) -> None:
    machine = Machine("test", noiommu=noiommu)
    backend = SoftwareBackend(machine)
    fd = backend.open("/dev/iommu", os.O_RDWR)
    assert backend.ioctl(fd, CHECK_EXTENSION, 8) == int(noiommu)
    backend.close_all()


def test_vfio_8_row_9_a_write_back_that_fails_beats_the_result(caller: _Caller) -> None:
    caller.set_compat(caller.ioas())
    assert caller.map(0x1000, 0x1000, P) == 0
    assert caller.map(0x1000, 0x2000, 2 * P) == 0
    argument = mmap.mmap(-1, P)
    argument.write(struct.pack("<IIQQ", 24, 0, 0x1000, 2 * P))
    address = ctypes.addressof(ctypes.c_char.from_buffer(argument))
    libc = ctypes.CDLL(None)
    libc.mprotect(ctypes.c_void_p(address), P, mmap.PROT_READ)
    assert caller.call(UNMAP_DMA, address) == -errno.EFAULT  # ENOENT otherwise, for the second area
    assert caller.unmap(0, 0, flags=2) == (0, 2 * P)  # the first area stays removed


# --- section 8.1, on made-up memory


@pytest.fixture
def v1() -> tuple[Caller, int]:
    """A caller whose compat IOAS has its large pages disabled and maps 8 pages at 0, in a domain."""
    caller = Caller()
    caller.world.compat_ioctl = compat_ioctl
    ioas = caller.ioas()
    caller.do(u.iommu_vfio_ioas(op=1, ioas_id=ioas))
    caller.raw(MAP_DMA, struct.pack("<IIQQQ", 32, 3, BUFFER, 0, 8 * P))
    assert caller.context.ioctl(caller.proc.task(), SET_IOMMU, 1) == 0
    caller.add_domain(ioas)
    return caller, ioas


def _unmap(caller: Caller, iova: int, size: int) -> tuple[str, int]:
    """(errno's name or "0", size afterwards)."""
    try:
        caller.raw(UNMAP_DMA, struct.pack("<IIQQ", 24, 0, iova, size))
        answer = "0"
    except KernelError as error:
        answer = errno_name(error.errno)
    return answer, int.from_bytes(caller.host.peek(ARG + 16, 8), "little")


def test_vfio_8_row_6_both_ends_are_cut(v1: tuple[Caller, int]) -> None:
    caller, ioas = v1
    assert _unmap(caller, 2 * P, 2 * P) == ("0", 2 * P)
    assert caller.areas(ioas) == [(0, 2 * P - 1), (4 * P, 8 * P - 1)]
    assert _unmap(caller, 0, P) == ("0", P)  # no cut below 0
    assert caller.areas(ioas) == [(P, 2 * P - 1), (4 * P, 8 * P - 1)]


def test_vfio_8_1_rows_1_and_2_where_nothing_is_cut(v1: tuple[Caller, int]) -> None:
    caller, ioas = v1
    assert _unmap(caller, 20 * P, P) == ("0", 0)  # row 1: nothing is there
    assert _unmap(caller, 0, 8 * P) == ("0", 8 * P)  # row 2: the end is an end already
    assert caller.areas(ioas) == []


def test_vfio_8_1_row_2_one_byte_is_never_cut_off(v1: tuple[Caller, int]) -> None:
    """A cut behind the first byte is none; the walk then finds an area that sticks out."""
    caller, ioas = v1
    assert _unmap(caller, 0, 1) == ("ENOENT", 0)
    assert caller.areas(ioas) == [(0, 8 * P - 1)]


def test_vfio_8_1_row_3_a_refusing_area(v1: tuple[Caller, int]) -> None:
    caller, ioas = v1
    (area,) = caller.table(ioas).areas.values()
    area.prevent_access = True
    assert _unmap(caller, 2 * P, P) == ("EBUSY", P)
    area.prevent_access = False
    gate = Gate(caller.proc)
    other = Background(lambda: caller.map(ioas, 0x100000, 8 * P))
    assert gate.reached.wait(10)
    assert _unmap(caller, 0x102000, P) == ("EBUSY", P)  # still being mapped
    gate.open()
    other.result()


def test_vfio_8_1_row_4_dma_bufs(v1: tuple[Caller, int]) -> None:
    caller, ioas = v1
    buffer = TestDmaBuf(caller.world, 8)

    def held() -> TestDmaBuf:
        buffer.get()
        return buffer

    caller.proc.files[9] = held
    caller.do(u.iommu_ioas_map_file(flags=7, ioas_id=ioas, fd=9, length=8 * P, iova=0x100000))
    assert _unmap(caller, 0x102000, P) == ("EOPNOTSUPP", P)
    assert _unmap(caller, 0x100000, 8 * P) == ("0", 8 * P)


def test_vfio_8_1_row_5_alignment_and_the_first_cut_stays(v1: tuple[Caller, int]) -> None:
    caller, ioas = v1
    assert _unmap(caller, 4 * P, P + 2048) == ("EINVAL", P + 2048)
    assert caller.areas(ioas) == [(0, 8 * P - 1)]
    assert _unmap(caller, P + 2048, 4 * P - 2048) == ("EINVAL", 4 * P - 2048)
    assert caller.areas(ioas) == [(0, 5 * P - 1), (5 * P, 8 * P - 1)]


def test_vfio_8_1_row_6_pins(v1: tuple[Caller, int]) -> None:
    caller, ioas = v1
    access = caller.access(ioas)
    access.pin_pages(0, P, write=False, task=caller.proc.task())
    assert _unmap(caller, 4 * P, P) == ("EINVAL", P)
    access.unpin_pages(0, P)
    assert _unmap(caller, 4 * P, P) == ("0", P)


def test_vfio_8_1_row_8_pins_and_translations_stay(v1: tuple[Caller, int]) -> None:
    caller, ioas = v1
    (domain,) = caller.domains(ioas)
    before = frames_of(domain, 0, 8 * P)
    assert (caller.pinned_vm, caller.user_pages) == (8, 8)
    assert _unmap(caller, 2 * P, 0) == ("EINVAL", 0)  # only cuts
    assert caller.areas(ioas) == [(0, 2 * P - 1), (2 * P, 8 * P - 1)]
    assert frames_of(domain, 0, 8 * P) == before
    assert (caller.pinned_vm, caller.user_pages) == (8, 8)
    assert _unmap(caller, 0, 8 * P) == ("0", 8 * P)
    caller.quiet()


def test_vfio_8_row_7_what_is_no_range(v1: tuple[Caller, int]) -> None:
    """The first cut is made where the range's end wraps to (as seen on 7.3.4)."""
    caller, ioas = v1
    assert _unmap(caller, 0, 0) == ("EINVAL", 0)
    assert _unmap(caller, 5, ULMAX) == ("EINVAL", ULMAX)  # the cut behind byte 3 is refused
    assert _unmap(caller, 2**64 - P, 2 * P) == ("EOVERFLOW", 0)
    assert caller.areas(ioas) == [(0, P - 1), (P, 8 * P - 1)]


# --- sections 5 to 8: what needs a compat IOAS, and section 10 (core 4.16)


def test_vfio_6_row_3_and_all_that_need_a_compat_ioas(caller: _Caller) -> None:
    """vfio 5 row 3, vfio 7 row 3, vfio 8 row 3: the struct is judged first, then the IOAS is missed."""
    assert [caller.call(SET_IOMMU, n) for n in (1, 3, 2)] == [-errno.ENODEV, -errno.ENODEV, -errno.EINVAL]
    assert caller.call(GET_INFO, bytearray(struct.pack("<I", 15) + bytes(20))) == -errno.EINVAL
    assert caller.call(GET_INFO, bytearray(struct.pack("<I", 16) + bytes(20))) == -errno.ENODEV
    assert caller.call(MAP_DMA, bytearray(struct.pack("<IIQQQ", 32, 4, 0, 0, P))) == -errno.EINVAL
    assert caller.map(0, 0, P) == -errno.ENODEV
    assert caller.unmap(0, 0, flags=4) == (-errno.EINVAL, 0)
    assert caller.unmap(0, 7, flags=2) == (-errno.ENODEV, 7)


def test_vfio_5_row_5_type_1_again(caller: _Caller) -> None:
    caller.set_compat(caller.ioas())
    assert [caller.call(SET_IOMMU, n) for n in (1, 1, 3, 1)] == [0, 0, 0, 0]
    assert caller.context.compat_ioas is not None
    assert caller.context.compat_ioas.io_pagetable.large_pages_disabled


def test_vfio_10_rows_1_to_7(caller: _Caller) -> None:
    def ask(op: int, ioas: int = 0, reserved: int = 0) -> tuple[int, int]:
        b = bytearray(struct.pack("<IIHH", 12, ioas, op, reserved))
        return caller.call(0x3B88, b), struct.unpack("<IIHH", b)[1]

    assert ask(9, 0, 1) == (-errno.EOPNOTSUPP, 0)  # row 1: before the operation is looked at
    assert ask(0, 7) == (-errno.ENODEV, 7)  # row 2
    assert ask(1, 5) == (-errno.ENOENT, 5)  # row 4
    first, second = caller.ioas(), caller.ioas()
    assert ask(1, first) == (0, first)  # row 5
    assert ask(1, second) == (0, second)
    assert ask(0) == (0, second)  # row 3
    assert ask(2) == (0, 0)  # row 6
    assert ask(2) == (0, 0)
    assert ask(0) == (-errno.ENODEV, 0)
    assert ask(3) == (-errno.EOPNOTSUPP, 0)  # row 7


def test_vfio_1_row_2_everything_else_has_a_size(caller: _Caller) -> None:
    assert caller.call(0x3B81, 8) == -errno.EFAULT
    assert caller.call(0x3BFF, 8) == -errno.ENOTTY
    assert caller.call(0xC0003B81, 8) == -errno.EFAULT  # the size is read before the number is found to be wrong


# --- sections 9.1 and 10.1


def test_vfio_9_1_rows_9_and_10_a_group_makes_the_compat_ioas_once(context: Context) -> None:
    compat_ioas_create(context)
    assert [obj.kind for obj in context.objects] == ["IOAS"]
    first = compat_ioas_id(context)
    compat_ioas_create(context)
    assert compat_ioas_id(context) == first
    assert len(context.objects) == 1  # the temporary id was given back
    context.objects.destroy(first)  # an ordinary object
    with _fails(errno.ENODEV):
        compat_ioas_id(context)


def test_vfio_9_1_row_6_no_iommu_mode_and_a_compat_ioas_exclude_each_other(context: Context) -> None:
    compat_ioas_create(context)
    with _fails(errno.EINVAL):
        compat_set_no_iommu(context)
    assert not context.no_iommu_mode


def test_vfio_9_1_row_8_no_iommu_mode_is_for_good(caller: _Caller, context: Context) -> None:
    compat_set_no_iommu(context)
    compat_set_no_iommu(context)
    with _fails(errno.EINVAL):
        compat_ioas_create(context)
    assert len(context.objects) == 0
    # section 10.1
    assert [caller.call(CHECK_EXTENSION, n) for n in (1, 3, 9, 8)] == [0, 0, 0, 1]
    assert [caller.call(SET_IOMMU, n) for n in (1, 3)] == [-errno.EINVAL, -errno.EINVAL]
    assert caller.call(CHECK_EXTENSION, 4) == -errno.ENODEV
    assert caller.call(SET_IOMMU, 8) == (0 if caller.backend.task().capable(17) else -errno.EPERM)
    caller.set_compat(caller.ioas())  # by hand; still the same answers
    assert caller.map(0x1000, 0x1000, P) == 0
    assert [caller.call(CHECK_EXTENSION, n) for n in (1, 3, 9, 4)] == [0, 0, 0, 1]
    assert [caller.call(SET_IOMMU, n) for n in (1, 3)] == [-errno.EINVAL, -errno.EINVAL]


def test_vfio_5_row_1_no_iommu_needs_raw_io(context: Context, caller: _Caller) -> None:
    assert caller.call(SET_IOMMU, 8) == -errno.EINVAL  # vfio 5 row 2
    compat_set_no_iommu(context)
    for capabilities, result in ((1 << CAP_SYS_RAWIO, 0), (~(1 << CAP_SYS_RAWIO), -errno.EPERM)):
        caller.backend.owner.pretended = capabilities
        assert caller.call(SET_IOMMU, 8) == result


def test_the_compat_ioas_is_an_ordinary_object(context: Context) -> None:
    compat_ioas_create(context)
    (ioas,) = context.objects
    assert isinstance(ioas, IOAS)
    assert ioas.io_pagetable.ioas_id == ioas.id
    assert (ioas.users, ioas.wait) == (1, 1)
