"""Threads that use descriptors which another one keeps closing and opening: ``python -m tests.stress.closing SECONDS``.

Prints the errnos that came. Runs on whatever /dev/iommu there is.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
import time
from typing import Any

from iommufd.client.backends.kernel import KernelBackend
from iommufd.errors import errno_name
from iommufd.testing.subject import filled, number_of
from iommufd.uapi import iommufd as u
from iommufd.uapi import iommufd_test as t

LENGTH = 64 << 12
FLAGS = u.IOMMU_IOAS_MAP_FIXED_IOVA | u.IOMMU_IOAS_MAP_READABLE | u.IOMMU_IOAS_MAP_WRITEABLE


class Users:
    """Three contexts, four threads that use them, one that closes them."""

    def __init__(self, seconds: float) -> None:
        self.backend = KernelBackend()
        self.fds = [self.open() for _ in range(3)]
        self.errnos: set[int] = set()
        self.rounds = 0
        self.end = time.monotonic() + seconds
        self.memory = mmap.mmap(-1, LENGTH)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))

    def open(self) -> int:
        return self.backend.open("/dev/iommu", os.O_RDWR)

    def do(self, fd: int, struct: Any) -> Any:
        data = bytearray(filled(struct).pack())
        try:
            self.backend.ioctl(fd, number_of(struct), data)
        except OSError as error:
            self.errnos.add(error.errno or 0)
        return type(struct).unpack(data)

    def use(self, number: int) -> None:
        while time.monotonic() < self.end:
            number = (number + 1) % len(self.fds)
            fd = self.fds[number]
            ioas = self.do(fd, u.iommu_ioas_alloc()).out_ioas_id
            self.do(fd, t.test_mock_domain(id=ioas))
            iova = t.MOCK_APERTURE_START
            self.do(fd, u.iommu_ioas_map(flags=FLAGS, ioas_id=ioas, user_va=self.address, length=LENGTH, iova=iova))
            access = self.do(fd, t.test_create_access(id=ioas)).out_access_fd
            if access:
                self.do(fd, t.test_access_rw(id=access, iova=iova, length=LENGTH, uptr=self.address))
                os.close(access)
            self.rounds += 1

    def close(self) -> None:
        number = 0
        while time.monotonic() < self.end:
            number = (number + 1) % len(self.fds)
            self.backend.close(self.fds[number])
            self.fds[number] = self.open()

    def run(self) -> None:
        threads = [threading.Thread(target=self.use, args=(n,)) for n in range(4)]
        threads.append(threading.Thread(target=self.close))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(self.rounds > 0, *sorted(map(errno_name, self.errnos)))


if __name__ == "__main__":
    sys.setswitchinterval(1e-5)
    Users(float(sys.argv[1])).run()
