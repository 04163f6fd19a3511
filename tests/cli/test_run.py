"""`iommufd run`: options, exit codes, what is printed where."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.interposed

PROGRAM = """
import fcntl, os, struct, sys
fd = os.open("/dev/iommu", os.O_RDWR)
ioas = bytearray(struct.pack("=III", 12, 0, 0))
fcntl.ioctl(fd, 0x3B81, ioas)
try:
    fcntl.ioctl(fd, 0x3B80, struct.pack("=II", 8, 77))
except OSError as error:
    print(error.errno)
if "tidy" in sys.argv:
    fcntl.ioctl(fd, 0x3B80, struct.pack("=II", 8, struct.unpack("=III", ioas)[2]))
sys.exit(int(sys.argv[1]))
"""


def run(*arguments: str, code: int = 0, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "iommufd", "run", *arguments],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
        check=False,
        env=env,
    )
    assert done.returncode == code, done
    return done


def program(*arguments: str) -> list[str]:
    return ["--", sys.executable, "-S", "-E", "-c", PROGRAM, *arguments]


def test_a_program_sees_the_default_machine() -> None:
    done = run(*program("0"))
    assert (done.stdout, done.stderr) == ("2\n", "")


def test_explain_says_why() -> None:
    done = run("--explain", *program("5"), code=5)
    assert done.stdout == "2\n"
    lines = done.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("iommufd: ")
    assert "IOMMU_DESTROY" in lines[0]
    assert "77" in lines[0]


def test_trace_writes_a_line_per_call(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    run("--trace", str(trace), *program("0", "tidy"))
    lines = [json.loads(line) for line in trace.read_text().splitlines()]
    assert lines[0]["machine"] == "default"
    assert [line.get("call") for line in lines[1:]] == ["open", "ioctl", "ioctl", "ioctl", "close"]
    decoded = subprocess.run(
        [sys.executable, "-m", "iommufd", "decode", str(trace)], capture_output=True, text=True, check=True
    )
    assert "ENOENT" in decoded.stdout


def test_check_lists_what_is_left_and_fails() -> None:
    done = run("--check", *program("0"), code=1)
    assert "left behind: " in done.stderr
    assert "IOAS 1" in done.stderr
    assert run("--check", *program("0", "tidy")).stderr == ""


def test_kernel_hides_what_came_later() -> None:
    """IOAS_MAP_FILE came with 6.13."""
    script = """
import errno, fcntl, os, struct
fd = os.open("/dev/iommu", os.O_RDWR)
try:
    fcntl.ioctl(fd, 0x3B8F, struct.pack("=IIIiQQQ", 40, 0, 0, 0, 0, 0, 0))
except OSError as error:
    print(errno.errorcode[error.errno])
"""
    assert run("--kernel", "6.6", "--", sys.executable, "-S", "-c", script).stdout == "ENOTTY\n"
    assert run("--kernel", "6.13", "--", sys.executable, "-S", "-c", script).stdout != "ENOTTY\n"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--machine", "nonsense", "--", "true"], "nonsense"),
        (["--kernel", "5.4", "--", "true"], "6.2"),
        (["--kernel", "new", "--", "true"], "new"),
        (["--trace", "/nowhere/trace", "--", "true"], "/nowhere/trace"),
        (["--nonsense", "--", "true"], "--nonsense"),
        ([], "no program"),
        (["--"], "no program"),
    ],
)
def test_wrong_use_is_one_sentence_and_125(arguments: list[str], word: str) -> None:
    done = run(*arguments, code=125)
    assert word in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_program_that_is_not_there_is_127_and_one_that_cannot_run_126(tmp_path: Path) -> None:
    assert run("--", "/no/such", code=127).stderr == "iommufd: cannot run '/no/such': No such file or directory\n"
    assert run("no-such-program", code=127).stderr.count("\n") == 1
    assert run("--", str(tmp_path), code=126).stderr.count("\n") == 1


def test_options_after_the_program_are_the_programs() -> None:
    assert run("echo", "--machine", "x", "--", "-n").stdout == "--machine x -- -n\n"


def test_the_command_and_the_module_are_equal() -> None:
    command = Path(sys.executable).with_name("iommufd")
    if not command.exists():
        pytest.skip("the package is not installed beside this Python")
    done = subprocess.run([str(command), "run", "--", "sh", "-c", "exit 7"], check=False, timeout=60)
    assert done.returncode == 7


def test_main_lists_the_sub_commands() -> None:
    done = subprocess.run([sys.executable, "-m", "iommufd"], capture_output=True, text=True, check=True)
    assert "run" in done.stdout
    assert "doctor" in done.stdout
    wrong = subprocess.run([sys.executable, "-m", "iommufd", "nonsense"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "nonsense" in wrong.stderr
    version = subprocess.run([sys.executable, "-m", "iommufd", "--version"], capture_output=True, text=True, check=True)
    assert version.stdout.startswith("iommufd ")


def test_an_ordinary_user_can_do_it(tmp_path: Path) -> None:
    """As uid 65534, with a Python and a package that user can read."""
    if os.getuid() != 0:
        pytest.skip("only root can become somebody else; as a user every other test shows it")
    import iommufd

    source = Path(iommufd.__file__).parent.parent
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1"}
    command = ["/usr/bin/python3", "-m", "iommufd", "run", "--", "/usr/bin/python3", "-S", "-c", PROGRAM, "3"]
    readable = subprocess.run(
        ["/usr/bin/python3", "-c", "import sys, iommufd; sys.exit(sys.version_info < (3, 11))"],
        env=env, user=65534, group=65534, extra_groups=[], cwd="/", capture_output=True, check=False,
    )  # fmt: skip
    if readable.returncode:
        pytest.skip("this user cannot read the package, or /usr/bin/python3 is too old")
    done = subprocess.run(
        command, env=env, user=65534, group=65534, extra_groups=[], cwd="/", capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (3, "2\n"), done


def test_starting_is_quick() -> None:
    """`iommufd run -- true` costs at most 250 ms over `true` on an idle host; several times that on a busy one."""
    begun = time.monotonic()
    run("--", "true")
    assert time.monotonic() - begun < 2.5
