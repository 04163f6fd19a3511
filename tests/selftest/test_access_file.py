"""The mock access file (mock-device 6, 7)."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from iommufd.errors import KernelError
from iommufd.selftest.access_file import AccessFile
from iommufd.uapi import iommufd as u
from iommufd.uapi import iommufd_test as t
from tests.engine.fakes import ARRAY, BUFFER, FakeProcess
from tests.selftest.mock import Mock

PAGE = 4096
IOVA = 0x5000
WRITE, SYZ, PINS = 1, 0x10000, 1


class Rig(Mock):
    """An IOAS of its own with four pages mapped, and an access that may pin."""

    def __init__(self) -> None:
        super().__init__()
        self.io = self.ioas()
        self.fd = self.create(self.io)
        self.map(self.io, IOVA, 4 * PAGE)

    def create(self, ioas: int, flags: int = PINS) -> int:
        return self.op(t.test_create_access(id=ioas, flags=flags)).out_access_fd

    def pages(self, **fields: int) -> t.test_access_pages:
        return t.test_access_pages(**{"id": self.fd, "iova": IOVA, "length": PAGE, **fields})

    def pin(self, **fields: int) -> int:
        return self.op(self.pages(**fields)).out_access_pages_id

    def rw(self, **fields: int) -> t.test_access_rw:
        return t.test_access_rw(**{"id": self.fd, "iova": IOVA, "length": PAGE, "uptr": ARRAY, **fields})

    def file(self) -> AccessFile:
        found: Any = self.proc.installed[self.fd]
        assert isinstance(found, AccessFile)
        return found


@pytest.fixture
def r() -> Rig:
    return Rig()


def test_creating(r: Rig) -> None:  # mock-device 6.1
    before = r.ledger()
    r.op_refuses(errno.EOPNOTSUPP, t.test_create_access(id=99, flags=2))
    r.op_refuses(errno.ENOENT, t.test_create_access(id=99))
    r.op_refuses(errno.ENOENT, t.test_create_access(id=r.auto))
    r.proc.free_fds, free = 0, r.proc.free_fds
    r.op_refuses(errno.ENOMEM, t.test_create_access(id=r.io))  # not EMFILE
    r.proc.free_fds = free
    crooked = r.ioas()
    r.map(crooked, 0x1000, 0x10)
    r.op_refuses(errno.EADDRINUSE, t.test_create_access(id=crooked, flags=PINS))
    other = r.create(crooked, 0)
    r.close(other)
    r.destroy(crooked)
    assert r.ledger() == before


def test_the_file(r: Rig) -> None:  # mock-device 6.1
    file = r.file()
    assert (file.link, file.mode, file.poll()) == ("anon_inode:[iommufd_test_staccess]", 2, 0x145)
    task = r.proc.task()
    for number, call in (
        (errno.EINVAL, lambda: file.read(task, ARRAY, 8)),
        (errno.EINVAL, lambda: file.write(task, ARRAY, 8)),
        (errno.ENOTTY, lambda: file.ioctl(task, 0x3B80, ARRAY)),
        (errno.ENODEV, lambda: file.mmap(task, 0, PAGE, 3, True)),
    ):
        with pytest.raises(KernelError) as caught:
            call()
        assert caught.value.errno == number


def test_closing_unpins_and_lets_the_context_go(r: Rig) -> None:  # mock-device 6.1
    file = r.file()
    r.pin()
    r.pin(length=2 * PAGE)
    references = r.context.references
    r.close(r.fd)
    assert (r.pinned_vm, r.context.references) == (0, references - 1)
    assert file.references == 0


def test_descriptors_that_are_no_access(r: Rig) -> None:  # mock-device 6.1: EBADFD
    r.proc.files[77] = lambda: r.context
    for fd in (77, 78, 0xFFFFFFFF):
        for cmd in (r.pages(id=fd), r.rw(id=fd), t.test_destroy_access_pages(id=fd), t.test_access_replace_ioas(id=fd)):
            r.op_refuses(errno.EBADFD, cmd)


def test_what_comes_before_the_pin(r: Rig) -> None:  # mock-device 6.2 rows 1-4
    r.op_refuses(errno.ENOMEM, r.pages(id=78, length=(16 << 20) + 1, flags=2))
    r.op_refuses(errno.EOPNOTSUPP, r.pages(id=78, flags=2))
    plain = r.create(r.io, 0)
    r.op_refuses(errno.EOPNOTSUPP, r.pages(id=plain, length=0))


def test_pins_and_items(r: Rig) -> None:  # mock-device 6.2, 6.3
    r.op_refuses(errno.EINVAL, r.pages(length=0))
    r.op_refuses(errno.EOVERFLOW, r.pages(iova=2**64 - 1, length=2))
    r.op_refuses(errno.ENOENT, r.pages(iova=0x4000))
    r.op_refuses(errno.ENOENT, r.pages(length=5 * PAGE))
    r.op_refuses(errno.EINVAL, r.pages(iova=IOVA + 0x10))
    assert r.pinned_vm == 0
    assert (r.pin(), r.pin(length=0x10), r.pin(flags=WRITE, uptr=BUFFER)) == (0, 1, 2)
    r.op_refuses(errno.EBADE, r.pages(uptr=BUFFER + PAGE))
    r.op_refuses(errno.EFAULT, r.pages(uptr=0xDEAD_0000))
    assert r.pinned_vm == 1
    r.op(t.test_destroy_access_pages(id=r.fd, access_pages_id=1))
    r.op_refuses(errno.ENOENT, t.test_destroy_access_pages(id=r.fd, access_pages_id=1))
    assert r.pin() == 3


def test_whole_pages_are_compared(r: Rig) -> None:  # mock-device 6.2 row 12
    """Wherever in the first page ``uptr`` points."""
    for offset in (0, 1, 0x800, PAGE - 1):
        r.pin(length=2 * PAGE - 0x800, uptr=BUFFER + offset)
        r.op_refuses(errno.EBADE, r.pages(length=2 * PAGE - 0x800, uptr=BUFFER + PAGE + offset))


def test_an_answer_that_cannot_be_written(r: Rig) -> None:  # mock-device 6.2 row 13
    r.host.map(0x2000_0000, 1)
    r.host.poke(0x2000_0000, t.test_access_pages(size=72, op=7, id=r.fd, iova=IOVA, length=PAGE).pack())
    r.host.protect(0x2000_0000, 1, 1)
    with pytest.raises(KernelError):
        r.context.ioctl(r.proc.task(), t.IOMMU_TEST_CMD, 0x2000_0000)
    assert r.pinned_vm == 0
    assert r.pin() == 1  # the number is consumed


def test_unmapping_drops_the_items_it_meets(r: Rig) -> None:  # mock-device 6.4
    r.map(r.io, 0x20000, PAGE)
    first, second = r.pin(length=2 * PAGE), r.pin(iova=0x20000)
    r.unmap(r.io, IOVA, 4 * PAGE)
    r.op_refuses(errno.ENOENT, t.test_destroy_access_pages(id=r.fd, access_pages_id=first))
    r.op(t.test_destroy_access_pages(id=r.fd, access_pages_id=second))
    assert r.pinned_vm == 0


def test_moving_to_another_ioas(r: Rig) -> None:  # mock-device 6.5
    item = r.pin()
    move = t.test_access_replace_ioas
    r.op_refuses(errno.ENOENT, move(id=r.fd, ioas_id=99))
    r.op(move(id=r.fd, ioas_id=r.io))
    crooked = r.ioas()
    r.map(crooked, 0x1000, 0x10)
    r.op_refuses(errno.EADDRINUSE, move(id=r.fd, ioas_id=crooked))
    assert r.pinned_vm == 1
    r.op(move(id=r.fd, ioas_id=r.ioas()))
    r.op_refuses(errno.ENOENT, t.test_destroy_access_pages(id=r.fd, access_pages_id=item))
    r.op_refuses(errno.ENOENT, r.pages())
    assert r.pinned_vm == 0


def test_copies(r: Rig) -> None:  # mock-device 6.6
    r.op_refuses(errno.ENOMEM, r.rw(id=78, length=(16 << 20) + 1, flags=2))
    r.op_refuses(errno.EOPNOTSUPP, r.rw(id=78, flags=2))
    r.op_refuses(errno.EFAULT, r.rw(flags=WRITE, uptr=0xDEAD_0000, length=PAGE, iova=0))
    r.op_refuses(errno.EINVAL, r.rw(length=0))
    r.op_refuses(errno.EOVERFLOW, r.rw(iova=2**64 - 1, length=2))
    r.host.poke(ARRAY, b"written")
    r.op(r.rw(flags=WRITE, iova=IOVA + PAGE - 3, length=7))
    assert bytes(r.host.peek(BUFFER + PAGE - 3, 7)) == b"written"
    for slow in (0, t.MOCK_ACCESS_RW_SLOW_PATH):
        r.host.poke(ARRAY, bytes(7))
        r.op(r.rw(flags=slow, iova=IOVA + PAGE - 3, length=7))
        assert bytes(r.host.peek(ARRAY, 7)) == b"written"
    r.op_refuses(errno.EFAULT, r.rw(uptr=0xDEAD_0000))
    r.host.poke(ARRAY, b"\xff" * PAGE * 2)
    r.op_refuses(errno.ENOENT, r.rw(flags=WRITE, iova=IOVA + 3 * PAGE, length=2 * PAGE))
    assert bytes(r.host.peek(BUFFER + 3 * PAGE, PAGE)) == b"\xff" * PAGE  # what came before the hole is written
    r.host.poke(ARRAY, bytes(4))
    r.op_refuses(errno.ENOENT, r.rw(iova=IOVA + 3 * PAGE, length=2 * PAGE))
    assert bytes(r.host.peek(ARRAY, 4)) == bytes(4)  # a failing read copies nothing out


def test_the_syzkaller_form(r: Rig) -> None:  # mock-device 7
    r.map(r.io, 0x20000, PAGE, va=BUFFER + 8 * PAGE)
    r.host.poke(BUFFER + 8 * PAGE + 5, b"second")
    r.op(r.rw(flags=SYZ, iova=1 | 5 << 32, length=6))
    assert bytes(r.host.peek(ARRAY, 6)) == b"second"
    r.op_refuses(errno.ENOENT, r.rw(flags=SYZ, iova=2 | 5 << 32, length=6))  # no third area: IOVA 0
    out = r.op(r.pages(flags=SYZ, iova=1, uptr=BUFFER + 8 * PAGE))
    assert out.iova == 1  # the response does not tell


def test_another_context_may_use_the_descriptor(r: Rig) -> None:  # mock-device 6.1
    other = Mock()
    other.proc.files[50] = lambda: r.file()
    assert isinstance(other.proc, FakeProcess)
    other.op(t.test_destroy_access_pages(id=50, access_pages_id=r.pin()))
    assert r.do(u.iommu_ioas_alloc()).out_ioas_id
