"""`make conformance`: the kernel's own selftest programs, unmodified, through ``iommufd run``.

Builds the programs from a kernel tree on first use (:mod:`tools.kernel_tree`), runs them, and compares what passes with
the committed lists ``tests/conformance/passing-PROGRAM.txt``. A name in a list that does not pass is an error; lists
only grow (``--update`` appends what newly passes). Exit code: 0 all listed names pass, 1 some do not, 2 cannot run.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tools import hugepages, kernel_tree
from tools.selftest_report import Case, Comparison, Report, Verdict, compare, names, read

ROOT = Path(__file__).resolve().parent.parent
LISTS = ROOT / "tests/conformance"
NOBODY = 65534
CAP_IPC_LOCK = 14
MIB = 1 << 20

# Three cases ask for CAP_SYS_RESOURCE (IOMMU_OPTION_RLIMIT_MODE), which ordinary users lack, and root in many a
# container: the machine grants it, so that they are tried everywhere.
GRANTED = "sys_resource"
NEEDS_DEBUGFS = "basic_fail_nth.*"  # root's alone; skipped for an ordinary user on a real kernel

# These pin more than a user's usual RLIMIT_MEMLOCK (8 MiB), and fail for that on a real kernel. Pattern -> bytes.
PINS = {
    "iommufd_dirty_tracking.domain_dirty64M*.get_dirty_bitmap*": 64 * MIB,
    "iommufd_dirty_tracking.domain_dirty128M*.get_dirty_bitmap*": 128 * MIB,
}


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools.conformance", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--program", action="append", choices=kernel_tree.PROGRAMS, help="only this program")
    parser.add_argument("--fixture", action="append", metavar="NAME", help="only this fixture (repeatable)")
    parser.add_argument("--machine", default="mock", help="the machine to run on (default: mock)")
    parser.add_argument("--as-nobody", action="store_true", help="as root: run everything as uid 65534")
    parser.add_argument("--set-hugepages", action="store_true", help="as root: raise vm.nr_hugepages for the run")
    parser.add_argument("--update", action="store_true", help="append newly passing names to the lists")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds a program may take (600)")
    parser.add_argument("-v", "--verbose", action="store_true", help="also show why unlisted cases fail")
    return parser.parse_args(argv)


def case_names(program: Path, fixtures: Sequence[str]) -> list[str]:
    """All case names of a program, in its order, from its ``-l`` table."""
    text = subprocess.run([program, "-l"], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    return listed(text.stdout + text.stderr, fixtures)


def listed(table: str, fixtures: Sequence[str] = ()) -> list[str]:
    """Reads kselftest's ``-l`` table: three columns, blocks of one fixture, variants × tests."""
    result: list[str] = []
    block: list[tuple[str, str, str]] = []

    def flush() -> None:
        fixture = next((row[0] for row in block if row[0]), "")
        variants = [row[1] for row in block if row[1]] or [""]
        for variant in variants:
            for _, _, test in block:
                if test and (not fixtures or fixture in fixtures):
                    result.append(".".join(part for part in (fixture, variant, test) if part))
        block.clear()

    for line in table.splitlines():
        if line.startswith("---"):
            flush()
        elif not line.startswith("#"):
            words = line.split()
            if not line[:1].isspace():  # fixture [variant] [test]
                variant, test = (words[1], words[2]) if len(words) == 3 else ("", words[1] if len(words) == 2 else "")
                block.append((words[0], variant, test))
            elif len(words) == 2:
                block.append(("", words[0], words[1]))
            elif words:  # one column: which one, its position tells
                at = len(line) - len(line.lstrip())
                block.append(("", "", words[0]) if at > 30 else ("", words[0], ""))
    flush()
    return result


