"""What a machine says was left behind: objects, mappings, and who holds their pages."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Iterator

import pytest

from iommufd.client.backends.software import SoftwareBackend
from iommufd.machine.census import MOST_AREAS, amount
from iommufd.machine.machine import Machine
from iommufd.machine.presets import preset

IOAS_ALLOC, MAP, DESTROY, TEST = 0x3B81, 0x3B85, 0x3B80, 0x3BA0
MIB = 1 << 20
P = 4096


class Program:
    """A program with one context open and 1 MiB of memory."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.backend = SoftwareBackend(machine)
        self.fd = self.backend.open("/dev/iommu", os.O_RDWR)
        self.memory = mmap.mmap(-1, MIB)
        self.view = ctypes.c_char.from_buffer(self.memory)
        self.va = ctypes.addressof(self.view)

    def call(self, cmd: int, layout: str, *fields: int) -> tuple[int, ...]:
        data = bytearray(struct.pack("<" + layout, struct.calcsize("<" + layout), *fields))
        self.backend.ioctl(self.fd, cmd, data)
        return struct.unpack("<" + layout, data)

    def ioas(self) -> int:
        return self.call(IOAS_ALLOC, "III", 0, 0)[2]

    def map(self, ioas: int, iova: int, length: int) -> None:
        self.call(MAP, "IIIIQQQ", 7, ioas, 0, self.va, length, iova)

    def left(self) -> list[str]:
        self.backend.close_all()
        return self.machine.leaks()


@pytest.fixture
def program() -> Iterator[Program]:
    machine = preset("mock")
    made = Program(machine)
    yield made
    made.backend.close_all()
    machine.close()


def test_a_program_that_tidies_up_leaves_nothing(program: Program) -> None:
    ioas = program.ioas()
    program.map(ioas, 0x10000, P)
    program.call(DESTROY, "II", ioas)
    assert program.left() == []


def test_a_program_that_opens_and_closes_leaves_nothing(program: Program) -> None:
    assert program.left() == []


def test_a_mapping_is_named_with_its_size_and_origin(program: Program) -> None:
    ioas = program.ioas()
    program.map(ioas, 0x10000, 3 * P)
    assert program.left() == [
        f"IOAS {ioas} was never destroyed",
        f"IOAS {ioas} still maps [0x10000, 0x12fff], 12 KiB of process {os.getpid()} at {program.va:#x}",
    ]


def test_a_mapping_that_a_device_reaches_is_pinned(program: Program) -> None:
    ioas = program.ioas()
    program.call(TEST, "IIIIII48x", 2, ioas, 0, 0, 0)  # MOCK_DOMAIN
    program.map(ioas, 0x1000000, MIB)
    (line,) = [line for line in program.left() if "maps" in line]
    assert line.startswith(f"IOAS {ioas} still maps [0x1000000, 0x10fffff], 1 MiB of process {os.getpid()}")
    assert line.endswith(", pinned for DMA")


def test_a_mapping_pinned_by_an_access_says_so(program: Program) -> None:
    ioas = program.ioas()
    program.map(ioas, 0x10000, 2 * P)
    access = program.call(TEST, "IIIIII48x", 5, ioas, 0, 0, 1)[4]  # CREATE_ACCESS, pins pages
    program.call(TEST, "IIIIIIQQQ24x", 7, access, 0, 0, 0, 0x10000, 2 * P, program.va)  # ACCESS_PAGES
    assert any("pinned by an access (1 time)" in line for line in program.machine.leaks())


def test_many_mappings_are_counted_not_listed(program: Program) -> None:
    ioas = program.ioas()
    for index in range(MOST_AREAS + 3):
        program.map(ioas, 0x10000 + 2 * P * index, P)
    lines = [line for line in program.left() if "maps" in line]
    assert len(lines) == MOST_AREAS + 1
    assert lines[-1] == f"IOAS {ioas} still maps 3 further areas"


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (1, "1 byte"),
        (4097, "4097 bytes"),
        (4096, "4 KiB"),
        (3 << 20, "3 MiB"),
        (1 << 40, "1024 GiB"),
        (2**64, "17179869184 GiB"),
    ],
)
def test_amounts_of_memory(size: int, text: str) -> None:
    assert amount(size) == text
