"""What is alive in a context, as sentences for people (``--check``, a leak check at the end of a test)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from iommufd.engine.context import Context


def count(number: int, noun: str) -> str:
    """``1 object``, ``3 objects``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def sentences(context: Context) -> list[str]:
    """One sentence per published object of the context, with what hangs on it, ascending by id."""
    return [f"{obj.kind} {obj.id} was never destroyed" for obj in context.objects]
