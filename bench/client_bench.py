"""What the client costs in process: ``python -m bench.client_bench``, and the part "client" of ``make bench``.

The floor is ``fcntl.ioctl`` on a pipe, the cheapest ioctl Python can make. Every figure is the best of many short
rounds, in turns with the floor: on a busy machine only the best round shows what the code itself costs. Limits are
ratios to the floor, from 25 µs and 12 µs on a machine whose floor is 0.4 µs.
"""

from __future__ import annotations

import argparse
import fcntl
import mmap
import os
import struct
import termios
from collections.abc import Callable, Iterator
from time import perf_counter

import iommufd
from bench.__main__ import Figure
from iommufd.client.buffers import where
from iommufd.testing.mock import APERTURE, MockDevice

PAGE = 4096
ROUNDS = 200
CALLS = 100
MANY = 256
MAP, UNMAP = 0x3B85, 0x3B86


def best(rounds: int, *works: Callable[[], int]) -> list[float]:
    """For each work its best round, in µs for each of the units it says it did; the works take turns."""
    found = [float("inf")] * len(works)
    for _ in range(rounds):
        for i, work in enumerate(works):
            start = perf_counter()
            units = work()
            found[i] = min(found[i], (perf_counter() - start) / units * 1e6)
    return found


class Floor:
    """One ioctl on a pipe."""

    def __init__(self) -> None:
        self._pipe = os.pipe()
        self._buffer = bytearray(4)

    def __call__(self) -> int:
        ioctl, fd, buffer = fcntl.ioctl, self._pipe[0], self._buffer
        for _ in range(CALLS):
            ioctl(fd, termios.FIONREAD, buffer)
        return CALLS


class Mappings:
    """Maps and unmaps in one IOAS, in the ways that are compared."""

    def __init__(self, context: iommufd.Context) -> None:
        self.context = context
        self.ioas = context.alloc_ioas()
        self.memory = mmap.mmap(-1, MANY * PAGE)
        whole = memoryview(self.memory)
        self.pages = [whole[i * PAGE : (i + 1) * PAGE] for i in range(MANY)]
        self.iovas = [APERTURE + 2 * i * PAGE for i in range(MANY)]
        number = self.ioas.id
        self._map = struct.pack("<IIIIQQQ", 40, 7, number, 0, where(self.memory)[0], PAGE, APERTURE)
        self._unmap = struct.pack("<IIQQ", 24, number, APERTURE, PAGE)

    def client(self) -> int:
        ioas, page = self.ioas, self.pages[0]
        for _ in range(CALLS):
            ioas.map(page, APERTURE).unmap()
        return CALLS

    def raw(self) -> int:
        ioctl, fd, map_, unmap = self.context.backend.ioctl, self.context.fileno(), self._map, self._unmap
        for _ in range(CALLS):
            ioctl(fd, MAP, bytearray(map_))
            ioctl(fd, UNMAP, bytearray(unmap))
        return CALLS

    def timed(self, work: Callable[[], object], rounds: int) -> float:
        """The best time of ``work``, which maps MANY pages, in µs a page; unmapping is not counted."""
        found = float("inf")
        for _ in range(rounds):
            start = perf_counter()
            work()
            found = min(found, (perf_counter() - start) / MANY * 1e6)
            self.ioas.unmap_all()
        return found

    def one_by_one(self) -> None:
        for page, iova in zip(self.pages, self.iovas, strict=True):
            self.ioas.map(page, iova)

    def all_at_once(self) -> None:
        self.ioas.map_many(self.pages, self.iovas)


def figures(kernel: bool = False) -> Iterator[Figure]:
    """All lines; on the kernel (which has no floor of ours to keep) only map_many has a limit."""
    with iommufd.open(None if kernel else "mock", "kernel" if kernel else None) as context:
        work = Mappings(context)
        floor, client, raw = best(ROUNDS, Floor(), work.client, work.raw)
        limits = (None, None) if kernel else (25 / 0.4, 12 / 0.4)
        yield Figure("floor P: fcntl.ioctl on a pipe", floor)
        yield Figure("map + unmap 4 KiB, client", client, ratio=client / floor, to="P", limit=limits[0])
        yield Figure("map + unmap 4 KiB, raw bytes", raw, ratio=raw / floor, to="P", limit=limits[1])
        single, many = float("inf"), float("inf")
        for _ in range(ROUNDS // 10):
            single = min(single, work.timed(work.one_by_one, 2))
            many = min(many, work.timed(work.all_at_once, 2))
        yield Figure("map 4 KiB, one by one", single)
        # a loop of calls is a loop of calls on the kernel: "no slower" within what a clock can tell
        yield Figure("map 4 KiB, map_many", many, ratio=many / single, to="single", limit=1.05 if kernel else 0.6)
        MockDevice(context, work.ioas)
        floor, client, raw = best(ROUNDS, Floor(), work.client, work.raw)
        yield Figure("map + unmap 4 KiB, client, a mock domain", client, ratio=client / floor, to="P")
        yield Figure("map + unmap 4 KiB, raw bytes, a mock domain", raw, ratio=raw / floor, to="P")
        work.pages.clear()


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.client_bench", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kernel", action="store_true", help="on this system's /dev/iommu (a test kernel's)")
    for figure in figures(parser.parse_args().kernel):
        print(figure, flush=True)


if __name__ == "__main__":
    main()
