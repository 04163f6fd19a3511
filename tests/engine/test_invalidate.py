"""IOMMU_HWPT_INVALIDATE (devices 7, events 11): the checks that do not depend on the hardware."""

from __future__ import annotations

import errno

import pytest

from iommufd.engine.hwpt import HwptNested
from iommufd.iommu.domain import BaseDomain, Kind
from iommufd.uapi import iommufd as u
from tests.engine.flat_task import BASE, SIZE, expect
from tests.engine.small_iommu import PlainOps, Rig


@pytest.fixture
def rig() -> Rig:
    return Rig()


def cmd(hwpt: int, **fields: int) -> u.iommu_hwpt_invalidate:
    given = {"data_uptr": BASE, "data_type": 7, "entry_len": 8, "entry_num": 3, **fields}
    return u.iommu_hwpt_invalidate(hwpt_id=hwpt, **given)


def test_reserved(rig: Rig) -> None:  # devices-7-1, events-11-1
    assert rig.fails(errno.EOPNOTSUPP, cmd(99, reserved=1, entry_len=0)).entry_num == 0


@pytest.mark.parametrize("fields", [{"data_uptr": 0}, {"entry_len": 0}, {"entry_len": 4097}, {"entry_num": 2**19 + 1}])
def test_the_array(rig: Rig, fields: dict[str, int]) -> None:  # devices-7-2, events-11-2: before the lookup
    assert rig.fails(errno.EINVAL, cmd(99, **fields)).entry_num == 0


@pytest.mark.parametrize("fields", [{"entry_len": 4096}, {"entry_num": 2**19}, {"data_uptr": 0, "entry_num": 0}])
def test_the_largest_array_and_an_empty_one(rig: Rig, fields: dict[str, int]) -> None:  # devices-7-2
    assert rig.fails(errno.ENOENT, cmd(99, **fields)).entry_num == 0


def test_lookup(rig: Rig) -> None:  # devices-7-3, events-11-3
    assert rig.fails(errno.ENOENT, cmd(99)).entry_num == 0


def test_kinds_that_cannot_be_invalidated(rig: Rig) -> None:  # devices-7-8, events-11-4
    for number in (rig.ioas, rig.parent, rig.dev):
        assert rig.fails(errno.EINVAL, cmd(number)).entry_num == 0


def test_a_nested_domain_without_caches(rig: Rig) -> None:  # devices-7-4, events-11-5
    number = rig.nested(rig.parent)
    rig.find(number, HwptNested)._domain = BaseDomain(Kind.NESTED)
    assert rig.fails(errno.EOPNOTSUPP, cmd(number)).entry_num == 0


def test_a_viommu_without_caches(rig: Rig) -> None:  # devices-7-6, events-11-5
    rig.driver.ops = PlainOps()
    assert rig.fails(errno.EOPNOTSUPP, cmd(rig.viommu())).entry_num == 0


@pytest.mark.parametrize("on_viommu", [False, True])
def test_what_the_driver_handled_is_reported(rig: Rig, on_viommu: bool) -> None:  # devices-7-5 devices-7-7, events-11-6
    number = rig.viommu() if on_viommu else rig.nested(rig.parent)
    assert rig.do(cmd(number)).entry_num == 3
    assert ("invalidate", 7, 3) in rig.log.calls
    rig.log.failures["invalidate-2"] = errno.ENOSPC
    assert rig.fails(errno.ENOSPC, cmd(number)).entry_num == 2
    rig.log.failures = {"invalidate": errno.EINVAL}
    assert rig.fails(errno.EINVAL, cmd(number, entry_num=0)).entry_num == 0


@pytest.mark.parametrize("failing", [False, True])
def test_an_answer_that_cannot_be_written_beats_every_result(
    rig: Rig, failing: bool
) -> None:  # devices-7-9 events-11-7
    number = rig.nested(rig.parent)
    if failing:
        rig.log.failures["invalidate-0"] = errno.ENOSPC
    given = cmd(number)
    given.size = given.SIZE
    rig.task.write(BASE, given.pack())
    rig.task.write_protected = True
    with expect(errno.EFAULT):
        rig.ioctl(given, BASE)
    assert rig.log.names()[-1] in ("invalidate-0", "invalidate-2")  # and the work was done


def test_the_whole_struct_is_echoed(rig: Rig) -> None:  # core 1.5: F always
    given = cmd(99)
    given.size = 40
    rig.task.write(BASE, bytes(48))
    rig.fails(errno.ENOENT, given)
    assert u.iommu_hwpt_invalidate.unpack(rig.task.read(BASE, 32)).size == 40
    assert SIZE
