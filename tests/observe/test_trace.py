"""The trace: what is written, that it reads back as the same calls, and what happens to files that are no traces."""

from __future__ import annotations

import errno
import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iommufd.engine.dispatch import Call, Respond
from iommufd.engine.fault import FaultQueue
from iommufd.engine.file import File
from iommufd.errors import KernelError
from iommufd.observe.format import show_call
from iommufd.observe.record import KINDS, Memory, NewFile, Record
from iommufd.observe.trace import SCHEMA, VERSION, TraceError, TraceWriter, from_json, header, read_trace, to_json
from iommufd.uapi import iommufd as u
from iommufd.uapi import iommufd_test as t

from .caller import BASE, Engine

HEAD = header("mock", (7, 3), ["./prog", "-x"])


class Kept(io.StringIO):
    """Keeps its text when closed."""

    text = ""

    def close(self) -> None:
        self.text = self.getvalue()
        super().close()


def traced(respond: Respond = Respond.ON_SUCCESS, **rows: Any) -> tuple[Engine, TraceWriter, Kept]:
    stream = Kept()
    writer = TraceWriter(stream, HEAD)
    return Engine([writer], respond, **rows), writer, stream


def written(writer: TraceWriter, stream: Kept) -> list[dict[str, Any]]:
    writer.close()
    return [json.loads(line) for line in stream.text.splitlines()]


def alloc(call: Call) -> None:
    assert isinstance(call.cmd, u.iommu_ioas_alloc)
    call.cmd.out_ioas_id = 2


def refuse(call: Call) -> None:
    raise KernelError(errno.ENOENT, "there is no object 9")


def test_the_header_comes_first() -> None:
    _, writer, stream = traced()
    (first,) = written(writer, stream)
    assert (first["schema"], first["version"]) == (SCHEMA, VERSION) == ("iommufd-trace", 1)
    assert (first["machine"], first["kernel"], first["program"]) == ("mock", "7.3", ["./prog", "-x"])
    assert first["started"] > 1.7e9


def test_a_successful_call() -> None:
    engine, writer, stream = traced(IOMMU_IOAS_ALLOC=alloc)
    engine.ioctl(u.IOMMU_IOAS_ALLOC, u.iommu_ioas_alloc(size=12))
    line = written(writer, stream)[1]
    assert 0 <= line.pop("t") < 60
    assert 0 < line.pop("us") < 1e6
    assert line == {
        "pid": 100,
        "tid": 101,
        "call": "ioctl",
        "file": 1,
        "kind": "iommu",
        "fd": 3,
        "cmd": "IOMMU_IOAS_ALLOC",
        "number": "0x3b81",
        "arg": hex(BASE),
        "size": 12,
        "raw": "0c0000000000000000000000",
        "in": {"size": 12, "flags": 0, "out_ioas_id": 0},
        "out": {"size": 12, "flags": 0, "out_ioas_id": 2},
        "out_raw": "0c0000000000000002000000",
        "result": 0,
    }


def test_a_failing_call() -> None:
    engine, writer, stream = traced(IOMMU_DESTROY=refuse)
    engine.ioctl(u.IOMMU_DESTROY, u.iommu_destroy(size=8, id=9))
    line = written(writer, stream)[1]
    assert (line["result"], line["errno"], line["error"], line["why"]) == (-1, "ENOENT", 2, "there is no object 9")
    assert "out" not in line
    assert line["us"] > 0


def test_a_call_refused_before_its_handler() -> None:
    engine, writer, stream = traced(IOMMU_IOAS_ALLOC=alloc)
    engine.ioctl(u.IOMMU_IOAS_ALLOC, at=0x10)
    engine.ioctl(u.IOMMU_IOAS_ALLOC, u.iommu_ioas_alloc(size=8, flags=3))
    unreadable, short = written(writer, stream)[1:]
    assert (unreadable["errno"], unreadable["arg"]) == ("EFAULT", "0x10")
    assert {"raw", "in", "us"}.isdisjoint(unreadable)
    assert (short["errno"], short["size"], short["raw"]) == ("EINVAL", 8, "0800000003000000")


