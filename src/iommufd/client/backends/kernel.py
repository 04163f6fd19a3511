"""The real files: nothing but os, fcntl, mmap and select."""

from __future__ import annotations

import fcntl
import mmap
import os
import select


class KernelBackend:
    """The operating system itself. Under ``iommufd run`` this is the software machine, and nothing here can tell."""

    name = "kernel"

    def __repr__(self) -> str:
        return f"<KernelBackend, Linux {os.uname().release}>"

    def open(self, path: str, flags: int) -> int:
        return os.open(path, flags | os.O_CLOEXEC)

    def ioctl(self, fd: int, cmd: int, arg: bytearray | int) -> int:
        if isinstance(arg, int):
            return _raw_ioctl(fd, cmd, arg)
        result: int = fcntl.ioctl(fd, cmd, arg, True)
        return result

    def ioctl_many(self, fd: int, cmd: int, data: bytearray, size: int, done: list[int]) -> None:
        """See :meth:`iommufd.client.handle.Handle.ioctl_many`."""
        call = fcntl.ioctl
        with memoryview(data) as view:
            for at in range(done[0] * size, len(data), size):
                call(fd, cmd, view[at : at + size], True)
                done[0] += 1

    def read(self, fd: int, count: int, offset: int | None = None) -> bytes:
        return os.read(fd, count) if offset is None else os.pread(fd, count, offset)

    def write(self, fd: int, data: bytes, offset: int | None = None) -> int:
        return os.write(fd, data) if offset is None else os.pwrite(fd, data, offset)

    def poll(self, fd: int, events: int, timeout: float | None) -> int:
        poller = select.poll()
        poller.register(fd, events)
        ready = poller.poll(None if timeout is None else timeout * 1000)
        return ready[0][1] if ready else 0

    def mmap(self, fd: int, length: int, prot: int, flags: int, offset: int) -> memoryview:
        return memoryview(mmap.mmap(fd, length, flags=flags, prot=prot, offset=offset))

    def close(self, fd: int) -> None:
        os.close(fd)

    def fileno(self, fd: int) -> int:
        return fd


_libc_ioctl = None


def _raw_ioctl(fd: int, cmd: int, arg: int) -> int:
    """ioctl(2) with a 64-bit number as argument, which :mod:`fcntl` cannot pass."""
    global _libc_ioctl
    import ctypes

    if _libc_ioctl is None:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong]
        libc.ioctl.restype = ctypes.c_int
        _libc_ioctl = libc.ioctl
    result: int = _libc_ioctl(fd, cmd, arg & (2**64 - 1))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
