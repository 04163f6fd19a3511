"""Replays: the calls of a trace answered again, the same; what differs is named, what cannot be compared is said."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from iommufd.machine.presets import preset
from iommufd.observe import replay as module
from iommufd.observe.replay import Report, replay
from iommufd.observe.trace import read_trace
from tests.interpose.harness import MOCK, PREAMBLE
from tools import kernel_tree

ROOT = Path(__file__).parent.parent.parent


def trace_of(tmp_path: Path, *program: str, options: Iterable[str] = ()) -> list[str]:
    path = tmp_path / "trace"
    command = [sys.executable, "-m", "iommufd", "run", "--machine", "mock", *options, "--trace", str(path), "--"]
    subprocess.run([*command, *program], check=True, timeout=120, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return path.read_text().splitlines(keepends=True)


def script(text: str) -> list[str]:
    return [sys.executable, "-S", "-E", "-c", PREAMBLE + MOCK.replace("\\\\0", "\\0") + text]


def replayed(lines: Iterable[str]) -> Report:
    head, records = read_trace(lines)
    with preset(head["machine"], head["kernel"]) as machine:
        return replay(machine, records)


def changed(lines: list[str], cmd: str, **members: Any) -> list[str]:
    """The trace with the last call of ``cmd`` recorded otherwise."""
    found = [json.loads(line) for line in lines]
    last = [line for line in found if line.get("cmd") == cmd or line.get("call") == cmd][-1]
    last.update(members)
    return [json.dumps(line) + "\n" for line in found]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return trace_of(tmp_path_factory.mktemp("demo"), sys.executable, str(ROOT / "examples/raw_ioctl.py"))


@pytest.mark.interposed
def test_the_demo_replays_the_same(demo: list[str]) -> None:
    report = replayed(demo)
    assert (report.differences, dict(report.skipped)) == ([], {})
    assert report.equal == report.calls == len(demo) - 1 > 8


@pytest.mark.interposed
def test_another_answer_is_a_difference(demo: list[str]) -> None:
    report = replayed(changed(demo, "IOMMU_IOAS_UNMAP", result=0, error=0))
    assert len(report.differences) == 1
    assert report.differences[0].what.startswith("ENOENT (")
    report = replayed(changed(demo, "open", result=5))
    assert report.ok, "which number a descriptor has is the program's affair"
    first = json.loads(demo[2])
    assert first["cmd"] == "IOMMU_IOAS_ALLOC"
    first["out_raw"] = "0c0000000000000009000000"
    report = replayed([*demo[:2], json.dumps(first) + "\n"])
    assert [d.what for d in report.differences] == ["out_ioas_id=1 instead of 9"]
    assert "IOMMU_IOAS_ALLOC" in str(report.differences[0])


@pytest.mark.interposed
def test_refusals_of_every_kind_replay(tmp_path: Path) -> None:
    """Bad structs, bad memory, tails, queues, files handed over, descriptors of several processes."""
    lines = trace_of(
        tmp_path,
        *script("""
setup = Setup(); va = private(4); setup.map(va, 4)
fails(errno.EEXIST, setup.map, va, 1)
fails(errno.EFAULT, fcntl.ioctl, setup.fd, 0x3B81, 8)
fails(errno.ENOTTY, fcntl.ioctl, setup.fd, 0x3B9F, bytearray(struct.pack("=I", 4)))
fails(errno.E2BIG, fcntl.ioctl, setup.fd, 0x3B81, bytearray(struct.pack("=IIII", 16, 0, 0, 1)))
fcntl.ioctl(setup.fd, 0x3B81, bytearray(struct.pack("=IIII", 16, 0, 0, 0)))
hole = private(2); libc.munmap(hole, page)
fails(errno.EFAULT, setup.map, hole, 2, WINDOW + 0x100000)
ranges = ctypes.create_string_buffer(64)
call(setup.fd, 0x84, "IIIIQQ", setup.ioas, 4, 0, ctypes.addressof(ranges), 0)
fails(errno.EFAULT, call, setup.fd, 0x84, "IIIIQQ", setup.ioas, 4, 0, 4096, 0)
setup.write(b"device")
queue = bytearray(struct.pack("=IIII", 16, 0, 0, 0)); fcntl.ioctl(setup.fd, 0x3B8E, queue)
assert os.read(struct.unpack_from("=I", queue, 12)[0], 40) == b""
memfd = os.memfd_create("x"); os.ftruncate(memfd, 8192)
call(setup.fd, 0x8F, "IIIiQQQ", 7, setup.ioas, memfd, 0, 8192, WINDOW + 0x200000)
if os.fork() == 0:
    setup.unmap(4); os._exit(0)
