"""VDEVICE (events 7): one per device, one per virtual id, and tombstones."""

from __future__ import annotations

import errno
import threading
import time

import pytest

from iommufd.engine.device import unbind
from iommufd.engine.failpoints import SLAB
from iommufd.errors import KernelError
from iommufd.iommu.driver import Iommu
from iommufd.uapi import iommufd as u
from tests.engine.flat_task import BASE, FlatTask, as_task, expect
from tests.engine.small_iommu import PlainOps, Rig


@pytest.fixture
def rig() -> Rig:
    return Rig()


def alloc(viommu: int, dev: int, virt_id: int = 1) -> u.iommu_vdevice_alloc:
    return u.iommu_vdevice_alloc(viommu_id=viommu, dev_id=dev, virt_id=virt_id)


def make(rig: Rig, viommu: int, dev: int = 0, virt_id: int = 1) -> int:
    return rig.do(alloc(viommu, dev or rig.dev, virt_id)).out_vdevice_id


def test_every_virtual_id_is_possible(rig: Rig) -> None:  # events-7-1
    viommu = rig.viommu()
    for virt_id in (0, 2**32, 2**64 - 1):
        rig.destroy(make(rig, viommu, virt_id=virt_id))


def test_lookups(rig: Rig) -> None:  # events-7-2 events-7-3
    viommu = rig.viommu()
    rig.fails(errno.ENOENT, alloc(99, rig.dev))
    rig.fails(errno.ENOENT, alloc(rig.dev, rig.dev))
    rig.fails(errno.ENOENT, alloc(viommu, 99))
    rig.fails(errno.ENOENT, alloc(viommu, viommu))


def test_the_device_is_behind_the_same_iommu(rig: Rig) -> None:  # events-7-4
    viommu = rig.viommu()
    rig.fails(errno.EINVAL, alloc(viommu, rig.bind(Iommu("another")).id))
    rig.idev.device.iommu = None
    rig.fails(errno.EINVAL, alloc(viommu, rig.dev))


def test_a_device_that_is_being_unbound(rig: Rig) -> None:  # events-7-5
    viommu = rig.viommu()
    rig.idev.destroying = True
    rig.fails(errno.ENOENT, alloc(viommu, rig.dev))


def test_one_vdevice_per_device_whatever_the_viommu(rig: Rig) -> None:  # events-7-6
    first, second = rig.viommu(), rig.viommu()
    vdev = make(rig, first)
    rig.fails(errno.EEXIST, alloc(first, rig.dev, 2))
    rig.fails(errno.EEXIST, alloc(second, rig.dev, 2))
    rig.destroy(vdev)
    make(rig, second)


def test_no_memory_for_the_object(rig: Rig) -> None:  # events-7-7
    viommu = rig.viommu()
    rig.world.fail = lambda point, task: point == SLAB
    rig.fails(errno.ENOMEM, alloc(viommu, rig.dev))
    rig.world.fail = None
    make(rig, viommu)


def test_one_device_per_virtual_id_of_a_viommu(rig: Rig) -> None:  # events-7-8
    first, second = rig.viommu(), rig.viommu()
    other = rig.bind()
    make(rig, first, virt_id=5)
    rig.fails(errno.EEXIST, alloc(first, other.id, 5))
    make(rig, second, other.id, virt_id=5)  # namespaces are per vIOMMU


def test_the_driver_hook(rig: Rig) -> None:  # events-7-9, devices 10.5
    viommu = rig.viommu()
    rig.log.failures["vdevice_init"] = errno.ENOSPC
    rig.fails(errno.ENOSPC, alloc(viommu, rig.dev))
    assert "vdevice_destroy" not in rig.log.names()
    rig.log.failures.clear()
    vdev = make(rig, viommu, virt_id=7)
    rig.destroy(vdev)
    assert rig.log.calls[-2:] == [("vdevice_init", 7), ("vdevice_destroy", 7)]


def test_a_driver_without_hook(rig: Rig) -> None:  # events-7-9
    rig.driver.ops = PlainOps()
    rig.destroy(make(rig, rig.viommu()))


def test_undone_when_the_answer_cannot_be_written(rig: Rig) -> None:  # events-7-10
    viommu = rig.viommu()
    rig.fails_unwritten(alloc(viommu, rig.dev, 9))
    make(rig, viommu, virt_id=9)


# ----------------------------------------------------------------------------------------------------------- life cycle


def test_destroy_frees_virtual_id_and_device(rig: Rig) -> None:  # events 7 lifecycle 1
    viommu = rig.viommu()
    before = rig.state()
    vdev = make(rig, viommu)
    device = rig.object(rig.dev)
    assert (device.users, device.wait) == (3, 2)  # the table's, its driver's, the vDEVICE's
    rig.fails(errno.EBUSY, u.iommu_destroy(id=viommu))  # events 7 lifecycle 3
    rig.fails(errno.EBUSY, u.iommu_destroy(id=rig.dev))  # events 7 lifecycle 4
    rig.destroy(vdev)
    assert rig.state() == before
    assert make(rig, viommu) == vdev  # no tombstone


