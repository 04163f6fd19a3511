"""What tests of the engine share: a process made of pages in a dict, a thread of it, a caller of ioctls, a dma-buf.

Nothing here touches real memory, so every address, protection, file kind and delay can be had, and tests run anywhere.
The engine cannot tell: AddressSpace, Process, domains and files are the real ones.
"""

from __future__ import annotations

import errno
import itertools
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import pytest

from iommufd.engine import change_process, ioas, noiommu_pa, options
from iommufd.engine.access import Access, AccessOps
from iommufd.engine.area import Area
from iommufd.engine.context import Context
from iommufd.engine.dispatch import build_table
from iommufd.engine.dmabuf import DmaBufFile
from iommufd.engine.file import File, Pending
from iommufd.engine.io_pagetable import IOPagetable
from iommufd.engine.ioas import IOAS
from iommufd.engine.pages import Pages
from iommufd.engine.world import World
from iommufd.errors import KernelError
from iommufd.iommu.extent_domain import ExtentDomain
from iommufd.memory.accounting import Mode, Process
from iommufd.memory.frames import PAGE_SIZE, Extent, Extents
from iommufd.memory.space import READ, WRITE, AddressSpace, Vma
from iommufd.uapi import iommufd as u
from iommufd.uapi.commands import COMMANDS
from iommufd.uapi.declare import Struct, members

if TYPE_CHECKING:
    from iommufd.memory.hostfile import HostFile

ROWS = [*ioas.ROWS, *options.ROWS, *change_process.ROWS, *noiommu_pa.ROWS]
NUMBERS: dict[type[Struct], int] = {command.struct: command.number for command in COMMANDS}

ULMAX = 2**64 - 1
ARG = 0x7FFF_0000_0000  # where a Caller keeps its struct
BUFFER = 0x1000_0000  # where a Caller has memory to map
BUFFER_PAGES = 0x400
ARRAY = 0x6000_0000  # where a Caller keeps arrays it passes

S = TypeVar("S", bound=Struct)
V = TypeVar("V", covariant=True)


def make_world(**options: Any) -> World:
    """A world with every row of the core."""
    world = World(**options)
    world.table = build_table(ROWS, world.kernel)
    return world


