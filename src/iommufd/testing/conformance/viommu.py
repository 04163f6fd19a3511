"""events 6, 7, 11, 12; mock 2.4: vIOMMUs, vDEVICEs, nested page tables and cache invalidation through a vIOMMU."""

from __future__ import annotations

import struct
from errno import E2BIG, EBUSY, EEXIST, EFAULT, EINVAL, ENOENT, ENOMEM, EOPNOTSUPP

from iommufd.testing.conformance import check
from iommufd.testing.conformance.common import open_ioas, unwritable
from iommufd.testing.conformance.devices import DATA, NEST, PASID, SELFTEST, device, hwpt_alloc, iotlb
from iommufd.testing.subject import PAGE, Subject
from iommufd.uapi import iommufd as u
from iommufd.uapi import iommufd_test as t

KIND = t.IOMMU_VIOMMU_TYPE_SELFTEST
CACHE = t.IOMMU_TEST_DEV_CACHE_DEFAULT
READ_ONLY = DATA + PAGE


class Guest:
    """A context, a PASID-capable device on the IOAS, a nesting parent and a vIOMMU on it."""

    def __init__(self, s: Subject) -> None:
        self.s = s
        self.fd, self.ioas = open_ioas(s)
        self.stdev, self.auto, self.dev = device(s, self.fd, self.ioas, t.MOCK_FLAGS_DEVICE_PASID)
        self.parent = hwpt_alloc(s, self.fd, self.dev, self.ioas, NEST)
        self.viommu = self.new_viommu()

    def request(self, **fields: int) -> u.iommu_viommu_alloc:
        given = {"type": KIND, "dev_id": self.dev, "hwpt_id": self.parent, **fields}
        return u.iommu_viommu_alloc(**given)

    def new_viommu(self, **fields: int) -> int:
        return self.s.do(self.fd, self.request(**fields)).out_viommu_id

    def vdevice(self, viommu: int, virt_id: int, dev: int = 0) -> int:
        return self.s.do(
            self.fd, u.iommu_vdevice_alloc(viommu_id=viommu, dev_id=dev or self.dev, virt_id=virt_id)
        ).out_vdevice_id

    def nested(self, flags: int = 0, viommu: int = 0) -> int:
        return hwpt_alloc(self.s, self.fd, self.dev, viommu or self.viommu, flags, struct.pack("<II", 7, 0))

    def replace(self, pt: int) -> None:
        self.s.do(self.fd, t.test_mock_domain_replace(id=self.stdev, pt_id=pt))

    def destroy(self, number: int) -> None:
        self.s.do(self.fd, u.iommu_destroy(id=number))

    def busy(self, number: int) -> None:
        self.s.refuses(EBUSY, self.fd, u.iommu_destroy(id=number))


# ------------------------------------------------------------------------------------------------------------- vIOMMU


@check("events 6 row 1", "events 6 row 2", "events 6 row 4", "events 6 row 5", "events 6 row 6")
def what_a_viommu_needs(s: Subject) -> None:
    g = Guest(s)
    s.refuses(EOPNOTSUPP, g.fd, g.request(flags=1, dev_id=99))
    s.refuses(EOPNOTSUPP, g.fd, g.request(type=0, dev_id=99))
    for bad in (99, g.ioas):
        s.refuses(ENOENT, g.fd, g.request(dev_id=bad, type=1))
    s.refuses(EOPNOTSUPP, g.fd, g.request(type=1, hwpt_id=99))
    for bad in (99, g.ioas, g.dev, g.nested()):
        s.refuses(ENOENT, g.fd, g.request(hwpt_id=bad))
    for plain in (g.auto, hwpt_alloc(s, g.fd, g.dev, g.ioas)):
        s.refuses(EINVAL, g.fd, g.request(hwpt_id=plain))
    g.new_viommu(reserved=1)
    short = g.request()
    short.size = 24
    s.do(g.fd, short)


@check("events 6 row 9", "events 10")
def a_viommu_and_what_holds_it(s: Subject) -> None:
    g = Guest(s)
    unwritable(s, g.fd, g.request())
    second = g.new_viommu()
    s.expect(second == g.viommu + 1, "the refused one left no number behind")
    g.busy(g.parent)
    nested = g.nested()
    g.busy(g.viommu)
    g.destroy(nested)
    vdev = g.vdevice(g.viommu, 1)
    g.busy(g.viommu)
    g.destroy(vdev)
    g.destroy(g.viommu)
    g.busy(g.parent)
    g.destroy(g.stdev)  # the device was only the way to the IOMMU
    g.destroy(second)
    g.destroy(g.parent)


