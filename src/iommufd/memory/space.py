"""AddressSpace: what an mm's virtual addresses mean as frames, from the first pin on.

Invariants. Private memory (anonymous, and private file mappings, which a long-term pin unshares) takes its frames from
chunks of this space; shared mappings take them from the file's FileSpace. ``_index`` maps page intervals of VA to them;
an interval appears when something in its VMA is first pinned and then covers as much of the VMA as is not yet covered,
so a million pins in one buffer cost one chunk. An interval goes when its addresses do: the interposer announces
``unmap``, ``move`` and ``gone`` *before* the call happens; frames that are still pinned keep their contents, which are
copied into the machine's store first. Without announcements (own process, ``--no-pin-tracking``) a VA that was unmapped
and mapped again the same way still means its old frame.

Pinning touches no page: a VMA is asked for its permissions and kind, nothing else (a file-backed range has its last page
touched once, to know that the file reaches that far). ``_lock`` guards ``_index``; it is taken before ``Physical.lock`` and
never held while bytes are copied.

The kernel objects are ``mm_struct`` and ``vm_area_struct``; the rules are those of pin_user_pages(FOLL_LONGTERM).
"""

from __future__ import annotations

import errno
import threading
from typing import Protocol

from iommufd.errors import KernelError
from iommufd.memory.extents import join
from iommufd.memory.files import FileKey, FileSpace, View
from iommufd.memory.frames import PAGE_SHIFT, PAGE_SIZE, Chunk, Extent, Extents
from iommufd.memory.intervals import IntervalIndex
from iommufd.memory.physical import Physical

READ, WRITE, EXEC, SHARED = 1, 2, 4, 8  # Vma.flags, as PROCMAP_QUERY_VMA_*

WINDOW_PAGES = 1 << 24  # 64 GiB: how far around the pages asked for a new chunk reaches within its VMA
COPY_BYTES = 4 << 20  # how much is copied at a time when contents are rescued


class Vma:
    """One mapping ``[start, end)``: ``struct vm_area_struct`` as /proc tells it.

    ``flags`` are READ, WRITE, EXEC, SHARED. ``dev`` (as st_dev), ``ino`` and ``offset`` (bytes) are those of the file, 0
    without one. ``kind`` is 'anon', 'shmem', 'hugetlbfs', 'ramfs', 'other' (a file system that tracks dirty pages) or
    'special' (VM_IO, VM_PFNMAP, secretmem: cannot be pinned).
    """

    __slots__ = ("dev", "end", "flags", "ino", "kind", "name", "offset", "page_size", "start")

    def __init__(
        self,
        start: int,
        end: int,
        flags: int,
        *,
        kind: str = "anon",
        dev: int = 0,
        ino: int = 0,
        offset: int = 0,
        name: str = "",
        page_size: int = PAGE_SIZE,
    ) -> None:
        self.start = start
        self.end = end
        self.flags = flags
        self.kind = kind
        self.dev = dev
        self.ino = ino
        self.offset = offset
        self.name = name
        self.page_size = page_size

    def __repr__(self) -> str:
        perms = "".join(c if self.flags & bit else "-" for c, bit in (("r", READ), ("w", WRITE), ("x", EXEC)))
        shared = "s" if self.flags & SHARED else "p"
        return f"<Vma {self.start:#x}-{self.end:#x} {perms}{shared} {self.kind} {self.name}>"

    @property
    def file_key(self) -> FileKey:
        """What names the file behind a shared mapping."""
        return self.dev, self.ino, self.name if self.name.startswith("/SYSV") else ""


class Host(Protocol):
    """The process behind an AddressSpace. Methods may be called by several threads at once."""

    def query(self, va: int) -> Vma | None:
        """The VMA that contains ``va``, else the next above it; None when there is none. ProcessLookupError when the
        address space is gone (exit or exec)."""

    def read(self, va: int, count: int) -> bytes:
        """The leading bytes of ``[va, va + count)`` that can be read under the page protections, perhaps none."""

    def write(self, va: int, data: bytes | bytearray | memoryview) -> int:
        """Writes the leading bytes that can be written under the page protections; how many."""

    def peek(self, va: int, count: int) -> bytes:
        """As ``read``, whatever the protections are: what a device sees."""

    def poke(self, va: int, data: bytes | bytearray | memoryview) -> int:
        """As ``write``, whatever the protections are."""

    def touched(self, va: int, end: int) -> list[tuple[int, int]]:
        """The ranges ``(start, end)`` within ``[va, end)`` that may hold something else than zeroes."""

    def open_file(self, vma: Vma) -> int | None:
        """A new descriptor of the file that ``vma`` maps, or None when it cannot be had."""

    def mlocked_pages(self) -> int:
        """Pages the process itself has locked (mlock)."""

    def alive(self) -> bool:
        """False once the address space has been given up by exit or exec."""

    def close(self) -> None: ...


