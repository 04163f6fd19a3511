"""Which test covers which row of the behaviour specification: docs/conformance.md is generated here.

Rows are named ``chapter section row number`` (``core 4.9 row 3``), listed in ``tests/conformance/rows.txt``. A row is
covered by conformance checks that name it (they run on a real kernel, in process, and under ``iommufd run``), by tests
that name it (software only: in a parameter id ``core-4.9-3``, a comment ``# devices 3.6 steps 4, 10``, or the name of a
function, ``test_devices_11_2_rows_1_to_4``), or by a reason in ``tests/conformance/unreachable.txt`` why no program can
reach it. ``python -m tools.rows`` writes the page; ``--check`` fails if it is not up to date or has blanks.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from iommufd.testing.conformance import checks

ROOT = Path(__file__).resolve().parent.parent
LISTED = ROOT / "tests/conformance/rows.txt"
REASONS = ROOT / "tests/conformance/unreachable.txt"
PAGE = ROOT / "docs/conformance.md"
TAG = re.compile(r"\b(core|devices|events|mock|vfio)-(\d+(?:\.\d+[a-z]?)*)-((?:[a-z]+-)?)(\d*[a-z]?)\b")


CHAPTER = r"(core|devices|events|mock|vfio)"
ROW_LIST = r"((?:\d+[a-z]?(?:-\d+)?(?:, (?!\d+\.)| and )?)+)"
NAMED = re.compile(rf"\b{CHAPTER}(?:-device|-viommu|-compat)? ([^#:()]*\b(?:steps?|rows?)\b[^#:()]*)")
SECTION = re.compile(rf"(\d+(?:\.\d+[a-z]?)*(?: [a-z]+)??),? (?:steps?|rows?) {ROW_LIST}")
FUNCTION = re.compile(rf"\bdef test_{CHAPTER}_(\d+(?:_\d+[a-z]?)?)_rows?_(\d+[a-z]?(?:_(?:to_|and_)?\d+[a-z]?)*)")
NUMBERS = re.compile(r"(\d+)-(\d+)|(\d+[a-z]?)")


def row_of_tag(tag: re.Match[str]) -> str:
    """``core-3-huge-5`` as ``core 3 huge row 5``."""
    chapter, section, part, number = tag.groups()
    return " ".join(word for word in (chapter, section, part.rstrip("-"), "row", number) if word)


def numbers(text: str) -> list[str]:
    """The rows that ``4, 10``, ``1-3`` or ``5 and 8a`` stand for."""
    found = []
    for first, last, single in NUMBERS.findall(text):
        found += [single] if single else [str(number) for number in range(int(first), int(last) + 1)]
    return found


def rows_named(text: str) -> set[str]:
    """The rows that a test file names: in parameter ids, in comments, and in names of functions."""
    found = {row_of_tag(tag) for tag in TAG.finditer(text)}
    for chapter, words in NAMED.findall(text):
        for section, which in SECTION.findall(words):
            found |= {f"{chapter} {section} row {number}" for number in numbers(which)}
    for chapter, section, which in FUNCTION.findall(text):
        ranges = which.replace("_to_", "-").replace("_and_", " ").replace("_", " ")
        found |= {f"{chapter} {section.replace('_', '.')} row {number}" for number in numbers(ranges)}
    return found


def listed() -> list[str]:
    return LISTED.read_text().splitlines()


def reasons() -> dict[str, str]:
    """Row -> why user space cannot reach it. A line ``core 9 row *: reason`` speaks for all rows of a section."""
    found: dict[str, str] = {}
    if REASONS.exists():
        for line in REASONS.read_text().splitlines():
            if line and not line.startswith("#"):
                row, _, why = line.partition(": ")
                found[row] = why
    return found


def tests_by_row() -> dict[str, set[str]]:
    """Row -> test files that name it."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for row in rows_named(path.read_text()):
            found[row].add(str(path.relative_to(ROOT / "tests")))
    return found


def checks_by_row() -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for check in checks():
        for row in check.rows:
            found[row].append(check.name)
    return found


def page() -> tuple[str, list[str]]:
    """The page's text, and the rows that nothing covers."""
    by_check, by_test, why = checks_by_row(), tests_by_row(), reasons()
    recorded = {path.stem for path in (ROOT / "tests/conformance/transcripts/linux-7.3").glob("*.json")}
    through_run = {check.name for check in checks() if "capabilities" not in check.needs}
    lines, blank, real = [], [], 0
    section = ""
    for row in listed():
        head, _, number = row.partition(" row ")
        if head != section:
            section = head
            lines += ["", f"### {head}", "", "| row | covered by | on |", "|---|---|---|"]
        names = by_check.get(row, [])
        tests = sorted(by_test.get(row, ()))
        where = []
        if any(name in recorded for name in names):
            where.append("kernel, in process" + (", `iommufd run`" if through_run & set(names) else ""))
            real += 1
        if tests:
            where.append("software")
        if names or tests:
            covered = ", ".join([*(f"`{name}`" for name in names), *(f"tests/{test}" for test in tests)])
        else:
            reason = why.get(row) or why.get(f"{head} row *")
            if reason is None:
                blank.append(row)
            covered, where = f"not reached: {reason}", ["-"]
        lines.append(f"| {number} | {covered} | {'; '.join(where)} |")
    total = len(listed())
    accounted = total - real - len(blank)
    intro = f"""# Rows of the specification and their tests

Generated by `python -m tools.rows`. The behaviour of Linux 7.3 is written down as numbered rows; this page says which
test holds each one against which backend. "kernel" means a transcript recorded on a real 7.3.4 kernel that every test
run replays.

{total} rows; {real} held against the real kernel; {accounted} otherwise accounted for; {len(blank)} open."""
    return "\n".join([intro, *lines, ""]), blank


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools.rows", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail on blanks or an old page")
    parser.add_argument("--blank", action="store_true", help="list the rows that nothing covers")
    options = parser.parse_args(argv)
    text, blank = page()
    if options.blank:
        print("\n".join(blank))
        return 0
    if options.check:
        old = not PAGE.exists() or PAGE.read_text() != text
        if old:
            print("docs/conformance.md is not what `python -m tools.rows` writes")
        for row in blank:
            print(f"nothing covers {row}")
        return 1 if old or blank else 0
    PAGE.write_text(text)
    print(f"{PAGE.relative_to(ROOT)}: {len(blank)} rows are open")
    return 0


if __name__ == "__main__":
    sys.exit(main())
