"""Subjects over software machines in this process, chosen by what a check needs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, cast

from iommufd.client.backends.software import SoftwareBackend
from iommufd.client.backends.software.own_task import OwnProcess, OwnTask, task_class
from iommufd.errors import KernelError
from iommufd.machine.presets import preset
from iommufd.memory.accounting import Process, shown_kb
from iommufd.memory.proc import ProcHost
from iommufd.memory.space import AddressSpace
from iommufd.testing.subject import Subject
from iommufd.testing.system import Child, System

if TYPE_CHECKING:
    from iommufd.client.backend import Backend

MACHINES = {"vtd": "edu", "noiommu": "edu-noiommu"}
"""What a check needs -> the machine that has it."""

ALL = 2**64 - 1


def machine_for(needs: frozenset[str]) -> str:
    """The preset that a check is played on: the mock hardware, bit for bit, unless it ``needs`` another."""
    return next((MACHINES[need] for need in sorted(needs & MACHINES.keys())), "mock@7.3.4")


def software_subject(needs: frozenset[str] = frozenset()) -> Subject:
    """A fresh machine with what a check ``needs``.

    The caller has every capability, as root on the machine where transcripts are recorded."""
    backend = SoftwareBackend(preset(machine_for(needs)))
    backend.owner.pretended = ALL
    return Subject(backend, SoftwareSystem(backend))


class SoftwareSystem(System):
    """This process as a machine in it must be told of it."""

    def __init__(self, backend: SoftwareBackend) -> None:
        super().__init__()
        self.backend = backend
        self.owner = backend.owner

    def before_unmap(self, start: int, end: int) -> None:
        self.owner.space.unmap(start, end)

    def numbers(self) -> set[int]:
        return set(self.backend.descriptors.numbers)

    def real_path(self, path: str) -> str:
        return os.path.realpath(self.backend.machine.tree.real(path))

    def set_capabilities(self, effective: tuple[int, int]) -> tuple[int, int]:
        before = self.owner.pretended
        assert before is not None  # see software_subject
        self.owner.pretended = effective[0] | effective[1] << 32
        return before & 0xFFFF_FFFF, before >> 32

    def locked_and_pinned(self) -> tuple[int, int]:
        space = self.owner.space
        return shown_kb(space.locked_vm), shown_kb(space.pinned_vm)

    def fork(self) -> tuple[Backend, System]:
        tasks, system = ChildTasks.of(self.backend, Child())
        return cast("Backend", tasks), system  # ioctls are all that a check asks of a child


class ChildProcess(OwnProcess):
    """What a child is to the machine: an address space of its own, the parent's user."""

    def __init__(self, backend: SoftwareBackend, pid: int) -> None:
        self.pid = backend.owner.pid  # who makes the calls
        self.physical = backend.machine.world.physical
        self.host = ProcHost(pid)
        self.space = AddressSpace(self.physical, self.host, f"pid {pid}")
        self.process = Process(pid, backend.owner.process.user, self.space)
        self.initial_namespace = True
        self.pretended = backend.owner.pretended


class ChildTasks:
    """A child's ioctls: made here, on the child's memory."""

    name = "child"

    def __init__(self, backend: SoftwareBackend, task: type[OwnTask]) -> None:
        self._find = backend.descriptors.find
        self._task = task

    @classmethod
    def of(cls, backend: SoftwareBackend, child: Child) -> tuple[ChildTasks, System]:
        owner = ChildProcess(backend, child.pid)
        return cls(backend, task_class(owner, backend.descriptors)), ChildSystem(backend, child, owner)

    def ioctl(self, fd: int, cmd: int, arg: int) -> int:
        file = self._find(fd)
        assert file is not None, f"descriptor {fd} is not the machine's"
        try:
            result = file.ioctl(self._task(None), cmd, arg)
        except KernelError as error:
            raise OSError(error.errno, error.why) from None
        assert isinstance(result, int), "a child waits for nothing"
        return result


class ChildSystem(SoftwareSystem):
    """A child as the machine must be told of it."""

    def __init__(self, backend: SoftwareBackend, child: Child, owner: ChildProcess) -> None:
        super().__init__(backend)
        self.memory = child
        self.owner = owner

    def before_exit(self) -> None:
        self.owner.space.gone()