class FakeHost:
    """A process's memory: VMAs made by hand, contents in a dict of pages. See memory.space.Host."""

    def __init__(self) -> None:
        self.vmas: list[Vma] = []
        self.pages: dict[int, bytearray] = {}
        self.is_alive = True

    def map(self, va: int, npages: int, flags: int = READ | WRITE, **more: Any) -> None:
        """A new VMA; what was there goes."""
        self.unmap(va, npages)
        self.vmas.append(Vma(va, va + npages * PAGE_SIZE, flags, **more))
        self.vmas.sort(key=lambda vma: vma.start)

    def unmap(self, va: int, npages: int) -> None:
        end = va + npages * PAGE_SIZE
        kept: list[Vma] = []
        for vma in self.vmas:
            for start, stop in ((vma.start, min(vma.end, va)), (max(vma.start, end), vma.end)):
                if start < stop:
                    kept.append(Vma(start, stop, vma.flags, kind=vma.kind, dev=vma.dev, ino=vma.ino, name=vma.name))
        self.vmas = sorted(kept, key=lambda vma: vma.start)
        if npages > len(self.pages):
            gone = [page for page in self.pages if va <= page * PAGE_SIZE < end]
        else:
            gone = [page for page in range(va // PAGE_SIZE, end // PAGE_SIZE) if page in self.pages]
        for page in gone:
            del self.pages[page]

    def protect(self, va: int, npages: int, flags: int) -> None:
        contents = {p: self.pages[p] for p in range(va // PAGE_SIZE, va // PAGE_SIZE + npages) if p in self.pages}
        self.map(va, npages, flags)
        self.pages.update(contents)

    # --- the Host protocol

    def query(self, va: int) -> Vma | None:
        if not self.is_alive:
            raise ProcessLookupError(errno.ESRCH, "gone")
        return next((vma for vma in self.vmas if vma.end > va), None)

    def _span(self, va: int, count: int, need: int) -> int:
        """How many of ``count`` bytes at ``va`` are in VMAs with the flags ``need``."""
        at, end = va, va + count
        for vma in self.vmas:
            if vma.start <= at < vma.end and vma.flags & need == need:
                at = min(end, vma.end)
            if at == end:
                break
        return at - va

    def _load(self, va: int, count: int) -> bytes:
        out = bytearray()
        while count:
            page, offset = divmod(va, PAGE_SIZE)
            n = min(count, PAGE_SIZE - offset)
            content = self.pages.get(page)
            out += bytes(n) if content is None else content[offset : offset + n]
            va, count = va + n, count - n
        return bytes(out)

    def read(self, va: int, count: int) -> bytes:
        return self._load(va, self._span(va, count, READ))

    def write(self, va: int, data: bytes | bytearray | memoryview) -> int:
        return self._save(va, data, WRITE)

    def peek(self, va: int, count: int) -> bytes:
        return self._load(va, self._span(va, count, 0))

    def poke(self, va: int, data: bytes | bytearray | memoryview) -> int:
        return self._save(va, data, 0)

    def _save(self, va: int, data: bytes | bytearray | memoryview, need: int) -> int:
        done, total = 0, self._span(va, len(data), need)
        while done < total:
            page, offset = divmod(va + done, PAGE_SIZE)
            n = min(total - done, PAGE_SIZE - offset)
            self.pages.setdefault(page, bytearray(PAGE_SIZE))[offset : offset + n] = data[done : done + n]
            done += n
        return total

    def touched(self, va: int, end: int) -> list[tuple[int, int]]:
        return [(p * PAGE_SIZE, (p + 1) * PAGE_SIZE) for p in sorted(self.pages) if va <= p * PAGE_SIZE < end]

    def open_file(self, vma: Vma) -> int | None:
        return None

    def mlocked_pages(self) -> int:
        return 0

    def alive(self) -> bool:
        return self.is_alive

    def exec_coming(self) -> None:
        pass

    def close(self) -> None:
        pass


class FakeSpace(AddressSpace):
    """An address space whose page faults can be slow: ``before_pin`` runs first, without any lock."""

    __slots__ = ("before_pin",)

    def __init__(self, world: World, host: FakeHost, name: str) -> None:
        super().__init__(world.physical, host, name)
        self.before_pin: Callable[[int], object] = lambda va: None

    def pin(self, va: int, npages: int, write: bool, *, current: bool = True) -> Extents:
        self.before_pin(va)
        return super().pin(va, npages, write, current=current)


class FakeProcess:
    """A process: its memory, its limits, its descriptors. ``limit`` is RLIMIT_MEMLOCK in bytes (None: infinite)."""

    pids = itertools.count(1000)

    def __init__(self, world: World, *, uid: int = 1000, caps: Iterable[int] = (), limit: int | None = None) -> None:
        self.world = world
        self.limit = limit
        self.caps = set(caps)
        self.host = FakeHost()
        self.pid = next(self.pids)
        self.space = FakeSpace(world, self.host, f"pid {self.pid}")
        self.process = Process(self.pid, world.physical.user(uid), self.space, limit=lambda _: self.limit)
        self.files: dict[int, Callable[[], Any]] = {}
        self.installed: dict[int, File] = {}
        self.free_fds = 1 << 20

    def task(self) -> FakeTask:
        return FakeTask(self)

    def unmap(self, va: int, npages: int) -> None:
        """munmap, as the interposer announces it."""
        self.space.unmap(va, va + npages * PAGE_SIZE)
        self.host.unmap(va, npages)

    def exit(self) -> None:
        self.space.gone()
        self.host.is_alive = False


class FakeTask:
    """A thread of a FakeProcess. See engine.task.Task."""

    def __init__(self, process: FakeProcess) -> None:
        self.owner = process
        self.space = process.space
        self.process = process.process
        self.tid = threading.get_native_id()

    def read_upto(self, addr: int, count: int) -> bytes:
        return self.owner.host.read(addr, count)

    def read_into(self, addr: int, buffer: bytearray | memoryview) -> None:
        buffer[:] = self.read(addr, len(buffer))

    def read(self, addr: int, count: int) -> bytes:
        return self.space.read(addr, count)

    def write_upto(self, addr: int, data: bytes | bytearray | memoryview) -> int:
        return self.owner.host.write(addr, data)

    def write(self, addr: int, data: bytes | bytearray | memoryview) -> None:
        self.space.write(addr, data)

    def capable(self, capability: int) -> bool:
        return capability in self.owner.caps

    def file(self, fd: int) -> File | HostFile:
        found = self.owner.files.get(fd)
        if found is None:
            raise KernelError(errno.EBADF, f"descriptor {fd} is not open")
        file: File | HostFile = found()
        return file

    def reserve_fd(self, cloexec: bool) -> int:
        if not self.owner.free_fds:
            raise KernelError(errno.EMFILE, "no free descriptor")
        self.owner.free_fds -= 1
        return next(n for n in itertools.count(3) if n not in self.owner.files)

    def install_fd(self, fd: int, file: File) -> None:
        self.owner.installed[fd] = file
        self.owner.files[fd] = lambda: file

    def release_fd(self, fd: int) -> None:
        self.owner.free_fds += 1


def fails(number: int, call: Callable[[], object]) -> str:
    """``call`` fails with ``number``; the sentence."""
    with pytest.raises(KernelError) as caught:
        call()
    assert errno.errorcode[caught.value.errno] == errno.errorcode[number], caught.value.why
    assert caught.value.why
    return caught.value.why


class Caller:
    """A process with a context open and memory at hand, making ioctls with structs.

    BUFFER_PAGES writable pages at BUFFER; its structs are at ARG, its arrays at ARRAY."""

    def __init__(self, world: World | None = None, *, context: Context | None = None, **process: Any) -> None:
        self.world = world if world is not None else make_world()
        self.proc = FakeProcess(self.world, **process)
        self.host = self.proc.host
        self.context = context if context is not None else Context(self.world)
        self.host.map(ARG, 2)
        self.host.map(ARRAY, 0x100)
        self.host.map(BUFFER, BUFFER_PAGES)

    @property
    def pinned_vm(self) -> int:
        return self.proc.space.pinned_vm

    @property
    def locked_vm(self) -> int:
        return self.proc.space.locked_vm

    @property
    def user_pages(self) -> int:
        return self.proc.process.user.locked_pages

    def raw(self, number: int, data: bytes, at: int = ARG) -> int:
        """The ioctl ``number`` with its struct's bytes at ``at``; KernelError when it fails."""
        self.host.poke(at, data)
        result = self.context.ioctl(self.proc.task(), number, at)
        assert not isinstance(result, Pending)
        return result

    def do(self, struct: S, at: int = ARG) -> S:
        """An ioctl that succeeds; the struct as it came back. ``size`` is filled in when zero."""
        fill = members(struct)  # every command has a size
        if fill.size == 0:
            fill.size = struct.SIZE
        self.raw(NUMBERS[type(struct)], struct.pack(), at)
        return type(struct).unpack(self.host.peek(at, struct.SIZE))

    def refuses(self, number: int, struct: Struct, at: int = ARG) -> str:
        """An ioctl that fails with ``number``; the sentence."""
        return fails(number, lambda: self.do(struct, at))

    def after(self, kind: type[S], at: int = ARG) -> S:
        """The struct as it lies in memory now."""
        return kind.unpack(self.host.peek(at, kind.SIZE))

    # --- the usual steps

    def ioas(self) -> int:
        return self.do(u.iommu_ioas_alloc()).out_ioas_id

    def table(self, ioas_id: int) -> IOPagetable:
        """The IOPagetable of an IOAS, to look inside."""
        found = self.context.objects.get(ioas_id, IOAS)
        self.context.objects.put(found)
        assert isinstance(found, IOAS)
        return found.io_pagetable

    def area(self, ioas_id: int, iova: int) -> Area:
        """The area at ``iova``."""
        found = self.table(ioas_id).areas.find(iova)
        assert found is not None
        return found[2]

    def pages_at(self, ioas_id: int, iova: int) -> Pages:
        """The pages object behind the area at ``iova``."""
        pages = self.area(ioas_id, iova).pages
        assert pages is not None
        return pages

    def domains(self, ioas_id: int) -> list[ExtentDomain]:
        """What the IOAS is mapped in; in these tests page tables of extents."""
        return domains_of(self.table(ioas_id))

    def map(
        self, ioas_id: int, iova: int | None, length: int, va: int = BUFFER, flags: int | None = None, **more: Any
    ) -> int:
        """IOAS_MAP, FIXED when ``iova`` is given; the IOVA. Readable and writable unless ``flags`` say otherwise."""
        return self.do(map_struct(ioas_id, iova, length, va, flags, **more)).iova

    def unmap(self, ioas_id: int, iova: int, length: int) -> int:
        return self.do(u.iommu_ioas_unmap(ioas_id=ioas_id, iova=iova, length=length)).length

    def copy(self, dst: int, src: int, src_iova: int, length: int, iova: int | None = None, flags: int = 6) -> int:
        return self.do(copy_struct(dst, src, src_iova, length, iova, flags)).dst_iova

    def areas(self, ioas_id: int) -> list[tuple[int, int]]:
        return [(first, last) for first, last, _ in self.table(ioas_id).areas]

    def add_domain(self, ioas_id: int, domain: ExtentDomain | None = None) -> ExtentDomain:
        domain = domain if domain is not None else ExtentDomain(0xFFFF_F000)
        self.table(ioas_id).add_domain(domain, self.proc.task())
        return domain

    def access(self, ioas_id: int | None = None, *, pins: bool = True, unmap: Any = "ignore") -> Access:
        """An access, attached when ``ioas_id`` is given; its callback does nothing unless ``unmap`` says otherwise."""
        callback = (lambda iova, length: None) if unmap == "ignore" else unmap
        made = Access.create(self.context, AccessOps(pins, callback))
        if ioas_id is not None:
            made.attach(ioas_id)
        return made

    def quiet(self) -> None:
        """Nothing pinned, nothing charged."""
        assert (self.pinned_vm, self.locked_vm, self.user_pages) == (0, 0, 0)
        assert pinned_frames(self.world) == 0


def map_struct(
    ioas_id: int, iova: int | None, length: int, va: int = BUFFER, flags: int | None = None, **more: Any
) -> u.iommu_ioas_map:
    if flags is None:
        flags = u.IOMMU_IOAS_MAP_READABLE | u.IOMMU_IOAS_MAP_WRITEABLE
    if iova is not None:
        flags |= u.IOMMU_IOAS_MAP_FIXED_IOVA
    return u.iommu_ioas_map(flags=flags, ioas_id=ioas_id, user_va=va, length=length, iova=iova or 0, **more)


def copy_struct(
    dst: int, src: int, src_iova: int, length: int, iova: int | None = None, flags: int = 6
) -> u.iommu_ioas_copy:
    if iova is not None:
        flags |= u.IOMMU_IOAS_MAP_FIXED_IOVA
    return u.iommu_ioas_copy(
        flags=flags, dst_ioas_id=dst, src_ioas_id=src, length=length, src_iova=src_iova, dst_iova=iova or 0
    )


def pinned_frames(world: World) -> int:
    """How many pins there are on all frames of the machine."""
    return sum(chunk.pinned for chunk in world.physical.frames)


def frames_of(domain: ExtentDomain, iova: int, length: int, step: int = PAGE_SIZE) -> list[int]:
    """The physical addresses at ``iova``, ``iova + step``, ... of a domain; 0 where nothing is mapped."""
    return [domain.iova_to_phys(at) for at in range(iova, iova + length, step)]


class FakeFile:
    """A memfd that needs no descriptor. See memory.hostfile.HostFile."""

    kind = "shmem"

    def __init__(self, world: World, npages: int, kind: str = "shmem") -> None:
        self.world = world
        self.npages = npages
        self.kind = kind
        self.chunk = world.physical.frames.chunk("file", npages)
        self.chunk.hold()
        self.closed = 0
        self.fd = -1

    def pin(self, first_page: int, npages: int) -> Extents:
        if self.kind != "shmem":
            raise KernelError(errno.EINVAL, "not a memfd")
        if first_page + npages > self.npages:
            raise KernelError(errno.EINVAL, f"page {first_page + npages - 1} is not in a file of {self.npages} pages")
        self.chunk.pin(first_page, npages)
        return (Extent(self.chunk, first_page, npages),)

    def close(self) -> None:
        self.closed += 1


class TestDmaBuf(DmaBufFile):
    """A dma-buf whose memory the test takes back with :meth:`revoke`."""

    __test__ = False

    def __init__(self, world: World, npages: int) -> None:
        super().__init__(world, npages * PAGE_SIZE)
        self.chunk = world.physical.buffer("test dma-buf", npages)
        self.revoked = False

    def phys(self) -> Extents:
        if self.revoked:
            raise KernelError(errno.ENODEV, "the dma-buf is revoked")
        return (Extent(self.chunk, 0, self.chunk.npages),)

    def revoke(self, value: bool = True) -> None:
        self.revoked = value
        self.invalidate()

    def release(self) -> None:
        self.chunk.drop()


def domains_of(table: IOPagetable) -> list[ExtentDomain]:
    domains = [domain for domain in table.domains if isinstance(domain, ExtentDomain)]
    assert len(domains) == len(table.domains)
    return domains


class Background(Generic[V]):
    """Runs ``work`` on another thread; :meth:`result` waits for it and re-raises what it raised."""

    def __init__(self, work: Callable[[], V]) -> None:
        self._work = work
        self._value: list[V] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value.append(self._work())
        except BaseException as error:  # result() raises it
            self._error = error

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def result(self, timeout: float = 10.0) -> V:
        """What ``work`` returned."""
        self._thread.join(timeout)
        assert not self._thread.is_alive(), "still running: a deadlock"
        if self._error is not None:
            raise self._error
        (value,) = self._value
        return value

    def errno(self) -> int:
        with pytest.raises(KernelError) as caught:
            self.result()
        return caught.value.errno


class Gate:
    """Stops page faults: while closed, whoever pins memory at ``address`` (anywhere: None) waits."""

    def __init__(self, proc: FakeProcess, address: int | None = None) -> None:
        self.reached = threading.Event()
        self._open = threading.Event()
        proc.space.before_pin = self._stop
        self._address = address

    def _stop(self, va: int) -> None:
        if self._address is None or va == self._address:
            self.reached.set()
            assert self._open.wait(10)

    def open(self) -> None:
        self._open.set()


def each(rows: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Parameter sets whose first member is the id: the row of the specification."""
    return [pytest.param(*row[1:], id=row[0]) for row in rows]


__all__ = [
    "ARG",
    "ARRAY",
    "BUFFER",
    "BUFFER_PAGES",
    "NUMBERS",
    "ROWS",
    "ULMAX",
    "Background",
    "Caller",
    "FakeFile",
    "FakeHost",
    "FakeProcess",
    "FakeTask",
    "Gate",
    "Mode",
    "TestDmaBuf",
    "copy_struct",
    "each",
    "frames_of",
    "make_world",
    "map_struct",
    "pinned_frames",
]
