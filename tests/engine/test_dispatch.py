"""core 1: the struct protocol, for every command alike."""

from __future__ import annotations

import errno

import pytest

from iommufd.engine.dispatch import Call, Respond, build_table
from iommufd.engine.file import Pending
from iommufd.engine.instrument import Instrument
from iommufd.engine.object import Object
from iommufd.errors import KernelError
from iommufd.memory.space import READ
from iommufd.uapi import iommufd as u
from iommufd.uapi.commands import BY_NAME
from tests.engine.fakes import ARG, ULMAX, Caller, each, fails, make_world, map_struct

PAGE_END = ARG + 0x2000  # nothing is mapped from here on
ALLOC, DESTROY, MAP = 0x3B81, 0x3B80, 0x3B85


def le(*words: int) -> bytes:
    return b"".join(w.to_bytes(4, "little") for w in words)


@pytest.mark.parametrize(
    ("cmd", "at", "data", "number"),
    each(
        [
            ("core-1.3-1-low", 0x3B7F, 0, b"", errno.ENOTTY),
            ("core-1.3-1-high", 0x3B96, 0, b"", errno.ENOTTY),
            ("core-1.3-1-whole", 0xC0003B64, 0, b"", errno.ENOTTY),
            ("core-1.3-2-null", ALLOC, 0, b"", errno.EFAULT),
            ("core-1.3-2-before-3", 0xDEAD3B81, 0, b"", errno.EFAULT),
            ("core-1.3-2-straddling", ALLOC, PAGE_END - 2, b"\x0c\0", errno.EFAULT),
            ("core-1.3-3-direction", 0xC0003B81, ARG, le(12, 0, 0), errno.ENOTTY),
            ("core-1.3-3-type", 0x3C81, ARG, le(12, 0, 0), errno.ENOTTY),
            ("core-1.3-3-size-is-not-looked-at", 0x13B81, ARG, le(0, 0, 0), errno.ENOTTY),
            ("core-1.3-4", ALLOC, ARG, le(11, 0, 0), errno.EINVAL),
            ("core-1.3-4-zero", ALLOC, ARG, le(0, 0, 0), errno.EINVAL),
            ("core-1.3-4-before-6", ALLOC, PAGE_END - 4, le(11), errno.EINVAL),
            ("core-1.3-5-nonzero", ALLOC, ARG, le(16, 0, 0, 1), errno.E2BIG),
            ("core-1.3-5-last-byte", ALLOC, ARG, le(16, 0, 0, 1 << 31), errno.E2BIG),
            ("core-1.3-5-unreadable", ALLOC, PAGE_END - 16, le(17, 0, 0, 0), errno.EFAULT),
            ("core-1.3-5-nonzero-before-unreadable", ALLOC, PAGE_END - 16, le(17, 0, 0, 1), errno.E2BIG),
            ("core-1.3-5-before-6", ALLOC, ARG, le(16, 1, 0, 1), errno.E2BIG),
            ("core-1.3-6", ALLOC, PAGE_END - 8, le(12, 0), errno.EFAULT),
            ("core-1.3-8", ALLOC, ARG, le(12, 1, 0), errno.EOPNOTSUPP),
        ]
    ),
)
def test_prevalidation(c: Caller, cmd: int, at: int, data: bytes, number: int) -> None:
    assert fails(number, lambda: c.raw(cmd, data, at))
    assert len(c.context.objects) == 0


def test_nonzero_word_far_behind_the_struct(c: Caller) -> None:
    """core 1.3 row 5: the tail is scanned to its end."""
    c.host.poke(ARG + 0x1FFF, b"\1")
    fails(errno.E2BIG, lambda: c.raw(ALLOC, le(0x2000, 0, 0)))
    c.host.poke(ARG + 0x1FFF, b"\0")
    assert c.raw(ALLOC, le(0x2000, 0, 0)) == 0


