"""Instruments hear of every call a Python program makes on its machine, as of those of a supervised program."""

from __future__ import annotations

import errno
import io
import json

import pytest

from iommufd.client.backends.software.backend import SoftwareBackend
from iommufd.client.errors import IommufdError
from iommufd.machine.presets import preset
from iommufd.observe.explain import Explain
from iommufd.observe.format import show_call
from iommufd.observe.trace import TraceWriter, from_json, header
from iommufd.uapi import iommufd as u
from iommufd.uapi.vfio import VFIO_GET_API_VERSION


class Kept(io.StringIO):
    """A stream whose text outlives it."""

    text = ""

    def close(self) -> None:
        self.text = self.getvalue()
        super().close()


def test_every_call_is_told() -> None:
    machine = preset("default", None)
    stream, said = Kept(), io.StringIO()
    writer = TraceWriter(stream, header(machine.name, machine.world.kernel))
    machine.world.instruments += [writer, Explain(said)]
    backend = SoftwareBackend(machine)
    fd = backend.open("/dev/iommu", 2)
    backend.ioctl(fd, u.IOMMU_IOAS_ALLOC, bytearray(u.iommu_ioas_alloc(size=12).pack()))
    with pytest.raises(IommufdError):
        backend.read(fd, 8)
    with pytest.raises(IommufdError):
        backend.write(fd, b"abc")
    with pytest.raises(IommufdError):
        backend.mmap(fd, 4096, 1, 1, 0)
    with pytest.raises(IommufdError) as refused:
        backend.open("/dev/nothing", 2)
    assert refused.value.errno == errno.ENOENT
    backend.close(fd)
    container = backend.open("/dev/vfio/vfio", 2)
    assert backend.ioctl(container, VFIO_GET_API_VERSION, 0) == 0
    backend.close(container)
    writer.close()
    calls = [show_call(from_json(json.loads(line))) for line in stream.text.splitlines()[1:]]
    assert [call.partition("  # ")[0] for call in calls] == [
        f'open("/dev/iommu", O_RDWR) = {fd}',
        f"ioctl({fd}, IOMMU_IOAS_ALLOC, {{size=12, flags=0}} => {{out_ioas_id=1}}) = 0",
        f"read({fd}, 0xffff800000000000, 8) = -1 EINVAL (Invalid argument)",
        f"write({fd}, <3 bytes: 616263>, 3) = -1 EINVAL (Invalid argument)",
        f"mmap(NULL, 4096, PROT_READ, MAP_SHARED, {fd}, 0x0) = -1 ENXIO (No such device or address)",
        'open("/dev/nothing", O_RDWR) = -1 ENOENT (No such file or directory)',
        f"close({fd}) = 0",
        f'open("/dev/vfio/vfio", O_RDWR) = {container}',
        f"ioctl({container}, VFIO_GET_API_VERSION) = 0",
        f"close({container}) = 0",
    ]
    assert len(said.getvalue().splitlines()) == 4
