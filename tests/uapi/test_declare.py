"""Declared structs: layout, packing, construction, the view of an older release."""

from __future__ import annotations

import ctypes
import inspect
import re
import struct as _struct
import time
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iommufd.uapi import iommufd, iommufd_test, vfio
from iommufd.uapi.declare import IO, Struct, array, field, release, show_symbols, struct, u8, u16, u32, u64

ALL = sorted(
    {
        v
        for module in (iommufd, iommufd_test, vfio)
        for v in vars(module).values()
        if inspect.isclass(v) and issubclass(v, Struct) and v is not Struct
    },
    key=lambda s: s.__name__,
)


@struct(since="6.2")
class sample(Struct):
    """struct sample { __u8 a; __u32 b; __u16 __reserved; __u64 c; __u8 d[3]; };"""

    a: u8
    b: u32
    reserved: u16
    c: u64 = field(since="6.7")
    d: Annotated[bytes, array("u8", 3)] = field(since="6.7")


def test_layout_is_the_natural_one() -> None:
    assert [(f.name, f.c_name, f.offset, f.size) for f in sample.FIELDS] == [
        ("a", "a", 0, 1),
        ("b", "b", 4, 4),
        ("reserved", "__reserved", 8, 2),
        ("c", "c", 16, 8),
        ("d", "d", 24, 3),
    ]
    assert (sample.SIZE, sample.ALIGN) == (32, 8)


def test_pack_and_unpack() -> None:
    one = sample(a=1, b=2, c=3, d=b"xyz")
    assert one.pack() == _struct.pack("<B3xIH6xQ3s5x", 1, 2, 0, 3, b"xyz")
    assert sample.unpack(one.pack()) == one


def test_a_short_buffer_reads_as_if_zeros_followed() -> None:
    whole = sample(a=1, b=2, c=0x1122334455667788).pack()
    assert sample.unpack(whole[:18]) == sample(a=1, b=2, c=0x7788)
    assert sample.unpack(b"") == sample()
    assert sample.unpack(memoryview(whole)[:5]) == sample(a=1, b=2)


def test_a_long_buffer_is_cut() -> None:
    assert sample.unpack(bytearray(b"\1" + bytes(99))) == sample(a=1)


def test_unknown_names_and_values_that_do_not_fit_are_refused() -> None:
    with pytest.raises(TypeError, match="nope"):
        sample(nope=1)
    with pytest.raises(AttributeError):
        sample().nope = 1  # type: ignore[attr-defined]  # wrong on purpose
    with pytest.raises(_struct.error):
        sample(a=256).pack()


def test_a_derived_struct_has_its_own_code() -> None:
    """Whichever of the two is used first."""

    @struct(since="6.2", size=16)
    class head(Struct):
        size: u32
        last: u32 = field(offset=12)

    @struct(since="6.2", size=16)
    class arm(head):
        first: u32 = field(offset=4)
        second: u32

    assert head(size=1, last=2).pack() == _struct.pack("<I8xI", 1, 2)
    assert arm.unpack(bytes(range(16))).pack() == bytes(range(16))
    assert arm(second=3).last == 0
    assert head.unpack(arm(size=9, second=3).pack()) == head(size=9)


def test_an_older_release_knew_a_shorter_struct() -> None:
    assert sample.size_in((6, 1)) == 0
    assert sample.size_in((6, 2)) == 12
    assert sample.size_in((6, 6, 30)) == 12
    assert sample.size_in((6, 7)) == 32


@pytest.mark.parametrize(
    ("cls", "sizes"),
    [
        (iommufd.iommu_hwpt_alloc, {"6.5": 0, "6.6": 24, "6.7": 40, "6.10": 40, "6.11": 48, "7.3": 48}),
        (iommufd.iommu_hw_info, {"6.6": 32, "6.7": 40, "7.3": 40}),
        (iommufd.iommu_viommu_alloc, {"6.12": 0, "6.13": 24, "6.16": 24, "6.17": 40}),
        (vfio.vfio_device_bind_iommufd, {"6.6": 16, "6.17": 24}),
        (vfio.vfio_device_attach_iommufd_pt, {"6.6": 12, "6.15": 16}),
        (vfio.vfio_device_detach_iommufd_pt, {"6.6": 8, "6.15": 12}),
    ],
)
def test_structs_that_grew(cls: type[Struct], sizes: dict[str, int]) -> None:
    assert {text: cls.size_in(release(text)) for text in sizes} == sizes


