"""Author: writes one program while it is played on the software machine.

It knows what exists (objects, IOVAs, descriptors), so that the next call can name it; most choices are nearly right,
one number in ten is not. What is called when is the affair of :mod:`tools.fuzz.calls` and :mod:`tools.fuzz.themes`.
"""

from __future__ import annotations

import random
import struct
from dataclasses import replace

from iommufd.engine.context import Context
from iommufd.engine.file import File
from iommufd.engine.ioas import IOAS
from iommufd.testing.subject import filled, number_of
from iommufd.uapi import iommufd_test as t
from iommufd.uapi.declare import Struct
from tools.fuzz.program import ARENA, CLOSE, IOCTL, PAGE, POKE, Program, Step
from tools.fuzz.stage import Stage

ULMAX = 2**64 - 1
MEMFDS, ACCESSES, QUEUES, DMABUFS = range(8, 12), range(16, 24), range(32, 40), range(48, 52)
BUFFER = ARENA + 240 * PAGE  # pages the program uses for arrays and bitmaps
USABLE = 200  # pages that may be mapped, unmapped, protected


class Author:
    """Writes one program. ``r`` decides everything, so a seed is a program.

    ``slot`` is the context that the next call is for, ``by_second`` whether the second process makes it."""

    def __init__(self, seed: int, steps: int) -> None:
        self.r = random.Random(seed)
        self.program = Program(seed)
        self.stage = Stage()
        self.length = steps
        self.answers: list[str] = []
        self.dirty = False  # dirty state depends on contiguity: such programs map single pages only
        self.attached: dict[tuple[int, int], set[int]] = {}  # (context slot, test device) -> PASIDs
        self.memlock: int | None = None  # pages the first process may lock, once it is an ordinary user's
        self.slot = 0
        self.by_second = False

    # ------------------------------------------------------------------------------------------------- small choices

    def chance(self, p: float) -> bool:
        return self.r.random() < p

    @property
    def slots(self) -> dict[int, int]:
        """The descriptors of whoever makes the next call."""
        second = self.stage.second
        return second.slots if self.by_second and second is not None else self.stage.slots

    def context(self) -> Context | None:
        fd = self.slots.get(self.slot, -1)
        second = self.stage.second
        find = second.find if self.by_second and second is not None else self.stage.backend.descriptors.find
        file: File | None = find(fd) if fd >= 0 else None
        return file if isinstance(file, Context) else None

    def id_of(self, *kinds: str) -> int:
        """An object id, mostly of one of ``kinds``."""
        live = [] if (context := self.context()) is None else list(context.objects)
        right = [o.id for o in live if o.kind in kinds]
        if right and not self.chance(0.08):
            return self.r.choice(right)
        if live and self.chance(0.6):
            number: int = self.r.choice(live).id
            return number
        return self.r.choice((0, 1, 2, 3, 5, 9, 2**31 - 1, 2**31, 2**32 - 1))

    def ioas(self) -> IOAS | None:
        live = [] if (context := self.context()) is None else [o for o in context.objects if isinstance(o, IOAS)]
        return self.r.choice(live) if live else None

    def wrong(self, value: int, *others: int) -> int:
        """``value``, seldom one of ``others``."""
        return self.r.choice(others) if self.chance(0.04) else value

    def flags(self, known: int, unknown: int) -> int:
        value = self.r.randrange(known + 1) & known
        return value | unknown if self.chance(0.03) else value

    def page(self) -> int:
        return self.r.randrange(USABLE)

    def va(self) -> int:
        if self.chance(0.03):
            return self.r.choice((0, 1, ARENA - PAGE, 2**47 - PAGE, 2**47, 2**63, ULMAX - PAGE, ULMAX))
        offset = self.r.choice((0, 0, 0, 0, 0, 0, 2048, 1, 100, 4095)) if self.chance(0.3) else 0
        return ARENA + self.page() * PAGE + offset

    def size(self) -> int:
        """The length of something to map."""
        if self.chance(0.05):
            return self.r.choice((0, 1, 2047, ULMAX, ULMAX - PAGE, ULMAX - PAGE + 1, 2**63 - 1, 2**40))
        if self.dirty:
            return self.r.choice((PAGE, PAGE, PAGE, 2048))
        return self.r.choice((PAGE, PAGE, PAGE, 2048, 2 * PAGE, 3 * PAGE, 5 * PAGE, 100))

    def iova(self) -> int:
        if self.chance(0.05):
            return self.r.choice((0, 1, PAGE, ULMAX, ULMAX - PAGE, ULMAX - PAGE + 1, 0x7FFFF000, 0x80000000, 2**63))
        base = t.MOCK_APERTURE_START if self.chance(0.85) else 0x10000
        return base + self.r.randrange(24) * PAGE + (self.r.choice((0, 2048, 1)) if self.chance(0.1) else 0)

    def mapped(self) -> tuple[int, int, int]:
        """(ioas id, iova, length) of a live area or of a stretch of several; made up when there is none."""
        ioas = self.ioas()
        areas = [] if ioas is None else [(first, last) for first, last, _ in ioas.io_pagetable.areas]
        if ioas is None or not areas or self.chance(0.06):
            return self.id_of("IOAS"), self.iova(), self.size()
        index = self.r.randrange(len(areas))
        first, last = areas[index]
        if self.chance(0.3):
            last = areas[min(index + self.r.randrange(3), len(areas) - 1)][1]
        if self.chance(0.2):
            first += self.r.choice((1, 2048, PAGE))
        if self.chance(0.2):
            last += self.r.choice((-1, -2048, -PAGE, PAGE, 1))
        return ioas.id, first & ULMAX, max(last - first + 1, 0)

    def behind(self, number: int, iova: int) -> int:
        """The address of the memory mapped at ``iova`` of the IOAS ``number``; any other when there is none."""
        for ioas in [] if (context := self.context()) is None else list(context.objects):
            if isinstance(ioas, IOAS) and ioas.id == number and not self.chance(0.1):
                found = ioas.io_pagetable.areas.find(iova)
                pages = None if found is None else found[2].pages
                if found is not None and pages is not None and pages.source is None:
                    return pages.base + found[2].start + iova - found[0]
        return self.va()

    def hwpt_of(self, number: int) -> int:
        """A page table of the IOAS ``number``, mostly."""
        for ioas in [] if (context := self.context()) is None else list(context.objects):
            if isinstance(ioas, IOAS) and ioas.id == number and ioas.hwpts and not self.chance(0.1):
                hwpt: int = self.r.choice(ioas.hwpts).id
                return hwpt
        return self.id_of("HWPT_PAGING")

    def array(self, data: bytes) -> int:
        """Memory that holds ``data``; seldom memory that cannot be read."""
        if self.chance(0.04):
            return self.r.choice((0, 1, 2**47, ULMAX - 7))
        at = BUFFER + self.r.randrange(4) * PAGE + self.r.choice((0, 0, 8, 3))
        self.write(Step(POKE, numbers=(at,), data=data))
        return at

    def free_slot(self, slots: range) -> int:
        return next((slot for slot in slots if slot not in self.slots), slots[0])

    def used_slot(self, *ranges: range) -> int:
        """A slot of ``ranges`` that has a descriptor; seldom one without, or a context's."""
        slots = [slot for slots in ranges for slot in slots]
        used = [slot for slot in slots if slot in self.slots]
        if used and not self.chance(0.04):
            return self.r.choice(used)
        return self.r.choice((*slots, 0))

    # --------------------------------------------------------------------------------------------------------- steps

    def write(self, step: Step) -> str:
        """Adds a step and plays it."""
        if self.by_second:
            step = replace(step, second=True)
        self.program.steps.append(step)
        answer = self.stage.play(step)
        self.answers.append(answer)
        return answer

    def ask(
        self, value: Struct, *, patches: tuple[tuple[int, int], ...] = (), out: tuple[int, int] | None = None
    ) -> str:
        """An ioctl; its size is seldom wrong, its reserved bytes seldom set, its answer seldom impossible."""
        data = bytearray(filled(value).pack())
        if self.chance(0.02):
            data[:4] = struct.pack("<I", self.r.choice((0, 4, len(data) - 4, len(data) - 1, len(data) + 8, 2**32 - 1)))
            data += bytes(8)
            if self.chance(0.5):
                data[-1] = 1
        if out is not None and out[0] in self.stage.slots:
            self.write(Step(CLOSE, out[0]))
        read_only = self.chance(0.015)
        step = Step(IOCTL, self.slot, cmd=number_of(value), data=bytes(data), patches=patches, out=out)
        return self.write(replace(step, read_only=read_only))

    def exactly(self, value: Struct, patches: tuple[tuple[int, int], ...] = ()) -> str:
        """An ioctl as it is given, with nothing wrong."""
        step = Step(IOCTL, self.slot, cmd=number_of(value), data=filled(value).pack(), patches=patches)
        return self.write(step)

    def raw(self, cmd: int, data: bytes) -> None:
        """An ioctl whose struct is given as bytes."""
        self.write(Step(IOCTL, self.slot, cmd=cmd, data=data))
