"""Writes random programs that reach deep states.

A program is written while it is played on the software machine, so that the next call can name objects, IOVAs and
cookies that exist; most calls are nearly right, one number in ten is not. What the software answered is not part of
the program: the kernel's answers are compared with a fresh run.
"""

from __future__ import annotations

import random
import struct

from iommufd.engine.context import Context
from iommufd.engine.ioas import IOAS
from iommufd.testing.subject import filled, number_of
from iommufd.uapi import iommufd as u
from iommufd.uapi import iommufd_test as t
from iommufd.uapi.declare import Struct
from tools.fuzz.program import (
    ARENA,
    CLOSE,
    IOCTL,
    LIMIT,
    MEMFD,
    MMAP,
    MPROTECT,
    MUNMAP,
    OPEN,
    PAGE,
    PEEK,
    POKE,
    POLL,
    READ,
    WRITE,
    Program,
    Step,
)
from tools.fuzz.stage import Stage

ULMAX = 2**64 - 1
MEMFDS, ACCESSES, QUEUES = range(8, 12), range(16, 24), range(32, 40)
BUFFER = ARENA + 240 * PAGE  # pages the program uses for arrays and bitmaps
USABLE = 200  # pages that may be mapped, unmapped, protected


class Author:
    """Writes one program. ``r`` decides everything, so a seed is a program."""

    def __init__(self, seed: int, steps: int) -> None:
        self.r = random.Random(seed)
        self.program = Program(seed)
        self.stage = Stage()
        self.length = steps
        self.answers: list[str] = []
        self.theme = self.r.choice(("plain", "plain", *_PREAMBLES))
        self.dirty = self.theme == "dirty"  # dirty state depends on contiguity: such programs map single pages only
        self.attached: dict[tuple[int, int], set[int]] = {}  # (context slot, test device) -> PASIDs
        self.slot = 0

    # ------------------------------------------------------------------------------------------------- small choices

    def chance(self, p: float) -> bool:
        return self.r.random() < p

    def context(self) -> Context | None:
        fd = self.stage.slots.get(self.slot, -1)
        file = self.stage.backend.descriptors.find(fd) if fd >= 0 else None
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

    def length_(self) -> int:
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
            return self.id_of("IOAS"), self.iova(), self.length_()
        index = self.r.randrange(len(areas))
        first, last = areas[index]
        if self.chance(0.3):
            last = areas[min(index + self.r.randrange(3), len(areas) - 1)][1]
        if self.chance(0.2):
            first += self.r.choice((1, 2048, PAGE))
        if self.chance(0.2):
            last += self.r.choice((-1, -2048, -PAGE, PAGE, 1))
        return ioas.id, first & ULMAX, max(last - first + 1, 0)

    def array(self, data: bytes) -> int:
        """Memory that holds ``data``; seldom memory that cannot be read."""
        if self.chance(0.04):
            return self.r.choice((0, 1, 2**47, ULMAX - 7))
        at = BUFFER + self.r.randrange(4) * PAGE + self.r.choice((0, 0, 8, 3))
        self.write(Step(POKE, numbers=(at,), data=data))
        return at

    def free_slot(self, slots: range) -> int:
        return next((slot for slot in slots if slot not in self.stage.slots), slots[0])

    def used_slot(self, slots: range) -> int:
        used = [slot for slot in slots if slot in self.stage.slots]
        if used and not self.chance(0.04):
            slot: int = self.r.choice(used)
            return slot
        other: int = self.r.choice((*slots, 0))
        return other

    # --------------------------------------------------------------------------------------------------------- steps

    def write(self, step: Step) -> str:
        """Adds a step and plays it."""
        self.program.steps.append(step)
        answer = self.stage.play(step)
        self.answers.append(answer)
        return answer

    def ask(
        self, value: Struct, *, patches: tuple[tuple[int, int], ...] = (), out: tuple[int, int] | None = None
    ) -> str:
        """An ioctl; its size is seldom wrong, its reserved bytes seldom set."""
        data = bytearray(filled(value).pack())
        if self.chance(0.02):
            data[:4] = struct.pack("<I", self.r.choice((0, 4, len(data) - 4, len(data) - 1, len(data) + 8, 2**32 - 1)))
            data += bytes(8)
            if self.chance(0.5):
                data[-1] = 1
        if out is not None and out[0] in self.stage.slots:
            self.write(Step(CLOSE, out[0]))
        return self.write(Step(IOCTL, self.slot, cmd=number_of(value), data=bytes(data), patches=patches, out=out))

    def run(self) -> Program:
        try:
            if self.theme == "limited":
                self.write(Step(LIMIT, numbers=(self.r.choice((0, 1, 2, 4, 16)),)))
            self.write(Step(OPEN, 0))
            self.preamble()
            if self.chance(0.3):
                self.write(Step(OPEN, 1))
            weights = [_WEIGHTS[name] * (6 if name in _PREAMBLES.get(self.theme, ()) else 1) for name in _WEIGHTS]
            actions = [getattr(self, name) for name in _WEIGHTS]
            while len(self.program.steps) < self.length:
                self.slot = 1 if 1 in self.stage.slots and self.chance(0.2) else 0
                self.r.choices(actions, weights)[0]()
            self.detach_all()
        finally:
            self.stage.close()
        return self.program

    def detach_all(self) -> None:
        """A context that closes with a PASID attached leaves the kernel damaged (mock-device 4.1): none does."""
        for (slot, stdev), pasids in sorted(self.attached.items()):
            for pasid in sorted(pasids):
                self.write(Step(IOCTL, slot, cmd=t.IOMMU_TEST_CMD, data=detaching(stdev, pasid)))

    def preamble(self) -> None:
        """What the theme needs, so that its calls can succeed: IOAS 1, test device 2, DEVICE 3, automatic HWPT 4."""
        self.ask(u.iommu_ioas_alloc())
        self.ask(
            t.test_mock_domain_flags(
                id=1, dev_flags=4 if self.theme in ("pasid", "fault") else self.r.choice((0, 0, 4, 1))
            )
        )
        rw = u.IOMMU_IOAS_MAP_FIXED_IOVA | u.IOMMU_IOAS_MAP_READABLE | u.IOMMU_IOAS_MAP_WRITEABLE
        if self.theme in ("viommu", "hw_queue"):
            self.ask(u.iommu_ioas_map(flags=rw, ioas_id=1, user_va=ARENA, length=PAGE, iova=t.MOCK_APERTURE_START))
            self.ask(u.iommu_hwpt_alloc(flags=1, dev_id=3, pt_id=1))
            self.ask(u.iommu_viommu_alloc(type=t.IOMMU_VIOMMU_TYPE_SELFTEST, dev_id=3, hwpt_id=5))
            self.ask(u.iommu_vdevice_alloc(viommu_id=6, dev_id=3, virt_id=0x99))
            nested = self.array(struct.pack("<II", 3, 0))
            self.ask(
                u.iommu_hwpt_alloc(
                    dev_id=3, pt_id=6, data_type=t.IOMMU_HWPT_DATA_SELFTEST, data_len=8, data_uptr=nested
                )
            )
            self.ask(
                u.iommu_veventq_alloc(viommu_id=6, type=t.IOMMU_VEVENTQ_TYPE_SELFTEST, veventq_depth=2),
                out=(QUEUES[0], 24),
            )
            self.ask(t.test_mock_domain_replace(id=2, pt_id=8))
        elif self.theme == "nested":
            self.ask(u.iommu_hwpt_alloc(flags=1, dev_id=3, pt_id=1))
            self.ask(
                u.iommu_hwpt_alloc(
                    dev_id=3,
                    pt_id=5,
                    data_type=t.IOMMU_HWPT_DATA_SELFTEST,
                    data_len=4,
                    data_uptr=self.array(struct.pack("<II", 2, 0)),
                )
            )
        elif self.theme == "dirty":
            self.ask(u.iommu_hwpt_alloc(flags=2, dev_id=3, pt_id=1))
            for i in range(3):
                at = t.MOCK_APERTURE_START + i * PAGE
                self.ask(u.iommu_ioas_map(flags=rw, ioas_id=1, user_va=ARENA + i * PAGE, length=PAGE, iova=at))
            self.ask(u.iommu_hwpt_set_dirty_tracking(flags=1, hwpt_id=5))
        elif self.theme in ("pasid", "fault"):
            self.ask(u.iommu_fault_alloc(), out=(QUEUES[0], 12))
            for _ in range(2):
                self.ask(u.iommu_hwpt_alloc(flags=12, dev_id=3, pt_id=1, fault_id=5))
            self.ask(t.test_mock_domain_replace(id=2, pt_id=6))
        elif self.theme == "access":
            at = t.MOCK_APERTURE_START
            self.ask(u.iommu_ioas_map(flags=rw, ioas_id=1, user_va=ARENA, length=4 * PAGE, iova=at))
            self.ask(t.test_create_access(id=1, flags=1), out=(ACCESSES[0], 16))
        elif self.theme == "vfio":
            self.ask(u.iommu_vfio_ioas(op=1, ioas_id=1))
        elif self.theme == "crowd":
            self.crowd(rw)

    def crowd(self, rw: int) -> None:
        """More than a hundred touching areas, each with a pin of its own, unmapped at once (core 4.12 d)."""
        self.ask(t.test_create_access(id=1, flags=1), out=(ACCESSES[0], 16))
        at = t.MOCK_APERTURE_START
        count = self.r.choice((99, 101, 103))
        for i in range(count):
            va = ARENA + i * PAGE
            self.write(ioctl_of(u.iommu_ioas_map(flags=rw, ioas_id=1, user_va=va, length=PAGE, iova=at + i * PAGE)))
            pin = t.test_access_pages(iova=at + i * PAGE, length=PAGE)
            self.write(ioctl_of(pin, patches=((8, ACCESSES[0]),)))
        self.write(ioctl_of(u.iommu_ioas_unmap(ioas_id=1, iova=at, length=count * PAGE)))
        self.length += 2 * count

    def ioas_alloc(self) -> None:
        self.ask(u.iommu_ioas_alloc(flags=self.wrong(0, 1, 2**31)))

    def destroy(self) -> None:
        context = self.context()
        number = self.id_of(
            "IOAS", "HWPT_PAGING", "HWPT_NESTED", "SELFTEST", "VIOMMU", "VDEVICE", "VEVENTQ", "HW_QUEUE"
        )
        if context is not None:
            # destroying a test device whose PASIDs are attached makes the kernel leak (mock-device 4.1)
            for obj in context.objects:
                if obj.id == number and obj.kind == "SELFTEST" and self.pasids_of(number):
                    return
        self.ask(u.iommu_destroy(id=number))

    def pasids_of(self, stdev: int) -> bool:
        return bool(self.attached.get((self.slot, stdev)))

    def map(self) -> None:
        flags = self.flags(7, 8) if self.chance(0.3) else self.r.choice((6, 7, 7, 7, 4, 5, 3))
        self.ask(
            u.iommu_ioas_map(
                flags=flags,
                ioas_id=self.id_of("IOAS"),
                reserved=self.wrong(0, 1),
                user_va=self.va(),
                length=self.length_(),
                iova=self.iova(),
            )
        )

    def map_file(self) -> None:
        slot = self.free_slot(MEMFDS)
        if slot not in self.stage.slots and self.chance(0.5):
            self.write(Step(MEMFD, slot, (self.r.choice((1, 2, 4, 8)),)))
        value = u.iommu_ioas_map_file(
            flags=self.r.choice((6, 7, 7, 7, 4, 5, 3, 0, 15)) if self.chance(0.3) else 7,
            ioas_id=self.id_of("IOAS"),
            start=self.r.choice((0, 0, PAGE, 2 * PAGE, 7 * PAGE, 2048, 2**63, ULMAX)) if self.chance(0.6) else 0,
            length=self.length_(),
            iova=self.iova(),
        )
        self.ask(value, patches=((12, self.used_slot(MEMFDS)),))

    def copy(self) -> None:
        src, first, length = self.mapped()
        self.ask(
            u.iommu_ioas_copy(
                flags=self.flags(7, 8) if self.chance(0.2) else self.r.choice((6, 7, 7, 5)),
                dst_ioas_id=self.id_of("IOAS"),
                src_ioas_id=src,
                length=self.wrong(length, 0, ULMAX),
                dst_iova=self.iova(),
                src_iova=first,
            )
        )

    def unmap(self) -> None:
        ioas, first, length = self.mapped()
        if self.chance(0.06):
            first, length = 0, ULMAX
        self.ask(u.iommu_ioas_unmap(ioas_id=ioas, iova=first, length=self.wrong(length, 0, ULMAX, ULMAX - 1)))

    def ranges(self) -> None:
        at = self.array(bytes(64))
        self.ask(
            u.iommu_ioas_iova_ranges(
                ioas_id=self.id_of("IOAS"),
                num_iovas=self.r.choice((0, 1, 2, 4)),
                reserved=self.wrong(0, 1),
                allowed_iovas=at,
            )
        )
        self.write(Step(PEEK, numbers=(BUFFER, 64)))

    def allow(self) -> None:
        ranges = []
        at = self.r.choice((0x10000, t.MOCK_APERTURE_START))
        for _ in range(self.r.randrange(4)):
            at += self.r.randrange(4) * PAGE
            size = self.r.choice((1, 2, PAGE, 4 * PAGE, 16 * PAGE))
            ranges.append((at, at + size - 1))
            at += size
        self.r.shuffle(ranges)
        where = self.array(b"".join(struct.pack("<QQ", *entry) for entry in ranges) or bytes(16))
        self.ask(u.iommu_ioas_allow_iovas(ioas_id=self.id_of("IOAS"), num_iovas=len(ranges), allowed_iovas=where))

    def option(self) -> None:
        option = self.wrong(u.IOMMU_OPTION_HUGE_PAGES if self.chance(0.7) else u.IOMMU_OPTION_RLIMIT_MODE, 2, 99)
        self.ask(
            u.iommu_option(
                option_id=option,
                op=self.wrong(self.r.randrange(2), 2, 9),
                reserved=self.wrong(0, 1),
                object_id=self.id_of("IOAS") if option == 1 else self.wrong(0, 1),
                val64=self.r.choice((0, 1, 0, 1, 2)),
            )
        )

    def vfio_ioas(self) -> None:
        self.ask(
            u.iommu_vfio_ioas(
                ioas_id=self.id_of("IOAS"), op=self.wrong(self.r.choice((0, 1, 1, 2)), 3), reserved=self.wrong(0, 1)
            )
        )

    def change_process(self) -> None:
        self.ask(u.iommu_ioas_change_process(reserved=self.wrong(0, 1)))

    def hwpt_alloc(self) -> None:
        data = struct.pack("<II", self.r.choice((0, 7)), self.wrong(self.r.choice((0, 0, 0, 1)), 2))
        length = self.r.choice((0, 0, 0, 4, 8, 8, 3, 9))
        self.ask(
            u.iommu_hwpt_alloc(
                flags=self.r.choice((0, 0, 1, 1, 2, 4, 8, 12, 9, 10, 5, 16)),
                dev_id=self.id_of("DEVICE"),
                pt_id=self.id_of("IOAS"),
                reserved=self.wrong(0, 1),
                data_type=self.wrong(t.IOMMU_HWPT_DATA_SELFTEST if length else 0, 0, 1, t.IOMMU_HWPT_DATA_SELFTEST),
                data_len=length,
                data_uptr=self.array(data + bytes(8)) if length else 0,
                fault_id=self.id_of("FAULT"),
            )
        )

    def hwpt_nested(self) -> None:
        self.ask(
            u.iommu_hwpt_alloc(
                flags=self.r.choice((0, 0, 4, 8, 12, 1, 2)),
                dev_id=self.id_of("DEVICE"),
                pt_id=self.id_of("HWPT_PAGING", "VIOMMU", "VIOMMU"),
                data_type=self.wrong(t.IOMMU_HWPT_DATA_SELFTEST, 0, 1),
                data_len=self.wrong(self.r.choice((4, 8)), 0, 3, 9),
                data_uptr=self.array(struct.pack("<II", self.r.randrange(4), 0)),
                fault_id=self.id_of("FAULT"),
            )
        )

    def hw_info(self) -> None:
        self.ask(
            u.iommu_hw_info(
                flags=self.wrong(self.r.randrange(2), 2),
                dev_id=self.id_of("DEVICE"),
                data_len=self.r.choice((0, 4, 8, 16)),
                data_uptr=self.array(b"\xff" * 24),
                out_data_type=self.r.choice((0, t.IOMMU_HW_INFO_TYPE_SELFTEST, 1)),
            )
        )
        self.write(Step(PEEK, numbers=(BUFFER, 32)))

    def dirty_calls(self) -> None:
        hwpt = self.id_of("HWPT_PAGING")
        what = self.r.randrange(3)
        if what == 0:
            self.ask(u.iommu_hwpt_set_dirty_tracking(flags=self.wrong(self.r.choice((1, 1, 0)), 2), hwpt_id=hwpt))
            return
        _, iova, length = self.mapped()
        size = self.r.choice((2048, 2048, PAGE, 2 * PAGE, 0, 3000))
        if what == 1 and self.dirty:
            bits = self.array(self.r.randbytes(4))
            self.ask(
                t.test_dirty(
                    id=hwpt,
                    iova=iova - iova % (size or 1),
                    length=size * self.r.choice((1, 4, 16)),
                    page_size=size,
                    uptr=bits,
                )
            )
            return
        at = self.array(bytes(32))
        self.ask(
            u.iommu_hwpt_get_dirty_bitmap(
                hwpt_id=hwpt,
                flags=self.wrong(self.r.randrange(2), 2),
                reserved=self.wrong(0, 1),
                iova=iova,
                length=self.wrong(length, 0, ULMAX),
                page_size=size,
                data=at,
            )
        )
        if self.dirty and at > PAGE and at < 2**47:
            self.write(Step(PEEK, numbers=(at, 8)))

    def invalidate(self) -> None:
        nested = self.chance(0.5)
        entries = self.r.randrange(4)
        if nested:
            data = b"".join(
                struct.pack("<II", self.wrong(self.r.randrange(2), 2), self.wrong(self.r.randrange(4), 4))
                for _ in range(entries)
            )
            width = 8
        else:
            data = b"".join(
                struct.pack("<III", self.wrong(self.r.randrange(2), 2), self.r.randrange(4), self.wrong(1, 4))
                for _ in range(entries)
            )
            width = 12
        self.ask(
            u.iommu_hwpt_invalidate(
                hwpt_id=self.id_of("HWPT_NESTED" if nested else "VIOMMU"),
                data_uptr=self.array(data + bytes(16)),
                data_type=self.wrong(
                    t.IOMMU_HWPT_INVALIDATE_DATA_SELFTEST, t.IOMMU_HWPT_INVALIDATE_DATA_SELFTEST_INVALID, 0
                ),
                entry_len=self.wrong(width, 0, 4, 16, 5000),
                entry_num=self.wrong(entries, 2**20),
                reserved=self.wrong(0, 1),
            )
        )

    def fault_alloc(self) -> None:
        slot = self.free_slot(QUEUES)
        self.ask(u.iommu_fault_alloc(flags=self.wrong(0, 1)), out=(slot, 12))

    def queue_io(self) -> None:
        slot = self.used_slot(QUEUES)
        what = self.r.randrange(4)
        if what == 0:
            self.write(Step(POLL, slot))
        elif what == 1:
            cookie = self.r.randrange(4)
            data = b"".join(struct.pack("<II", cookie + i, self.wrong(0, 1, 2)) for i in range(self.r.randrange(3)))
            self.write(Step(WRITE, slot, data=data + bytes(self.wrong(0, 1, 4))))
        else:
            self.write(Step(READ, slot, (self.wrong(self.r.choice((40, 80, 400, 12, 24, 64)), 0, 1, 8, 41),)))

    def viommu(self) -> None:
        length = self.r.choice((0, 24, 8, 16, 7, 25))
        at = self.array(struct.pack("<IIQQ", 5, 0, 0, 0) + bytes(8))
        self.ask(
            u.iommu_viommu_alloc(
                flags=self.wrong(0, 1),
                type=self.wrong(t.IOMMU_VIOMMU_TYPE_SELFTEST, 0, 1),
                dev_id=self.id_of("DEVICE"),
                hwpt_id=self.id_of("HWPT_PAGING"),
                data_len=length,
                data_uptr=at,
            )
        )
        self.write(Step(PEEK, numbers=(BUFFER, 32)))

    def vdevice(self) -> None:
        self.ask(
            u.iommu_vdevice_alloc(
                viommu_id=self.id_of("VIOMMU"),
                dev_id=self.id_of("DEVICE"),
                virt_id=self.r.choice((0, 1, 2, 0x99, ULMAX, 2**32 + 1)),
            )
        )

    def veventq(self) -> None:
        slot = self.free_slot(QUEUES)
        self.ask(
            u.iommu_veventq_alloc(
                flags=self.wrong(0, 1),
                viommu_id=self.id_of("VIOMMU"),
                type=self.wrong(t.IOMMU_VEVENTQ_TYPE_SELFTEST, 0, 1),
                veventq_depth=self.wrong(self.r.choice((1, 2, 8)), 0, 2**32 - 1),
                reserved=self.wrong(0, 1),
            ),
            out=(slot, 24),
        )

    def hw_queue(self) -> None:
        _, iova, length = self.mapped()
        self.ask(
            u.iommu_hw_queue_alloc(
                flags=self.wrong(0, 1),
                viommu_id=self.id_of("VIOMMU"),
                type=self.wrong(t.IOMMU_HW_QUEUE_TYPE_SELFTEST, 0, 1),
                index=self.r.choice((0, 0, 1, 1, 2)),
                nesting_parent_iova=iova,
                length=self.wrong(min(length, PAGE), 0, length),
            )
        )

    def mock_domain(self) -> None:
        pt = self.id_of("IOAS", "IOAS", "HWPT_PAGING", "HWPT_NESTED")
        if self.chance(0.5):
            self.ask(t.test_mock_domain(id=pt))
        else:
            self.ask(t.test_mock_domain_flags(id=pt, dev_flags=self.wrong(self.r.choice((0, 1, 4, 5)), 2, 8)))

    def replace(self) -> None:
        self.ask(
            t.test_mock_domain_replace(
                id=self.id_of("SELFTEST"), pt_id=self.id_of("IOAS", "HWPT_PAGING", "HWPT_NESTED")
            )
        )

    def pasid(self) -> None:
        stdev = self.id_of("SELFTEST")
        pasid = self.wrong(self.r.choice((1, 1, 2, 1024)), 1 << 20)
        key = (self.slot, stdev)
        what = self.r.randrange(4)
        pt = self.id_of("HWPT_PAGING", "HWPT_NESTED", "IOAS")
        if what == 0:
            if self.ask(t.test_pasid_attach(id=stdev, pasid=pasid, pt_id=pt)).startswith("0"):
                self.attached.setdefault(key, set()).add(pasid)
        elif what == 1:
            self.ask(t.test_pasid_replace(id=stdev, pasid=pasid, pt_id=pt))
        elif what == 2:
            if self.ask(t.test_pasid_detach(id=stdev, pasid=pasid)).startswith("0"):
                self.attached.get(key, set()).discard(pasid)
        else:
            self.ask(t.test_pasid_check_hwpt(id=stdev, pasid=self.r.choice((0, pasid)), hwpt_id=self.r.choice((0, pt))))

    def checks(self) -> None:
        _, iova, length = self.mapped()
        what = self.r.randrange(4)
        if what == 0:
            self.ask(
                t.test_md_check_map(
                    id=self.id_of("HWPT_PAGING"), iova=iova, length=min(length, 64 * PAGE), uptr=self.va()
                )
            )
        elif what == 1:
            self.ask(
                t.test_md_check_refs(length=PAGE, uptr=ARENA + self.page() * PAGE, refs=self.r.choice((0, 0, 1, 2)))
            )
        elif what == 2:
            self.ask(
                t.test_md_check_iotlb(
                    id=self.id_of("HWPT_NESTED"), arm_id=self.wrong(self.r.randrange(4), 4), iotlb=self.r.randrange(4)
                )
            )
        else:
            self.ask(
                t.test_dev_check_cache(
                    id=self.id_of("DEVICE"),
                    arm_id=self.wrong(self.r.randrange(4), 4),
                    cache=self.r.choice((t.IOMMU_TEST_DEV_CACHE_DEFAULT, 0)),
                )
            )

    def add_reserved(self) -> None:
        if self.chance(0.5):
            self.ask(t.test_add_reserved(id=self.id_of("IOAS"), start=self.iova(), length=self.length_()))

    def create_access(self) -> None:
        slot = self.free_slot(ACCESSES)
        value = t.test_create_access(id=self.id_of("IOAS"), flags=self.wrong(self.r.randrange(2), 2))
        self.ask(value, out=(slot, 16))

    def access_pages(self) -> None:
        _, iova, length = self.mapped()
        value = t.test_access_pages(
            flags=self.wrong(self.r.choice((0, 0, 1)), 2, 0x10000),
            iova=iova - iova % PAGE if self.chance(0.8) else iova,
            length=self.wrong(length, 0, (16 << 20) + 1),
            uptr=self.r.choice((0, 0, 0, self.va())),
        )
        self.ask(value, patches=((8, self.used_slot(ACCESSES)),))

    def access_rw(self) -> None:
        _, iova, length = self.mapped()
        value = t.test_access_rw(
            iova=iova,
            length=self.wrong(min(length, 4 * PAGE), 0, (16 << 20) + 1),
            uptr=self.wrong(BUFFER + 4 * PAGE, 0, ULMAX),
            flags=self.wrong(self.r.choice((0, 1, 4, 5)), 2, 8, 0x10000),
        )
        self.ask(value, patches=((8, self.used_slot(ACCESSES)),))
        self.write(Step(PEEK, numbers=(BUFFER + 4 * PAGE, 16)))
        if self.chance(0.3):
            self.write(Step(POKE, numbers=(BUFFER + 4 * PAGE,), data=self.r.randbytes(16)))

    def access_other(self) -> None:
        access = self.used_slot(ACCESSES)
        if self.chance(0.5):
            self.ask(t.test_access_replace_ioas(ioas_id=self.id_of("IOAS")), patches=((8, access),))
        else:
            self.ask(t.test_destroy_access_pages(access_pages_id=self.r.randrange(4)), patches=((8, access),))

    def trigger(self) -> None:
        device = self.id_of("DEVICE")
        context = self.context()
        if context is None or not any(o.id == device for o in context.objects):
            device = 99
        if self.chance(0.6):
            self.ask(
                t.test_trigger_iopf(
                    dev_id=device, pasid=self.r.choice((0, 0, 1, 5)), grpid=self.r.randrange(3), perm=3, addr=0x1001
                )
            )
        else:
            self.ask(t.test_trigger_vevent(dev_id=device))

    def memory(self) -> None:
        first, count = self.page(), self.r.choice((1, 1, 2, 4))
        what = self.r.randrange(5)
        if what == 0:
            self.write(Step(MUNMAP, numbers=(first, count)))
            if self.chance(0.7):
                self.write(Step(MMAP, numbers=(first, count, 255)))
        elif what == 1:
            self.write(Step(MPROTECT, numbers=(first, 1, self.r.choice((0, 1, 3, 3)))))
        elif what == 2:
            self.write(Step(MMAP, numbers=(first, count, 255)))
        elif what == 3 and not self.dirty and any(slot in self.stage.slots for slot in MEMFDS):
            slot = self.used_slot(MEMFDS)
            if slot in MEMFDS and slot in self.stage.slots:
                self.write(Step(MMAP, numbers=(first, count, slot)))

    def vfio(self) -> None:
        what = self.r.randrange(5)
        _, iova, length = self.mapped()
        if what == 0:
            data = struct.pack("<II", self.wrong(self.r.choice((16, 24, 72, 149)), 0, 15), 0) + b"\xaa" * 152
            self.raw(0x3B70, data)
        elif what == 1:
            data = struct.pack(
                "<IIQQQ",
                self.wrong(32, 31),
                self.wrong(self.r.choice((3, 1, 2)), 0, 4),
                self.va(),
                self.iova(),
                self.length_(),
            )
            self.raw(0x3B71, data)
        elif what == 2:
            flags = self.r.choice((0, 0, 0, 2, 1))
            data = struct.pack(
                "<IIQQ", self.wrong(24, 23), flags, 0 if flags == 2 else iova, 0 if flags == 2 else length
            )
            self.raw(0x3B72, data)
        elif what == 3:
            self.write(Step(IOCTL, self.slot, cmd=0x3B65, address=self.r.randrange(12)))
        else:
            self.write(Step(IOCTL, self.slot, cmd=0x3B66, address=self.r.choice((1, 3, 8, 2))))

    def noiommu_pa(self) -> None:
        ioas, iova, length = self.mapped()
        self.ask(
            u.iommu_ioas_noiommu_get_pa(
                flags=self.wrong(0, 1),
                ioas_id=ioas,
                reserved=self.wrong(0, 1),
                iova=self.wrong(iova, ULMAX),
                length=self.wrong(length, 0),
            )
        )

    def raw(self, cmd: int, data: bytes) -> None:
        self.write(Step(IOCTL, self.slot, cmd=cmd, data=data))

    def bare(self) -> None:
        """A bare argument: no struct where the number points."""
        cmd = self.r.choice((0x3B80, 0x3B85, 0x3B96, 0x3BA0, 0x3BA1, 0x3B64, 0x3B70))
        self.write(Step(IOCTL, self.slot, cmd=cmd, address=self.r.choice((0, 1, 2**47, ULMAX))))

    def close_file(self) -> None:
        slots = self.r.choice((MEMFDS, ACCESSES, QUEUES))
        used = [slot for slot in slots if slot in self.stage.slots]
        if used:
            self.write(Step(CLOSE, self.r.choice(used)))


