"""Calls of the mock hardware: devices, accesses, dma-bufs, and what looks inside."""

from __future__ import annotations

from iommufd.uapi import iommufd_test as t
from tools.fuzz.author import ACCESSES, BUFFER, DMABUFS, MEMFDS, QUEUES, ULMAX, Author
from tools.fuzz.program import CLOSE, NEW, PAGE, PEEK, POKE, Step


def mock_domain(a: Author) -> None:
    pt = a.id_of("IOAS", "IOAS", "HWPT_PAGING", "HWPT_NESTED")
    if a.chance(0.5):
        a.ask(t.test_mock_domain(id=pt))
    else:
        a.ask(t.test_mock_domain_flags(id=pt, dev_flags=a.wrong(a.r.choice((0, 1, 4, 5)), 2, 8)))


def replace(a: Author) -> None:
    a.ask(t.test_mock_domain_replace(id=a.id_of("SELFTEST"), pt_id=a.id_of("IOAS", "HWPT_PAGING", "HWPT_NESTED")))


def pasid(a: Author) -> None:
    stdev = a.id_of("SELFTEST")
    number = a.wrong(a.r.choice((1, 1, 2, 1024)), 1 << 20)
    key = (a.slot, stdev)
    what = a.r.randrange(4)
    pt = a.id_of("HWPT_PAGING", "HWPT_NESTED", "IOAS")
    if what == 0:
        if a.ask(t.test_pasid_attach(id=stdev, pasid=number, pt_id=pt)).startswith("0"):
            a.attached.setdefault(key, set()).add(number)
    elif what == 1:
        a.ask(t.test_pasid_replace(id=stdev, pasid=number, pt_id=pt))
    elif what == 2:
        if a.ask(t.test_pasid_detach(id=stdev, pasid=number)).startswith("0"):
            a.attached.get(key, set()).discard(number)
    else:
        a.ask(t.test_pasid_check_hwpt(id=stdev, pasid=a.r.choice((0, number)), hwpt_id=a.r.choice((0, pt))))


def detach_all(a: Author) -> None:
    """A context that closes with a PASID attached leaves the kernel damaged (mock-device 4.1): none does."""
    for (slot, stdev), pasids in sorted(a.attached.items()):
        a.slot = slot
        for number in sorted(pasids):
            a.exactly(t.test_pasid_detach(id=stdev, pasid=number))


def checks(a: Author) -> None:
    ioas, iova, length = a.mapped()
    uptr = a.behind(ioas, iova)
    what = a.r.randrange(5)
    if what < 2:
        length = a.wrong(min(length, 64 * PAGE) // 2048 * 2048, length)
        a.ask(t.test_md_check_map(id=a.hwpt_of(ioas), iova=iova, length=min(length, 64 * PAGE), uptr=uptr))
    elif what == 2:
        a.ask(t.test_md_check_refs(length=PAGE, uptr=uptr - uptr % PAGE, refs=a.r.choice((0, 1, 1, 2))))
    elif what == 3:
        a.ask(
            t.test_md_check_iotlb(
                id=a.id_of("HWPT_NESTED"), arm_id=a.wrong(a.r.randrange(4), 4), iotlb=a.r.randrange(4)
            )
        )
    else:
        a.ask(
            t.test_dev_check_cache(
                id=a.id_of("DEVICE"),
                arm_id=a.wrong(a.r.randrange(4), 4),
                cache=a.r.choice((t.IOMMU_TEST_DEV_CACHE_DEFAULT, 0)),
            )
        )


def add_reserved(a: Author) -> None:
    if a.chance(0.5):
        a.ask(t.test_add_reserved(id=a.id_of("IOAS"), start=a.iova(), length=a.size()))


def create_access(a: Author) -> None:
    slot = a.free_slot(ACCESSES)
    a.ask(t.test_create_access(id=a.id_of("IOAS"), flags=a.wrong(a.r.randrange(2), 2)), out=(slot, 16))


def access_pages(a: Author) -> None:
    ioas, iova, length = a.mapped()
    value = t.test_access_pages(
        flags=a.wrong(a.r.choice((0, 0, 1)), 2, 0x10000),
        iova=iova - iova % PAGE if a.chance(0.8) else iova,
        length=a.wrong(length, 0, (16 << 20) + 1),
        uptr=a.r.choice((0, 0, a.behind(ioas, iova), a.va())),
    )
    a.ask(value, patches=((8, a.used_slot(ACCESSES)),))


def access_rw(a: Author) -> None:
    _, iova, length = a.mapped()
    value = t.test_access_rw(
        iova=iova,
        length=a.wrong(min(length, 4 * PAGE), 0, (16 << 20) + 1),
        uptr=a.wrong(BUFFER + 4 * PAGE, 0, ULMAX),
        flags=a.wrong(a.r.choice((0, 1, 4, 5)), 2, 8, 0x10000),
    )
    a.ask(value, patches=((8, a.used_slot(ACCESSES)),))
    a.write(Step(PEEK, numbers=(BUFFER + 4 * PAGE, 16)))
    if a.chance(0.3):
        a.write(Step(POKE, numbers=(BUFFER + 4 * PAGE,), data=a.r.randbytes(16)))


def access_other(a: Author) -> None:
    access = a.used_slot(ACCESSES)
    if a.chance(0.5):
        a.ask(t.test_access_replace_ioas(ioas_id=a.id_of("IOAS")), patches=((8, access),))
    else:
        a.ask(t.test_destroy_access_pages(access_pages_id=a.r.randrange(4)), patches=((8, access),))


def dmabuf(a: Author) -> None:
    """A new buffer, or one taken back or given again."""
    if a.chance(0.6 if not any(slot in a.slots for slot in DMABUFS) else 0.3):
        length = a.wrong(a.r.choice((PAGE, 4 * PAGE, 8 * PAGE, 100)), 0, (2 << 20) + 1)
        flags = a.r.choice((2, 2, 0, 1, 0o4002))
        a.ask(t.test_dmabuf_get(length=length, open_flags=flags), out=(a.free_slot(DMABUFS), NEW))
        return
    slot = a.used_slot(DMABUFS) if a.chance(0.9) else a.used_slot(MEMFDS, ACCESSES, QUEUES)
    a.ask(t.test_dmabuf_revoke(revoked=a.r.choice((1, 1, 0, 7))), patches=((16, slot),))


def close_file(a: Author) -> None:
    used = [slot for slot in a.r.choice((MEMFDS, ACCESSES, QUEUES, DMABUFS)) if slot in a.slots]
    if used:
        a.write(Step(CLOSE, a.r.choice(used)))


CALLS = {
    mock_domain: 6,
    replace: 6,
    pasid: 8,
    checks: 8,
    add_reserved: 2,
    create_access: 3,
    access_pages: 8,
    access_rw: 6,
    access_other: 3,
    dmabuf: 2,
    close_file: 2,
}
