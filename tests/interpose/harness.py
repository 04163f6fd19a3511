"""Running small programs under the interposer, on the fake machine of fake.py."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FAKE = Path(__file__).with_name("fake.py")

PREAMBLE = """
import ctypes, errno, fcntl, mmap, os, select, signal, socket, stat, struct, subprocess, sys, threading, time
REVERSE, COUNT, SLEEP, LATER, NEVER, BUG, QUEUE, POST, CAPS, OPAQUE, WHOSE, LISTEN = range(0x3B80, 0x3B8C)
libc = ctypes.CDLL(None, use_errno=True)
def fails(number, call, *args):
    try:
        got = call(*args)
    except OSError as error:
        assert error.errno == number, (errno.errorcode[error.errno], errno.errorcode[number])
    else:
        raise AssertionError(f"{call} gave {got!r}, not {errno.errorcode[number]}")
def file_of(request, fd):
    buffer = bytearray(4)
    fcntl.ioctl(fd, request, buffer)
    return int.from_bytes(buffer, "little")
"""


@dataclass
class Outcome:
    """``log`` is what happened to the files of the machine, in order."""

    code: int
    out: str
    err: str
    log: list[str]


class Supervised:
    """Runs programs on the fake machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0

    def next_log(self) -> Path:
        """The log of the next run, for a program that looks at it itself."""
        return self._folder / f"log{self._count + 1}"

    def command(self, argv: Sequence[str]) -> tuple[list[str], Path]:
        self._count += 1
        log = self._folder / f"log{self._count}"
        return [sys.executable, str(FAKE), str(log), *argv], log

    def run(self, argv: Sequence[str], *, code: int = 0, timeout: float = 60, **options: Any) -> Outcome:
        """Runs ``argv`` and expects the exit code."""
        command, log = self.command(argv)
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL, check=False, **options
        )
        lines = log.read_text().splitlines() if log.exists() else []
        outcome = Outcome(done.returncode, done.stdout, done.stderr, lines)
        assert outcome.code == code, outcome
        return outcome

    def python(self, script: str, *args: str, code: int = 0, **options: Any) -> Outcome:
        """Runs a Python script (the preamble above before it)."""
        text = PREAMBLE + textwrap.dedent(script)
        return self.run([sys.executable, "-S", "-E", "-c", text, *args], code=code, **options)


Compile = Callable[..., str]
