"""The public names, and what importing them costs."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

import iommufd

PUBLIC = """
    AMDGuest AMDInfo Backend Context Device DeviceInfo DmaLog EventFd FaultGroup FaultQueue HWPT HWQueue HotResetDevice
    HwInfo IOAS InvalidationError IommufdError IovaRange Irq LostEvents Machine Mapping Migration MigrationStream
    NestedHWPT PageRequest PrecopyInfo RawData RawEntry Region SMMUv3Event
    SMMUv3Info SMMUv3Invalidation SMMUv3Stage Tegra241Info VDevice VEvent VEventQueue VFIODevice VIOMMU VTDInfo
    VTDInvalidation VTDStage1 adopt open vfio_open
"""

METHODS = {
    "Context": """adopt alloc_fault_queue alloc_ioas backend change_process close close_fd closed devices do failure
        fileno ioctl ioctl_many mmap name objects open_device poll read rlimit_mode vfio_ioas write""",
    "IOAS": """alloc_hwpt allow close closed context copy_to destroy devices huge_pages id iova_alignment iova_ranges
    kind
        map map_file map_many mappings number physical unmap unmap_all""",
    "Mapping": "ioas iova last length live readable unmap writeable",
    "HWPT": """alloc_nested alloc_viommu automatic close closed context destroy devices dirty_pages dirty_ranges
        fault_queue id ioas kind number set_dirty_tracking""",
    "NestedHWPT": "close closed context destroy devices fault_queue id invalidate kind number parent",
    "Device": "attach close closed context destroy detach hw_info hwpt hwpts id kind number replace",
    "FaultQueue": "close closed context destroy fileno id kind number read respond wait",
    "VEventQueue": "close closed context destroy event_size fileno id kind number read type wait",
    "VIOMMU": """alloc_hw_queue alloc_nested alloc_vdevice alloc_veventq close closed context data destroy id invalidate
        kind mmap number parent type""",
}


def test_the_public_names_are_these() -> None:
    assert sorted(iommufd.__all__) == sorted(PUBLIC.split())
    for name in iommufd.__all__:
        assert getattr(iommufd, name) is not None
        assert name in dir(iommufd)


@pytest.mark.parametrize("name", ["Ioas", "ioas", "client_", "__nothing__"])
def test_any_other_name_is_an_attribute_error(name: str) -> None:
    with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
        getattr(iommufd, name)


@pytest.mark.parametrize("cls", METHODS)
def test_the_names_of_a_class_are_these(cls: str) -> None:
    from iommufd.testing.mock import MockDevice, alloc_veventq, alloc_viommu, nested_data

    with iommufd.open(machine="mock") as context:
        ioas = context.alloc_ioas()
        device = MockDevice(context, ioas)
        parent = ioas.alloc_hwpt(device, nest_parent=True)
        viommu = alloc_viommu(parent, device)
        objects: dict[str, object] = {
            "Context": context,
            "IOAS": ioas,
            "Mapping": context.alloc_ioas().map(bytearray(8)),
            "HWPT": parent,
            "NestedHWPT": parent.alloc_nested(device, nested_data()),
            "Device": context.adopt(iommufd.Device, device.number),
            "FaultQueue": context.alloc_fault_queue(),
            "VEventQueue": alloc_veventq(viommu),
            "VIOMMU": viommu,
        }
        shown = {name for name in dir(objects[cls]) if not name.startswith("_")}
    assert shown == set(METHODS[cls].split())


def fresh(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_is_light() -> None:
    """80 ms at most; in fact it loads one module."""
    before = set(fresh("import sys, importlib, typing; print(*sys.modules)").split())
    loaded = set(fresh("import sys, importlib, typing, iommufd; print(*sys.modules)").split()) - before
    assert loaded == {"iommufd"}
    times = [
        float(fresh("import time; t = time.perf_counter(); import iommufd; print(time.perf_counter() - t)"))
        for _ in range(3)
    ]
    assert min(times) <= 0.08


def test_the_kernel_backend_needs_nothing_of_the_engine() -> None:
    code = """
import sys, iommufd
try:
    iommufd.open(backend="kernel")
except OSError:
    pass
iommufd.IOAS, iommufd.FaultQueue, iommufd.VFIODevice
print(*sys.modules)
"""
    loaded = fresh(code).split()
    rooms = ("engine", "machine", "memory", "iommu", "selftest", "interpose", "client.backends.software")
    assert not [name for name in loaded for room in rooms if name.startswith(f"iommufd.{room}")]
    assert "numpy" not in loaded


def test_opening_is_quick() -> None:
    """A context of a machine that runs already: well below a millisecond."""
    with iommufd.open(machine="mock"):
        best = 1.0
        for _ in range(20):
            start = time.perf_counter()
            iommufd.open(machine="mock").close()
            best = min(best, time.perf_counter() - start)
    assert best < 0.005
