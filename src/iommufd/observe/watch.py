"""Calls on files, told to the instruments: for whoever projects Files to a program (the interposer, the own process).

A projector calls the File itself when nobody listens, and these functions when somebody does::

    if world.instruments:
        return watch.ioctl(world, file, task, cmd, arg)
    return file.ioctl(task, cmd, arg)

They return and raise exactly what the File does, and tell ``World.event`` (fields: :mod:`iommufd.observe.events`). A
deferred answer is told when it is there. Commands of the iommufd table tell themselves (``Instrument.ioctl_exit``)
and are not told twice. ``open`` and ``close`` have no File to call: projectors tell those events themselves.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from iommufd.engine.context import Context
from iommufd.engine.dispatch import FIRST_NR
from iommufd.engine.file import Pending
from iommufd.errors import KernelError
from iommufd.observe.capture import MOST_MEMORY, kind_of
from iommufd.observe.format import command_of

if TYPE_CHECKING:
    from iommufd.engine.file import File
    from iommufd.engine.task import Task
    from iommufd.engine.world import World

Tell = Callable[[int, "KernelError | None"], None]


def ioctl(world: World, file: File, task: Task, cmd: int, arg: int) -> int | Pending:
    if isinstance(file, Context) and FIRST_NR <= cmd & 0xFF <= world.top_nr:
        return file.ioctl(task, cmd, arg)
    size = _argument_size(cmd, kind_of(file))
    raw = _peek(task, arg, size)
    began = time.perf_counter()

    def tell(result: int, error: KernelError | None) -> None:
        out = _peek(task, arg, size)
        world.event(
            "ioctl",
            task=task,
            file=file,
            number=cmd,
            arg=arg,
            raw=raw,
            out=out if error is None or out != raw else b"",
            size=int.from_bytes(raw[:4], "little") if size > 4 else 0,
            result=result,
            error=error,
            us=(time.perf_counter() - began) * 1e6,
        )

    return _told(lambda: file.ioctl(task, cmd, arg), tell)


def read(world: World, file: File, task: Task, addr: int, count: int, pos: int | None = None) -> int | Pending:
    return _transfer(world, "read", file, task, addr, count, lambda: file.read(task, addr, count, pos))


def write(world: World, file: File, task: Task, addr: int, count: int, pos: int | None = None) -> int | Pending:
    return _transfer(world, "write", file, task, addr, count, lambda: file.write(task, addr, count, pos))


def mmap(world: World, file: File, task: Task, offset: int, length: int, prot: int, shared: bool) -> tuple[int, int]:
    """The address the kernel chooses is not known here."""
    error: KernelError | None = None
    began = time.perf_counter()
    try:
        return file.mmap(task, offset, length, prot, shared)
    except KernelError as failed:
        error = failed
        raise
    finally:
        us = (time.perf_counter() - began) * 1e6
        fields = {"offset": offset, "size": length, "prot": prot, "error": error, "us": us}
        world.event("mmap", task=task, file=file, result=None, **fields)


def _transfer(
    world: World, name: str, file: File, task: Task, addr: int, count: int, call: Callable[[], int | Pending]
) -> int | Pending:
    began = time.perf_counter()

    def tell(result: int, error: KernelError | None) -> None:
        # what a failed write offered tells why it failed
        moved = result if error is None else count if name == "write" else 0
        data = _peek(task, addr, min(moved, MOST_MEMORY))
        us = (time.perf_counter() - began) * 1e6
        fields = {"arg": addr, "size": count, "data": data, "result": result, "error": error, "us": us}
        world.event(name, task=task, file=file, **fields)

    return _told(call, tell)


def _told(call: Callable[[], int | Pending], tell: Tell) -> int | Pending:
    try:
        result = call()
    except KernelError as error:
        tell(-1, error)
        raise
    if not isinstance(result, Pending):
        tell(result, None)
        return result
    return result.watched(lambda answer: tell(-1 if answer.result is None else answer.result, answer.error))


def _argument_size(cmd: int, kind: str) -> int:
    """Bytes at the third argument worth keeping."""
    name, cls, argument = command_of(cmd, kind)
    if cls is not None and name:
        return cls.SIZE
    return {"int": 4, "string": 64}.get(argument, 0) if name else 0


def _peek(task: Task, addr: int, count: int) -> bytes:
    if count <= 0:
        return b""
    try:
        return bytes(task.read_upto(addr, count))
    except (KernelError, OSError):
        return b""
