"""core 3: IOMMU_OPTION."""

from __future__ import annotations

from errno import EADDRINUSE, EBUSY, EFAULT, EINVAL, ENOENT, EOPNOTSUPP, EPERM
from mmap import PROT_READ

from iommufd.testing.conformance import check
from iommufd.testing.conformance.common import APERTURE, free_ranges, ioas_alloc, map_fixed, mock_domain, open_ioas
from iommufd.testing.subject import PAGE, Subject
from iommufd.uapi import iommufd as u

RLIMIT_MODE, HUGE_PAGES = u.IOMMU_OPTION_RLIMIT_MODE, u.IOMMU_OPTION_HUGE_PAGES
SET, GET = u.IOMMU_OPTION_OP_SET, u.IOMMU_OPTION_OP_GET


@check("core 3 row 3", "core 3 row 1", "core 3 row 2")
def reserved_and_unknown_options(s: Subject) -> None:
    fd = s.open()
    s.refuses(EOPNOTSUPP, fd, u.iommu_option(option_id=RLIMIT_MODE, op=GET, reserved=1))
    for option in (2, 99, 2**32 - 1):
        s.refuses(EOPNOTSUPP, fd, u.iommu_option(option_id=option, op=GET))


@check("core 3 rlimit row 1", "core 3 rlimit row 2", "core 3 rlimit row 6")
def rlimit_mode_reads(s: Subject) -> None:
    fd = s.open()
    s.refuses(EOPNOTSUPP, fd, u.iommu_option(option_id=RLIMIT_MODE, op=GET, object_id=1))
    s.expect(s.do(fd, u.iommu_option(option_id=RLIMIT_MODE, op=GET, val64=5)).val64 == 0, "user mode by default")
    s.refuses(EOPNOTSUPP, fd, u.iommu_option(option_id=RLIMIT_MODE, op=2))


@check("core 3 rlimit row 4", "core 3 rlimit row 5", needs="root")
def rlimit_mode_is_set_while_nothing_exists(s: Subject) -> None:
    fd = s.open()
    s.do(fd, u.iommu_option(option_id=RLIMIT_MODE, op=SET, val64=1))
    s.expect(s.do(fd, u.iommu_option(option_id=RLIMIT_MODE, op=GET)).val64 == 1, "it reads back")
    s.refuses(EINVAL, fd, u.iommu_option(option_id=RLIMIT_MODE, op=SET, val64=2))
    ioas = ioas_alloc(s, fd)
    s.refuses(EBUSY, fd, u.iommu_option(option_id=RLIMIT_MODE, op=SET, val64=2))
    s.refuses(EBUSY, fd, u.iommu_option(option_id=RLIMIT_MODE, op=SET, val64=0))
    s.do(fd, u.iommu_destroy(id=ioas))
    s.do(fd, u.iommu_option(option_id=RLIMIT_MODE, op=SET, val64=0))


@check("core 3 row 3", "core 3 huge row 1", "core 3 huge row 2", "core 3 huge row 8", "core 3 huge row 9")
def huge_pages_reads_and_refuses(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    for bad in (u.iommu_option(op=7), u.iommu_option(op=SET, val64=9), u.iommu_option(op=GET)):
        bad.option_id, bad.object_id = HUGE_PAGES, 99
        s.refuses(ENOENT, fd, bad)
    s.expect(s.do(fd, u.iommu_option(option_id=HUGE_PAGES, op=GET, object_id=ioas)).val64 == 1, "on by default")
    s.refuses(EINVAL, fd, u.iommu_option(option_id=HUGE_PAGES, op=SET, object_id=ioas, val64=2))
    s.refuses(EOPNOTSUPP, fd, u.iommu_option(option_id=HUGE_PAGES, op=2, object_id=ioas))


@check("core 3 huge row 3", "core 3 huge row 6", "core 3 huge row 7")
def huge_pages_off_raises_the_alignment(s: Subject) -> None:
    fd, ioas = open_ioas(s)

    def switch(value: int) -> None:
        s.do(fd, u.iommu_option(option_id=HUGE_PAGES, op=SET, object_id=ioas, val64=value))

    switch(0)
    s.expect(free_ranges(s, fd, ioas)[1] == PAGE, "alignment PAGE_SIZE")
    switch(0)
    s.expect(s.do(fd, u.iommu_option(option_id=HUGE_PAGES, op=GET, object_id=ioas)).val64 == 0, "it reads back")
    switch(1)
    s.expect(free_ranges(s, fd, ioas)[1] == 1, "alignment 1 again")


@check("core 3 huge row 4", "core 3 huge row 7")
def huge_pages_cannot_be_taken_from_a_filled_domain(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    mock_domain(s, fd, ioas)
    off = u.iommu_option(option_id=HUGE_PAGES, op=SET, object_id=ioas, val64=0)
    map_fixed(s, fd, ioas, s.page(0), PAGE, APERTURE)
    s.refuses(EINVAL, fd, off)
    s.do(fd, u.iommu_option(option_id=HUGE_PAGES, op=SET, object_id=ioas, val64=1))
    s.do(fd, u.iommu_ioas_unmap(ioas_id=ioas, iova=APERTURE, length=PAGE))
    s.do(fd, off)
    s.expect(free_ranges(s, fd, ioas)[1] == PAGE, "with a domain and no area it works")


@check("core 3 huge row 5")
def huge_pages_off_needs_conforming_areas(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    map_fixed(s, fd, ioas, s.page(0) + 0x800, 0x800, 0x800)
    s.refuses(EADDRINUSE, fd, u.iommu_option(option_id=HUGE_PAGES, op=SET, object_id=ioas, val64=0))
    s.expect(s.do(fd, u.iommu_option(option_id=HUGE_PAGES, op=GET, object_id=ioas)).val64 == 1, "unchanged")
    s.expect(free_ranges(s, fd, ioas)[1] == 1, "alignment unchanged")


@check("core 3 row 4")
def the_effect_stays_when_the_answer_faults(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    page = s.page(40)
    s.poke(page, u.iommu_option(size=24, option_id=HUGE_PAGES, op=SET, object_id=ioas, val64=0).pack())
    s.mprotect(page, PAGE, PROT_READ)
    s.expect(s.ioctl(fd, 0x3B87, at=page, poke=False).errno == EFAULT, "val64 cannot be written")
    s.expect(s.do(fd, u.iommu_option(option_id=HUGE_PAGES, op=GET, object_id=ioas)).val64 == 0, "but it was set")


@check("core 3 rlimit row 3", needs="capabilities")
def the_rlimit_mode_is_not_everybodys(s: Subject) -> None:
    fd = s.open()
    with s.without_capabilities():
        s.refuses(EPERM, fd, u.iommu_option(option_id=RLIMIT_MODE, op=SET, val64=2))
        ioas_alloc(s, fd)
        s.refuses(EPERM, fd, u.iommu_option(option_id=RLIMIT_MODE, op=SET, val64=2))
        s.do(fd, u.iommu_option(option_id=RLIMIT_MODE, op=GET))
    s.refuses(EBUSY, fd, u.iommu_option(option_id=RLIMIT_MODE, op=SET, val64=2))