def test_unreadable_size_is_efault_even_for_slots_without_a_command() -> None:
    """core 1.3 row 2 comes before row 3: with the test command in the table, 0x96 is an empty slot below the top."""
    c = Caller()
    c.world.top_nr = 0xA0
    fails(errno.EFAULT, lambda: c.raw(0x3B96, b"", 0))
    fails(errno.ENOTTY, lambda: c.raw(0x3B96, le(100)))
    fails(errno.ENOTTY, lambda: c.raw(0x3BA1, b"", 0))


def test_compat_commands_get_the_whole_number(c: Caller) -> None:
    """core 1.3 row 1: the argument is not read, the whole command is handed on."""
    seen: list[tuple[int, int]] = []

    def compat(context: object, task: object, cmd: int, arg: int) -> int:
        seen.append((cmd, arg))
        return 7

    c.world.compat_ioctl = compat
    assert c.raw(0x3B64, b"", 0) == 7
    assert c.raw(0xFFFF3B05, b"", 1) == 7
    assert seen == [(0x3B64, 0), (0xFFFF3B05, 1)]


def test_core_1_3_row_7_missing_tail_is_zero(c: Caller) -> None:  # core-1.3-7
    """A struct of an older header: fields behind ``size`` read as zero, whatever lies there."""
    seen: list[u.iommu_hw_info] = []

    def handler(call: Call) -> None:
        assert isinstance(call.cmd, u.iommu_hw_info)
        seen.append(call.cmd)

    c.world.table |= build_table([(BY_NAME["IOMMU_GET_HW_INFO"], handler, Respond.ON_SUCCESS)], (7, 3))
    data = u.iommu_hw_info(size=32, dev_id=5, out_capabilities=77).pack()
    c.raw(0x3B8A, data)
    assert (seen[0].dev_id, seen[0].out_capabilities) == (5, 0)
    assert c.host.peek(ARG + 32, 8) == data[32:40]  # core 1.5 rule 1: min(size, full) bytes go back


class _Thing(Object):
    kind = "THING"


def test_core_1_3_row_9_objects_are_published_or_undone(c: Caller) -> None:  # core-1.3-9
    made: list[_Thing] = []
    fail = True

    def handler(call: Call) -> None:
        made.append(call.reserve(_Thing(call.context)))
        with pytest.raises(KernelError):  # reserved: not yet found (core 2.2)
            call.get(made[-1].id, _Thing)
        if fail:
            raise KernelError(errno.EIO, "no")

    c.world.table |= build_table([(BY_NAME["IOMMU_DESTROY"], handler, Respond.NOTHING)], (7, 3))
    fails(errno.EIO, lambda: c.raw(DESTROY, le(8, 0)))
    assert len(c.context.objects) == 0
    fail = False
    c.raw(DESTROY, le(8, 0))
    assert made[-1].id == 1
    assert [o.id for o in c.context.objects] == [1]


def test_undo_runs_in_reverse_and_descriptors_go_back(c: Caller) -> None:
    order: list[str] = []

    def handler(call: Call) -> None:
        call.on_error(lambda: order.append("first"))
        call.on_error(lambda: order.append("second"))
        call.reserve_fd(c.context)
        raise KernelError(errno.EIO, "no")

    c.context.get()
    c.world.table |= build_table([(BY_NAME["IOMMU_DESTROY"], handler, Respond.NOTHING)], (7, 3))
    fails(errno.EIO, lambda: c.raw(DESTROY, le(8, 0)))
    assert order == ["second", "first"]
    assert c.context.references == 1
    assert not c.proc.installed


def test_lookups_are_dropped_at_the_end(c: Caller) -> None:
    ioas = c.ioas()
    c.refuses(errno.EINVAL, map_struct(ioas, 0, 0))
    c.do(u.iommu_destroy(id=ioas))  # EBUSY if the failed call still held it


