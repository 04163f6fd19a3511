"""Instrument: the one hook through which anybody watches the engine. Costs one truth test when nobody listens."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from iommufd.engine.dispatch import Call
    from iommufd.errors import KernelError


class Instrument:
    """Subclass and override what you want to see; every method may be called from any thread, with no lock held."""

    def ioctl_enter(self, call: Call) -> None:
        """The struct has been copied in and checked centrally; the handler runs next."""

    def ioctl_exit(self, call: Call, result: int, error: KernelError | None) -> None:
        """The call is answered: ``result`` (0 or more) or ``error``. ``call.cmd`` may be None when dispatch failed."""

    def event(self, name: str, **fields: object) -> None:
        """Anything else: ``map``, ``unmap``, ``pin``, ``unpin``, ``translate``, ``fault`` with their numbers."""
