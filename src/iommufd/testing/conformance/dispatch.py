"""core 1: the descriptor, the dispatch order, the struct protocol."""

from __future__ import annotations

import os
from errno import E2BIG, EFAULT, EINVAL, EMSGSIZE, ENOENT, ENOTTY, EOPNOTSUPP
from mmap import PROT_READ

from iommufd.testing.conformance import check
from iommufd.testing.subject import PAGE, Subject
from iommufd.uapi import iommufd as u
from iommufd.uapi.commands import COMMANDS

PROT_NONE = 0


@check("core 1.1 open")
def every_open_is_its_own_context(s: Subject) -> None:
    """Two opens share nothing; ids start at 1 in each; the open mode does not matter to ioctls."""
    first, second, readonly = s.open(), s.open(), s.open(flags=os.O_RDONLY)
    for fd in (first, second, readonly):
        s.expect(s.do(fd, u.iommu_ioas_alloc()).out_ioas_id == 1, "the first object of a context has id 1")
    s.do(first, u.iommu_destroy(id=1))
    s.refuses(ENOENT, first, u.iommu_destroy(id=1))
    s.do(second, u.iommu_destroy(id=1))


@check("core 1.2 read", "core 1.2 write", "core 1.2 poll")
def other_calls_on_the_descriptor(s: Subject) -> None:
    fd = s.open()
    s.expect(s.read(fd, 8).errno == EINVAL, "read is EINVAL")
    s.expect(s.write(fd, b"12345678").errno == EINVAL, "write is EINVAL")
    s.expect(s.poll(fd, wrnorm=True) == 0x145, "always IN, OUT, RDNORM, WRNORM")


@check("core 1.3 row 1")
def numbers_outside_the_table_are_vfio_or_nothing(s: Subject) -> None:
    """Nothing is read from the argument of an unknown number outside the table."""
    fd = s.open()
    for cmd in (0x3B00, 0x3B7F, 0x3BA1, 0x3BFF, 0x3A64, 0x1234):
        answer = s.ioctl(fd, cmd, at=0, poke=False)
        s.expect(answer.errno == ENOTTY, f"{cmd:#x} with a NULL argument is ENOTTY")


@check("core 1.3 row 2", "core 1.3 row 3")
def an_unreadable_size_beats_an_unknown_number(s: Subject) -> None:
    """Inside the table the size is read before the number is known to be one."""
    fd = s.open()
    hole = s.page(10)
    s.munmap(hole, PAGE)
    for at in (0, hole, hole + PAGE - 4, 2**47, 2**63, 2**64 - 4):
        for cmd in (0x3B85, 0x3B96, 0x3B9F, 0x4285, 0xC0003B85):
            answer = s.ioctl(fd, cmd, at=at, poke=False)
            s.expect(answer.errno == EFAULT, f"{cmd:#x} at {at:#x} is EFAULT")
    for cmd in (0x3B96, 0x3B9F, 0x4285, 0xC0003B85, 0x80003B80):
        answer = s.ioctl(fd, cmd, (40).to_bytes(4, "little") + bytes(36))
        s.expect(answer.errno == ENOTTY, f"{cmd:#x} is ENOTTY")


@check("core 1.3 row 2", "core 1.3 row 6")
def half_mapped_structs(s: Subject) -> None:
    fd = s.open()
    end = s.page(11)
    s.munmap(end, PAGE)
    s.poke(end - 2, b"\x28\x00")
    s.expect(s.ioctl(fd, 0x3B85, at=end - 2, poke=False).errno == EFAULT, "half of the size field")
    s.poke(end - 12, (40).to_bytes(4, "little") + bytes(8))
    s.expect(s.ioctl(fd, 0x3B85, at=end - 12, poke=False).errno == EFAULT, "12 of 40 bytes")
    s.poke(end - 12, (12).to_bytes(4, "little") + bytes(8))
    s.expect(s.ioctl(fd, 0x3B81, at=end - 12, poke=False).result == 0, "12 of 12 bytes")


@check("core 1.3 row 6")
def page_protections_count(s: Subject) -> None:
    fd = s.open()
    page = s.page(12)
    s.poke(page, (12).to_bytes(4, "little") + bytes(8))
    s.mprotect(page, PAGE, PROT_NONE)
    s.expect(s.ioctl(fd, 0x3B81, at=page, poke=False).errno == EFAULT, "a PROT_NONE page cannot be read")
    s.mprotect(page, PAGE, PROT_READ)
    s.expect(s.ioctl(fd, 0x3B81, at=page, poke=False).errno == EFAULT, "the answer does not fit a read-only page")
    s.refuses(ENOENT, fd, u.iommu_destroy(id=1))  # core 1.5 rule 3: the creation was undone
    s.expect(s.do(fd, u.iommu_ioas_alloc()).out_ioas_id == 1, "and its id is free again")


@check("core 1.3 row 4", "core 1.4 sizes")
def each_command_has_its_smallest_size(s: Subject) -> None:
    fd = s.open()
    for command in COMMANDS:
        for size in (0, 4, command.minimum - 1):
            answer = s.ioctl(fd, command.number, size.to_bytes(4, "little") + bytes(command.struct.SIZE - 4))
            s.expect(answer.errno == EINVAL, f"{command.name} with size {size} is EINVAL")


