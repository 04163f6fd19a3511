"""One run of a program on a machine, from start to the last of its processes."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from iommufd.interpose.children import ENDING, Children
from iommufd.interpose.filter import compile_filter, descriptor_range
from iommufd.interpose.launch import EXIT_SUPERVISOR, LaunchError, start
from iommufd.interpose.realm import SWITCH_INTERVAL as SWITCH_INTERVAL
from iommufd.interpose.realm import Realm
from iommufd.interpose.supervisor import Supervisor
from iommufd.interpose.syscalls import ARCHES, host_arch

if TYPE_CHECKING:
    from iommufd.machine.machine import Machine
    from iommufd.memory.physical import Physical
    from iommufd.memory.space import AddressSpace


def check_host() -> None:
    """LaunchError when programs of this host's architecture cannot be supervised."""
    if host_arch() is None:
        here, known = os.uname().machine, " and ".join(ARCHES)
        raise LaunchError(EXIT_SUPERVISOR, f"programs of {here} cannot be supervised, only those of {known}")


def own_range() -> tuple[int, int]:
    """The descriptors ``[base, top)`` that a program with our limit is given."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return descriptor_range(soft if soft != resource.RLIM_INFINITY else 1024)


def run(
    machine: Machine,
    argv: Sequence[str],
    *,
    pin_tracking: bool = True,
    env: Mapping[str, str] | None = None,
    make_space: Callable[[int, Physical], AddressSpace] | None = None,
    listen: str | None = None,
) -> int:
    """Runs ``argv`` on ``machine`` and returns its wait status when nobody of its tree is left.

    ``listen``: a socket on which other trees may join (:mod:`.attach`); they too must be gone then. Call it in the main
    thread. LaunchError with the exit code and one sentence when the program cannot be run."""
    check_host()
    base, top = own_range()
    program = compile_filter(base, top, pin_tracking=pin_tracking)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        realm = Realm(machine)
    except OSError as error:
        raise LaunchError(EXIT_SUPERVISOR, f"the supervisor cannot be set up: {error}") from None
    children = Children()
    door = None
    try:
        if listen is not None:
            from iommufd.interpose.attach import Door  # few runs have company

            try:
                door = Door(machine, listen, realm=realm)
            except OSError as error:
                raise LaunchError(EXIT_SUPERVISOR, f"cannot listen at {listen!r}: {error.strerror}") from None
        launched = start(argv, program, env=env, signal_mask=children.mask_before, die_with_parent=True)
        if soft < hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # ours only: each file of the machine takes one
        try:
            supervisor = Supervisor(
                machine, launched.listener, base, top, realm=realm, roots=(os.getpid(),), make_space=make_space
            )
        except OSError as error:
            launched.cancel()
            children.wait(launched.pid)
            raise LaunchError(EXIT_SUPERVISOR, f"the supervisor cannot be set up: {error}") from None
        supervisor.start()
        try:
            launched.go()
        except BaseException:
            children.wait(launched.pid)
            supervisor.finish()
            raise
        status = children.wait(launched.pid)
        supervisor.finish()
        if door is not None:
            door.refuse_more()
            while not realm.wait_for_trees(0, 0.2):
                info = signal.sigtimedwait(ENDING, 0)
                if info is not None:
                    break
        return status
    finally:
        if door is not None:
            door.close()
        realm.close()
        children.restore()
