"""open(): which /dev/iommu it is, and what is said when there is none."""

from __future__ import annotations

import errno
import gc
import os
from pathlib import Path
from typing import Any

import pytest

import iommufd
from iommufd.client.backends.kernel import KernelBackend
from iommufd.client.backends.software import SoftwareBackend, software
from iommufd.machine.presets import UnknownMachine
from iommufd.testing.mock import MockDevice

absent = pytest.mark.skipif(Path("/dev/iommu").exists(), reason="this system has a /dev/iommu")


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IOMMUFD_BACKEND", raising=False)
    monkeypatch.delenv("IOMMUFD_MACHINE", raising=False)


@absent
@pytest.mark.parametrize("arguments", [{}, {"backend": "kernel"}])
def test_without_a_device_it_says_how_to_ask_for_software(arguments: dict[str, Any]) -> None:
    with pytest.raises(
        FileNotFoundError, match=r'no /dev/iommu.*iommufd\.open\(machine="mock"\).*IOMMUFD_BACKEND=soft'
    ) as at:
        iommufd.open(**arguments)
    assert isinstance(at.value, iommufd.IommufdError)
    assert at.value.errno == errno.ENOENT


class Shut(KernelBackend):
    """A system whose /dev/iommu is not for us."""

    name = "shut"

    def open(self, path: str, flags: int) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")


def test_a_device_that_may_not_be_opened() -> None:
    with pytest.raises(PermissionError, match="may not open it"):
        iommufd.open(backend=Shut())


def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IOMMUFD_BACKEND", "software")
    with iommufd.open() as context:
        assert isinstance(context.backend, SoftwareBackend)
        assert context.backend.machine.name == "default"
    monkeypatch.setenv("IOMMUFD_MACHINE", "mock")
    with iommufd.open() as context:
        MockDevice(context, context.alloc_ioas())
    monkeypatch.delenv("IOMMUFD_BACKEND")
    with iommufd.open() as context:
        MockDevice(context, context.alloc_ioas())


@absent
def test_the_kernel_can_be_asked_for_in_spite_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IOMMUFD_BACKEND", "kernel")
    monkeypatch.setenv("IOMMUFD_MACHINE", "mock")
    with pytest.raises(FileNotFoundError):
        iommufd.open()


def test_arguments_beat_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IOMMUFD_BACKEND", "nonsense")
    with iommufd.open(machine="mock"):
        pass
    with iommufd.open(backend="software"):
        pass


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"backend": "hardware"}, ValueError, '"kernel" or "software"'),
        ({"backend": "kernel", "machine": "mock"}, ValueError, "machine is software"),
        ({"backend": KernelBackend(), "machine": "mock"}, ValueError, "machine is software"),
        ({"machine": "mick"}, UnknownMachine, "there is no machine 'mick'; there are: default, "),
        ({"machine": 7}, TypeError, "a machine is a Machine or the name of one, not int"),
        ({"machine": "mock", "kernel": "5.10"}, ValueError, "came with 6.2"),
        ({"machine": iommufd.Machine("m"), "kernel": "6.6"}, ValueError, "has its kernel release"),
    ],
)
def test_what_means_nothing_is_refused(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        iommufd.open(**arguments)


def test_a_bad_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IOMMUFD_BACKEND", "Software")
    with pytest.raises(ValueError, match="not 'Software'"):
        iommufd.open()


def test_a_name_is_one_machine_while_it_is_open() -> None:
    with iommufd.open(machine="mock") as first, iommufd.open(machine="mock") as second:
        assert first.backend is second.backend
        assert isinstance(first.backend, SoftwareBackend)
        assert len(first.backend.machine.contexts) == 2
        with iommufd.open(machine="mock", kernel="6.6") as older:
            assert older.backend is not first.backend
    machine = first.backend.machine
    del first, second
    gc.collect()
    with iommufd.open(machine="mock") as third:
        assert isinstance(third.backend, SoftwareBackend)
        assert third.backend.machine is not machine


def test_a_machine_has_one_backend_in_a_process() -> None:
    machine = iommufd.Machine("mine")
    with iommufd.open(machine) as first, iommufd.open(machine=machine, backend="software") as second:
        assert first.backend is second.backend is software(machine)
        assert machine.contexts


def test_a_release_without_the_command_says_so() -> None:
    """--kernel 6.6: no fault queues yet; what there was works with structs that have grown since."""
    with iommufd.open(machine="mock", kernel="6.6") as context:
        ioas = context.alloc_ioas()
        ioas.map(bytearray(64)).unmap()
        with pytest.raises(iommufd.IommufdError) as at:
            context.alloc_fault_queue()
        assert at.value.errno == errno.ENOTTY


def test_a_descriptor_from_elsewhere_can_be_adopted(system: str) -> None:
    with iommufd.open("mock" if system == "software" else None) as context:
        ioas = context.alloc_ioas()
        mapping = ioas.map(bytearray(4096))
        again = iommufd.adopt(os.dup(context.fileno()), context.backend)
        same = again.adopt(iommufd.IOAS, ioas.number)
        assert same.unmap(mapping.iova, mapping.length) == 4096
        again.close()
        assert same.closed
        ioas.map(bytearray(8))  # the first descriptor is still there
    with pytest.raises(ValueError, match="a descriptor -1"):
        iommufd.adopt(-1, context.backend)
