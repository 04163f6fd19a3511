"""UnmaskWatch: an eventfd that unmasks INTx when the owner signals it (kernel: struct virqfd).

The eventfd is the owner's; what it counted is taken from it, as the kernel does. A thread of its own waits for it, for
as long as it is set, and closes it at the end.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable


class UnmaskWatch:
    """``fd`` belongs to the watch. ``signalled(watch)`` is called on its thread, also when it was signalled before."""

    def __init__(self, fd: int, signalled: Callable[[UnmaskWatch], None]) -> None:
        self._fd = fd
        self._signalled = signalled
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        threading.Thread(target=self._run, name="vfio-unmask", daemon=True).start()

    def close(self) -> None:
        """Ends the watch, which may be in ``signalled`` right now. Once."""
        os.eventfd_write(self._stop, 1)

    def _run(self) -> None:
        poller = select.poll()
        poller.register(self._fd, select.POLLIN)
        poller.register(self._stop, select.POLLIN)
        while self._stop not in (fd for fd, _ in poller.poll()):
            if self._take():
                self._signalled(self)
        os.close(self._fd)
        os.close(self._stop)

    def _take(self) -> bool:
        """Whether it was signalled; never waits, although the owner's descriptor may, which another can have read."""
        try:
            return bool(os.preadv(self._fd, [bytearray(8)], -1, os.RWF_NOWAIT))
        except BlockingIOError:
            return False
