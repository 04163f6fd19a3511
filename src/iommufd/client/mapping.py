"""Mapping: memory at an IOVA (kernel: the areas of one IOMMU_IOAS_MAP, MAP_FILE or COPY)."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING, Self

from iommufd.client.errors import IommufdError
from iommufd.client.numbers import number, size
from iommufd.uapi import iommufd as u

if TYPE_CHECKING:
    from types import TracebackType

    from iommufd.client.ioas import IOAS

FIXED, WRITE, READ = u.IOMMU_IOAS_MAP_FIXED_IOVA, u.IOMMU_IOAS_MAP_WRITEABLE, u.IOMMU_IOAS_MAP_READABLE
MAP, UNMAP = u.IOMMU_IOAS_MAP, u.IOMMU_IOAS_UNMAP

# the two calls that are made a million times are packed by hand
MAP_STRUCT = struct.Struct("<IIIIQQQ")  # struct iommu_ioas_map: size flags ioas_id __reserved user_va length iova
UNMAP_STRUCT = struct.Struct("<IIQQ")  # struct iommu_ioas_unmap: size ioas_id iova length


class Mapping:
    """``length`` bytes that devices see at ``iova``, up to ``last`` (inclusive), until :meth:`unmap`.

    The buffer it was made of stays alive and in place as long as the mapping, kept or not in a variable of yours.
    """

    __slots__ = ("_ioas", "_keep", "iova", "length", "readable", "writeable")

    def __init__(
        self,
        ioas: IOAS | None,
        iova: int,
        length: int,
        readable: bool,
        writeable: bool,
        keep: memoryview | tuple[memoryview, ...] | None,
    ) -> None:
        self._ioas = ioas
        self._keep = keep
        self.iova: int = iova
        self.length: int = length
        self.readable: bool = readable
        self.writeable: bool = writeable

    @property
    def ioas(self) -> IOAS:
        """Where it is mapped. IommufdError EBADF when it is unmapped."""
        if self._ioas is None:
            raise self._over()
        return self._ioas

    @property
    def last(self) -> int:
        """The last IOVA, inclusive."""
        return self.iova + self.length - 1

    @property
    def live(self) -> bool:
        """Whether it is (as far as this client knows) still mapped."""
        return self._ioas is not None

    def unmap(self) -> None:
        """Unmaps it. IommufdError EBADF when that has been done, EBUSY while a hardware queue lies in it."""
        ioas = self._ioas
        if ioas is None:
            raise self._over()
        ioas._unmap_one(self)

    def _over(self) -> IommufdError:
        return IommufdError(errno.EBADF, f"the mapping at [{self.iova:#x}, {self.last:#x}] is unmapped")

    def _forget(self) -> None:
        """It is unmapped: the buffer may move and go."""
        self._ioas = None
        keep, self._keep = self._keep, None
        if isinstance(keep, memoryview):
            keep.release()
        elif keep is not None:
            for view in keep:
                view.release()

    def __enter__(self) -> Self:
        if self._ioas is None:
            raise self._over()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._ioas is not None:
            self.unmap()

    def __repr__(self) -> str:
        rights = ("r" if self.readable else "-") + ("w" if self.writeable else "-")
        state = f"IOAS {self._ioas.number}" if self._ioas is not None else "unmapped"
        return f"<Mapping [{self.iova:#x}, {self.last:#x}] {rights}, {size(self.length)}, {state}>"


def span(iova: int | Mapping, length: int | None) -> tuple[int, int]:
    """What ``iova`` and ``length`` of a call mean, a mapping standing for all of itself: (iova, length)."""
    if isinstance(iova, Mapping):
        return iova.iova, iova.length if length is None else number(length, "length")
    if length is None:
        raise TypeError("an IOVA needs a length")
    return number(iova, "iova"), number(length, "length")
