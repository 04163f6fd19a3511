"""Capability chains: what follows a VFIO info struct (kernel: struct vfio_info_cap_header)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from iommufd.client.handle import Handle
    from iommufd.uapi.declare import Struct

S = TypeVar("S", bound="Struct")
_HEADER = struct.Struct("<HHI")


def query(handle: Handle, cmd: int, question: S) -> tuple[S, bytes]:
    """Asks with room for the whole answer: the struct, and all bytes of the answer (its chain included)."""
    fields: Any = question
    room = max(question.SIZE, 256)
    while True:
        fields.argsz = room
        data = bytearray(question.pack().ljust(room, b"\0"))
        handle.ioctl(cmd, data)
        answer: Any = type(question).unpack(data)
        if answer.argsz <= room:
            return answer, bytes(data)
        room = answer.argsz


def chain(data: bytes, offset: int) -> Iterator[tuple[int, int]]:
    """``(id, offset)`` of each capability, from the first one's ``offset`` (0: there is none)."""
    seen: set[int] = set()
    while offset and offset not in seen and offset + _HEADER.size <= len(data):
        seen.add(offset)
        kind, _, following = _HEADER.unpack_from(data, offset)
        yield kind, offset
        offset = following
