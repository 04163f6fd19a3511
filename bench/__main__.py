"""`make bench`: what a call costs, as a ratio to a floor measured in the same minute.

The floor F is a supervisor set up as ours that only finds the file and moves 40 bytes each way (:mod:`bench.floor`).
Absolute figures stand beside the ratios; times of a busy machine are worth little, ratios within one run a lot. A
figure beyond its limit is marked, and with ``--check`` makes the exit status 1. Needs gcc for the loops in C.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
MILLION = 1_000_000
PAIRS = 7


@dataclass(frozen=True)
class Figure:
    """One line: ``value`` in ``unit``, ``ratio`` to what ``to`` names, and the ratio's (or value's) limit."""

    name: str
    value: float
    unit: str = "µs"
    ratio: float | None = None
    to: str = ""
    limit: float | None = None

    @property
    def holds(self) -> bool:
        measured = self.value if self.ratio is None else self.ratio
        return self.limit is None or measured <= self.limit

    def __str__(self) -> str:
        ratio = "" if self.ratio is None else f"{self.ratio:6.2f} × {self.to}"
        limit = "" if self.limit is None else f"≤ {self.limit:g}{'' if self.holds else '   BEYOND'}"
        return f"{self.name:44} {self.value:10.2f} {self.unit:6} {ratio:24} {limit}"


class Loops:
    """The loops in C, compiled once, run natively, under the floor, or under ``iommufd run``."""

    def __init__(self, folder: Path) -> None:
        self.program = folder / "loop"
        subprocess.run(["gcc", "-O2", "-Wall", "-o", self.program, HERE / "loop.c"], check=True)

    def run(self, words: Sequence[str | int], under: Sequence[str] = ()) -> dict[str, float]:
        """Name -> number, as the loop printed them (nanoseconds a call, or bytes)."""
        command = [*under, str(self.program), *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE.parent)
        if done.returncode:
            raise SystemExit(f"bench: {' '.join(command)} ended with {done.returncode}: {done.stderr.strip()[-400:]}")
        return {name: float(number) for name, number in (line.split() for line in done.stdout.splitlines())}

    def ours(self, *words: str | int, machine: str = "default", options: Sequence[str] = ()) -> dict[str, float]:
        return self.run(words, [sys.executable, "-m", "iommufd", "run", "--machine", machine, *options, "--"])

    def floor(self) -> float:
        """F in nanoseconds."""
        return self.run(["call"], [sys.executable, "-m", "bench.floor"])["call"]


def calls(loops: Loops) -> Iterator[Figure]:
    """Single calls. Each run stands between two of the floor, for a machine may be a third faster a second later; the
    median of the runs' ratios."""
    cases: list[tuple[str, Callable[[], dict[str, float]], dict[str, tuple[str, float]]]] = [
        ("alloc", lambda: loops.ours("alloc"), {"alloc": ("IOAS_ALLOC", 2.0), "destroy": ("DESTROY", 2.0)}),
        (
            "map",
            lambda: loops.ours("map"),
            {"map": ("MAP 4 KiB, no domain", 2.0), "unmap": ("UNMAP 4 KiB, no domain", 2.0)},
        ),
        (
            "map-domain",
            lambda: loops.ours("map-domain", machine="mock"),
            {
                "map-domain": ("MAP 4 KiB, mock domain", 2.5),
                "unmap-domain": ("UNMAP 4 KiB, mock domain", 2.5),
            },
        ),
    ]
    floors = [loops.floor()]
    lines: list[Figure] = []
    for _, measure, wanted in cases:
        runs: list[dict[str, float]] = []
        beside: list[float] = []
        for _ in range(PAIRS):
            runs.append(measure())
            floors.append(loops.floor())
            beside.append((floors[-2] + floors[-1]) / 2)
        for key, (name, limit) in wanted.items():
            value = median(run[key] for run in runs)
            ratio = median(run[key] / floor for run, floor in zip(runs, beside, strict=True))
            lines.append(Figure(name, value / 1000, ratio=ratio, to="F", limit=limit))
    yield Figure("floor F: find the file, 40 bytes in, 40 out", median(floors) / 1000)
    yield from lines


def sizes(loops: Loops) -> Iterator[Figure]:
    """What a map costs by the bytes it maps, and by the areas that exist."""
    large = loops.ours("map-large", 100, machine="mock")
    yield Figure("MAP 4 KiB, mock domain", large["map-4k"] / 1000)
    yield Figure(
        "MAP 256 MiB, mock domain",
        large["map-256m"] / 1000,
        ratio=large["map-256m"] / large["map-4k"],
        to="4 KiB",
        limit=2.0,
    )
    few, many = loops.ours("map-areas", 1000, 300), loops.ours("map-areas", MILLION, 300)
    for key, name in (("map-fixed", "MAP FIXED, 10^6 live areas"), ("map-automatic", "MAP automatic, 10^6 live areas")):
        yield Figure(name, many[key] / 1000, ratio=many[key] / few[key], to="10^3 areas", limit=2.5)
    yield Figure("memory of an area, no domain", many["bytes-per-area"], "bytes", limit=500)
    filled = loops.ours("map-areas-domain", 500_000, 300, machine="mock")
    yield Figure("memory of an area, mock domain", filled["bytes-per-area"], "bytes", limit=700)


