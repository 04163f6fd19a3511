"""AddressSpace: what an mm's virtual addresses mean as frames, from the first pin on.

Invariants. Private memory (anonymous, and private file mappings, which a long-term pin unshares) takes its frames from
chunks of this space; shared mappings take them from the file's FileSpace. ``_index`` maps page intervals of VA to them.
An interval appears when something in its VMA is first pinned and then covers what of the VMA is not yet covered (up to
``WINDOW_PAGES`` around the pages asked for), so a million pins in one buffer cost one chunk. It goes when its addresses
do: the interposer announces ``unmap``, ``move`` and ``gone`` *before* the call happens; frames still pinned keep their
contents, which are copied into the machine's store first. Only ranges with pins need be announced, for frames that
nobody has pinned may as well serve the next mapping. Without announcements (own process, ``--no-pin-tracking``) a VA
that was unmapped and mapped again the same way still means its old frame.

Pinning touches no page: a VMA is asked for its permissions and kind, nothing else (of a file mapping the last page is
touched, to know that the file reaches that far). ``_lock`` guards ``_index``; it is taken before ``Physical.lock``,
never together with another space's, and never held while contents are copied.

The kernel objects are ``mm_struct`` and its VMAs; the rules are those of pin_user_pages(FOLL_LONGTERM).
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator

from iommufd.errors import KernelError
from iommufd.memory.extents import join
from iommufd.memory.files import FileSpace
from iommufd.memory.frames import PAGE_SHIFT, PAGE_SIZE, Chunk, Extent, Extents
from iommufd.memory.intervals import IntervalIndex
from iommufd.memory.physical import Physical
from iommufd.memory.vma import EXEC, READ, SHARED, WRITE, Host, Vma, check_pin

__all__ = ["EXEC", "READ", "SHARED", "WRITE", "AddressSpace", "Host", "Vma"]

WINDOW_PAGES = 1 << 28  # 1 TiB: how far around the pages asked for a new chunk reaches within its VMA
COPY_BYTES = 1 << 20  # how much is copied at a time when contents are rescued
PAGE_END = 1 << (64 - PAGE_SHIFT)


class LiveMemory:
    """Source of the bytes of a living process; positions are virtual addresses."""

    __slots__ = ("host",)

    def __init__(self, host: Host) -> None:
        self.host = host

    def load(self, position: int, count: int) -> bytes:
        data = self.host.peek(position, count)
        while len(data) < count:
            more = self.host.peek(position + len(data), count - len(data))
            if not more:
                raise KernelError(errno.EFAULT, f"address {position + len(data):#x} is gone from its process")
            data += more
        return data

    def save(self, position: int, data: bytes | bytearray | memoryview) -> None:
        done = self.host.poke(position, data)
        while done < len(data):
            more = self.host.poke(position + done, memoryview(data)[done:])
            if not more:
                raise KernelError(errno.EFAULT, f"address {position + done:#x} is gone from its process")
            done += more

    def view(self, position: int, count: int) -> memoryview | None:
        """None: another process's memory cannot be had by reference."""
        return None

    def forget(self, position: int, count: int) -> None:
        """The process keeps its bytes."""


class Held:
    """Value of a VA interval: its first page is page ``index`` of ``chunk``. For shared mappings ``file`` is set, and
    ``delta`` = file page minus VA page."""

    __slots__ = ("chunk", "delta", "file", "index")

    def __init__(self, chunk: Chunk, index: int, file: FileSpace | None, delta: int) -> None:
        self.chunk = chunk
        self.index = index
        self.file = file
        self.delta = delta

    def means(self, vma: Vma) -> bool:
        """Whether ``vma`` still is what the interval was made for."""
        file = self.file
        if PAGE_SIZE << self.chunk.order != vma.page_size:
            return False
        if file is None:
            return not vma.flags & SHARED
        return (
            vma.flags & SHARED != 0
            and self.delta == (vma.offset - vma.start) >> PAGE_SHIFT
            and file.key == vma.file_key
        )


_NOTHING = (1, 0, None)

Part = tuple[Held, int, int, int]  # an interval; page index in its chunk, pages, VA page: a part of it