os.wait()
fails(errno.ENOENT, setup.unmap, 4)
"""),
    )
    report = replayed(lines)
    assert [str(d) for d in report.differences] == []
    assert report.equal > 15
    assert set(report.skipped) <= {module.OWN_MEMORY}


@pytest.mark.interposed
def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    lines = trace_of(
        tmp_path,
        *script("""
setup = Setup(); va = private(2)
fails(errno.ENOSPC, setup.map, va, 2)
setup.map(va, 2); fill(va, b"mine", 2)
setup.read(8)
file = os.open("/proc/self/exe", os.O_RDONLY)
fails(errno.EINVAL, call, setup.fd, 0x8F, "IIIiQQQ", 7, setup.ioas, file, 0, 4096, WINDOW + 0x200000)
"""),
        options=["--fail", "IOAS_MAP:ENOSPC"],
    )
    report = replayed(lines)
    assert [str(d) for d in report.differences] == []
    assert dict(report.skipped) == {module.INJECTED: 1, module.OWN_MEMORY: 1, module.HOST_FILE: 1}
    late = replayed([lines[0], *lines[2:]])
    assert late.skipped[module.FOREIGN_FILE] > 3
    assert not late.differences


@pytest.mark.interposed
@pytest.mark.parametrize("fixture", ["vfio_compat_mock_domain", "iommufd_viommu", "iommufd_dirty_tracking"])
def test_the_kernels_selftest_replays(tmp_path: Path, fixture: str) -> None:
    built = kernel_tree.cached("selftests/iommufd")
    if built is None:
        pytest.skip("the kernel's selftest is not built: make conformance")
    report = replayed(trace_of(tmp_path, str(built), "-f", fixture))
    assert [str(d) for d in report.differences] == []
    assert report.equal > 0.9 * report.calls


# ------------------------------------------------------------------------------------------------------------- command


def command(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "iommufd", "replay", *arguments],
        capture_output=True,
        text=True,
        input=text,
        timeout=60,
        check=False,
    )


@pytest.mark.interposed
def test_the_command(demo: list[str], tmp_path: Path) -> None:
    done = command("-", text="".join(demo))
    calls = len(demo) - 1
    assert (done.returncode, done.stdout) == (0, f"{calls} calls: {calls} answered as recorded, 0 otherwise\n")
    wrong = "".join(changed(demo, "IOMMU_IOAS_UNMAP", result=0, error=0))
    done = command("-", text=wrong)
    assert done.returncode == 1
    assert "now: ENOENT" in done.stdout
    assert ", 1 otherwise" in done.stdout
    assert "... and 1 more" in command("-", "--most", "0", text=wrong).stdout
    done = command("-", "--machine", "default", text="".join(demo))
    assert done.returncode == 1, "the machine default has no test hardware"


def test_what_is_no_trace(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for arguments, text, sentence in (
        ([str(tmp_path / "missing")], "", "No such file"),
        ([str(tmp_path / "binary")], "", "can't decode"),
        (["-"], "hello", "not the header of a trace"),
        (["-"], '{"schema":"iommufd-trace","version":9}\n', "newer than 1"),
        (["-"], '{"schema":"iommufd-trace","version":1,"machine":"mine","kernel":"7.3"}\n', "--machine FILE"),
        (["-"], '{"schema":"iommufd-trace","version":1,"machine":"mock","kernel":"x"}\n', "not a kernel release"),
    ):
        done = command(*arguments, text=text)
        assert done.returncode == 2
        assert sentence in done.stderr
        assert done.stderr.count("\n") == 1


def test_random_bytes_are_refused_or_replayed() -> None:
    """A trace is input: whatever is in it, a replay ends with a report or one of its errors."""
    head = '{"schema":"iommufd-trace","version":1,"machine":"mock","kernel":"7.3"}\n'
    line = {"t": 0, "pid": 1, "tid": 1, "call": "open", "file": 1, "path": "/dev/iommu", "flags": 2, "result": 3}
    raw = {**line, "call": "ioctl", "number": "0x3b85", "arg": "0xfffffffffffffff0", "raw": "28" + "f" * 78}
    raw["size"] = 2**32 - 1
    mapped = {**line, "call": "mmap", "offset": "0x10", "size": 4096, "flags": 3}
    other = {**line, "call": "read", "arg": "0x0", "size": 40, "raw": "00" * 40, "result": 40}
    trace = io.StringIO(head + "".join(json.dumps(item) + "\n" for item in (line, raw, mapped, other)))
    report = replayed(trace)
    assert report.calls == 4
