"""Context: one open of ``/dev/iommu``, and how it is opened (kernel: struct iommufd_ctx).

Invariants: everything made through a context ends with it. Closing gives up first what would keep the kernel's context
alive behind it (queues' descriptors, bound devices), newest first, then the descriptor; the kernel takes the objects
down, leaves first. What else holds the file (a mapping of device memory, a duplicate of the number, a process it was
sent to) keeps the kernel's side until it is gone, too.
"""

from __future__ import annotations

import contextlib
import errno
import os
import warnings
from typing import TYPE_CHECKING, Self, TypeVar

from iommufd.client.backend import check_calls
from iommufd.client.calls import filled, pack
from iommufd.client.errors import IommufdError
from iommufd.client.handle import Handle
from iommufd.client.numbers import instance, number, plural
from iommufd.client.objects import _age
from iommufd.uapi import iommufd as u

if TYPE_CHECKING:
    from types import TracebackType
    from uuid import UUID

    from iommufd.client.backend import Backend
    from iommufd.client.device import Device
    from iommufd.client.fault_queue import FaultQueue
    from iommufd.client.ioas import IOAS
    from iommufd.client.objects import Object
    from iommufd.client.vfio import VFIODevice
    from iommufd.uapi.declare import Struct

PATH = "/dev/iommu"
ABSENT = (
    "this system has no /dev/iommu (most distribution kernels are built without CONFIG_IOMMUFD); for a software one: "
    'iommufd.open(machine="mock"), or IOMMUFD_BACKEND=software in the environment, with IOMMUFD_MACHINE=NAME for a '
    "machine other than the default one"
)
DENIED = (
    '/dev/iommu is there, but this user may not open it; for a software one: iommufd.open(machine="mock") or '
    "IOMMUFD_BACKEND=software in the environment"
)

S = TypeVar("S", bound="Struct")
K = TypeVar("K", bound="Object")


def open(machine: object = None, backend: str | Backend | None = None, *, kernel: str | None = None) -> Context:
    """Opens ``/dev/iommu``: the kernel's, or that of a software machine in this process.

    ``machine`` is a :class:`~iommufd.machine.machine.Machine` or a name (``iommufd machines`` lists them) and means
    software; ``kernel`` ("6.6") is the release that a named machine shows. ``backend`` is "kernel", "software" or
    anything with the eight calls of :class:`~iommufd.client.backend.Backend`. With neither, ``IOMMUFD_BACKEND`` and
    ``IOMMUFD_MACHINE`` in the environment decide, and without those it is the kernel's.

    IommufdError ENOENT when the system has no /dev/iommu (the sentence says how to ask for software), EACCES when it
    may not be opened; ValueError for names that mean nothing.
    """
    chosen = choose(machine, backend, kernel)
    return Context(chosen, _open(chosen, PATH))


def adopt(fd: int, backend: Backend | None = None) -> Context:
    """A context for a descriptor of ``/dev/iommu`` that came from elsewhere (inherited, or sent over a socket).

    The context closes the number when it is closed. What others made through the same file is there but unknown to it;
    :meth:`Context.adopt` takes an object over by its number."""
    return Context(
        backend if backend is not None else choose(None, "kernel", None), number(fd, "a descriptor", 2**31 - 1)
    )


def choose(machine: object, backend: str | Backend | None, kernel: str | None) -> Backend:
    """The backend that :func:`open`'s arguments and the environment mean."""
    if backend is None and machine is None:
        backend = os.environ.get("IOMMUFD_BACKEND") or None
        machine = os.environ.get("IOMMUFD_MACHINE") or None
        if backend == "kernel":
            machine = None  # the same environment can then serve both
    if machine is not None or kernel is not None:
        if backend not in (None, "software"):
            raise ValueError(f"a machine is software; it cannot be had with backend={backend!r}")
        backend = "software"
    if backend is None or backend == "kernel":
        from iommufd.client.backends.kernel import KernelBackend

        return KernelBackend()
    if backend == "software":
        from iommufd.client.backends.software import software

        return software(machine, kernel)
    if isinstance(backend, str):
        raise ValueError(f'a backend is "kernel" or "software", not {backend!r}')
    check_calls(backend)
    return backend


def _open(backend: Backend, path: str) -> int:
    try:
        return backend.open(path, os.O_RDWR)
    except IommufdError:
        raise
    except OSError as error:
        why = error.strerror or "no reason given"
        if path == PATH and error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            why = ABSENT
        elif path == PATH and error.errno in (errno.EACCES, errno.EPERM):
            why = DENIED
        else:
            why = f"{path} cannot be opened: {why}"
        raise IommufdError(error.errno or 0, why, f"open {path}") from None


