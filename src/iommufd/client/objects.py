"""Object: what a context's numbers name, and the order in which things go away (kernel: struct iommufd_object).

Invariants:

* An object belongs to its context until it is destroyed or the context closes; dropping the Python variable does
  nothing. Its number is in ``_id`` while it lives and 0 (which names nothing) from then on, so a call on a dead object
  is refused whoever has its number now.
* ``children`` are the objects that hold this one in the kernel (a HWPT holds its IOAS): :meth:`Object.close` closes
  them first, newest first. :meth:`Object.destroy` is the bare IOMMU_DESTROY, EBUSY while anything holds the object.
* Of several threads that end an object at once, one does; the others see it closed.
"""

from __future__ import annotations

import errno
import itertools
from typing import TYPE_CHECKING, ClassVar, Self, TypeVar

from iommufd.client.errors import IommufdError
from iommufd.uapi.iommufd import IOMMU_DESTROY, iommu_destroy

if TYPE_CHECKING:
    from types import TracebackType

    from iommufd.client.context import Context
    from iommufd.client.device import Device
    from iommufd.uapi.declare import Struct

S = TypeVar("S", bound="Struct")

_serial = itertools.count()


class Object:
    """One object of a context: numbered ``id`` there. ``parents`` are those it holds, None for one not known here.

    From the last line of ``__init__`` on other threads find it (and may close it): a subclass sets what is its own
    before it calls this one's."""

    kind: ClassVar[str] = "object"
    _adoptable: ClassVar[bool] = True  # whether a number is all it takes to make one

    def __init__(self, context: Context, number: int, *parents: Object | None) -> None:
        self.context = context
        self.number = number  # for people; stays when the object is gone
        self._id = number
        self._serial = next(_serial)
        self._parents = tuple(parent for parent in parents if parent is not None)
        self._children: dict[Object, bool] = {}
        for parent in self._parents:
            parent._children[self] = True
        context._objects[self] = True

    # ---------------------------------------------------------------------------------------------------------- life

    @property
    def id(self) -> int:
        """The number in calls. IommufdError EBADF when the object is gone."""
        self._check()
        return self._id

    @property
    def closed(self) -> bool:
        """Whether the object is gone."""
        return self._id == 0 or self.context.closed

    def close(self) -> None:
        """Ends the object and first everything that holds it, newest first. Nothing happens when it is gone."""
        if self.closed:
            return
        for child in sorted(self._children, key=_age):
            child.close()
        if self.context._objects.pop(self, None) is not None:  # otherwise another thread is at it
            self._end()

    def destroy(self) -> None:
        """IOMMU_DESTROY. IommufdError EBUSY while anything holds the object: it stays as it is then."""
        self._check()
        if self.context._objects.pop(self, None) is None:
            raise IommufdError(errno.EBADF, f"{self!r} is being closed by another thread")
        self._end()

    def _end(self) -> None:
        """Destroys the object; called by the one thread that took it out of the context's list."""
        try:
            self._destroy()
        except BaseException:
            self.context._objects[self] = True
            raise
        self._forget()

    def _destroy(self) -> None:
        self.context.ioctl(IOMMU_DESTROY, bytearray(iommu_destroy(size=8, id=self._id).pack()))

    def _release(self) -> None:
        """The context is about to close: gives up what would keep it open. Raises nothing that can be helped."""

    def _forget(self) -> None:
        """The object is gone, by whatever way."""
        self._id = 0
        for parent in self._parents:
            parent._children.pop(self, None)
        self._parents = ()

    def _check(self) -> None:
        """Raises unless the object can be used."""
        if self.context.closed:
            raise self.context.failure(None)
        if self._id == 0:
            raise IommufdError(errno.EBADF, f"{self!r} is gone")

    def _do(self, query: S) -> S:
        """One call on this object, as :meth:`Context.do` makes it."""
        try:
            return self.context.do(query)
        except OSError as error:
            raise self._gone(error) from None

    def _gone(self, error: Exception) -> Exception:
        """What a user sees for ``error`` of a call on this object."""
        if self._id == 0 and not self.context.closed and isinstance(error, OSError):
            return IommufdError(errno.EBADF, f"{self!r} is gone")
        return error

    def __enter__(self) -> Self:
        self._check()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # -------------------------------------------------------------------------------------------------------- people

    def __repr__(self) -> str:
        more = self._describe() if not self.closed else "closed"
        return f"<{type(self).__name__} {self.number}{': ' if more else ''}{more}>"

    def _describe(self) -> str:
        return ""


def _age(obj: Object) -> int:
    return -obj._serial


class PageTable(Object):
    """What a device can be attached to: an IOAS, a HWPT. Remembers the attachments, to undo them before it goes."""

    def __init__(self, context: Context, number: int, *parents: Object | None) -> None:
        self._attached: dict[tuple[Device, int], bool] = {}
        super().__init__(context, number, *parents)

    def close(self) -> None:
        if not self.closed:
            for device, pasid in list(self._attached):
                device._detach_from(self, pasid)
        super().close()

    @property
    def devices(self) -> list[Device]:
        """The devices this program attached to it, PASIDs included, each once."""
        return list(dict.fromkeys(device for device, _ in self._attached))