def dirty(loops: Loops) -> Iterator[Figure]:
    """128 GiB in pages of 4 KiB, one in a hundred dirty at random; the bitmap is 4 MiB. memcpy moves as much between
    two buffers of the program that both were touched before (the source just now, by us)."""
    runs = [loops.ours("dirty", 128, machine="mock") for _ in range(3)]
    yield Figure("memcpy of 4 MiB", median(run["memcpy"] for run in runs) / 1000)
    for key, name in (("get-dirty", "GET_DIRTY_BITMAP"), ("get-dirty-no-clear", "GET_DIRTY_BITMAP, NO_CLEAR")):
        value, ratio = median(run[key] for run in runs), median(run[key] / run["memcpy"] for run in runs)
        yield Figure(f"{name} of 128 GiB", value / 1000, ratio=ratio, to="memcpy", limit=20)


def copies(loops: Loops) -> Iterator[Figure]:
    """ACCESS_RW of 1 MiB of pinned memory, against the two copies it cannot do without: one in, one out."""
    runs = [loops.ours("rw", 20, machine="mock") for _ in range(5)]
    yield Figure("process_vm_readv + writev of 1 MiB", median(run["process-vm"] for run in runs) / 1000)
    for key, name in (("rw-read", "ACCESS_RW, reads 1 MiB"), ("rw-write", "ACCESS_RW, writes 1 MiB")):
        value, ratio = median(run[key] for run in runs), median(run[key] / run["process-vm"] for run in runs)
        yield Figure(name, value / 1000, ratio=ratio, to="readv + writev", limit=1 / 0.8)


def busy(loops: Loops) -> Iterator[Figure]:
    """Single calls while a device model in Python computes all the time, in a thread of the supervisor."""
    command = [sys.executable, "-m", "bench.busy"]
    alone = [loops.run(["alloc"], [*command, "idle"]) for _ in range(3)]
    beside = [loops.run(["alloc"], [*command, "busy"]) for _ in range(3)]
    for key, name in (("alloc", "IOAS_ALLOC"), ("destroy", "DESTROY")):
        floor, value = median(run[key] for run in alone), median(run[key] for run in beside)
        yield Figure(name, floor / 1000)
        yield Figure(f"{name}, beside a busy device", value / 1000, ratio=value / floor, to="alone", limit=10)


def elapsed(command: Sequence[str], times: int = 11) -> float:
    """The median wall time of ``command`` in milliseconds, after a first run that is not counted."""
    taken = []
    for _ in range(times + 1):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        taken.append((time.perf_counter() - start) * 1000)
    return median(taken[1:])


def starting(folder: Path) -> Iterator[Figure]:
    """As an installed package starts: its modules are byte code already."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = str(folder / "bytecode")
    bare = elapsed([sys.executable, "-c", "pass"])
    yield Figure(
        "import iommufd, over bare python", elapsed([sys.executable, "-c", "import iommufd"]) - bare, "ms", limit=80
    )
    true = elapsed(["true"])
    ours = elapsed([sys.executable, "-m", "iommufd", "run", "--", "true"])
    yield Figure("iommufd run -- true, over true", ours - true, "ms", limit=250)


def pin_tracking(loops: Loops) -> Iterator[Figure]:
    """What a program that allocates a lot pays for munmap and friends being watched."""
    alone = loops.run(["memory", 2000])
    watched, free = loops.ours("memory", 2000), loops.ours("memory", 2000, options=["--no-pin-tracking"])
    for key in alone:
        yield Figure(f"{key}, alone", alone[key] / 1000)
        yield Figure(f"{key}, pins tracked", watched[key] / 1000, ratio=watched[key] / alone[key], to="alone")
        yield Figure(f"{key}, --no-pin-tracking", free[key] / 1000, ratio=free[key] / alone[key], to="alone")


def client() -> Iterator[Figure]:
    """The Python client, in process."""
    from bench.client_bench import figures

    yield from figures()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 if a figure is beyond its limit")
    parser.add_argument("part", nargs="*", help="calls, sizes, dirty, copies, busy, starting, pins, client")
    options = parser.parse_args(argv)
    beyond = 0
    with tempfile.TemporaryDirectory(prefix="iommufd-bench-") as folder:
        loops = Loops(Path(folder))
        parts: dict[str, Callable[[], Iterator[Figure]]] = {
            "calls": lambda: calls(loops),
            "sizes": lambda: sizes(loops),
            "dirty": lambda: dirty(loops),
            "copies": lambda: copies(loops),
            "busy": lambda: busy(loops),
            "starting": lambda: starting(Path(folder)),
            "pins": lambda: pin_tracking(loops),
            "client": client,
        }
        for name, part in parts.items():
            if options.part and name not in options.part:
                continue
            print(f"\n{name}")
            for figure in part():
                beyond += not figure.holds
                print(f"  {figure}", flush=True)
    print(f"\n{beyond} figure(s) beyond their limit")
    return 1 if beyond and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