class AddressSpace:
    """One mm. ``pinned_vm`` and ``locked_vm`` are its page counters (VmPin, and VmLck beside what it locked itself);
    ``alive`` until exit or exec. ``guard_check(start, end)`` tells whether a range has guard regions; who sees
    MADV_GUARD_INSTALL sets it."""

    __slots__ = (
        "__weakref__",
        "_index",
        "_live",
        "_lock",
        "_physical",
        "_recent",
        "_saved",
        "alive",
        "guard_check",
        "host",
        "locked_vm",
        "name",
        "pinned_vm",
    )

    def __init__(self, physical: Physical, host: Host, name: str = "process") -> None:
        self.host = host
        self.name = name
        self.alive = True
        self.pinned_vm = 0
        self.locked_vm = 0
        self.guard_check: Callable[[int, int], bool] | None = None
        self._physical = physical
        self._live = LiveMemory(host)
        self._recent: tuple[int, int, Held | None] = _NOTHING  # the interval found last
        self._index: IntervalIndex[Held] = IntervalIndex()
        self._lock = threading.Lock()
        self._saved: list[tuple[Chunk, int, int, int]] = []  # chunk, page index, pages, position in the store
        with physical.lock:
            physical.spaces.add(self)

    def __repr__(self) -> str:
        return f"<AddressSpace of {self.name}>"

    # ----------------------------------------------------------------------------------------------------- user copies

    def read(self, va: int, count: int) -> bytes:
        """``count`` bytes at ``va`` under the page protections; KernelError(EFAULT) unless all can be read."""
        self._check_alive()
        data = self.host.read(va, count)
        if len(data) != count:
            raise KernelError(errno.EFAULT, f"address {va + len(data):#x} of {self.name} cannot be read")
        return data

    def write(self, va: int, data: bytes | bytearray | memoryview) -> None:
        """Writes ``data`` at ``va`` under the page protections; KernelError(EFAULT) when not all was written."""
        self._check_alive()
        done = self.host.write(va, data)
        if done != len(data):
            raise KernelError(errno.EFAULT, f"address {va + done:#x} of {self.name} cannot be written")

    def _check_alive(self) -> None:
        """A process number may by now name another program; the mm cannot."""
        try:
            if self.alive:
                self.host.query(0)
        except ProcessLookupError:
            self.alive = False
        if not self.alive:
            raise KernelError(errno.EFAULT, f"the address space of {self.name} is gone")

    def mlocked_pages(self) -> int:
        """Pages the process has locked by itself: the part of VmLck that is not ours."""
        return self.host.mlocked_pages()

    # --------------------------------------------------------------------------------------------------------- pinning

    def pin(self, va: int, npages: int, write: bool, *, current: bool = True) -> Extents:
        """Long-term pin of ``npages`` whole pages from the one that contains ``va``, all or nothing (core 5.5).

        ``write`` pins for writing. ``current`` says that the space is the calling thread's own. KernelError: EFAULT
        where a page cannot be pinned or the space is gone; EOVERFLOW when the range wraps 2**64 (current process only);
        ENOMEM without frames. :func:`iommufd.memory.extents.unpin_extents` undoes it, also when the space is gone.
        """
        lock = self._lock
        lock.acquire()  # half the price of a with statement
        try:
            extents = self._again(va >> PAGE_SHIFT, npages, write)
            if extents is not None:  # private memory: of no file
                extents[0].chunk.pin(extents[0].index, npages)
                return extents
            extents = self._resolve(va >> PAGE_SHIFT, npages, write, True, current)
            for extent in extents:
                extent.chunk.pin(extent.index, extent.count)
        finally:
            lock.release()
        for extent in extents:
            file = extent.chunk.file
            if file is not None and file.fresh:
                file.fresh = False
                file.obtain()
        return extents

    def look(self, va: int, npages: int, write: bool = False) -> Extents:
        """The frames behind ``npages`` pages of the calling thread's own space now, without pinning them.

        EFAULT as a page fault-in would give; EOVERFLOW when the range wraps 2**64."""
        with self._lock:
            return self._resolve(va >> PAGE_SHIFT, npages, write, False, True)

    def _again(self, page: int, npages: int, write: bool) -> Extents | None:
        """:meth:`_resolve` for pages of the private interval that was found last, in one VMA; None elsewhere."""
        first, last, held = self._recent
        end = page + npages
        if page < first or end > last + 1 or held is None or held.file is not None or not self.alive:
            return None
        try:
            vma = self.host.query(page << PAGE_SHIFT)
        except ProcessLookupError:
            return None
        if (
            vma is None
            or vma.ino
            or vma.kind != "anon"
            or not vma.flags & (WRITE if write else READ)
            or vma.start > page << PAGE_SHIFT
            or vma.end < end << PAGE_SHIFT
            or not held.means(vma)
            or (self.guard_check is not None and self.guard_check(page << PAGE_SHIFT, end << PAGE_SHIFT))
        ):
            return None
        return (Extent(held.chunk, held.index + page - first, npages),)

    def _resolve(self, page: int, npages: int, write: bool, long_term: bool, current: bool) -> Extents:
        end = page + npages
        if end >= PAGE_END:  # core 5.5, row "end of the page range wraps"
            number = errno.EOVERFLOW if current else errno.EFAULT
            raise KernelError(number, f"{npages} pages from {page << PAGE_SHIFT:#x} on wrap 2**64")
        if not self.alive:  # row "source address space gone"
            raise KernelError(errno.EFAULT, f"the address space of {self.name} is gone")
        found: list[Extent] = []
        try:
            while page < end:
                va = page << PAGE_SHIFT
                vma = self.host.query(va)
                if vma is None or vma.start > va:  # row "no VMA"
                    raise KernelError(errno.EFAULT, f"nothing is mapped at {va:#x} of {self.name}")
                check_pin(vma, va, write, long_term)
                stop = vma.end >> PAGE_SHIFT
                if stop > end:
                    stop = end
                if self.guard_check is not None and self.guard_check(va, stop << PAGE_SHIFT):
                    raise KernelError(errno.EFAULT, f"a guard region lies within {va:#x}-{stop << PAGE_SHIFT:#x}")
                if vma.ino and not self.host.peek((stop - 1) << PAGE_SHIFT, 1):  # row "beyond mapped file EOF"
                    raise KernelError(errno.EFAULT, f"{(stop - 1) << PAGE_SHIFT:#x} is beyond the end of {vma.name}")
                while page < stop:
                    self._recent = first, last, held = self._held(vma, page, stop)
                    n = min(stop, last + 1) - page
                    found.append(Extent(held.chunk, held.index + page - first, n))
                    page += n
        except ProcessLookupError:
            self.alive = False
            raise KernelError(errno.EFAULT, f"the address space of {self.name} is gone") from None
        return join(found) if len(found) > 1 else tuple(found)

    def _held(self, vma: Vma, page: int, stop: int) -> tuple[int, int, Held]:
        """The interval of ``page``, made if need be; ``stop`` is the end of the pages asked for in this VMA."""
        found = self._index.find(page)
        first_page, last_page = vma.start >> PAGE_SHIFT, (vma.end >> PAGE_SHIFT) - 1
        if found is not None:
            if found[2].means(vma):
                return found
            # Unmapped and mapped anew without a word to us: what is still pinned there is lost.
            self._drop(max(found[0], first_page), min(found[1], last_page))
        block, window = 1 << vma.order, page & -WINDOW_PAGES
        first = min(page, max(first_page, window)) & -block
        last = max(stop - 1, min(last_page, window + WINDOW_PAGES - 1)) | (block - 1)
        below, above = self._index.neighbours(page, page)
        if below and below[1] >= first:
            first = below[1] + 1
        if above and above[0] <= last:
            last = above[0] - 1
        if first & (block - 1) or (last + 1) & (block - 1):  # a stale interval cuts a huge page: it goes
            first, last = page & -block, page | (block - 1)
            self._drop(first, last)
        if vma.flags & SHARED:
            self._share(vma, first, last)
        else:
            frames = self._physical.frames
            try:
                chunk = frames.chunk(self.name, last - first + 1, vma.order)
            except KernelError:  # after 10^3 windows of 1 TiB: no more than was asked for
                first, last = max(first, page & -block), min(last, (stop - 1) | (block - 1))
                chunk = frames.chunk(self.name, last - first + 1, vma.order)
            chunk.place(0, chunk.npages, self._live, first << PAGE_SHIFT)
            self._hold(first, last, Held(chunk, 0, None, 0))
        found = self._index.find(page)
        assert found is not None
        return found

    def _share(self, vma: Vma, first: int, last: int) -> None:
        """Makes intervals for pages ``[first, last]`` of a shared mapping."""
        delta = (vma.offset - vma.start) >> PAGE_SHIFT
        file = self._physical.file_space(vma.file_key, vma.order)
        try:
            for extent in file.resolve(first + delta, last - first + 1, (first + delta, last + delta)):
                self._hold(first, first + extent.count - 1, Held(extent.chunk, extent.index, file, delta))
                first += extent.count
        finally:
            file.release()

    def _hold(self, first: int, last: int, held: Held) -> None:
        self._index.insert(first, last, held)
        held.chunk.resolve_from(1)
        if held.file is not None:
            self._physical.file_space(held.file.key, held.file.order, self)

    def _drop(self, first: int, last: int) -> None:
        """Takes pages ``[first, last]`` out of the index; contents that only their addresses gave are lost."""
        self._recent = _NOTHING
        for low, high, held in list(self._index.items(first, last)):
            self._index.remove(low)
            for begin, end in ((low, first - 1), (last + 1, high)):
                if begin <= end:
                    self._hold(begin, end, Held(held.chunk, held.index + begin - low, held.file, held.delta))
            begin, count = max(low, first), min(high, last) - max(low, first) + 1
            if held.file is None:
                for index, n in held.chunk.in_source(held.index + begin - low, count, self._live):
                    held.chunk.place(index, n, None)
            held.chunk.resolve_from(-1)
            if held.file is not None:
                held.file.release(self)

    # ---------------------------------------------------------------------------------------------------------- events

    def has_pins(self, start: int, end: int) -> bool:
        """Whether any page in bytes ``[start, end)`` has frames that are pinned. One look when nothing was pinned."""
        if not len(self._index) or start >= end:
            return False
        first, last = start >> PAGE_SHIFT, (end - 1) >> PAGE_SHIFT
        with self._lock:
            if not self._index.overlaps(first, last):
                return False
            parts = self._parts(first, last)
            return any(held.chunk.has_pins(index, index + count) for held, index, count, _ in parts)

    def unmap(self, start: int, end: int) -> None:
        """Bytes ``[start, end)`` are about to lose their pages (munmap, mmap over it, MADV_DONTNEED, brk, shmdt).

        Pinned contents are copied into the store first. Cannot fail: contents that cannot be read are lost."""
        if not len(self._index) or start >= end:
            return
        first, last = start >> PAGE_SHIFT, (end - 1) >> PAGE_SHIFT
        with self._lock:
            shared = [part for part in self._pinned(first, last) if part[0].file is not None]
        for held, index, count, page in shared:
            assert held.file is not None
            if not held.file.reachable(page + held.delta, count, self):
                self._rescue(held.chunk, index, count, page)
        while True:
            with self._lock:
                private = [part for part in self._pinned(first, last) if part[0].file is None]
                if not private:
                    self._drop(first, last)
                    return
            for held, index, count, page in private:
                self._rescue(held.chunk, index, count, page)

    def move(self, old: int, new: int, length: int) -> None:
        """mremap moves bytes ``[old, old + length)`` to ``new``; the frames go with it. Pins in what was at ``new``
        must have been announced by :meth:`unmap` before."""
        first, last, by = old >> PAGE_SHIFT, (old + length - 1) >> PAGE_SHIFT, (new - old) >> PAGE_SHIFT
        with self._lock:
            moved = [
                (page, page + count - 1, Held(held.chunk, index, held.file, held.delta - by))
                for held, index, count, page in self._parts(first, last)
            ]
            chunks = list(dict.fromkeys(held.chunk for _, _, held in moved if held.file is None))
            for chunk in chunks:
                chunk.move_begin()
            try:
                pieces = [
                    (held.chunk, index, n, (low + by + index - held.index) << PAGE_SHIFT)
                    for low, high, held in moved
                    if held.file is None
                    for index, n in held.chunk.in_source(held.index, high - low + 1, self._live)
                ]
                self._drop(first + by, last + by)
                for low, high, held in moved:
                    self._hold(low + by, high + by, held)
                self._drop(first, last)
                for chunk, index, n, va in pieces:
                    chunk.place(index, n, self._live, va)
            finally:
                for chunk in chunks:
                    chunk.move_end()

    def save(self) -> None:
        """An exec is about to be tried: copies what is pinned aside, for :meth:`gone` when the exec has happened. The
        addresses stay what they are until then; a failed exec costs the copy only, till the next one."""
        self.host.exec_coming()
        self._forget_saved()
        with self._lock:
            parts = [part for part in self._pinned(0, PAGE_END - 1) if part[0].file is None]
        for held, index, count, page in parts:
            held.chunk.move_begin()
            try:
                position = self._copy_out(page << PAGE_SHIFT, count)
            finally:
                held.chunk.move_end()
            if position is not None:
                self._saved.append((held.chunk, index, count, position))

    def gone(self, rescue: bool = True) -> None:
        """The last user of the address space exits or has exec'ed. ``rescue=False`` when nobody else holds a pin.

        What is pinned is copied out if the memory is still there, else taken from :meth:`save`, else lost."""
        self.alive = False
        if rescue and self.host.alive():
            self.unmap(0, PAGE_END << PAGE_SHIFT)
        with self._lock:
            store, saved = self._physical.store, self._saved
            self._saved = []
            for chunk, index, count, position in saved:
                unused = index
                for at, n in chunk.in_source(index, count, self._live):
                    if chunk.has_pins(at, at + n):
                        chunk.place(at, n, store, position + ((at - index) << PAGE_SHIFT))
                        store.forget(position + ((unused - index) << PAGE_SHIFT), (at - unused) << PAGE_SHIFT)
                        unused = at + n
                store.forget(position + ((unused - index) << PAGE_SHIFT), (index + count - unused) << PAGE_SHIFT)
            self._drop(0, PAGE_END - 1)
        self.host.close()

    def _forget_saved(self) -> None:
        saved, self._saved = self._saved, []
        for _, _, count, position in saved:
            self._physical.store.forget(position, count << PAGE_SHIFT)

    # --------------------------------------------------------------------------------------------------------- helpers

    def windows(self, file: FileSpace) -> list[tuple[Vma, int, int]]:
        """Where this space has ``file`` mapped now, as (VMA, first byte, last byte) of intervals we know."""
        with self._lock:
            known = [(low << PAGE_SHIFT, high, held) for low, high, held in self._index if held.file is file]
        found: list[tuple[Vma, int, int]] = []
        for va, last_page, held in known:
            last = (last_page << PAGE_SHIFT) + PAGE_SIZE - 1
            try:
                while va <= last:
                    vma = self.host.query(va)
                    if vma is None:
                        break
                    if vma.start <= last and held.means(vma):
                        found.append((vma, max(va, vma.start), min(last, vma.end - 1)))
                    va = vma.end
            except ProcessLookupError:
                return []
        return found

    def _parts(self, first: int, last: int) -> Iterator[Part]:
        """The intervals in pages ``[first, last]``, clipped."""
        for low, high, held in self._index.items(first, last):
            page = max(low, first)
            yield held, held.index + page - low, min(high, last) + 1 - page, page

    def _pinned(self, first: int, last: int) -> list[Part]:
        """The pinned parts in pages ``[first, last]`` whose contents still depend on the addresses (or the file)."""
        found: list[Part] = []
        for held, index, count, page in self._parts(first, last):
            source = self._live if held.file is None else held.file
            for at, n in held.chunk.pinned_in(index, index + count):
                found += [(held, i, k, page + i - index) for i, k in held.chunk.in_source(at, n, source)]
        return found

    def _rescue(self, chunk: Chunk, index: int, count: int, page: int) -> None:
        """Moves the contents of pinned pages from VA page ``page`` on into the store."""
        chunk.move_begin()
        try:
            position = self._copy_out(page << PAGE_SHIFT, count)
            if position is None:
                chunk.place(index, count, None)
            else:
                chunk.place(index, count, self._physical.store, position)
        finally:
            chunk.move_end()

    def _copy_out(self, va: int, npages: int) -> int | None:
        """Copies pages at ``va`` into the store: their position, None when they cannot be had."""
        store, end = self._physical.store, va + (npages << PAGE_SHIFT)
        try:
            position = store.reserve(npages)
        except KernelError:
            return None
        for start, stop in self.host.touched(va, end):
            while start < stop:
                data = self.host.peek(start, min(COPY_BYTES, stop - start))
                if not data:
                    break
                store.save(position + start - va, data)
                start += len(data)
        if not self.host.alive():
            store.forget(position, npages << PAGE_SHIFT)
            return None
        return position
