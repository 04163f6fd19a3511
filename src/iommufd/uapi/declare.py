"""Declaring C structs: annotated classes in, exact layouts and fast packing out.

A struct of a kernel header is a class whose annotations are the C fields, in order::

    @struct(since="6.2")
    class iommu_destroy(Struct):
        '''struct iommu_destroy { __u32 size; __u32 id; };'''

        size: u32
        id: u32

Invariants:

* Layout is the natural one of the C ABI (x86-64, aarch64: little endian, a scalar is aligned to its size), so nothing
  but ``offset=``/``size=`` of the few unions ever states a number; ``tests/uapi`` compares every size and offset
  with what gcc says of the published header.
* Every attribute is present from construction and holds an ``int`` (``bytes`` for arrays of u8, a tuple of ints for
  other arrays), zero unless given. Out-of-range values are refused by :meth:`Struct.pack`, not by assignment.
* A C name that starts with two underscores (``__reserved``) is the attribute without them; ``Field.c_name`` keeps it.
* Importing a header module creates classes only. Code for packing and unpacking is generated on first use of each
  class, because ``iommufd run`` must start fast and touches few of them.
"""

from __future__ import annotations

import re
import struct as _struct
import sys
from collections.abc import Callable
from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple, Self, TypeVar

if TYPE_CHECKING:
    import ctypes

Release = tuple[int, ...]
"""A kernel release, compared as tuples: (6, 2) <= (6, 2, 9) < (6, 3)."""

Symbols = type[IntEnum] | type[IntFlag]


def show_release(release: Release) -> str:
    """``"6.6"`` for (6, 6)."""
    return ".".join(map(str, release))


def release(text: str) -> Release:
    """``"6.18.3"`` or ``"7.3.4-rc1+"`` as a tuple of its leading numbers; ValueError when there are none."""
    match = re.match(r"\d+(\.\d+)*", text)
    if match is None:
        raise ValueError(f"not a kernel release: {text!r}")
    return tuple(int(part) for part in match.group().split("."))


def IO(type_: int, nr: int) -> int:
    """The kernel's ``_IO(type, nr)``: an ioctl number without direction and size."""
    return type_ << 8 | nr


class CType:
    """A C scalar, or an array of ``count`` of them (``count`` None: a scalar; 0: a flexible array member)."""

    __slots__ = ("code", "count", "name", "size", "width")

    def __init__(self, name: str, code: str, width: int, count: int | None = None) -> None:
        self.name: str = name
        self.code: str = code  # the letter of struct.Struct
        self.width: int = width  # bytes of one element, which is also its alignment
        self.count: int | None = count
        self.size: int = width if count is None else width * count


SCALARS = {
    "u8": CType("u8", "B", 1),
    "u16": CType("u16", "H", 2),
    "u32": CType("u32", "I", 4),
    "u64": CType("u64", "Q", 8),
    "s32": CType("s32", "i", 4),
    "s64": CType("s64", "q", 8),
    "le64": CType("le64", "Q", 8),
}

u8 = Annotated[int, SCALARS["u8"]]
u16 = Annotated[int, SCALARS["u16"]]
u32 = Annotated[int, SCALARS["u32"]]
u64 = Annotated[int, SCALARS["u64"]]
s32 = Annotated[int, SCALARS["s32"]]
s64 = Annotated[int, SCALARS["s64"]]


def array(scalar: str, count: int) -> CType:
    """The C type ``scalar[count]``: ``ste: Annotated[tuple[int, ...], array("le64", 2)]``; u8 arrays are ``bytes``."""
    base = SCALARS[scalar]
    return CType(base.name, base.code, base.width, count)


class Field(NamedTuple):
    """One member of a struct: where it is, and how people want to see it."""

    name: str
    c_name: str
    offset: int
    size: int
    ctype: CType
    since: Release
    symbols: Symbols | None  # the enum or flags its value is one of
    show: str  # "dec", "hex", or "flags" and "enum" when there are symbols
    direction: str  # "in", "out" or "inout": who gives the value
    union: str | None  # the member stored at the same place whose value this one shares


class _FieldSpec(NamedTuple):
    since: str | None = None
    c_name: str | None = None
    offset: int | None = None
    symbols: Symbols | None = None
    show: str | None = None
    direction: str | None = None
    union: str | None = None


