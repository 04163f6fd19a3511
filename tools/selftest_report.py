"""Reading what the kernel's selftest programs print (kselftest's TAP), and holding it against a list of names.

Pure functions. A case is named as the program names it, ``fixture.variant.test`` or ``fixture.test``. Only ``ok``
without a directive is a pass: a skip is not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum

_RESULT = re.compile(r"^(not ok|ok) (\d+) (\S+)(?:\s+#\s*(\w+)\s*(.*))?$")
_PLAN = re.compile(r"^1\.\.(\d+)$")
_START = re.compile(r"^#\s+RUN\s+(\S+) \.\.\.$")
_NOISE = re.compile(
    r"^TAP version|^# (Starting|Totals:)|^# (PASSED|FAILED):|^#\s+(OK|FAIL|RUN|SKIP)\s|^# \S+: Test terminated by"
)


class Verdict(Enum):
    PASS = "pass"
    FAIL = "fail"
    SKIP = "skip"


@dataclass
class Case:
    """One test case: its verdict and what the program said while it ran."""

    name: str
    verdict: Verdict
    lines: list[str] = field(default_factory=list)

    @property
    def fixture(self) -> str:
        return self.name.partition(".")[0]


@dataclass
class Report:
    """All cases of one run of one program. ``planned`` is what the program announced, 0 if it died before."""

    planned: int = 0
    cases: dict[str, Case] = field(default_factory=dict)

    def passed(self) -> list[str]:
        return [case.name for case in self.cases.values() if case.verdict is Verdict.PASS]

    @property
    def complete(self) -> bool:
        return self.planned > 0 and len(self.cases) == self.planned


def read(lines: Iterable[str]) -> Iterator[Case | int]:
    """Yields the plan (an int) and each case as its result line comes by."""
    said: list[str] = []
    for raw in lines:
        line = raw.rstrip("\n")
        if plan := _PLAN.match(line):
            yield int(plan[1])
        elif _START.match(line):
            said = []
        elif result := _RESULT.match(line):
            skipped = (result[4] or "").upper() == "SKIP"
            verdict = Verdict.SKIP if skipped else Verdict.PASS if result[1] == "ok" else Verdict.FAIL
            yield Case(result[3], verdict, [*said, result[5]] if skipped and result[5] else said)
            said = []
        elif line and not _NOISE.match(line):
            said.append(line.removeprefix("#").strip())


def collect(lines: Iterable[str]) -> Report:
    """The whole of a program's output as a Report."""
    report = Report()
    for item in read(lines):
        if isinstance(item, int):
            report.planned = item
        else:
            report.cases[item.name] = item
    return report


@dataclass(frozen=True)
class Comparison:
    """A run against the committed list: ``lost`` must be empty; ``gained`` may be added to the list."""

    lost: list[str]
    gained: list[str]
    excused: list[str]


def compare(report: Report, expected: Iterable[str], excused: Iterable[str] = ()) -> Comparison:
    """``excused`` names cases that cannot pass here for a reason the caller has told the user."""
    expected, excused = list(expected), set(excused)
    passed = set(report.passed())
    return Comparison(
        lost=[name for name in expected if name not in passed and name not in excused],
        gained=[name for name in report.passed() if name not in set(expected)],
        excused=[name for name in expected if name not in passed and name in excused],
    )


def names(text: str) -> list[str]:
    """The case names of a committed list; ``#`` starts a comment."""
    return [name for line in text.splitlines() if (name := line.partition("#")[0].strip())]