@check(
    "events 6 row 8",
    "events 6 driver row 1",
    "events 6 driver row 2",
    "events 6 driver row 3",
    "events 6 driver row 4",
    "events 6 driver row 5",
)
def a_viommu_with_data(s: Subject) -> None:
    g = Guest(s)
    for length in (7, 25):
        s.refuses(EINVAL, g.fd, g.request(data_len=length, data_uptr=0x10))
    s.refuses(EFAULT, g.fd, g.request(data_len=24, data_uptr=0x10))
    g.new_viommu(data_uptr=0x10)  # nothing is passed without a length
    s.poke(READ_ONLY, struct.pack("<IIQQ", 9, 0, 0, 0))
    s.mprotect(READ_ONLY, PAGE, 1)
    s.refuses(EFAULT, g.fd, g.request(data_len=24, data_uptr=READ_ONLY))
    s.poke(DATA, struct.pack("<IIQQ", 0xABCD, 0, 0, 0))
    g.new_viommu(data_len=24, data_uptr=DATA)
    s.expect(
        struct.unpack("<IIQQ", s.peek(DATA, 24)) == (0xABCD, 0xABCD, PAGE, 2 * PAGE),
        "looped back; the region the refused one had is free again",
    )
    view = s.mmap_device(g.fd, 2 * PAGE, 3, 1, PAGE)
    s.expect(view is not None and bytes(view[:8]) == struct.pack("<II", 0xABCD, 0), "the data is the first word")
    s.poke(DATA, struct.pack("<IIQQ", 5, 0, 0, 0))
    g.new_viommu(data_len=8, data_uptr=DATA)
    s.expect(s.peek(DATA, 24) == struct.pack("<IIQQ", 5, 5, 0, 0), "no room for the offset")
    g.new_viommu(data_len=24, data_uptr=DATA)
    s.expect(struct.unpack("<Q", s.peek(DATA + 8, 8))[0] == 5 * PAGE, "but the region took its place")


# ------------------------------------------------------------------------------------------------------------ vDEVICE


@check("events 7 row 1", "events 7 row 2", "events 7 row 3", "events 7 row 6", "events 7 row 8", "events 7 row 10")
def what_a_vdevice_needs(s: Subject) -> None:
    g = Guest(s)
    other = g.new_viommu()
    _, _, dev = device(s, g.fd, g.ioas, 0)

    def request(viommu: int, dev: int, virt_id: int = 1) -> u.iommu_vdevice_alloc:
        return u.iommu_vdevice_alloc(viommu_id=viommu, dev_id=dev, virt_id=virt_id)

    for bad in (99, g.parent):
        s.refuses(ENOENT, g.fd, request(bad, 99))
        s.refuses(ENOENT, g.fd, request(g.viommu, bad))
    unwritable(s, g.fd, request(g.viommu, g.dev))
    vdev = g.vdevice(g.viommu, 1)
    s.refuses(EEXIST, g.fd, request(g.viommu, g.dev, 2))
    s.refuses(EEXIST, g.fd, request(other, g.dev, 2))
    s.refuses(EEXIST, g.fd, request(g.viommu, dev, 1))
    g.destroy(g.vdevice(other, 1, dev))  # ids are the vIOMMU's own
    g.destroy(vdev)
    for virt_id in (0, 2**32, 2**64 - 1):
        g.destroy(g.vdevice(g.viommu, virt_id))


@check("events 7 lifecycle", "events 7 row 4", "core 2.2", "core 2.6", "devices 2.3 row 1")
def a_tombstone(s: Subject) -> None:
    g = Guest(s)
    vdev = g.vdevice(g.viommu, 4)
    g.replace(g.nested())
    g.busy(g.dev)
    g.busy(g.viommu)
    g.destroy(g.stdev)
    s.refuses(ENOENT, g.fd, u.iommu_destroy(id=vdev))
    s.refuses(ENOENT, g.fd, u.iommu_vdevice_alloc(viommu_id=g.viommu, dev_id=g.dev, virt_id=9))
    stdev, _, dev = device(s, g.fd, g.ioas, 0)
    s.expect((stdev, dev) == (g.stdev, g.dev), "the numbers of the device are free")
    again = g.vdevice(g.viommu, 4, dev)
    s.expect(again not in (vdev, stdev, dev), "the vDEVICE's is not, its virtual id is")
    g.destroy(again)
    s.do(g.fd, u.iommu_destroy(id=stdev))  # destroyed first, a vDEVICE leaves nothing
    s.expect(s.do(g.fd, u.iommu_ioas_alloc()).out_ioas_id == stdev, "the lowest free number")


