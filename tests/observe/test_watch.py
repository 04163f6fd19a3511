"""Calls on files as a projector makes them while somebody listens."""

from __future__ import annotations

import errno
import io
from typing import Any

import pytest

from iommufd.engine.file import File, Pending
from iommufd.errors import KernelError
from iommufd.observe import watch
from iommufd.observe.explain import Explain
from iommufd.observe.format import show_call
from iommufd.observe.trace import TraceWriter, header, read_trace
from iommufd.uapi import iommufd as u
from iommufd.uapi import vfio as v

from .caller import BASE, Engine


class Kept(io.StringIO):
    text = ""

    def close(self) -> None:
        self.text = self.getvalue()
        super().close()


class Tracer:
    """An engine whose every call is traced; ``lines()`` is what decode would print."""

    def __init__(self, **rows: Any) -> None:
        self.stream = Kept()
        self.writer = TraceWriter(self.stream, header("x", (7, 3)))
        self.engine = Engine([self.writer], **rows)
        self.world, self.context = self.engine.world, self.engine.context
        self.task = self.engine.as_task

    def lines(self) -> list[str]:
        self.writer.close()
        return [show_call(record) for record in read_trace(io.StringIO(self.stream.text))[1]]


class Queue(File):
    link = "anon_inode:[iommufd-pgfault]"

    def __init__(self, answer: int | Pending | KernelError) -> None:
        super().__init__()
        self.answer = answer

    def read(self, task: Any, addr: int, count: int, pos: int | None = None) -> int | Pending:
        if isinstance(self.answer, KernelError):
            raise self.answer
        if isinstance(self.answer, int):
            task.write(addr, u.iommu_hwpt_pgfault(dev_id=5, addr=0x2000).pack())
        return self.answer

    write = read


def test_a_vfio_call_of_the_context() -> None:
    traced = Tracer()

    def compat(context: Any, task: Any, cmd: int, arg: int) -> int:
        if cmd == v.VFIO_IOMMU_UNMAP_DMA:
            task.write(arg, v.vfio_iommu_type1_dma_unmap(argsz=24, iova=0x1000, size=4096).pack())
            return 0
        raise KernelError(errno.ENODEV, "the context has no compatibility IOAS")

    traced.world.compat_ioctl = compat
    traced.task.write(BASE, v.vfio_iommu_type1_dma_unmap(argsz=24, iova=0x1000, size=0x10000).pack())
    assert watch.ioctl(traced.world, traced.context, traced.task, v.VFIO_IOMMU_UNMAP_DMA, BASE) == 0
    with pytest.raises(KernelError, match="ENODEV"):
        watch.ioctl(traced.world, traced.context, traced.task, v.VFIO_CHECK_EXTENSION, 4)
    why = "# the context has no compatibility IOAS"
    assert traced.lines() == [
        "ioctl(3, VFIO_IOMMU_UNMAP_DMA, {argsz=24, flags=0, iova=0x1000, size=65536} => {size=4096}) = 0",
        f"ioctl(3, VFIO_CHECK_EXTENSION, VFIO_DMA_CC_IOMMU) = -1 ENODEV (No such device)  {why}",
    ]


def test_a_command_of_the_table_is_told_once() -> None:
    traced = Tracer(IOMMU_DESTROY=lambda call: None)
    traced.task.write(BASE, u.iommu_destroy(size=8, id=1).pack())
    assert watch.ioctl(traced.world, traced.context, traced.task, u.IOMMU_DESTROY, BASE) == 0
    assert traced.lines() == ["ioctl(3, IOMMU_DESTROY, {size=8, id=1}) = 0"]


def test_reads_and_writes() -> None:
    traced = Tracer()
    assert watch.read(traced.world, Queue(40), traced.task, BASE, 400) == 40
    refused = Queue(KernelError(errno.EINVAL, "there is no group with cookie 9"))
    traced.task.write(BASE, u.iommu_hwpt_page_response(cookie=9).pack())
    with pytest.raises(KernelError):
        watch.write(traced.world, refused, traced.task, BASE, 8)
    with pytest.raises(KernelError):
        watch.read(traced.world, refused, traced.task, BASE, 8)
    fault, response, again = traced.lines()
    assert "dev_id=5, pasid=0, grpid=0, perm=0, addr=0x2000" in fault
    assert response == (
        "write(3, [{cookie=9, code=SUCCESS}], 8) = -1 EINVAL (Invalid argument)  # there is no group with cookie 9"
    )
    assert again.startswith(f"read(3, {BASE:#x}, 8) = -1 EINVAL")


def test_a_deferred_answer_is_told_when_it_is_there() -> None:
    traced = Tracer()
    for failing in (False, True):
        inner = Pending()
        outer = watch.read(traced.world, Queue(inner), traced.task, BASE, 64)
        assert isinstance(outer, Pending)
        answers: list[Pending] = []
        outer.then(answers.append)
        assert answers == []
        if failing:
            inner.fail(KernelError(errno.EIO, "the device is gone"))
        else:
            inner.finish(7)
        assert len(answers) == 1
    assert [line.split(" = ")[1] for line in traced.lines()] == [
        "7",
        "-1 EIO (Input/output error)  # the device is gone",
    ]


def test_a_killed_caller_is_told_to_the_file() -> None:
    dropped: list[bool] = []
    traced = Tracer()
    outer = watch.read(traced.world, Queue(Pending(lambda: dropped.append(True))), traced.task, BASE, 64)
    assert isinstance(outer, Pending)
    outer.drop()
    assert dropped == [True]


def test_mmap_of_a_file_that_cannot_be_mapped() -> None:
    stream = io.StringIO()
    engine = Engine([Explain(stream)])
    with pytest.raises(KernelError):
        watch.mmap(engine.world, File(), engine.as_task, 0x1000, 4096, 1, True)
    assert stream.getvalue() == (
        "iommufd: mmap(NULL, 4096, PROT_READ, MAP_SHARED, 3, 0x1000) = -1 ENODEV (No such device)"
        "  # anon_inode:[iommufd] cannot be mapped\n"
    )


def test_an_unknown_command_leaves_the_argument_alone() -> None:
    traced = Tracer()
    with pytest.raises(KernelError):
        watch.ioctl(traced.world, File(), traced.task, 0x12345678, 0x10)
    assert traced.lines()[0].startswith("ioctl(3, 0x12345678, 0x10) = -1 ENOTTY")