class Progress:
    """One line that counts cases: rewritten in place on a terminal, a line every 50 cases elsewhere."""

    def __init__(self, program: str, total: int) -> None:
        self.program, self.total, self.count, self.bad = program, total, 0, 0
        self.terminal = sys.stderr.isatty()

    def case(self, case: Case) -> None:
        self.count += 1
        self.bad += case.verdict is not Verdict.PASS
        if self.terminal:
            line = f"{self.program} {self.count}/{self.total}, {self.bad} not passed  {case.name}"
            print(f"\r\x1b[K{line[: shutil.get_terminal_size().columns - 1]}", end="", file=sys.stderr, flush=True)
        elif self.count % 50 == 0:
            print(f"    {self.program} {self.count}/{self.total}", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def execute(
    command: Sequence[str | Path], progress: Progress, timeout: float, uid: int | None, cwd: Path
) -> tuple[Report, int, list[str]]:
    """Runs one program to its end; returns its report, exit code and the last lines it printed."""
    environment = dict(os.environ)
    if uid is not None:
        environment["HOME"] = str(cwd)
    process = subprocess.Popen(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=cwd,
        env=environment,
        user=uid,
        group=uid,
        extra_groups=None if uid is None else (),
    )
    timer = threading.Timer(timeout, process.kill)
    timer.start()
    report, tail = Report(), []
    output = process.stdout
    assert output is not None

    def lines() -> Iterator[str]:
        for line in output:
            tail.append(line.rstrip("\n"))
            del tail[:-20]
            yield line

    try:
        for item in read(lines()):
            if isinstance(item, int):
                report.planned = item
            else:
                report.cases[item.name] = item
                progress.case(item)
        code = process.wait()
    finally:
        timer.cancel()
        progress.end()
        if process.poll() is None:
            process.kill()
            process.wait()
    return report, code, tail


@contextmanager
def nobodys_copy(programs: dict[str, Path]) -> Iterator[tuple[Path, dict[str, Path], Path]]:
    """A folder uid 65534 can read: the distribution's Python with the package installed, and the programs."""
    with tempfile.TemporaryDirectory(prefix="iommufd-nobody-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        base = "/usr/bin/python3" if Path("/usr/bin/python3").exists() else sys.executable
        kernel_tree.say(f"installing the package for uid {NOBODY} with {base}")
        kernel_tree.run([base, "-m", "venv", folder / "venv"])
        kernel_tree.run([folder / "venv/bin/python", "-m", "pip", "install", "-q", ROOT])
        copies = {program: Path(shutil.copy(path, folder / program)) for program, path in programs.items()}
        home = folder / "home"
        home.mkdir()
        os.chown(home, NOBODY, NOBODY)
        yield folder / "venv/bin/python", copies, home


def table(reports: dict[str, Report], seconds: dict[str, float]) -> str:
    """Passes, fails and skips of every fixture."""
    rows: list[tuple[str, ...]] = [("fixture", "pass", "fail", "skip", "cases")]
    for program, report in reports.items():
        total = [case.verdict for case in report.cases.values()]
        counts: dict[str, list[Verdict]] = {}
        for case in report.cases.values():
            counts.setdefault(case.fixture, []).append(case.verdict)
        for fixture, verdicts in [*counts.items(), (f"{program}, {seconds[program]:.1f} s", total)]:
            numbers = (*(verdicts.count(verdict) for verdict in Verdict), len(verdicts))
            rows.append((fixture, *map(str, numbers)))
        rows.append(("", "", "", "", ""))
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"{row[0]:<{width}}" + "".join(f"{cell:>7}" for cell in row[1:]) for row in rows).rstrip()


def explain(title: str, chosen: Sequence[str], report: Report) -> None:
    """Prints why each of the cases failed, in the program's own words."""
    if not chosen:
        return
    print(f"\n{title}:")
    for name in chosen:
        case = report.cases.get(name)
        print(f"  {case.verdict.value if case else 'missing':<8}{name}")
        for line in case.lines[-6:] if case else []:
            print(f"          {line}")


def update(path: Path, gained: Sequence[str], order: Sequence[str]) -> None:
    """Adds names to a list, which keeps the program's order; nothing is ever removed."""
    text = path.read_text() if path.exists() else ""
    kept = {*names(text), *gained}
    comments = [line for line in text.splitlines() if line.startswith("#")] or [
        f"# Cases of the kernel's selftest program `{path.stem.removeprefix('passing-')}` that pass under",
        "# `iommufd run --machine mock`. The list only grows: make conformance ARGS=--update",
    ]
    known = [name for name in order if name in kept]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*comments, *known, *sorted(kept - set(order))]) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    root = os.geteuid() == 0
    if options.as_nobody and not root:
        print(f"--as-nobody needs root to become uid {NOBODY}; an ordinary user runs without it", file=sys.stderr)
        return 2
    try:
        programs = {
            name: path
            for name, path in kernel_tree.selftests().items()
            if name in (options.program or kernel_tree.PROGRAMS)
        }
        with ExitStack() as stack:
            return run_all(options, programs, stack, ordinary=options.as_nobody or not root)
    except kernel_tree.CannotBuild as failure:
        print(f"conformance: {failure}", file=sys.stderr)
        return 2


def capable(capability: int) -> bool:
    """Whether this process, and so what it starts, has the capability."""
    effective = next(line for line in _text(Path("/proc/self/status")).splitlines() if line.startswith("CapEff:"))
    return bool(int(effective.split()[1], 16) >> capability & 1)