class LiveMemory:
    """Source of the bytes of a living process; positions are virtual addresses."""

    __slots__ = ("host",)

    def __init__(self, host: Host) -> None:
        self.host = host

    def load(self, position: int, count: int) -> bytes:
        data = self.host.peek(position, count)
        if len(data) != count:
            raise KernelError(errno.EFAULT, f"{count} bytes at {position:#x} are gone from their process")
        return data

    def save(self, position: int, data: bytes | bytearray | memoryview) -> None:
        if self.host.poke(position, data) != len(data):
            raise KernelError(errno.EFAULT, f"{len(data)} bytes at {position:#x} are gone from their process")

    def view(self, position: int, count: int) -> memoryview | None:
        return None

    def forget(self, position: int, count: int) -> None:
        """The process keeps its bytes."""


class Held:
    """Value of a VA interval: its first page is page ``index`` of ``chunk``. ``file`` is set for shared mappings, with
    ``delta`` = file page minus VA page."""

    __slots__ = ("chunk", "delta", "file", "index")

    def __init__(self, chunk: Chunk, index: int, file: FileSpace | None = None, delta: int = 0) -> None:
        self.chunk = chunk
        self.index = index
        self.file = file
        self.delta = delta


class AddressSpace:
    """One mm. ``pinned_vm`` and ``locked_vm`` are its page counters (VmPin, and VmLck beside the process's own mlock)."""

    __slots__ = ("_index", "_live", "_lock", "_physical", "alive", "host", "locked_vm", "name", "pinned_vm")

    def __init__(self, physical: Physical, host: Host, name: str = "process") -> None:
        self.host = host
        self.name = name
        self.alive = True
        self.pinned_vm = 0
        self.locked_vm = 0
        self._physical = physical
        self._live = LiveMemory(host)
        self._index: IntervalIndex[Held] = IntervalIndex()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<AddressSpace {self.name}>"

    # ------------------------------------------------------------------------------------------------------- user copies

    def read(self, va: int, count: int) -> bytes:
        """``count`` bytes at ``va`` under the page protections; KernelError(EFAULT) unless all can be read."""
        data = self.host.read(va, count)
        if len(data) != count:
            raise KernelError(errno.EFAULT, f"address {va + len(data):#x} of {self.name} cannot be read")
        return data

    def write(self, va: int, data: bytes | bytearray | memoryview) -> None:
        """Writes ``data`` at ``va`` under the page protections; KernelError(EFAULT) when not all was written."""
        done = self.host.write(va, data)
        if done != len(data):
            raise KernelError(errno.EFAULT, f"address {va + done:#x} of {self.name} cannot be written")

    def mlocked_pages(self) -> int:
        """Pages the process has locked by itself: the part of VmLck that is not ours."""
        return self.host.mlocked_pages()

    # ---------------------------------------------------------------------------------------------------------- pinning

    def pin(self, va: int, npages: int, write: bool, *, current: bool = True) -> Extents:
        """Long-term pin of ``npages`` whole pages from the one that contains ``va``, all or nothing (core 5.5).

        ``write`` pins for writing. ``current`` says that the space is the calling thread's own. KernelError: EFAULT where
        a page cannot be pinned or the space is gone; EOVERFLOW when the range wraps 2**64 (for the current process);
        ENOMEM without frames. :func:`iommufd.memory.extents.unpin_extents` undoes it, also when the space is gone.
        """
        with self._lock:
            extents = self._resolve(va >> PAGE_SHIFT, npages, write, True, current)
            for extent in extents:
                extent.chunk.pin(extent.index, extent.count)
        return extents

    def look(self, va: int, npages: int, write: bool = False) -> Extents:
        """The frames behind ``npages`` pages now, without pinning them; EFAULT as a page fault-in would give."""
        with self._lock:
            return self._resolve(va >> PAGE_SHIFT, npages, write, False, False)

    def _resolve(self, page: int, npages: int, write: bool, long_term: bool, current: bool) -> Extents:
        end = page + npages
        # core 5.5 rows in order of the pages; the range itself comes first
        if end >= 1 << (64 - PAGE_SHIFT):
            number = errno.EOVERFLOW if current and long_term else errno.EFAULT
            raise KernelError(number, f"{npages} pages from {page << PAGE_SHIFT:#x} wrap 2**64")
        if not self.alive:
            raise KernelError(errno.EFAULT, f"the address space of {self.name} is gone")
        found: list[Extent] = []
        while page < end:
            vma = self._vma(page << PAGE_SHIFT)
            stop = min(end, vma.end >> PAGE_SHIFT)
            check_pin(vma, page << PAGE_SHIFT, write, long_term)
            if vma.ino and not self.host.peek((stop - 1) << PAGE_SHIFT, 1):
                raise KernelError(errno.EFAULT, f"address {(stop - 1) << PAGE_SHIFT:#x} is beyond the end of its file")
            while page < stop:
                first, last, held = self._held(vma, page, stop)
                n = min(stop, last + 1) - page
                found.append(Extent(held.chunk, held.index + page - first, n))
                page += n
        return join(found)

    def _vma(self, va: int) -> Vma:
        try:
            vma = self.host.query(va)
        except ProcessLookupError:
            self.alive = False
            raise KernelError(errno.EFAULT, f"the address space of {self.name} is gone") from None
        if vma is None or vma.start > va:
            raise KernelError(errno.EFAULT, f"nothing is mapped at {va:#x} of {self.name}")
        return vma

    def _held(self, vma: Vma, page: int, stop: int) -> tuple[int, int, Held]:
        """The interval of page ``page`` (``stop``: end of the pages asked for in this VMA), made if need be."""
        found = self._index.find(page)
        if found is not None:
            held = found[2]
            if held.file is None:
                same = not vma.flags & SHARED
            else:
                delta = (vma.offset - vma.start) >> PAGE_SHIFT
                same = bool(vma.flags & SHARED) and held.delta == delta and held.file.key == vma.file_key
            if same and PAGE_SIZE << held.chunk.order == vma.page_size:
                return found
            # Unmapped and mapped anew without a word to us: what was pinned here is lost.
            self._drop(max(found[0], vma.start >> PAGE_SHIFT), min(found[1], (vma.end >> PAGE_SHIFT) - 1))
        order = vma.page_size.bit_length() - 1 - PAGE_SHIFT
        below, above = self._index.neighbours(page, page)
        window = page & -WINDOW_PAGES
        first = min(page, max(vma.start >> PAGE_SHIFT, window)) & -(1 << order)
        last = max(stop - 1, min((vma.end >> PAGE_SHIFT) - 1, window + WINDOW_PAGES - 1)) | ((1 << order) - 1)
        if below:
            first = max(first, below[1] + 1)
        if above:
            last = min(last, above[0] - 1)
        if not vma.flags & SHARED:
            chunk = self._physical.frames.chunk(self.name, last - first + 1, order)
            chunk.pieces = [(0, chunk.npages, self._live, first << PAGE_SHIFT)]
            chunk.resolve_from(1)
            held = Held(chunk, 0)
            self._index.insert(first, last, held)
            return first, last, held
        return self._share(vma, page, first, last, order)

    def _share(self, vma: Vma, page: int, first: int, last: int, order: int) -> tuple[int, int, Held]:
        delta = (vma.offset - vma.start) >> PAGE_SHIFT
        result: tuple[int, int, Held] | None = None
        file = self._physical.file_space(vma.file_key, order)
        try:
            for extent in file.resolve(first + delta, last - first + 1, (first + delta, last + delta)):
                held = Held(extent.chunk, extent.index, self._physical.file_space(vma.file_key, order), delta)
                end = first + extent.count - 1
                extent.chunk.resolve_from(1)
                self._index.insert(first, end, held)
                with self._physical.lock:
                    file.views.append(View(self.host, first << PAGE_SHIFT, first + delta, extent.count))
                if first <= page <= end:
                    result = first, end, held
                first = end + 1
        finally:
            file.release()
        assert result is not None
        return result

    # ----------------------------------------------------------------------------------------------------------- events

    def has_pins(self, start: int, end: int) -> bool:
        """Whether any page of ``[start, end)`` has frames that are pinned. Fast: one look when nothing was pinned here."""
        if not self._index:
            return False
        with self._lock:
            first, last = start >> PAGE_SHIFT, (end - 1) >> PAGE_SHIFT
            return any(
                held.chunk.has_pins(held.index + max(low, first) - low, held.index + min(high, last) + 1 - low)
                for low, high, held in self._index.items(first, last)
            )

    def unmap(self, start: int, end: int) -> None:
        """``[start, end)`` is about to lose its pages (munmap, mmap over it, MADV_DONTNEED, brk, shmdt).

        Pinned contents are copied into the store first. Nothing fails: contents that cannot be read are lost."""
        if not self._index:
            return
        first, last = start >> PAGE_SHIFT, (end - 1) >> PAGE_SHIFT
        with self._lock:
            work = [
                (held, held.index + max(low, first) - low, min(high, last) + 1 - max(low, first), max(low, first))
                for low, high, held in self._index.items(first, last)
            ]
        for held, index, count, page in work:
            if held.file is None:
                for at, n in held.chunk.pinned_in(index, index + count):
                    self._rescue(held.chunk, at, n, page + at - index)
        with self._lock:
            self._drop(first, last)

    def move(self, old: int, new: int, length: int) -> None:
        """mremap moves ``[old, old + length)`` to ``new``; the frames go with it. What was at ``new`` must have been
        announced by ``unmap`` before."""
        first, last, by = old >> PAGE_SHIFT, (old + length - 1) >> PAGE_SHIFT, (new - old) >> PAGE_SHIFT
        with self._lock:
            moved: list[tuple[int, int, Held]] = []
            for low, high, held in list(self._index.items(first, last)):
                self._index.remove(low)
                for begin, end in ((low, first - 1), (last + 1, high)):
                    if begin <= end:
                        self._index.insert(
                            begin, end, Held(held.chunk, held.index + begin - low, held.file, held.delta)
                        )
                        held.chunk.resolve_from(1)
                        if held.file is not None:
                            self._physical.file_space(held.file.key, held.file.order)
                begin, end = max(low, first), min(high, last)
                moved.append((begin, end, Held(held.chunk, held.index + begin - low, held.file, held.delta - by)))
            for begin, end, held in moved:
                self._index.insert(begin + by, end + by, held)
                if held.file is None:
                    held.chunk.place(held.index, end - begin + 1, self._live, (begin + by) << PAGE_SHIFT)

    def gone(self, rescue: bool = True) -> None:
        """The last user of the address space exits or execs. ``rescue=False`` when nobody else holds a pin."""
        self.alive = False
        if rescue:
            self.unmap(0, 1 << 64)
        else:
            with self._lock:
                self._drop(0, (1 << (64 - PAGE_SHIFT)) - 1)
        self.host.close()

    def _rescue(self, chunk: Chunk, index: int, count: int, page: int) -> None:
        store = self._physical.store
        va = page << PAGE_SHIFT
        chunk.move_begin()
        try:
            position = store.reserve(count)
            for begin, end in self.host.touched(va, va + (count << PAGE_SHIFT)):
                for at in range(begin, end, COPY_BYTES):
                    data = self.host.peek(at, min(COPY_BYTES, end - at))
                    if data:
                        store.save(position + at - va, data)
            chunk.place(index, count, store, position)
        finally:
            chunk.move_end()

    def _drop(self, first: int, last: int) -> None:
        """Takes pages ``[first, last]`` out of the index. Called with ``_lock`` held."""
        for low, high, held in list(self._index.items(first, last)):
            self._index.remove(low)
            for begin, end in ((low, first - 1), (last + 1, high)):
                if begin <= end:
                    self._index.insert(begin, end, Held(held.chunk, held.index + begin - low, held.file, held.delta))
                    held.chunk.resolve_from(1)
                    if held.file is not None:
                        self._physical.file_space(held.file.key, held.file.order)
            held.chunk.resolve_from(-1)
            if held.file is not None:
                held.file.release()


def check_pin(vma: Vma, va: int, write: bool, long_term: bool) -> None:
    """core 5.5: whether a page of ``vma`` may be pinned (``long_term``) or faulted in; KernelError(EFAULT) if not."""
    if vma.kind == "special":
        raise KernelError(errno.EFAULT, f"{va:#x} lies in {vma!r}, which cannot be pinned")
    if write:
        if not vma.flags & WRITE:
            raise KernelError(errno.EFAULT, f"{va:#x} is to be written and lies in {vma!r}")
        if long_term and vma.flags & SHARED and vma.kind == "other":
            raise KernelError(errno.EFAULT, f"{va:#x} is to be written and lies in a shared file mapping, {vma!r}")
    elif not vma.flags & READ:
        raise KernelError(errno.EFAULT, f"{va:#x} is to be read and lies in {vma!r}")
