"""What is alive in a context, as sentences for people (``--check``, a leak check at the end of a test)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

from iommufd.engine.ioas import IOAS

if TYPE_CHECKING:
    from iommufd.engine.area import Area
    from iommufd.engine.context import Context

MOST_AREAS = 8  # of one IOAS that are named one by one


def count(number: int, noun: str) -> str:
    """``1 object``, ``3 objects``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def amount(size: int) -> str:
    """``4 KiB``, ``1 MiB``; bytes where nothing larger divides it."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size and size % unit == 0:
            return f"{size // unit} {name}"
    return count(size, "byte")


def sentences(context: Context) -> list[str]:
    """One sentence per published object of the context, ascending by id, and after an IOAS one per area it maps."""
    found: list[str] = []
    for obj in context.objects:
        found.append(f"{obj.kind} {obj.id} was never destroyed")
        if isinstance(obj, IOAS):
            found.extend(_areas(obj))
    return found


def _areas(ioas: IOAS) -> Iterator[str]:
    table = ioas.io_pagetable
    for area in islice(table.areas.values(), MOST_AREAS):
        yield f"IOAS {ioas.id} still maps [{area.first:#x}, {area.last:#x}], {_pins(area, bool(table.domains))}"
    more = len(table.areas) - MOST_AREAS
    if more > 0:
        yield f"IOAS {ioas.id} still maps {count(more, 'further area')}"


def _pins(area: Area, in_domains: bool) -> str:
    """How much it is, and who holds its pages."""
    size = amount(area.last - area.first + 1)
    pages = area.pages
    if pages is None:
        return f"{size}, in progress"
    dmabuf = pages.source.dmabuf if pages.source is not None else None
    held = ["pinned for DMA"] if in_domains and dmabuf is None else []
    if area.accesses:
        held.append(f"pinned by an access ({count(area.accesses, 'time')})")
    if pages.source is None:
        size += f" of process {pages.owner.process.tgid} at {pages.base + area.start:#x}"
    return ", ".join([size, *held])
