"""What memory costs: pins, counts, the interval index, copies. Median µs a call, seconds altogether.

`python -m bench.memory_bench` prints a table; ratios need no floor of their own, they compare two rows of one run.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

from iommufd.memory.extents import read_extents, unpin_extents, write_extents
from iommufd.memory.frames import Extents, FrameAllocator
from iommufd.memory.intervals import ADDRESS_LAST, IntervalIndex
from iommufd.memory.physical import Physical
from iommufd.memory.proc import ProcHost
from iommufd.memory.space import AddressSpace

P = 4096
MILLION = 1_000_000

CHILD = """
import ctypes, mmap, os, sys
areas = [mmap.mmap(-1, 1 << 40, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)]
fd = os.memfd_create("bench")
os.ftruncate(fd, 1 << 30)
areas.append(mmap.mmap(fd, 1 << 30))
for area in areas:
    print(ctypes.addressof(ctypes.c_char.from_buffer(area)), flush=True)
sys.stdin.read()
"""


def median(call: Callable[[], object], calls: int = 2000, rounds: int = 9) -> float:
    """Median over rounds of µs per call."""
    times: list[float] = []
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - begin) / calls)
    return statistics.median(times) * 1e6


def each(items: list[int], call: Callable[[int], object]) -> float:
    """µs per item of one pass."""
    begin = time.perf_counter()
    for item in items:
        call(item)
    return (time.perf_counter() - begin) / len(items) * 1e6


def show(what: str, value: float, unit: str = "µs", note: str = "") -> None:
    print(f"{what:<58}{value:>9.2f} {unit}  {note}".rstrip())


def pins(space: AddressSpace, private: int, shared: int) -> None:
    """Pin and unpin a range known already, of another process."""

    def cycle(va: int, npages: int) -> Callable[[], None]:
        return lambda: unpin_extents(space.pin(va, npages, True))

    def first(va: int, npages: int) -> Callable[[], None]:
        def call() -> None:
            unpin_extents(space.pin(va, npages, True))
            space.unmap(va, va + npages * P)

        return call

    kept: list[Extents] = [space.pin(private + (1 << 38), 1, True), space.pin(shared, 1, True)]
    small = median(cycle(private, 1))
    show("pin + unpin 4 KiB", small)
    for size, name in ((256 << 20, "256 MiB"), (1 << 40, "1 TiB")):
        value = median(cycle(private, size // P))
        show(f"pin + unpin {name}", value, note=f"{value / small:.2f} × 4 KiB")
    show("pin + unpin 4 KiB of a memfd", median(cycle(shared, 1)))
    show("query of a VMA", median(lambda: space.host.query(private)))
    show("first pin in a VMA + unmap", median(first(private, 16), 500))
    show("unmap where nothing is pinned (has_pins)", median(lambda: space.has_pins(1 << 32, 1 << 33)))
    for extents in kept:
        unpin_extents(extents)


def copies(space: AddressSpace, va: int) -> None:
    extents = space.pin(va, 16, True)
    data = b"x" * 40
    show("read 40 bytes under protections", median(lambda: space.read(va, 40)))
    show("write 40 bytes under protections", median(lambda: space.write(va, data)))
    show("device reads 40 bytes", median(lambda: read_extents(extents, 4090, 40)))
    show("device writes 40 bytes", median(lambda: write_extents(extents, 4090, data)))
    unpin_extents(extents)


def rescue(space: AddressSpace, va: int) -> None:
    size = 64 << 20
    for touched in (0, size):
        extents = space.pin(va, size // P, True)
        for at in range(0, touched, 1 << 20):
            space.write(va + at, b"\1" * (1 << 20))
        begin = time.perf_counter()
        space.unmap(va, va + size)
        show(f"rescue 64 MiB, {touched >> 20} MiB of it touched", (time.perf_counter() - begin) * 1e3, "ms")
        unpin_extents(extents)


def counts() -> None:
    """A million single-page pins in a chunk of 4 GiB."""
    chunk = FrameAllocator().chunk("bench", 1 << 20)
    chunk.hold()
    order = random.Random(1).sample(range(1 << 20), 1 << 20)
    show("pin a page, random order, 10^6 times", each(order, lambda index: chunk.pin(index, 1)))
    show("unpin a page, random order, 10^6 times", each(order, lambda index: chunk.unpin(index, 1)))
    ascending = list(range(1 << 20))
    show("pin a page, ascending, 10^6 times", each(ascending, lambda index: chunk.pin(index, 1)))
    for index in order[: 1 << 19]:
        chunk.unpin(index, 1)
    show("pinned pages in a range of 16, 2^19 steps", median(lambda: chunk.pinned_in(12345, 12361), 200))

    def most() -> None:
        chunk.pin(5, (1 << 20) - 10)
        chunk.unpin(5, (1 << 20) - 10)

    show("pin + unpin nearly all, 2^19 steps", median(most, 200))


def resident() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * P


def index(entries: int) -> None:
    """IntervalIndex with ``entries`` intervals of 4 KiB at a stride of 8 KiB."""
    before = resident()
    areas: IntervalIndex[None] = IntervalIndex()
    for k in range(entries):
        areas.insert(k * 2 * P, k * 2 * P + P - 1, None)
    size = (resident() - before) / entries
    generator = random.Random(2)
    some = [generator.randrange(entries) * 2 * P for _ in range(20000)]

    def replace(first: int) -> None:
        areas.remove(first)
        areas.insert(first, first + P - 1, None)

    def hole(first: int, length: int) -> tuple[int, int]:
        return next(areas.holes(first, ADDRESS_LAST, length))

    def place(length: int) -> None:
        first, _ = hole(P, length)
        areas.insert(first, first + length - 1, None)

    hole(P, 2 * P)
    name = f"10^{len(str(entries)) - 1} intervals: "
    show(name + "remove + insert, random", each(some, replace), note=f"{size:.0f} bytes an entry" if size > 9 else "")
    show(name + "find, random", each(some, lambda first: areas.find(first + 5)))
    show(name + "lowest hole of 4 KiB", median(lambda: hole(P, P)))
    show(name + "lowest hole of 8 KiB (beyond all)", median(lambda: hole(P, 2 * P)))
    show(name + "hole after a random address", each(some, lambda first: hole(first, P)))
    show(name + "place 4 KiB in the lowest hole", each([P] * min(entries // 2, 20000), place))


def child() -> Iterator[int]:
    process = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdin is not None
    yield process.pid
    yield int(process.stdout.readline())
    yield int(process.stdout.readline())
    process.stdin.close()
    process.wait()
    process.stdout.close()


def main() -> None:
    gc.disable()
    processes = child()
    pid, private, shared = next(processes), next(processes), next(processes)
    space = AddressSpace(Physical(), ProcHost(pid), "child")
    pins(space, private, shared)
    copies(space, private)
    rescue(space, private)
    own = AddressSpace(Physical(), ProcHost(os.getpid()), "own process")
    area = mmap.mmap(-1, P, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    va = ctypes.addressof(ctypes.c_char.from_buffer(area))
    show("own process: pin + unpin 4 KiB", median(lambda: unpin_extents(own.pin(va, 1, True))))
    next(processes, None)
    counts()
    for entries in (1000, MILLION):
        index(entries)


if __name__ == "__main__":
    main()
