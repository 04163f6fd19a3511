"""Machines: what opens on them, what stat shows, what each release hides, what is left behind."""

from __future__ import annotations

import os
import stat

import pytest

from iommufd.engine.context import Context
from iommufd.errors import KernelError
from iommufd.machine.machine import Machine
from iommufd.machine.presets import PRESETS, UnknownMachine, preset
from iommufd.memory.accounting import Mode
from iommufd.uapi.commands import COMMANDS


def test_dev_iommu_is_a_new_context_every_time() -> None:
    machine = preset("default")
    first, second = (machine.open("/dev/iommu", None, os.O_RDWR) for _ in range(2))
    assert isinstance(first, Context)
    assert isinstance(second, Context)
    assert machine.contexts == [first, second]
    assert (first.mode, first.account_mode) == (os.O_RDWR, Mode.USER)
    first.put()
    assert machine.contexts == [second]


def test_the_container_path_accounts_by_mm() -> None:  # core 1.1
    context = preset("default").open("/dev/vfio/vfio", None, os.O_RDONLY | os.O_CLOEXEC)
    assert isinstance(context, Context)
    assert (context.mode, context.account_mode) == (os.O_RDONLY, Mode.MM)
    assert preset("mock@7.3.4").open("/dev/vfio/vfio", None, os.O_RDWR) is None


def test_other_paths_are_not_ours() -> None:
    machine = preset("default")
    for path in ("/dev/null", "/dev/iommu/x", "dev/iommu", "/dev/vfio", "/dev/vfio/0"):
        assert machine.open(path, None, os.O_RDWR) is None
    with pytest.raises(KernelError, match="ENOTDIR"):
        machine.open("/dev/iommu", None, os.O_RDONLY | os.O_DIRECTORY)
    with pytest.raises(KernelError, match="EINVAL"):
        machine.open("/dev/iommu", None, os.O_RDWR | os.O_DIRECT)


def test_what_stat_shows() -> None:
    nodes = preset("default").paths()
    iommu, vfio = nodes["/dev/iommu"], nodes["/dev/vfio/vfio"]
    assert stat.S_ISCHR(iommu.mode)
    assert stat.S_ISCHR(vfio.mode)
    assert iommu.rdev[0] == 10
    assert vfio.rdev == (10, 196)
    assert stat.S_IMODE(vfio.mode) == 0o666
    assert nodes["/dev/vfio"].is_directory


def test_a_closed_machine_opens_nothing() -> None:
    with preset("default") as machine:
        context = machine.open("/dev/iommu", None, os.O_RDWR)
        stopped: list[str] = []
        machine.on_close(lambda: stopped.append("first"))
        machine.on_close(lambda: stopped.append("second"))
    assert stopped == ["second", "first"]
    machine.close()
    assert machine.open("/dev/iommu", None, os.O_RDWR) is None
    assert context in machine.contexts  # open files live on


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    machine = preset(name)
    assert machine.name == name
    assert machine.world.test_build == ("mock" in name or "edu" in name)
    assert bool(machine.world.defects) == ("@" in name or "edu" in name)  # what the oracle's kernel has is like it
    assert PRESETS[name].summary


@pytest.mark.parametrize("name", ["", "mock@6.6", "Mock", "x" * 1000])
def test_unknown_machines_name_the_known_ones(name: str) -> None:
    with pytest.raises(UnknownMachine) as caught:
        preset(name)
    assert all(known in str(caught.value) for known in PRESETS)


@pytest.mark.parametrize("kernel", ["6.2", "6.6", "6.13.4", "7.3", (6, 7)])
def test_a_release_hides_what_came_later(kernel: str | tuple[int, ...]) -> None:
    machine = preset("mock", kernel)
    shown = machine.world.kernel
    wanted = {c.number for c in COMMANDS if c.since <= shown}
    assert set(machine.world.table) == wanted
    hwpt_alloc = machine.world.table.get(0x3B89)
    if hwpt_alloc is not None:
        assert hwpt_alloc.full == {(6, 6): 24, (6, 7): 40}.get(shown, 48)


@pytest.mark.parametrize("kernel", ["6.1", "5.19", "2"])
def test_releases_without_iommufd(kernel: str) -> None:
    with pytest.raises(ValueError, match=r"6\.2|two numbers"):
        preset("mock", kernel)


@pytest.mark.parametrize("kernel", ["7.4", "9.9"])
def test_releases_to_come(kernel: str) -> None:
    with pytest.raises(ValueError, match=f"Linux {kernel} is newer than 7.3"):
        preset("mock", kernel)


@pytest.mark.parametrize("kernel", ["", "new", "-1"])
def test_what_is_no_release(kernel: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        preset("mock", kernel)


def test_build_options() -> None:
    assert Machine("bare", noiommu=False).world.noiommu_driver is None
    assert Machine("full").world.noiommu_driver is not None
