"""The one formatter of calls: what ``--explain``, ``--trace`` and ``iommufd decode`` show is made here.

    ioctl(3, IOMMU_IOAS_MAP, {size=40, flags=FIXED_IOVA|READABLE, ioas_id=1, user_va=0x7f0e5c000000, length=4096,
    iova=0x1000}) = -1 EEXIST (File exists)  # IOVA 0x1000 overlaps the area [0x0, 0x1fff]

(on one line). Bytes in, text out: pure functions, imported only by those who print. Members given by the caller stand
in the braces, those the call gave back behind ``=>``; reserved members appear only when they are not zero.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable

from iommufd.errors import errno_name
from iommufd.observe.pointers import POINTERS, elements
from iommufd.observe.record import Memory, Record
from iommufd.uapi import iommufd as u
from iommufd.uapi import iommufd_test as t
from iommufd.uapi.commands import BY_NUMBER
from iommufd.uapi.declare import Field, Struct, show_value

MOST_ELEMENTS = 8  # of an array, before "..."
MOST_BYTES = 32  # of plain data, before "..."

# what one record of a readable file is; events of a vEVENTQ follow their header and depend on its type
READ_STRUCTS: dict[str, type[Struct]] = {"fault": u.iommu_hwpt_pgfault, "veventq": u.iommufd_vevent_header}
WRITE_STRUCTS: dict[str, type[Struct]] = {"fault": u.iommu_hwpt_page_response}

O_NAMES = {os.O_CREAT: "O_CREAT", os.O_EXCL: "O_EXCL", os.O_TRUNC: "O_TRUNC", os.O_NONBLOCK: "O_NONBLOCK"}
O_NAMES |= {os.O_CLOEXEC: "O_CLOEXEC", os.O_DIRECTORY: "O_DIRECTORY", os.O_NOFOLLOW: "O_NOFOLLOW", 0o10000000: "O_PATH"}
PROT_NAMES = {1: "PROT_READ", 2: "PROT_WRITE", 4: "PROT_EXEC"}


def command_of(number: int, kind: str) -> tuple[str, type[Struct] | None, str]:
    """Name, struct and kind of argument ("struct", "value", "int", "string", "none") of ioctl ``number`` on a file.

    VFIO numbers mean different calls on different files, hence ``kind``. The name is empty when there is no such
    command."""
    command = BY_NUMBER.get(number)
    if command is not None:
        return command.name, command.struct, "struct"
    from iommufd.uapi.vfio import commands as vfio  # few programs get here

    table = {"device": vfio.DEVICE, "group": vfio.GROUP}.get(kind, vfio.CONTAINER)
    for row in table:
        if row.number == number:
            return row.name, row.struct, row.argument
    return "", None, "struct"


def struct_of(number: int, kind: str, raw: bytes) -> type[Struct] | None:
    """The struct of ioctl ``number``; of the test command, the one of the op in ``raw``."""
    cls = command_of(number, kind)[1]
    if cls is t.iommu_test_cmd:
        return t.ARMS.get(int.from_bytes(raw[4:8], "little"), cls)
    return cls


def show_struct(value: Struct, known: int, memory: Iterable[Memory] = ()) -> str:
    """The members a caller gives, within the first ``known`` bytes: ``{size=12, flags=0}``."""
    held = {m.field: m for m in memory}
    shown = [
        f"{f.c_name}={_show_member(value, f, held.get(f.name))}"
        for f in value.FIELDS
        if _is_input(value, f) and f.offset < known and f.size
    ]
    return "{" + ", ".join(shown) + "}"


def show_results(before: Struct, after: Struct, known: int, memory: Iterable[Memory] = ()) -> str:
    """The members the call gave back: ``{out_ioas_id=1}``; what is both given and returned, only when it changed."""
    held = {m.field: m for m in memory}
    shown = []
    for f in after.FIELDS:
        changed = getattr(before, f.name) != getattr(after, f.name)
        if f.offset < known and f.union is None and (f.direction == "out" or changed or f.name in held):
            shown.append(f"{f.c_name}={_show_member(after, f, held.get(f.name))}")
    return "{" + ", ".join(shown) + "}" if shown else ""


def _is_input(value: Struct, f: Field) -> bool:
    if f.name.startswith("reserved") or f.name in ("pad", "last"):
        return bool(any(v) if isinstance(v := getattr(value, f.name), bytes) else v)
    return f.direction != "out"


def _show_member(owner: Struct, f: Field, held: Memory | None) -> str:
    if held is None or not held.data:
        return show_value(f, getattr(owner, f.name))
    pointer = POINTERS[type(owner)]
    structs = elements(pointer, owner, held.data)
    if structs is None:
        return show_bytes(held.data, held.size)
    texts = [show_plain(s) for s in structs[:MOST_ELEMENTS]]
    if not pointer.stride(owner):
        return texts[0]
    if held.size > len(held.data) or len(structs) > MOST_ELEMENTS:
        texts.append("...")
    return "[" + ", ".join(texts) + "]"


def show_plain(value: Struct) -> str:
    """Every member of a struct found in memory, whoever wrote it."""
    members = (
        f"{f.c_name}={show_value(f, getattr(value, f.name))}"
        for f in value.FIELDS
        if f.union is None and not (f.name.startswith("reserved") and not getattr(value, f.name))
    )
    return "{" + ", ".join(members) + "}"


def show_bytes(data: bytes, size: int | None = None) -> str:
    """``<4 bytes: 01020304>``, the end left out when long."""
    size = len(data) if size is None else size
    more = "..." if size > min(len(data), MOST_BYTES) else ""
    return f"<{size} bytes: {data[:MOST_BYTES].hex()}{more}>"


def quote(text: str) -> str:
    """A C string on one line."""
    return json.dumps(text, ensure_ascii=False)


def show_bits(value: int, names: dict[int, str], nothing: str = "0") -> str:
    """``PROT_READ|PROT_WRITE``, with what has no name in hexadecimal."""
    shown = [name for bit, name in names.items() if value & bit]
    rest = value & ~sum(names)
    if rest:
        shown.append(hex(rest))
    return "|".join(shown) or nothing


def show_open_flags(flags: int) -> str:
    access = ("O_RDONLY", "O_WRONLY", "O_RDWR", "O_ACCMODE")[flags & 3]
    rest = show_bits(flags & ~3, O_NAMES, "")
    return f"{access}|{rest}" if rest else access


def show_file(record: Record) -> str:
    """The descriptor, or ``iommu#2`` (kind and serial number of the file) where it is not known."""
    if record.fd is not None:
        return str(record.fd)
    return record.kind if record.file is None else f"{record.kind}#{record.file}"


