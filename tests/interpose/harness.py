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


MOCK = """
page = 4096
libc.mmap.restype = libc.mremap.restype = libc.sbrk.restype = libc.shmat.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
libc.sbrk.argtypes = [ctypes.c_long]
libc.shmat.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
libc.shmdt.argtypes = [ctypes.c_void_p]
WINDOW = 0x1000000
def call(fd, nr, form, *values):
    buffer = bytearray(struct.pack("=" + form, struct.calcsize("=" + form), *values))
    fcntl.ioctl(fd, 0x3B00 | nr, buffer)
    return struct.unpack("=" + form, buffer)
def test(fd, op, id, form="", *values):
    arm = struct.pack("=" + form, *values)
    return call(fd, 0xA0, "III4x48sII", op, id, arm.ljust(48, b"\\0"), 0, 0)[3]
def private(pages, flags=0x22):
    return libc.mmap(None, pages * page, 3, flags, -1, 0)
class Setup:
    'an IOAS with a mock domain and an access; map() pins'
    def __init__(self, path="/dev/iommu", fd=None, ioas=None, access=None):
        if fd is not None:
            self.fd, self.ioas, self.access = fd, ioas, access
            return
        self.fd = os.open(path, os.O_RDWR)
        self.ioas = call(self.fd, 0x81, "III", 0, 0)[2]
        stdev, self.hwpt, device = struct.unpack_from("=III", test(self.fd, 2, self.ioas, "III", 0, 0, 0))
        self.access = struct.unpack_from("=I", test(self.fd, 5, self.ioas, "II", 0, 0))[0]
    def map(self, va, pages, iova=WINDOW):
        call(self.fd, 0x85, "IIIIQQQ", 7, self.ioas, 0, va, pages * page, iova)
    def unmap(self, pages, iova=WINDOW):
        call(self.fd, 0x86, "IIQQ", self.ioas, iova, pages * page)
    def rw(self, iova, length, va, flags):
        test(self.fd, 8, self.access, "QQQI", iova, length, va, flags)
    # core 5.6: only a copy of several pages goes by the pinned frames, so all copies here are of two pages
    def pages_at(self, iova):
        out = ctypes.create_string_buffer(2 * page)
        first = iova & -2 * page
        self.rw(first, 2 * page, ctypes.addressof(out), 4)
        return first, out
    def read(self, length, iova=WINDOW):
        'what a device reads'
        first, out = self.pages_at(iova)
        return out.raw[iova - first : iova - first + length]
    def write(self, data, iova=WINDOW):
        'what a device writes'
        first, out = self.pages_at(iova)
        ctypes.memmove(ctypes.addressof(out) + iova - first, data, len(data))
        self.rw(first, 2 * page, ctypes.addressof(out), 5)
    def is_page(self, va, pages=1, iova=WINDOW):
        'whether the domain maps the frames now behind va'
        try:
            test(self.fd, 3, self.hwpt, "QQQ", iova, pages * page, va)
        except OSError as error:
            assert error.errno == errno.EINVAL, error
            return False
        return True
def fill(va, text, pages=1):
    for number in range(pages):
        ctypes.memmove(va + number * page, b"%s %d" % (text, number), len(text) + 2)
def seen(va, length):
    return ctypes.string_at(va, length)
"""


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

    def mock(self, script: str, *args: str, options: Sequence[str] = (), code: int = 0) -> Outcome:
        """Runs a Python script on the machine ``mock`` of the real engine."""
        text = PREAMBLE + MOCK.replace("\\\\0", "\\0") + textwrap.dedent(script)
        run = [sys.executable, "-m", "iommufd", "run", "--machine", "mock", *options, "--"]
        done = subprocess.run(
            [*run, sys.executable, "-S", "-E", "-c", text, *args],
            capture_output=True,
            text=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        outcome = Outcome(done.returncode, done.stdout, done.stderr, [])
        assert outcome.code == code, outcome
        return outcome

    def python(self, script: str, *args: str, code: int = 0, **options: Any) -> Outcome:
        """Runs a Python script (the preamble above before it)."""
        text = PREAMBLE + textwrap.dedent(script)
        return self.run([sys.executable, "-S", "-E", "-c", text, *args], code=code, **options)


Compile = Callable[..., str]