class TestCopyBack:
    """core 1.5."""

    def test_rule_1_inputs_and_size_are_echoed_and_bytes_behind_stay(self, c: Caller) -> None:
        ioas = c.ioas()
        data = map_struct(ioas, None, 4096)
        data.size = 48
        c.raw(MAP, data.pack() + bytes(8))
        out = c.after(u.iommu_ioas_map)
        assert (out.size, out.flags, out.ioas_id, out.length, out.iova) == (48, 6, ioas, 4096, 0x1000)

    def test_rule_2_nothing_is_written_on_error(self, c: Caller) -> None:
        data = u.iommu_ioas_alloc(size=12, flags=1, out_ioas_id=0x55).pack()
        fails(errno.EOPNOTSUPP, lambda: c.raw(ALLOC, data))
        assert c.host.peek(ARG, 12) == data

    def test_rule_3_object_creation_is_undone(self, c: Caller) -> None:  # core-4.4-3
        c.host.map(ARG, 2, READ)
        c.host.poke(ARG, u.iommu_ioas_alloc(size=12).pack())
        fails(errno.EFAULT, lambda: c.context.ioctl(c.proc.task(), ALLOC, ARG))
        assert len(c.context.objects) == 0

    def test_rule_3_effects_of_map_unmap_copy_stay(self, c: Caller) -> None:
        ioas = c.ioas()
        readonly = 0x9000_0000
        c.host.map(readonly, 1, READ)
        c.refuses(errno.EFAULT, map_struct(ioas, 0x1000, 4096), at=readonly)
        assert c.areas(ioas) == [(0x1000, 0x1FFF)]
        from tests.engine.fakes import copy_struct

        c.refuses(errno.EFAULT, copy_struct(ioas, ioas, 0x1000, 4096, 0x3000), at=readonly)
        assert c.areas(ioas) == [(0x1000, 0x1FFF), (0x3000, 0x3FFF)]
        c.refuses(errno.EFAULT, u.iommu_ioas_unmap(ioas_id=ioas, iova=0, length=ULMAX), at=readonly)
        assert c.areas(ioas) == []


def test_older_release_has_fewer_commands_and_shorter_structs() -> None:
    c = Caller(make_world(kernel=(6, 6)))
    c.refuses(errno.ENOTTY, u.iommu_ioas_map_file())
    assert c.ioas() == 1


def test_instruments_see_enter_and_exit(c: Caller) -> None:
    class Log(Instrument):
        def __init__(self) -> None:
            self.lines: list[str] = []

        def ioctl_enter(self, call: Call) -> None:
            assert not call.world.lock.locked()
            self.lines.append(f"enter {type(call.cmd).__name__}")

        def ioctl_exit(self, call: Call, result: int, error: KernelError | None) -> None:
            assert not call.world.lock.locked()
            self.lines.append(f"exit {result} {error.errno if error else 0}")

        def event(self, name: str, **fields: object) -> None:
            self.lines.append(name)

    log = Log()
    c.world.instruments.append(log)
    ioas = c.ioas()
    c.refuses(errno.EOPNOTSUPP, u.iommu_ioas_alloc(flags=1))
    fails(errno.EFAULT, lambda: c.raw(ALLOC, b"", 0))
    c.map(ioas, 0, 4096)
    c.unmap(ioas, 0, 4096)
    assert log.lines == [
        "enter iommu_ioas_alloc",
        "exit 0 0",
        "enter iommu_ioas_alloc",
        f"exit -1 {errno.EOPNOTSUPP}",
        f"exit -1 {errno.EFAULT}",
        "enter iommu_ioas_map",
        "map",
        "exit 0 0",
        "enter iommu_ioas_unmap",
        "unmap",
        "exit 0 0",
    ]


def test_pending_answers_pass_through(c: Caller) -> None:
    pending = Pending()

    def handler(call: Call) -> Pending:
        return pending

    c.world.table |= build_table([(BY_NAME["IOMMU_DESTROY"], handler, Respond.NOTHING)], (7, 3))
    c.host.poke(ARG, le(8, 0))
    assert c.context.ioctl(c.proc.task(), DESTROY, ARG) is pending


class TestOtherCalls:
    """core 1.2."""

    def test_read_write_lseek_poll(self, c: Caller) -> None:
        task = c.proc.task()
        fails(errno.EINVAL, lambda: c.context.read(task, ARG, 8))
        fails(errno.EINVAL, lambda: c.context.write(task, ARG, 8))
        fails(errno.ESPIPE, lambda: c.context.lseek(task))
        assert c.context.poll() == 0x145
