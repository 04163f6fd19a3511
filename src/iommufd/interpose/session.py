"""One run of a program on a machine, from start to the last of its processes."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from iommufd.interpose.children import Children
from iommufd.interpose.filter import compile_filter, descriptor_range
from iommufd.interpose.launch import EXIT_SUPERVISOR, LaunchError, start
from iommufd.interpose.supervisor import Supervisor
from iommufd.interpose.syscalls import ARCHES, host_arch

if TYPE_CHECKING:
    from iommufd.machine.machine import Machine
    from iommufd.memory.physical import Physical
    from iommufd.memory.space import AddressSpace

SWITCH_INTERVAL = 0.0005


def run(
    machine: Machine,
    argv: Sequence[str],
    *,
    pin_tracking: bool = True,
    env: Mapping[str, str] | None = None,
    make_space: Callable[[int, Physical], AddressSpace] | None = None,
) -> int:
    """Runs ``argv`` on ``machine`` and returns its wait status when nobody of its tree is left.

    Call it in the main thread. LaunchError with the exit code and one sentence when the program cannot be run."""
    if host_arch() is None:
        here, known = os.uname().machine, " and ".join(ARCHES)
        raise LaunchError(EXIT_SUPERVISOR, f"programs of {here} cannot be supervised, only those of {known}")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    base, top = descriptor_range(soft if soft != resource.RLIM_INFINITY else 1024)
    program = compile_filter(base, top, pin_tracking=pin_tracking)
    sys.setswitchinterval(SWITCH_INTERVAL)
    children = Children()
    try:
        launched = start(argv, program, env=env, signal_mask=children.mask_before, die_with_parent=True)
        if soft < hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # ours only: each file of the machine takes one
        try:
            supervisor = Supervisor(machine, launched.listener, base, top, make_space=make_space)
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
        return status
    finally:
        children.restore()
