"""Migration: a device's state, taken out of one host and put into another (kernel: struct vfio_migration_ops).

Invariants: the device is in one of the states of ``enum vfio_device_mig_state`` and the kernel finds the way to the one
that is asked for; entering a state that saves or resumes starts a session, whose bytes flow through a descriptor of its
own and mean nothing to anybody but the driver. What writes by DMA meanwhile is another feature's affair
(:mod:`.dma_log`) or the IOMMU's (:meth:`HWPT.dirty_pages`).
"""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from iommufd.client.buffers import piece
from iommufd.client.calls import fields
from iommufd.client.handle import POLLIN, Handle
from iommufd.client.numbers import U32, number
from iommufd.client.vfio import feature
from iommufd.client.vfio.chain import ask
from iommufd.uapi import vfio as v
from iommufd.uapi.vfio import vfio_device_mig_state, vfio_migration_flags

if TYPE_CHECKING:
    from types import TracebackType


@dataclass(frozen=True, slots=True)
class PrecopyInfo:
    """VFIO_MIG_GET_PRECOPY_INFO, in bytes: what is left of the first round, and what has changed since it was read.

    ``reinit``: there is a new first round; only told after :meth:`Migration.enable_reinit`."""

    initial_bytes: int
    dirty_bytes: int
    reinit: bool


class _StreamHandle(Handle):
    """The descriptor of a session."""

    def _show(self, cmd: int, arg: bytearray | int) -> str:
        if cmd != v.VFIO_MIG_GET_PRECOPY_INFO or not isinstance(arg, bytearray):
            return super()._show(cmd, arg)
        return f"VFIO_MIG_GET_PRECOPY_INFO({fields(v.vfio_precopy_info.unpack(arg))})"


class MigrationStream:
    """The bytes of one session: to be read while the device saves, to be written while it resumes. Close it.

    The order of the bytes matters, how they are cut into reads and writes does not."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    def fileno(self) -> int:
        """The descriptor, for select and friends. IommufdError EBADF when closed."""
        return self._handle.fileno()

    def read(self, count: int = 1 << 20) -> bytes:
        """Up to ``count`` bytes; none at the end.

        ENOMSG in the PRE_COPY states when nothing is left for now: :meth:`wait` tells when there is more, though that
        may never be, and STOP_COPY brings the end."""
        return self._handle.read(number(count, "count", 2**31 - 1))

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Gives bytes to a device that resumes; how many it took."""
        return self._handle.write(piece(data))

    def wait(self, timeout: float | None = None) -> bool:
        """Waits up to ``timeout`` seconds (None: forever) until something can be read; whether it can."""
        return bool(self._handle.poll(POLLIN, timeout))

    def precopy_info(self) -> PrecopyInfo:
        """How much is left to read, an estimate. EINVAL outside the PRE_COPY states."""
        answer = ask(self._handle, v.VFIO_MIG_GET_PRECOPY_INFO, v.vfio_precopy_info())
        return PrecopyInfo(answer.initial_bytes, answer.dirty_bytes, bool(answer.flags & v.VFIO_PRECOPY_INFO_REINIT))

    @property
    def closed(self) -> bool:
        """Whether it is."""
        return self._handle.closed

    def close(self) -> None:
        """Closes the descriptor. The session itself ends when the device leaves the state that began it."""
        self._handle.close_fd()

    def __enter__(self) -> Self:
        self._handle.fileno()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._handle.closed:
            with contextlib.suppress(Exception):  # as in Context: nobody hears what __del__ raises
                warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)
            with contextlib.suppress(Exception):  # likewise
                self.close()

    def __repr__(self) -> str:
        return f"<MigrationStream{', closed' if self.closed else f' fd {self._handle._fd}'}>"


class Migration:
    """A device's migration: ``device.migration``. Everything here is ENOTTY for a device that cannot migrate."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    def flags(self) -> vfio_migration_flags:
        """What it can do (feature MIGRATION): STOP_COPY always; with P2P also the states RUNNING_P2P, with PRE_COPY
        also PRE_COPY, with both also PRE_COPY_P2P."""
        answer = feature.get(self._handle, v.VFIO_DEVICE_FEATURE_MIGRATION, v.vfio_device_feature_migration())
        return vfio_migration_flags(answer.flags)

    @property
    def state(self) -> vfio_device_mig_state:
        """The state it is in (feature MIG_DEVICE_STATE)."""
        answer = feature.get(
            self._handle, v.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, v.vfio_device_feature_mig_state(data_fd=-1)
        )
        return vfio_device_mig_state(answer.device_state)

    def set_state(self, state: int) -> MigrationStream | None:
        """Moves the device to ``state``, a ``vfio_device_mig_state``, and waits until it is there.

        The stream of the session that begins with it, if one does: entering PRE_COPY or STOP_COPY (not from each
        other) and RESUMING. After an error the device may be anywhere on the way: look at :attr:`state`; from ERROR
        only ``device.reset()`` leads back to RUNNING. EINVAL for a state it does not have and a way there is not."""
        wanted = number(state, "state", U32)
        answer = feature.put(
            self._handle,
            v.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE,
            v.vfio_device_feature_mig_state(device_state=wanted, data_fd=-1),
        )
        if answer is None or answer.data_fd < 0:
            return None
        return MigrationStream(_StreamHandle(self._handle.backend, answer.data_fd, "the migration stream"))

    def data_size(self) -> int:
        """About how many bytes STOP_COPY would bring (feature MIG_DATA_SIZE); can be asked in any state."""
        answer = feature.get(self._handle, v.VFIO_DEVICE_FEATURE_MIG_DATA_SIZE, v.vfio_device_feature_mig_data_size())
        return answer.stop_copy_length

    def enable_reinit(self) -> None:
        """Lets :attr:`PrecopyInfo.reinit` mean something (feature MIG_PRECOPY_INFOv2)."""
        feature.put(self._handle, v.VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2)

    def __repr__(self) -> str:
        return f"<Migration of {self._handle.name}>"