def test_unbind_leaves_a_tombstone(rig: Rig) -> None:  # events 7 lifecycle 2
    viommu, other = rig.viommu(), rig.bind()
    vdev = make(rig, viommu, virt_id=3)
    unbind(rig.idev)
    with expect(errno.ENOENT):
        rig.context.objects.get(vdev)
    rig.fails(errno.ENOENT, u.iommu_destroy(id=vdev))
    assert rig.context.objects.tombstones == 1
    assert rig.log.calls[-1] == ("vdevice_destroy", 3)
    again = make(rig, viommu, other.id, virt_id=3)  # the virtual id is free at once
    assert again == rig.dev  # the device's number is free, the vDEVICE's is not
    assert rig.do(u.iommu_ioas_alloc()).out_ioas_id > vdev
    rig.destroy(again)
    rig.destroy(viommu)


def test_a_vdevice_destroyed_first_leaves_none(rig: Rig) -> None:  # core 2.6
    vdev = make(rig, rig.viommu())
    rig.destroy(vdev)
    unbind(rig.idev)
    assert rig.context.objects.tombstones == 0


def test_tombstones_do_not_outlive_the_context(rig: Rig) -> None:  # core 2.2, 2.8
    make(rig, rig.viommu())
    unbind(rig.idev)
    rig.context.put()
    assert len(rig.context.objects) == 0


# ----------------------------------------------------------------------------------------------------- drivers' helpers


def test_helpers_find_only_complete_ones(rig: Rig) -> None:  # events 7
    viommu = rig.viommu_object(rig.viommu())
    device = rig.idev.device
    assert viommu.find_device(4) is None
    with expect(errno.ENOENT):
        viommu.vdev_id(device)
    seen: list[object] = []

    class Ops:
        def vdevice_init(self, vdev: object) -> None:
            seen.append(viommu.find_device(4))
            with expect(errno.ENOENT):
                viommu.vdev_id(device)

        def vdevice_destroy(self, vdev: object) -> None:
            """Nothing to undo."""

    viommu.ops = Ops()
    vdev = make(rig, viommu.id, virt_id=4)
    assert seen == [None]
    assert viommu.find_device(4) is device
    assert viommu.vdev_id(device) == 4
    rig.destroy(vdev)
    assert viommu.find_device(4) is None


def test_a_vdevice_elsewhere_does_not_help(rig: Rig) -> None:  # events 7
    first, second = rig.viommu(), rig.viommu_object(rig.viommu())
    make(rig, first)
    with expect(errno.ENOENT):
        second.vdev_id(rig.idev.device)


# ---------------------------------------------------------------------------------------------------------------- races


def test_unbind_waits_for_a_vdevice_in_the_making(rig: Rig) -> None:  # core 2.6
    """The driver's hook is slow; unbind starts meanwhile and must take the finished vDEVICE along."""
    viommu = rig.viommu_object(rig.viommu())
    inside, go_on = threading.Event(), threading.Event()

    class Slow:
        def vdevice_init(self, vdev: object) -> None:
            inside.set()
            assert go_on.wait(10)

        def vdevice_destroy(self, vdev: object) -> None:
            """Nothing to undo."""

    viommu.ops = Slow()
    task = FlatTask()
    cmd = alloc(viommu.id, rig.dev)
    cmd.size = cmd.SIZE
    task.write(BASE, cmd.pack())
    maker = threading.Thread(target=rig.context.ioctl, args=(as_task(task), u.IOMMU_VDEVICE_ALLOC, BASE))
    maker.start()
    assert inside.wait(10)
    unbinder = threading.Thread(target=unbind, args=(rig.idev,))
    unbinder.start()
    while not rig.idev.destroying:
        time.sleep(0.001)
    assert unbinder.is_alive()
    go_on.set()
    maker.join(10)
    unbinder.join(10)
    assert not unbinder.is_alive()
    assert rig.context.objects.tombstones == 1
    assert not viommu.vdevs
    assert viommu.users == 1


def test_racing_creations_of_one_virtual_id(rig: Rig) -> None:
    viommu = rig.viommu()
    devices = [rig.bind().id for _ in range(4)]
    outcome: list[int] = []
    start = threading.Barrier(len(devices))

    def create(dev: int) -> None:
        task = FlatTask()
        cmd = alloc(viommu, dev, 77)
        cmd.size = cmd.SIZE
        task.write(BASE, cmd.pack())
        start.wait()
        try:
            rig.context.ioctl(as_task(task), u.IOMMU_VDEVICE_ALLOC, BASE)
            outcome.append(0)
        except KernelError as error:
            outcome.append(error.errno)

    threads = [threading.Thread(target=create, args=(dev,)) for dev in devices]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcome) == [0] + [errno.EEXIST] * 3
