"""Structs as calls: which ioctl a struct belongs to, and how a call looks to a person. No kernel object."""

from __future__ import annotations

from iommufd.client.numbers import number
from iommufd.errors import errno_name
from iommufd.uapi.commands import BY_NAME, BY_NUMBER, COMMANDS
from iommufd.uapi.declare import Struct, members, show_value

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
    fill = members(struct)  # every command has a size
    if not fill.size:
        fill.size = struct.SIZE
    if cmd == TEST_CMD and not fill.op:
        from iommufd.uapi.iommufd_test import ARMS

        fill.op = next((op for op, arm in ARMS.items() if arm is type(struct)), 0)
    return cmd


def pack(struct: Struct) -> bytes:
    """The struct's bytes. ValueError when a value does not fit its member."""
    try:
        return struct.pack()
    except Exception as error:  # struct.error: which member does not fit is what a person needs
        for field in struct.FIELDS:
            if field.ctype.count is None and field.ctype.code not in "iq":
                number(getattr(struct, field.name), f"{type(struct).__name__}.{field.name}", (1 << 8 * field.size) - 1)
        raise ValueError(f"{type(struct).__name__} cannot be packed: {error}") from None


def packed(data: object, what: str, *needs: str) -> bytes:
    """``data.pack()`` of something a user passes as ``what``. TypeError when it has no such method (or not
    ``needs``)."""
    if isinstance(data, Struct) and not needs:
        return pack(data)
    method = getattr(data, "pack", None)
    if method is None or isinstance(data, type) or not all(hasattr(data, name) for name in needs):
        raise TypeError(f"{type(data).__name__} is no {what}")
    found = method()
    if not isinstance(found, bytes | bytearray):
        raise TypeError(f"pack() of a {what} gives bytes, not {type(found).__name__}")
    return bytes(found)


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