@check("core 1.3 row 5", "core 1.4 sizes")
def bytes_behind_the_struct_must_be_zero(s: Subject) -> None:
    fd = s.open()
    for command in COMMANDS:
        full = command.struct.SIZE
        for extra in (1, 8, 100, 5000):
            data = bytearray(full + extra)
            data[:4] = (full + extra).to_bytes(4, "little")
            data[-1] = 1
            answer = s.ioctl(fd, command.number, bytes(data))
            s.expect(answer.errno == E2BIG, f"{command.name} with a nonzero byte {extra} behind the struct is E2BIG")


@check("core 1.3 row 5")
def the_tail_is_scanned_upwards(s: Subject) -> None:
    """A nonzero word before an unreadable page gives E2BIG, an unreadable page before it EFAULT."""
    fd = s.open()
    end = s.page(20)
    s.munmap(end, PAGE)
    head = (12 + 4096).to_bytes(4, "little") + bytes(8)
    s.poke(end - 64, head + bytes(52))
    s.expect(s.ioctl(fd, 0x3B81, at=end - 64, poke=False).errno == EFAULT, "zeros up to the hole")
    s.poke(end - 64, head + bytes(51) + b"\1")
    s.expect(s.ioctl(fd, 0x3B81, at=end - 64, poke=False).errno == E2BIG, "a nonzero byte before the hole")
    s.poke(end - 12, (2**32 - 1).to_bytes(4, "little") + bytes(8))
    s.expect(s.ioctl(fd, 0x3B81, at=end - 12, poke=False).errno == EFAULT, "there is no upper limit on size")


@check("core 1.3 row 7", "core 1.5 rule 1")
def larger_structs_with_zero_tails_work(s: Subject) -> None:
    fd = s.open()
    data = (64).to_bytes(4, "little") + bytes(60)
    answer = s.ioctl(fd, 0x3B81, data)
    s.expect(answer.result == 0, "a larger struct works when its tail is zero")
    s.expect(answer.out[:12] == bytes([64, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]), "size is echoed, the id is in place")
    s.expect(answer.out[12:] == bytes(52), "bytes behind the struct are untouched")


@check("core 1.5 rule 2")
def an_error_writes_nothing(s: Subject) -> None:
    fd = s.open()
    out = s.refuses(EOPNOTSUPP, fd, u.iommu_ioas_alloc(flags=1, out_ioas_id=77))
    s.expect(out.out_ioas_id == 77, "the struct is untouched")


@check("core 1.5 rule 3")
def effects_stay_when_the_answer_cannot_be_written(s: Subject) -> None:
    fd = s.open()
    ioas = s.do(fd, u.iommu_ioas_alloc()).out_ioas_id
    page = s.page(30)
    fixed = u.IOMMU_IOAS_MAP_FIXED_IOVA | u.IOMMU_IOAS_MAP_WRITEABLE | u.IOMMU_IOAS_MAP_READABLE
    request = u.iommu_ioas_map(size=40, flags=fixed, ioas_id=ioas, user_va=s.page(0), length=PAGE, iova=0x10000)
    s.poke(page, request.pack())
    s.mprotect(page, PAGE, PROT_READ)
    s.expect(s.ioctl(fd, 0x3B85, at=page, poke=False).errno == EFAULT, "MAP cannot answer")
    out = s.do(fd, u.iommu_ioas_unmap(ioas_id=ioas, iova=0x10000, length=PAGE))
    s.expect(out.length == PAGE, "but the mapping is there")


@check("core 1.6 reserved")
def reserved_fields_and_unknown_flags(s: Subject) -> None:
    """EOPNOTSUPP before any lookup, for every command that checks."""
    fd = s.open()
    for struct in (
        u.iommu_ioas_alloc(flags=1),
        u.iommu_ioas_iova_ranges(ioas_id=99, reserved=1),
        u.iommu_ioas_allow_iovas(ioas_id=99, reserved=1),
        u.iommu_ioas_map(flags=8, ioas_id=99),
        u.iommu_ioas_map(flags=6, ioas_id=99, reserved=1),
        u.iommu_ioas_map_file(flags=8, ioas_id=99),
        u.iommu_ioas_copy(flags=8, src_ioas_id=99),
        u.iommu_option(option_id=0, reserved=1),
        u.iommu_option(option_id=2),
        u.iommu_vfio_ioas(reserved=1),
        u.iommu_hwpt_alloc(reserved=1),
        u.iommu_hw_info(flags=2),
        u.iommu_hwpt_set_dirty_tracking(flags=2),
        u.iommu_hwpt_get_dirty_bitmap(flags=2),
        u.iommu_hwpt_get_dirty_bitmap(reserved=1),
        u.iommu_hwpt_invalidate(reserved=1),
        u.iommu_fault_alloc(flags=1),
        u.iommu_viommu_alloc(flags=1),
        u.iommu_veventq_alloc(flags=1),
        u.iommu_hw_queue_alloc(flags=1),
        u.iommu_ioas_change_process(reserved=1),
    ):
        s.refuses(EOPNOTSUPP, fd, struct)


@check("core 1.4 resp")
def the_answer_goes_out_with_emsgsize(s: Subject) -> None:
    fd = s.open()
    ioas = s.do(fd, u.iommu_ioas_alloc()).out_ioas_id
    out = s.refuses(EMSGSIZE, fd, u.iommu_ioas_iova_ranges(ioas_id=ioas))
    s.expect((out.num_iovas, out.out_iova_alignment) == (1, 1), "one range, alignment 1")
