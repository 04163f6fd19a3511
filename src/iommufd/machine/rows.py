"""Every command of the native table, gathered from the modules of the engine that implement them."""

from __future__ import annotations

from iommufd.engine.dispatch import Handler, Respond
from iommufd.uapi.commands import Command

RowOf = tuple[Command, Handler, Respond]

ENGINE_ROWS: list[RowOf] = []
