"""Starting, ending and signalling the program: exit codes as env(1) has them, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.interpose.harness import Supervised

pytestmark = pytest.mark.interposed


@pytest.fixture(autouse=True)
def as_at_a_terminal() -> Iterator[None]:
    """Programs begin with these two at their default, also when the tests run under nohup or as a job behind `&`."""
    ignored = [number for number in (signal.SIGHUP, signal.SIGINT) if signal.getsignal(number) == signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)


def test_the_exit_status_passes_through(supervised: Supervised) -> None:
    assert supervised.run(["/bin/true"]).err == ""
    supervised.run(["/bin/sh", "-c", "exit 42"], code=42)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV, signal.SIGUSR1, signal.SIGPIPE])
def test_death_by_a_signal_passes_through(supervised: Supervised, number: int) -> None:
    supervised.run(["/bin/sh", "-c", f"kill -{number} $$"], code=-number)


def test_a_program_that_is_not_there(supervised: Supervised, tmp_path: Path) -> None:
    for name in ("no-such-program", "/no/such/program", "./no-such-program", ""):
        done = supervised.run([name], code=127)
        assert done.err == f"iommufd: cannot run {name!r}: No such file or directory\n"


def test_a_program_that_cannot_be_executed(supervised: Supervised, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("#!/bin/sh\n")
    denied = "Permission denied"
    for name, why in ((str(plain), denied), (str(tmp_path), denied), (f"{plain}/x", "Not a directory")):
        done = supervised.run([name], code=126)
        assert done.err == f"iommufd: cannot run {name!r}: {why}\n"


def test_programs_are_found_in_path(supervised: Supervised, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    (first / "tool").write_text("not executable")
    (second / "tool").write_text("exit 9\n")  # no interpreter line: sh runs it
    (second / "tool").chmod(0o755)
    env = {**os.environ, "PATH": f"{first}:{second}:{os.environ['PATH']}"}
    supervised.run(["tool"], code=9, env=env)
    (second / "tool").unlink()
    supervised.run(["tool"], code=126, env=env)


def test_a_second_supervisor_cannot_nest(supervised: Supervised) -> None:
    inner, _ = supervised.command(["/bin/true"])
    done = supervised.run(inner, code=125)
    assert done.err.count("\n") == 1
    assert "already runs under a supervisor" in done.err


def test_input_output_and_environment_are_untouched(supervised: Supervised) -> None:
    command, _ = supervised.command(["/bin/sh", "-c", 'cat; echo "$MINE" >&2'])
    env = {**os.environ, "MINE": "x"}
    done = subprocess.run(command, input="hello\n", capture_output=True, text=True, env=env, check=True)
    assert (done.stdout, done.stderr) == ("hello\n", "x\n")


def test_the_program_starts_with_default_signals_and_no_descriptor_of_ours(supervised: Supervised) -> None:
    ours = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("SigIgn:"))
    inherited = ours.split()[1]  # what nohup or a shell's & left ignored is the caller's wish
    supervised.python(
        """
        text = open("/proc/self/status").read()
        values = dict(line.split(":\\t") for line in text.splitlines() if ":\\t" in line)
        assert int(values["SigBlk"], 16) == 0, values["SigBlk"]
        assert values["Seccomp"] == "2" and values["NoNewPrivs"] == "1"
        glibc = 3 << 31  # signals 32 and 33, which GNU make leaves ignored in what it starts
        # 13 and 25 are what Python itself ignores
        assert int(values["SigIgn"], 16) & ~(1 << 12 | 1 << 24 | glibc | int(sys.argv[1], 16)) == 0
        open_now = sorted(int(name) for name in os.listdir("/proc/self/fd"))
        assert open_now == [0, 1, 2, 3], open_now  # 3 is the listing's own
        """,
        inherited,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT])
def test_signals_are_passed_on(supervised: Supervised, number: int) -> None:
    script = f"trap 'echo got; exit 3' {number}; echo ready; while :; do sleep 0.05; done"
    command, _ = supervised.command(["/bin/sh", "-c", script])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.read() == "got\n"
        assert process.wait() == 3


def test_the_supervisor_outlives_its_first_child(supervised: Supervised, tmp_path: Path) -> None:
    """A daemon goes on working; the exit status is the first child's, and comes when nobody is left."""
    out = tmp_path / "out"
    done = supervised.python(
        """
        fd = os.open("/dev/iommu", os.O_RDWR)
        if os.fork() == 0:
            os.setsid()
            if os.fork():
                os._exit(0)
            time.sleep(0.3)
            open(sys.argv[1], "w").write(str(fcntl.ioctl(fd, COUNT)))
            os._exit(0)
        os._exit(5)
    """,
        str(out),
        code=5,
    )
    assert out.read_text() == "1"
    assert done.log == ["opened", "released 1"]


def test_control_c_leaves_nobody(supervised: Supervised, tmp_path: Path) -> None:
    """SIGINT to the whole group, as a terminal sends it; a daemon that ignores it is ended too."""
    script = """
import os, signal, sys, time
if os.fork() == 0:
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    open(sys.argv[1], "w").write(str(os.getpid()))
    time.sleep(60)
while not os.path.exists(sys.argv[1]):
    time.sleep(0.01)
print("ready", flush=True)
time.sleep(60)
"""
    where = tmp_path / "pid"
    command, _ = supervised.command([sys.executable, "-S", "-E", "-c", script, str(where)])
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=quiet, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(20) == -signal.SIGINT
    assert not alive(int(where.read_text()))


def test_a_killed_supervisor_takes_the_program_with_it(supervised: Supervised, tmp_path: Path) -> None:
    where = tmp_path / "pid"
    command, _ = supervised.command(["/bin/sh", "-c", f"echo $$ > {where}.new; mv {where}.new {where}; exec sleep 60"])
    process = subprocess.Popen(command)
    wait_until(where.exists)
    process.kill()
    process.wait()
    wait_until(lambda: not alive(int(where.read_text())))


def test_a_filter_may_be_added_inside(supervised: Supervised) -> None:
    """no_new_privs is on already; a plain filter of the program's own stacks on ours."""
    supervised.python("""
        allow = ctypes.create_string_buffer(struct.pack("=HBBI", 6, 0, 0, 0x7FFF0000))
        program = struct.pack("=H6xQ", 1, ctypes.addressof(allow))
        assert libc.prctl(22, 2, ctypes.c_char_p(program), 0, 0) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        assert fcntl.ioctl(os.open("/dev/iommu", os.O_RDWR), COUNT) == 1
    """)
