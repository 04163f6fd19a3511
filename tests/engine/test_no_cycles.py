"""The supervisor runs without the cyclic collector: whatever the engine makes must go by counting alone."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import suppress

from iommufd.engine.access import Access, AccessOps
from iommufd.engine.task import CAP_SYS_RESOURCE
from iommufd.errors import KernelError
from iommufd.uapi import iommufd as u
from tests.engine.fakes import ARRAY, ULMAX, Caller, FakeFile, TestDmaBuf, copy_struct, map_struct

P = 4096


def refuse(c: Caller, number: int, struct: u.iommu_ioas_map | u.iommu_ioas_unmap | u.iommu_ioas_copy) -> None:
    """As Caller.refuses, without pytest's own bookkeeping of the exception."""
    try:
        c.do(struct)
    except KernelError as error:
        if error.errno != number:
            raise


def life(c: Caller) -> None:
    a, b = c.ioas(), c.ioas()
    one = c.add_domain(a)
    c.map(a, 0x10000, 8 * P)
    c.map(a, None, P)
    c.copy(b, a, 0x12000, 2 * P)
    c.add_domain(b)
    pins: list[tuple[int, int]] = []

    def unmap(iova: int, length: int) -> None:
        while pins:
            access.unpin_pages(*pins.pop())

    access = Access.create(c.context, AccessOps(True, unmap))
    access.attach(a)
    access.pin_pages(0x10000, P, write=False)
    pins.append((0x10000, P))
    access.read(c.proc.task(), 0x10000, 2 * P, 4)
    refuse(c, errno.EEXIST, map_struct(a, 0x10000, P))
    refuse(c, errno.EFAULT, map_struct(a, 0x50000, P, 0x2000_0000))
    refuse(c, errno.ENOENT, u.iommu_ioas_unmap(ioas_id=a, iova=0x10000, length=P))
    refuse(c, errno.ENOENT, copy_struct(b, a, 0x90000, P))
    c.map(b, 1 << 40, P)
    c.table(a).remove_domain(one)
    for table in (c.table(a), c.table(b)):
        with suppress(KernelError):  # failing is part of it
            table.reserve(0, ULMAX, None)
    c.map(c.ioas(), 1, 1)
    attempts: list[Callable[[], None]] = [
        lambda: access.attach(a),
        lambda: access.replace(99),
        lambda: access.replace(4),
    ]
    for attach in attempts:
        with suppress(KernelError):  # two of them fail
            attach()
    access.replace(b)
    c.unmap(a, 0, ULMAX)
    buffer = TestDmaBuf(c.world, 4)
    c.proc.files[5] = lambda: buffer
    c.proc.files[6] = lambda: FakeFile(c.world, 4)
    for fd in (5, 6):
        c.do(u.iommu_ioas_map_file(flags=6, ioas_id=a, fd=fd, length=2 * P))
    buffer.revoke()
    c.host.poke(ARRAY, bytes(16))
    with suppress(KernelError):  # EADDRINUSE or not
        c.do(u.iommu_ioas_allow_iovas(ioas_id=a, num_iovas=1, allowed_iovas=ARRAY))
    access.destroy_access()
    table = c.table(b)
    table.remove_domain(table.domains[0])
    c.context.put()
    buffer.put()
    c.proc.files.clear()


def test_nothing_is_left_to_the_collector(garbage: Callable[[], list[str]]) -> None:
    c = Caller(caps=[CAP_SYS_RESOURCE])
    life(c)
    left = [kind for kind in garbage() if kind.startswith(("iommufd.", "frame of "))]
    assert not left, "\n".join(left)
