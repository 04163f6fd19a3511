"""Calls on a VFIO device file, and the capability chains behind their structs (kernel: struct vfio_info_cap_header)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

from iommufd.client.calls import fields
from iommufd.client.handle import Handle
from iommufd.client.vfio import feature
from iommufd.uapi.declare import members
from iommufd.uapi.vfio import VFIO_DEVICE_FEATURE
from iommufd.uapi.vfio.commands import DEVICE

if TYPE_CHECKING:
    from iommufd.uapi.declare import Struct

S = TypeVar("S", bound="Struct")
_HEADER = struct.Struct("<HHI")


COMMANDS = {command.number: command for command in DEVICE}


class DeviceHandle(Handle):
    """An open VFIO device file."""

    def _show(self, cmd: int, arg: bytearray | int) -> str:
        command = COMMANDS.get(cmd)
        if command is None or command.struct is None or not isinstance(arg, bytearray):
            return command.name if command is not None else super()._show(cmd, arg)
        if cmd == VFIO_DEVICE_FEATURE:
            return feature.show(arg)
        return f"{command.name}({fields(command.struct.unpack(arg))})"


def ask(handle: Handle, cmd: int, question: S, size: int | None = None) -> S:
    """One call with a struct, of which the kernel is told ``size`` bytes (None: all)."""
    members(question).argsz = question.SIZE if size is None else size
    data = bytearray(question.pack())
    handle.ioctl(cmd, data)
    return type(question).unpack(data)


def query(handle: Handle, cmd: int, question: S) -> tuple[S, bytes]:
    """Asks with room for the whole answer: the struct, and all bytes of the answer (its chain included)."""
    room = max(question.SIZE, 256)
    while True:
        members(question).argsz = room
        data = bytearray(question.pack().ljust(room, b"\0"))
        handle.ioctl(cmd, data)
        answer = type(question).unpack(data)
        wanted: int = members(answer).argsz
        if wanted <= room:
            return answer, bytes(data)
        room = wanted


def chain(data: bytes, offset: int) -> Iterator[tuple[int, int]]:
    """``(id, offset)`` of each capability, from the first one's ``offset`` (0: there is none)."""
    seen: set[int] = set()
    while offset and offset not in seen and offset + _HEADER.size <= len(data):
        seen.add(offset)
        kind, _, following = _HEADER.unpack_from(data, offset)
        yield kind, offset
        offset = following
