"""machine.popen: an unmodified program on a machine of this process, both ends in one test's hands."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from iommufd.interpose.launch import LaunchError
from iommufd.interpose.realm import realm_of
from iommufd.machine.machine import Machine
from iommufd.machine.snapshot import DeviceView, FaultView, HwptView, IoasView
from tests.interpose.harness import MOCK, PREAMBLE

pytestmark = pytest.mark.interposed

HELD = """
setup = Setup()
va = private(2)
setup.map(va, 2)
print("ready", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine("test") as made:
        made.add_mock()
        yield made
    assert made.programs == []


Python = Callable[..., Any]


@pytest.fixture
def python(machine: Machine) -> Iterator[Python]:
    """Starts a Python script on the machine, with pipes; whatever is left is killed."""
    started: list[Any] = []

    def start(script: str, *args: str, **options: Any) -> Any:
        text = PREAMBLE + MOCK + textwrap.dedent(script)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        started.append(machine.popen([sys.executable, "-S", "-E", "-c", text, *args], **{**pipes, **options}))
        return started[-1]

    yield start
    for program in started:
        if program.poll() is None:
            program.kill_tree()
        for stream in (program.stdin, program.stdout, program.stderr):
            if stream is not None:
                stream.close()


def test_what_a_program_has_is_seen_while_it_runs_and_gone_when_it_ended(machine: Machine, python: Python) -> None:
    program = python(HELD)
    assert program.stdout.readline() == "ready\n"
    before = machine.snapshot()
    ioas = before.one(IoasView)
    assert (ioas.area_at(0x1001FFF), ioas.area_at(0x1002000)) == (ioas.areas[0], None)
    assert [(area.first, area.length, area.pid, area.dma) for area in ioas.areas] == [
        (0x1000000, 8192, program.pid, True)
    ]
    assert before.one(HwptView).parent == ioas.id
    assert before.pinned_pages == 2
    assert program.communicate("\n") == ("", None)
    assert program.returncode == 0
    after = machine.snapshot()
    assert (after.contexts, after.pinned_pages) == ((), 0)
    assert ioas.areas, "what was seen stays as it was"


def test_several_programs_share_the_machine(machine: Machine, python: Python) -> None:
    first, second = python(HELD), python(HELD)
    assert [p.stdout.readline() for p in (first, second)] == ["ready\n"] * 2
    both = machine.snapshot()
    assert {area.pid for area in both.areas} == {first.pid, second.pid}
    first.kill()
    assert first.wait() == -signal.SIGKILL
    assert {area.pid for area in machine.snapshot().areas} == {second.pid}
    second.communicate("\n")
    assert machine.snapshot().contexts == ()


def test_a_file_is_the_same_in_both_trees_it_was_sent_between(machine: Machine, python: Python, tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    receiver = python(
        """
        server = socket.socket(socket.AF_UNIX); server.bind(sys.argv[1]); server.listen()
        print("listening", flush=True)
        fd = socket.recv_fds(server.accept()[0], 1, 1)[1][0]
        sys.stdin.readline()
        print(call(fd, 0x81, "III", 0, 0)[2], flush=True)
        """,
        path,
    )
    assert receiver.stdout.readline() == "listening\n"
    sender = python(
        """
        client = socket.socket(socket.AF_UNIX); client.connect(sys.argv[1])
        fd = os.open("/dev/iommu", os.O_RDWR)
        call(fd, 0x81, "III", 0, 0)
        socket.send_fds(client, [b"x"], [fd])
        """,
        path,
    )
    sender.communicate()
    assert len(machine.snapshot().of(IoasView)) == 1, "the receiver holds the sender's context"
    assert receiver.communicate("\n")[0] == "2\n"
    assert machine.snapshot().contexts == ()


def test_devices_fault_and_the_program_answers(machine: Machine, python: Python) -> None:
    program = python(
        """
        setup = Setup()
        request = bytearray(struct.pack("=IIII", 16, 0, 0, 0))
        fcntl.ioctl(setup.fd, 0x3B8E, request)
        fault, fault_fd = struct.unpack_from("=II", request, 8)
        stdev, auto, device = struct.unpack_from("=III", test(setup.fd, 2, setup.ioas, "III", 0, 0, 0))
        hwpt = bytearray(struct.pack("=IIIIIIIIQII", 48, 4, device, setup.ioas, 0, 0, 0, 0, 0, fault, 0))
        fcntl.ioctl(setup.fd, 0x3B89, hwpt)
        test(setup.fd, 10, stdev, "I", struct.unpack_from("=I", hwpt, 16)[0])
        print("attached", flush=True)
        select.select([fault_fd], [], [])
        event = os.read(fault_fd, 40)
        print(hex(struct.unpack_from("=Q", event, 24)[0]), flush=True)
        os.write(fault_fd, struct.pack("=II", struct.unpack_from("=I", event, 36)[0], 0))
        print("answered", flush=True)
        sys.stdin.readline()
        """
    )
    assert program.stdout.readline() == "attached\n"
    names = [view.name for view in machine.snapshot().of(DeviceView) if view.attached.get(0)]
    request = machine.page_request("iommufd_mock1", 0x5000, "rw")
    assert names == ["iommufd_mock0", "iommufd_mock1"]
    assert program.stdout.readline() == "0x5000\n"
    assert program.stdout.readline() == "answered\n"
    assert request.answer == 0
    assert machine.snapshot().one(FaultView).awaiting == 0
    with pytest.raises(OSError, match="has no fault queue"):
        machine.page_request("iommufd_mock0", 0x5000)


def test_calls_fail_by_rule(machine: Machine, python: Python) -> None:
    program = python(
        """
        setup = Setup()
        print("ready", flush=True)
        sys.stdin.readline()
        fails(errno.ENOSPC, setup.map, private(1), 1)
        setup.map(private(1), 1)
        """
    )
    assert program.stdout.readline() == "ready\n"
    with machine.failing("IOAS_MAP:ENOSPC") as rule:
        program.communicate("\n")
    assert (program.returncode, rule.hits) == (0, 1)


# ------------------------------------------------------------------------------------------------- as subprocess.Popen


def test_everything_of_popen_works(machine: Machine, tmp_path: Path) -> None:
    program = machine.popen(
        "pwd; echo $NAME; echo wrong >&2; exit 7",
        shell=True,
        cwd=tmp_path,
        env={"NAME": "ä\udcff", "PATH": "/usr/bin:/bin"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert isinstance(program, subprocess.Popen)
    assert program.communicate()[0] == os.fsencode(f"{tmp_path}\nä\udcff\nwrong\n")
    assert program.returncode == 7


def test_the_environment_is_exactly_the_one_given(machine: Machine) -> None:
    program = machine.popen(["env"], env={"A": "1", "PATH": "/usr/bin:/bin"}, stdout=subprocess.PIPE)
    assert sorted(program.communicate()[0].split()) == [b"A=1", b"PATH=/usr/bin:/bin"]


def test_descriptors_are_those_that_were_passed(machine: Machine, tmp_path: Path) -> None:
    with open(tmp_path / "file", "w+b") as file:
        program = machine.popen(["ls", "/proc/self/fd"], pass_fds=[file.fileno()], stdout=subprocess.PIPE, text=True)
        seen = set(map(int, program.communicate()[0].split()))
        assert file.fileno() in seen
        assert len(seen) == 5, "the standard ones, what was passed, and the directory itself"


def test_signals_and_timeouts(machine: Machine) -> None:
    program = machine.popen(["sleep", "60"])
    with pytest.raises(subprocess.TimeoutExpired):
        program.wait(timeout=0.05)
    assert program.poll() is None
    program.terminate()
    assert program.wait() == -signal.SIGTERM


def test_a_program_that_is_not_there(machine: Machine, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing-of-that-name"):
        machine.popen(["nothing-of-that-name"])
    (tmp_path / "data").write_text("no program")
    with pytest.raises(PermissionError):
        machine.popen([tmp_path / "data"])
    for nothing in ([], "", [""]):
        with pytest.raises(ValueError, match="no program"):
            machine.popen(nothing)
    with pytest.raises(FileNotFoundError):
        machine.popen(["true"], cwd=tmp_path / "missing")
    assert (machine.programs, realm_of(machine).trees) == ([], [])


def test_failures_leave_nothing_behind(machine: Machine) -> None:
    machine.popen(["true"]).wait()
    gc.collect()
    before = (set(os.listdir("/proc/self/fd")), threading.active_count())
    for _ in range(3):
        with pytest.raises(FileNotFoundError):
            machine.popen(["nothing-of-that-name"], stdout=subprocess.PIPE)
        machine.popen(["true"]).wait()
    assert (set(os.listdir("/proc/self/fd")), threading.active_count()) == before


def test_a_thread_other_than_the_main_one_may_start_programs(machine: Machine) -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(machine.popen(["sh", "-c", "exit 3"]).wait()))
    thread.start()
    thread.join()
    assert codes == [3]


def test_what_a_program_leaves_running_is_served_on(machine: Machine, python: Python) -> None:
    program = python(
        """
        import os
        if os.fork():
            os._exit(0)
        setup = Setup()
        print(os.getpid(), flush=True)
        sys.stdin.readline()
        setup.map(private(1), 1)
        print("mapped", flush=True)
        """
    )
    child = int(program.stdout.readline())
    assert program.wait() == 0
    assert len(machine.snapshot().of(IoasView)) == 1
    program.stdin.write("\n")
    program.stdin.flush()
    assert program.stdout.readline() == "mapped\n"
    deadline = time.monotonic() + 10
    while machine.snapshot().contexts and time.monotonic() < deadline:
        time.sleep(0.01)
    assert machine.snapshot().contexts == (), f"process {child} has ended"


def test_closing_the_machine_ends_its_programs() -> None:
    machine = Machine("short")
    program = machine.popen(["sh", "-c", "sleep 60 & echo started; wait; exec sleep 60"], stdout=subprocess.PIPE)
    assert program.stdout.readline() == b"started\n"
    machine.close()
    assert program.wait(timeout=10) == -signal.SIGKILL
    assert program.communicate()[0] == b"", "its child is gone too"
    with pytest.raises(ValueError, match="closed"):
        machine.popen(["true"])


def test_under_a_supervisor_there_can_be_no_other() -> None:
    code = """
    from iommufd import Machine
    try:
        Machine().popen(["true"])
    except Exception as error:
        print(type(error).__name__, error)
    """
    done = subprocess.run(
        [sys.executable, "-m", "iommufd", "run", "--", sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert LaunchError.__name__ in done.stdout
    assert "nested" in done.stdout
