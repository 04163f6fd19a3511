"""Device: a device bound to a context, and what it is attached to (kernel: struct iommufd_device).

Invariants: a device is bound and unbound by whoever opened it (VFIO, the test command), never by number; IOMMU_DESTROY
of one is always EBUSY. ``_hwpts`` has what this client attached, by PASID (0: the device itself), so that page tables
can be left before they are destroyed. ``attach`` and ``replace`` mean here what they mean in the kernel, also where
VFIO has one call for both: attaching what is attached is EBUSY, replacing what is not is EINVAL.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, ClassVar

from iommufd.client.errors import IommufdError
from iommufd.client.hwpt import HWPT, NestedHWPT
from iommufd.client.ioas import IOAS
from iommufd.client.numbers import U32, number
from iommufd.client.objects import Object, PageTable

if TYPE_CHECKING:
    from collections.abc import Callable

    from iommufd.client.context import Context
    from iommufd.client.hw_info import HwInfo


class Device(Object):
    """A bound device. Made by :meth:`Context.open_device`, or (mock hardware) by ``iommufd.testing.mock.MockDevice``.

    A plain one, made by :meth:`Context.adopt`, names a device that someone else bound: its IOMMU can be asked and page
    tables made for it, but only who bound it can attach it (EOPNOTSUPP).
    """

    kind: ClassVar[str] = "DEVICE"

    def __init__(self, context: Context, number: int) -> None:
        self._hwpts: dict[int, tuple[PageTable, HWPT | NestedHWPT]] = {}
        super().__init__(context, number)

    # ------------------------------------------------------------------------------------------------------ attaching

    def attach(self, target: PageTable, pasid: int | None = None) -> HWPT | NestedHWPT:
        """Attaches the device, or one PASID of it, to an IOAS or HWPT; returns the HWPT it now uses.

        For an IOAS the kernel finds a fitting HWPT or makes one, which goes by itself when the last device leaves it.
        EBUSY when attached already (:meth:`replace` moves), EINVAL when the hardware does not fit, EADDRINUSE when
        something is mapped where the device cannot reach or in IOVAs it reserves. All mapped memory is pinned now:
        EFAULT, ENOMEM."""
        self._check()
        at = self._pasid(pasid)
        if at in self._hwpts:
            raise IommufdError(errno.EBUSY, f"{self!r} is attached already: use replace()")
        return self._attached(target, at, self._attach_pt)

    def replace(self, target: PageTable, pasid: int | None = None) -> HWPT | NestedHWPT:
        """Moves the device, or one PASID of it, to another IOAS or HWPT with no moment in between; returns the HWPT.

        On an error everything is as before. EINVAL when it was not attached."""
        self._check()
        at = self._pasid(pasid)
        if at not in self._hwpts:
            raise IommufdError(errno.EINVAL, f"{self!r} is not attached: use attach()")
        return self._attached(target, at, self._replace_pt)

    def detach(self, pasid: int | None = None) -> None:
        """Detaches the device, or one PASID of it: it can do no DMA until it is attached again. Never fails."""
        at = self._pasid(pasid)
        self._check()
        self._detach_pt(at)
        self._left(at)

    @property
    def hwpt(self) -> HWPT | NestedHWPT | None:
        """What the device (not a PASID of it) is attached to, or None."""
        return self.hwpts.get(0)

    @property
    def hwpts(self) -> dict[int, HWPT | NestedHWPT]:
        """What it is attached to, by PASID; 0 is the device itself."""
        return {pasid: hwpt for pasid, (_, hwpt) in self._hwpts.items()}

    def _pasid(self, pasid: int | None) -> int:
        if pasid is None:
            return 0
        if number(pasid, "pasid", U32) == 0:
            raise ValueError("PASID 0 is the device itself: leave pasid out")
        return pasid

    def _attached(self, target: PageTable, pasid: int, call: Callable[[int, int], int]) -> HWPT | NestedHWPT:
        if not isinstance(target, PageTable):
            raise TypeError(f"a device is attached to an IOAS or a HWPT, not {type(target).__name__}")
        if target.context is not self.context:
            raise ValueError(f"{target!r} is not of the same context as {self!r}")
        self._check()
        hwpt = self._hwpt_of(target, call(target.id, pasid))
        self._note(target, pasid, hwpt)
        return hwpt

    def _note(self, target: PageTable, pasid: int, hwpt: HWPT | NestedHWPT) -> None:
        """It is attached to ``hwpt`` now, because ``target`` was asked for; what it used before it has left."""
        before = self._hwpts.get(pasid)
        self._hwpts[pasid] = target, hwpt
        if before is not None:
            before[0]._attached.pop((self, pasid), None)
            self._retire(before[1])
        target._attached[self, pasid] = True

    def _hwpt_of(self, target: PageTable, number: int) -> HWPT | NestedHWPT:
        """The object for HWPT ``number`` that attaching to ``target`` gave."""
        if isinstance(target, HWPT | NestedHWPT):
            return target
        for obj in self.context._objects:
            if isinstance(obj, HWPT) and obj._id == number:
                return obj
        assert isinstance(target, IOAS)
        return HWPT(self.context, number, target, automatic=True)

    def _left(self, pasid: int) -> None:
        """The device no longer uses what it was attached to at ``pasid``."""
        before = self._hwpts.pop(pasid, None)
        if before is not None:
            before[0]._attached.pop((self, pasid), None)
            self._retire(before[1])

    def _retire(self, hwpt: HWPT | NestedHWPT) -> None:
        """The kernel destroys its own HWPT when the last device leaves it."""
        if isinstance(hwpt, HWPT) and hwpt.automatic:
            users = [held for device in self.context.devices for _, held in device._hwpts.values() if held is hwpt]
            if not users:
                self.context._objects.pop(hwpt, None)
                hwpt._forget()

    def _detach_from(self, target: PageTable, pasid: int) -> None:
        """``target`` is about to go."""
        if not self.closed and self._hwpts.get(pasid, (None,))[0] is target:
            self._detach_pt(pasid)
            self._left(pasid)

    # what a kind of device does in its own way; ``pasid`` 0 is the device itself

    def _attach_pt(self, pt_id: int, pasid: int) -> int:
        """Attaches; the number of the HWPT."""
        raise self._unable()

    def _replace_pt(self, pt_id: int, pasid: int) -> int:
        raise self._unable()

    def _detach_pt(self, pasid: int) -> None:
        raise self._unable()

    def _unable(self) -> IommufdError:
        return IommufdError(errno.EOPNOTSUPP, f"{self!r} was bound by someone else, who alone can attach and detach it")

    # -------------------------------------------------------------------------------------------------------- hardware

    def hw_info(self, type: int | None = None) -> HwInfo:
        """What the IOMMU behind the device can do (IOMMU_GET_HW_INFO), the vendor's registers decoded.

        ``type`` asks for one kind of information where the hardware has several (Linux 6.17). EOPNOTSUPP without an
        IOMMU."""
        from iommufd.client.hw_info import get_hw_info

        self._check()
        return get_hw_info(self, None if type is None else number(type, "type", U32))

    # ------------------------------------------------------------------------------------------------------------ life

    def close(self) -> None:
        """Unbinds the device, what depends on it (its vDEVICE) first. A plain one is only forgotten."""
        if self.closed:
            return
        for child in sorted(self._children, key=lambda c: -c._serial):
            child.close()
        if self.context._objects.pop(self, None) is None:
            return
        try:
            self._unbind()
        except BaseException:
            self.context._objects[self] = True
            raise
        for pasid in list(self._hwpts):
            self._left(pasid)
        self._forget()

    def _unbind(self) -> None:
        """Detaches and unbinds."""

    def _release(self) -> None:
        self.close()

    def _forget(self) -> None:
        for pasid in list(self._hwpts):
            self._left(pasid)
        super()._forget()

    def _describe(self) -> str:
        if not self._hwpts:
            return "not attached"
        return "attached to " + ", ".join(
            f"{hwpt.kind} {hwpt.number}" + (f" (PASID {pasid})" if pasid else "")
            for pasid, hwpt in sorted(self.hwpts.items())
        )
