"""What the client raises: an OSError that says why.

Invariants: every failed call of either backend reaches the user as an :class:`IommufdError` with the kernel's errno;
``why`` is one sentence, the software machine's reason or, for a kernel (which gives none), the request that was
refused. Where Python has a class of its own for an errno (FileNotFoundError for ENOENT, FileExistsError for EEXIST,
PermissionError, ...) the error is one of those too. What the program itself did wrong before any call was made is a
TypeError (not that kind of thing), a ValueError (a number out of range, an object of another context), or an
:class:`IommufdError` with EBADF for something closed.
"""

from __future__ import annotations

import os

from iommufd.errors import errno_name


class IommufdError(OSError):
    """A call that failed with ``errno`` because ``why``; ``request`` shows the call with its fields, or is empty."""

    why: str
    request: str

    def __new__(cls, number: int, why: str, request: str = "") -> IommufdError:
        if cls is IommufdError:
            cls = _CLASSES.get(number, cls)
        self = super().__new__(cls, number, f"{os.strerror(number)}: {why}")
        self.why = why
        self.request = request
        return self

    def __reduce__(self) -> tuple[object, ...]:
        return IommufdError, (self.errno, self.why, self.request)

    @property
    def name(self) -> str:
        """The errno as C spells it: ``"EEXIST"``."""
        return errno_name(self.errno or 0)


class InvalidationError(IommufdError):
    """An invalidation that stopped early: the first ``handled`` entries took effect."""

    handled: int = 0

    def __reduce__(self) -> tuple[object, ...]:
        return invalidation_error, (self.errno, self.why, self.request, self.handled)


def invalidation_error(number: int, why: str, request: str, handled: int) -> InvalidationError:
    """An InvalidationError with its count."""
    made = InvalidationError(number, why, request)
    assert isinstance(made, InvalidationError)
    made.handled = handled
    return made


def _classes() -> dict[int, type[IommufdError]]:
    """For each errno that Python has an exception for, an IommufdError that is one."""
    made: dict[int, type[IommufdError]] = {}
    for number in range(1, 134):
        plain = type(OSError(number, ""))
        if plain is not OSError:
            made[number] = type("IommufdError", (IommufdError, plain), {"__module__": __name__})
    return made


_CLASSES = _classes()
