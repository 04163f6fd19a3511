"""Plays the conformance checks on the machine it runs on and writes down the transcripts.

``python -m iommufd.testing.record --out DIR`` inside the oracle VM records what the kernel says; under ``iommufd run``
the same command records what the software says through the front door. One JSON file a check; a summary at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from iommufd.testing.conformance import Check, checks
from iommufd.testing.subject import Mismatch, Subject, Transcript

if TYPE_CHECKING:
    from collections.abc import Callable


def play(check: Check, subject: Subject) -> tuple[str | None, Transcript]:
    """Runs one check; (None or what did not hold, transcript). The subject is finished afterwards."""
    try:
        check.run(subject)
        failure = None
    except Mismatch as mismatch:
        failure = str(mismatch)
    finally:
        transcript = list(subject.transcript)
        subject.finish()
    return failure, transcript


def dump(check: Check, transcript: Transcript) -> str:
    """A transcript as the text of its file: one step a line, so that a difference is a line of a diff."""
    steps = ",\n".join("  " + json.dumps(step) for step in transcript)
    return f'{{"check": {json.dumps(check.name)}, "rows": {json.dumps(list(check.rows))}, "steps": [\n{steps}\n]}}\n'


def load(path: Path) -> Transcript:
    """The steps of a transcript's file."""
    steps: Transcript = json.loads(path.read_text())["steps"]
    return steps


def difference(recorded: Transcript, played: Transcript) -> str | None:
    """The first step in which two transcripts differ, as text; None when they are the same."""
    for number, (was, now) in enumerate(zip(recorded, played, strict=False)):
        if was != json.loads(json.dumps(now)):
            return f"step {number}:\n  recorded {json.dumps(was)}\n  now      {json.dumps(now)}"
    if len(recorded) != len(played):
        return f"{len(recorded)} steps were recorded, {len(played)} were played now"
    return None


def record(
    subject: Callable[[], Subject], out: Path | None, only: list[str], have: frozenset[str], needing: str = ""
) -> int:
    """Plays every check that ``have`` allows (of those, the ones that need ``needing``); writes transcripts; the number
    that failed."""
    failed = 0
    started = time.monotonic()
    chosen = [c for c in checks() if c.needs <= have and (not only or any(o in c.name for o in only))]
    chosen = [c for c in chosen if not needing or needing in c.needs]
    for check in chosen:
        failure, transcript = play(check, subject())
        if out is not None:
            (out / f"{check.name}.json").write_text(dump(check, transcript))
        if failure is not None:
            failed += 1
            print(f"FAIL {check.name}: {failure}", flush=True)
    print(f"{len(chosen) - failed} passed, {failed} failed in {time.monotonic() - started:.1f} s", flush=True)
    return failed


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m iommufd.testing.record", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for the transcripts")
    parser.add_argument(
        "--have", default="", help="what this machine offers: root hugepages processes capabilities vtd noiommu"
    )
    parser.add_argument("--only-needing", default="", help="only the checks that need this")
    parser.add_argument("only", nargs="*", help="parts of check names")
    options = parser.parse_args(argv)
    from iommufd.client.backends.kernel import KernelBackend

    if options.out is not None:
        os.makedirs(options.out, exist_ok=True)
    have = frozenset(options.have.split())
    return 1 if record(lambda: Subject(KernelBackend()), options.out, options.only, have, options.only_needing) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
