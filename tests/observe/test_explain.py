"""--explain: failing calls, one write each, and nothing else."""

from __future__ import annotations

import errno
import io
import threading
from typing import Any

from iommufd.engine.dispatch import Call
from iommufd.errors import KernelError
from iommufd.observe.explain import Explain
from iommufd.uapi import iommufd as u

from .caller import BASE, Engine, Memory


class Stream(io.StringIO):
    """Remembers each write."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def write(self, text: str) -> int:
        self.writes.append(text)
        return len(text)


def refuse(call: Call) -> None:
    raise KernelError(errno.EEXIST, "IOVA 0x1000 overlaps the area [0x0, 0x1fff]")


def accept(call: Call) -> None:
    return None


def test_a_failing_call_is_one_write_with_the_reason() -> None:
    stream = Stream()
    engine = Engine([Explain(stream)], IOMMU_IOAS_UNMAP=refuse)
    engine.ioctl(u.IOMMU_IOAS_UNMAP, u.iommu_ioas_unmap(size=24, ioas_id=1, iova=0x1000, length=4096))
    call = "ioctl(3, IOMMU_IOAS_UNMAP, {size=24, ioas_id=1, iova=0x1000, length=4096}) = -1 EEXIST (File exists)"
    assert stream.writes == [f"iommufd: {call}  # IOVA 0x1000 overlaps the area [0x0, 0x1fff]\n"]


def test_a_call_that_succeeds_says_nothing() -> None:
    stream = Stream()
    engine = Engine([Explain(stream)], IOMMU_DESTROY=accept)
    assert engine.ioctl(u.IOMMU_DESTROY, u.iommu_destroy(size=8, id=1)) == 0
    assert stream.writes == []


def test_calls_the_dispatcher_refuses() -> None:
    stream = Stream()
    engine = Engine([Explain(stream)], IOMMU_IOAS_ALLOC=accept)
    engine.ioctl(u.IOMMU_IOAS_ALLOC, at=0x10)
    engine.ioctl(u.IOMMU_IOAS_ALLOC, u.iommu_ioas_alloc(size=4, flags=9))
    engine.ioctl(0x3B99, bytes(8))
    engine.ioctl(u.IOMMU_IOAS_ALLOC, u.iommu_ioas_alloc(size=16).pack() + b"\1\0\0\0")
    starts = [w.split("  # ")[0] for w in stream.writes]
    assert starts == [
        "iommufd: ioctl(3, IOMMU_IOAS_ALLOC, 0x10) = -1 EFAULT (Bad address)",
        "iommufd: ioctl(3, IOMMU_IOAS_ALLOC, {size=4}) = -1 EINVAL (Invalid argument)",
        f"iommufd: ioctl(3, 0x3b99, {BASE:#x}) = -1 ENOTTY (Inappropriate ioctl for device)",
        "iommufd: ioctl(3, IOMMU_IOAS_ALLOC, {size=16, flags=0}) = -1 E2BIG (Argument list too long)",
    ]
    assert all("  # " in w for w in stream.writes)


def test_what_a_pointer_leads_to_is_shown() -> None:
    stream = Stream()
    engine = Engine([Explain(stream)], IOMMU_IOAS_ALLOW_IOVAS=refuse)
    engine.task.write(BASE + 0x100, u.iommu_iova_range(start=0x1000, last=0x1FFF).pack())
    allow = u.iommu_ioas_allow_iovas(size=24, ioas_id=1, num_iovas=1, allowed_iovas=BASE + 0x100)
    engine.ioctl(u.IOMMU_IOAS_ALLOW_IOVAS, allow)
    assert "allowed_iovas=[{start=0x1000, last=0x1fff}]})" in stream.writes[0]


def test_a_second_process_is_named() -> None:
    stream = Stream()
    engine = Engine([Explain(stream)], IOMMU_DESTROY=refuse)
    engine.ioctl(u.IOMMU_DESTROY, u.iommu_destroy(size=8, id=1))
    engine.task = Memory(fd=None)
    engine.task.process.tgid = 555
    engine.ioctl(u.IOMMU_DESTROY, u.iommu_destroy(size=8, id=2))
    assert stream.writes[1].startswith("iommufd: [pid 555] ioctl(iommu#1, IOMMU_DESTROY, {size=8, id=2}) = -1")


def test_a_failing_read_told_as_an_event() -> None:
    stream = Stream()
    engine = Engine([Explain(stream)])
    error = KernelError(errno.EINVAL, "7 bytes cannot hold a record of 40")
    engine.world.event("read", task=engine.task, file=engine.context, arg=BASE, size=7, result=-1, error=error)
    engine.world.event("read", task=engine.task, file=engine.context, arg=BASE, size=40, result=40, error=None)
    engine.world.event("map", iova=0x1000, error=None)
    assert stream.writes == [
        f"iommufd: read(3, {BASE:#x}, 7) = -1 EINVAL (Invalid argument)  # 7 bytes cannot hold a record of 40\n"
    ]


def test_a_closed_stream_never_hurts_the_program() -> None:
    stream = io.StringIO()
    engine = Engine([Explain(stream)], IOMMU_DESTROY=refuse)
    stream.close()
    for _ in range(2):
        error = engine.ioctl(u.IOMMU_DESTROY, u.iommu_destroy(size=8, id=1))
        assert isinstance(error, KernelError)


def test_lines_of_threads_never_mix() -> None:
    stream = Stream()
    explain = Explain(stream)
    engines: list[Any] = [Engine([explain], IOMMU_DESTROY=refuse) for _ in range(4)]
    threads = [
        threading.Thread(
            target=lambda e=e: [e.ioctl(u.IOMMU_DESTROY, u.iommu_destroy(size=8, id=i)) for i in range(50)]
        )
        for e in engines
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert explain.count == 200 == len(stream.writes)
    assert all(w.startswith("iommufd: ioctl(3, IOMMU_DESTROY") and w.endswith("\n") for w in stream.writes)
