"""``iommufd replay FILE``: makes the calls of a trace again on a fresh machine, and says which are answered otherwise.

Exit status: 0 when none is, 1 when some are, 2 for wrong arguments or a file that is no (whole) trace.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Iterable, Sequence

from iommufd.observe.trace import TraceError, read_trace


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="iommufd replay",
        description="Make the calls of a trace (`iommufd run --trace FILE`) again, without the program, on a machine "
        "of this process, and compare every answer with the one recorded.",
    )
    made.add_argument("file", help="the trace; - for standard input")
    made.add_argument("--machine", metavar="NAME", help="another machine, or description file, than the trace names")
    made.add_argument("--kernel", metavar="VERSION", help="another release than the trace names, such as 6.6")
    made.add_argument("--most", type=int, default=20, metavar="N", help="differences shown (default: 20)")
    return made


def say(sentence: str) -> None:
    print(f"iommufd replay: {sentence}", file=sys.stderr)


def main(argv: Sequence[str]) -> int:
    options = parser().parse_args(argv)
    try:
        if options.file == "-":
            return run(sys.stdin, options)
        with open(options.file, encoding="utf-8", newline="\n") as source:
            return run(source, options)
    except OSError as error:
        say(f"{error.filename or options.file}: {error.strerror}")
    except (TraceError, UnicodeDecodeError) as error:
        say(f"{options.file}: {error}")
    return 2


def run(source: Iterable[str], options: argparse.Namespace) -> int:
    """Replays one open trace; the exit status."""
    from iommufd.machine.presets import UnknownMachine, preset
    from iommufd.observe.replay import replay

    head, records = read_trace(source)
    name, kernel = options.machine or head.get("machine"), options.kernel or head.get("kernel")
    try:
        machine = preset(str(name), kernel)
    except UnknownMachine:
        say(f"the trace is of machine {name!r}, which has no name here; give its description with --machine FILE")
        return 2
    except ValueError as error:
        say(str(error))
        return 2
    gc.disable()
    with machine:
        report = replay(machine, records)
    for difference in report.differences[: options.most]:
        print(difference)
    if len(report.differences) > options.most:
        print(f"... and {len(report.differences) - options.most} more")
    calls = "call" if report.calls == 1 else "calls"
    print(f"{report.calls} {calls}: {report.equal} answered as recorded, {len(report.differences)} otherwise")
    for reason, count in report.skipped.most_common():
        print(f"  {count} not compared: {reason}")
    return 0 if report.ok else 1
