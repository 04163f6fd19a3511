"""The floor: a supervisor set up as ours that only finds the file, reads 40 bytes of the caller and writes 40.

Same filter, same flags, same way to read and write; nothing is decoded, looked up in an object table or allocated. What
`iommufd run` takes per call is measured against what this takes in the same minute: ``python -m bench.floor PROGRAM…``.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import sys
import threading
from collections.abc import Sequence

from iommufd.errors import KernelError
from iommufd.interpose.caller import CallerMemory
from iommufd.interpose.children import Children, end_like
from iommufd.interpose.filter import compile_filter, descriptor_range
from iommufd.interpose.launch import start
from iommufd.interpose.notify import NOTIF, NOTIF_SIZE, RECV, RESP, RESP_SIZE, SEND, Listener
from iommufd.interpose.session import SWITCH_INTERVAL
from iommufd.interpose.syscalls import HOST

SIZE = 40


class Floor:
    """Serves one program: /dev/iommu opens as a bare memfd, an ioctl on it copies 40 bytes in and out."""

    def __init__(self, listener: int, base: int) -> None:
        self.listener = Listener(listener)
        self.listener.set_sync_wake_up()
        self._base = base
        self._callers: dict[int, tuple[CallerMemory, dict[int, int]]] = {}

    def serve(self) -> None:
        ioctl, fd = fcntl.ioctl, self.listener.fd
        buffer, zeroes = bytearray(NOTIF_SIZE), bytes(NOTIF_SIZE)
        response = bytearray(RESP_SIZE)
        unpack, pack_into = NOTIF.unpack, RESP.pack_into
        callers = self._callers
        nr_ioctl = HOST.numbers["ioctl"]
        while True:
            buffer[:] = zeroes
            try:
                ioctl(fd, RECV, buffer)
            except OSError:
                if self.listener.over():
                    return
                continue
            number, tid, _, nr, _, _, a0, a1, a2, _, _, _ = unpack(buffer)
            if nr == nr_ioctl:
                caller = callers.get(tid)
                if caller is not None and a0 in caller[1]:
                    memory = caller[0]
                    data = memory.read_upto(a2, SIZE)
                    value = 0 if memory.write_upto(a2, data) == SIZE else -errno.EFAULT
                    pack_into(response, 0, number, 0, value, 0)
                    ioctl(fd, SEND, response)
                    continue
            if not self._open(number, tid, nr, a1):
                self.listener.proceed(number)

    def _open(self, number: int, tid: int, nr: int, path: int) -> bool:
        if nr != HOST.numbers["openat"]:
            return False
        memory = CallerMemory(tid)
        try:
            if memory.read_string(path) != b"/dev/iommu":
                return False
        except KernelError:
            return False
        source = os.memfd_create("floor", os.MFD_CLOEXEC)
        fd = self.listener.add_fd(number, source, self._base, False, send=True)
        os.close(source)
        self._callers[tid] = (memory, {fd: fd})
        return True


def main(argv: Sequence[str]) -> int:
    base, top = descriptor_range(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    sys.setswitchinterval(SWITCH_INTERVAL)
    children = Children()
    launched = start(argv, compile_filter(base, top), signal_mask=children.mask_before, die_with_parent=True)
    floor = Floor(launched.listener, base)
    threading.Thread(target=floor.serve, daemon=True).start()
    launched.go()
    return end_like(children.wait(launched.pid))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
