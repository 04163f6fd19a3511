"""IOAS: an IO address space, in which memory gets IOVAs (kernel: struct iommufd_ioas).

Invariants:

* ``_mappings`` has, by first IOVA, every mapping this client made and has not seen end. A mapping leaves it *before*
  the call that unmaps it and returns if that fails; since nobody can get the IOVA before the call succeeded, two
  threads never find each other's mapping under a number.
* A mapping holds its buffer (see :mod:`.buffers`); a copy holds the buffers of what it was copied from.
* Nothing half-done: a call that fails leaves no mapping here, and :meth:`IOAS.map_many` undoes what it did.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from iommufd.client import files
from iommufd.client.buffers import Scratch, has_fileno, hold, is_number, read_only
from iommufd.client.map_many import map_many
from iommufd.client.mapping import (
    FIXED,
    MAP,
    MAP_STRUCT,
    READ,
    UNMAP,
    UNMAP_STRUCT,
    WRITE,
    Mapping,
    span,
)
from iommufd.client.numbers import U64, instance, items, number, pair, part, plural, size
from iommufd.client.objects import PageTable
from iommufd.uapi import iommufd as u

if TYPE_CHECKING:
    from typing import SupportsIndex

    from iommufd.client.buffers import HasFileno, Source
    from iommufd.client.context import Context
    from iommufd.client.device import Device
    from iommufd.client.fault_queue import FaultQueue
    from iommufd.client.hwpt import HWPT
    from iommufd.client.nesting import HwptData

_MAP, _UNMAP = MAP_STRUCT.pack, UNMAP_STRUCT.pack
_IOVA = struct.Struct("<Q").unpack_from


class IovaRange(NamedTuple):
    """An interval of IOVAs, ``last`` inclusive."""

    start: int
    last: int

    def __repr__(self) -> str:
        return f"[{self.start:#x}, {self.last:#x}]"


class IOAS(PageTable):
    """An IO address space: :meth:`map` gives memory an IOVA, for every device that is attached."""

    kind: ClassVar[str] = "IOAS"

    def __init__(self, context: Context, number: int) -> None:
        self._mappings: dict[int, Mapping] = {}
        super().__init__(context, number)

    # ------------------------------------------------------------------------------------------------------- mapping

    def map(
        self,
        source: Source,
        iova: int | None = None,
        length: int | None = None,
        offset: int = 0,
        *,
        readable: bool = True,
        writeable: bool | None = None,
    ) -> Mapping:
        """Maps memory (IOMMU_IOAS_MAP, or MAP_FILE for a file) and returns where.

        ``source``: a buffer (bytearray, mmap, array, NumPy array, memoryview; anything with the buffer protocol), an
        address of this process as an int (``length`` is then needed), or a file object of a memfd or dma-buf. (A bare
        descriptor is a number, too: :meth:`map_file` takes it.) ``offset`` and ``length``, in bytes, choose a part;
        without ``length`` it is everything from ``offset`` on.

        ``iova``: where (None: the kernel chooses). IOVA, length and the memory's offset within its page must be
        multiples of :attr:`iova_alignment`, which is 1 until a device is attached and a page with most.

        ``readable``, ``writeable``: what devices may do. Without a word memory is writeable where Python may write
        it, so ``bytes`` and read-only arrays are mapped read-only; to ask for more is a ValueError.

        The buffer stays alive and in place until the mapping ends.

        IommufdError EEXIST when something is mapped there, EINVAL for reserved IOVAs and bad alignment, ENOSPC when no
        room is left, EFAULT or ENOMEM when the memory cannot be pinned (core 4.9).
        """
        if type(source) is int:
            return self._map_address(source, iova, length, offset, readable, writeable)
        keep: memoryview | None
        try:
            keep, address = hold(source)
        except TypeError:
            if is_number(source):
                return self._map_address(source, iova, length, offset, readable, writeable)
            if has_fileno(source):
                return self.map_file(source, iova, length, offset, readable=readable, writeable=writeable)
            raise
        try:
            if not keep.ndim and is_number(source):  # a number of NumPy's: an address, whose own bytes nobody wants
                return self._map_address(source, iova, length, offset, readable, writeable)
            if writeable is None:
                writeable = not keep.readonly
            elif writeable and keep.readonly:
                raise read_only(source)
            if length is None and not offset:
                length = keep.nbytes
            else:
                length, offset = part(keep.nbytes, length, offset, type(source).__name__)
            mapping = self._map(address + offset, length, iova, readable, writeable, keep)
            keep = None
        finally:
            if keep is not None:
                keep.release()
        return mapping

    def _map_address(
        self,
        address: SupportsIndex,
        iova: int | None,
        length: int | None,
        offset: int,
        readable: bool,
        writeable: bool | None,
    ) -> Mapping:
        if length is None:
            raise TypeError("an address needs a length (a descriptor goes to map_file)")
        return self._map(
            number(address, "an address") + number(offset, "offset"),
            number(length, "length"),
            iova,
            readable,
            True if writeable is None else writeable,
            None,
        )

    def _map(
        self, address: int, length: int, iova: int | None, readable: bool, writeable: bool, keep: memoryview | None
    ) -> Mapping:
        flags = (READ if readable else 0) | (WRITE if writeable else 0) | (0 if iova is None else FIXED)
        try:
            data = bytearray(_MAP(40, flags, self._id, 0, address, length, 0 if iova is None else iova))
        except struct.error:
            number(length, "length")
            number(address, "an address")
            number(0 if iova is None else iova, "iova")
            raise
        try:
            self.context.ioctl(MAP, data)
        except OSError as error:
            raise self._gone(error) from None
        (at,) = _IOVA(data, 32)
        mapping = Mapping(self, at, length, readable, writeable, keep)
        self._mappings[at] = mapping
        return mapping

    def map_file(
        self,
        file: HasFileno | int,
        iova: int | None = None,
        length: int | None = None,
        offset: int = 0,
        *,
        readable: bool = True,
        writeable: bool | None = None,
    ) -> Mapping:
        """Maps bytes of a memfd, a hugetlbfs file or a dma-buf (IOMMU_IOAS_MAP_FILE): a file object or a descriptor.

        The file may be closed afterwards. Without ``length`` everything from ``offset`` to the end; without
        ``writeable`` what the descriptor was opened for (the kernel itself does not compare). EINVAL, at the latest
        when a device is attached, for other files and for bytes beyond the end (core 4.10).
        """
        fd = files.descriptor(file)
        offset = number(offset, "offset")
        if length is None:
            length, offset = part(files.size_of(fd), None, offset, "file")
        if writeable is None:
            writeable = files.writeable(fd)
        answer = u.iommu_ioas_map_file(
            flags=(READ if readable else 0) | (WRITE if writeable else 0) | (0 if iova is None else FIXED),
            ioas_id=self._id,
            fd=fd,
            start=offset,
            length=number(length, "length"),
            iova=0 if iova is None else number(iova, "iova"),
        )
        at = self._do(answer).iova
        mapping = self._mappings[at] = Mapping(self, at, length, readable, writeable, None)
        return mapping

    def map_many(
        self,
        sources: Iterable[Source],
        iovas: Sequence[int] | None = None,
        *,
        readable: bool = True,
        writeable: bool | None = None,
    ) -> list[Mapping]:
        """Maps each of ``sources`` as :meth:`map` would (``iovas[i]`` is where, if given); all of them, or none.

        Faster than a loop, most of all on a software machine."""
        return map_many(self, items(sources, "sources"), iovas, readable, writeable)

    def copy_to(
        self,
        target: IOAS,
        iova: int | Mapping,
        length: int | None = None,
        *,
        to: int | None = None,
        readable: bool = True,
        writeable: bool | None = None,
    ) -> Mapping:
        """Maps in ``target`` what is mapped here (IOMMU_IOAS_COPY): the same pages, pinned and charged once.

        ``iova``: a mapping of this IOAS, or the first of ``length`` IOVAs, any part or run of what is mapped. ``to``:
        where in ``target`` (None: the kernel chooses). The copy lives on when the original is unmapped, and keeps its
        buffer alive. Without ``writeable`` as the originals; EPERM for more than the memory was first mapped with.
        """
        instance(target, IOAS, "target")
        if target.context is not self.context:
            raise ValueError("both IOASes must be of one context")
        iova, length = span(iova, length)
        origins = self._within(iova, iova + length - 1, touching=True)
        if writeable is None:
            writeable = all(origin.writeable for origin in origins)
        views = _views(origins)
        try:
            answer = u.iommu_ioas_copy(
                flags=(READ if readable else 0) | (WRITE if writeable else 0) | (0 if to is None else FIXED),
                dst_ioas_id=target.id,
                src_ioas_id=self._id,
                length=length,
                dst_iova=0 if to is None else number(to, "to"),
                src_iova=iova,
            )
            at = self._do(answer).dst_iova
        except BaseException:
            for view in views:
                view.release()
            raise
        mapping = target._mappings[at] = Mapping(target, at, length, readable, writeable, views or None)
        return mapping

    # ----------------------------------------------------------------------------------------------------- unmapping

    def _unmap_one(self, mapping: Mapping) -> None:
        at = mapping.iova
        if self._mappings.pop(at, None) is not mapping:
            raise mapping._over()  # another thread is at it
        try:
            self.context.ioctl(UNMAP, bytearray(_UNMAP(24, self._id, at, mapping.length)))
        except BaseException as error:
            if isinstance(error, OSError) and error.errno == errno.ENOENT and self._id:
                mapping._forget()  # somebody unmapped it behind our back
            else:
                self._mappings.setdefault(at, mapping)
            raise
        mapping._forget()

    def unmap(self, iova: int | Mapping, length: int | None = None) -> int:
        """Unmaps everything in ``length`` bytes from ``iova`` on, or one mapping; returns the bytes that went.

        Only whole mappings: ENOENT when one is cut by the range or nothing is mapped there, EBUSY when a hardware queue
        lies in it. The walk is ascending and what it removed before an error stays removed (core 4.12); this client
        then keeps the buffers of all mappings in the range."""
        if isinstance(iova, Mapping):
            if iova.ioas is not self:
                raise ValueError(f"{iova!r} is not of {self!r}")
            iova.unmap()
            return iova.length
        iova, length = span(iova, length)
        gone = self._within(iova, iova + length - 1)
        done = self._do(u.iommu_ioas_unmap(ioas_id=self._id, iova=iova, length=length)).length
        self._forget_all(gone)
        return done

    def unmap_all(self) -> int:
        """Unmaps everything; returns the bytes that went."""
        gone = list(self._mappings.values())
        done = self._do(u.iommu_ioas_unmap(ioas_id=self._id, iova=0, length=U64)).length
        self._forget_all(gone)
        return done

    def _forget_all(self, mappings: list[Mapping]) -> None:
        """``mappings`` have been unmapped by a call on a range. One that is in the table again is a later one."""
        for mapping in mappings:
            if self._mappings.get(mapping.iova) is mapping:
                del self._mappings[mapping.iova]
            mapping._forget()

    def _within(self, first: int, last: int, *, touching: bool = False) -> list[Mapping]:
        """The known mappings inside ``[first, last]`` (or that have a part there), ascending."""
        exact = self._mappings.get(first)
        if exact is not None and exact.last == last:
            return [exact]
        found = [
            m
            for m in list(self._mappings.values())
            if (m.iova <= last and m.last >= first if touching else m.iova >= first and m.last <= last)
        ]
        return sorted(found, key=lambda m: m.iova)

    @property
    def mappings(self) -> list[Mapping]:
        """The live mappings made through this object, by IOVA."""
        return [self._mappings[at] for at in sorted(self._mappings)]

    # -------------------------------------------------------------------------------------------------------- ranges

    def iova_ranges(self) -> list[IovaRange]:
        """The IOVAs that can be mapped, whether or not something is mapped there: all that no device reserves."""
        return self._ranges()[0]

    @property
    def iova_alignment(self) -> int:
        """What IOVAs and lengths must be multiples of: 1 without devices, then the largest smallest page of them."""
        return self._ranges()[1]

    def _ranges(self) -> tuple[list[IovaRange], int]:
        room = 32
        while True:
            array = Scratch(length=16 * room)
            query = u.iommu_ioas_iova_ranges(
                size=u.iommu_ioas_iova_ranges.SIZE, ioas_id=self._id, num_iovas=room, allowed_iovas=array.address
            )
            data = bytearray(query.pack())
            try:
                self.context.ioctl(u.IOMMU_IOAS_IOVA_RANGES, data)
            except OSError as error:
                if error.errno != errno.EMSGSIZE:
                    raise self._gone(error) from None
                room = u.iommu_ioas_iova_ranges.unpack(data).num_iovas + 8  # more may appear meanwhile
                continue
            answer = u.iommu_ioas_iova_ranges.unpack(data)
            found = struct.iter_unpack("<QQ", array.bytes(16 * answer.num_iovas))
            return [IovaRange(*pair) for pair in found], answer.out_iova_alignment

    def allow(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Restricts chosen IOVAs to ``(start, last)`` intervals, which no later device may then reserve (ALLOW_IOVAS).

        Replaces the list; an empty one lifts the restriction. Mappings at given IOVAs may lie elsewhere. EADDRINUSE
        when a device reserves some of them, EINVAL when two overlap or one is empty."""
        pairs = [pair(each, "a range", "start", "last") for each in items(ranges, "ranges")]
        array = Scratch(b"".join(struct.pack("<QQ", *pair) for pair in pairs))
        self._do(
            u.iommu_ioas_allow_iovas(
                ioas_id=self._id, num_iovas=len(pairs), allowed_iovas=array.address if pairs else 0
            )
        )

    def physical(self, iova: int, length: int = 1) -> tuple[int, int]:
        """For devices without an IOMMU: the physical address of ``iova``, and how many of ``length`` bytes follow in
        one piece (IOMMU_IOAS_NOIOMMU_GET_PA). EPERM without CAP_SYS_RAWIO, EOPNOTSUPP with a real IOMMU."""
        query = u.iommu_ioas_noiommu_get_pa(
            ioas_id=self._id, iova=number(iova, "iova"), length=number(length, "length")
        )
        answer = self._do(query)
        return answer.out_phys, answer.length

    # ------------------------------------------------------------------------------------------------------- options

    @property
    def huge_pages(self) -> bool:
        """Whether devices' page tables may use pages larger than the CPU's smallest (IOMMU_OPTION_HUGE_PAGES).

        Turning it off is EINVAL while something is mapped for a device."""
        option = u.iommu_option(option_id=u.IOMMU_OPTION_HUGE_PAGES, op=u.IOMMU_OPTION_OP_GET, object_id=self._id)
        return bool(self._do(option).val64)

    @huge_pages.setter
    def huge_pages(self, allowed: bool) -> None:
        self._do(
            u.iommu_option(
                option_id=u.IOMMU_OPTION_HUGE_PAGES,
                op=u.IOMMU_OPTION_OP_SET,
                object_id=self._id,
                val64=1 if allowed else 0,
            )
        )

    # ---------------------------------------------------------------------------------------------------- page tables

    def alloc_hwpt(
        self,
        device: Device,
        *,
        nest_parent: bool = False,
        dirty_tracking: bool = False,
        pasid: bool = False,
        fault_queue: FaultQueue | None = None,
        data: HwptData | None = None,
    ) -> HWPT:
        """Makes a hardware page table of this address space for ``device``'s IOMMU (IOMMU_HWPT_ALLOC).

        ``nest_parent``: a guest's tables may be nested on it. ``dirty_tracking``: writes by devices are recorded.
        ``pasid``: devices may be attached with PASIDs. ``fault_queue``: receives its page faults. EOPNOTSUPP for what
        the hardware, or its driver, cannot do.
        """
        from iommufd.client.hwpt import HWPT, alloc

        flags = (
            (u.IOMMU_HWPT_ALLOC_NEST_PARENT if nest_parent else 0)
            | (u.IOMMU_HWPT_ALLOC_DIRTY_TRACKING if dirty_tracking else 0)
            | (u.IOMMU_HWPT_ALLOC_PASID if pasid else 0)
        )
        made = alloc(self, device, flags, fault_queue, data)
        return HWPT(self.context, made, self, fault_queue)

    # ----------------------------------------------------------------------------------------------------------- life

    def _forget(self) -> None:
        super()._forget()
        mappings = list(self._mappings.values())
        self._mappings.clear()
        for mapping in mappings:
            mapping._forget()

    def _describe(self) -> str:
        mapped = list(self._mappings.values())
        return f"{plural(len(mapped), 'mapping')}, {size(sum(m.length for m in mapped))}"


def _views(mappings: list[Mapping]) -> tuple[memoryview, ...]:
    """Holds of the buffers behind mappings, for a copy of them."""
    views: list[memoryview] = []
    for mapping in mappings:
        keep = mapping._keep
        for view in (keep,) if isinstance(keep, memoryview) else keep or ():
            try:
                views.append(memoryview(view))
            except ValueError:  # unmapped by another thread at this moment: the copy will fail, too
                continue
    return tuple(views)
