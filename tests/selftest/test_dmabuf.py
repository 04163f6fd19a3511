"""The test exporter of dma-bufs (mock-device 8)."""

from __future__ import annotations

import errno
import os

import pytest

from iommufd.engine.hwpt import HwptPaging
from iommufd.errors import KernelError
from iommufd.machine.presets import preset
from iommufd.selftest.dmabuf import MockDmaBuf
from iommufd.uapi import iommufd as u
from iommufd.uapi import iommufd_test as t
from tests.engine.fakes import TestDmaBuf
from tests.selftest.mock import Mock

PAGE = 4096
IOVA = t.MOCK_APERTURE_START


@pytest.fixture
def m() -> Mock:
    return Mock()


def get(m: Mock, length: int = 4 * PAGE, flags: int = 0) -> int:
    return m.raw(t.IOMMU_TEST_CMD, t.test_dmabuf_get(size=72, op=22, length=length, open_flags=flags).pack())


def buffer(m: Mock, fd: int) -> MockDmaBuf:
    found = m.proc.installed[fd]
    assert isinstance(found, MockDmaBuf)
    return found


def map_file(
    m: Mock, fd: int, iova: int | None = IOVA, start: int = 0, length: int = 2 * PAGE
) -> u.iommu_ioas_map_file:
    flags = 6 if iova is None else 7
    return u.iommu_ioas_map_file(flags=flags, ioas_id=m.ioas_id, fd=fd, start=start, length=length, iova=iova or 0)


def phys(m: Mock, iova: int = IOVA) -> int:
    return m.find(m.auto, HwptPaging).domain.iova_to_phys(iova)


def revoke(m: Mock, fd: int, revoked: int = 1) -> None:
    m.op(t.test_dmabuf_revoke(dmabuf_fd=fd, revoked=revoked))


@pytest.mark.parametrize(("length", "size"), [(1, PAGE), (PAGE, PAGE), (PAGE + 1, 2 * PAGE), (2 << 20, 2 << 20)])
def test_sizes(m: Mock, length: int, size: int) -> None:  # mock-device 8.1
    file = buffer(m, get(m, length, os.O_RDWR | os.O_NONBLOCK))
    assert (file.size, file.mode, file.link) == (size, os.O_RDWR, "/dmabuf:")


@pytest.mark.parametrize("length", [0, (2 << 20) + 1, 2**32 - 1])
def test_impossible_sizes(m: Mock, length: int) -> None:  # mock-device 8.1 row 1
    m.op_refuses(errno.EINVAL, t.test_dmabuf_get(length=length))


def test_no_descriptor_left(m: Mock) -> None:  # mock-device 8.1 row 2
    before = m.ledger()
    m.proc.free_fds = 0
    m.op_refuses(errno.EMFILE, t.test_dmabuf_get(length=PAGE))
    assert m.ledger() == before
    assert len(m.world.physical.frames) == 0


def test_the_release_that_does_not_report_the_descriptor() -> None:  # mock-device 8.1 row 3
    caller = Mock()
    caller.world.defects = preset("mock@7.3.4").world.defects
    assert get(caller) == 0
    assert list(caller.proc.installed) == [3]


def test_the_file(m: Mock) -> None:  # mock-device 8.1; the rest observed on 7.3.4
    file = buffer(m, get(m))
    task = m.proc.task()
    assert (file.size, file.poll()) == (4 * PAGE, 5)
    assert [file.lseek(task, 0, os.SEEK_END), file.lseek(task, 0, os.SEEK_SET)] == [4 * PAGE, 0]
    for call in (
        lambda: file.lseek(task, 1, os.SEEK_SET),
        lambda: file.lseek(task, 0, os.SEEK_CUR),
        lambda: file.mmap(task, 0, PAGE, 3, True),
        lambda: file.read(task, 0, 1),
    ):
        with pytest.raises(KernelError, match="EINVAL"):
            call()


def test_devices_reach_its_bytes(m: Mock) -> None:
    fd = get(m)
    m.do(map_file(m, fd, start=PAGE))
    assert m.world.physical.read(phys(m), 4) == bytes(4)
    m.destroy(m.stdev)
    m.destroy(m.ioas_id)
    m.close(fd)
    assert len(m.world.physical.frames) == 0


def test_mapping(m: Mock) -> None:  # core 7, mock-device 8.2
    fd = get(m)
    m.refuses(errno.EINVAL, map_file(m, fd, length=5 * PAGE))
    m.do(map_file(m, fd))
    assert phys(m, IOVA + PAGE) == phys(m) + PAGE  # contiguous
    assert m.pinned_vm == 0
    access = m.op(t.test_create_access(id=m.ioas_id, flags=1)).out_access_fd
    m.op_refuses(errno.EINVAL, t.test_access_pages(id=access, iova=IOVA, length=PAGE))
    m.op_refuses(errno.EINVAL, t.test_access_rw(id=access, iova=IOVA, length=PAGE, uptr=0x6000_0000))


def test_revoking_is_for_good(m: Mock) -> None:  # mock-device 8.2 row 4
    fd = get(m)
    m.do(map_file(m, fd))
    revoke(m, fd)
    assert phys(m) == 0
    m.refuses(errno.ENODEV, map_file(m, fd, None))
    m.hwpt()  # a later domain maps nothing of it
    revoke(m, fd, 0)
    assert phys(m) == 0
    m.do(map_file(m, fd, IOVA + 16 * PAGE))
    assert phys(m, IOVA + 16 * PAGE)
    m.unmap(m.ioas_id, IOVA, 2 * PAGE)
    revoke(m, fd, 0)  # an un-revoke takes live mappings away too
    assert phys(m, IOVA + 16 * PAGE) == 0


def test_what_can_be_revoked(m: Mock) -> None:  # mock-device 8.2 rows 1-3
    m.proc.files[50] = lambda: m.context
    m.proc.files[51] = lambda: TestDmaBuf(m.world, 1)
    for fd, number in ((-1, errno.EBADF), (49, errno.EBADF), (50, errno.EINVAL), (51, errno.EOPNOTSUPP)):
        m.op_refuses(number, t.test_dmabuf_revoke(dmabuf_fd=fd, revoked=1))
