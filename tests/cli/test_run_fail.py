"""`iommufd run`: fail-nth written by the program itself, and --fail written by the user."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.interposed

PREAMBLE = """
import ctypes, errno, fcntl, mmap, os, struct, threading
io = os.open("/dev/iommu", os.O_RDWR)
buffer = bytearray(struct.pack("III", 12, 0, 0))
fcntl.ioctl(io, 0x3B81, buffer)
ioas = struct.unpack("III", buffer)[2]
memory = mmap.mmap(-1, 4096)
va = ctypes.addressof(ctypes.c_char.from_buffer(memory))
def map_page():
    try:
        fcntl.ioctl(io, 0x3B85, bytearray(struct.pack("IIIIQQQ", 40, 6, ioas, 0, va, 4096, 0)))
    except OSError as error:
        return errno.errorcode[error.errno]
    return "0"
"""


def _run(script: str, *options: str, code: int = 0) -> tuple[list[str], str]:
    """What the program printed, and what was said on standard error."""
    command = [sys.executable, "-m", "iommufd", "run", *options, "--", sys.executable, "-u", "-c", PREAMBLE + script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done
    return done.stdout.split(), done.stderr


def test_core_10_a_program_sweeps_its_own_failures() -> None:
    """The loop of Documentation/fault-injection, on a map with a domain; its points in the kernel's order."""
    out, _ = _run(
        """
command = bytearray(72)
struct.pack_into("IIIIIII", command, 0, 72, 2, ioas, 0, 0, 0, 0)  # MOCK_DOMAIN
fcntl.ioctl(io, 0x3BA0, command)
nth = os.open(f"/proc/self/task/{threading.get_native_id()}/fail-nth", os.O_RDWR)
for i in range(1, 20):
    assert os.pwrite(nth, str(i).encode(), 0) == len(str(i))
    result = map_page()
    left = int(os.pread(nth, 100, 0))
    os.pwrite(nth, b"0", 0)
    print(f"{result}/{left}")
    if left:
        break
""",
        "--machine",
        "mock",
    )
    assert out == ["ENOENT/0", "ENOMEM/0", "ENOMEM/0", "EFAULT/0", "ENOMEM/0", "0/1"]


def test_fail_nth_is_the_tasks() -> None:
    out, _ = _run(
        """
me = os.open("/proc/thread-self/fail-nth", os.O_RDWR)
os.write(me, b"100")
print(os.pread(me, 9, 0).decode())
def other():
    with open("/proc/thread-self/fail-nth") as theirs:
        print(theirs.read())
thread = threading.Thread(target=other); thread.start(); thread.join()
if os.fork() == 0:
    with open("/proc/self/fail-nth") as childs:
        print(childs.read(), os.pread(me, 9, 0).decode(), flush=True)
    os._exit(0)
os.wait()
map_page()
print(os.pread(me, 9, 0).decode())
""",
        "--machine",
        "mock",
    )
    assert out == ["100", "0", "0", "100", "99"]


def test_debugfs_configures_the_attribute() -> None:
    out, _ = _run(
        """
D = "/sys/kernel/debug/fail_iommufd/"
print(*sorted(os.listdir("/sys/kernel/debug")))
for name, value in (("times", "-1"), ("interval", "3"), ("probability", "100")):
    with open(D + name, "w") as knob:
        knob.write(value)
print(*(map_page() for _ in range(6)))
print(open(D + "interval").read())
""",
        "--machine",
        "mock",
    )
    assert out == ["fail_iommufd", "failslab", "0", "0", "ENOENT", "0", "0", "ENOENT", "3"]


def test_only_kernels_built_for_tests_have_the_files() -> None:
    out, _ = _run(
        """
for path in ("/proc/thread-self/fail-nth", "/sys/kernel/debug/fail_iommufd/times"):
    print(os.path.exists(path))
"""
    )
    if not os.path.exists("/proc/self/fail-nth"):
        assert out == ["False", "False"]


@pytest.mark.parametrize(
    ("rules", "answers"),
    [
        (["IOAS_MAP:nth=3:EBUSY"], ["0", "0", "EBUSY", "0", "0"]),
        (["IOAS_MAP:every=2"], ["0", "ENOMEM", "0", "ENOMEM", "0"]),
        (["IOAS_MAP:EINTR", "IOAS_MAP:nth=2:EFAULT"], ["EINTR", "EFAULT", "0", "0", "0"]),
        (["IOAS_MAP:point=object lookup:nth=4"], ["0", "0", "0", "ENOENT", "0"]),
    ],
)
def test_fail_rules(rules: list[str], answers: list[str]) -> None:
    options = [word for rule in rules for word in ("--fail", rule)]
    out, said = _run("for _ in range(5): print(map_page())", "--explain", *options)
    assert out == answers
    assert said.count("fault injection") == sum(answer != "0" for answer in answers)


def test_a_rule_that_never_fires_is_said() -> None:
    _, said = _run("map_page()", "--fail", "IOAS_MAP:nth=3")
    assert "--fail IOAS_MAP:nth=3 never fired: 1 occurrence" in said


@pytest.mark.parametrize("rule", ["", "IOAS_MAPP", "IOAS_MAP:nth=0", "IOAS_MAP:point=nowhere"])
def test_a_rule_that_cannot_be(rule: str) -> None:
    _, said = _run("", "--fail", rule, code=125)
    assert said.startswith("iommufd: ")
    assert len(said.splitlines()) == 1
