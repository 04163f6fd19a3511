"""Bad input for every kind of file: random structs, wrong pointers, memory that ends in the middle.

:func:`play` works on any backend: on a machine in process, and as a program under ``iommufd run``
(``python -m tests.stress.bad_input SEED COUNT PATH…``). Whatever it does, a machine answers with an errno.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from iommufd.testing.subject import filled, number_of
from iommufd.uapi import iommufd as u
from iommufd.uapi import iommufd_test as t
from iommufd.uapi import vfio as v
from iommufd.uapi.commands import COMMANDS
from iommufd.uapi.declare import Struct
from iommufd.uapi.vfio.commands import CONTAINER, DEVICE, GROUP

if TYPE_CHECKING:
    from iommufd.client.backend import Backend

PAGE = 4096
PAGES = 16
ERRNOS = """E2BIG EACCES EADDRINUSE EBADE EBADF EBADFD EBUSY EEXIST EFAULT EINVAL EIO EMSGSIZE ENODEV ENOENT ENOMEM
    ENOSPC ENOTTY ENXIO EOPNOTSUPP EOVERFLOW EPERM ERANGE ESPIPE"""
DOCUMENTED = frozenset(getattr(errno, name) for name in ERRNOS.split())
EDGES = (0, 1, 2, 3, 4, 7, 8, 12, 40, 72, 255, 4095, 4096, 1 << 20, 1 << 31, (1 << 32) - 1, 1 << 47, 1 << 63, 2**64 - 1)
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Files:
    """One file of every kind that ``paths`` lead to, and objects for random ids to hit."""

    def __init__(self, backend: Backend, paths: Sequence[str]) -> None:
        self.backend = backend
        self.context = backend.open("/dev/iommu", os.O_RDWR)
        self.fds = [self.context, *(backend.open(path, os.O_RDWR) for path in paths if path != "/dev/iommu")]
        with suppress(OSError):  # a machine without mock hardware
            self._mock()

    def do(self, struct: Any) -> Any:
        data = bytearray(filled(struct).pack())
        result = self.backend.ioctl(self.context, number_of(struct), data)
        return result if isinstance(struct, t.test_dmabuf_get) else type(struct).unpack(data)

    def _mock(self) -> None:
        """Queues, an access, a dma-buf, a vIOMMU: where the machine has the test command."""
        ioas = self.do(u.iommu_ioas_alloc()).out_ioas_id
        device = self.do(t.test_mock_domain_flags(id=ioas, dev_flags=t.MOCK_FLAGS_DEVICE_PASID)).out_idev_id
        self.fds.append(self.do(t.test_create_access(id=ioas)).out_access_fd)
        self.fds.append(self.do(t.test_dmabuf_get(length=4 * PAGE, open_flags=os.O_RDWR)))
        self.fds.append(self.do(u.iommu_fault_alloc()).out_fault_fd)
        parent = self.do(u.iommu_hwpt_alloc(flags=1, dev_id=device, pt_id=ioas)).out_hwpt_id
        make = u.iommu_viommu_alloc(type=t.IOMMU_VIOMMU_TYPE_SELFTEST, dev_id=device, hwpt_id=parent)
        viommu = self.do(make).out_viommu_id
        queue = u.iommu_veventq_alloc(viommu_id=viommu, type=t.IOMMU_VEVENTQ_TYPE_SELFTEST, veventq_depth=2)
        self.fds.append(self.do(queue).out_veventq_fd)


class Garbage:
    """Calls made of a seed. Pointers lead into an arena, past its end, or nowhere, never into anybody else's memory."""

    def __init__(self, files: Files, seed: int) -> None:
        self.files = files
        self.random = random.Random(seed)
        self.memory = mmap.mmap(-1, 2 * PAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.end = self.start + PAGES * PAGE
        if _libc.mprotect(self.end, PAGES * PAGE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
        self.arms: list[type[Struct]] = list(t.ARMS.values())
        self.vfio = [command for table in (CONTAINER, GROUP, DEVICE) for command in table]

    def value(self, width: int) -> int:
        choose = self.random
        kind = choose.randrange(6)
        if kind == 0:
            found = choose.getrandbits(8 * width)
        elif kind == 1:
            found = choose.randrange(12)  # ids
        elif kind == 2:
            found = choose.choice((self.start, self.start + 100, self.end - 3, self.end, self.end + PAGE))
        elif kind == 3:
            found = t.MOCK_APERTURE_START + choose.randrange(8) * PAGE
        elif kind == 4:
            found = choose.choice((*self.files.fds, 9999))
        else:
            found = choose.choice(EDGES)
        return found % (1 << 8 * width)

    def struct(self) -> tuple[int, bytes]:
        """A command and its struct, one in three of random bytes, the others with some members at the edges."""
        choose = self.random
        kind = choose.randrange(4)
        if kind == 0:
            command = choose.choice(COMMANDS)
            number, of = command.number, command.struct
        elif kind == 1:
            number, of = t.IOMMU_TEST_CMD, choose.choice(self.arms)
        elif kind == 2:
            vfio = choose.choice(self.vfio)
            number, of = vfio.number, vfio.struct or u.iommu_destroy
        else:
            return choose.choice((0x3B00 + choose.randrange(256), choose.getrandbits(32))), choose.randbytes(72)
        if choose.random() < 0.3:
            return number, of.SIZE.to_bytes(4, "little") + choose.randbytes(of.SIZE - 4)
        data = bytearray(filled(of()).pack() if hasattr(of, "size") else of(argsz=of.SIZE).pack())
        for member in of.FIELDS[1:]:
            if member.name != "op" and choose.random() < 0.7:
                data[member.offset : member.offset + member.size] = self.value(member.size).to_bytes(
                    member.size, "little"
                )
        if choose.random() < 0.1:
            data[:4] = self.value(4).to_bytes(4, "little")
        if number == v.VFIO_DEVICE_SET_IRQS:
            data += choose.randbytes(8)
        return number, bytes(data)

    def call(self) -> None:
        """One call on some file. OSError."""
        choose, backend = self.random, self.files.backend
        fd = self.files.context if choose.random() < 0.5 else choose.choice(self.files.fds)
        kind = choose.randrange(12)
        if kind == 0:
            backend.read(fd, choose.choice((0, 1, 8, 39, 40, 4096)))
        elif kind == 1:
            backend.write(fd, choose.randbytes(choose.choice((0, 1, 8, 12, 16))))
        elif kind == 2:
            backend.poll(fd, choose.getrandbits(9), 0)
        elif kind == 3:
            length = choose.choice((1, PAGE, 2 * PAGE))
            offset = choose.choice((0, PAGE, 2 * PAGE, 1 << 40))
            backend.mmap(fd, length, choose.choice((1, 3)), choose.choice((mmap.MAP_SHARED, mmap.MAP_PRIVATE)), offset)
        else:
            number, data = self.struct()
            where = choose.choice((self.start + PAGE, self.start + 2 * PAGE, self.end - len(data)))
            ctypes.memmove(where, data, len(data))
            if choose.random() < 0.2:  # the memory ends in the middle of it, or before, or is nobody's
                where = choose.choice((self.end - choose.randrange(len(data)), self.end, 0, 1 << 47, 2**64 - 8))
            backend.ioctl(fd, number, where)


def play(backend: Backend, paths: Sequence[str], seed: int, count: int) -> Counter[int]:
    """``count`` calls; how often each errno came (0: success). AssertionError for an errno that is not documented.

    Afterwards everything is closed and a fresh context works."""
    files = Files(backend, paths)
    garbage = Garbage(files, seed)
    came: Counter[int] = Counter()
    for number in range(count):
        try:
            garbage.call()
            came[0] += 1
        except OSError as error:
            if error.errno not in DOCUMENTED:
                raise AssertionError(f"call {number} of seed {seed}: {error!r}") from error
            came[error.errno or 0] += 1
    for fd in files.fds:
        backend.close(fd)
    files.context = backend.open("/dev/iommu", os.O_RDWR)
    assert files.do(u.iommu_ioas_alloc()).out_ioas_id == 1
    backend.close(files.context)
    return came


if __name__ == "__main__":
    from iommufd.client.backends.kernel import KernelBackend

    print(dict(play(KernelBackend(), sys.argv[3:], int(sys.argv[1]), int(sys.argv[2]))))
