"""`iommufd run --trace`, `--explain`, then `iommufd decode`: what a program did, as strace shows it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.interposed

PROGRAM = """
import fcntl, mmap, os, struct
fd = os.open("/dev/iommu", os.O_RDWR)
fcntl.ioctl(fd, 0x3b81, bytearray(struct.pack("III", 12, 0, 0)))
for refused in (lambda: os.read(fd, 8), lambda: os.write(fd, b"abc"), lambda: os.lseek(fd, 0, 0),
                lambda: mmap.mmap(fd, 4096), lambda: os.open("/dev/iommu", os.O_RDWR | os.O_DIRECTORY),
                lambda: fcntl.ioctl(fd, 0x3b8f, bytearray(struct.pack("I36x", 40)))):
    try:
        refused()
    except OSError:
        pass
os.access("/dev/iommu", os.X_OK)
os.dup2(fd, 9)
os.close(fd)
container = os.open("/dev/vfio/vfio", os.O_RDWR)
fcntl.ioctl(container, 0x3b64)
os.close(9)
"""


def iommufd(*arguments: str) -> tuple[str, str]:
    command = [sys.executable, "-m", "iommufd", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[str]]:
    """The decoded lines, and what --explain said."""
    path: Path = tmp_path_factory.mktemp("trace") / "trace"
    options = ("--kernel", "6.6", "--explain", "--trace", str(path))
    _, said = iommufd("run", *options, "--", sys.executable, "-S", "-E", "-c", PROGRAM)
    return iommufd("decode", str(path))[0].splitlines(), said.splitlines()


def test_decode_shows_every_call_on_a_file_of_the_machine(traced: tuple[list[str], list[str]]) -> None:
    shown = [line.partition("  # ")[0] for line in traced[0]]
    fd = shown[0].rpartition(" = ")[2]
    assert shown[7].endswith(f" = {fd}")
    assert [line.replace(f"({fd}", "(FD") for line in shown] == [
        f'open("/dev/iommu", O_RDWR|O_CLOEXEC) = {fd}',
        "ioctl(FD, IOMMU_IOAS_ALLOC, {size=12, flags=0} => {out_ioas_id=1}) = 0",
        shown[2].replace(f"({fd}", "(FD"),  # the address of a buffer
        "write(FD, <3 bytes: 616263>, 3) = -1 EINVAL (Invalid argument)",
        shown[4],
        'open("/dev/iommu", O_RDWR|O_CLOEXEC|O_DIRECTORY) = -1 ENOTDIR (Not a directory)',
        "ioctl(FD, IOMMU_IOAS_MAP_FILE, {size=40}) = -1 ENOTTY (Inappropriate ioctl for device)",
        shown[7],
        "ioctl(FD, VFIO_GET_API_VERSION) = 0",  # the number is free again
        "close(iommu#1) = 0",  # the last of the first file; 9 is a number nobody watches
        "close(container#2) = 0",  # nobody closed it: its process ended
    ]
    assert shown[2].startswith(f"read({fd}, 0x")
    assert shown[4].startswith("mmap(NULL, 4096, PROT_READ|PROT_WRITE, MAP_SHARED, ")
    assert shown[7].startswith('open("/dev/vfio/vfio", O_RDWR|O_CLOEXEC) = ')


def test_explain_says_why_each_failing_call_failed(traced: tuple[list[str], list[str]]) -> None:
    failed = [line for line in traced[1] if line.startswith("iommufd: ")]
    assert len(failed) == 7  # and lseek, access, which a trace has not
    assert all(" = -1 E" in line and "  # " in line for line in failed)
    text = "\n".join(failed)
    assert "(Illegal seek)  # /dev/iommu has no position" in text
    assert "iommufd: access(...) = -1 EACCES (Permission denied)  # /dev/iommu has mode 666" in text
    assert "IOMMU_IOAS_MAP_FILE came with Linux 6.13; this machine is Linux 6.6" in text