# --------------------------------------------------------------------------------------------------- nested on a vIOMMU


@check(
    "events 12 row 1",
    "events 12 row 2",
    "events 12 row 3",
    "events 12 row 4",
    "events 12 row 6",
    "events 12 row 7",
    "events 12 row 8",
    "events 12 row 9",
    "events 12 row 10",
    "events 12 row 11",
    "devices 4.5 row 2",
    "devices 4.5 row 3",
    "devices 4.5 row 5",
    "devices 4.5 row 6",
)
def nested_page_tables(s: Subject) -> None:
    g = Guest(s)
    s.poke(DATA, struct.pack("<III", 7, 99, 0))

    def request(**fields: int) -> u.iommu_hwpt_alloc:
        given = {"dev_id": g.dev, "pt_id": g.viommu, "data_type": SELFTEST, "data_len": 8, "data_uptr": DATA, **fields}
        return u.iommu_hwpt_alloc(**given)

    s.refuses(EOPNOTSUPP, g.fd, request(reserved=1, data_type=0))
    s.refuses(EINVAL, g.fd, request(data_type=0, dev_id=99))
    s.refuses(EINVAL, g.fd, request(data_len=0, dev_id=99))
    s.refuses(ENOENT, g.fd, request(dev_id=99, pt_id=99))
    s.refuses(EINVAL, g.fd, request(pt_id=99))
    queue = s.do(g.fd, u.iommu_fault_alloc()).out_fault_id
    for flags in range(17):
        if flags & ~12:
            s.refuses(EOPNOTSUPP, g.fd, request(flags=flags, data_type=1))
        elif flags & 4:
            s.refuses(ENOENT, g.fd, request(flags=flags, fault_id=99))
            s.do(g.fd, request(flags=flags, fault_id=queue))
        else:
            s.do(g.fd, request(flags=flags))
    s.refuses(EOPNOTSUPP, g.fd, request(data_type=0, data_len=0))
    s.refuses(EOPNOTSUPP, g.fd, request(data_type=1, data_len=3))
    for length in (3, 12):
        s.refuses(EINVAL, g.fd, request(data_len=length, data_uptr=0x10))
    s.refuses(EFAULT, g.fd, request(data_uptr=0x10))
    made = s.do(g.fd, request(data_len=4)).out_hwpt_id
    for number in range(4):
        s.do(g.fd, iotlb(made, number, 7))
    g.busy(g.viommu)


@check("mock 2.4 row 2", "mock 2.4 row 3", "events 7 gate", "mock 4.1 nested")
def attaching_to_a_page_table_of_a_viommu(s: Subject) -> None:
    g = Guest(s)
    other, nested = g.new_viommu(), g.nested(PASID)
    s.refuses(ENOENT, g.fd, t.test_mock_domain_replace(id=g.stdev, pt_id=nested))
    s.refuses(ENOENT, g.fd, t.test_mock_domain(id=nested))
    vdev = g.vdevice(other, 1)
    s.refuses(ENOENT, g.fd, t.test_mock_domain_replace(id=g.stdev, pt_id=nested))
    s.do(g.fd, t.test_pasid_check_hwpt(id=g.stdev, hwpt_id=g.auto))
    plain = hwpt_alloc(s, g.fd, g.dev, g.ioas, PASID)
    g.replace(plain)
    s.do(g.fd, t.test_pasid_attach(id=g.stdev, pasid=3, pt_id=nested))
    s.do(g.fd, t.test_pasid_replace(id=g.stdev, pasid=3, pt_id=plain))
    s.do(g.fd, t.test_pasid_replace(id=g.stdev, pasid=3, pt_id=nested))
    s.do(g.fd, t.test_pasid_detach(id=g.stdev, pasid=3))
    g.destroy(vdev)
    g.vdevice(g.viommu, 1)
    g.replace(nested)
    g.replace(g.nested())


# -------------------------------------------------------------------------------------------------------- invalidation


