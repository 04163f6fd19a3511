"""Many mappings in one call, or none of them (kernel: each is an IOMMU_IOAS_MAP of its own).

Invariants: the buffers are held before the first call is made; when a call fails what the calls before it mapped is
unmapped again, newest first, and every buffer is let go.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from iommufd.client.buffers import hold, is_number, read_only
from iommufd.client.mapping import FIXED, MAP, MAP_STRUCT, READ, UNMAP, UNMAP_STRUCT, WRITE, Mapping
from iommufd.client.numbers import items, number, plural

if TYPE_CHECKING:
    from collections.abc import Sequence

    from iommufd.client.buffers import Source
    from iommufd.client.ioas import IOAS

MAP_SIZE = MAP_STRUCT.size
_MAP_INTO, _MAP_BACK, _MAP_ALL = MAP_STRUCT.pack_into, MAP_STRUCT.unpack_from, MAP_STRUCT.iter_unpack
_UNMAP = UNMAP_STRUCT.pack


def map_many(
    ioas: IOAS,
    sources: list[Source],
    iovas: Sequence[int] | None,
    readable: bool,
    writeable: bool | None,
) -> list[Mapping]:
    """See :meth:`IOAS.map_many`, whose work this is."""
    if iovas is not None and len(iovas := items(iovas, "iovas")) != len(sources):
        raise ValueError(f"{plural(len(sources), 'source')} and {plural(len(iovas), 'IOVA')}")
    views: list[memoryview] = []
    data = bytearray(len(sources) * MAP_SIZE)
    done = [0]
    try:
        if not _prepare(ioas, sources, iovas, readable, writeable, views, data):
            return _map_each(ioas, sources, iovas, readable, writeable)
        try:
            ioas.context.ioctl_many(MAP, data, MAP_SIZE, done)
        except BaseException as error:
            for at in range((done[0] - 1) * MAP_SIZE, -1, -MAP_SIZE):
                _, _, _, _, _, length, iova = _MAP_BACK(data, at)
                ioas.context.ioctl(UNMAP, bytearray(_UNMAP(24, ioas._id, iova, length)))
            if isinstance(error, OSError):
                raise ioas._gone(error) from None
            raise
        made: list[Mapping] = []
        mappings = ioas._mappings
        for view, (_, flags, _, _, _, length, iova) in zip(views, _MAP_ALL(data), strict=True):
            mapping = mappings[iova] = Mapping(ioas, iova, length, readable, flags & WRITE != 0, view)
            made.append(mapping)
        views = []
        return made
    finally:
        for view in views:
            view.release()


def _prepare(
    ioas: IOAS,
    sources: list[Source],
    iovas: Sequence[int] | None,
    readable: bool,
    writeable: bool | None,
    views: list[memoryview],
    data: bytearray,
) -> bool:
    """Fills ``data`` with a struct for each of ``sources``, which are held by ``views``; False when one is no
    buffer."""
    common = READ if readable else 0
    at = 0
    for i, source in enumerate(sources):
        try:
            view, address = hold(source)
        except TypeError:
            return False
        views.append(view)
        if not view.ndim and is_number(source):
            return False
        flags = common
        if writeable or (writeable is None and not view.readonly):
            if view.readonly:
                raise read_only(source)
            flags |= WRITE
        iova = 0
        if iovas is not None:
            iova = iovas[i]
            flags |= FIXED
        try:
            _MAP_INTO(data, at, MAP_SIZE, flags, ioas._id, 0, address, view.nbytes, iova)
        except struct.error:
            number(iova, "iova")
            raise
        at += MAP_SIZE
    return True


def _map_each(
    ioas: IOAS, sources: list[Source], iovas: Sequence[int] | None, readable: bool, writeable: bool | None
) -> list[Mapping]:
    """For sources that are not all buffers: one :meth:`IOAS.map` after the other."""
    done: list[Mapping] = []
    try:
        for i, source in enumerate(sources):
            at = None if iovas is None else iovas[i]
            done.append(ioas.map(source, at, readable=readable, writeable=writeable))
    except BaseException:
        for mapping in reversed(done):
            mapping.unmap()
        raise
    return done
