"""Calls that change what a thread may do, or what its paths and numbers mean: they proceed, and we forget.

The change happens after the trap, but before the same thread's next call, which is when anything is read again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from iommufd.interpose.trap import PROCEED, Trap

if TYPE_CHECKING:
    from iommufd.interpose.paths import Resolver
    from iommufd.interpose.processes import Processes
    from iommufd.interpose.trap import Proceed

CLONE_FILES = 0x400


class Credentials:
    """Handlers of setuid and its kin, capset, unshare, setns, chroot, pivot_root."""

    def __init__(self, processes: Processes, resolver: Resolver) -> None:
        self._processes = processes
        self._resolver = resolver

    def credentials(self, trap: Trap) -> Proceed:
        thread = self._processes.threads.get(trap.tid)
        if thread is not None:
            thread.forget_credentials()
        return PROCEED

    def root(self, trap: Trap) -> Proceed:
        self._resolver.foreign_roots = True
        return PROCEED

    def namespaces(self, trap: Trap) -> Proceed:
        """setns and unshare may do either."""
        self._resolver.foreign_roots = True
        return self.credentials(trap)

    def unshare(self, trap: Trap) -> Proceed:
        if trap.args[0] & CLONE_FILES and self._processes.known(trap.tid) is not None:
            self._processes.tables_unshared(trap.tid)
        return self.namespaces(trap)
