"""IOMMU_OPTION: the account mode of a context, large pages of an IOAS (core 3)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from iommufd.engine.dispatch import Call, Handler, Respond
from iommufd.engine.ioas import IOAS
from iommufd.engine.task import CAP_SYS_RESOURCE
from iommufd.errors import KernelError
from iommufd.memory.accounting import Mode
from iommufd.uapi import iommufd as u
from iommufd.uapi.commands import BY_NAME

if TYPE_CHECKING:
    from iommufd.uapi.commands import Command

VAL64_AT = 16


def option(call: Call) -> None:
    """IOMMU_OPTION; the answer is ``val64`` alone, written for GET and SET."""
    cmd = call.cmd
    assert isinstance(cmd, u.iommu_option)
    if cmd.reserved:  # row 1
        raise KernelError(errno.EOPNOTSUPP, f"__reserved {cmd.reserved:#x} is not 0")
    if cmd.option_id == u.IOMMU_OPTION_RLIMIT_MODE:  # row 3
        rlimit_mode(call, cmd)
    elif cmd.option_id == u.IOMMU_OPTION_HUGE_PAGES:
        huge_pages(call, cmd)
    else:  # row 2
        raise KernelError(errno.EOPNOTSUPP, f"option {cmd.option_id} is not known")
    call.task.write(call.arg + VAL64_AT, cmd.val64.to_bytes(8, "little"))  # row 4


def rlimit_mode(call: Call, cmd: u.iommu_option) -> None:
    """Who is charged for pinned pages: the user (0) or the process (1)."""
    context = call.context
    if cmd.object_id:  # row 1
        raise KernelError(errno.EOPNOTSUPP, f"the option belongs to the file, not to object {cmd.object_id}")
    if cmd.op == u.IOMMU_OPTION_OP_GET:  # row 2
        cmd.val64 = int(context.account_mode is Mode.MM)
    elif cmd.op == u.IOMMU_OPTION_OP_SET:
        if not call.task.capable(CAP_SYS_RESOURCE):  # row 3
            raise KernelError(errno.EPERM, "changing the account mode needs CAP_SYS_RESOURCE")
        with call.world.lock:
            if len(context.objects):  # row 4
                raise KernelError(errno.EBUSY, f"the file has {len(context.objects)} object(s) already")
            if cmd.val64 > 1:  # row 5
                raise KernelError(errno.EINVAL, f"{cmd.val64} is neither 0 (user) nor 1 (process)")
            context.account_mode = Mode.MM if cmd.val64 else Mode.USER
    else:  # row 6
        raise KernelError(errno.EOPNOTSUPP, f"op {cmd.op} is neither SET nor GET")


def huge_pages(call: Call, cmd: u.iommu_option) -> None:
    """Whether an IOAS uses IOMMU pages larger than a page of memory."""
    table = call.get(cmd.object_id, IOAS).io_pagetable  # row 1
    if cmd.op == u.IOMMU_OPTION_OP_GET:  # row 2
        cmd.val64 = int(not table.large_pages_disabled)
    elif cmd.op == u.IOMMU_OPTION_OP_SET:
        if cmd.val64 == 0:  # rows 3-6
            table.disable_large_pages()
        elif cmd.val64 == 1:  # row 7
            table.enable_large_pages()
        else:  # row 8
            raise KernelError(errno.EINVAL, f"{cmd.val64} is neither 0 nor 1")
    else:  # row 9
        raise KernelError(errno.EOPNOTSUPP, f"op {cmd.op} is neither SET nor GET")


ROWS: list[tuple[Command, Handler, Respond]] = [(BY_NAME["IOMMU_OPTION"], option, Respond.HANDLER)]
