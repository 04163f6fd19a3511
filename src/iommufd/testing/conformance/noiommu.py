"""core 4.14, devices 9: a device that no IOMMU is in front of, on a system with the test hardware too."""

from __future__ import annotations

from errno import EINVAL, ENODEV, ENOENT, EOPNOTSUPP, EOVERFLOW, EPERM

from iommufd.testing.conformance import check
from iommufd.testing.conformance.common import (
    ULMAX,
    free_ranges,
    ioas_alloc,
    map_fixed,
    mock_domain,
    open_ioas,
    unmap,
    unwritable,
)
from iommufd.testing.conformance.devices import DIRTY, FAULT, NEST, PASID
from iommufd.testing.conformance.vfio_compat import CHECK_EXTENSION, SET_IOMMU, map_dma, ok, value
from iommufd.testing.conformance.vfio_devices import attach, bind, bound, detach, hwpt, wants
from iommufd.testing.conformance.vfio_groups import GET_DEVICE_FD, set_container, status
from iommufd.testing.subject import PAGE, Subject, filled
from iommufd.uapi import iommufd as u
from iommufd.uapi import iommufd_test as t

DEVICE = "noiommu-vfio0"
PHYS = (32, 8)  # where out_phys is: two systems agree on nothing there but the offset in its page


def get_pa(s: Subject, fd: int, ioas: int, iova: int, length: int) -> tuple[int, int]:
    """NOIOMMU_GET_PA: (length, address); the address is not in the transcript."""
    asked = u.iommu_ioas_noiommu_get_pa(ioas_id=ioas, iova=iova, length=length)
    answer = s.ioctl(fd, 0x3B95, filled(asked).pack(), hide=(PHYS,))
    s.expect(answer.result == 0, f"NOIOMMU_GET_PA failed with errno {answer.errno}")
    out = type(asked).unpack(answer.out)
    return out.length, out.out_phys


@check("devices 5 row 5", "devices 2.1 row 2", "devices 9.1", "devices 11.1", needs="noiommu capabilities")
def it_is_bound_by_who_may(s: Subject) -> None:
    iommufd = s.open()
    with s.without_capabilities():
        s.open_fails(EPERM, f"/dev/vfio/devices/{DEVICE}")
    fd, dev = bound(s, DEVICE, iommufd)
    s.expect(dev == 1, "it has the first id")
    other = s.open(f"/dev/vfio/devices/{DEVICE}")
    bind(s, other, iommufd, EINVAL)
    s.refuses(EOPNOTSUPP, iommufd, u.iommu_hw_info(dev_id=dev))
    s.close(fd)
    bind(s, other, s.open())


@check("devices 9.2", "devices 3.2 row 8", "devices 3.6 row 7", needs="noiommu")
def attaching_is_bookkeeping(s: Subject) -> None:
    iommufd, ioas = open_ioas(s)
    fd, dev = bound(s, DEVICE, iommufd)
    s.poke(s.page(0), b"x" * PAGE)
    map_fixed(s, iommufd, ioas, s.page(0), PAGE, 0x1000)
    auto = attach(s, fd, ioas)
    s.do(iommufd, t.test_md_check_refs(length=PAGE, uptr=s.page(0), refs=1))
    s.expect(free_ranges(s, iommufd, ioas) == ([(0, ULMAX)], PAGE), "no window, no end, whole pages")
    attach(s, fd, ioas, EINVAL, pasid=1)
    manual = hwpt(s, iommufd, dev, ioas)
    s.expect(attach(s, fd, manual) == manual, "replaced")
    s.refuses(ENOENT, iommufd, u.iommu_destroy(id=auto))
    detach(s, fd)
    s.do(iommufd, u.iommu_destroy(id=manual))
    s.do(iommufd, t.test_md_check_refs(length=PAGE, uptr=s.page(0), refs=0))


@check("devices 5 row 5", "devices 9.2", "devices 4.3 row 1", needs="noiommu")
def page_tables_of_no_hardware(s: Subject) -> None:
    iommufd, ioas = open_ioas(s)
    _, dev = bound(s, DEVICE, iommufd)
    queue = s.do(iommufd, u.iommu_fault_alloc()).out_fault_id
    for flags in (NEST, PASID, DIRTY, NEST | DIRTY, 16):
        s.refuses(EOPNOTSUPP, iommufd, u.iommu_hwpt_alloc(flags=flags, dev_id=dev, pt_id=ioas, fault_id=queue))
    s.refuses(
        EOPNOTSUPP,
        iommufd,
        u.iommu_hwpt_alloc(dev_id=dev, pt_id=ioas, data_type=0xDEAD, data_len=8, data_uptr=s.page(9)),
    )
    s.do(iommufd, u.iommu_hwpt_alloc(flags=FAULT, dev_id=dev, pt_id=ioas, fault_id=queue))
    parent = hwpt(s, iommufd, dev, ioas)
    s.refuses(
        EOPNOTSUPP,
        iommufd,
        u.iommu_hwpt_alloc(dev_id=dev, pt_id=parent, data_type=0xDEAD, data_len=4, data_uptr=s.page(9)),
    )
    s.refuses(EOPNOTSUPP, iommufd, u.iommu_viommu_alloc(type=t.IOMMU_VIOMMU_TYPE_SELFTEST, dev_id=dev, hwpt_id=parent))
    s.refuses(EOPNOTSUPP, iommufd, u.iommu_hwpt_set_dirty_tracking(flags=1, hwpt_id=parent))


