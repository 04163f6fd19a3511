"""Whatever is passed in: a clear exception or a call that worked, never a crash, nothing half-done."""

from __future__ import annotations

import array
import mmap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import iommufd
from iommufd.testing.mock import APERTURE, MockAccess, MockDevice, invalidate_iotlb, mark_dirty, nested_data, reserve

from .conftest import BACKENDS

CLEAR = (TypeError, ValueError, iommufd.IommufdError)

numbers = st.one_of(
    st.sampled_from(
        [-(2**70), -(2**63), -1, 0, 1, 7, 4095, 4096, APERTURE, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1, 2**64]
    ),
    st.integers(-(2**66), 2**66),
)
things = st.one_of(
    numbers,
    st.none(),
    st.booleans(),
    st.floats(),
    st.text(max_size=4),
    st.binary(max_size=4),
    st.builds(list),
    st.builds(dict),
    st.builds(object),
    st.sampled_from(
        [np.int64(-5), np.uint64(2**64 - 1), np.zeros(0), np.arange(8)[::2], np.array("x"), np.array([None])]
    ),
    st.builds(lambda n: bytearray(n), st.integers(0, 3)),
    st.builds(lambda: memoryview(b"")),
)


class Rig:
    """One of everything that takes arguments."""

    def __init__(self, system: str) -> None:
        self.context = iommufd.open("mock@7.3.4" if system == "software" else None)
        self.ioas = self.context.alloc_ioas()
        self.device = MockDevice(self.context, self.ioas)
        self.queue = self.context.alloc_fault_queue()
        self.parent = self.ioas.alloc_hwpt(self.device, nest_parent=True)
        self.tracked = self.ioas.alloc_hwpt(self.device, dirty_tracking=True)
        self.nested = self.parent.alloc_nested(self.device, nested_data())
        self.other = self.context.alloc_ioas()
        self.access = MockAccess(self.other)
        self.viommu = self.parent.alloc_viommu(self.device, 0xDEADBEEF)

    def calls(self) -> dict[str, Callable[..., Any]]:
        return {
            "map": self.other.map,
            "map_file": self.other.map_file,
            "map_many": lambda a, b: self.other.map_many(a, b),
            "unmap": self.other.unmap,
            "copy_to": self.other.copy_to,
            "allow": self.other.allow,
            "physical": self.other.physical,
            "reserve": lambda a, b: reserve(self.other, a, b) if not isinstance(a, int) or a < 0 else None,
            "dirty_pages": lambda a, b, c: self.tracked.dirty_pages(a, b, page_size=c, clear=False),
            "mark_dirty": lambda a, b: mark_dirty(self.tracked, a, b),
            "alloc_hwpt": lambda a, b: self.ioas.alloc_hwpt(a, data=b),
            "alloc_nested": lambda a, b: self.parent.alloc_nested(a, b),
            "alloc_viommu": lambda a, b: self.parent.alloc_viommu(self.device, a, b),
            "alloc_vdevice": lambda a, b: self.viommu.alloc_vdevice(a, b),
            "alloc_veventq": lambda a, b: self.viommu.alloc_veventq(a, 0, event_size=b),
            "alloc_hw_queue": self.viommu.alloc_hw_queue,
            "mmap": self.viommu.mmap,
            "invalidate": self.nested.invalidate,
            "attach": self.device.attach,
            "replace": self.device.replace,
            "hw_info": self.device.hw_info,
            "respond": self.queue.respond,
            "access read": self.access.read,
            "access write": self.access.write,
            "trigger_fault": self.device.trigger_fault,
            "adopt": lambda a: self.context.adopt(iommufd.IOAS, a),
            "ioctl": lambda a: self.context.ioctl(0x3B00 | 0x85, a),
        }


@pytest.fixture(scope="module", params=BACKENDS)
def rig(request: pytest.FixtureRequest) -> Any:
    made = Rig(request.param)
    yield made
    made.access.close()
    made.context.close()


ARITY = {
    "map": 4,
    "map_file": 4,
    "map_many": 2,
    "unmap": 2,
    "copy_to": 3,
    "allow": 1,
    "physical": 2,
    "reserve": 2,
    "dirty_pages": 3,
    "mark_dirty": 2,
    "alloc_hwpt": 2,
    "alloc_nested": 2,
    "alloc_viommu": 2,
    "alloc_vdevice": 2,
    "alloc_veventq": 2,
    "alloc_hw_queue": 4,
    "mmap": 2,
    "invalidate": 1,
    "attach": 2,
    "replace": 2,
    "hw_info": 1,
    "respond": 2,
    "access read": 2,
    "access write": 2,
    "trigger_fault": 1,
    "adopt": 1,
    "ioctl": 1,
}


