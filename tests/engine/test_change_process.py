"""core 4.13: IOAS_CHANGE_PROCESS."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from iommufd.engine.task import CAP_IPC_LOCK, CAP_SYS_RESOURCE
from iommufd.errors import KernelError
from iommufd.uapi import iommufd as u
from tests.engine.fakes import Caller, FakeFile, TestDmaBuf

P = 4096
FD = 5


def with_file(**process: Any) -> Caller:
    c = Caller(**process)
    c.proc.files[FD] = lambda: FakeFile(c.world, 64)
    return c


def heir(c: Caller, **process: Any) -> Caller:
    """Another process with the same open file."""
    return Caller(c.world, context=c.context, **process)


def map_file(c: Caller, ioas: int, iova: int, pages: int) -> None:
    c.do(u.iommu_ioas_map_file(flags=7, ioas_id=ioas, fd=FD, length=pages * P, iova=iova))


def change(c: Caller) -> None:
    c.do(u.iommu_ioas_change_process())


def state(c: Caller) -> tuple[int, int, int]:
    return c.pinned_vm, c.locked_vm, c.user_pages


def test_core_4_13_1() -> None:  # core-4.13-1
    c = with_file()
    c.refuses(errno.EOPNOTSUPP, u.iommu_ioas_change_process(reserved=1))


def test_nothing_to_do() -> None:  # core-4.13-2
    c = with_file()
    change(c)
    c.ioas()
    change(heir(c))


@pytest.mark.parametrize("kind", ["memory", "dma-buf"])
def test_core_4_13_4(kind: str) -> None:  # core-4.13-4
    """Not of file type: the first offending area decides, nothing changed."""
    c = with_file()
    ioas = c.ioas()
    c.add_domain(ioas)
    map_file(c, ioas, 0, 2)
    if kind == "memory":
        c.map(ioas, 0x10000, P)
    else:
        buffer = TestDmaBuf(c.world, 2)
        c.proc.files[9] = lambda: buffer
        c.do(u.iommu_ioas_map_file(flags=7, ioas_id=ioas, fd=9, length=P, iova=0x10000))
    before = state(c)
    assert "0x10000" in heir(c).refuses(errno.EINVAL, u.iommu_ioas_change_process())
    assert state(c) == before


def test_core_4_13_5() -> None:  # core-4.13-5
    """The heir must be able to pay; nothing changed otherwise."""
    c = with_file()
    ioas = c.ioas()
    c.add_domain(ioas)
    map_file(c, ioas, 0, 4)
    poor = heir(c, uid=2000, limit=3 * P)
    poor.refuses(errno.ENOMEM, u.iommu_ioas_change_process())
    assert (state(c), state(poor)) == ((4, 0, 4), (0, 0, 0))


def test_charge_comes_before_uncharge() -> None:
    """The same user needs room for both copies at once."""
    c = with_file(limit=7 * P)
    ioas = c.ioas()
    c.add_domain(ioas)
    map_file(c, ioas, 0, 4)
    twin = heir(c, limit=7 * P)
    twin.refuses(errno.ENOMEM, u.iommu_ioas_change_process())
    twin.proc.limit = 8 * P
    change(twin)
    assert (c.pinned_vm, twin.pinned_vm, c.user_pages) == (0, 4, 4)


def test_core_4_13_6() -> None:  # core-4.13-6
    c = with_file()
    a, b = c.ioas(), c.ioas()
    c.add_domain(a)
    c.add_domain(b)
    map_file(c, a, 0, 4)
    c.copy(b, a, 0, 2 * P, 0)  # shares the pages object: counted once
    map_file(c, b, 0x10000, 1)
    new = heir(c, uid=2000)
    change(new)
    assert (state(c), state(new)) == ((0, 0, 0), (5, 0, 5))
    change(new)  # same process
    new.unmap(a, 0, 2**40)
    new.unmap(b, 0, 2**40)
    new.quiet()


def test_mm_mode() -> None:
    c = with_file(caps=[CAP_SYS_RESOURCE])
    c.do(u.iommu_option(option_id=0, op=0, val64=1))
    ioas = c.ioas()
    c.add_domain(ioas)
    map_file(c, ioas, 0, 4)
    new = heir(c)
    change(new)
    assert (state(c), state(new)) == ((0, 0, 0), (4, 4, 0))


def test_unpinned_objects_change_hands_too() -> None:
    c = with_file()
    ioas = c.ioas()
    map_file(c, ioas, 0, 4)
    new = heir(c, uid=2000)
    change(new)
    new.add_domain(ioas)
    assert (state(c), state(new)) == ((0, 0, 0), (4, 0, 4))


def test_quirk_the_payer_in_mm_mode_is_gone() -> None:
    """EINVAL although the heir was charged and owns everything; a second call succeeds; the charge stays."""
    c = with_file(caps=[CAP_SYS_RESOURCE])
    c.do(u.iommu_option(option_id=0, op=0, val64=1))
    ioas = c.ioas()
    c.add_domain(ioas)
    map_file(c, ioas, 0, 4)
    c.proc.exit()
    new = heir(c)
    new.refuses(errno.EINVAL, u.iommu_ioas_change_process())
    assert state(new) == (4, 4, 0)
    change(new)
    assert state(new) == (4, 4, 0)
    table = c.table(ioas)  # observed: what was pinned then is never released, what is pinned later is
    for _ in range(2):
        table.remove_domain(table.domains[0])
        assert state(new) == (4, 4, 0)
        new.add_domain(ioas)
        assert state(new) == (8, 8, 0)
    new.unmap(ioas, 0, 4 * P)
    assert state(new) == (4, 4, 0)


def by_process(limit: int | None = None) -> tuple[Caller, int, Any]:
    """A context that charges processes, an IOAS with 8 pages of a file at IOVA 0 and as many at 16 pages, an access;
    the process that mapped them pinned the first 4 and has exited."""
    c = with_file(caps=[CAP_SYS_RESOURCE], limit=None if limit is None else limit * P)
    c.do(u.iommu_option(option_id=0, op=0, val64=1))
    ioas = c.ioas()
    map_file(c, ioas, 0, 8)
    map_file(c, ioas, 16 * P, 8)
    access = c.access(ioas)
    access.pin_pages(0, 4 * P, write=False, task=None)
    c.proc.exit()
    return c, ioas, access


class TestThePayerIsGone:
    """Accounting by process, seen on 7.3.4: a process that has exited still pays, within its limit; what is unpinned
    then stays charged until the same mapping is pinned again."""

    def test_it_is_charged(self) -> None:
        c, _, access = by_process(limit=6)
        access.pin_pages(16 * P, 2 * P, write=False)
        assert state(c) == (6, 6, 0)
        with pytest.raises(KernelError) as caught:
            access.pin_pages(18 * P, P, write=False)
        assert caught.value.errno == errno.ENOMEM

    def test_its_charge_stays_with_the_mapping(self) -> None:
        c, _, access = by_process(limit=4)
        access.unpin_pages(0, 4 * P)
        assert state(c) == (4, 4, 0)
        for _ in range(2):
            access.pin_pages(0, 4 * P, write=False)
            access.unpin_pages(0, 4 * P)
            assert state(c) == (4, 4, 0)
        with pytest.raises(KernelError):
            access.pin_pages(16 * P, P, write=False)
        access.pin_pages(0, 2 * P, write=False)  # which settles it
        assert state(c) == (2, 2, 0)
        access.pin_pages(16 * P, 2 * P, write=False)
        assert state(c) == (4, 4, 0)

    def test_the_heir_pays_what_is_charged(self) -> None:
        c, _, access = by_process()
        access.unpin_pages(0, 4 * P)
        new = heir(c)
        new.refuses(errno.EINVAL, u.iommu_ioas_change_process())
        change(new)
        assert state(new) == (4, 4, 0)
        access.pin_pages(0, 3 * P, write=False)
        assert state(new) == (7, 7, 0)
        access.unpin_pages(0, 3 * P)
        assert state(new) == (4, 4, 0)

    def test_the_heir_pays_again_for_what_is_pinned(self) -> None:
        c, _, access = by_process()
        new = heir(c)
        new.refuses(errno.EINVAL, u.iommu_ioas_change_process())
        assert state(new) == (4, 4, 0)
        access.pin_pages(0, 5 * P, write=False)
        assert state(new) == (9, 9, 0)
        access.unpin_pages(0, 4 * P)
        assert state(new) == (9, 9, 0)
        access.unpin_pages(0, 5 * P)
        assert state(new) == (4, 4, 0)


def test_quirk_unaccounted_objects_keep_their_vmpin() -> None:
    """NONE mode: the owner changes, VmPin does not; the later unpin goes below zero."""
    c = with_file(caps=[CAP_IPC_LOCK])
    ioas = c.ioas()
    c.add_domain(ioas)
    map_file(c, ioas, 0, 4)
    new = heir(c)
    change(new)
    assert (c.pinned_vm, new.pinned_vm) == (4, 0)
    new.unmap(ioas, 0, 4 * P)
    assert (c.pinned_vm, new.pinned_vm) == (4, -4)
