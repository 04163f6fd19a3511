"""Dispatch: one table of commands, and everything the kernel checks centrally checked centrally (core 1.3-1.6).

A row binds a :class:`~iommufd.uapi.commands.Command` (number, struct, smallest size, release) to a handler and a
response rule. A handler receives a :class:`Call` whose ``cmd`` is the struct, copied in and zero-extended; it raises
KernelError or returns the ioctl's result (None means 0). Objects and files it makes are registered on the call, so that
one place publishes them after the response went out, or undoes them.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, TypeVar

from iommufd.engine.failpoints import LOOKUP, SLAB
from iommufd.engine.file import File, Pending
from iommufd.engine.object import Object
from iommufd.errors import KernelError
from iommufd.uapi.commands import BY_NUMBER
from iommufd.uapi.declare import show_release

if TYPE_CHECKING:
    from iommufd.engine.context import Context
    from iommufd.engine.task import Task
    from iommufd.engine.world import World
    from iommufd.uapi.commands import Command
    from iommufd.uapi.declare import Struct

FIRST_NR = 0x80
_SIZE = struct.Struct("<I").unpack_from


class Respond(Enum):
    """What goes back to the caller's struct."""

    NOTHING = 0
    ON_SUCCESS = 1  # the whole struct, min(size, full) bytes
    HANDLER = 2  # the handler calls Call.respond itself (its response differs from the two above)


class Call:
    """One ioctl on its way through the engine.

    ``cmd`` is the typed struct (class per row); ``size`` what the caller said; ``new`` the object under construction;
    ``new_file`` the descriptor reserved for a file it will receive. ``held`` are the lookups to drop at the end. These
    are tuples because most calls have none of them, and one empty tuple serves all.
    """

    __slots__ = (
        "arg",
        "cmd",
        "context",
        "held",
        "new",
        "new_file",
        "number",
        "raw",
        "row",
        "size",
        "task",
        "undo",
        "world",
    )

    def __init__(self, context: Context, world: World, task: Task, number: int, arg: int) -> None:
        self.context = context
        self.world = world
        self.task = task
        self.number = number
        self.arg = arg
        self.size = 0
        self.row: Row | None = None
        self.cmd: Struct | None = None  # from row 7 on
        self.raw = b""
        self.held: tuple[Object, ...] = ()
        self.new: tuple[Object, ...] = ()
        self.new_file: tuple[tuple[int, File], ...] = ()
        self.undo: tuple[Callable[[], None], ...] = ()

    def get(self, number: int, kind: type[T]) -> T:
        """The object ``number`` of type ``kind``, held until the call ends; ENOENT otherwise (core 2.2)."""
        if self.world.fail is not None and self.world.fail(LOOKUP, self.task):
            raise KernelError(errno.ENOENT, f"fault injection: lookup of id {number}")
        objects = self.context.objects
        obj = objects.take(number, kind)
        if obj is None:
            found = objects.get(number, kind)
            assert isinstance(found, kind)
            obj = found
        self.held = (*self.held, obj) if self.held else (obj,)
        return obj

    def get_any(self, number: int) -> Object:
        """The object ``number`` whatever its type, held until the call ends; ENOENT otherwise."""
        return self.get(number, Object)

    def reserve(self, obj: T) -> T:
        """Starts a creation: the object gets its ID now and is published after the response, or aborted."""
        if self.world.fail is not None and self.world.fail(SLAB, self.task):
            obj.abort()
            raise KernelError(errno.ENOMEM, f"fault injection: no memory for a {obj.kind}")
        self.context.objects.reserve(obj)
        self.new = (*self.new, obj)
        return obj

    def reserve_fd(self, file: File, cloexec: bool = True) -> int:
        """Reserves a descriptor number for ``file``; installed after the response, or given back with one ``put``."""
        try:
            fd = self.task.reserve_fd(cloexec)
        except KernelError:
            file.put()
            raise
        self.new_file = (*self.new_file, (fd, file))
        return fd

    def on_error(self, undo: Callable[[], None]) -> None:
        """Registers what undoes a side effect if the call fails after this point (run in reverse order)."""
        self.undo = (*self.undo, undo)

    def respond(self) -> None:
        """Writes min(size, full) bytes of the struct back (core 1.5) before the handler is done; EFAULT if that
        fails."""
        row, cmd = self.row, self.cmd
        assert row is not None and cmd is not None
        data = cmd.pack()
        length = self.size if self.size < row.full else row.full
        self.task.write(self.arg, data if length == len(data) else data[:length])


T = TypeVar("T", bound=Object)
Handler = Callable[[Call], "int | Pending | None"]


class Row:
    """One command of the table. ``full`` is the struct's size as the machine's release knew it."""

    __slots__ = ("arm", "command", "full", "handler", "minimum", "number", "on_success", "respond", "struct")

    def __init__(self, command: Command, handler: Handler, respond: Respond, release: tuple[int, int]) -> None:
        self.command = command
        self.number = command.number
        self.arm = command.arm
        self.struct = command.struct
        self.minimum = command.minimum
        self.full = command.struct.size_in(release)
        self.handler = handler
        self.respond = respond
        self.on_success = respond is Respond.ON_SUCCESS