@pytest.mark.parametrize("name", ARITY)
def test_any_argument(rig: Rig, name: str) -> None:
    """Arguments of any kind and size."""
    call = rig.calls()[name]

    @settings(max_examples=60)
    @given(st.lists(things, min_size=ARITY[name], max_size=ARITY[name]))
    def play(arguments: list[Any]) -> None:
        before, mapped = rig.context.objects, rig.other.mappings
        try:
            made = call(*arguments)
        except CLEAR as failed:
            error: BaseException = failed
        except MemoryError as failed:  # a bitmap of exabytes
            error = failed
            assert name in ("dirty_pages", "mark_dirty", "access read")
        else:
            for mapping in made if isinstance(made, list) else [made]:
                if isinstance(mapping, iommufd.Mapping):
                    mapping.unmap()
            if name == "adopt":
                rig.context._objects.pop(made)
            if name == "allow":
                rig.other.allow([])
            return
        assert str(error)
        assert rig.context.objects == before
        assert rig.other.mappings == mapped

    play()


def test_alloc_with_other_objects(rig: Rig) -> None:
    """Objects of the wrong kind."""
    before = rig.context.objects
    for call, arguments in (
        (rig.ioas.alloc_hwpt, (rig.queue,)),
        (rig.parent.alloc_nested, (rig.ioas, nested_data())),
        (rig.parent.alloc_nested, (rig.device, bytes(8))),
        (rig.parent.alloc_viommu, (rig.parent, 0xDEADBEEF)),
        (rig.viommu.alloc_vdevice, (rig.viommu, 1)),
        (rig.device.replace, (rig.device,)),
        (rig.device.replace, (rig.viommu,)),
        (rig.nested.invalidate, ([invalidate_iotlb(0), 7],)),
        (rig.queue.respond, ("cookie",)),
    ):
        with pytest.raises((TypeError, AttributeError)):
            call(*arguments)
    assert rig.context.objects == before


@pytest.mark.parametrize(
    ("source", "error", "match"),
    [
        ("text", TypeError, "str is neither a buffer"),
        (None, TypeError, "NoneType is neither a buffer"),
        (1.5, TypeError, "float is neither a buffer"),
        (b"", ValueError, "this bytes is empty"),
        (np.arange(8)[::2], ValueError, "this ndarray is not one piece of memory"),
        (np.zeros(3, "datetime64[s]"), ValueError, "this ndarray gives no buffer"),
        (array.array("I"), ValueError, "this array is empty"),
        (4096, TypeError, "an address needs a length"),
        (np.int32(4096), TypeError, "an address needs a length"),
        (True, TypeError, "an address needs a length"),
    ],
)
def test_what_cannot_be_mapped(rig: Rig, source: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        rig.other.map(source)
    assert rig.other.mappings == []


def test_a_closed_mmap_cannot_be_mapped(rig: Rig) -> None:
    memory = mmap.mmap(-1, 4096)
    memory.close()
    with pytest.raises(ValueError, match="this mmap gives no buffer"):
        rig.other.map(memory)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"iova": -1}, ValueError, "iova -1 is not between 0 and 0xffffffffffffffff"),
        ({"iova": 2**64}, ValueError, "iova 0x10000000000000000 is not between"),
        ({"iova": 1.0}, TypeError, "iova is a whole number, not float"),
        ({"iova": "0x1000"}, TypeError, "iova is a whole number, not str"),
        ({"length": 0}, ValueError, "0 bytes from offset 0: this bytearray has 64"),
        ({"length": 65}, ValueError, "65 bytes from offset 0: this bytearray has 64"),
        ({"length": -1}, ValueError, "length -1"),
        ({"offset": 64}, ValueError, "0 bytes from offset 64"),
        ({"offset": -1}, ValueError, "offset -1"),
        ({"offset": 60, "length": 5}, ValueError, "5 bytes from offset 60: this bytearray has 64"),
        ({"readable": False, "writeable": False}, iommufd.IommufdError, "neither|EINVAL"),
    ],
)
def test_what_map_refuses(rig: Rig, arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    buffer = bytearray(64)
    with pytest.raises(error, match=match):
        rig.other.map(buffer, **arguments)
    assert rig.other.mappings == []
    buffer.append(1)  # nothing holds it


@pytest.mark.parametrize(
    ("file", "error", "match"),
    [
        (-1, ValueError, "a descriptor -1"),
        (2**31, ValueError, "a descriptor 0x80000000"),
        (999_999, iommufd.IommufdError, "descriptor 999999"),
        ("name", TypeError, "str is neither a file nor a descriptor"),
        (1.5, TypeError, "float is neither a file nor a descriptor"),
    ],
)
def test_what_map_file_refuses(rig: Rig, file: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        rig.other.map_file(file)
    assert rig.other.mappings == []