def not_to_be_had(cases: Sequence[str], ordinary: bool) -> dict[str, str]:
    """Cases that cannot pass here on any kernel, and why. ``ordinary``: they run without root's capabilities."""
    why: dict[str, str] = {}
    if ordinary:
        why.update(dict.fromkeys(fnmatch.filter(cases, NEEDS_DEBUGFS), "asks for root (debugfs)"))
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if (ordinary or not capable(CAP_IPC_LOCK)) and limit != resource.RLIM_INFINITY:
        for pattern, size in PINS.items():
            if size > limit:
                reason = f"pins {size // MIB} MiB, RLIMIT_MEMLOCK is {limit // MIB} MiB (ulimit -l)"
                why.update(dict.fromkeys(fnmatch.filter(cases, pattern), reason))
    return {case: reason for case, reason in why.items() if case in cases}


def raise_memlock() -> None:
    """Lets an ordinary user we start pin what root may, where we may allow it."""
    wanted = max(PINS.values())
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError):  # not root: it stays as it is
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (wanted, max(hard, wanted)))


def run_all(options: argparse.Namespace, programs: dict[str, Path], stack: ExitStack, ordinary: bool) -> int:
    fixtures = options.fixture or []
    order = {name: case_names(path, fixtures) for name, path in programs.items()}
    every = [case for cases in order.values() for case in cases]
    if not every:
        print(f"conformance: no case of fixture {', '.join(fixtures)} in {', '.join(programs)}", file=sys.stderr)
        return 2
    programs = {name: path for name, path in programs.items() if order[name]}
    expected = {
        name: [case for case in names(_text(LISTS / f"passing-{name}.txt")) if not fixtures or case in every]
        for name in programs
    }
    python, cwd, uid = Path(sys.executable), ROOT, None
    if options.as_nobody:
        python, programs, cwd = stack.enter_context(nobodys_copy(programs))
        uid = NOBODY
        raise_memlock()
    stack.enter_context(hugepages.lent(every, options.set_hugepages))
    starved = hugepages.out_of_reach(every, hugepages.available())
    sysctl = hugepages.wanted_sysctl(every, hugepages.available())
    without = os.environ.get("ALLOW_NO_HUGEPAGES") == "1"
    excused = not_to_be_had(every, ordinary)
    if without:
        excused.update(dict.fromkeys(starved, f"needs huge pages (sysctl vm.nr_hugepages={sysctl})"))

    reports: dict[str, Report] = {}
    seconds: dict[str, float] = {}
    broken: list[str] = []
    for name, path in programs.items():
        command = [python, "-m", "iommufd", "run", "--machine", options.machine, "--grant", GRANTED, "--", path]
        command += [word for fixture in fixtures for word in ("-f", fixture)]
        start = time.monotonic()
        reports[name], code, tail = execute(command, Progress(name, len(order[name])), options.timeout, uid, cwd)
        seconds[name] = time.monotonic() - start
        if not reports[name].complete:
            broken.append(
                f"{name} ended with exit code {code} after {len(reports[name].cases)} of {len(order[name])} "
                f"cases; its last words:\n    " + "\n    ".join(tail[-12:])
            )

    print(table(reports, seconds))
    good = not broken
    for name, report in reports.items():
        result = compare(report, expected[name], excused)
        good &= judge(name, report, result, excused, len(expected[name]), options)
        if options.update and result.gained:
            update(LISTS / f"passing-{name}.txt", result.gained, case_names(programs[name], ()))
    if starved and not without:
        print(f"\n{len(starved)} cases need huge pages that this host does not offer:")
        print("\n".join(f"  {case}" for case in starved))
        print(f"`sysctl vm.nr_hugepages={sysctl}` would allow them; ALLOW_NO_HUGEPAGES=1 goes without them")
        good = False
    for text in broken:
        print(f"\n{text}")
    return 0 if good else 1


def judge(
    name: str, report: Report, result: Comparison, excused: dict[str, str], expected: int, options: argparse.Namespace
) -> bool:
    """Prints how one program did against its list; whether it did well."""
    failing = [case.name for case in report.cases.values() if case.verdict is not Verdict.PASS]
    explain(f"{name}: listed as passing, but not passed", result.lost, report)
    unlisted = [case for case in failing if case not in result.lost and case not in excused]
    if options.verbose:
        explain(f"{name}: not passed, and not listed", unlisted, report)
    elif unlisted:
        print(f"\n{name}: {len(unlisted)} further cases do not pass and are not listed (-v shows why)")
    hopeless = [case for case in failing if case in excused]
    if hopeless:
        print(f"\n{name}: not to be had here:")
        print("\n".join(f"  {case}: {excused[case]}" for case in hopeless))
    if result.gained and not options.update:
        print(f"\n{name}: {len(result.gained)} cases pass that are not listed yet (make conformance ARGS=--update)")
    passed = expected - len(result.lost) - len(result.excused)
    without = f", {len(result.excused)} are not to be had here" if result.excused else ""
    print(f"\n{name}: {passed} of {expected} listed cases pass{without}")
    return not result.lost


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


if __name__ == "__main__":
    sys.exit(main())