def field(
    *,
    since: str | None = None,
    c_name: str | None = None,
    offset: int | None = None,
    symbols: Symbols | None = None,
    show: str | None = None,
    direction: str | None = None,
    union: str | None = None,
) -> Any:  # where it stands it is the value of a member of any type
    """More about one member, given as its class-level value.

    ``since``: release that added it, if later than the struct. ``c_name``: C name where it differs (``header.id`` for
    a member of an embedded struct). ``offset``: where layout is not the natural one. ``symbols``: IntEnum or IntFlag
    of its values. ``show``: "dec" or "hex" (default: hex for 64 bits, decimal below). ``direction``: "in", "out" or
    "inout" (default: "out" for names that begin with ``out_``). ``union``: the earlier member it shares its place and
    type with.
    """
    return _FieldSpec(since, c_name, offset, symbols, show, direction, union)


def show_symbols(symbols: Symbols, value: int) -> str:
    """``FIXED_IOVA|READABLE|0x80`` for flags, ``SET`` for an enum; a value without a name in hex, no flags as ``0``."""
    if issubclass(symbols, IntEnum):
        member = symbols._value2member_map_.get(value)
        return hex(value) if member is None else str(getattr(member, "name", value))
    names = []
    rest = value
    for name, member in symbols.__members__.items():
        bits = int(member)
        if bits and bits & rest == bits:
            names.append(name)
            rest &= ~bits
    if rest or not names:
        names.append(hex(rest) if rest else "0")
    return "|".join(names)


def show_value(field: Field, value: Any) -> str:  # what the member's C type says
    """One member's value as a person wants to read it (addresses and 64-bit values in hex, counts in decimal)."""
    if isinstance(value, bytes):
        return value.hex() if any(value) else "0"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(hex, value)) + "]"
    if field.symbols is not None:
        return show_symbols(field.symbols, value)
    # a count this large is a mask or a sentinel (U64_MAX), not something to read in decimal
    return hex(value) if field.show == "hex" or value >= 1 << 48 else str(value)


