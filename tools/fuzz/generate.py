"""Writes random programs that reach deep states.

A program is written while it is played on the software machine, so that the next call can name objects, IOVAs and
cookies that exist; most calls are nearly right. What the software answered is not part of the program: the kernel's
answers are compared with a fresh run.
"""

from __future__ import annotations

from iommufd.uapi import iommufd as u
from iommufd.uapi import iommufd_test as t
from tools.fuzz.author import Author
from tools.fuzz.calls import CALLS
from tools.fuzz.calls.selftest import detach_all
from tools.fuzz.program import OPEN, Program, Step
from tools.fuzz.themes import DRAWN, THEMES, Theme

FAVOUR = 6  # how much oftener a theme's calls are made


def write(seed: int, steps: int = 60) -> tuple[Program, list[str]]:
    """The program of ``seed``, and what the software said while it was written."""
    author = Author(seed, steps)
    try:
        begin(author, theme := THEMES[author.r.choice(DRAWN)])
        go_on(author, theme)
    finally:
        author.stage.close()
    return author.program, author.answers


def begin(a: Author, theme: Theme) -> None:
    """What the theme needs, so that its calls can succeed."""
    theme.first(a)
    if 0 not in a.slots:
        a.write(Step(OPEN, 0))
        if a.chance(0.05):
            option = u.iommu_option(
                option_id=u.IOMMU_OPTION_RLIMIT_MODE, op=u.IOMMU_OPTION_OP_SET, val64=a.r.choice((0, 1, 2))
            )
            a.ask(option)
    a.ask(u.iommu_ioas_alloc())
    a.ask(t.test_mock_domain_flags(id=1, dev_flags=a.r.choice(theme.device_flags)))
    theme.preamble(a)
    if a.chance(0.3):
        a.write(Step(OPEN, 1))


def go_on(a: Author, theme: Theme) -> None:
    calls = [call for call in CALLS if call not in theme.shunned or a.chance(0.1)]
    weights = [CALLS[call] * (FAVOUR if call in theme.favourites else 1) for call in calls]
    while len(a.program.steps) < a.length:
        a.slot = 1 if 1 in a.slots and a.chance(0.2) else 0
        a.r.choices(calls, weights)[0](a)
    detach_all(a)
