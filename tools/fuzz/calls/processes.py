"""Calls of several processes on one context, and who pays for pinned files."""

from __future__ import annotations

from iommufd.engine.ioas import IOAS
from iommufd.engine.pages import Unsettled
from iommufd.memory.accounting import Mode
from iommufd.memory.space import AddressSpace
from iommufd.uapi import iommufd as u
from tools.fuzz.author import ULMAX, Author
from tools.fuzz.calls import ioas, selftest
from tools.fuzz.program import EXIT, FORK, LIMIT, STATUS, Step


def change_process(a: Author) -> None:
    a.ask(u.iommu_ioas_change_process(reserved=a.wrong(0, 1)))


def fork(a: Author) -> None:
    """A second process, an ordinary user's if the first is; none where forking would change what is contiguous."""
    if a.dirty or a.stage.second is not None:
        return
    a.write(Step(FORK))
    if a.memlock is not None:
        limit_second(a)


def limit_second(a: Author) -> None:
    most = 16 if a.memlock is None else a.memlock
    a.by_second = True
    a.write(Step(LIMIT, numbers=(a.r.choice([pages for pages in (0, 1, 2, 4, 8, 16) if pages <= most]),)))
    a.by_second = False


def by_second(a: Author) -> None:
    """The second process makes a call, or comes into being."""
    if a.stage.second is None:
        fork(a)
        return
    a.by_second = True
    if a.slot not in a.slots:
        a.slot = 0
    a.r.choices(list(_BY_SECOND), list(_BY_SECOND.values()))[0](a)
    a.by_second = False


def exit_second(a: Author) -> None:
    """The second process ends. What it paid for as a process is inherited at once; where that leaves a charge that is
    not settled, everything is unmapped: to pin once more what is pinned already of such a file hangs the kernel
    (docs/deviations.md). If that does not help, the program ends here."""
    if a.stage.second is None:
        return
    space = a.stage.second.owner.space
    a.write(Step(EXIT))
    for slot in sorted({0, 1} & a.slots.keys()):
        a.slot = slot
        context = a.context()
        if context is None or context.account_mode is not Mode.MM:
            continue
        ioases = [obj for obj in context.objects if isinstance(obj, IOAS)]
        if any(unsettled(obj, space) for obj in ioases):
            a.exactly(u.iommu_ioas_change_process())
        if any(unsettled(obj, space) for obj in ioases):
            for obj in ioases:
                a.exactly(u.iommu_ioas_unmap(ioas_id=obj.id, iova=0, length=ULMAX))
        if any(unsettled(obj, space) for obj in ioases):
            a.length = 0


def unsettled(ioas: IOAS, gone: AddressSpace) -> bool:
    """Whether something in ``ioas`` is paid for by the process that is ``gone``, or not by what is pinned."""
    owners = [area.pages.owner for _, _, area in ioas.io_pagetable.areas if area.pages is not None]
    return any(owner.space is gone or isinstance(owner, Unsettled) for owner in owners)


def status(a: Author) -> None:
    """What the process has locked and pinned, which is what it pays for."""
    a.write(Step(STATUS))


_BY_SECOND = {
    change_process: 4,
    status: 2,
    ioas.map: 4,
    ioas.map_file: 4,
    ioas.copy: 2,
    ioas.unmap: 2,
    ioas.ioas_alloc: 1,
    ioas.destroy: 1,
    ioas.ranges: 1,
    ioas.option: 1,
    ioas.noiommu_pa: 1,
    ioas.memory: 2,
    selftest.mock_domain: 2,
    selftest.replace: 2,
    selftest.checks: 2,
    selftest.access_pages: 2,
    selftest.access_rw: 4,
}
CALLS = {change_process: 2, by_second: 2, exit_second: 1, status: 2}