class Struct:
    """Base of all declared structs; see the module docstring. Subclasses are made by :func:`struct`."""

    __slots__ = ()

    SIZE: ClassVar[int] = 0
    ALIGN: ClassVar[int] = 1
    SINCE: ClassVar[Release] = (0,)
    C_NAME: ClassVar[str] = ""
    FIELDS: ClassVar[tuple[Field, ...]] = ()
    FORMAT: ClassVar[str] = "<"
    _ctypes: ClassVar[type[ctypes.Structure] | None] = None
    _ready: ClassVar[bool] = False  # its __init__, unpack and pack are generated

    def __init__(self, **values: Any) -> None:  # each member's own type: see the generated one
        # The first construction of a class replaces this method by one with the fields spelled out.
        cls = type(self)
        _generate(cls)
        cls.__init__(self, **values)

    @classmethod
    def unpack(cls, buf: bytes | bytearray | memoryview) -> Self:
        """The struct at the start of ``buf``; a short ``buf`` reads as if zeros followed, a longer one is cut."""
        _generate(cls)
        return cls.unpack(buf)

    def pack(self) -> bytes:
        """All ``SIZE`` bytes, padding zero. struct.error when a value does not fit its member."""
        _generate(type(self))
        return type(self).pack(self)

    @classmethod
    def size_in(cls, at: Release) -> int:
        """``sizeof`` in release ``at``: without the members that came later. 0 when the struct itself came later."""
        if at < cls.SINCE:
            return 0
        known = [f for f in cls.FIELDS if f.since <= at]
        if len(known) == len(cls.FIELDS):
            return cls.SIZE
        end = max((f.offset + f.size for f in known), default=0)
        align = max((f.ctype.width for f in known), default=1)
        return -(-end // align) * align

    @classmethod
    def ctypes_type(cls) -> type[ctypes.Structure]:
        """The same layout as a ``ctypes.Structure`` (made once), for those who hand memory to C."""
        if cls._ctypes is None:
            cls._ctypes = _ctypes_type(cls)
        return cls._ctypes

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.pack() == other.pack()

    __hash__ = None  # type: ignore[assignment]  # mutable; so Python spells "not hashable", object's type does not

    def __repr__(self) -> str:
        shown = (f"{f.name}={show_value(f, getattr(self, f.name))}" for f in self.FIELDS if f.union is None)
        return f"{type(self).__name__}({', '.join(shown)})"


def members(struct: Struct) -> Any:
    """``struct`` itself, for access to members that its class need not have: what no type checker can follow."""
    return struct


_S = TypeVar("_S", bound=type[Struct])


def struct(*, since: str, size: int | None = None, c_name: str | None = None) -> Callable[[_S], _S]:
    """Class decorator: lays the annotated members out and gives the class ``__slots__``.

    A class derived from another struct has that struct's members too (an arm of a union, beside the head it shares).
    ``since``: the release that introduced the struct. ``size``: sizeof, where a union makes it larger than its
    members say. ``c_name``: C tag where it is not the class name.
    """

    def make(cls: Any) -> Any:  # a class in, another of the same name out: _S says it to callers
        first = release(since)
        fields = _lay_out(cls, first)
        align = max((f.ctype.width for f in fields), default=1)
        end = max((f.offset + f.size for f in fields), default=0)
        stored = [f for f in fields if f.union is None]
        namespace = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
        for f in fields:
            namespace.pop(f.name, None)
            if f.union is not None:
                namespace[f.name] = _same_place(f.union)
        total = max(size or 0, cls.SIZE, -(-end // align) * align)
        namespace.update(
            __slots__=tuple(f.name for f in stored if f not in cls.FIELDS),
            FIELDS=fields,
            SIZE=total,
            ALIGN=align,
            SINCE=first,
            C_NAME=c_name or cls.__name__,
            FORMAT=_format(stored, total),
            _ctypes=None,
            # its own, so that a derived struct never uses those generated for its base
            __init__=Struct.__init__,
            unpack=vars(Struct)["unpack"],
            pack=Struct.pack,
            _ready=False,
        )
        return type(cls.__name__, cls.__bases__, namespace)

    return make


def _same_place(name: str) -> property:
    """A member that is another name for ``name``, of whatever type that is."""

    def get(self: Struct) -> object:
        return getattr(self, name)

    def put(self: Struct, value: object) -> None:
        setattr(self, name, value)

    return property(get, put)


def _ctype_of(annotation: object, module: str) -> CType:
    if isinstance(annotation, str):
        scalar = SCALARS.get(annotation)
        if scalar is not None:
            return scalar
        annotation = eval(annotation, vars(sys.modules[module]))  # our own source text
    found = [m for m in getattr(annotation, "__metadata__", ()) if isinstance(m, CType)]
    if not found:
        raise TypeError(f"{annotation!r} is not a C type of this module")
    return found[-1]


def _lay_out(cls: type[Struct], since: Release) -> tuple[Field, ...]:
    fields: list[Field] = list(cls.FIELDS)  # those of the struct it extends
    end = max((f.offset + f.size for f in fields), default=0)
    for name, annotation in vars(cls).get("__annotations__", {}).items():
        spec = vars(cls).get(name, _NO_SPEC)
        ctype = _ctype_of(annotation, cls.__module__)
        if spec.union is not None:
            offset = next(f.offset for f in fields if f.name == spec.union)
        elif spec.offset is not None:
            offset = spec.offset
        else:
            offset = -(-end // ctype.width) * ctype.width
        end = offset + ctype.size
        if spec.symbols is not None:
            show = "flags" if issubclass(spec.symbols, IntFlag) else "enum"
        else:
            show = spec.show or ("hex" if ctype.width == 8 else "dec")
        fields.append(
            Field(
                name,
                spec.c_name or (f"__{name}" if _RESERVED.fullmatch(name) else name),
                offset,
                ctype.size,
                ctype,
                since if spec.since is None else release(spec.since),
                spec.symbols,
                show,
                spec.direction or ("out" if name.startswith("out_") else "in"),
                spec.union,
            )
        )
    return tuple(sorted(fields, key=lambda f: f.offset))


_NO_SPEC = _FieldSpec()
_RESERVED = re.compile(r"reserved\d*")


def _format(stored: list[Field], total: int) -> str:
    """The ``struct`` format, padding spelled out; u8 arrays as one byte string."""
    text, at = ["<"], 0
    for f in stored:
        if f.offset > at:
            text.append(f"{f.offset - at}x")
        count = f.ctype.count
        if count is None:
            text.append(f.ctype.code)
        elif f.ctype.name == "u8":
            text.append(f"{count}s")
        else:
            text.append(f"{count}{f.ctype.code}")
        at = f.offset + f.size
    if total > at:
        text.append(f"{total - at}x")
    return "".join(text)


def _generate(cls: type[Struct]) -> None:
    """Gives ``cls`` its own ``__init__``, ``unpack`` and ``pack`` (once)."""
    if cls._ready:
        return
    stored = [f for f in cls.FIELDS if f.union is None]
    aliases = [f for f in cls.FIELDS if f.union is not None]
    targets: list[str] = []  # what one unpack assigns to
    values: list[str] = []  # what one pack takes
    after: list[str] = []
    parameters, assignments = [], []
    for f in stored:
        count = f.ctype.count
        if count is None or f.ctype.name == "u8":
            targets.append(f"self.{f.name}")
            values.append(f"self.{f.name}")
            default = "0" if count is None else repr(bytes(count))
        else:
            parts = [f"{f.name}_{i}" for i in range(count)]
            targets += parts
            values.append(f"*self.{f.name}")
            after.append(f"self.{f.name} = ({''.join(p + ', ' for p in parts)})")
            default = repr((0,) * count)
        parameters.append(f"{f.name}={default}")
        assignments.append(f"self.{f.name} = {f.name}")
    for f in aliases:
        parameters.append(f"{f.name}=None")
        assignments.append(f"if {f.name} is not None: self.{f.union} = {f.name}")
    left = ", ".join(targets) + ","
    lines = [
        f"def __init__(self, *, {', '.join(parameters)}):",
        *(f"    {line}" for line in assignments),
        "def unpack(cls, buf):",
        "    self = new(cls)",
        "    try:",
        f"        {left} = unpack_from(buf)",
        "    except error:",
        f"        {left} = unpack_from(bytes(buf).ljust({cls.SIZE}, ZERO))",
        *(f"    {line}" for line in after),
        "    return self",
        "def pack(self):",
        f"    return pack_all({', '.join(values)})",
    ]
    layout = _struct.Struct(cls.FORMAT)
    scope: dict[str, Any] = {  # exec's globals
        "new": object.__new__,
        "unpack_from": layout.unpack_from,
        "pack_all": layout.pack,
        "error": _struct.error,
        "ZERO": b"\0",
    }
    exec("\n".join(lines), scope)  # text made from our own declarations
    made = {"__init__": scope["__init__"], "pack": scope["pack"], "unpack": classmethod(scope["unpack"])}
    for name, function in made.items():
        setattr(cls, name, function)
    cls._ready = True


def _ctypes_type(cls: type[Struct]) -> type[ctypes.Structure]:
    import ctypes

    # Any: ctypes has no public name for the type of its simple types
    scalars: dict[str, Any] = {
        "B": ctypes.c_uint8,
        "H": ctypes.c_uint16,
        "I": ctypes.c_uint32,
        "Q": ctypes.c_uint64,
        "i": ctypes.c_int32,
        "q": ctypes.c_int64,
    }
    fields: list[tuple[str, Any]] = []  # Any: as scalars
    at = 0

    def pad(to: int) -> None:
        if to > at:
            fields.append((f"_pad{at}", ctypes.c_uint8 * (to - at)))

    for f in cls.FIELDS:
        if f.union is not None:
            continue
        pad(f.offset)
        base = scalars[f.ctype.code]
        fields.append((f.name, base if f.ctype.count is None else base * f.ctype.count))
        at = f.offset + f.size
    pad(cls.SIZE)
    made = type(cls.__name__, (ctypes.Structure,), {"_pack_": 1, "_layout_": "ms", "_fields_": fields})
    if ctypes.sizeof(made) != cls.SIZE:
        raise AssertionError(f"{cls.__name__}: {ctypes.sizeof(made)} bytes in ctypes, {cls.SIZE} declared")
    return made