class Context(Handle):
    """One open of ``/dev/iommu``: makes IO address spaces and fault queues, takes devices in. See :func:`open`.

    Use it in a ``with`` statement; what was made through it ends with it.
    """

    def __init__(self, backend: Backend, fd: int) -> None:
        self._objects: dict[Object, bool] = {}
        super().__init__(backend, fd, "the iommufd context")

    # ---------------------------------------------------------------------------------------------------------- life

    def close(self) -> None:
        """Ends the context and all its objects. Nothing happens when it is closed."""
        if self._fd < 0:
            return
        error: Exception | None = None
        for obj in sorted(self._objects, key=_age):
            try:
                obj._release()
            except Exception as failed:  # the others and the descriptor must go all the same
                error = error or failed
        self.close_fd()
        for obj in list(self._objects):
            obj._forget()
        self._objects.clear()
        if error is not None:
            raise error

    def __enter__(self) -> Self:
        if self._fd < 0:
            raise self.failure(None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            with contextlib.suppress(Exception):  # nobody hears what __del__ raises; a strict filter makes it raise
                warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)
            with contextlib.suppress(Exception):  # likewise; at the end of the interpreter anything may be gone
                self.close()

    # ----------------------------------------------------------------------------------------------------- raw calls

    def do(self, struct: S) -> S:
        """One call with any struct of :mod:`iommufd.uapi`, ``size`` filled in; the struct as it came back.

        For what this client has no method for. ``context.do(iommu_ioas_alloc()).out_ioas_id``"""
        cmd = filled(struct)
        data = bytearray(pack(struct))
        self.ioctl(cmd, data)
        return type(struct).unpack(data)

    # ------------------------------------------------------------------------------------------------------- objects

    def alloc_ioas(self) -> IOAS:
        """A new, empty IO address space (IOMMU_IOAS_ALLOC)."""
        from iommufd.client.ioas import IOAS

        return IOAS(self, self.do(u.iommu_ioas_alloc()).out_ioas_id)

    def alloc_fault_queue(self) -> FaultQueue:
        """A new queue for IO page faults (IOMMU_FAULT_QUEUE_ALLOC); give it to ``alloc_hwpt`` or ``alloc_nested``."""
        from iommufd.client.fault_queue import FaultQueue

        made = self.do(u.iommu_fault_alloc())
        return FaultQueue(self, made.out_fault_id, made.out_fault_fd)

    def open_device(self, where: str | os.PathLike[str], *, token: bytes | UUID | None = None) -> VFIODevice:
        """Opens a VFIO device and binds it to this context: its address (``"0000:01:00.0"``) or its device file.

        See :func:`iommufd.client.vfio.open`."""
        from iommufd.client.vfio import open as open_vfio

        return open_vfio(where, self, token=token)

    def adopt(self, kind: type[K], number_: int) -> K:
        """Takes over an object that exists already under ``number_`` (made by another process, or with :meth:`do`).

        ``context.adopt(IOAS, 1)``; for a device: ``context.adopt(Device, 3)``. Closing it here destroys it. The
        kernel is not asked; a wrong number shows at the first call."""
        from iommufd.client.objects import Object

        if not isinstance(kind, type) or not issubclass(kind, Object) or not kind._adoptable:
            name = kind.__name__ if isinstance(kind, type) else type(kind).__name__
            raise TypeError(f"{name} is no kind of object that a number is enough for")
        found = number(number_, "an object's number", 2**31 - 1)
        if self.closed:
            raise self.failure(None)
        return kind(self, found)

    @property
    def objects(self) -> list[Object]:
        """The live objects made through this client, oldest first."""
        return sorted(self._objects, key=_age, reverse=True)

    @property
    def devices(self) -> list[Device]:
        """The live devices among them."""
        from iommufd.client.device import Device

        return [obj for obj in self.objects if isinstance(obj, Device)]

    # ------------------------------------------------------------------------------------------------------- options

    @property
    def rlimit_mode(self) -> int:
        """How pinned memory is charged: 0 to the user, 1 to the process (IOMMU_OPTION_RLIMIT_MODE).

        Setting needs CAP_SYS_RESOURCE (EPERM) and a context without objects (EBUSY)."""
        return self.do(u.iommu_option(option_id=u.IOMMU_OPTION_RLIMIT_MODE, op=u.IOMMU_OPTION_OP_GET)).val64

    @rlimit_mode.setter
    def rlimit_mode(self, mode: int) -> None:
        self.do(u.iommu_option(option_id=u.IOMMU_OPTION_RLIMIT_MODE, op=u.IOMMU_OPTION_OP_SET, val64=mode))

    @property
    def vfio_ioas(self) -> int | None:
        """The number of the IOAS that VFIO's old interface uses on this descriptor (IOMMU_VFIO_IOAS), or None.

        Set it to an :class:`IOAS`, or to None to clear it."""
        try:
            return self.do(u.iommu_vfio_ioas(op=u.IOMMU_VFIO_IOAS_GET)).ioas_id
        except IommufdError as error:
            if error.errno == errno.ENODEV:
                return None
            raise

    @vfio_ioas.setter
    def vfio_ioas(self, ioas: IOAS | None) -> None:
        if ioas is None:
            self.do(u.iommu_vfio_ioas(op=u.IOMMU_VFIO_IOAS_CLEAR))
        else:
            from iommufd.client.ioas import IOAS

            self.do(u.iommu_vfio_ioas(op=u.IOMMU_VFIO_IOAS_SET, ioas_id=instance(ioas, IOAS, "vfio_ioas").id))

    def change_process(self) -> None:
        """Charges this process for all pinned file memory (IOMMU_IOAS_CHANGE_PROCESS); for a process that took over.

        EINVAL when anything but files is mapped."""
        self.do(u.iommu_ioas_change_process())

    def __repr__(self) -> str:
        if self.closed:
            return "<Context, closed>"
        return f"<Context fd {self._fd}, {self.backend!r}: {plural(len(self._objects), 'object')}>"