def show_call(record: Record) -> str:
    """The whole line, without newline: call, arguments, result and, behind ``#``, why."""
    show = _ARGUMENTS.get(record.call)
    arguments = show(record) if show is not None else "..." if record.fd is None else f"{record.fd}, ..."
    text = f"{record.call}({arguments}) = {_show_result(record)}"
    return f"{text}  # {' '.join(record.why.split())}" if record.why else text


def _show_result(record: Record) -> str:
    if record.errno:
        return f"-1 {errno_name(record.errno)} ({os.strerror(record.errno)})"
    if record.result is None:
        return "?"
    if record.call == "mmap":
        return hex(record.result)
    return str(record.result)


def _show_ioctl(record: Record) -> str:
    name, cls, argument = command_of(record.number, record.kind)
    file = show_file(record)
    if argument == "none":
        return f"{file}, {name}"
    if argument == "value":
        return f"{file}, {name}, {_show_value_argument(record)}"
    head = f"{file}, {name or hex(record.number)}"
    if argument == "int" and record.raw:
        return f"{head}, [{int.from_bytes(record.raw[:4], 'little', signed=True)}]"
    if argument == "string" and record.raw:
        return f"{head}, {quote(record.raw.split(bytes(1))[0].decode(errors='replace'))}"
    if cls is None:
        return f"{head}, {record.arg:#x}"
    if not record.raw:  # it failed before the struct was copied in
        return f"{head}, {{size={record.size}}}" if record.size else f"{head}, {record.arg:#x}"
    actual = struct_of(record.number, record.kind, record.raw) or cls
    before = actual.unpack(record.raw)
    text = f"{head}, {show_struct(before, len(record.raw), record.memory)}"
    if record.out:
        after = actual.unpack(record.out)
        results = show_results(before, after, len(record.out), record.out_memory)
        if results:
            text += f" => {results}"
    return text


def _show_value_argument(record: Record) -> str:
    from iommufd.uapi.vfio import vfio_extension

    try:
        return f"VFIO_{vfio_extension(record.arg).name}"
    except ValueError:
        return hex(record.arg)


def _show_read(record: Record) -> str:
    return _show_data(record, READ_STRUCTS.get(record.kind))


def _show_write(record: Record) -> str:
    return _show_data(record, WRITE_STRUCTS.get(record.kind))


def _show_data(record: Record, cls: type[Struct] | None) -> str:
    data = record.raw
    if not data:
        shown = hex(record.arg)
    elif cls is not None and record.kind == "fault" and len(data) % cls.SIZE == 0:
        parts = [show_plain(cls.unpack(data[at : at + cls.SIZE])) for at in range(0, len(data), cls.SIZE)]
        shown = "[" + ", ".join(parts[:MOST_ELEMENTS] + ["..."] * (len(parts) > MOST_ELEMENTS)) + "]"
    elif cls is not None and record.kind == "veventq":
        rest = data[cls.SIZE :]
        shown = f"[{show_plain(cls.unpack(data))}{', ' + show_bytes(rest) if rest else ''}]"
    else:
        shown = show_bytes(data)
    return f"{show_file(record)}, {shown}, {record.size}"


def _show_open(record: Record) -> str:
    return f"{quote(record.path)}, {show_open_flags(record.flags)}"


def _show_mmap(record: Record) -> str:
    prot = show_bits(record.flags, PROT_NAMES, "PROT_NONE")
    return f"NULL, {record.size}, {prot}, MAP_SHARED, {show_file(record)}, {record.offset:#x}"


_ARGUMENTS = {
    "open": _show_open,
    "close": show_file,
    "ioctl": _show_ioctl,
    "read": _show_read,
    "write": _show_write,
    "mmap": _show_mmap,
}


def decoded(value: Struct) -> dict[str, int | str]:
    """The members under their C names as a trace writes them: symbols and hexadecimal as text, counts as numbers."""
    out: dict[str, int | str] = {}
    for f in value.FIELDS:
        if f.union is None and f.size:
            member = getattr(value, f.name)
            out[f.c_name] = member if isinstance(member, int) and f.show == "dec" else show_value(f, member)
    return out
