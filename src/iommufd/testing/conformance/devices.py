"""devices 2-5, mock 3-4: attach, replace, detach, HWPT_ALLOC, PASID, GET_HW_INFO on mock devices."""

from __future__ import annotations

from errno import EADDRINUSE, EBUSY, EFAULT, EINVAL, ENOENT, ENOMEM, EOPNOTSUPP

from iommufd.testing.conformance import check
from iommufd.testing.conformance.common import APERTURE, free_ranges, ioas_alloc, map_fixed, mock_domain, open_ioas
from iommufd.testing.subject import PAGE, SCRATCH, Subject
from iommufd.uapi import iommufd as u
from iommufd.uapi import iommufd_test as t

DATA = SCRATCH + 8 * PAGE
NEST, DIRTY, FAULT, PASID = 1, 2, 4, 8
SELFTEST = t.IOMMU_HWPT_DATA_SELFTEST


def hwpt_alloc(
    s: Subject, fd: int, device: int, pt: int, flags: int = 0, data: bytes = b"", kind: int | None = None
) -> int:
    return s.do(fd, hwpt_request(s, device, pt, flags, data, kind)).out_hwpt_id


def hwpt_request(
    s: Subject, device: int, pt: int, flags: int = 0, data: bytes = b"", kind: int | None = None
) -> u.iommu_hwpt_alloc:
    if data:
        s.poke(DATA, data)
    return u.iommu_hwpt_alloc(
        flags=flags,
        dev_id=device,
        pt_id=pt,
        data_type=(SELFTEST if data else 0) if kind is None else kind,
        data_len=len(data),
        data_uptr=DATA if data else 0,
    )


def device(s: Subject, fd: int, pt: int, flags: int) -> tuple[int, int, int]:
    """A mock device with ``dev_flags``: (stdev, hwpt, device)."""
    out = s.do(fd, t.test_mock_domain_flags(id=pt, dev_flags=flags))
    return out.out_stdev_id, out.out_hwpt_id, out.out_idev_id


