"""Where a Python object's bytes are, and how long they stay there. No kernel object.

Invariants: :func:`hold` gives a memoryview of the whole buffer that holds an export; as long as it is not released the
owner can neither move nor free the bytes (``bytearray.append`` and ``mmap.close`` raise BufferError, arrays stay
alive), so an address inside a mapping never points at something else. Addresses never come from guessing an object's
layout.
"""

from __future__ import annotations

import ctypes
import mmap
from numbers import Integral
from typing import TYPE_CHECKING, Any, Protocol, SupportsIndex, TypeAlias, TypeGuard

if TYPE_CHECKING:
    from typing_extensions import Buffer


class HasFileno(Protocol):
    """Anything with a descriptor behind it: what ``open`` and ``tempfile.TemporaryFile`` return, a socket, ..."""

    def fileno(self) -> int: ...


class HasArrayInterface(Protocol):
    """A NumPy array, to type checkers of Python 3.11, which cannot see that it is a buffer."""

    @property
    def __array_interface__(self) -> dict[str, Any]: ...  # as NumPy declares it


if TYPE_CHECKING:
    Source: TypeAlias = Buffer | HasArrayInterface | int | HasFileno


class _PyBuffer(ctypes.Structure):
    """``Py_buffer``"""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_FULL_RO = 0x11C  # PyBUF_FULL_RO

_from_buffer = ctypes.c_char.from_buffer
_addressof = ctypes.addressof


def hold(source: object) -> tuple[memoryview, int]:
    """A view of the whole buffer, and the address of its first byte.

    TypeError for what is no buffer, ValueError for an empty one and for one that is not a single piece of memory."""
    try:
        view = memoryview(source)  # type: ignore[arg-type]  # whether it is a buffer is what is being asked
    except TypeError:
        raise TypeError(
            f"{type(source).__name__} is neither a buffer (bytearray, mmap, array, NumPy array), nor an address, nor a "
            "file"
        ) from None
    except (ValueError, BufferError) as error:  # numpy: dtypes without a buffer format; mmap: closed
        raise ValueError(f"this {type(source).__name__} gives no buffer: {error}") from None
    try:
        if not view.readonly and view.c_contiguous:
            return view, _addressof(_from_buffer(view))
        return view, _address(view)
    except BaseException as error:
        empty = not view.nbytes
        pieces = not view.contiguous
        view.release()
        if empty:
            raise ValueError(f"this {type(source).__name__} is empty") from None
        if pieces:
            raise ValueError(f"this {type(source).__name__} is not one piece of memory (a slice with steps?)") from None
        raise error


def _address(view: memoryview) -> int:
    """The address of the first byte, also of one that cannot be written or is contiguous the other way round."""
    if not view.contiguous or not view.nbytes:
        raise ValueError
    buffer = _PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(view), ctypes.byref(buffer), _FULL_RO)
    address = int(buffer.buf)
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))
    return address


def is_number(source: object) -> TypeGuard[SupportsIndex]:
    """Whether ``source`` is a number (an address), though it may export a buffer as NumPy's numbers do."""
    return isinstance(source, Integral)


def has_fileno(source: object) -> TypeGuard[HasFileno]:
    """Whether there is a descriptor behind ``source``."""
    return hasattr(source, "fileno")


def read_only(source: object) -> ValueError:
    """The error for memory that cannot be mapped writeable."""
    return ValueError(f"this {type(source).__name__} is read-only: it cannot be mapped writeable")


LARGE = 1 << 20  # bytes


class Scratch:
    """Memory for what a struct points at: ``data`` and zeroes up to ``length``, at :attr:`address` while it lives."""

    __slots__ = ("_memory", "address", "length")

    def __init__(self, data: bytes = b"", length: int | None = None) -> None:
        self.length = len(data) if length is None else length
        try:
            self._memory: mmap.mmap | ctypes.Array[ctypes.c_char]
            if self.length < LARGE:
                self._memory = ctypes.create_string_buffer(data, max(self.length, 1))
            else:  # fills with zeroes what is looked at
                self._memory = mmap.mmap(-1, self.length)
                self._memory[: len(data)] = data
        except (MemoryError, OverflowError, ValueError, OSError):
            raise too_much(self.length) from None
        self.address = _addressof(_from_buffer(self._memory))

    def bytes(self, count: int | None = None) -> bytes:
        """The first ``count`` bytes as they are now."""
        return bytes(memoryview(self._memory).cast("B")[: self.length if count is None else count])


def too_much(count: int) -> MemoryError:
    """The error for more memory than there is."""
    return MemoryError(f"{count:#x} bytes of memory are not to be had")


def piece(data: Buffer) -> bytes:
    """A copy of a buffer's bytes. TypeError for what is none (a number would be that many zeroes to ``bytes``)."""
    try:
        return bytes(memoryview(data))
    except TypeError:
        raise TypeError(f"data is bytes or another buffer, not {type(data).__name__}") from None


def where(source: Buffer | HasArrayInterface) -> tuple[int, int]:
    """The address and length in bytes of a buffer, without holding it: only good while the caller does."""
    view, address = hold(source)
    length = view.nbytes
    view.release()
    return address, length