@check("devices 9.2", "devices 3.3 row 3", needs="noiommu")
def page_tables_of_others(s: Subject) -> None:
    """It takes anybody's page table; a mock device, like any other, is refused on its one."""
    iommufd, ioas = open_ioas(s)
    fd, dev = bound(s, DEVICE, iommufd)
    own = hwpt(s, iommufd, dev, ioas)
    s.refuses(EINVAL, iommufd, t.test_mock_domain(id=own))
    _, theirs, _ = mock_domain(s, iommufd, ioas)
    s.expect(attach(s, fd, theirs) == theirs, "a mock page table by its id")
    attach(s, fd, own)
    detach(s, fd)
    s.expect(attach(s, fd, ioas) == theirs, "an automatic one, whose it ever is")


@check(
    *(f"devices 9.3 row {n}" for n in range(1, 7)),
    *(f"core 4.14 row {n}" for n in range(1, 7)),
    needs="noiommu capabilities",
)
def get_pa_refuses(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    get = u.iommu_ioas_noiommu_get_pa
    with s.without_capabilities():
        s.refuses(EPERM, fd, get(flags=1, ioas_id=99))
    for bad in (get(flags=1, ioas_id=99), get(reserved=1, ioas_id=99)):
        s.refuses(EOPNOTSUPP, fd, bad)
    s.refuses(EINVAL, fd, get(ioas_id=99, iova=ULMAX))
    s.refuses(EOVERFLOW, fd, get(ioas_id=99, iova=ULMAX, length=1))
    s.refuses(ENOENT, fd, get(ioas_id=99, length=1))
    s.refuses(ENOENT, fd, get(ioas_id=ioas, length=1))
    map_fixed(s, fd, ioas, s.page(0), PAGE, 0x1000)
    for iova in (0xFFF, 0x2000):
        s.refuses(ENOENT, fd, get(ioas_id=ioas, iova=iova, length=PAGE))


@check("devices 9.3 row 7", "devices 9.3 row 8", "core 4.14 row 7", "core 4.14 row 8", needs="noiommu")
def get_pa_of_what_has_none(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    device, _ = bound(s, DEVICE, fd)
    map_fixed(s, fd, ioas, s.page(0), PAGE, 0x1000000)
    asked = u.iommu_ioas_noiommu_get_pa(ioas_id=ioas, iova=0x1000000, length=1)
    s.refuses(EOPNOTSUPP, fd, asked)
    mock, _, _ = mock_domain(s, fd, ioas)
    s.refuses(EOPNOTSUPP, fd, asked)
    s.do(fd, u.iommu_destroy(id=mock))
    attach(s, device, ioas)
    get_pa(s, fd, ioas, 0x1000000, 1)
    buffer = s.dma_buf(fd, PAGE)
    s.do(fd, u.iommu_ioas_map_file(flags=7, ioas_id=ioas, fd=buffer, length=PAGE, iova=0x2000000))
    s.expect(get_pa(s, fd, ioas, 0x2000000, 2 * PAGE)[0] == PAGE, "a dma-buf")
    for revoked in (1, 0):
        s.do(fd, t.test_dmabuf_revoke(dmabuf_fd=buffer, revoked=revoked))
    s.ask(fd, u.iommu_ioas_noiommu_get_pa(ioas_id=ioas, iova=0x2000000, length=1))
    s.do(fd, t.test_dmabuf_revoke(dmabuf_fd=buffer, revoked=1))
    s.refuses(EINVAL, fd, u.iommu_ioas_noiommu_get_pa(ioas_id=ioas, iova=0x2000000, length=1))


@check("devices 9.3 row 9", "core 4.14 row 9", needs="noiommu")
def get_pa_within_a_page(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    device, _ = bound(s, DEVICE, fd)
    attach(s, device, ioas)
    map_fixed(s, fd, ioas, s.page(0), PAGE, 0x1000)
    map_fixed(s, fd, ioas, s.page(1), PAGE, 0x2000)
    first = get_pa(s, fd, ioas, 0x1000, PAGE)
    s.expect(first[0] == PAGE and first[1] % PAGE == 0, "a page")
    for iova, length, got in ((0x1000, 1, 1), (0x1123, ULMAX, PAGE - 0x123), (0x1FFF, 2, 1), (0x1800, 0x800, 0x800)):
        s.expect(get_pa(s, fd, ioas, iova, length) == (got, first[1] + iova - 0x1000), f"{iova:#x}, {length:#x} bytes")
    s.expect(get_pa(s, fd, ioas, 0x2000, PAGE)[1] != first[1], "another page")
    unwritable(s, fd, u.iommu_ioas_noiommu_get_pa(ioas_id=ioas, iova=0x1000, length=1))
    other = ioas_alloc(s, fd)
    s.do(fd, u.iommu_ioas_copy(flags=7, dst_ioas_id=other, src_ioas_id=ioas, length=PAGE, src_iova=0x1000, dst_iova=0))
    attach(s, device, other)
    s.expect(get_pa(s, fd, other, 0, PAGE) == first, "a copy is the same page")
    unmap(s, fd, ioas, 0x1000, PAGE)


@check("devices 9.3 row 9", "core 4.14 row 9", needs="noiommu hugepages")
def get_pa_of_contiguous_memory(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    device, _ = bound(s, DEVICE, fd)
    attach(s, device, ioas)
    huge = 2 << 20
    memfd = s.memfd(huge, flags=4)  # MFD_HUGETLB
    for iova in (huge, 2 * huge, 4 * huge + PAGE):
        s.do(fd, u.iommu_ioas_map_file(flags=7, ioas_id=ioas, fd=memfd, length=huge, iova=iova))
    length, start = get_pa(s, fd, ioas, huge, 4 * huge)
    s.expect(length == huge and start % huge == 0, "it ends with its area, though the next one is there")
    for offset, wanted, got in (
        (0x1234, huge, huge - 0x1234),
        (PAGE, PAGE + 1, PAGE + 1),
        (5, 3 * PAGE, 3 * PAGE),
        (5, PAGE, PAGE),
        (PAGE - 1, PAGE, PAGE),
    ):
        for iova in (huge, 2 * huge, 4 * huge + PAGE):
            s.expect(get_pa(s, fd, ioas, iova + offset, wanted) == (got, start + offset), f"{wanted:#x} at {offset:#x}")


@check("vfio 9.1 row 6", "vfio 9.1 row 7", "vfio 5 row 1", "vfio 10.1", "vfio 9.2", needs="noiommu capabilities")
def a_group_without_iommu(s: Subject) -> None:
    """It puts the context into no-IOMMU mode, for good."""
    iommufd, ioas = open_ioas(s)
    with s.without_capabilities():
        s.open_group(DEVICE, EPERM)
    group = s.open_group(DEVICE)
    s.do(iommufd, u.iommu_vfio_ioas(op=1, ioas_id=ioas))
    set_container(s, group, iommufd, EINVAL)
    s.expect(value(s, iommufd, SET_IOMMU, 8).errno == EINVAL, "not in this mode yet")
    s.do(iommufd, u.iommu_vfio_ioas(op=2))
    set_container(s, group, iommufd)
    status(s, group, 3)
    for extension in range(12):
        value(s, iommufd, CHECK_EXTENSION, extension)
    with s.without_capabilities():
        s.expect(value(s, iommufd, SET_IOMMU, 8).errno == EPERM, "not everybody's")
    for _ in range(2):
        ok(s, value(s, iommufd, SET_IOMMU, 8))
    for kind in (0, 1, 2, 3, 4, 2**32 + 8):
        s.expect(value(s, iommufd, SET_IOMMU, kind).errno == EINVAL, f"type {kind}")
    s.expect(map_dma(s, iommufd, s.page(0), 0, PAGE).errno == ENODEV, "no IOAS")
    with s.without_capabilities():
        wants(s, EPERM, s.ioctl(group, GET_DEVICE_FD, b"0000:00:04.0\0").errno, "GET_DEVICE_FD")
    device = s.ioctl(group, GET_DEVICE_FD, b"0000:00:04.0\0")
    ok(s, device)
    s.expect(ioas_alloc(s, iommufd) == ioas + 1, "nothing was bound")
    s.close(device.result)
    s.do(iommufd, u.iommu_vfio_ioas(op=1, ioas_id=ioas))
    wants(s, EPERM, s.ioctl(group, GET_DEVICE_FD, b"0000:00:04.0\0").errno, "GET_DEVICE_FD beside an IOAS")
    ok(s, map_dma(s, iommufd, s.page(0), 0, PAGE))
    s.expect(value(s, iommufd, CHECK_EXTENSION, 1).result == 0, "the mode stays")