@check(
    "devices 3.1 row 1",
    "devices 3.1 row 2",
    "devices 3.1 row 4",
    "mock 3 attach row 1",
    "mock 3 attach row 2",
    "mock 4.1 row 4",
)
def attach_wants_an_ioas_or_a_hwpt(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    s.refuses(ENOENT, fd, t.test_mock_domain(id=99))
    stdev, hwpt, dev = mock_domain(s, fd, ioas)
    for bad in (stdev, dev):
        s.refuses(EINVAL, fd, t.test_mock_domain(id=bad))
    other = mock_domain(s, fd, hwpt)
    s.expect(other[1] == hwpt, "a HWPT id is given back unchanged")


@check("mock 4.1 row 2", "mock 4.1 row 5")
def device_flags(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    for flags in (2, 8, 2**31):
        s.refuses(EINVAL, fd, t.test_mock_domain_flags(id=99, dev_flags=flags))
    s.expect(device(s, fd, ioas, 5)[0] == 2, "both legal flags")


@check("devices 3.5 row 1", "devices 3.5 row 2", "devices 3.5 consequences", "core 2.7")
def automatic_hwpts_are_shared_and_go(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    first, second = mock_domain(s, fd, ioas), mock_domain(s, fd, ioas)
    s.expect(first[1] == second[1], "one automatic HWPT serves both")
    s.do(fd, u.iommu_destroy(id=first[0]))
    s.refuses(EBUSY, fd, u.iommu_destroy(id=first[1]))
    s.do(fd, u.iommu_destroy(id=second[0]))
    s.refuses(ENOENT, fd, u.iommu_destroy(id=first[1]))
    s.do(fd, u.iommu_destroy(id=ioas))


@check("devices 3.6 row 2", "devices 3.6 row 3", "devices 3.6 row 11", "mock 4.2", "devices 3.5 row 3b")
def replacing(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    other = ioas_alloc(s, fd)
    stdev, hwpt, _ = mock_domain(s, fd, ioas)
    s.refuses(ENOENT, fd, t.test_mock_domain_replace(id=99, pt_id=ioas))
    s.refuses(ENOENT, fd, t.test_mock_domain_replace(id=stdev, pt_id=99))
    s.expect(s.do(fd, t.test_mock_domain_replace(id=stdev, pt_id=ioas)).pt_id == hwpt, "to where it is: nothing")
    new = s.do(fd, t.test_mock_domain_replace(id=stdev, pt_id=other)).pt_id
    s.expect(new not in (ioas, other, hwpt), "a new automatic HWPT")
    s.refuses(ENOENT, fd, u.iommu_destroy(id=hwpt))
    s.do(fd, u.iommu_destroy(id=ioas))
    s.refuses(EINVAL, fd, t.test_mock_domain_replace(id=stdev, pt_id=stdev))


@check("devices 3.8 domain row 4", "devices 3.5 row 3b", "core 4.3 row 4", "devices 3.6 undo")
def replacing_onto_an_ioas_that_cannot_be_filled(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    bad = ioas_alloc(s, fd)
    stdev, hwpt, _ = mock_domain(s, fd, ioas)
    map_fixed(s, fd, bad, s.page(0), PAGE, 0x1000)
    s.refuses(EADDRINUSE, fd, t.test_mock_domain_replace(id=stdev, pt_id=bad))
    s.do(fd, u.iommu_ioas_unmap(ioas_id=bad, iova=0x1000, length=PAGE))
    s.munmap(s.page(5), PAGE)
    map_fixed(s, fd, bad, s.page(5), PAGE, APERTURE)
    s.refuses(EFAULT, fd, t.test_mock_domain_replace(id=stdev, pt_id=bad))
    s.expect(free_ranges(s, fd, bad)[1] == 1, "nothing is left of the attempt")
    map_fixed(s, fd, ioas, s.page(0), PAGE, APERTURE)
    s.do(fd, t.test_md_check_map(id=hwpt, iova=APERTURE, length=PAGE, uptr=s.page(0)))


@check("devices 4.2 row 1", "devices 4.2 row 2", "devices 4.2 row 3", "devices 4.2 row 4", "devices 4.2 row 5")
def hwpt_alloc_refuses(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    stdev, _, dev = mock_domain(s, fd, ioas)
    s.refuses(EOPNOTSUPP, fd, u.iommu_hwpt_alloc(reserved=1, dev_id=99))
    s.refuses(EINVAL, fd, u.iommu_hwpt_alloc(dev_id=99, data_len=4))
    s.refuses(EINVAL, fd, u.iommu_hwpt_alloc(dev_id=99, data_type=SELFTEST))
    s.refuses(ENOENT, fd, u.iommu_hwpt_alloc(dev_id=99, pt_id=ioas, flags=16))
    s.refuses(EINVAL, fd, u.iommu_hwpt_alloc(dev_id=dev, pt_id=99, flags=16))
    for bad in (stdev, dev):
        s.refuses(EINVAL, fd, u.iommu_hwpt_alloc(dev_id=dev, pt_id=bad))


@check(
    "mock 2.3 paging row 3",
    "devices 4.3 row 3",
    "devices 4.3 row 4",
    "devices 4.3 row 5",
    "devices 4.6",
    "mock 2.3 paging row 1",
    "mock 2.3 paging row 2",
)
def every_flag_combination(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    _, _, dirty_dev = mock_domain(s, fd, ioas)
    _, _, clean_dev = device(s, fd, ioas, t.MOCK_FLAGS_DEVICE_NO_DIRTY)
    fault = s.do(fd, u.iommu_fault_alloc()).out_fault_id
    for flags in range(32):
        for dev in (dirty_dev, clean_dev):
            asked = u.iommu_hwpt_alloc(dev_id=dev, pt_id=ioas, flags=flags, fault_id=fault)
            if flags >= 16 or flags & 5 == 5 or (flags & 2 and dev == clean_dev):
                s.refuses(EOPNOTSUPP, fd, asked)
            else:
                s.do(fd, u.iommu_destroy(id=s.do(fd, asked).out_hwpt_id))


@check(
    "mock 2.3 paging row 4", "mock 2.3 paging row 5", "mock 2.3 paging row 6", "mock 2.3 paging row 7", "devices 4.7"
)
def paging_data(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    _, _, dev = mock_domain(s, fd, ioas)
    s.refuses(EOPNOTSUPP, fd, hwpt_request(s, dev, ioas, data=bytes(8), kind=1))
    s.refuses(EINVAL, fd, hwpt_request(s, dev, ioas, data=bytes(3)))
    s.refuses(EINVAL, fd, hwpt_request(s, dev, ioas, data=bytes(9)))
    s.refuses(EFAULT, fd, u.iommu_hwpt_alloc(dev_id=dev, pt_id=ioas, data_type=SELFTEST, data_len=8))
    s.refuses(EOPNOTSUPP, fd, hwpt_request(s, dev, ioas, data=bytes(4) + b"\2\0\0\0"))
    hwpt_alloc(s, fd, dev, ioas, data=bytes(4))
    hwpt_alloc(s, fd, dev, ioas, data=bytes(8))
    huge = ioas_alloc(s, fd)
    hwpt_alloc(s, fd, dev, huge, data=bytes(4) + b"\1\0\0\0")
    s.expect(free_ranges(s, fd, huge) == ([(0, 0x3FFFFFFFFF)], 4096), "the huge format's aperture and page")


@check(
    "mock 2.3 nested row 5",
    "devices 4.4 row 1",
    "devices 4.4 row 2",
    "mock 2.3 nested row 1",
    "mock 2.3 nested row 2",
    "mock 2.3 nested row 3",
    "mock 2.3 nested row 4",
    "mock 4.8",
)
def nested_hwpts(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    stdev, auto, dev = mock_domain(s, fd, ioas)
    plain = hwpt_alloc(s, fd, dev, ioas)
    parent = hwpt_alloc(s, fd, dev, ioas, NEST)
    data = (0x1234).to_bytes(4, "little")
    s.refuses(EOPNOTSUPP, fd, hwpt_request(s, dev, parent))
    for flags in (NEST, DIRTY, 16):
        s.refuses(EOPNOTSUPP, fd, hwpt_request(s, dev, parent, flags, data))
    s.refuses(EINVAL, fd, hwpt_request(s, dev, auto, 0, data))
    s.refuses(EINVAL, fd, hwpt_request(s, dev, plain, 0, data))
    s.refuses(EOPNOTSUPP, fd, hwpt_request(s, dev, parent, 0, data, 1))
    s.refuses(EINVAL, fd, hwpt_request(s, dev, parent, 0, data[:3]))
    s.refuses(EINVAL, fd, hwpt_request(s, dev, parent, 0, data + bytes(5)))
    s.refuses(EFAULT, fd, u.iommu_hwpt_alloc(dev_id=dev, pt_id=parent, data_type=SELFTEST, data_len=4))
    nested = hwpt_alloc(s, fd, dev, parent, 0, data)
    s.refuses(EINVAL, fd, hwpt_request(s, dev, nested, 0, data))
    for i in range(4):
        s.do(fd, iotlb(nested, i, 0x1234))
    s.refuses(EINVAL, fd, iotlb(nested, 4, 0x1234))
    s.refuses(EINVAL, fd, iotlb(nested, 0, 1))
    s.refuses(ENOENT, fd, iotlb(parent, 0, 0x1234))
    s.refuses(EBUSY, fd, u.iommu_destroy(id=parent))
    s.do(fd, t.test_mock_domain_replace(id=stdev, pt_id=nested))
    s.refuses(EBUSY, fd, u.iommu_destroy(id=nested))
    s.do(fd, t.test_mock_domain_replace(id=stdev, pt_id=ioas))
    s.do(fd, u.iommu_destroy(id=nested))
    s.do(fd, u.iommu_destroy(id=parent))


def iotlb(hwpt: int, number: int, value: int) -> t.test_md_check_iotlb:
    return t.test_md_check_iotlb(id=hwpt, arm_id=number, iotlb=value)


@check("devices 7 row 1", "devices 7 row 2", "devices 7 row 3", "devices 7 row 5", "devices 7 row 8", "devices 7 row 9")
def invalidating_a_nested_hwpt(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    _, _, dev = mock_domain(s, fd, ioas)
    parent = hwpt_alloc(s, fd, dev, ioas, NEST)
    nested = hwpt_alloc(s, fd, dev, parent, 0, (7).to_bytes(4, "little"))
    kind = t.IOMMU_HWPT_INVALIDATE_DATA_SELFTEST

    def entries(*pairs: tuple[int, int]) -> int:
        s.poke(DATA, b"".join(f.to_bytes(4, "little") + i.to_bytes(4, "little") for f, i in pairs))
        return len(pairs)

    def ask(
        number: int, n: int, length: int = 8, at: int = DATA, which: int = kind, **more: int
    ) -> u.iommu_hwpt_invalidate:
        return u.iommu_hwpt_invalidate(
            hwpt_id=number, data_uptr=at, data_type=which, entry_len=length, entry_num=n, **more
        )

    s.expect(s.refuses(EOPNOTSUPP, fd, ask(99, 1, reserved=1)).entry_num == 0, "entry_num is always answered")
    for bad in (ask(99, 1, at=0), ask(99, 1, length=0), ask(99, 1, length=4097), ask(99, 2**19 + 1)):
        s.expect(s.refuses(EINVAL, fd, bad).entry_num == 0, "nothing was handled")
    s.refuses(ENOENT, fd, ask(99, 1))
    for wrong in (parent, ioas, dev):
        s.refuses(EINVAL, fd, ask(wrong, 1))
    s.do(fd, ask(nested, 0, 0, 0))
    s.refuses(EINVAL, fd, ask(nested, 0, which=t.IOMMU_HWPT_INVALIDATE_DATA_SELFTEST_INVALID))
    s.refuses(EINVAL, fd, ask(nested, entries((0, 0)), which=t.IOMMU_HWPT_INVALIDATE_DATA_SELFTEST_INVALID))
    s.refuses(EINVAL, fd, ask(nested, entries((0, 0)), length=4))
    out = s.refuses(EOPNOTSUPP, fd, ask(nested, entries((0, 0), (2, 1), (0, 2))))
    s.expect(out.entry_num == 1, "one before the bad flag")
    for i, value in ((0, 0), (1, 7), (2, 7), (3, 7)):
        s.do(fd, iotlb(nested, i, value))
    out = s.refuses(EINVAL, fd, ask(nested, entries((0, 1), (0, 9))))
    s.expect(out.entry_num == 1, "one before the bad id")
    s.expect(s.do(fd, ask(nested, entries((1, 0)))).entry_num == 1, "all of them")
    for i in range(4):
        s.do(fd, iotlb(nested, i, 0))


@check(
    "devices 5 row 3",
    "devices 5 row 11",
    "devices 5 row 1",
    "devices 5 row 2",
    "devices 5 row 4",
    "devices 5 row 6",
    "devices 5 row 9",
    "devices 5 row 10",
    "mock 2.2",
)
def hw_info(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    _, _, dev = mock_domain(s, fd, ioas)
    _, _, clean = device(s, fd, ioas, t.MOCK_FLAGS_DEVICE_NO_DIRTY)
    _, _, pasid = device(s, fd, ioas, t.MOCK_FLAGS_DEVICE_PASID)
    s.refuses(EOPNOTSUPP, fd, u.iommu_hw_info(flags=2, dev_id=99))
    s.refuses(ENOENT, fd, u.iommu_hw_info(dev_id=99))
    s.refuses(EFAULT, fd, u.iommu_hw_info(dev_id=dev, data_len=8))
    for which, caps, bits in ((dev, 9, 0), (clean, 8, 0), (pasid, 9, 20)):
        out = s.do(fd, u.iommu_hw_info(dev_id=which))
        s.expect(
            (out.data_len, out.out_data_type, out.out_capabilities, out.out_max_pasid_log2)
            == (8, 0xFEEDBEEF, caps, bits),
            f"device {which}",
        )
    s.poke(DATA, b"\xff" * 64)
    out = s.do(fd, u.iommu_hw_info(dev_id=dev, data_len=16, data_uptr=DATA))
    s.expect(s.peek(DATA, 20) == bytes(4) + b"\xef\xbe\xad\xde" + bytes(8) + b"\xff" * 4, "the tail is zeroed")
    s.poke(DATA, b"\xff" * 64)
    s.expect(s.do(fd, u.iommu_hw_info(dev_id=dev, data_len=5, data_uptr=DATA)).data_len == 8, "the true length")
    s.expect(s.peek(DATA, 8) == bytes(4) + b"\xef\xff\xff\xff", "a cut copy is a success")
    for kind in (0, 0xFEEDBEEF):
        s.do(fd, u.iommu_hw_info(flags=1, dev_id=dev, out_data_type=kind))
    s.refuses(EOPNOTSUPP, fd, u.iommu_hw_info(flags=1, dev_id=dev, out_data_type=1))


@check(
    "devices 3.9",
    "mock 4.3",
    "mock 4.4",
    "mock 3 attach row 5",
    "mock 3 attach row 6",
    "mock 3 attach row 7",
    "mock 3 replace row 2",
)
def pasids(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    stdev, _auto, dev = device(s, fd, ioas, t.MOCK_FLAGS_DEVICE_PASID)
    pasid_hwpt = hwpt_alloc(s, fd, dev, ioas, PASID)
    plain = hwpt_alloc(s, fd, dev, ioas)
    attach, replace, detach = t.test_pasid_attach, t.test_pasid_replace, t.test_pasid_detach
    where = t.test_pasid_check_hwpt
    s.refuses(ENOENT, fd, attach(id=99, pasid=1, pt_id=99))
    s.refuses(ENOENT, fd, attach(id=stdev, pasid=1, pt_id=99))
    s.refuses(EINVAL, fd, attach(id=stdev, pasid=1, pt_id=pasid_hwpt))
    s.do(fd, t.test_mock_domain_replace(id=stdev, pt_id=pasid_hwpt))
    s.refuses(EINVAL, fd, attach(id=stdev, pasid=1, pt_id=plain))
    s.refuses(EINVAL, fd, attach(id=stdev, pasid=1, pt_id=ioas))
    s.refuses(EINVAL, fd, attach(id=stdev, pasid=1 << 20, pt_id=pasid_hwpt))
    s.refuses(EINVAL, fd, replace(id=stdev, pasid=1, pt_id=pasid_hwpt))
    s.do(fd, where(id=stdev, pasid=1, hwpt_id=0))
    s.do(fd, attach(id=stdev, pasid=1, pt_id=pasid_hwpt))
    s.refuses(EBUSY, fd, attach(id=stdev, pasid=1, pt_id=plain))
    s.refuses(EBUSY, fd, attach(id=stdev, pasid=1, pt_id=ioas))
    s.refuses(EINVAL, fd, where(id=stdev, pasid=1, hwpt_id=0))
    s.refuses(ENOENT, fd, where(id=stdev, pasid=1, hwpt_id=99))
    s.refuses(EINVAL, fd, where(id=stdev, pasid=1, hwpt_id=ioas))
    s.refuses(EINVAL, fd, where(id=stdev, pasid=1, hwpt_id=plain))
    s.do(fd, where(id=stdev, pasid=1, hwpt_id=pasid_hwpt))
    s.do(fd, where(id=stdev, pasid=0, hwpt_id=pasid_hwpt))
    s.refuses(EINVAL, fd, t.test_mock_domain_replace(id=stdev, pt_id=plain))
    s.refuses(EINVAL, fd, t.test_mock_domain_replace(id=stdev, pt_id=ioas))
    s.do(fd, replace(id=stdev, pasid=1, pt_id=pasid_hwpt))
    s.refuses(EINVAL, fd, replace(id=stdev, pasid=1, pt_id=plain))
    s.do(fd, detach(id=stdev, pasid=1))
    s.do(fd, detach(id=stdev, pasid=1))
    s.do(fd, detach(id=stdev, pasid=0))
    s.refuses(EINVAL, fd, t.test_mock_domain_replace(id=stdev, pt_id=plain))
    s.do(fd, attach(id=stdev, pasid=0, pt_id=plain))
    s.refuses(EBUSY, fd, attach(id=stdev, pasid=0, pt_id=plain))


@check("mock 2.5")
def the_failing_pasid(s: Subject) -> None:
    """PASID 1024 fails every second time it is set."""
    fd, ioas = open_ioas(s)
    stdev, _, dev = device(s, fd, ioas, t.MOCK_FLAGS_DEVICE_PASID)
    first, second = hwpt_alloc(s, fd, dev, ioas, PASID), hwpt_alloc(s, fd, dev, ioas, PASID)
    s.do(fd, t.test_mock_domain_replace(id=stdev, pt_id=first))
    p = {"id": stdev, "pasid": 1024}
    s.do(fd, t.test_pasid_attach(**p, pt_id=first))
    s.refuses(ENOMEM, fd, t.test_pasid_replace(**p, pt_id=second))
    s.do(fd, t.test_pasid_check_hwpt(**p, hwpt_id=first))
    s.do(fd, t.test_pasid_replace(**p, pt_id=first))
    s.do(fd, t.test_pasid_replace(**p, pt_id=second))
    s.refuses(ENOMEM, fd, t.test_pasid_replace(**p, pt_id=first))
    s.do(fd, t.test_pasid_detach(**p))
    s.do(fd, t.test_pasid_attach(**p, pt_id=first))


@check("mock 2.4 row 1", "devices 3.5 row 1")
def a_device_without_dirty_tracking(s: Subject) -> None:
    fd, ioas = open_ioas(s)
    _, _, dev = mock_domain(s, fd, ioas)
    dirty = hwpt_alloc(s, fd, dev, ioas, DIRTY)
    s.refuses(EINVAL, fd, t.test_mock_domain_flags(id=dirty, dev_flags=t.MOCK_FLAGS_DEVICE_NO_DIRTY))
    s.expect(device(s, fd, dirty, 0)[1] == dirty, "another device attaches")
