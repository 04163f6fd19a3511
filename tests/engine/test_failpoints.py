"""core 10, mock-device 10: the points of fault injection, their order, and that everything unwinds."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from iommufd.engine import failpoints, unmap
from iommufd.engine.fail import POINTS, fail_nth, fail_rule
from iommufd.errors import KernelError
from iommufd.uapi import iommufd as u
from tests.engine.fakes import ARRAY, BUFFER, ULMAX, Caller, copy_struct, domains_of, map_struct

P = 4096


def points(c: Caller, call: Callable[[], object]) -> list[str]:
    """The errnos of the call when its first, second, ... point fails, until it succeeds."""
    found: list[str] = []
    for nth in range(1, 30):
        before = snapshot(c)
        with fail_nth(c.world, nth) as shot:
            try:
                call()
            except KernelError as error:
                if not shot.fired:
                    raise
                found.append(errno.errorcode[error.errno])
                assert snapshot(c) == before, f"point {nth} left something behind"
                continue
        return found
    raise AssertionError("no end of points")


def snapshot(c: Caller) -> Any:
    from tests.engine.fakes import pinned_frames

    tables = [(i, c.table(i)) for i in (1, 2)]
    return (
        len(c.context.objects),
        [
            (
                [(first, last, area.pages is None, area.accesses) for first, last, area in table.areas],
                [list(domain.segments(0, ULMAX)) for domain in domains_of(table)],
                sorted(table.accesses),
                table.iova_alignment,
                table.domains_sem.readers,
                table.iova_sem.readers,
                table.domains_sem.blocked,
            )
            for _, table in tables
        ],
        pinned_frames(c.world),
        c.pinned_vm,
        c.user_pages,
    )


def test_names_are_those_of_the_injector() -> None:
    names = {value for name, value in vars(failpoints).items() if name.isupper()}
    assert names == set(POINTS)


def test_map_with_a_domain(c: Caller) -> None:
    """mock-device 10: the observed order for one page."""
    a, _ = c.ioas(), c.ioas()
    c.add_domain(a)
    assert points(c, lambda: c.map(a, 0x1000, P)) == ["ENOENT", "ENOMEM", "ENOMEM", "EFAULT", "ENOMEM"]


def test_map_without_a_domain(c: Caller) -> None:
    a, _ = c.ioas(), c.ioas()
    assert points(c, lambda: c.map(a, 0x1000, P)) == ["ENOENT"]


def test_unmap(c: Caller) -> None:
    a, _ = c.ioas(), c.ioas()
    c.add_domain(a)
    c.map(a, 0x1000, P)
    assert points(c, lambda: c.unmap(a, 0x1000, P)) == ["ENOENT"]


def test_copy(c: Caller) -> None:
    a, b = c.ioas(), c.ioas()
    c.add_domain(b)
    c.map(a, 0x1000, P)
    found = points(c, lambda: c.do(copy_struct(b, a, 0x1000, P)))
    assert found == ["ENOENT", "ENOENT", "ENOMEM", "ENOMEM", "EFAULT", "ENOMEM"]


def test_destroy_is_no_lookup(c: Caller) -> None:
    a, _ = c.ioas(), c.ioas()
    with fail_nth(c.world, 1) as shot:
        c.do(u.iommu_destroy(id=a))
        assert not shot.fired


def test_access_pin(c: Caller) -> None:
    a, _ = c.ioas(), c.ioas()
    c.map(a, 0x1000, P)
    access = c.access(a)
    task = c.proc.task()
    found = points(c, lambda: access.pin_pages(0x1000, P, write=False, task=task))
    assert found == ["EFAULT", "EINVAL", "ENOMEM"]


def test_access_pin_of_held_pages(c: Caller) -> None:
    """Nothing to pin, nothing to charge."""
    a, _ = c.ioas(), c.ioas()
    c.add_domain(a)
    c.map(a, 0x1000, P)
    access = c.access(a)
    found = points(c, lambda: access.pin_pages(0x1000, P, write=False, task=c.proc.task()))
    assert found == ["EINVAL"]


def test_access_replace(c: Caller) -> None:
    a, b = c.ioas(), c.ioas()
    access = c.access(a)
    assert points(c, lambda: access.replace(b, c.proc.task())) == ["ENOENT"]


def test_remote_copy_of_one_page(c: Caller) -> None:
    a, _ = c.ioas(), c.ioas()
    c.map(a, 0x1000, 2 * P)
    access = c.access(a, pins=False)
    task = c.proc.task()
    assert points(c, lambda: access.read(task, 0x1000, 8, flags=4)) == ["EINVAL"]
    assert points(c, lambda: access.read(task, 0x1000, 8)) == []
    assert points(c, lambda: access.read(task, 0x1000, P + 1, flags=4)) == ["ENOMEM", "ENOMEM", "EFAULT"]


def test_attach_of_a_domain(c: Caller) -> None:
    a, _ = c.ioas(), c.ioas()
    c.map(a, 0x1000, P)
    c.map(a, 0x2000, P, BUFFER + P)
    one_area = ["ENOMEM", "ENOMEM", "EFAULT", "ENOMEM"]
    assert points(c, lambda: c.add_domain(a)) == one_area * 2
    assert points(c, lambda: c.add_domain(a)) == ["ENOMEM"] * 2


def test_charge_point_counts_in_none_mode(c: Caller) -> None:
    """Consulted although CAP_IPC_LOCK makes the charge free."""
    from iommufd.engine.task import CAP_IPC_LOCK

    c.proc.caps.add(CAP_IPC_LOCK)
    a, _ = c.ioas(), c.ioas()
    c.add_domain(a)
    assert points(c, lambda: c.map(a, 0x1000, P))[-1] == "ENOMEM"


def test_allocation_points_when_asked_for(c: Caller) -> None:  # core-4.7-1, core-4.9-7
    """core 4.7 row 1, 4.9 row 7: memory for areas and pages objects, injected only with failslab's knob."""
    a, _ = c.ioas(), c.ioas()
    c.world.injector.configure(c.world.injector.failslab, ignore_gfp_wait=False)
    assert points(c, lambda: c.do(map_struct(a, 0x1000, P)))[:3] == ["ENOENT", "ENOMEM", "ENOMEM"]


def test_allocation_points_of_allowed_ranges_and_cuts(c: Caller) -> None:
    """core-4.6-6, core-4.15-5."""
    a, _ = c.ioas(), c.ioas()
    c.map(a, 0x1000, 4 * P)
    injector = c.world.injector
    injector.configure(injector.failslab, ignore_gfp_wait=False)
    c.host.poke(ARRAY, b"".join(x.to_bytes(8, "little") for x in (0, 9, 10, 19)))
    struct = u.iommu_ioas_allow_iovas(ioas_id=a, num_iovas=2, allowed_iovas=ARRAY)
    assert points(c, lambda: c.do(struct)) == ["ENOENT", "ENOMEM", "ENOMEM"]
    with fail_rule(c.world, "*:point=slab"), pytest.raises(KernelError) as caught:
        unmap.cut(c.table(a), 0x1FFF)
    assert caught.value.errno == errno.ENOMEM
    assert c.areas(a) == [(0x1000, 0x4FFF)]