def test_members_at_one_place_share_their_value() -> None:
    info = iommufd.iommu_hw_info(in_data_type=2)
    assert info.out_data_type == 2
    info.out_data_type = 3
    assert info.in_data_type == 3
    assert [f.offset for f in info.FIELDS if f.name.endswith("data_type")] == [24, 24]
    assert info.pack()[24] == 3


def test_repr_reads_like_c() -> None:
    text = repr(iommufd.iommu_ioas_map(size=40, flags=0x83, user_va=0x7F00, length=4096))
    assert text == (
        "iommu_ioas_map(size=40, flags=FIXED_IOVA|WRITEABLE|0x80, ioas_id=0, reserved=0, "
        "user_va=0x7f00, length=4096, iova=0x0)"
    )


def test_symbols() -> None:
    assert show_symbols(iommufd.iommufd_ioas_map_flags, 0) == "0"
    assert show_symbols(iommufd.iommufd_ioas_map_flags, 5) == "FIXED_IOVA|READABLE"
    assert show_symbols(iommufd.iommufd_option_ops, 1) == "GET"
    assert show_symbols(iommufd.iommufd_option_ops, 77) == "0x4d"


def test_releases() -> None:
    assert release("6.18.3") == (6, 18, 3)
    assert release("7.3.4-rc1+") == (7, 3, 4)
    assert (6, 9) < release("6.18") <= release("6.18.3") < (6, 19)
    with pytest.raises(ValueError, match="not a kernel release: 'next'"):
        release("next")


def test_io_numbers() -> None:
    assert IO(ord(";"), 0x85) == 0x3B85 == iommufd.IOMMU_IOAS_MAP


@pytest.mark.parametrize("cls", ALL, ids=lambda c: c.__name__)
def test_ctypes_layout_agrees(cls: type[Struct]) -> None:
    made: Any = cls.ctypes_type()
    assert ctypes.sizeof(made) == cls.SIZE
    assert cls.ctypes_type() is made
    for f in cls.FIELDS:
        if f.union is None:
            assert (getattr(made, f.name).offset, getattr(made, f.name).size) == (f.offset, f.size)


@given(st.sampled_from(ALL), st.data())
def test_bytes_survive_the_round_trip(cls: type[Struct], data: st.DataObject) -> None:
    raw = data.draw(st.binary(min_size=cls.SIZE, max_size=cls.SIZE))
    named = bytearray(cls.SIZE)  # padding between members does not survive
    for f in cls.FIELDS:
        named[f.offset : f.offset + f.size] = raw[f.offset : f.offset + f.size]
    assert cls.unpack(raw).pack() == named


def c_members(text: str) -> list[tuple[str, int | None]]:
    """Member names and array lengths of the C in a docstring (-1: flexible)."""
    found = re.findall(r"(?:__\w+|struct \w+)(?: __user \*| )(\w+)(?:\[(\d*)\])?;", text)
    return [(name, None if not count and f"{name}[" not in text else int(count or -1)) for name, count in found]


@pytest.mark.parametrize("cls", ALL, ids=lambda c: c.__name__)
def test_the_c_in_the_docstring_is_what_is_declared(cls: type[Struct]) -> None:
    text = inspect.getdoc(cls)
    assert text is not None
    shown = [name for name, count in c_members(text)]
    base = cls.__base__
    assert base is not None and issubclass(base, Struct)
    own = [f for f in cls.FIELDS if f not in base.FIELDS]
    declared = list(dict.fromkeys(f.c_name.split(".")[0] for f in own))
    flexible = [name for name, count in c_members(text) if count == -1]  # arrays of structs are no members of ours
    assert sorted(n for n in shown if n not in flexible or n in declared) == sorted(declared)
    for f in own:
        if f.ctype.count:
            assert (f.c_name, f.ctype.count) in c_members(text)


def test_unpacking_is_one_call_of_struct() -> None:
    """Not a benchmark: only far away from what a generic loop over seven members costs on a busy host."""
    raw = iommufd.iommu_ioas_map(size=40).pack()
    unpack = iommufd.iommu_ioas_map.unpack
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(500):
            unpack(raw)
        best = min(best, (time.perf_counter() - start) / 500)
    assert best < 5e-6
