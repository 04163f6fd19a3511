"""`make oracle-fuzz SEEDS=A-B`: random programs on the real kernel and on the software machine, answer by answer.

Programs are written on this machine from their seeds, played in the oracle VM by one static player, and played here
three ways: while they are written, in process again, and by the same player under ``iommufd run``. A difference is
shrunk to the fewest steps that still differ. At the end: how many programs and calls, which errnos each command gave,
and the matrix of core 11: a long run that missed an errno a program can reach has failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from iommufd.errors import errno_name
from iommufd.testing.subject import struct_of
from tools import kernel_tree, oracle
from tools.fuzz.generate import write
from tools.fuzz.matrix import ENOUGH, Tally
from tools.fuzz.program import IOCTL, Program, answers, encode
from tools.fuzz.stage import play

HERE = Path(__file__).resolve().parent
BATCH = 2000  # programs of one run of the VM
PATIENCE = 1200  # seconds for a batch, which takes about 60
_PLAYER = ("{out}/player", "{out}/programs")


def build_player(folder: Path) -> Path:
    """The static player; needs gcc."""
    target = folder / "player"
    subprocess.run(["gcc", "-O2", "-Wall", "-static", "-o", target, HERE / "player.c"], check=True)
    return target


def on_kernel(programs: Sequence[Program], out: Path) -> dict[int, list[str]]:
    """The answers of the real kernel; ``out`` holds the player."""
    (out / "programs").write_bytes(encode(programs))
    (out / "answers").unlink(missing_ok=True)
    if oracle.boot("/tmp/out/player /tmp/out/programs > /tmp/out/answers", out, timeout=PATIENCE):
        said = answers((out / "answers").read_text()) if (out / "answers").exists() else {}
        last = f"the last one that ended or forked is {list(said)[-1]}" if said else "not one ended"
        raise SystemExit(f"oracle-fuzz: the player did not come to the end of the programs in the VM; {last}")
    return answers((out / "answers").read_text())


def through_the_door(programs: Sequence[Program], out: Path) -> dict[int, list[str]]:
    """The answers of the same player as an unmodified program under ``iommufd run``."""
    found: dict[int, list[str]] = {}
    for grant in sorted({program.grant for program in programs}):
        (out / "programs").write_bytes(encode([program for program in programs if program.grant == grant]))
        command = [sys.executable, "-m", "iommufd", "run", "--machine", "mock@7.3.4"]
        command += ["--grant", grant, "--", *_PLAYER] if grant else ["--", *_PLAYER]
        words = [word.format(out=out) for word in command]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"oracle-fuzz: iommufd run ended with {done.returncode}: {done.stderr[-500:]}")
        found.update(answers(done.stdout))
    return found


def first_difference(kernel: Sequence[str], software: Sequence[str]) -> int | None:
    """The first step whose answers differ; trailing blanks do not count."""
    for number, (theirs, ours) in enumerate(zip(kernel, software, strict=False)):
        if theirs.strip() != ours.strip():
            return number
    return None if len(kernel) == len(software) else min(len(kernel), len(software))


Player = Callable[[Sequence[Program]], dict[int, list[str]]]


def in_process(programs: Sequence[Program]) -> dict[int, list[str]]:
    """The answers of a machine in this process."""
    return {program.seed: play(program) for program in programs}


def shrink(program: Program, out: Path, software: Player) -> tuple[Program, list[str], list[str]]:
    """The fewest steps that still make the kernel and ``software`` differ, with both answers.

    Every round plays all candidates with one step (or a run of steps) less in one VM."""
    best = program
    span = max(len(best.steps) // 2, 1)
    while True:
        candidates: list[Program] = []
        for at in range(0, len(best.steps) - 1, span):
            steps = best.steps[:at] + best.steps[at + span :]
            candidates.append(Program(len(candidates), steps))
        said = on_kernel(candidates, out)
        ours = software(candidates)
        smaller = next(
            (c for c in candidates if first_difference(said.get(c.seed, []), ours.get(c.seed, [])) is not None), None
        )
        if smaller is not None:
            best = smaller
            span = max(min(span, len(best.steps) // 2), 1)
        elif span == 1:
            break
        else:
            span //= 2
    last = Program(0, best.steps)
    return last, on_kernel([last], out)[0], software([last])[0]


class Histogram:
    """Answers by command: how often each errno came."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        self.matrix = Tally()
        self.calls = 0

    def add(self, program: Program, said: Iterable[str]) -> None:
        for step, answer in zip(program.steps, said, strict=False):
            self.calls += 1
            if step.kind != IOCTL:
                continue
            value = struct_of(step.cmd, step.data) if step.address is None else None
            name = f"{step.cmd:#x}" if value is None or isinstance(value, bytes) else type(value).__name__
            word = answer.split()[0] if answer.split() else "0"
            said_word = errno_name(int(word[1:])) if word.startswith("E") else "ok"
            self.counts[name][said_word] += 1
            if value is not None and not isinstance(value, bytes):
                self.matrix.add(value, said_word)

    def __str__(self) -> str:
        lines = []
        for name, counter in sorted(self.counts.items()):
            parts = ", ".join(f"{word} {count}" for word, count in counter.most_common())
            lines.append(f"  {name:32} {parts}")
        return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools.fuzz", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("seeds", help="FIRST-LAST, inclusive")
    parser.add_argument("--steps", type=int, default=60, help="calls of a program (60)")
    parser.add_argument("--no-door", action="store_true", help="do not play under iommufd run as well")
    options = parser.parse_args(argv)
    first, _, last = options.seeds.partition("-")
    seeds = range(int(first), int(last or first) + 1)
    histogram, started = Histogram(), time.monotonic()
    bad: list[tuple[Program, Player]] = []
    kernel_tree.image()
    with tempfile.TemporaryDirectory(prefix="iommufd-fuzz-") as name:
        out = Path(name)
        build_player(out)
        for start in range(seeds.start, seeds.stop, BATCH):
            batch = [write(seed, options.steps) for seed in range(start, min(start + BATCH, seeds.stop))]
            programs = [program for program, _ in batch]
            kernel = on_kernel(programs, out)
            door = {} if options.no_door else through_the_door(programs, out)
            for program, while_written in batch:
                said = kernel.get(program.seed, [])
                histogram.add(program, said)
                others = {"as written": while_written}
                if not options.no_door:
                    others["under iommufd run"] = door.get(program.seed, [])
                for way, ours in others.items():
                    step = first_difference(said, ours)
                    if step is not None:
                        bad.append((program, in_process if way == "as written" else partial(through_the_door, out=out)))
                        shown = program.steps[step] if step < len(program.steps) else "(one more answer than steps)"
                        print(f"seed {program.seed} step {step} {way}: {shown}")
                        print(f"  kernel   {said[step] if step < len(said) else '(nothing)'}")
                        print(f"  software {ours[step] if step < len(ours) else '(nothing)'}")
                        break
            done = min(start + BATCH, seeds.stop) - seeds.start
            print(f"{done} programs, {histogram.calls} steps, {len(bad)} differ, {time.monotonic() - started:.0f} s")
            sys.stdout.flush()
        for program, software in bad[:3]:
            small, theirs, ours = shrink(program, out, software)
            print(f"\nseed {program.seed}, shrunk to {len(small.steps)} steps:")
            for shrunk, there, here in zip(small.steps, theirs, ours, strict=False):
                mark = "  " if there.strip() == here.strip() else "->"
                print(f"{mark} {shrunk}\n     kernel   {there}\n     software {here}")
    print(f"\nanswers of the kernel, seeds {seeds.start}-{seeds.stop - 1}:\n{histogram}")
    print("", *histogram.matrix.lines(), sep="\n")
    print(f"{len(seeds)} programs of {options.steps} steps or a few more: {len(bad)} differ")
    return 1 if bad or (len(seeds) >= ENOUGH and histogram.matrix.missing()) else 0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