def detaching(stdev: int, pasid: int) -> bytes:
    return filled(t.test_pasid_detach(id=stdev, pasid=pasid)).pack()


def ioctl_of(value: Struct, patches: tuple[tuple[int, int], ...] = ()) -> Step:
    """The step that asks ``value`` of the context in slot 0, exactly so."""
    return Step(IOCTL, 0, cmd=number_of(value), data=filled(value).pack(), patches=patches)


# how often each call is made
_WEIGHTS = {
    "noiommu_pa": 1,
    "ioas_alloc": 3,
    "destroy": 8,
    "map": 20,
    "map_file": 5,
    "copy": 6,
    "unmap": 10,
    "ranges": 2,
    "allow": 2,
    "option": 3,
    "vfio_ioas": 1,
    "change_process": 1,
    "hwpt_alloc": 8,
    "hwpt_nested": 6,
    "hw_info": 2,
    "dirty_calls": 8,
    "invalidate": 3,
    "fault_alloc": 3,
    "queue_io": 6,
    "viommu": 3,
    "vdevice": 4,
    "veventq": 3,
    "hw_queue": 4,
    "mock_domain": 6,
    "replace": 6,
    "pasid": 8,
    "checks": 8,
    "add_reserved": 2,
    "create_access": 3,
    "access_pages": 8,
    "access_rw": 6,
    "access_other": 3,
    "trigger": 8,
    "memory": 5,
    "vfio": 5,
    "bare": 1,
    "close_file": 2,
}
# theme -> the calls it makes more of
_PREAMBLES: dict[str, tuple[str, ...]] = {
    "viommu": ("viommu", "vdevice", "veventq", "hwpt_nested", "invalidate", "trigger", "queue_io", "replace"),
    "hw_queue": ("hw_queue", "unmap", "viommu", "destroy"),
    "nested": ("hwpt_nested", "invalidate", "checks", "replace"),
    "dirty": ("dirty_calls",),
    "pasid": ("pasid", "trigger", "replace"),
    "fault": ("trigger", "queue_io", "fault_alloc", "replace", "pasid"),
    "access": ("access_pages", "access_rw", "access_other", "unmap"),
    "vfio": ("vfio",),
    "limited": ("map", "access_pages", "hwpt_alloc", "mock_domain", "option", "noiommu_pa"),
    "crowd": ("unmap", "access_pages"),
}


def write(seed: int, steps: int = 60) -> tuple[Program, list[str]]:
    """The program of ``seed``, and what the software said while it was written."""
    author = Author(seed, steps)
    author.run()
    return author.program, author.answers
