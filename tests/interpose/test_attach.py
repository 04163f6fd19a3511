"""`iommufd run --listen` and `--attach`: several process trees on one machine; machine.listen(path)."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from iommufd.interpose import attach
from iommufd.interpose.realm import realm_of
from iommufd.interpose.syscalls import HOST
from iommufd.machine.machine import Machine
from iommufd.machine.snapshot import IoasView

pytestmark = pytest.mark.interposed

RUN = [sys.executable, "-m", "iommufd", "run"]
HOLDS = """
import fcntl, os, struct, sys
fd = os.open("/dev/iommu", os.O_RDWR)
fcntl.ioctl(fd, 0x3B81, bytearray(struct.pack("=III", 12, 0, 0)))
print(os.getpid(), flush=True)
sys.stdin.readline()
"""
PROGRAM = [sys.executable, "-S", "-E", "-c", HOLDS]


@contextmanager
def started(*argv: str) -> Iterator[subprocess.Popen[str]]:
    """A `iommufd run` that is over, one way or the other, at the end of the block."""
    pipe = subprocess.PIPE
    with subprocess.Popen([*RUN, *argv], text=True, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def asked(*argv: str) -> tuple[int, str]:
    command = [*RUN, *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL)
    return done.returncode, done.stderr


def test_two_trees_on_the_machine_of_this_process(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with Machine() as machine, machine.listen(path):
        assert os.stat(path).st_mode & 0o777 == 0o600
        with started("--attach", path, "--", *PROGRAM) as one, started("--attach", path, "--", *PROGRAM) as two:
            assert one.stdout is not None
            assert two.stdout is not None
            pids = {int(one.stdout.readline()), int(two.stdout.readline())}
            seen = machine.snapshot()
            assert {context.opener for context in seen.contexts} == pids
            assert len(seen.of(IoasView)) == 2
            assert one.communicate("\n")[1] == ""
            assert two.communicate("\n")[1] == ""
            assert (one.returncode, two.returncode) == (0, 0)
        assert realm_of(machine).wait_for_trees(0, 10)
        assert machine.snapshot().contexts == ()
    assert not os.path.exists(path)


def test_a_run_that_listens_waits_for_those_who_joined(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with started("--machine", "mock", "--listen", path, "--check", "--", *PROGRAM) as first:
        assert first.stdout is not None
        first.stdout.readline()
        with started("--attach", path, "--", *PROGRAM) as second:
            assert second.stdout is not None
            second.stdout.readline()
            assert first.stdin is not None
            first.stdin.write("\n")
            first.stdin.flush()
            time.sleep(0.3)
            assert first.poll() is None, "the machine is still in use"
            assert second.communicate("\n")[1] == ""
            assert second.returncode == 0
        assert first.communicate()[1].count("left behind: IOAS 1") == 2
        assert first.returncode == 1
    assert asked("--attach", path, "--", "true")[0] == 125


def test_the_exit_status_and_signals_are_the_programs(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with Machine() as machine, machine.listen(path):
        assert asked("--attach", path, "--", "sh", "-c", "exit 9") == (9, "")
        assert asked("--attach", path, "--", "nothing-of-that-name")[0] == 127
        with started("--attach", path, "--", *PROGRAM) as run:
            assert run.stdout is not None
            run.stdout.readline()
            run.send_signal(signal.SIGTERM)
            assert run.wait(20) == -signal.SIGTERM
        assert realm_of(machine).wait_for_trees(0, 10)


def test_the_program_ends_with_the_machine(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    machine = Machine()
    machine.listen(path)
    with started("--attach", path, "--", *PROGRAM) as run:
        assert run.stdout is not None
        run.stdout.readline()
        machine.close()
        assert run.wait(20) == -signal.SIGTERM
        assert run.stderr is not None
        assert "is gone; the program ends with it" in run.stderr.read()


def test_a_killed_launcher_leaves_nothing_on_the_machine(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with Machine() as machine, machine.listen(path):
        with started("--attach", path, "--", *PROGRAM) as run:
            assert run.stdout is not None
            run.stdout.readline()
            run.kill()
        assert realm_of(machine).wait_for_trees(0, 10)
        assert machine.snapshot().contexts == ()


# ---------------------------------------------------------------------------------------------------- what can go wrong


def test_nobody_listens(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    said = (
        f"iommufd: no machine listens at {path!r} (any more); start one with `iommufd run --listen {path} -- PROGRAM`\n"
    )
    assert asked("--attach", path, "--", "true") == (125, said)
    (tmp_path / "file").write_text("")
    assert asked("--attach", str(tmp_path / "file"), "--", "true")[1].endswith("is no socket\n")
    assert "at most 107 bytes" in asked("--attach", "/" + "x" * 120, "--", "true")[1]


def test_something_else_listens(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(path)
        server.listen()
        assert asked("--attach", path, "--", "true")[1].endswith("is the socket of something else\n")


def test_a_path_that_cannot_be_listened_at(tmp_path: Path) -> None:
    with Machine() as machine:
        (tmp_path / "file").write_text("")
        with pytest.raises(OSError, match="it is no socket"):
            machine.listen(tmp_path / "file")
        with machine.listen(tmp_path / "s"), pytest.raises(OSError, match="a machine listens there already"):
            machine.listen(tmp_path / "s")
        with pytest.raises(FileNotFoundError):
            machine.listen(tmp_path / "missing/s")
        with pytest.raises(OSError, match="at most 107 bytes"):
            machine.listen(tmp_path / ("x" * 120))
    code, said = asked("--listen", str(tmp_path / "file"), "--", "true")
    assert (code, "cannot listen" in said) == (125, True)


def test_a_socket_left_behind_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(path))
    with Machine() as machine, machine.listen(path):
        assert asked("--attach", str(path), "--", "true") == (0, "")


def test_options_of_the_machine_do_not_go_with_attach(tmp_path: Path) -> None:
    for option in (["--machine", "mock"], ["--trace", "x"], ["--check"], ["--fail", "*:every=2"], ["--listen", "y"]):
        code, said = asked("--attach", str(tmp_path / "s"), *option, "--", "true")
        assert code == 125
        assert f"{option[0]} belongs to the machine" in said


def speak(path: Path, message: bytes, descriptors: list[int]) -> str:
    """The error a door answers to a message."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.connect(str(path))
        socket.send_fds(client, [message], descriptors)
        answer = json.loads(client.recv(65536))
    assert set(answer) == {"error"}
    return str(answer["error"])


def test_nonsense_at_the_door_is_refused(tmp_path: Path) -> None:
    good = {"protocol": attach.PROTOCOL, "arch": HOST.name, "base": 768, "top": 1024}
    path = tmp_path / "s"
    with Machine() as machine, machine.listen(path), open(os.devnull) as other:
        assert "no message" in speak(path, b"\xff", [])
        assert "no message" in speak(path, b"[1]", [other.fileno()])
        assert "version 1 of this protocol, you 2" in speak(path, json.dumps({**good, "protocol": 2}).encode(), [])
        assert "architecture" in speak(path, json.dumps({**good, "arch": "vax"}).encode(), [])
        assert "no descriptors" in speak(path, json.dumps({**good, "top": "x"}).encode(), [])
        assert "no seccomp listener" in speak(path, json.dumps(good).encode(), [])
        assert "no seccomp listener" in speak(path, json.dumps(good).encode(), [other.fileno()])
        assert asked("--attach", str(path), "--", "true") == (0, ""), "the door still works"


def test_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s"
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with Machine() as machine, machine.listen(path):
        assert f"user {os.getuid()} cannot join" in speak(path, b"{}", [])
