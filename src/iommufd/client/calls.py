"""Structs as calls: which ioctl a struct belongs to, and how a call looks to a person. No kernel object."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from iommufd.errors import errno_name
from iommufd.uapi.commands import BY_NAME, BY_NUMBER, COMMANDS
from iommufd.uapi.declare import show_value

if TYPE_CHECKING:
    from iommufd.uapi.declare import Struct

TEST_CMD = BY_NAME["IOMMU_TEST_CMD"].number

HIDDEN = ("size", "argsz", "reserved", "reserved2", "last")  # of a struct shown to people

NUMBERS: dict[type[Struct], int] = {command.struct: command.number for command in COMMANDS}


def number_of(struct: Struct) -> int:
    """The ioctl number of an iommufd command's struct (any arm of the test command included). TypeError for others."""
    kind = type(struct)
    found = NUMBERS.get(kind)
    if found is None:
        found = next((NUMBERS[base] for base in kind.__mro__ if base in NUMBERS), None)
        if found is None:
            raise TypeError(f"{kind.__name__} is not the struct of an iommufd command")
        NUMBERS[kind] = found
    return found


def filled(struct: Struct) -> int:
    """Fills ``size``, and ``op`` of a test command, in where they are zero; the ioctl number."""
    cmd = number_of(struct)
    fields: Any = struct
    if not fields.size:
        fields.size = struct.SIZE
    if cmd == TEST_CMD and not fields.op:
        from iommufd.uapi.iommufd_test import ARMS

        fields.op = next((op for op, arm in ARMS.items() if arm is type(struct)), 0)
    return cmd


def show(cmd: int, data: bytes | bytearray) -> str:
    """An iommufd call as a person reads it: the command with its fields, or the number when it is not known."""
    command = BY_NUMBER.get(cmd)
    if command is None:
        return f"ioctl {cmd:#x}"
    kind, name = command.struct, command.name
    if cmd == TEST_CMD:
        from iommufd.uapi.iommufd_test import ARMS, iommu_test_op

        op = int.from_bytes(data[4:8], "little")
        if op in ARMS:
            kind, name = ARMS[op], f"{name} {iommu_test_op(op).name}"
    return f"{name}({fields(kind.unpack(data))})"


def fields(struct: Struct) -> str:
    """The members of a struct that say something."""
    return ", ".join(
        f"{field.name}={show_value(field, getattr(struct, field.name))}"
        for field in struct.FIELDS
        if field.union is None and field.ctype.count != 0 and field.name not in HIDDEN
    )


def refused(number: int, request: str) -> str:
    """The sentence where nobody gives a reason: a kernel tells an errno and nothing else."""
    return f"the kernel answered {errno_name(number)} to {request}"
