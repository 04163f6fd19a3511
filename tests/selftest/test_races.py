"""Threads that make, use and destroy vIOMMUs, vDEVICEs, queues and attachments of one context, all at once."""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Callable
from struct import pack

import pytest

from iommufd.errors import KernelError
from iommufd.uapi import iommufd as u
from iommufd.uapi import iommufd_test as t
from tests.engine.fakes import ARRAY, BUFFER, Caller
from tests.selftest.mock import FAULT, NEST, Mock

IOVA = t.MOCK_APERTURE_START
DOCUMENTED = {
    errno.ENOENT,
    errno.EINVAL,
    errno.EBUSY,
    errno.EEXIST,
    errno.EIO,
    errno.EOPNOTSUPP,
    errno.EFAULT,
    errno.ESPIPE,
}

pytestmark = pytest.mark.usefixtures("fast_switches")


class Worker(Mock):
    """A process of its own on the machine and context of another."""

    def __init__(self, first: Mock, seed: int) -> None:
        Caller.__init__(self, first.world, context=first.context)
        self.machine = first.machine
        self.ioas_id, self.stdev, self.auto, self.dev = first.ioas_id, first.stdev, first.auto, first.dev
        self.random = random.Random(seed)
        self.unexpected: list[str] = []

    def number(self) -> int:
        return self.random.randint(4, 24)

    def queue_fd(self) -> int | None:
        return self.random.choice(list(self.proc.installed)) if self.proc.installed else None

    def step(self, parent: int) -> None:
        pick, n = self.random.choice, self.number
        fd = self.queue_fd()
        viommus = [o.id for o in self.context.objects if o.kind == "VIOMMU"]
        viommu = pick(viommus) if viommus else n()
        self.host.poke(ARRAY, pack("<IIQQ", 1, 0, 0, 0))
        steps: list[Callable[[], object]] = [
            lambda: self.do(
                u.iommu_viommu_alloc(
                    type=t.IOMMU_VIOMMU_TYPE_SELFTEST, dev_id=self.dev, hwpt_id=parent, data_len=24, data_uptr=ARRAY
                )
            ),
            lambda: self.vdevice(viommu, self.random.randint(1, 3)),
            lambda: self.vdevice(viommu, self.random.randint(1, 3)),
            lambda: self.nested(viommu),
            lambda: self.do(
                u.iommu_veventq_alloc(viommu_id=viommu, type=t.IOMMU_VEVENTQ_TYPE_SELFTEST, veventq_depth=2)
            ),
            lambda: self.do(
                u.iommu_hw_queue_alloc(
                    viommu_id=viommu,
                    type=t.IOMMU_HW_QUEUE_TYPE_SELFTEST,
                    index=pick((0, 1)),
                    nesting_parent_iova=IOVA + 4096 * pick((0, 1)),
                    length=4096,
                )
            ),
            lambda: self.do(u.iommu_fault_alloc()),
            lambda: self.hwpt(FAULT, fault_id=n()),
            lambda: self.replace(n()),
            lambda: self.replace(self.ioas_id),
            lambda: self.op(t.test_trigger_iopf(dev_id=self.dev, grpid=1, perm=1)),
            lambda: self.op(t.test_trigger_vevent(dev_id=self.dev)),
            lambda: self.do(
                u.iommu_hwpt_invalidate(
                    hwpt_id=n(), data_uptr=ARRAY, data_type=t.IOMMU_VIOMMU_TYPE_SELFTEST, entry_len=12, entry_num=1
                )
            ),
            lambda: self.destroy(n()),
            lambda: self.destroy(n()),
            lambda: self.destroy(viommu),
            lambda: self.map_and_unmap(pick((0x1000, 0x3000))),
            lambda: self.device_comes_and_goes(viommu),
            lambda: fd is not None and self.queue_read(fd, 120),
            lambda: fd is not None and self.queue_write(fd, pack("<II", self.random.randint(1, 3), 0)),
            lambda: self.close(fd) if fd is not None and len(self.proc.installed) > 3 else None,
        ]
        pick(steps)()

    def map_and_unmap(self, offset: int) -> None:
        try:
            self.context.mmap(self.proc.task(), offset, 0x2000, 3, True)
        except KernelError as error:
            if error.errno != errno.ENXIO:
                raise
            return
        self.context.mapping_opened(offset)
        self.context.mapping_closed(offset)
        self.context.mapping_closed(offset)

    def device_comes_and_goes(self, viommu: int) -> None:
        """A device with a vDEVICE that others may see and destroy, unbound at once."""
        stdev, _, dev = self.device()
        try:
            self.vdevice(viommu, self.random.randint(4, 9), dev)
        finally:
            self.destroy(stdev)

    def run(self, parent: int, rounds: int) -> None:
        for _ in range(rounds):
            try:
                self.step(parent)
            except KernelError as error:
                if error.errno not in DOCUMENTED:
                    self.unexpected.append(str(error))
            except BaseException as error:
                self.unexpected.append(repr(error))
                raise


@pytest.mark.parametrize("seed", range(2))
def test_nothing_breaks_and_nothing_stays(seed: int) -> None:
    first = Mock()
    parent = first.hwpt(NEST)
    first.map(first.ioas_id, IOVA, 2 * 4096, BUFFER)
    workers = [Worker(first, seed * 10 + n) for n in range(4)]
    threads = [threading.Thread(target=worker.run, args=(parent, 300), daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a deadlock"
    assert [worker.unexpected for worker in workers] == [[], [], [], []]
    for worker in workers:
        for fd in list(worker.proc.installed):
            worker.close(fd)
    first.context.put()
    assert first.context.references == 0
    assert len(first.context.objects) == 0
    assert len(first.context.store.regions) == 0
    first.quiet()
