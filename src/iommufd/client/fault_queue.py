"""FaultQueue: page faults of devices, and the answers (kernel: struct iommufd_fault).

Invariants: a device waits until each of its groups is answered; a group is the requests that share one answer, and is
read whole. A group's cookie is void once it was answered, or the device detached: answering then is EINVAL.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from iommufd.client.numbers import U32, items, number
from iommufd.client.queues import Queue
from iommufd.uapi import iommufd as u
from iommufd.uapi.iommufd import iommu_hwpt_pgfault_perm, iommufd_page_response_code

if TYPE_CHECKING:
    from iommufd.client.context import Context
    from iommufd.client.device import Device

MESSAGE = u.iommu_hwpt_pgfault.SIZE
SUCCESS, INVALID = iommufd_page_response_code.SUCCESS, iommufd_page_response_code.INVALID


@dataclass(frozen=True, slots=True)
class PageRequest:
    """One request: a device wants ``perm`` at ``address``. ``pasid`` is None for the device itself."""

    device_id: int
    pasid: int | None
    group: int
    perm: iommu_hwpt_pgfault_perm
    address: int
    last: bool
    cookie: int


@dataclass(frozen=True, slots=True)
class FaultGroup:
    """The requests that one answer settles. Most groups are a single request: its fields can be had directly."""

    queue: FaultQueue
    requests: tuple[PageRequest, ...]

    SUCCESS: ClassVar[int] = SUCCESS
    INVALID: ClassVar[int] = INVALID

    @property
    def cookie(self) -> int:
        """What names the group in an answer."""
        return self.requests[0].cookie

    @property
    def device_id(self) -> int:
        """The number of the device object."""
        return self.requests[0].device_id

    @property
    def device(self) -> Device | None:
        """The device, if it is known to this context's client."""
        for device in self.queue.context.devices:
            if device._id == self.device_id:
                return device
        return None

    @property
    def pasid(self) -> int | None:
        """The PASID the requests came with."""
        return self.requests[0].pasid

    @property
    def address(self) -> int:
        """The first request's address."""
        return self.requests[0].address

    @property
    def perm(self) -> iommu_hwpt_pgfault_perm:
        """What the first request wants to do."""
        return self.requests[0].perm

    def respond(self, code: int = SUCCESS) -> None:
        """Answers the group: the page is there now (SUCCESS), or will not be (INVALID)."""
        self.queue.respond(self, code)

    def __iter__(self) -> Iterator[PageRequest]:
        return iter(self.requests)

    def __len__(self) -> int:
        return len(self.requests)


class FaultQueue(Queue[FaultGroup]):
    """Page faults of the HWPTs that were made with this queue: ``for group in queue: ...; group.respond()``.

    Also ``async for``. Made by :meth:`Context.alloc_fault_queue`."""

    kind: ClassVar[str] = "FAULT"

    _room = 4080

    def __init__(self, context: Context, number: int, fd: int) -> None:
        super().__init__(context, number, fd)

    def _whole(self, room: int) -> int:
        return room // MESSAGE * MESSAGE

    def _parse(self, data: bytes) -> list[FaultGroup]:
        groups: list[FaultGroup] = []
        requests: list[PageRequest] = []
        for at in range(0, len(data), MESSAGE):
            fault = u.iommu_hwpt_pgfault.unpack(data[at : at + MESSAGE])
            request = PageRequest(
                fault.dev_id,
                fault.pasid if fault.flags & u.IOMMU_PGFAULT_FLAGS_PASID_VALID else None,
                fault.grpid,
                iommu_hwpt_pgfault_perm(fault.perm),
                fault.addr,
                bool(fault.flags & u.IOMMU_PGFAULT_FLAGS_LAST_PAGE),
                fault.cookie,
            )
            if requests and requests[-1].cookie != request.cookie:
                groups.append(FaultGroup(self, tuple(requests)))
                requests.clear()
            requests.append(request)
        if requests:
            groups.append(FaultGroup(self, tuple(requests)))
        return groups

    def respond(self, groups: FaultGroup | int | Iterable[FaultGroup | int], code: int = SUCCESS) -> None:
        """Answers one group (or its cookie), or several, all with ``code``.

        EINVAL for a cookie that is not waiting for an answer; those before it are answered then."""
        if isinstance(groups, FaultGroup | int):
            groups = [groups]
        cookies = [group.cookie if isinstance(group, FaultGroup) else group for group in items(groups, "groups")]
        code = number(code, "code", U32)
        data = b"".join(struct.pack("<II", number(cookie, "a cookie", U32), code) for cookie in cookies)
        while data:  # an error after at least one answer is told as a short count: ask again to learn it
            data = data[self._handle.write(data) :]

    def _describe(self) -> str:
        return f"fd {self._handle._fd}"