@check(
    "events 11 row 1",
    "events 11 row 2",
    "events 11 row 3",
    "events 11 row 4",
    "events 11 row 6",
    "events 11 row 7",
    "devices 7 row 7",
    "mock 4.7",
)
def invalidating_a_viommu(s: Subject) -> None:
    g = Guest(s)
    g.vdevice(g.viommu, 9)
    s.poke(DATA, struct.pack("<III", 0, 9, 1))

    def request(number: int = g.viommu, **fields: int) -> u.iommu_hwpt_invalidate:
        given = {"data_uptr": DATA, "data_type": KIND, "entry_len": 12, "entry_num": 1, **fields}
        return u.iommu_hwpt_invalidate(hwpt_id=number, **given)

    s.expect(s.refuses(EOPNOTSUPP, g.fd, request(99, reserved=1, entry_len=0)).entry_num == 0, "always answered")
    for fields in ({"data_uptr": 0}, {"entry_len": 0}, {"entry_len": 4097}, {"entry_num": 2**19 + 1}):
        s.expect(s.refuses(EINVAL, g.fd, request(99, **fields)).entry_num == 0, "nothing handled")
    s.refuses(ENOENT, g.fd, request(99))
    for wrong in (g.ioas, g.parent, g.dev):
        s.refuses(EINVAL, g.fd, request(wrong))
    unwritable(s, g.fd, request())
    s.do(g.fd, t.test_dev_check_cache(id=g.dev, arm_id=1, cache=0))  # done all the same
    s.do(g.fd, t.test_dev_check_cache(id=g.dev, arm_id=0, cache=CACHE))
    s.refuses(EINVAL, g.fd, t.test_dev_check_cache(id=g.dev, arm_id=4, cache=CACHE))
    s.refuses(EINVAL, g.fd, t.test_dev_check_cache(id=g.dev, arm_id=0, cache=0))
    s.refuses(ENOENT, g.fd, t.test_dev_check_cache(id=99))


@check(
    "events 11.1 row 1",
    "events 11.1 row 2",
    "events 11.1 row 3",
    "events 11.1 row 4",
    "events 11.1 row 5",
    "events 11.1 row 6",
    "events 11.1 row 7",
    "events 11.1 row 8",
)
def entries_of_a_viommu(s: Subject) -> None:
    g = Guest(s)
    g.vdevice(g.viommu, 9)
    _, _, far = device(s, g.fd, g.ioas, 0)
    g.vdevice(g.viommu, 2**32 + 1, far)

    def request(*entries: tuple[int, int, int], length: int = 12, **fields: int) -> u.iommu_hwpt_invalidate:
        if entries:
            s.poke(DATA, b"".join(struct.pack("<III", *e)[:length].ljust(length, b"\0") for e in entries))
        given = {"data_uptr": DATA, "data_type": KIND, "entry_len": length, "entry_num": len(entries), **fields}
        return u.iommu_hwpt_invalidate(hwpt_id=g.viommu, **given)

    def words(*expected: int) -> None:
        for number, word in enumerate(expected):
            s.do(g.fd, t.test_dev_check_cache(id=g.dev, arm_id=number, cache=word))

    s.expect(s.do(g.fd, request(data_uptr=0, entry_len=0)).entry_num == 0, "an empty array")
    for kind in (KIND, 1):
        big = request(entry_num=349526, data_type=kind, data_uptr=0x10)
        s.expect(s.refuses(ENOMEM, g.fd, big).entry_num == 349526, "left as it was")
    s.refuses(EFAULT, g.fd, request(entry_num=349525, data_uptr=0x10))
    for count in (0, 1):
        out = s.refuses(EINVAL, g.fd, request((1, 9, 0), data_type=1, entry_num=count))
        s.expect(out.entry_num == 0, "another type")
    page = s.page(0)
    s.munmap(page + PAGE, PAGE)
    s.poke(page + PAGE - 12, struct.pack("<III", 1, 9, 0))
    out = s.refuses(EFAULT, g.fd, request(entry_num=2, data_uptr=page + PAGE - 12))
    s.expect(out.entry_num == 0, "the copy comes first")
    words(CACHE, CACHE, CACHE, CACHE)
    s.expect(s.do(g.fd, request((0, 9, 0), (0, 9, 1), length=16)).entry_num == 2, "longer entries")
    bad = request((0, 9, 2), (0, 9, 3), length=16)
    s.poke(DATA + 31, b"\1")
    s.expect(s.refuses(E2BIG, g.fd, bad).entry_num == 0, "a tail that is not zero")
    words(0, 0, CACHE, CACHE)
    s.refuses(EINVAL, g.fd, request((0, 9, 2), length=4))  # names vDEVICE 0
    s.do(g.fd, request((0, 9, 2), length=8))
    for entry, number in (((2, 9, 0), EOPNOTSUPP), ((0, 9, 4), EINVAL), ((1, 9, 4), EINVAL), ((0, 8, 0), EINVAL)):
        s.expect(s.refuses(number, g.fd, request((0, 9, 2), entry, (0, 9, 3))).entry_num == 1, "the one before")
    words(0, 0, 0, CACHE)
    s.refuses(EINVAL, g.fd, request((0, 1, 0)))  # 32 bits cannot name it
    s.do(g.fd, request((1, 9, 3)))
    words(0, 0, 0, 0)
