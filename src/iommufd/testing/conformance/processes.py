"""core 4.13, 5.6, 5.7, 6: several processes on one context, and who pays for pinned pages."""

from __future__ import annotations

from errno import EFAULT, EINVAL, ENOMEM

from iommufd.testing.conformance import check
from iommufd.testing.conformance.access import access_on
from iommufd.testing.conformance.common import APERTURE, ULMAX, ioas_alloc, map_fixed, mock_domain, open_ioas, unmap
from iommufd.testing.subject import PAGE, Subject
from iommufd.uapi import iommufd as u
from iommufd.uapi import iommufd_test as t

SLOW = t.MOCK_ACCESS_RW_SLOW_PATH
RLIMIT_MODE = u.IOMMU_OPTION_RLIMIT_MODE


def map_file(s: Subject, fd: int, ioas: int, file: int, pages: int, iova: int = APERTURE) -> None:
    s.do(fd, u.iommu_ioas_map_file(flags=7, ioas_id=ioas, fd=file, length=pages * PAGE, iova=iova))


def pays(s: Subject, locked: int, pinned: int) -> None:
    """What the process's VmLck and VmPin are, in pages."""
    got = s.pages_locked_and_pinned()
    s.expect(got == (locked, pinned), f"locked and pinned {got}, expected {(locked, pinned)}")


@check("core 5.6 other process", "devices 8.7 copy row 4", "mock 6.6 row 7", needs="processes")
def another_process_reads_and_writes(s: Subject) -> None:
    """Memory is the mapper's, whoever asks: what the mapper has there now, one page; what is pinned, several."""
    fd, ioas = open_ioas(s)
    s.poke(s.page(0), b"parent" + bytes(PAGE - 6) + b"second")
    map_fixed(s, fd, ioas, s.page(0), 2 * PAGE, APERTURE)
    access = access_on(s, fd, ioas)
    child = s.fork()
    child.poke(s.page(0), b"child!")
    rw = t.test_access_rw
    for length, flags in ((6, 0), (6, SLOW), (PAGE + 6, 0)):
        child.do(fd, rw(id=access, iova=APERTURE, length=length, uptr=child.page(8), flags=flags))
        s.expect(child.peek(child.page(8), 6) == b"parent", "the mapper's bytes, in the child's memory")
    s.expect(child.peek(child.page(9), 6) == b"second", "both pages")
    child.poke(child.page(8), b"from the child")
    child.do(fd, rw(id=access, iova=APERTURE + 1, length=14, uptr=child.page(8), flags=1))
    s.expect(s.peek(s.page(0), 15) == b"pfrom the child", "written there")
    s.do(fd, t.test_access_pages(id=access, iova=APERTURE, length=2 * PAGE))
    s.mmap(s.page(0), 2 * PAGE)
    s.poke(s.page(0), b"fresh")
    child.do(fd, rw(id=access, iova=APERTURE, length=5, uptr=child.page(8)))
    s.expect(child.peek(child.page(8), 5) == b"fresh", "one page: what is there now")
    child.do(fd, rw(id=access, iova=APERTURE, length=PAGE + 5, uptr=child.page(8)))
    s.expect(child.peek(child.page(8), 5) == b"pfrom", "more: what is pinned")
    s.munmap(s.page(0), PAGE)
    answer = child.ask(fd, rw(id=access, iova=APERTURE, length=5, uptr=child.page(8)))
    s.expect(answer.errno == EFAULT, "nothing is there now")


@check("core 5.7 exit", "core 5.5 user", needs="processes")
def a_mapper_that_exits(s: Subject) -> None:
    """What it had pinned stays, what it had not cannot be pinned any more; a file can."""
    fd, ioas = open_ioas(s)
    _, hwpt, _ = mock_domain(s, fd, ioas)
    spare, files = ioas_alloc(s, fd), ioas_alloc(s, fd)
    access = access_on(s, fd, ioas, 0)
    file = s.memfd(PAGE)
    child = s.fork()
    child.poke(child.page(0), b"of the child")
    map_fixed(child, fd, ioas, child.page(0), PAGE, APERTURE)
    map_fixed(child, fd, spare, child.page(1), PAGE, APERTURE)
    map_file(child, fd, files, file, 1)
    s.do(fd, t.test_access_rw(id=access, iova=APERTURE, length=12, uptr=s.page(8)))
    s.expect(s.peek(s.page(8), 12) == b"of the child", "while it lives")
    child.exit()
    s.do(fd, t.test_access_rw(id=access, iova=APERTURE, length=12, uptr=s.page(9)))
    s.expect(s.peek(s.page(9), 12) == b"of the child", "from the page that is pinned")
    s.refuses(EFAULT, fd, t.test_mock_domain(id=spare))
    mock_domain(s, fd, files)
    s.mmap(s.page(4), PAGE, fd=file, shared=True)
    _, other, _ = mock_domain(s, fd, files)
    s.do(fd, t.test_md_check_map(id=other, iova=APERTURE, length=PAGE, uptr=s.page(4)))
    lone = access_on(s, fd, spare, 0)
    s.refuses(EFAULT, fd, t.test_access_rw(id=lone, iova=APERTURE, length=1, uptr=s.page(8)))
    unmap(s, fd, ioas, APERTURE, PAGE)
    s.refuses(EINVAL, fd, t.test_md_check_map(id=hwpt, iova=APERTURE, length=PAGE, uptr=s.page(8)))


