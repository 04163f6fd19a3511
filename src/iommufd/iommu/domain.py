"""Domain: one I/O page table, as drivers give it and iommufd uses it (kernel: struct iommu_domain and its ops).

devices.md 10.2-10.4. A domain is any object with the attributes of :class:`Domain`; what else it can do it shows by
having the methods of the further protocols here, one protocol per optional op of the kernel, and the layers above ask
with ``isinstance``. Invariants:

* ``owner`` is set by iommufd right after allocation and names the driver; compared by identity.
* A map either maps everything or nothing. An unmap cannot fail and cannot need memory.
* ``free`` is called once, when everything is unmapped and nothing is attached.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, IntFlag
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from iommufd.iommu.device import Device
    from iommufd.iommu.driver import Driver
    from iommufd.iommu.faults import FaultGroup
    from iommufd.iommu.user_data import UserArray
    from iommufd.memory.frames import Extents


class Prot(IntFlag):
    """Permissions of one mapping, with the kernel's values (IOMMU_READ and so on)."""

    READ = 1
    WRITE = 2
    CACHE = 4
    NOEXEC = 8
    MMIO = 16


class Kind(Enum):
    """The type bits of a domain that iommufd looks at."""

    PAGING = "paging"
    NESTED = "nested"
    BLOCKED = "blocked"
    IDENTITY = "identity"


IopfHandler = Callable[["FaultGroup"], None]
"""Takes a complete group of page requests; KernelError when it cannot (then the hardware is answered FAILURE)."""


class Domain(Protocol):
    """What every domain has; :class:`BaseDomain` gives it."""

    kind: Kind
    owner: Driver | None
    iopf_handler: IopfHandler | None  # set by iommufd after allocation when the page table has a fault queue

    @property
    def nested(self) -> bool: ...

    def free(self) -> None:
        """The last call; cannot fail."""
        ...


class BaseDomain:
    """The attributes every domain has, for drivers to derive from."""

    __slots__ = ("iopf_handler", "kind", "owner")

    def __init__(self, kind: Kind, owner: Driver | None = None) -> None:
        self.kind = kind
        self.owner = owner
        self.iopf_handler: IopfHandler | None = None

    @property
    def nested(self) -> bool:
        """Whether it is a user-managed stage 1 over a nesting parent."""
        return self.kind is Kind.NESTED

    def free(self) -> None:
        """Nothing to give back."""


@runtime_checkable
class AttachesDevices(Protocol):
    """``attach_dev``: a domain without it cannot be attached to a RID (ENODEV)."""

    def attach_dev(self, device: Device, old: Domain) -> None:
        """Moves the device's RID from ``old`` to this domain; on KernelError it is still on ``old``.

        EINVAL says "not with this device" (iommufd then tries another domain); anything else is a failure for the
        client. Going back to a domain that was good before, and to a blocked one, must succeed."""
        ...


@runtime_checkable
class SetsPasids(Protocol):
    """``set_dev_pasid``: a domain without it cannot be attached to a PASID (EOPNOTSUPP)."""

    def set_dev_pasid(self, device: Device, pasid: int, old: Domain | None) -> None:
        """Sets or replaces the domain of one PASID; on KernelError the PASID keeps ``old``. On a blocked domain:
        removal."""
        ...


@runtime_checkable
class EnforcesCoherency(Protocol):
    def enforce_cache_coherency(self) -> bool:
        """Called once on a fresh domain, before anything is mapped; True when all DMA through it will be coherent."""
        ...


@runtime_checkable
class InvalidatesCaches(Protocol):
    """A NESTED domain whose user may invalidate cached translations."""

    def cache_invalidate_user(self, array: UserArray) -> None:
        """Handles ``array.entry_num`` entries and sets it to the number fully handled, on success and on
        KernelError."""
        ...


class DirtySink(Protocol):
    """Where dirty translation entries are reported. Bits are only ever set."""

    def record(self, iova: int, length: int) -> None:
        """The entry that translates ``[iova, iova + length)`` is dirty."""
        ...

    def record_bits(self, iova: int, size: int, bits: memoryview, count: int) -> None:
        """``count`` adjacent entries of ``size`` bytes (a power of two) at once, the first at ``iova``: entry n is
        dirty when bit n % 8 of byte n // 8 is set. None of them sticks out of the range that was asked for. ``bits``
        is the sink's only during the call."""
        ...


@runtime_checkable
class DirtyOps(Protocol):
    """Present (as ``PagingDomain.dirty_ops``) on a domain that was allocated with dirty tracking."""

    def set_dirty_tracking(self, enable: bool) -> None:
        """Idempotent."""
        ...

    def read_and_clear_dirty(self, iova: int, length: int, *, clear: bool, sink: DirtySink | None) -> None:
        """Reports every dirty entry of ``[iova, iova + length)``, a range inside one mapped area, to ``sink`` (None:
        nobody wants to know) and makes it clean if ``clear``. Entries are whole: one that sticks out of the range is
        reported with its full span."""
        ...


class PagingDomain(Domain, Protocol):
    """A kernel-managed page table. All IOVA and lengths in bytes."""

    pgsize_bitmap: int  # the lowest bit is the IOVA alignment the domain asks of its IOAS
    aperture_start: int
    aperture_end: int  # inclusive
    dirty_ops: DirtyOps | None

    def map(self, iova: int, extents: Extents, offset: int, length: int, prot: int, page_by_page: bool) -> None:
        """Maps ``length`` bytes at ``iova`` to the memory ``extents``, starting ``offset`` bytes into their first page.

        ``prot`` is a :class:`Prot`; ``page_by_page`` makes every entry one page (large pages are disabled). All or
        nothing; KernelError EINVAL, ERANGE, ENXIO, EADDRINUSE, ENOMEM (mock-device 2.6)."""
        ...

    def unmap(self, iova: int, length: int) -> None:
        """Removes whatever is mapped in the range; cannot fail."""
        ...

    def iova_to_phys(self, iova: int) -> int:
        """The physical address, exact to the byte; 0 when nothing is mapped there."""
        ...
