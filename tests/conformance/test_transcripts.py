"""Every conformance check, played in process, must say what the real kernel said.

``transcripts/linux-7.3`` is what a 7.3.4 kernel answered (``make oracle`` records it). The machine is ``mock@7.3.4``,
which reproduces that release's defects too, or the one that has what a check needs. A difference is a bug of the
software, or a reason to ask the kernel again.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from iommufd.testing.conformance import Check, checks
from iommufd.testing.record import difference, load, play
from iommufd.testing.software import software_subject

TRANSCRIPTS = Path(__file__).parent / "transcripts" / "linux-7.3"


@pytest.mark.software
@pytest.mark.parametrize("check", checks(), ids=lambda check: check.name)
def test_the_software_answers_as_the_kernel_did(check: Check) -> None:
    path = TRANSCRIPTS / f"{check.name}.json"
    assert path.exists(), f"{check.name} has not been recorded on a kernel: make oracle"
    failure, played = play(check, software_subject(check.needs))
    assert difference(load(path), played) is None, failure
    assert failure is None


def test_no_transcript_is_left_over() -> None:
    names = {check.name for check in checks()}
    assert {path.stem for path in TRANSCRIPTS.glob("*.json")} <= names
