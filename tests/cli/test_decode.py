"""iommufd decode: the text, its selections, the table, and what it says to files that are no traces."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from iommufd.cli import decode
from iommufd.observe.record import Record
from iommufd.observe.trace import header, to_json
from iommufd.uapi import iommufd as u
from iommufd.uapi import iommufd_test as t
from iommufd.uapi.declare import Struct


def ioctl(number: int, value: Struct, pid: int = 10, us: float = 20.0, error: int = 0, why: str = "") -> Record:
    record = Record("ioctl")
    record.fd, record.file, record.pid, record.tid, record.number, record.us = 3, 1, pid, pid, number, us
    record.raw, record.size = value.pack(), value.SIZE
    record.errno, record.why, record.result = error, why, -1 if error else 0
    return record


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    opened = Record("open")
    opened.pid = opened.tid = 10
    opened.path, opened.flags, opened.result, opened.file = "/dev/iommu", 2, 3, 1
    records = [
        opened,
        ioctl(u.IOMMU_IOAS_ALLOC, u.iommu_ioas_alloc(size=12), us=12.0),
        ioctl(u.IOMMU_IOAS_ALLOC, u.iommu_ioas_alloc(size=12), us=14.0),
        ioctl(u.IOMMU_IOAS_ALLOC, u.iommu_ioas_alloc(size=12, flags=1), error=errno.EOPNOTSUPP, why="flags must be 0"),
        ioctl(t.IOMMU_TEST_CMD, t.test_mock_domain(size=72, op=2, id=1), pid=11),
        ioctl(u.IOMMU_DESTROY, u.iommu_destroy(size=8, id=7), pid=11, error=errno.ENOENT, why="there is no object 7"),
    ]
    path = tmp_path / "trace"
    lines = [header("mock", (7, 3)), *map(to_json, records)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def shown(argv: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert decode.main(argv) == 0
    return capsys.readouterr().out.splitlines()


def test_every_call_as_strace_would(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    no_entry = "-1 ENOENT (No such file or directory)"
    assert shown([str(trace)], capsys) == [
        'open("/dev/iommu", O_RDWR) = 3',
        "ioctl(3, IOMMU_IOAS_ALLOC, {size=12, flags=0}) = 0",
        "ioctl(3, IOMMU_IOAS_ALLOC, {size=12, flags=0}) = 0",
        "ioctl(3, IOMMU_IOAS_ALLOC, {size=12, flags=1}) = -1 EOPNOTSUPP (Operation not supported)  # flags must be 0",
        "[pid 11] ioctl(3, IOMMU_TEST_CMD, {size=72, op=MOCK_DOMAIN, id=1}) = 0",
        f"[pid 11] ioctl(3, IOMMU_DESTROY, {{size=8, id=7}}) = {no_entry}  # there is no object 7",
    ]


def test_only_what_failed(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [line.split(" = ")[1][:12] for line in shown(["--failed", str(trace)], capsys)] == [
        "-1 EOPNOTSUP",
        "-1 ENOENT (N",
    ]


def test_only_one_process(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(shown(["--pid", "11", str(trace)], capsys)) == 2
    assert len(shown(["--pid", "10", "--pid", "11", str(trace)], capsys)) == 6
    assert len(shown(["--pid", "10", "--failed", str(trace)], capsys)) == 1
    assert shown(["--pid", "99", str(trace)], capsys) == []


def test_times(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(["--time", str(trace)], capsys)
    assert lines[0] == '    0.000000 open("/dev/iommu", O_RDWR) = 3'
    assert lines[1] == "    0.000000 ioctl(3, IOMMU_IOAS_ALLOC, {size=12, flags=0}) = 0 <0.000012>"


def test_summary(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(["--summary", str(trace)], capsys) == [
        "call                         count  errors  median µs",
        "IOMMU_IOAS_ALLOC                 3       1       14.0",
        "IOMMU_DESTROY                    1       1       20.0",
        "IOMMU_TEST_CMD(MOCK_DOMAIN)      1               20.0",
        "open                             1                  -",
        "total                            6       2",
    ]


def test_summary_of_what_failed(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(shown(["--summary", "--failed", str(trace)], capsys)) == 4


def test_standard_input(trace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with trace.open() as source:
        monkeypatch.setattr("sys.stdin", source)
        assert len(shown(["-"], capsys)) == 6


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert decode.main([str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err == f"iommufd decode: {tmp_path / 'none'}: No such file or directory\n"


def test_a_broken_line_ends_with_a_sentence_after_what_came_before(
    trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = trace.read_text().splitlines(keepends=True)
    trace.write_text("".join([*text[:3], "nonsense\n", *text[3:]]))
    assert decode.main([str(trace)]) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert err.startswith(f"iommufd decode: {trace}: line 4: ")


def test_binary_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "binary"
    path.write_bytes(b"\x7fELF\xff\xfe\x00")
    assert decode.main([str(path)]) == 1
    assert capsys.readouterr().err.startswith(f"iommufd decode: {path}: ")


def test_wrong_arguments() -> None:
    with pytest.raises(SystemExit) as stopped:
        decode.main([])
    assert stopped.value.code == 2
