"""SELFTEST: a mock device made by the test command, and the ops on it (kernel: struct selftest_obj), mock-device
4.1-4.4.

Invariant: the object owns its device and the device's binding; destroying it detaches the RID, unbinds and removes the
device. A PASID still attached then is a mistake of the program that leaks the DEVICE, as in the kernel.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from iommufd.engine.device import bind, unbind
from iommufd.engine.dispatch import Call
from iommufd.engine.hwpt import Hwpt
from iommufd.engine.object import Object
from iommufd.errors import KernelError
from iommufd.uapi import iommufd_test as t

if TYPE_CHECKING:
    from iommufd.engine.context import Context
    from iommufd.engine.device import Device
    from iommufd.selftest.device import MockDevice
    from iommufd.selftest.driver import MockDriver

DEVICE_FLAGS = t.MOCK_FLAGS_DEVICE_NO_DIRTY | t.MOCK_FLAGS_DEVICE_PASID


class Selftest(Object):
    """The object; ``device`` and ``idev`` are set while it has them."""

    __slots__ = ("_device", "_driver", "_idev")
    kind = "SELFTEST"

    def __init__(self, context: Context, driver: MockDriver) -> None:
        super().__init__(context)
        self._driver = driver
        self._device: MockDevice | None = None
        self._idev: Device | None = None

    @property
    def idev(self) -> Device:
        assert self._idev is not None
        return self._idev

    def plug(self, dev_flags: int) -> None:
        """Makes the device and binds it (4.1 step 3); reserves the DEVICE's id."""
        self._device = self._driver.new_device(dev_flags)
        # Unlike other devices it does not keep the context's file, so that close tears everything down.
        self._idev = bind(self.context, self._device, keep_context=False)

    def destroy(self) -> None:
        if self._idev is not None:
            self._idev.detach()
            unbind(self._idev)
        if self._device is not None:
            self._driver.remove_device(self._device)


def mock_domain(call: Call, driver: MockDriver, target: int, dev_flags: int) -> tuple[int, int, int]:
    """Ops MOCK_DOMAIN and MOCK_DOMAIN_FLAGS (4.1), attached to ``target``: the ids of the SELFTEST, HWPT and DEVICE."""
    stdev = call.reserve(Selftest(call.context, driver))  # row 1
    if dev_flags & ~DEVICE_FLAGS:  # row 2
        raise KernelError(errno.EINVAL, f"unknown device flags {dev_flags:#x}")
    stdev.plug(dev_flags)  # row 3
    hwpt = stdev.idev.attach(target, task=call.task)  # row 4
    return stdev.id, hwpt, stdev.idev.id


def mock_domain_replace(call: Call, cmd: t.test_mock_domain_replace) -> None:
    """Op MOCK_DOMAIN_REPLACE (4.2); the replacement stays when only the response fails."""
    stdev = call.get(cmd.id, Selftest)
    cmd.pt_id = stdev.idev.replace(cmd.pt_id, task=call.task)


def pasid_attach(call: Call, cmd: t.test_pasid_attach) -> None:
    """Op PASID_ATTACH (4.3); undone when the response fails."""
    idev, pasid = call.get(cmd.id, Selftest).idev, cmd.pasid
    cmd.pt_id = idev.attach(cmd.pt_id, pasid, task=call.task)
    call.on_error(_detacher(idev, pasid))


def _detacher(idev: Device, pasid: int) -> Callable[[], None]:
    return lambda: idev.detach(pasid)


def pasid_replace(call: Call, cmd: t.test_pasid_replace) -> None:
    """Op PASID_REPLACE (4.3)."""
    stdev = call.get(cmd.id, Selftest)
    cmd.pt_id = stdev.idev.replace(cmd.pt_id, cmd.pasid, task=call.task)


def pasid_detach(call: Call, cmd: t.test_pasid_detach) -> None:
    """Op PASID_DETACH (4.3)."""
    call.get(cmd.id, Selftest).idev.detach(cmd.pasid)


def pasid_check_hwpt(call: Call, cmd: t.test_pasid_check_hwpt) -> None:
    """Op PASID_CHECK_HWPT (4.4): EINVAL unless ``hwpt_id`` (0: nothing) is what is attached at ``pasid``."""
    idev = call.get(cmd.id, Selftest).idev  # row 1
    attached = idev.attached(cmd.pasid)
    if cmd.hwpt_id == 0:  # row 2
        if attached is not None:
            raise KernelError(errno.EINVAL, f"PASID {cmd.pasid} is attached to HWPT {attached.id}")
        return
    hwpt = call.get_any(cmd.hwpt_id)  # row 3
    if not isinstance(hwpt, Hwpt):  # row 4
        raise KernelError(errno.EINVAL, f"id {cmd.hwpt_id} is of type {hwpt.kind}, not an HWPT")
    if attached is not hwpt:  # row 5
        found = "nothing" if attached is None else f"HWPT {attached.id}"
        raise KernelError(errno.EINVAL, f"PASID {cmd.pasid} is attached to {found}, not to HWPT {hwpt.id}")
