"""tools.fuzz: programs are what their seed makes them, and the matrix of core 11 leaves nothing open."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from iommufd.uapi import iommufd as u
from tools.fuzz import __main__ as fuzz
from tools.fuzz.author import Author
from tools.fuzz.generate import begin, go_on, write
from tools.fuzz.matrix import ELSEWHERE, MATRIX, Tally
from tools.fuzz.program import (
    ARENA,
    EXIT,
    FORK,
    IOCTL,
    LIMIT,
    MMAP,
    MPROTECT,
    MUNMAP,
    PEEK,
    POKE,
    Program,
    Step,
    answers,
    encode,
)
from tools.fuzz.stage import play
from tools.fuzz.themes import THEMES

ROOT = Path(__file__).resolve().parent.parent.parent


def of_theme(name: str, seed: int) -> tuple[Program, list[str]]:
    author = Author(seed, 60)
    try:
        begin(author, THEMES[name])
        go_on(author, THEMES[name])
    finally:
        author.stage.close()
    return author.program, author.answers


@pytest.mark.parametrize("theme", THEMES)
def test_a_seed_is_a_program_and_its_answers(theme: str) -> None:
    first, while_written = of_theme(theme, 7)
    again, _ = of_theme(theme, 7)
    assert first == again
    assert play(first) == while_written
    assert len(first.steps) >= 60


def test_the_second_process_has_its_own_memory_and_the_descriptors_of_its_fork() -> None:
    ioas = Step(IOCTL, 0, cmd=0x3B81, data=u.iommu_ioas_alloc(size=12).pack())
    steps = [
        Step(1, 0),
        Step(POKE, numbers=(ARENA,), data=b"first"),
        Step(FORK),
        Step(1, 1),
        Step(PEEK, numbers=(ARENA, 5), second=True),
        Step(POKE, numbers=(ARENA,), data=b"other", second=True),
        Step(PEEK, numbers=(ARENA, 5)),
        Step(MMAP, numbers=(0, 1, 255), second=True),
        Step(PEEK, numbers=(ARENA, 5), second=True),
        Step(IOCTL, 0, cmd=ioas.cmd, data=ioas.data, second=True),
        Step(IOCTL, 1, cmd=ioas.cmd, data=ioas.data, second=True),
        ioas,
        Step(EXIT),
        Step(PEEK, numbers=(ARENA, 5), second=True),
    ]
    none, first = "0000000000", b"first".hex()
    struct = "0c00000000000000"
    assert play(Program(0, steps)) == [
        "0", "", "", "0", f" {none}", "", f" {first}", "", f" {none}",
        f"0 {struct}01000000", f"E9 {struct}00000000", f"0 {struct}02000000", "", "",
    ]  # fmt: skip


def test_an_answer_that_cannot_be_written() -> None:
    value = u.iommu_ioas_alloc(size=12).pack()
    steps = [Step(1, 0), *(Step(IOCTL, 0, cmd=0x3B81, data=value, read_only=read_only) for read_only in (True, False))]
    assert play(Program(0, steps)) == ["0", f"E14 {value.hex()}", "0 0c0000000000000001000000"]


def test_a_hole_cannot_be_protected() -> None:
    steps = [Step(FORK)]
    for second in (False, True):
        steps += [Step(MUNMAP, numbers=(0, 1), second=second), Step(MPROTECT, numbers=(0, 2, 1), second=second)]
    assert play(Program(0, steps)) == ["", "0", "E12", "0", "E12"]


def test_what_a_program_is_granted() -> None:
    assert Program(0, [Step(1, 0)]).grant == "all"
    assert Program(0, [Step(LIMIT, numbers=(1,)), Step(1, 0)]).grant == ""
    assert Program(0, [Step(1, 0), Step(LIMIT, numbers=(1,))]).grant == "sys_resource"


@pytest.mark.interposed
@pytest.mark.skipif(shutil.which("gcc") is None, reason="the player is compiled here")
def test_the_player_says_the_same_through_the_door(tmp_path: Path) -> None:
    fuzz.build_player(tmp_path)
    written = [write(seed) for seed in range(900, 920)]
    said = fuzz.through_the_door([program for program, _ in written], tmp_path)
    for program, while_written in written:
        assert fuzz.first_difference(while_written, said[program.seed]) is None, program.seed


@pytest.mark.skipif(shutil.which("gcc") is None, reason="the player is compiled here")
def test_the_player_reads_every_step(tmp_path: Path) -> None:
    """Without a machine: what it cannot do it says, and it comes to the end of every program."""
    player = fuzz.build_player(tmp_path)
    programs = [write(seed)[0] for seed in range(940, 950)]
    (tmp_path / "programs").write_bytes(encode(programs))
    output = subprocess.run([player, tmp_path / "programs"], capture_output=True, text=True, check=True).stdout
    found = answers(output)
    assert [len(found[program.seed]) for program in programs] == [len(program.steps) for program in programs]


# --- the matrix


def test_what_no_program_reaches_has_a_reason_and_a_test_that_exists() -> None:
    for (row, word), (why, test) in ELSEWHERE.items():
        assert word in MATRIX[row]
        assert why
        path, *names = test.split("::")
        text = (ROOT / path).read_text()
        for name in names:
            assert re.search(rf"\b(class|def) {name}\b", text), test


def test_a_tally_knows_what_is_missing() -> None:
    tally = Tally()
    destroy, option = u.iommu_destroy(size=8), u.iommu_option(size=24, option_id=u.IOMMU_OPTION_HUGE_PAGES)
    tally.add(destroy, "ENOENT")
    tally.add(u.iommu_destroy(size=4), "EBUSY")  # the dispatcher's answer
    tally.add(option, "EINVAL")
    tally.add(u.iommu_ioas_noiommu_get_pa(size=40, length=1), "EINVAL")
    missing = tally.missing()
    assert ("DESTROY", "EBUSY") in missing
    assert ("DESTROY", "ENOENT") not in missing
    assert ("OPTION huge", "EINVAL") not in missing
    assert ("OPTION rlimit", "EINVAL") in missing
    assert ("GET_PA revoked", "EINVAL") not in missing
    assert ("CHANGE_PROCESS", "EBUSY") not in missing
    table = "\n".join(tally.lines())
    assert re.search(r"^DESTROY +0 +1 +MISSING", table, re.MULTILINE)
    assert "MISSING: DESTROY EBUSY" in table
    tally.add(destroy, "EIO")
    assert ("DESTROY", "EIO", 1) in tally.unlisted()


def test_a_full_tally_misses_nothing() -> None:
    tally = Tally()
    for row, words in MATRIX.items():
        for word in words:
            tally.counts[row][word] += 1
    assert not tally.missing()
    assert list(tally.lines())[-1] == "nothing is missing"


def test_the_command_line_explains_itself() -> None:
    done = subprocess.run([sys.executable, "-m", "tools.fuzz", "--help"], capture_output=True, text=True, check=True)
    assert "FIRST-LAST" in done.stdout
