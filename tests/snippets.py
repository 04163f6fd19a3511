"""Code in the pages of the guide, run as readers would run it.

* All ``python`` blocks of a page are one program, run in order; warnings are errors.
* A ``text`` block right behind one is what it prints.
* Of a ``console`` block, each ``$ command`` is run by the shell. What stands below it is what it prints, on both
  outputs; with nothing below, it must succeed.
* Both run in an empty folder that has ``examples``.

In what is printed ``…`` stands for anything within a line, and a line ``⋮`` for any number of lines.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = "--- end of a block ---"


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its text, the line of the page its text begins at, and whether nothing but
    empty lines stands before it since the last one."""

    language: str
    text: str
    line: int
    follows: bool


def blocks(page: str) -> list[Block]:
    found, end = [], 0
    for match in FENCE.finditer(page):
        line = page.count("\n", 0, match.start(2)) + 1
        found.append(Block(match[1], match[2], line, not page[end : match.start()].strip()))
        end = match.end()
    return found


def environment() -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("IOMMUFD_", "PYTHON"))}
    return {**env, "PATH": f"{Path(sys.executable).parent}:{env['PATH']}", "PYTHONPATH": str(ROOT / "src")}


def program_of(page: str) -> tuple[str, list[Block | None]]:
    """The page's Python as one program, every statement on its line of the page, which prints MARK after each block;
    and what each block is to print, None where the page does not say."""
    lines: list[str] = []
    expected: list[Block | None] = []
    listed = blocks(page)
    for i, block in enumerate(listed):
        if block.language != "python":
            continue
        lines += [""] * (block.line - 1 - len(lines))
        lines += [*block.text.rstrip("\n").split("\n"), f"print({MARK!r}, flush=True)"]
        behind = listed[i + 1] if i + 1 < len(listed) else None
        expected.append(behind if behind is not None and behind.language == "text" and behind.follows else None)
    return "\n".join(lines), expected


@contextmanager
def folder() -> Iterator[str]:
    with TemporaryDirectory() as name:
        Path(name, "examples").symlink_to(ROOT / "examples")
        yield name


def run_python(path: Path) -> int:
    """Runs a page's program and compares what it prints; how many blocks there were. AssertionError."""
    program, expected = program_of(path.read_text())
    if not expected:
        return 0
    code = f"import sys; exec(compile(sys.stdin.read(), {str(path)!r}, 'exec'), {{'__name__': '__main__'}})"
    with folder() as name:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code], input=program, capture_output=True, text=True, cwd=name,
            env=environment(), timeout=60, check=False,
        )  # fmt: skip
    assert done.returncode == 0, f"{path.name}:\n{done.stdout}{done.stderr}"
    assert not done.stderr, f"{path.name}:\n{done.stderr}"
    printed = done.stdout.split(MARK + "\n")
    for block, output in zip(expected, printed, strict=False):
        if block is not None:
            assert like(block.text, output), f"{path.name}, line {block.line}: it prints\n{output}and not\n{block.text}"
    return len(expected)


def run_console(path: Path) -> int:
    """Runs a page's commands and compares what they print; how many there were. AssertionError."""
    with folder() as name:
        return sum(run_commands(block.text, path.name, name) for block in blocks(path.read_text())
                   if block.language == "console")  # fmt: skip


def run_commands(text: str, page: str, where: str) -> int:
    count = 0
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        while command.endswith("\\"):
            more, _, output = output.partition("\n")
            command = f"{command[:-1]}{more}"
        done = subprocess.run(
            command, shell=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=where,
            env=environment(), timeout=60, check=False,
        )  # fmt: skip
        if output.strip():
            assert like(output, done.stdout), f"{page}: $ {command}\nprints\n{done.stdout}and not\n{output}"
        else:
            assert done.returncode == 0, f"{page}: $ {command}\nprints\n{done.stdout}"
        count += 1
    return count


def like(pattern: str, text: str) -> bool:
    """Whether ``text`` is what ``pattern`` says; see the top of this module."""
    rule = "".join(
        "(?:[^\n]*\n)*?" if line.strip() == "⋮" else re.escape(line).replace("…", "[^\n]*") + "\n"
        for line in pattern.rstrip("\n").split("\n")
    )
    return re.fullmatch(rule, text.rstrip("\n") + "\n") is not None
