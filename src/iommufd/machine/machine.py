"""Machine: the composition root of one software machine (no kernel object; it stands for the running kernel).

Invariants:

* A Machine owns one World and its dispatch table; everything a program can open on it comes out of
  :meth:`Machine.open`.
* Nothing below this room imports it; drivers and rows arrive here and nowhere else.
* A context is listed in :attr:`Machine.contexts` from open until the last reference to its file is gone. What it held
  at that moment is remembered in :attr:`Machine.left`, so that ``--check`` can name what a program never gave back.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Self

from iommufd.engine.context import Context
from iommufd.engine.dispatch import build_table
from iommufd.engine.vfio_compat import compat_ioctl
from iommufd.engine.world import LATEST, World
from iommufd.errors import KernelError
from iommufd.iommu.drivers.noiommu import NoiommuDriver
from iommufd.machine import census
from iommufd.machine.node import Node as Node
from iommufd.machine.node import directory
from iommufd.machine.rows import ENGINE_ROWS, RowOf
from iommufd.memory.accounting import Mode

if TYPE_CHECKING:
    from iommufd.engine.file import File
    from iommufd.engine.task import Task
    from iommufd.machine.pci import PciBus
    from iommufd.machine.sysfs import Tree

MISC_MAJOR = 10
IOMMU_MINOR = 125  # the kernel takes the next dynamic minor; this is one it may take
VFIO_MINOR = 196

Claim = Callable[[str], "Node | None"]
"""Recognises paths that cannot be listed beforehand (those under /proc/PID)."""


class Machine:
    """One software machine: a World, the commands of its release, and the paths that open on it.

    ``kernel`` is the release whose uAPI is shown, ``defects`` the known bugs of that release that are reproduced,
    ``vfio_container`` whether /dev/vfio/vfio is served (CONFIG_IOMMUFD_VFIO_CONTAINER).
    """

    def __init__(
        self,
        name: str,
        *,
        kernel: tuple[int, ...] = LATEST,
        defects: Iterable[str] = (),
        noiommu: bool = True,
        vfio_container: bool = True,
    ) -> None:
        self.name = name
        release = (kernel[0], kernel[1])
        self.world = World(kernel=release, defects=defects, noiommu=noiommu, vfio_container=vfio_container)
        self.world.compat_ioctl = compat_ioctl
        if noiommu:
            self.world.noiommu_driver = NoiommuDriver()
        self._rows = list(ENGINE_ROWS)
        self._nodes: dict[str, Node] = {}
        self.generation = 0  # changes with the set of paths
        self._claims: list[Claim] = []
        self._tree: Tree | None = None
        self._pci: PciBus | None = None
        self._contexts: dict[int, Context] = {}
        self._closers: list[Callable[[], None]] = []
        self._closed = False
        self.left: list[str] = []
        self.add_node(Node("/dev/iommu", stat.S_IFCHR | 0o666, (MISC_MAJOR, IOMMU_MINOR), self._open_iommu))
        if vfio_container:
            self.add_node(directory("/dev/vfio", whole=True))
            self.add_node(Node("/dev/vfio/vfio", stat.S_IFCHR | 0o666, (MISC_MAJOR, VFIO_MINOR), self._open_vfio))
        self._build()

    def add_rows(self, rows: Iterable[RowOf], top_nr: int | None = None) -> None:
        """More commands (a test command, another front end); ``top_nr`` raises the table's last ``nr`` (core 1.3)."""
        self._rows.extend(rows)
        if top_nr is not None:
            self.world.top_nr = max(self.world.top_nr, top_nr)
        self._build()

    def _build(self) -> None:
        self.world.table = build_table(self._rows, self.world.kernel)

    def add_node(self, node: Node) -> None:
        """One more path; a later node of the same path replaces the earlier."""
        self._nodes[node.path] = node
        self.generation += 1
        if self._tree is not None:
            self._tree.add(node)

    def add_claim(self, claim: Claim) -> None:
        """Paths the machine also serves, though they are in no listing; asked in order for what has no node."""
        self._claims.append(claim)

    def remove_node(self, path: str) -> None:
        """The path disappears; files already open stay."""
        self._nodes.pop(path, None)
        self.generation += 1
        if self._tree is not None:
            self._tree.remove(path)

    def on_close(self, closer: Callable[[], None]) -> None:
        """Registers what :meth:`close` must stop (device threads, sockets); run in reverse order."""
        self._closers.append(closer)

    def paths(self) -> dict[str, Node]:
        """Every path this machine serves, with what ``stat`` says of it."""
        return dict(self._nodes)

    def node(self, path: str) -> Node | None:
        """What there is at ``path`` (absolute, resolved), claimed paths included; None when it is not ours.

        Directories that only lie above a node have none themselves; :attr:`tree` knows them."""
        found = self._nodes.get(path)
        if found is None:
            for claim in self._claims:
                found = claim(path)
                if found is not None:
                    break
        return found

    @property
    def pci(self) -> PciBus:
        """The machine's PCI functions; ``machine.pci.add("0000:01:00.0")`` adds one that is bound to vfio-pci."""
        if self._pci is None:
            from iommufd.machine.pci import PciBus  # most machines have none

            self._pci = PciBus(self)
        return self._pci

    @property
    def tree(self) -> Tree:
        """Every listed path as a real directory tree, made on first use and kept up to date until :meth:`close`."""
        if self._tree is None:
            from iommufd.machine.sysfs import Tree  # most runs never list anything

            self._tree = Tree(self._nodes.values())
            self.on_close(self._tree.close)
        return self._tree

    def open(self, path: str, task: Task | None, flags: int) -> File | None:
        """Opens ``path`` (absolute, resolved) with the flags of open(2); None when the path is not one of ours.

        KernelError ENOTDIR for O_DIRECTORY on a device; directories are not ours to open (the caller lists
        :meth:`paths`)."""
        node = self.node(path)
        if node is None or node.opener is None or self._closed:
            return None
        if flags & _O_DIRECTORY:
            raise KernelError(errno.ENOTDIR, f"{path} is a device, not a directory")
        return node.opener(task, flags)

    def _open_iommu(self, task: Task | None, flags: int) -> File:
        return self._context(Mode.USER, flags)

    def _open_vfio(self, task: Task | None, flags: int) -> File:
        """core 1.1: the container path gives an iommufd context that accounts in MM mode."""
        return self._context(Mode.MM, flags)

    def _context(self, account_mode: Mode, flags: int) -> Context:
        context = _MachineContext(self, account_mode, flags & 3)
        self._contexts[id(context)] = context
        return context

    def _leaving(self, context: Context) -> None:
        self._contexts.pop(id(context), None)
        self.left.extend(census.sentences(context))

    @property
    def contexts(self) -> list[Context]:
        """The live contexts, oldest first."""
        return list(self._contexts.values())

    def leaks(self) -> list[str]:
        """One sentence per object, mapping and pin still alive, or alive when its context's last reference went."""
        found = list(self.left)
        for context in self.contexts:
            found.append(f"a /dev/iommu context is still open with {census.count(len(context.objects), 'object')}")
            found.extend(census.sentences(context))
        return found

    def close(self) -> None:
        """Nothing can be opened any more and the machine's own workers stop. Open files live on with their holders."""
        if self._closed:
            return
        self._closed = True
        for closer in reversed(self._closers):
            closer()
        self._closers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        release = ".".join(map(str, self.world.kernel))
        return f"<Machine {self.name}, Linux {release}, {census.count(len(self._contexts), 'open context')}>"


_O_DIRECTORY = 0o200000


class _MachineContext(Context):
    """A context that tells its machine when it goes, before its objects are torn down."""

    def __init__(self, machine: Machine, account_mode: Mode, mode: int) -> None:
        super().__init__(machine.world, account_mode=account_mode, mode=mode)
        self._machine = machine

    def release(self) -> None:
        self._machine._leaving(self)
        super().release()