def build_table(rows: list[tuple[Command, Handler, Respond]], release: tuple[int, int]) -> dict[int, Row]:
    """The dispatch table, by full command number, of what ``release`` had."""
    return {c.number: Row(c, handler, respond, release) for c, handler, respond in rows if c.since <= release}


def unsupported(unknown: int, reserved: int) -> KernelError:
    """For commands that refuse flags they do not know and reserved members in one step."""
    why = f"unknown flags {unknown:#x}" if unknown else f"__reserved {reserved:#x} is not 0"
    return KernelError(errno.EOPNOTSUPP, why)


def find_nonzero(task: Task, start: int, end: int) -> None:
    """core 1.3 row 5: every byte of ``[start, end)`` must be zero; ascending, so a nonzero byte beats a later fault."""
    while start < end:
        want = min(end - start, 65536)
        data = task.read_upto(start, want)
        if data.strip(b"\0"):
            raise KernelError(errno.E2BIG, f"bytes after the known struct, from {start:#x} on, are not zero")
        if len(data) < want:
            raise KernelError(errno.EFAULT, f"the struct's tail at {start + len(data):#x} cannot be read")
        start += want


def dispatch(context: Context, task: Task, number: int, arg: int) -> int | Pending:
    """core 1.3 rows 2-9 for a command number inside the table's range, told to whoever watches."""
    world = context.world
    call = Call(context, world, task, number, arg)
    try:
        result = run(call, world, task, number, arg)
    except KernelError as error:
        _tell(call, -1, error)
        raise
    if isinstance(result, Pending):
        return result.watched(lambda answer: _tell(call, answer.result, answer.error))
    _tell(call, result, None)
    return result


def _tell(call: Call, result: int | None, error: KernelError | None) -> None:
    if error is not None:
        error.told = True
    for instrument in call.world.instruments:
        instrument.ioctl_exit(call, -1 if result is None else result, error)


def run(call: Call, world: World, task: Task, number: int, arg: int) -> int | Pending:
    """The same for a fresh ``call`` that nobody watches."""
    row = world.table.get(number)
    if row is None:
        raise _no_command(call)
    call.row = row
    full = row.full
    raw = task.read_upto(arg, full)
    if len(raw) == full and _SIZE(raw)[0] == full:  # the usual call passes rows 2 to 6 at one look
        call.size = full
    else:
        raw = _framed(call, row, raw)
    call.raw = raw
    declared = row.struct if row.arm is None else row.arm(raw)
    call.cmd = declared.unpack(raw)  # row 7: a missing tail reads as zero
    if world.instruments:
        for instrument in world.instruments:
            instrument.ioctl_enter(call)
    if world.fail_call is not None:
        world.fail_call(row.command.name, task)
    try:
        result = row.handler(call)  # row 8
        if row.on_success:
            data = call.cmd.pack()
            want = len(raw)  # core 1.5: min(size, full) bytes
            task.write(arg, data if want == len(data) else data[:want])
    except BaseException:  # row 9, in reverse; whatever went wrong, nothing half-made stays
        _abort(call)
        raise
    if call.new_file:
        for fd, file in call.new_file:
            task.install_fd(fd, file)
    if call.new:
        with world.lock:
            while call.context.changing_process:  # core 4.4 row 4
                world.wait()
            for obj in call.new:
                call.context.objects.publish(obj)
            world.wake()  # an unbind may wait for the vDEVICE it must take along
    for obj in call.held:
        obj.context.objects.put(obj)
    return 0 if result is None else result


def _no_command(call: Call) -> KernelError:
    """Rows 2 and 3 for a number that the table has not."""
    head = call.task.read_upto(call.arg, 4)
    if len(head) < 4:  # row 2
        return KernelError(errno.EFAULT, f"the struct's size at {call.arg:#x} cannot be read")
    (call.size,) = _SIZE(head)
    return KernelError(errno.ENOTTY, _why_not_there(call.number, call.world.kernel))  # row 3


def _framed(call: Call, row: Row, head: bytes) -> bytes:
    """Rows 2 and 4 to 6 in order: the struct's bytes, as many of ``head`` as the caller's size says."""
    arg, full = call.arg, row.full
    if len(head) < 4:  # row 2
        raise KernelError(errno.EFAULT, f"the struct's size at {arg:#x} cannot be read")
    (size,) = _SIZE(head)
    call.size = size
    call.raw = head[:size]
    if size < row.minimum:  # row 4
        raise KernelError(errno.EINVAL, f"size {size} is less than the {row.minimum} bytes this command needs")
    if size > full:  # row 5
        find_nonzero(call.task, arg + full, arg + size)
    want = min(size, full)
    if len(head) < want:  # row 6
        raise KernelError(errno.EFAULT, f"only {len(head)} of the struct's {want} bytes at {arg:#x} can be read")
    return head[:size]


def _why_not_there(number: int, kernel: tuple[int, int]) -> str:
    command = BY_NUMBER.get(number)
    if command is None or command.since <= kernel:
        return f"there is no command {number:#x}"
    return f"{command.name} came with Linux {show_release(command.since)}; this machine is Linux {show_release(kernel)}"


def _abort(call: Call) -> None:
    for fd, file in reversed(call.new_file):
        call.task.release_fd(fd)
        file.put()
    for undo in reversed(call.undo):
        undo()
    for obj in reversed(call.new):
        call.context.objects.abort(obj)
    for held in call.held:
        call.context.objects.put(held)
