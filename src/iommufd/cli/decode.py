"""``iommufd decode FILE``: prints a trace as strace would, or counts its calls.

Exit status: 0, 1 when the file is not a (whole) trace, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from statistics import median
from typing import TextIO

from iommufd.observe.format import command_of, show_call, struct_of
from iommufd.observe.record import Record
from iommufd.observe.trace import TraceError, read_trace
from iommufd.uapi.iommufd_test import iommu_test_cmd, iommu_test_op


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="iommufd decode", description="Print a file written by `iommufd run --trace FILE` as strace would."
    )
    made.add_argument("file", help="the trace; - for standard input")
    made.add_argument("--failed", action="store_true", help="only calls that failed")
    made.add_argument("--pid", type=int, action="append", metavar="N", help="only calls of this process (repeatable)")
    made.add_argument("--time", action="store_true", help="seconds since the start before, duration behind each call")
    made.add_argument("--summary", action="store_true", help="a table of calls: count, errors, median µs")
    return made


def select(records: Iterable[Record], failed: bool, pids: list[int] | None) -> Iterator[Record]:
    for record in records:
        if (not failed or record.errno) and (not pids or record.pid in pids):
            yield record


def lines(records: Iterable[Record], times: bool) -> Iterator[str]:
    """One line per call; the process is named as soon as there is a second one, as strace -f does."""
    first: int | None = None
    for record in records:
        if first is None:
            first = record.pid
        text = show_call(record) if record.pid in (first, 0) else f"[pid {record.pid}] {show_call(record)}"
        if times:
            took = "" if record.us is None else f" <{record.us / 1e6:.6f}>"
            text = f"{record.time:12.6f} {text}{took}"
        yield text


def name_of(record: Record) -> str:
    """What the summary counts under: the command, with the op of the test command, or the system call."""
    if record.call != "ioctl":
        return record.call
    name, cls, _ = command_of(record.number, record.kind)
    if cls is iommu_test_cmd and record.raw:
        arm = struct_of(record.number, record.kind, record.raw)
        if arm is not cls:
            op = int.from_bytes(record.raw[4:8], "little")
            return f"{name}({iommu_test_op(op).name})"
    return name or f"ioctl {record.number:#x}"


def summary(records: Iterable[Record]) -> list[str]:
    """The aligned table, most frequent first, and a line of totals."""
    counts: dict[str, int] = {}
    errors: dict[str, int] = {}
    times: dict[str, list[float]] = {}
    for record in records:
        name = name_of(record)
        counts[name] = counts.get(name, 0) + 1
        errors[name] = errors.get(name, 0) + bool(record.errno)
        if record.us is not None:
            times.setdefault(name, []).append(record.us)
    rows = [("call", "count", "errors", "median µs")]
    for name in sorted(counts, key=lambda n: (-counts[n], n)):
        middle = f"{median(times[name]):.1f}" if name in times else "-"
        rows.append((name, str(counts[name]), str(errors[name] or ""), middle))
    rows.append(("total", str(sum(counts.values())), str(sum(errors.values()) or ""), ""))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(row[c].rjust(widths[c]) for c in (1, 2, 3))]).rstrip() for row in rows
    ]


def run(source: TextIO, out: TextIO, options: argparse.Namespace) -> None:
    """TraceError when the source is not a trace; what was read before a broken line is printed all the same."""
    _, records = read_trace(source)
    chosen = select(records, options.failed, options.pid)
    for line in summary(chosen) if options.summary else lines(chosen, options.time):
        out.write(line + "\n")


def main(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    try:
        standard = options.file == "-"
        with nullcontext(sys.stdin) if standard else open(options.file, encoding="utf-8", newline="\n") as source:
            run(source, sys.stdout, options)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough; nothing more may be written at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except (TraceError, OSError, UnicodeDecodeError) as error:
        reason = f"{options.file}: {error.strerror}" if isinstance(error, OSError) else f"{options.file}: {error}"
        sys.stderr.write(f"iommufd decode: {reason}\n")
        return 1
    return 0