@check("core 5.7 fork", needs="processes")
def a_fork_leaves_the_pinned_page_with_the_parent(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    s.poke(s.page(0), b"before")
    s.mmap(s.page(1), PAGE, shared=True)
    s.poke(s.page(1), b"shared")
    map_fixed(s, fd, ioas, s.page(0), 2 * PAGE, APERTURE)
    _, hwpt, _ = mock_domain(s, fd, ioas)
    child = s.fork()
    s.poke(s.page(0), b"after!")
    s.do(fd, t.test_md_check_map(id=hwpt, iova=APERTURE, length=2 * PAGE, uptr=s.page(0)))
    s.expect(child.peek(child.page(0), 6) == b"before", "the child has a copy")
    answer = child.ask(fd, t.test_md_check_map(id=hwpt, iova=APERTURE, length=PAGE, uptr=child.page(0)))
    s.expect(answer.errno == EINVAL, "which is another page")
    child.do(fd, t.test_md_check_map(id=hwpt, iova=APERTURE + PAGE, length=PAGE, uptr=child.page(1)))
    child.do(fd, t.test_md_check_refs(length=PAGE, uptr=child.page(0), refs=0))
    child.do(fd, t.test_md_check_refs(length=PAGE, uptr=child.page(1), refs=1))


@check("core 6.1 none", "core 6.1 user", "core 6.2", needs="capabilities")
def the_user_pays_for_pages_that_are_pinned(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    with s.without_capabilities(), s.memlock(3):
        map_fixed(s, fd, ioas, s.page(0), 4 * PAGE, APERTURE)
        pays(s, 0, 0)
        s.refuses(ENOMEM, fd, t.test_mock_domain(id=ioas))
        pays(s, 0, 0)
        unmap(s, fd, ioas, APERTURE, 4 * PAGE)
        map_fixed(s, fd, ioas, s.page(0), 2 * PAGE, APERTURE)
        mock_domain(s, fd, ioas)
        pays(s, 0, 2)
        asked = u.iommu_ioas_map(flags=7, ioas_id=ioas, user_va=s.page(4), length=2 * PAGE, iova=APERTURE + 8 * PAGE)
        s.refuses(ENOMEM, fd, asked)
        copy = u.iommu_ioas_copy(
            flags=7, dst_ioas_id=ioas, src_ioas_id=ioas, length=PAGE, src_iova=APERTURE, dst_iova=APERTURE + 8 * PAGE
        )
        s.do(fd, copy)
        access = access_on(s, fd, ioas)
        s.do(fd, t.test_access_pages(id=access, iova=APERTURE, length=2 * PAGE))
        pays(s, 0, 2)
        other = s.open()
        second = ioas_alloc(s, other)
        mock_domain(s, other, second)
        map_fixed(s, other, second, s.page(4), PAGE, APERTURE)
        pays(s, 0, 3)
        asked.ioas_id, asked.length = second, PAGE
        s.refuses(ENOMEM, other, asked)
        unmap(s, fd, ioas, 0, ULMAX)
        pays(s, 0, 1)
        s.do(other, asked)
    map_fixed(s, fd, ioas, s.page(0), 16 * PAGE, APERTURE)
    pays(s, 0, 18)
    s.close(other)
    unmap(s, fd, ioas, 0, ULMAX)
    pays(s, 0, 0)


@check("core 6.1 mm", "core 3 rlimit row 5", needs="capabilities")
def the_address_space_pays_in_the_other_mode(s: Subject) -> None:
    fd = s.open()
    s.do(fd, u.iommu_option(option_id=RLIMIT_MODE, op=0, val64=1))
    ioas = ioas_alloc(s, fd)
    mock_domain(s, fd, ioas)
    with s.without_capabilities(), s.memlock(3):
        map_fixed(s, fd, ioas, s.page(0), 2 * PAGE, APERTURE)
        pays(s, 2, 2)
        s.refuses(
            ENOMEM,
            fd,
            u.iommu_ioas_map(flags=7, ioas_id=ioas, user_va=s.page(4), length=2 * PAGE, iova=APERTURE + 8 * PAGE),
        )
        pays(s, 2, 2)
    map_fixed(s, fd, ioas, s.page(4), PAGE, APERTURE + 8 * PAGE)
    pays(s, 2, 3)
    unmap(s, fd, ioas, 0, ULMAX)
    pays(s, 0, 0)


@check("core 4.13 row 5", "core 4.13 row 6", needs="capabilities processes")
def the_charge_changes_its_process(s: Subject) -> None:
    """One user pays for both while it moves; what the new process may lock decides."""
    fd, ioas = open_ioas(s)
    mock_domain(s, fd, ioas)
    file = s.memfd(4 * PAGE)
    with s.without_capabilities():
        map_file(s, fd, ioas, file, 4)
        pays(s, 0, 4)
        child = s.fork()
        with child.memlock(7):
            answer = child.ask(fd, u.iommu_ioas_change_process())
            s.expect(answer.errno == ENOMEM, "old and new together are one too many")
        pays(s, 0, 4)
        pays(child, 0, 0)
        with child.memlock(8):
            child.do(fd, u.iommu_ioas_change_process())
        pays(s, 0, 0)
        pays(child, 0, 4)
        child.do(fd, u.iommu_ioas_change_process())
        pays(child, 0, 4)
        s.do(fd, u.iommu_ioas_change_process())
        pays(s, 0, 4)
    unmap(s, fd, ioas, APERTURE, 4 * PAGE)
    pays(s, 0, 0)
    pays(child, 0, 0)


@check("core 4.13 quirks", needs="capabilities processes")
def changing_process_after_the_payer_went(s: Subject) -> None:
    """MM mode: EINVAL although everything moved; the second call is fine, and the charge never ends."""
    fd = s.open()
    s.do(fd, u.iommu_option(option_id=RLIMIT_MODE, op=0, val64=1))
    ioas = ioas_alloc(s, fd)
    mock_domain(s, fd, ioas)
    file = s.memfd(2 * PAGE)
    payer, heir = s.fork(), s.fork()
    with payer.without_capabilities():
        map_file(payer, fd, ioas, file, 2)
        pays(payer, 2, 2)
    payer.exit()
    with heir.without_capabilities():
        answer = heir.ask(fd, u.iommu_ioas_change_process())
        s.expect(answer.errno == EINVAL, "there is nobody to take the charge from")
        pays(heir, 2, 2)
        heir.do(fd, u.iommu_ioas_change_process())
    unmap(s, fd, ioas, APERTURE, 2 * PAGE)
    pays(heir, 2, 2)


@check("core 6.2 exit", needs="capabilities processes")
def a_users_charge_outlives_the_process(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    mock_domain(s, fd, ioas)
    child = s.fork()
    with child.without_capabilities():
        map_fixed(child, fd, ioas, child.page(0), 2 * PAGE, APERTURE)
    child.exit()
    with s.without_capabilities(), s.memlock(3):
        more = u.iommu_ioas_map(flags=7, ioas_id=ioas, user_va=s.page(4), length=2 * PAGE, iova=APERTURE + 8 * PAGE)
        s.refuses(ENOMEM, fd, more)
        unmap(s, fd, ioas, APERTURE, 2 * PAGE)
        s.do(fd, more)
        pays(s, 0, 2)


@check("core 6.2 exit", needs="capabilities processes")
def a_process_that_exited_still_pays(s: Subject) -> None:
    """MM mode: within the limit it had. What is unpinned then stays charged, until the same mapping is pinned anew."""
    fd = s.open()
    s.do(fd, u.iommu_option(option_id=RLIMIT_MODE, op=0, val64=1))
    ioas = ioas_alloc(s, fd)
    access = access_on(s, fd, ioas)
    file = s.memfd(8 * PAGE)
    other = APERTURE + 8 * PAGE
    payer = s.fork()
    payer.system.set_capabilities((0, 0))
    payer.system.limit_memlock(4 * PAGE)
    map_file(payer, fd, ioas, file, 4)
    map_file(payer, fd, ioas, file, 4, other)

    def pin(pages: int, iova: int = APERTURE) -> t.test_access_pages:
        return t.test_access_pages(id=access, iova=iova, length=pages * PAGE)

    def unpin(item: int) -> None:
        s.do(fd, t.test_destroy_access_pages(id=access, access_pages_id=item))

    item = s.do(fd, pin(4)).out_access_pages_id
    pays(payer, 4, 4)
    payer.exit()
    s.refuses(ENOMEM, fd, pin(1, other))
    unpin(item)
    s.refuses(ENOMEM, fd, pin(1, other))
    unpin(s.do(fd, pin(4)).out_access_pages_id)
    s.refuses(ENOMEM, fd, pin(1, other))
    s.do(fd, pin(2))
    s.do(fd, pin(2, other))
    s.refuses(ENOMEM, fd, pin(1, other + 2 * PAGE))
    s.expect(unmap(s, fd, ioas, 0, ULMAX) == 8 * PAGE, "nothing holds it")