def test_a_failing_call_that_still_answers() -> None:
    """HWPT_INVALIDATE gives its struct back on errors too (core 1.4)."""

    def invalidate(call: Call) -> None:
        assert isinstance(call.cmd, u.iommu_hwpt_invalidate)
        call.cmd.entry_num = 1
        call.respond()
        raise KernelError(errno.EINVAL, "entry 1 is wrong")

    engine, writer, stream = traced(Respond.HANDLER, IOMMU_HWPT_INVALIDATE=invalidate)
    entries = t.iommu_hwpt_invalidate_selftest(flags=0, iotlb_id=1).pack() + b"\xff" * 8
    engine.task.write(BASE + 0x100, entries)
    engine.ioctl(
        u.IOMMU_HWPT_INVALIDATE,
        u.iommu_hwpt_invalidate(
            size=32, hwpt_id=5, data_uptr=BASE + 0x100, data_type=0xDEADBEEF, entry_len=8, entry_num=2
        ),
    )
    line = written(writer, stream)[1]
    assert line["memory"] == [{"field": "data_uptr", "addr": hex(BASE + 0x100), "size": 16, "data": entries.hex()}]
    assert (line["in"]["entry_num"], line["out"]["entry_num"]) == (2, 1)
    assert "data_uptr=[{flags=0, iotlb_id=1}, {flags=4294967295" in show_call(from_json(line))


def test_memory_the_call_wrote() -> None:
    def info(call: Call) -> None:
        cmd = call.cmd
        assert isinstance(cmd, u.iommu_hw_info)
        call.task.write(cmd.data_uptr, t.iommu_test_hw_info(test_reg=0xDEADBEEF).pack())
        cmd.out_data_type, cmd.data_len = t.IOMMU_HW_INFO_TYPE_SELFTEST, 8

    engine, writer, stream = traced(IOMMU_GET_HW_INFO=info)
    ask = u.iommu_hw_info(size=40, dev_id=1, data_len=8, data_uptr=BASE + 0x200)
    engine.ioctl(u.IOMMU_GET_HW_INFO, ask)
    line = written(writer, stream)[1]
    assert line["out_memory"][0]["data"] == "00000000efbeadde"
    assert "=> {data_uptr={flags=0, test_reg=0xdeadbeef}, out_data_type=0xfeedbeef" in show_call(from_json(line))


def test_descriptors_a_call_makes() -> None:
    class Queue(File):
        link = FaultQueue.link if hasattr(FaultQueue, "link") else "anon_inode:[iommufd-pgfault]"

    def queue(call: Call) -> None:
        cmd = call.cmd
        assert isinstance(cmd, u.iommu_fault_alloc)
        cmd.out_fault_id, cmd.out_fault_fd = 4, call.reserve_fd(Queue())

    engine, writer, stream = traced(IOMMU_FAULT_QUEUE_ALLOC=queue)
    engine.ioctl(u.IOMMU_FAULT_QUEUE_ALLOC, u.iommu_fault_alloc(size=16))
    line = written(writer, stream)[1]
    assert line["files"] == [{"fd": 8, "file": 2, "kind": "fault"}]


def test_the_other_calls() -> None:
    engine, writer, stream = traced()
    tell, task, file = engine.world.event, engine.task, engine.context
    tell("open", task=task, path="/dev/iommu", flags=2, file=file, result=3, error=None, us=1500.0)
    tell("write", task=task, file=file, arg=BASE, size=8, data=b"12345678", result=8, error=None)
    tell("mmap", task=task, file=file, offset=0x1000, size=4096, prot=3, result=BASE, error=None)
    tell("close", file=file)
    tell("map", iova=0x1000)
    lines = written(writer, stream)[1:]
    assert [line["call"] for line in lines] == ["open", "write", "mmap", "close"]
    assert all(line["file"] == 1 for line in lines)
    assert [show_call(from_json(line)) for line in lines] == [
        'open("/dev/iommu", O_RDWR) = 3',
        "write(3, <8 bytes: 3132333435363738>, 8) = 8",
        "mmap(NULL, 4096, PROT_READ|PROT_WRITE, MAP_SHARED, 3, 0x1000) = 0x7f0000000000",
        "close(iommu#1) = 0",
    ]


