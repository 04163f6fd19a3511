"""What a program can do to /dev/iommu, each a function that threads run against the same contexts at once.

An operation takes a :class:`Worker` and may fail with the errnos the specification gives its command, named beside it;
any other exception is a bug. Where an operation uses a descriptor that another thread may close (and whose number a
third may get again), the errnos of a wrong descriptor are added (:data:`STALE`).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from iommufd.client.backends.software import SoftwareBackend
from iommufd.testing.subject import filled, number_of
from iommufd.uapi import iommufd as u
from iommufd.uapi import iommufd_test as t
from iommufd.uapi import vfio as v
from iommufd.uapi.declare import Struct

PAGE = 4096
PAGES = 64  # of the memory that is mapped
BASE = t.MOCK_APERTURE_START
GUARD = 16
SLOTS = 8  # fixed maps go to one of these places, each with pages of its own
SLOT = 16 * PAGE
NEWEST = 6  # of each kind: what operations mostly act on, so that they meet
HWPTS = ("HWPT", "PARENT", "TRACKED", "PASIDS")
READ, WRITE, FIXED = u.IOMMU_IOAS_MAP_READABLE, u.IOMMU_IOAS_MAP_WRITEABLE, u.IOMMU_IOAS_MAP_FIXED_IOVA
NEST, DIRTY = u.IOMMU_HWPT_ALLOC_NEST_PARENT, u.IOMMU_HWPT_ALLOC_DIRTY_TRACKING
FAULT, PASID = u.IOMMU_HWPT_FAULT_ID_VALID, u.IOMMU_HWPT_ALLOC_PASID
PASIDS = (1, 2, 3, t.IOMMU_TEST_PASID_RESERVED)
STALE = frozenset({errno.EBADF, errno.EBADFD, errno.EINVAL, errno.ENOTTY, errno.ESPIPE})

S = TypeVar("S", bound=Struct)
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Shared:
    """What the threads share of one context: its descriptor, and what they believe is alive (it may be gone)."""

    def __init__(self, backend: SoftwareBackend) -> None:
        self.fd = backend.open("/dev/iommu", os.O_RDWR)
        self.ids: dict[str, list[int]] = defaultdict(list)
        self.fds: dict[str, list[int]] = defaultdict(list)
        self.device_of: dict[int, int] = {}  # SELFTEST id -> DEVICE id
        self.pins: list[tuple[int, int]] = []  # (access descriptor, id of the pin)
        self.lasting: list[int] = []  # SELFTEST ids of devices that stay: two with PASIDs
        self.queues: dict[str, int] = {}  # a descriptor of each kind of queue that stays open
        self.kept: set[int] = set()  # ids nobody destroys
        self.eventful = 0  # a DEVICE that stays attached through a vIOMMU, so that it can raise events


class Arena:
    """The program's memory: anonymous pages with a hole behind them, and a file."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, (PAGES + GUARD) * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.hole = self.address + PAGES * PAGE  # nothing can be read or written from here on
        if _libc.mprotect(self.hole, GUARD * PAGE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
        self.memfd = os.memfd_create("stress")
        os.ftruncate(self.memfd, PAGES * PAGE)

    def close(self) -> None:
        os.close(self.memfd)


class Worker:
    """One thread's hands: its random choices, its scratch memory, and the calls."""

    def __init__(self, backend: SoftwareBackend, contexts: list[Shared], arena: Arena, seed: int) -> None:
        self.backend = backend
        self.contexts = contexts
        self.arena = arena
        self.random = random.Random(seed)
        self.scratch = ctypes.create_string_buffer(4 * PAGE)
        self.at = ctypes.addressof(self.scratch)
        self.context = contexts[0]
        self.views: list[memoryview] = []

    def begin(self) -> None:
        self.context = self.random.choice(self.contexts)

    def do(self, struct: S) -> S:
        """One ioctl on the context; the struct as it came back. OSError."""
        data = bytearray(filled(struct).pack())
        self.result = self.backend.ioctl(self.context.fd, number_of(struct), data)
        return type(struct).unpack(data)

    def made(self, kind: str, number: int) -> int:
        self.context.ids[kind].append(number)
        return number

    def pick(self, kind: str) -> int:
        """An id of that kind; sometimes one that is gone, or of another kind."""
        known = tuple(self.context.ids[kind])[-NEWEST:]
        return self.random.choice(known) if known and self.random.random() < 0.97 else self.random.randint(1, 64)

    def pick_of(self, *kinds: str) -> int:
        return self.pick(self.random.choice(kinds))

    def pick_fd(self, kind: str) -> int:
        known = tuple(self.context.fds[kind])[-NEWEST:]
        return self.random.choice(known) if known else self.context.queues.get(kind, 9999)

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def place(self) -> tuple[int, int, int]:
        """(IOVA, address, length): a slot with the pages that belong there; now and then there are none."""
        slot, count = self.random.randrange(SLOTS), self.random.choice((1, 2, 2, 4))
        where = self.arena.hole - PAGE if self.chance(0.03) else self.arena.address + slot * 4 * PAGE
        return BASE + slot * SLOT, where, count * PAGE

    def iova(self) -> int:
        return self.place()[0]

    def put(self, data: bytes) -> int:
        ctypes.memmove(self.at, data, len(data))
        return self.at


@dataclass(frozen=True)
class Operation:
    name: str
    run: Callable[[Worker], Any]
    errnos: frozenset[int]
    succeeds: bool  # whether it can, on this machine and beside the others


OPERATIONS: list[Operation] = []


def operation(
    errnos: str = "", *, stale: bool = False, succeeds: bool = True
) -> Callable[[Callable[[Worker], Any]], Callable[[Worker], Any]]:
    """Registers an operation and what it may fail with."""

    def register(function: Callable[[Worker], Any]) -> Callable[[Worker], Any]:
        known = frozenset(getattr(errno, name) for name in errnos.split())
        OPERATIONS.append(Operation(function.__name__, function, known | (STALE if stale else frozenset()), succeeds))
        return function

    return register


# --- core: IOAS and its mappings


@operation()
def ioas_alloc(w: Worker) -> None:
    w.made("IOAS", w.do(u.iommu_ioas_alloc()).out_ioas_id)


@operation("ENOENT EMSGSIZE")
def ioas_iova_ranges(w: Worker) -> None:
    w.do(u.iommu_ioas_iova_ranges(ioas_id=w.pick("IOAS"), num_iovas=w.random.choice((1, 64)), allowed_iovas=w.at))


@operation("ENOENT EADDRINUSE")
def ioas_allow_iovas(w: Worker) -> None:
    count = w.random.randrange(2)
    where = w.put(BASE.to_bytes(8, "little") + (BASE + SLOTS * SLOT * 2 - 1).to_bytes(8, "little"))
    w.do(u.iommu_ioas_allow_iovas(ioas_id=w.pick("IOAS"), num_iovas=count, allowed_iovas=where))


@operation("ENOENT EINVAL EEXIST EFAULT")
def ioas_map_fixed(w: Worker) -> None:
    iova, va, length = w.place()
    flags = FIXED | w.random.choice((READ, READ | WRITE, READ | WRITE))
    w.do(u.iommu_ioas_map(flags=flags, ioas_id=w.pick("IOAS"), user_va=va, length=length, iova=iova))


@operation("ENOENT EINVAL ENOSPC EFAULT")
def ioas_map_automatic(w: Worker) -> None:
    _, va, length = w.place()
    odd = 256 if w.chance(0.1) else 0
    w.do(u.iommu_ioas_map(flags=READ | WRITE, ioas_id=w.pick("IOAS"), user_va=va + odd, length=length))


@operation("ENOENT EINVAL EEXIST ENODEV EBADF EOPNOTSUPP")
def ioas_map_file(w: Worker) -> None:
    fd = w.arena.memfd if w.chance(0.6) else w.pick_fd("dmabuf")
    start = w.random.randrange(4) * PAGE
    w.do(
        u.iommu_ioas_map_file(
            flags=FIXED | READ | WRITE, ioas_id=w.pick("IOAS"), fd=fd, start=start, length=2 * PAGE, iova=w.iova()
        )
    )


@operation("ENOENT EINVAL EEXIST EPERM EFAULT ENODEV")
def ioas_copy(w: Worker) -> None:
    w.do(
        u.iommu_ioas_copy(
            flags=FIXED | READ | (WRITE if w.chance(0.5) else 0),
            dst_ioas_id=w.pick("IOAS"),
            src_ioas_id=w.pick("IOAS"),
            length=PAGE,
            dst_iova=w.iova(),
            src_iova=w.iova(),
        )
    )


@operation("ENOENT EBUSY")
def ioas_unmap(w: Worker) -> None:
    w.do(u.iommu_ioas_unmap(ioas_id=w.pick("IOAS"), iova=w.iova(), length=SLOT * w.random.choice((1, 1, 4))))


@operation("ENOENT EBUSY")
def ioas_unmap_all(w: Worker) -> None:
    w.do(u.iommu_ioas_unmap(ioas_id=w.pick("IOAS"), iova=0, length=2**64 - 1))


@operation("ENOENT EINVAL EADDRINUSE")
def option_huge_pages(w: Worker) -> None:
    op, value = w.random.choice(((1, 0), (0, 0), (0, 1)))
    w.do(u.iommu_option(option_id=u.IOMMU_OPTION_HUGE_PAGES, op=op, object_id=w.pick("IOAS"), val64=value))


@operation("EBUSY")
def option_rlimit_mode(w: Worker) -> None:
    w.do(u.iommu_option(option_id=u.IOMMU_OPTION_RLIMIT_MODE, op=w.random.randrange(2), val64=0))


@operation("EBUSY EINVAL", succeeds=False)
def ioas_change_process(w: Worker) -> None:
    """Refused as long as anything but files is mapped, which is nearly always."""
    w.do(u.iommu_ioas_change_process())


@operation("ENOENT EINVAL EOPNOTSUPP", succeeds=False)
def noiommu_get_pa(w: Worker) -> None:
    """No mock device is without an IOMMU."""
    w.do(u.iommu_ioas_noiommu_get_pa(ioas_id=w.pick("IOAS"), iova=w.iova(), length=PAGE))


@operation("EFAULT")
def memory_goes(w: Worker) -> None:
    """The program gives pages back, as munmap and madvise do; pinned ones live on."""
    start = w.arena.address + w.random.randrange(PAGES) * PAGE
    w.backend.owner.space.unmap(start, start + PAGE)
    _libc.madvise(start, PAGE, mmap.MADV_DONTNEED)


# --- page tables and devices


@operation("ENOENT EINVAL EADDRINUSE EFAULT EOPNOTSUPP")
def hwpt_alloc(w: Worker) -> None:
    kind, flags = w.random.choice((("HWPT", 0), ("PARENT", NEST), ("TRACKED", DIRTY), ("PASIDS", DIRTY | PASID)))
    out = w.do(u.iommu_hwpt_alloc(flags=flags, dev_id=w.pick("DEVICE"), pt_id=w.pick("IOAS")))
    w.made(kind, out.out_hwpt_id)


@operation("ENOENT EINVAL EADDRINUSE EFAULT EOPNOTSUPP")
def hwpt_alloc_with_faults(w: Worker) -> None:
    ask = u.iommu_hwpt_alloc(flags=FAULT | PASID, dev_id=w.pick("DEVICE"), pt_id=w.pick("IOAS"))
    ask.fault_id = w.pick("FAULT")
    w.made("PASIDS", w.do(ask).out_hwpt_id)


@operation("ENOENT EINVAL EOPNOTSUPP EADDRINUSE EFAULT")
def hwpt_alloc_nested(w: Worker) -> None:
    ask = u.iommu_hwpt_alloc(flags=PASID, dev_id=w.pick("DEVICE"), pt_id=w.pick_of("PARENT", "VIOMMU"))
    ask.data_type, ask.data_len, ask.data_uptr = t.IOMMU_HWPT_DATA_SELFTEST, 4, w.put(bytes(4))
    w.made("NESTED", w.do(ask).out_hwpt_id)


@operation("ENOENT")
def get_hw_info(w: Worker) -> None:
    w.do(u.iommu_hw_info(dev_id=w.pick("DEVICE"), data_len=16, data_uptr=w.at))


@operation("ENOENT EOPNOTSUPP")
def set_dirty_tracking(w: Worker) -> None:
    hwpt = w.pick_of("TRACKED", "PASIDS", "TRACKED", "HWPT")
    w.do(u.iommu_hwpt_set_dirty_tracking(flags=w.chance(0.8), hwpt_id=hwpt))


@operation("ENOENT EINVAL EOPNOTSUPP")
def get_dirty_bitmap(w: Worker) -> None:
    ask = u.iommu_hwpt_get_dirty_bitmap(hwpt_id=w.pick_of("TRACKED", "PASIDS"), iova=BASE, data=w.at)
    ask.flags, ask.length, ask.page_size = w.random.randrange(2), SLOTS * SLOT, PAGE
    w.do(ask)


@operation("ENOENT EINVAL")
def mark_dirty(w: Worker) -> None:
    ask = t.test_dirty(id=w.pick("TRACKED"), iova=w.iova(), length=4 * PAGE, page_size=PAGE, uptr=w.put(b"\xff"))
    w.do(ask)


@operation("ENOENT EINVAL EOPNOTSUPP")
def hwpt_invalidate(w: Worker) -> None:
    kind, data = w.random.choice((("NESTED", bytes(8)), ("VIOMMU", bytes(4) + (1).to_bytes(4, "little") + bytes(4))))
    ask = u.iommu_hwpt_invalidate(hwpt_id=w.pick(kind), data_uptr=w.put(data), data_type=0xDEADBEEF)
    ask.entry_len, ask.entry_num = len(data), 1
    w.do(ask)


@operation("ENOENT EINVAL EADDRINUSE EFAULT")
def mock_domain(w: Worker) -> None:
    kind = w.random.choice(("IOAS", "IOAS", *HWPTS))
    out = w.do(t.test_mock_domain(id=w.pick(kind)))
    w.context.device_of[out.out_stdev_id] = out.out_idev_id
    w.made("SELFTEST", out.out_stdev_id)
    w.made("DEVICE", out.out_idev_id)
    if kind == "IOAS":
        w.made("HWPT", out.out_hwpt_id)


def _device(w: Worker) -> int:
    return w.random.choice(w.context.lasting) if w.chance(0.4) else w.pick("SELFTEST")


@operation("ENOENT EINVAL EADDRINUSE EFAULT")
def mock_domain_replace(w: Worker) -> None:
    w.do(t.test_mock_domain_replace(id=_device(w), pt_id=w.pick_of("IOAS", "NESTED", "PASIDS", *HWPTS)))


def _make_compatible(w: Worker) -> None:
    """Now and then the device itself goes to a page table beside which PASIDs may be attached."""
    if w.chance(0.3):
        w.do(t.test_mock_domain_replace(id=w.random.choice(w.context.lasting), pt_id=w.pick("PASIDS")))


@operation("ENOENT EINVAL EBUSY EADDRINUSE EFAULT ENOMEM")
def pasid_attach(w: Worker) -> None:
    _make_compatible(w)
    ask = t.test_pasid_attach(id=w.random.choice(w.context.lasting), pasid=w.random.choice(PASIDS))
    ask.pt_id = w.pick_of("PASIDS", "PASIDS", "NESTED", "IOAS", "HWPT")
    w.do(ask)


@operation("ENOENT EINVAL EADDRINUSE EFAULT ENOMEM")
def pasid_replace(w: Worker) -> None:
    ask = t.test_pasid_replace(id=w.random.choice(w.context.lasting), pasid=w.random.choice(PASIDS))
    ask.pt_id = w.pick_of("PASIDS", "PASIDS", "NESTED", "IOAS", "HWPT")
    w.do(ask)


@operation("ENOENT")
def pasid_detach(w: Worker) -> None:
    w.do(t.test_pasid_detach(id=w.random.choice(w.context.lasting), pasid=w.random.choice(PASIDS)))


@operation("ENOENT EINVAL")
def check_map(w: Worker) -> None:
    iova, va, _ = w.place()
    w.do(t.test_md_check_map(id=w.pick_of(*HWPTS), iova=iova, length=PAGE, uptr=va))


# --- accesses


@operation("ENOENT EADDRINUSE")
def create_access(w: Worker) -> None:
    flags = t.MOCK_FLAGS_ACCESS_CREATE_NEEDS_PIN_PAGES if w.chance(0.9) else 0
    w.context.fds["access"].append(w.do(t.test_create_access(id=w.pick("IOAS"), flags=flags)).out_access_fd)


@operation("ENOENT EINVAL EPERM EFAULT EOPNOTSUPP EBADE", stale=True)
def access_pages(w: Worker) -> None:
    fd = w.pick_fd("access")
    iova, va, _ = w.place()
    ask = t.test_access_pages(id=fd, iova=iova, length=PAGE, uptr=va)
    ask.flags = w.random.randrange(2)
    w.context.pins.append((fd, w.do(ask).out_access_pages_id))


@operation("ENOENT", stale=True)
def destroy_access_pages(w: Worker) -> None:
    try:
        fd, pin = w.context.pins.pop()
    except IndexError:
        fd, pin = w.pick_fd("access"), 1
    w.do(t.test_destroy_access_pages(id=fd, access_pages_id=pin))


@operation("ENOENT EINVAL EPERM EFAULT", stale=True)
def access_rw(w: Worker) -> None:
    ask = t.test_access_rw(id=w.pick_fd("access"), iova=w.iova() + 100, length=w.random.choice((8, PAGE)), uptr=w.at)
    ask.flags = w.random.choice((0, 1, 4, 5))
    w.do(ask)


@operation("ENOENT EBUSY EADDRINUSE", stale=True)
def access_replace_ioas(w: Worker) -> None:
    w.do(t.test_access_replace_ioas(id=w.pick_fd("access"), ioas_id=w.pick("IOAS")))


# --- events


@operation()
def fault_queue_alloc(w: Worker) -> None:
    out = w.do(u.iommu_fault_alloc())
    w.made("FAULT", out.out_fault_id)
    w.context.fds["fault"].append(out.out_fault_fd)


@operation("ENOENT")
def trigger_iopf(w: Worker) -> None:
    ask = t.test_trigger_iopf(dev_id=w.pick("DEVICE"), pasid=w.random.choice((0, 1)), grpid=w.random.randrange(512))
    ask.perm, ask.addr = 3, BASE
    w.do(ask)


@operation(stale=True)
def read_faults_and_answer(w: Worker) -> None:
    for _ in range(8):
        fd = w.pick_fd("fault")
        w.backend.poll(fd, 0x5, 0)
        data = w.backend.read(fd, 40 * 8)
        for at in range(36, len(data), 40):
            w.backend.write(fd, data[at : at + 4] + (w.random.randrange(2)).to_bytes(4, "little"))


# --- vIOMMUs


@operation("ENOENT EINVAL")
def viommu_alloc(w: Worker) -> None:
    ask = u.iommu_viommu_alloc(type=t.IOMMU_VIOMMU_TYPE_SELFTEST, dev_id=w.pick("DEVICE"), hwpt_id=w.pick("PARENT"))
    ask.data_len, ask.data_uptr = 24, w.put(bytes(24))
    w.made("VIOMMU", w.do(ask).out_viommu_id)
    data = t.iommu_viommu_selftest.unpack(w.scratch.raw[:24])
    w.context.fds["region"].append(data.out_mmap_offset)


@operation("ENOENT EINVAL EEXIST")
def vdevice_alloc(w: Worker) -> None:
    ask = u.iommu_vdevice_alloc(viommu_id=w.pick("VIOMMU"), dev_id=w.pick("DEVICE"), virt_id=w.random.randrange(1, 4))
    w.made("VDEVICE", w.do(ask).out_vdevice_id)


@operation("ENOENT EEXIST")
def veventq_alloc(w: Worker) -> None:
    ask = u.iommu_veventq_alloc(viommu_id=w.pick("VIOMMU"), type=t.IOMMU_VEVENTQ_TYPE_SELFTEST, veventq_depth=2)
    out = w.do(ask)
    w.made("VEVENTQ", out.out_veventq_id)
    w.context.fds["veventq"].append(out.out_veventq_fd)


@operation("ENOENT EOPNOTSUPP")
def trigger_vevent(w: Worker) -> None:
    w.do(t.test_trigger_vevent(dev_id=w.context.eventful if w.chance(0.7) else w.pick("DEVICE")))


@operation(stale=True)
def read_vevents(w: Worker) -> None:
    for _ in range(8):
        fd = w.pick_fd("veventq") if w.chance(0.7) else w.context.queues["veventq"]
        w.backend.poll(fd, 0x5, 0)
        w.backend.read(fd, 64)


@operation("ENOENT EPERM EINVAL EEXIST EIO EFAULT EADDRINUSE")
def hw_queue_alloc(w: Worker) -> None:
    ask = u.iommu_hw_queue_alloc(viommu_id=w.pick("VIOMMU"), type=t.IOMMU_HW_QUEUE_TYPE_SELFTEST)
    ask.index, ask.nesting_parent_iova, ask.length = w.random.randrange(2), w.iova(), PAGE
    w.made("HW_QUEUE", w.do(ask).out_hw_queue_id)


@operation("ENXIO")
def map_device_memory(w: Worker) -> None:
    offsets = tuple(w.context.fds["region"])
    w.views.append(w.backend.mmap(w.context.fd, 8192, 3, mmap.MAP_SHARED, w.random.choice(offsets) if offsets else 0))
    if len(w.views) > 2:
        w.views.pop(0).release()


# --- dma-bufs


@operation()
def dmabuf_get(w: Worker) -> None:
    w.do(t.test_dmabuf_get(length=4 * PAGE, open_flags=os.O_RDWR))
    w.context.fds["dmabuf"].append(w.result)


@operation("EBADF EINVAL")
def dmabuf_revoke(w: Worker) -> None:
    w.do(t.test_dmabuf_revoke(dmabuf_fd=w.pick_fd("dmabuf"), revoked=w.random.randrange(2)))


# --- VFIO's container commands


def _vfio(w: Worker, cmd: int, data: bytes | int) -> None:
    w.backend.ioctl(w.context.fd, cmd, data if isinstance(data, int) else bytearray(data))


@operation("ENOENT ENODEV")
def vfio_ioas(w: Worker) -> None:
    w.do(u.iommu_vfio_ioas(ioas_id=w.pick("IOAS"), op=w.random.randrange(3)))


@operation("ENODEV")
def vfio_get_info(w: Worker) -> None:
    _vfio(w, v.VFIO_IOMMU_GET_INFO, v.vfio_iommu_type1_info(argsz=24).pack())


@operation("ENODEV EINVAL EEXIST EFAULT")
def vfio_map_dma(w: Worker) -> None:
    iova, va, length = w.place()
    ask = v.vfio_iommu_type1_dma_map(argsz=32, flags=w.random.choice((1, 3)), vaddr=va, iova=iova, size=length)
    _vfio(w, v.VFIO_IOMMU_MAP_DMA, ask.pack())


@operation("ENODEV ENOENT EINVAL EBUSY")
def vfio_unmap_dma(w: Worker) -> None:
    _vfio(w, v.VFIO_IOMMU_UNMAP_DMA, v.vfio_iommu_type1_dma_unmap(argsz=24, iova=w.iova(), size=2 * PAGE).pack())


@operation("ENODEV EINVAL EADDRINUSE")
def vfio_set_iommu(w: Worker) -> None:
    _vfio(w, v.VFIO_CHECK_EXTENSION, v.VFIO_DMA_CC_IOMMU)
    _vfio(w, v.VFIO_SET_IOMMU, w.random.choice((v.VFIO_TYPE1_IOMMU, v.VFIO_TYPE1v2_IOMMU)))


# --- the end of things


def _destroy(w: Worker, *kinds: str) -> None:
    """Three of them, or as many as can be; the first refusal is the answer when none went."""
    refusal: OSError | None = None
    done = 0
    for _ in range(3):
        number = w.pick_of(*kinds)
        if number in w.context.kept:
            continue
        try:
            w.do(u.iommu_destroy(id=number))
        except OSError as error:
            refusal = error
            continue
        done += 1
        gone = {number, w.context.device_of.pop(number, number)}
        for ids in tuple(w.context.ids.values()):
            for one in gone.intersection(ids):
                with suppress(ValueError):  # another thread took it out meanwhile
                    ids.remove(one)
    if refusal is not None and (done == 0 or refusal.errno not in (errno.ENOENT, errno.EBUSY)):
        raise refusal


@operation("ENOENT EBUSY")
def destroy_ioas(w: Worker) -> None:
    _destroy(w, "IOAS")


@operation("ENOENT EBUSY")
def destroy_hwpt(w: Worker) -> None:
    _destroy(w, *HWPTS, "NESTED")


@operation("ENOENT EBUSY")
def destroy_device(w: Worker) -> None:
    _destroy(w, "SELFTEST")


@operation("ENOENT EBUSY")
def destroy_viommu_or_what_is_on_it(w: Worker) -> None:
    _destroy(w, "VIOMMU", "VDEVICE", "VEVENTQ", "HW_QUEUE")


@operation("ENOENT EBUSY")
def destroy_fault_queue(w: Worker) -> None:
    _destroy(w, "FAULT")


@operation("EBADF")
def close_descriptor(w: Worker) -> None:
    for kind in ("access", "fault", "veventq", "dmabuf"):
        fds = w.context.fds[kind]
        if len(fds) > 3:
            with suppress(IndexError):  # other threads took them
                w.backend.close(fds.pop(0))


DESTROYERS = [op for op in OPERATIONS if op.name.startswith(("destroy_", "close_"))]
CROWDED = 100  # more objects than this: something is destroyed before anything else is made
