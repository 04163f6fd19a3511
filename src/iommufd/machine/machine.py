"""Machine: the composition root of one software machine (no kernel object; it stands for the running kernel).

Invariants:

* A Machine owns one World and its dispatch table; everything a program can open on it comes out of
  :meth:`Machine.open`.
* Nothing below this room imports it; drivers and rows arrive here and nowhere else.
* Building (IOMMUs, devices, test hardware) is :mod:`.builder`'s, looking inside :mod:`.snapshot`'s; both are reached
  through methods here.
* The doors are built on the machine, not the machine on them: those that run programs (:meth:`Machine.popen`,
  :meth:`Machine.listen`) are looked up by name when somebody goes through one.
* A context is listed in :attr:`Machine.contexts` from open until the last reference to its file is gone. What it held
  at that moment is remembered in :attr:`Machine.left`, so that ``--check`` can name what a program never gave back.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, Self

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
from iommufd.uapi.declare import release as parse_release
from iommufd.uapi.declare import show_release

if TYPE_CHECKING:
    import os

    from iommufd.engine.fail import Rule
    from iommufd.engine.file import File
    from iommufd.engine.task import Task
    from iommufd.iommu.device import Device
    from iommufd.iommu.drivers.pci_basic import PciBasicDriver
    from iommufd.iommu.faults import PageRequest
    from iommufd.machine.builder import Reserved
    from iommufd.machine.pci import PciBus
    from iommufd.machine.snapshot import Snapshot
    from iommufd.machine.sysfs import Tree
    from iommufd.vfio.device import VfioDevice
    from iommufd.vfio.pci_config import PciLayout
    from iommufd.vfio.pci_function import PciFunction

MISC_MAJOR = 10
IOMMU_MINOR = 125  # the kernel takes the next dynamic minor; this is one it may take
VFIO_MINOR = 196
FIRST_RELEASE = (6, 2)

Claim = Callable[[str], "Node | None"]
"""Recognises paths that cannot be listed beforehand (those under /proc/PID)."""


def shown_release(kernel: object) -> tuple[int, int]:
    """A release as two numbers, from ``"6.6"`` or a tuple of numbers. ValueError for one without iommufd, or none."""
    if isinstance(kernel, str):
        try:
            kernel = parse_release(kernel)
        except ValueError:
            raise ValueError(f"{kernel!r} is not a kernel release such as 6.6") from None
    if not isinstance(kernel, tuple) or len(kernel) < 2 or not all(isinstance(part, int) for part in kernel):
        raise ValueError(f"a kernel release has at least two numbers, not {kernel!r}")
    if kernel[:2] < FIRST_RELEASE:
        raise ValueError(f"Linux {show_release(kernel)} has no /dev/iommu; it came with 6.2")
    if kernel[:2] > LATEST:
        raise ValueError(f"Linux {show_release(kernel)} is newer than {show_release(LATEST)}, the latest known here")
    return kernel[0], kernel[1]


class Machine:
    """One software machine: a World, the commands of its release, and the paths that open on it.

    ``Machine()`` is a kernel with iommufd and no devices; :meth:`add_device` and its kin make it richer, at any time.
    ``kernel`` is the release whose uAPI is shown (``"6.6"``, or a tuple), ``defects`` the known bugs of that release
    that are reproduced, ``noiommu`` whether devices without an IOMMU can be used, ``vfio_container`` whether
    /dev/vfio/vfio is served (CONFIG_IOMMUFD_VFIO_CONTAINER).
    """

    def __init__(
        self,
        name: str = "custom",
        *,
        kernel: str | tuple[int, ...] = LATEST,
        defects: Iterable[str] = (),
        noiommu: bool = True,
        vfio_container: bool = True,
    ) -> None:
        self.name = name
        release = shown_release(kernel)
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
        self.iommus: dict[str, PciBasicDriver] = {}
        self.programs: list[Any] = []  # what popen started (see there why Any) and nobody has seen the end of
        self.realm: object = None  # the interposer's: the trees of programs on this machine
        self._contexts: dict[int, Context] = {}
        self._closers: list[Callable[[], None]] = []
        self._settlers: list[Callable[[], None]] = []
        self._closed = False
        self.left: list[str] = []
        self.add_node(Node("/dev/iommu", stat.S_IFCHR | 0o666, (MISC_MAJOR, IOMMU_MINOR), self._open_iommu))
        if vfio_container:
            self.add_node(directory("/dev/vfio", whole=True))
            self.add_node(Node("/dev/vfio/vfio", stat.S_IFCHR | 0o666, (MISC_MAJOR, VFIO_MINOR), self._open_vfio))
        self._build()

    # ---- building. **options and **config are Any as in :mod:`.builder`, which checks them

    def add_iommu(self, driver: str = "pci_basic", name: str | None = None, **options: Any) -> PciBasicDriver:
        """One more IOMMU, called ``iommu0`` and so on unless ``name`` says otherwise; give it to :meth:`add_device`.

        ``pci_basic`` (the only one so far) takes ``dirty=True`` (dirty tracking), ``page_requests=True`` (its devices
        may fault), ``max_pasids``, ``enforces_coherency``. ValueError for a driver there is not or a name that is
        taken, TypeError for options it does not take."""
        from iommufd.machine import builder

        return builder.add_iommu(self, driver, name, **options)

    def add_device(
        self,
        address: str,
        *,
        iommu: PciBasicDriver | str | None = None,
        group: str | None = None,
        reserved: Iterable[Reserved] = (),
        noiommu: bool = False,
        pasids: int = 0,
        isolated_msi: bool = True,
        model: Callable[[PciLayout, str, dict[int, int]], PciFunction] | None = None,
        layout: PciLayout | None = None,
        **config: Any,
    ) -> VfioDevice:
        """A PCI function at ``address`` (``"0000:01:00.0"``), bound to vfio-pci, with its place in /dev and /sys.

        ``iommu``: the IOMMU it is behind, or its name (default: the first, made when there is none). ``group``:
        functions with the same word share an IOMMU group; without one each has its own. ``reserved``: IOVA that its
        mappings must stay out of, ``(first, last)`` or ``(first, last, type)``, ``last`` inclusive, with types
        ``reserved``, ``direct``, ``direct-relaxable``, ``msi``, ``sw-msi``. ``noiommu``: nothing is in front of it.
        ``pasids``: how many PASIDs it can tell apart.

        What it is made of: members of :class:`~iommufd.vfio.pci_config.PciLayout` (``vendor``, ``device``,
        ``bars=[0x10000, ...]``, ``msix``, ...) or a whole ``layout``; ``model`` makes its behaviour (default: memory
        and silence). ValueError with one sentence for whatever cannot be."""
        from iommufd.machine import builder

        given = {**config, **({} if model is None else {"model": model})}
        return builder.add_device(
            self,
            address,
            iommu=iommu,
            group=group,
            reserved=reserved,
            noiommu=noiommu,
            pasids=pasids,
            isolated_msi=isolated_msi,
            layout=layout,
            **given,
        )

    def add_mock(self) -> None:
        """The kernel's selftest hardware: its test command (CONFIG_IOMMUFD_TEST) and fault injection files."""
        from iommufd.machine import builder

        builder.add_mock(self)

    @property
    def devices(self) -> list[Device]:
        """Every device now: the PCI functions, and what else is bound to an open context (mock devices)."""
        from iommufd.engine.device import Device as Bound

        found = {slot.core.name: slot.core for slot in self._pci.slots.values()} if self._pci is not None else {}
        for context in self.contexts:
            found |= {obj.device.name: obj.device for obj in context.objects if isinstance(obj, Bound)}
        return list(found.values())

    # ---- both ends of a test

    # what these two return are types of a room above this one, which it must not know, not even by name: Any

    def popen(self, args: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], **options: Any) -> Any:
        """Starts an unmodified program on this machine, supervised by this process, and returns at once.

        Everything :class:`subprocess.Popen` takes and gives, works: this is a subclass of it
        (:class:`iommufd.interpose.popen.Program`). ``pin_tracking=False`` as ``iommufd run --no-pin-tracking``. What
        the program has open is in :meth:`snapshot` while it runs. OSError as subprocess has it,
        :class:`~iommufd.interpose.launch.LaunchError` when programs cannot be supervised here."""
        return import_module("iommufd.interpose.popen").Program(self, args, **options)

    def listen(self, path: str | os.PathLike[str]) -> Any:
        """Lets ``iommufd run --attach PATH`` put other programs on this machine, of the same user, until closed.

        Returns a :class:`iommufd.interpose.attach.Door`, a context manager. OSError when the socket cannot be made."""
        return import_module("iommufd.interpose.attach").Door(self, path)

    def snapshot(self) -> Snapshot:
        """What is there at this moment: contexts, their objects, areas and who holds their pages. Never changes."""
        from iommufd.machine.snapshot import take

        self._settle()
        return take(self)

    def page_request(
        self, device: str, address: int, perm: str = "r", *, pasid: int | None = None, group: int = 0, last: bool = True
    ) -> PageRequest:
        """The hardware of ``device`` (a name of :attr:`devices`) reports a page request at ``address``.

        ``perm``: of the letters ``r``, ``w``, ``x``, ``p`` (privileged). Requests up to one with ``last`` of the same
        ``group`` number belong together. The result's ``answer`` is set once a program responds. OSError EINVAL when
        nobody takes it (nothing attached, no fault queue); ValueError for a device there is not."""
        from iommufd.machine import builder

        return builder.page_request(self, device, address, perm, pasid, group, last)

    @contextmanager
    def failing(self, rule: Rule | str) -> Iterator[Rule]:
        """Inside the block calls fail by ``rule``, as ``iommufd run --fail``: ``"IOAS_MAP:nth=3:ENOMEM"``.

        The Rule counts ``count`` occurrences and ``hits``."""
        from iommufd.engine.fail import fail_rule

        with fail_rule(self.world, rule) as made:
            yield made

    def on_settle(self, settle: Callable[[], None]) -> None:
        """Registers what must be done before anybody looks inside (releases that programs caused)."""
        self._settlers.append(settle)

    def _settle(self) -> None:
        for settle in self._settlers:
            settle()

    # ---- composition

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

        KernelError ENOTDIR for O_DIRECTORY on a device, EINVAL for O_DIRECT; directories are not ours to open (the
        caller lists :meth:`paths`)."""
        node = self.node(path)
        if node is None or node.opener is None or self._closed:
            return None
        if flags & _O_DIRECTORY:
            raise KernelError(errno.ENOTDIR, f"{path} is a device, not a directory")
        file = node.opener(task, flags)
        if flags & os.O_DIRECT:  # the VFS asks only after the file has agreed
            file.put()
            raise KernelError(errno.EINVAL, f"{path} is a device; O_DIRECT is for files")
        return file

    def _open_iommu(self, task: Task | None, flags: int) -> File:
        return self._context(Mode.USER, task, flags)

    def _open_vfio(self, task: Task | None, flags: int) -> File:
        """core 1.1: the container path gives an iommufd context that accounts in MM mode."""
        context = self._context(Mode.MM, task, flags)
        context.link = "/dev/vfio/vfio"
        return context

    def _context(self, account_mode: Mode, task: Task | None, flags: int) -> Context:
        context = _MachineContext(self, account_mode, flags & 3, task.tid if task is not None else 0)
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
        self._settle()
        found = list(self.left)
        for context in self.contexts:
            found.append(f"a /dev/iommu context is still open with {census.count(len(context.objects), 'object')}")
            found.extend(census.sentences(context))
        return found

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

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
        release = show_release(self.world.kernel)
        return f"<Machine {self.name}, Linux {release}, {census.count(len(self._contexts), 'open context')}>"


_O_DIRECTORY = 0o200000


class _MachineContext(Context):
    """A context that tells its machine when it goes, before its objects are torn down. ``opener``: the thread."""

    def __init__(self, machine: Machine, account_mode: Mode, mode: int, opener: int) -> None:
        super().__init__(machine.world, account_mode=account_mode, mode=mode)
        self.opener = opener
        self._machine = machine

    def release(self) -> None:
        self._machine._leaving(self)
        super().release()
