"""What the engine itself costs, without interposition: ``python -m bench.engine_bench``.

Ioctls are dispatched in this process and the struct is handed over as bytes, so a figure is dispatch, checks,
bookkeeping, pinning and the domain's page table. Memory is this process's own: pinning asks the real /proc. Medians of
single calls.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import mmap
import os
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

from iommufd.engine import ioas as engine_ioas
from iommufd.engine.context import Context
from iommufd.engine.dispatch import build_table
from iommufd.engine.ioas import IOAS
from iommufd.engine.world import World
from iommufd.iommu.extent_domain import ExtentDomain
from iommufd.memory.accounting import Process
from iommufd.memory.proc import ProcHost
from iommufd.memory.space import AddressSpace
from iommufd.uapi import iommufd as u

if TYPE_CHECKING:
    from iommufd.engine.file import File
    from iommufd.engine.io_pagetable import IOPagetable
    from iommufd.memory.hostfile import HostFile
    from iommufd.uapi.declare import Struct

P = 4096
BASE = 1 << 32
ALLOC, MAP, UNMAP = 0x3B81, 0x3B85, 0x3B86
BUFFER = 256 << 20


class BenchTask:
    """This process, with the struct of the ioctl in ``struct``."""

    def __init__(self, world: World) -> None:
        self.tid = os.getpid()
        self.space = AddressSpace(world.physical, ProcHost(self.tid))
        self.process = Process(self.tid, world.physical.user(os.getuid()), self.space)
        self.struct = b""

    def read_upto(self, addr: int, count: int) -> bytes:
        return self.struct[:count]

    def read(self, addr: int, count: int) -> bytes:
        return self.struct[:count]

    def read_into(self, addr: int, buffer: bytearray | memoryview) -> None:
        buffer[:] = self.struct[: len(buffer)]

    def write_upto(self, addr: int, data: bytes | bytearray | memoryview) -> int:
        self.struct = bytes(data)
        return len(data)

    def write(self, addr: int, data: bytes | bytearray | memoryview) -> None:
        self.struct = bytes(data)

    def capable(self, capability: int) -> bool:
        return True

    def file(self, fd: int) -> File | HostFile:
        raise AssertionError("no descriptor is passed here")

    def reserve_fd(self, cloexec: bool) -> int:
        raise AssertionError("no descriptor is made here")

    def install_fd(self, fd: int, file: File) -> None:
        raise AssertionError("no descriptor is made here")

    def release_fd(self, fd: int) -> None:
        raise AssertionError("no descriptor is made here")


class Engine:
    """A world, a context, one IOAS, and memory to map."""

    def __init__(self, *, domain: bool = False) -> None:
        self.world = World()
        self.world.table = build_table(engine_ioas.ROWS, self.world.kernel)
        self.context = Context(self.world)
        self.task = BenchTask(self.world)
        self.memory = mmap.mmap(-1, BUFFER, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.view = ctypes.c_char.from_buffer(self.memory)
        self.va = ctypes.addressof(self.view)
        self.call(ALLOC, u.iommu_ioas_alloc(size=12))
        self.ioas = u.iommu_ioas_alloc.unpack(self.task.struct).out_ioas_id
        if domain:
            self.table.add_domain(ExtentDomain(0xFFFF_FFFF_FFFF_F000))

    @property
    def table(self) -> IOPagetable:
        found = self.context.objects.get(self.ioas, IOAS)
        self.context.objects.put(found)
        assert isinstance(found, IOAS)
        return found.io_pagetable

    def call(self, number: int, struct: Struct) -> float:
        """Seconds that one ioctl took."""
        self.task.struct = struct.pack()
        begin = perf_counter()
        self.context.ioctl(self.task, number, 0x1000)
        return perf_counter() - begin

    def map(self, iova: int | None, length: int = P, offset: int = 0) -> float:
        flags = 6 if iova is None else 7
        va = self.va + offset
        return self.call(
            MAP, u.iommu_ioas_map(size=40, flags=flags, ioas_id=self.ioas, user_va=va, length=length, iova=iova or 0)
        )

    def unmap(self, iova: int, length: int = P) -> float:
        return self.call(UNMAP, u.iommu_ioas_unmap(size=24, ioas_id=self.ioas, iova=iova, length=length))

    def fill(self, count: int) -> None:
        """``count`` areas of one page, every second page of IOVA free."""
        for i in range(count):
            self.map(BASE + i * 2 * P, offset=i * P % BUFFER)

    def close(self) -> None:
        table = self.table
        for domain in list(table.domains):
            table.remove_domain(domain)
        self.context.put()
        del self.view
        self.memory.close()


Line = tuple[str, float, str]


def pairs(engine: Engine, rounds: int, where: Callable[[int], int | None], length: int = P) -> tuple[float, float]:
    """Median µs of a map and of the unmap of the same range."""
    maps: list[float] = []
    unmaps: list[float] = []
    for i in range(rounds):
        iova = where(i)
        maps.append(engine.map(iova, length))
        if iova is None:
            iova = u.iommu_ioas_map.unpack(engine.task.struct).iova
        unmaps.append(engine.unmap(iova, length))
    return median(maps) * 1e6, median(unmaps) * 1e6


def single(domain: bool, rounds: int) -> Iterator[Line]:
    name = "with a domain" if domain else "without a domain"
    engine = Engine(domain=domain)
    engine.fill(1000)
    small = pairs(engine, rounds, lambda i: BASE + ((i * 37) % 1000 * 2 + 1) * P)
    yield f"MAP 4 KiB {name}", small[0], "µs"
    yield f"UNMAP 4 KiB {name}", small[1], "µs"
    large = pairs(engine, rounds // 4, lambda i: 1 << 40, BUFFER)
    yield f"MAP 256 MiB {name}", large[0], "µs"
    yield f"UNMAP 256 MiB {name}", large[1], "µs"
    engine.close()


def hole(count: int, i: int) -> int:
    """The IOVA of one of ``count`` holes, a different one each time."""
    return BASE + ((i * 7919) % count * 2 + 1) * P


def scale(counts: tuple[int, ...], rounds: int) -> Iterator[Line]:
    for count in counts:
        engine = Engine()
        engine.fill(count)
        fixed = pairs(engine, rounds, partial(hole, count))
        chosen = pairs(engine, rounds, lambda i: None)
        for low in range(P, BASE, 1 << 30):  # the low end is full: the search must pass all areas
            engine.map(low, min(1 << 30, BASE - low))
        passed = pairs(engine, rounds, lambda i: None, 4 * P)
        yield f"MAP FIXED beside {count} areas", fixed[0], "µs"
        yield f"MAP automatic beside {count} areas", chosen[0], "µs"
        yield f"MAP automatic behind {count} areas", passed[0], "µs"
        yield f"UNMAP beside {count} areas", fixed[1], "µs"
        engine.close()


def footprint(domain: bool, count: int) -> Iterator[Line]:
    engine = Engine(domain=domain)
    engine.fill(100)
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for i in range(count):
        engine.map((1 << 40) + i * 2 * P, offset=i * P % BUFFER)
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    engine.close()
    yield f"memory of an area {'with' if domain else 'without'} a domain", used / count, "bytes"


def lines(million: int, rounds: int) -> Iterator[Line]:
    for domain in (False, True):
        yield from single(domain, rounds)
    yield from scale((1000, million), rounds)
    for domain in (False, True):
        yield from footprint(domain, 20_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--areas", type=int, default=1_000_000, help="the large number of live areas")
    parser.add_argument("--rounds", type=int, default=4000)
    options = parser.parse_args()
    gc.disable()  # as the supervisor does
    for name, value, unit in lines(options.areas, options.rounds):
        print(f"{name:44} {value:10.2f} {unit}", flush=True)


if __name__ == "__main__":
    main()
