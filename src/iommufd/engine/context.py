"""Context: one open of ``/dev/iommu`` (kernel: struct iommufd_ctx).

Everything a program makes belongs to the open file it made it through; the last reference to that file tears all of it
down (core 1.1). Kernel-internal holders (fault queues, access files, bound devices) keep the context with
:meth:`~iommufd.engine.file.File.get`.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from iommufd.engine.dispatch import FIRST_NR, Call, dispatch, run
from iommufd.engine.file import File, Pending
from iommufd.engine.mmap import MmapStore, check_mapping, map_region, mapping_closed, mapping_opened
from iommufd.engine.object import ObjectTable
from iommufd.engine.pages import Owner
from iommufd.engine.task import CAP_IPC_LOCK
from iommufd.errors import KernelError
from iommufd.memory.accounting import Mode

if TYPE_CHECKING:
    from collections.abc import Callable

    from iommufd.engine.group import IGroup
    from iommufd.engine.ioas import IOAS
    from iommufd.engine.sw_msi import MsiMap
    from iommufd.engine.task import Task
    from iommufd.engine.world import World

IOMMUFD_TYPE = 0x3B00


class Context(File):
    """State of one open file: its objects, its account mode (core 6.1), its compatibility IOAS (core 4.16).

    ``account_mode`` is Mode.USER, or Mode.MM for a context opened through /dev/vfio/vfio.
    """

    link = "/dev/iommu"
    mappable = True

    def __init__(self, world: World, *, account_mode: Mode = Mode.USER, mode: int = 2) -> None:
        super().__init__()
        self.world = world
        self.objects = ObjectTable(world)
        self.account_mode = account_mode
        self.compat_ioas: IOAS | None = None
        self.no_iommu_mode = False
        self.mode = mode
        self.store = MmapStore()
        self.on_release: list[Callable[[Context], None]] = []
        self.groups: dict[int, IGroup] = {}  # by identity of the core group, while a device of it is bound
        self.sw_msi_maps: list[MsiMap] = []
        self.changing_process = False  # an IOAS_CHANGE_PROCESS runs: no IOAS is published meanwhile (core 4.4 row 4)
        self._owner: Owner | None = None

    def ioctl(self, task: Task, cmd: int, arg: int) -> int | Pending:
        """core 1.3: the native table by ``nr``, everything else to the VFIO-compatible commands."""
        nr, world = cmd & 0xFF, self.world
        if nr < FIRST_NR or nr > world.top_nr:  # row 1
            compat = world.compat_ioctl
            if compat is None:
                raise KernelError(errno.ENOTTY, f"there is no command {cmd:#x}")
            return compat(self, task, cmd, arg)
        if world.instruments:
            return dispatch(self, task, cmd, arg)
        return run(Call(self, world, task, cmd, arg), world, task, cmd, arg)

    def mmap(self, task: Task, offset: int, length: int, prot: int, shared: bool) -> tuple[int, int]:
        """core 1.7. In the store every region lies at the offset it is mapped at."""
        check_mapping(self.mode, offset, prot, shared)
        map_region(self, offset, length)
        return (self.memory_fd if self.memory_fd >= 0 else self.store.fd), offset

    def mapping_opened(self, offset: int) -> None:
        mapping_opened(self, offset)

    def mapping_closed(self, offset: int) -> None:
        mapping_closed(self, offset)

    def owner(self, task: Task) -> Owner:
        """Whose memory a mapping made by ``task`` is, and who pays for its pins (core 6.1)."""
        process, space = task.process, task.space
        mode = Mode.NONE if task.capable(CAP_IPC_LOCK) else self.account_mode
        owner = self._owner
        if (
            owner is None
            or owner.space is not space
            or owner.process is not process
            or owner.user is not process.user
            or owner.mode is not mode
        ):
            owner = self._owner = Owner(process, process.user, space, mode)
        return owner

    def release(self) -> None:
        """The last reference went: everything goes, leaves first (core 2.8)."""
        self.objects.teardown()
        self.store.close()
        for done in self.on_release:
            done(self)
