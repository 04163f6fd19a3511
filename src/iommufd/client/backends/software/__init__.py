"""The software backend: in-process machines behind the eight calls, and which machine a name means."""

from __future__ import annotations

import os
import threading
import weakref

from iommufd.client.backends.software.backend import SoftwareBackend
from iommufd.machine.machine import Machine
from iommufd.machine.presets import preset

_lock = threading.Lock()
_backends: weakref.WeakKeyDictionary[Machine, weakref.ref[SoftwareBackend]] = weakref.WeakKeyDictionary()
_named: weakref.WeakValueDictionary[tuple[str, str | None], SoftwareBackend] = weakref.WeakValueDictionary()


def software(machine: object = None, kernel: str | None = None) -> SoftwareBackend:
    """The backend of ``machine``: a Machine, or the name of a preset (None: "default").

    A Machine has one backend in a process. A name means the same machine as long as anything of it is open in this
    process, a fresh one after that; so two parts of a program that open ``"mock"`` share their hardware. UnknownMachine
    for a name that is none; TypeError for anything else."""
    if machine is None:
        machine = "default"
    with _lock:
        if isinstance(machine, Machine):
            if kernel is not None:
                raise ValueError("a Machine that is built already has its kernel release")
            return _backend_of(machine)
        if not isinstance(machine, str):
            raise TypeError(f"a machine is a Machine or the name of one, not {type(machine).__name__}")
        found = _named.get((machine, kernel))
        if found is None:
            found = _named[machine, kernel] = _backend_of(preset(machine, kernel))
        return found


def _backend_of(machine: Machine) -> SoftwareBackend:
    known = _backends.get(machine)
    backend = known() if known is not None else None
    if backend is None:
        backend = SoftwareBackend(machine)
        _backends[machine] = weakref.ref(backend)
    return backend


def _forget() -> None:
    global _lock
    _lock = threading.Lock()
    _named.clear()
    _backends.clear()


os.register_at_fork(after_in_child=_forget)

__all__ = ["SoftwareBackend", "software"]