def test_a_full_disk_stops_the_trace_and_nothing_else() -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    writer = TraceWriter(Full(), HEAD)
    engine = Engine([writer], IOMMU_IOAS_ALLOC=alloc)
    assert engine.ioctl(u.IOMMU_IOAS_ALLOC, u.iommu_ioas_alloc(size=12)) == 0
    assert writer.dropped is not None
    assert "No space left" in writer.dropped


hexes = st.binary(max_size=64)


@st.composite
def records(draw: st.DrawFn) -> Record:
    record = Record(draw(st.sampled_from(KINDS)))
    record.time = draw(st.integers(0, 10**9)) / 1e6
    record.pid, record.tid = draw(st.integers(0, 2**22)), draw(st.integers(0, 2**22))
    record.fd = draw(st.none() | st.integers(0, 1024))
    record.file = draw(st.none() | st.integers(1, 99))
    if record.file is not None:
        record.kind = draw(st.sampled_from(["iommu", "fault", "device"]))
    record.result = draw(st.integers(-1, 2**63))
    record.errno = draw(st.integers(0, 133))
    record.why = draw(st.text(max_size=40))
    record.us = draw(st.none() | st.integers(0, 10**7).map(lambda n: n / 10))
    if record.call == "ioctl":
        record.number = draw(st.sampled_from([0x3B85, 0x3BA0, 0x3B70, 0x1234]))
        record.raw = draw(hexes)
        record.out = draw(hexes) if record.raw else b""
        record.memory = tuple(Memory("data", draw(st.integers(0, 2**64 - 1)), 64, draw(hexes)) for _ in range(1))
        record.files = (NewFile(5, 2, "fault"),)
        record.size, record.arg = draw(st.integers(0, 2**32 - 1)), draw(st.integers(0, 2**64 - 1))
    if record.call == "open":
        record.path, record.flags = draw(st.text(max_size=20)), draw(st.integers(0, 2**31))
    if record.call in ("read", "write"):
        record.raw, record.arg, record.size = draw(hexes), draw(st.integers(0, 2**64 - 1)), draw(st.integers(0, 2**63))
    if record.call == "mmap":
        record.offset, record.size, record.flags = draw(st.integers(0, 2**63)), draw(st.integers(0, 2**40)), 3
    return record


@given(records())
def test_what_is_written_reads_back_the_same(record: Record) -> None:
    again = from_json(json.loads(json.dumps(to_json(record))))
    assert {n: getattr(again, n) for n in Record.__slots__} == {n: getattr(record, n) for n in Record.__slots__}


def test_a_cut_last_line_ends_the_trace() -> None:
    engine, writer, stream = traced(IOMMU_IOAS_ALLOC=alloc)
    for _ in range(3):
        engine.ioctl(u.IOMMU_IOAS_ALLOC, u.iommu_ioas_alloc(size=12))
    writer.close()
    head, found = read_trace(io.StringIO(stream.text[:-20]))
    assert head["machine"] == "mock"
    assert len(list(found)) == 2


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "line 1: not the header"),
        ("hello\n", "line 1: not the header of a trace: 'hello"),
        ("[]\n", "line 1: not the header"),
        ('{"schema": "other", "version": 1}\n', "line 1: schema 'other' version 1 is not 'iommufd-trace'"),
        ('{"schema": "iommufd-trace", "version": 2}\n', "trace version 2 is newer than 1"),
        (json.dumps(HEAD) + "\n{}\n{}\n", "line 2: 'call'"),
        (json.dumps(HEAD) + '\n{"call": "fork"}\n{}\n', "line 2: call 'fork' is none of"),
        (json.dumps(HEAD) + "\n\n17\n\n", "line 3: "),
    ],
)
def test_files_that_are_no_traces(text: str, complaint: str) -> None:
    with pytest.raises(TraceError, match=complaint.replace("[", r"\[")):
        list(read_trace(io.StringIO(text))[1])


def test_keys_of_a_later_writer_are_ignored() -> None:
    line = to_json(Record("close")) | {"weather": "fine"}
    assert from_json(line).call == "close"
