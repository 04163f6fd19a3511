"""VEventQueue: events of a virtual IOMMU, for the guest to see (kernel: struct iommufd_veventq).

Invariants: every event consumes one sequence number, those the full queue dropped too; ``lost`` of an event is how many
were dropped before it. When the newest was dropped and nothing came after it, a :class:`LostEvents` says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from iommufd.client.numbers import U32, number
from iommufd.client.queues import Queue
from iommufd.uapi import iommufd as u

if TYPE_CHECKING:
    from iommufd.client.context import Context
    from iommufd.client.viommu import VIOMMU

HEADER = u.iommufd_vevent_header.SIZE
SEQUENCES = 1 << 31
SIZES = {
    u.IOMMU_VEVENTQ_TYPE_ARM_SMMUV3: u.iommu_vevent_arm_smmuv3.SIZE,
    u.IOMMU_VEVENTQ_TYPE_TEGRA241_CMDQV: u.iommu_vevent_tegra241_cmdqv.SIZE,
}


def size_of_event(type: int, given: int | None) -> int:
    """Bytes of one event of ``type``; ValueError when neither the caller nor we know."""
    size = SIZES.get(number(type, "type", U32)) if given is None else number(given, "event_size", 1 << 20)
    if not size:
        raise ValueError(f"events of type {type:#x} are of no known size: give event_size")
    return size


@dataclass(frozen=True, slots=True)
class VEvent:
    """One event: the vendor's record ``data``; ``lost`` events before it were dropped because the queue was full."""

    sequence: int
    lost: int
    data: bytes

    def smmuv3(self) -> SMMUv3Event:
        """The record of an SMMUv3, taken apart."""
        return SMMUv3Event(u.iommu_vevent_arm_smmuv3.unpack(self.data).evt)


@dataclass(frozen=True, slots=True)
class LostEvents:
    """The newest ``lost`` events were dropped; ``sequence`` is the last one's."""

    sequence: int
    lost: int


@dataclass(frozen=True, slots=True)
class SMMUv3Event:
    """An SMMUv3 event record (SMMUv3 manual, 7.3); ``sid`` is the guest's stream id."""

    words: tuple[int, ...]

    NAMES: ClassVar[dict[int, str]] = {
        0x04: "C_BAD_STE",
        0x06: "F_STREAM_DISABLED",
        0x08: "C_BAD_SUBSTREAMID",
        0x0A: "C_BAD_CD",
        0x10: "F_TRANSLATION",
        0x11: "F_ADDR_SIZE",
        0x12: "F_ACCESS",
        0x13: "F_PERMISSION",
    }

    @property
    def id(self) -> int:
        """The event number (SMMUv3 manual, 7.3)."""
        return self.words[0] & 0xFF

    @property
    def name(self) -> str:
        """The event as the manual calls it: ``"F_TRANSLATION"``."""
        return self.NAMES.get(self.id, f"event {self.id:#x}")

    @property
    def sid(self) -> int:
        """The guest's stream id."""
        return self.words[0] >> 32

    @property
    def ssid(self) -> int | None:
        """The substream id (PASID), None when the access had none."""
        return self.words[0] >> 12 & 0xFFFFF if self.words[0] >> 11 & 1 else None

    @property
    def read(self) -> bool:
        """Whether the access was a read (RnW)."""
        return bool(self.words[1] >> 35 & 1)

    @property
    def address(self) -> int:
        """The address the device used (InputAddr)."""
        return self.words[2]


class VEventQueue(Queue["VEvent | LostEvents"]):
    """Events of one type of a vIOMMU: ``for event in queue``, also ``async for``.

    Made by :meth:`VIOMMU.alloc_veventq`."""

    kind: ClassVar[str] = "VEVENTQ"

    def __init__(
        self,
        context: Context,
        number: int,
        fd: int,
        viommu: VIOMMU | None = None,
        type: int = 0,
        event_size: int = 0,
    ) -> None:
        self.type = type
        self.event_size = event_size
        self._expected = 0
        super().__init__(context, number, fd, viommu)

    def _parse(self, data: bytes) -> list[VEvent | LostEvents]:
        events: list[VEvent | LostEvents] = []
        at = 0
        while at < len(data):
            header = u.iommufd_vevent_header.unpack(data[at : at + HEADER])
            at += HEADER
            lost = (header.sequence - self._expected) % SEQUENCES
            self._expected = (header.sequence + 1) % SEQUENCES
            if header.flags & u.IOMMU_VEVENTQ_FLAG_LOST_EVENTS:
                events.append(LostEvents(header.sequence, lost + 1))
            else:
                events.append(VEvent(header.sequence, lost, data[at : at + self.event_size]))
                at += self.event_size
        return events

    def _describe(self) -> str:
        return f"type {self.type:#x}, fd {self._handle._fd}"
