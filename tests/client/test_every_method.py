"""Every public method of every class: with anything as arguments, when closed, in a forked child, from many threads.

What must come of it is always one of: it worked; a TypeError or ValueError that says which argument; an IommufdError
that says why. After one that failed the machine owes what it owed before (the ledger), and the client shows what it
showed. test_bad_input.py looks for particular mistakes; this one leaves out no method that anybody adds.
"""

from __future__ import annotations

import array
import inspect
import mmap
import os
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import iommufd
from iommufd.engine.ledger import difference, take
from iommufd.testing import mock
from iommufd.uapi import iommufd as u
from iommufd.uapi import vfio as v

from .test_life import child_says

CLEAR = (TypeError, ValueError, iommufd.IommufdError)
QUEUES = (iommufd.FaultQueue, iommufd.VEventQueue)  # to iterate one is to wait for it
MOCK = 0xDEADBEEF  # the type of everything that mock hardware has
TRIES = 6


class Rig:
    """One of everything."""

    def __init__(self) -> None:
        self.machine = machine = iommufd.Machine("rig")
        machine.add_mock()
        machine.add_device("0000:01:00.0", bars=[0x10000, 0x1000], msix=4, group="both", pasids=16)
        machine.add_device("0000:01:00.1", group="both")
        self.context = context = iommufd.open(machine=machine)
        ioas, other = context.alloc_ioas(), context.alloc_ioas()
        device = mock.MockDevice(context, ioas, pasid=True)
        queue = context.alloc_fault_queue()
        tracked = ioas.alloc_hwpt(device, dirty_tracking=True)
        tracked.set_dirty_tracking(True)
        parent = ioas.alloc_hwpt(device, nest_parent=True)
        viommu = mock.alloc_viommu(parent, device)
        function = context.open_device("0000:01:00.0")
        function.attach(other)
        mapping = ioas.map(mmap.mmap(-1, 65536), mock.APERTURE)
        self.things: dict[str, Any] = {
            "context": context,
            "ioas": ioas,
            "other": other,
            "mapping": mapping,
            "device": device,
            "adopted": context.adopt(iommufd.Device, device.number),
            "queue": queue,
            "parent": parent,
            "tracked": tracked,
            "faulting": ioas.alloc_hwpt(device, fault_queue=queue),
            "nested": parent.alloc_nested(device, mock.nested_data()),
            "viommu": viommu,
            "vdevice": viommu.alloc_vdevice(device, 5),
            "hw_queue": viommu.alloc_hw_queue(MOCK, 0, mapping.iova, 4096),
            "events": mock.alloc_veventq(viommu),
            "access": mock.MockAccess(other, pins=True),
            "function": function,
            "bar": function.bar(0),
            "config": function.config,
            "irq": function.irq(v.VFIO_PCI_MSIX_IRQ_INDEX),
            "migration": function.migration,
            "dma_log": function.dma_log,
            "eventfd": iommufd.EventFd(),
        }

    def close(self) -> None:
        self.things["eventfd"].close()
        self.things["access"].close()
        self.context.close()
        self.machine.close()

    def shown(self) -> dict[str, str]:
        """What the client says of everything."""
        return {name: repr(thing) for name, thing in self.things.items()}

    def arguments(self, thing: str, name: str) -> tuple[Any, ...]:
        """Arguments with which a method of a live thing gets as far as the machine."""
        memory = bytearray(4096)
        chosen: dict[str, tuple[Any, ...]] = {
            "context.adopt": (iommufd.IOAS, 1),
            "context.do": (u.iommu_ioas_alloc(),),
            "context.ioctl": (u.IOMMU_IOAS_ALLOC, bytearray(u.iommu_ioas_alloc(size=12).pack())),
            "context.ioctl_many": (u.IOMMU_IOAS_ALLOC, bytearray(u.iommu_ioas_alloc(size=12).pack()), 12, [0]),
            "context.mmap": (4096, 0),
            "context.open_device": ("0000:01:00.1",),
            "context.write": (b"x",),
            "context.read": (8,),
            "mapping.unmap": (),
            "queue.read": (),
            "events.read": (),
            "access.move": (self.things["ioas"],),
            "access.pin": (0x1000, 1),
            "access.read": (0x1000, 1),
            "access.write": (0x1000, b"x"),
            "dma_log.read": (0, 4096),
            "dma_log.start": ([(0, 4096)],),
            "alloc_hw_queue": (MOCK, 1, mock.APERTURE + 4096, 4096),
            "alloc_hwpt": (self.things["device"],),
            "alloc_nested": (self.things["device"], mock.nested_data()),
            "alloc_vdevice": (self.things["device"], 6),
            "alloc_veventq": (u.IOMMU_VEVENTQ_TYPE_ARM_SMMUV3, 4),
            "alloc_viommu": (self.things["device"], MOCK),
            "allow": ([(0x2000000, 0x2FFFFFF)],),
            "attach": (self.things["ioas"],),
            "attached_to": (None,),
            "bar": (0,),
            "cache_is": (0, 0),
            "copy_to": (self.things["other"], mock.APERTURE, 4096),
            "dirty_pages": (mock.APERTURE, 4096),
            "dirty_ranges": (mock.APERTURE, 4096),
            "export_dmabuf": (0,),
            "feature": (v.VFIO_DEVICE_FEATURE_GET,),
            "get_feature": (1, v.vfio_device_feature_migration()),
            "has_feature": (1,),
            "invalidate": ([mock.invalidate_iotlb(0)],),
            "irq": (0,),
            "map": (memory,),
            "map_file": (0, 0, 4096),
            "map_many": ([memory],),
            "mask_on": ([None],),
            "physical": (mock.APERTURE,),
            "poll": (1,),
            "read": (0, 4),
            "read_int": (0,),
            "region": (0,),
            "replace": (self.things["ioas"],),
            "respond": (0,),
            "set_bus_master": (True,),
            "set_dirty_tracking": (True,),
            "set_eventfds": ([None],),
            "set_feature": (v.VFIO_DEVICE_FEATURE_LOW_POWER_EXIT,),
            "set_state": (1,),
            "set_vf_token": (bytes(16),),
            "stop_write_on": (0, 1),
            "trigger_fault": (0x1000,),
            "unmap": (mock.APERTURE, 65536),
            "unmask_on": ([None],),
            "unpin": (1,),
            "wait": (0,),
            "write": (0, b"x"),
            "write_int": (4, 0),
            "write_on": (0, 0, 1),
        }
        return chosen.get(f"{thing}.{name}", chosen.get(name, ()))


THINGS = (
    *("context", "ioas", "other", "mapping", "device", "adopted", "queue", "parent", "tracked", "faulting", "nested"),
    *("viommu", "vdevice", "hw_queue", "events", "access", "function", "bar", "config", "irq", "migration", "dma_log"),
    "eventfd",
)
NO_CALL = {"failure", "kind", "backend", "context"}  # what makes errors; plain attributes


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.close()


def test_nothing_is_left_out(rig: Rig) -> None:
    assert tuple(rig.things) == THINGS


def methods(thing: Any) -> list[tuple[str, str]]:
    """``(name, "call" | "get" | "set")`` of everything public that does something."""
    found: list[tuple[str, str]] = []
    for name in dir(thing):
        attribute = inspect.getattr_static(type(thing), name, None)
        if name.startswith("_") or name in NO_CALL or attribute is None:
            continue
        if isinstance(attribute, property):
            found.append((name, "get"))
            if attribute.fset is not None:
                found.append((name, "set"))
        elif callable(attribute):
            found.append((name, "call"))
    return found


# ---------------------------------------------------------------------------------------------------- with anything


class BadFile:
    def fileno(self) -> int:
        return -5


NUMBERS = (-(2**70), -1, 0, 1, 7, 64, 4095, 4096, mock.APERTURE, 2**31 - 1, 2**31, 2**32, 2**63, 2**64 - 1, 2**64)


def anything(dice: random.Random, rig: Rig, parameter: str) -> Any:
    if parameter == "timeout":  # None waits for ever, as it should
        return dice.choice([0, -1, 0.001, "soon", b"", [], object(), float("nan")])
    kind = dice.randrange(4)
    if kind == 0:
        return dice.choice([*NUMBERS, dice.randrange(2**64), np.int64(-5), np.uint64(2**64 - 1), True])
    if kind == 1:
        plain: list[Any] = [
            None,
            1.5,
            float("nan"),
            "",
            "name",
            "\0",
            "0000:01:00.0",
            b"",
            b"abcd",
            [],
            {},
            (),
            object(),
        ]
        odd: list[Any] = [[None], [5], [(0, 4095)], [(1, 2, 3)], [b"x", 5], int, iommufd.IOAS, range(3), BadFile(), ...]
        return dice.choice([*plain, *odd, uuid.uuid4(), lambda: None])
    if kind == 2:
        gone, released = mmap.mmap(-1, 4096), memoryview(bytearray(8))
        gone.close()
        released.release()
        memory: list[Any] = [bytearray(4096), bytearray(1), bytearray(), b"x" * 16, memoryview(b""), gone, released]
        arrays = [np.zeros(0), np.arange(8)[::2], np.array("x"), np.array([None]), np.zeros((64, 64), order="F")]
        return dice.choice([*memory, *arrays, array.array("I", [1, 2]), mmap.mmap(-1, 8192)])
    data: list[Any] = [
        iommufd.VTDStage1(0),
        iommufd.VTDInvalidation(-1),
        iommufd.RawData(1, b"abc"),
        mock.nested_data(),
    ]
    entries: list[Any] = [iommufd.RawEntry(5, b""), [mock.invalidate_iotlb(0), iommufd.RawEntry(0, bytes(8))]]
    objects = [thing for thing in rig.things.values() if not isinstance(thing, QUEUES)]
    return dice.choice([*objects, *data, *entries, [rig.things["ioas"]]])


@pytest.mark.parametrize("thing", THINGS)
def test_any_argument_to_any_method(thing: str) -> None:
    dice = random.Random(thing)
    rig = Rig()
    try:
        for name, way in methods(rig.things[thing]) * TRIES:
            before, shown = take(rig.machine.world, rig.machine.contexts), rig.shown()
            target = rig.things[thing]
            given: dict[str, Any] = {}
            try:
                if way == "get":
                    getattr(target, name)
                elif way == "set":
                    given = {"value": anything(dice, rig, name)}
                    setattr(target, name, given["value"])
                else:
                    call = getattr(target, name)
                    for parameter in inspect.signature(call).parameters.values():
                        if parameter.default is parameter.empty or parameter.name == "timeout" or dice.random() < 0.5:
                            given[parameter.name] = anything(dice, rig, parameter.name)
                    made = call(**given)
                    if inspect.iscoroutine(made):
                        made.close()
            except (*CLEAR, MemoryError) as error:
                said = str(error)
            except BaseException as error:
                raise AssertionError(f"{thing}.{name}({given}): {error!r}") from error
            else:
                said = ""
            if said and name not in ("close", "destroy"):  # which end first what holds a thing
                after = take(rig.machine.world, rig.machine.contexts)
                assert difference(before, after) == [], (name, given, said)
                assert rig.shown() == shown, (name, given, said)
                continue
            if rig.shown() != shown or take(rig.machine.world, rig.machine.contexts) != before:
                rig.close()  # it worked: on with a fresh one
                rig = Rig()
    finally:
        rig.close()


# ------------------------------------------------------------------------------------ closed, forked, from many threads


def attempt(rig: Rig, thing: str, name: str, way: str) -> str:
    """What comes of a call that would be all right on a live thing: ``""`` or the error."""
    try:
        found = getattr(rig.things[thing], name)
        if way == "call":
            made = found(*rig.arguments(thing, name))
            if inspect.iscoroutine(made):
                made.close()
            if isinstance(made, memoryview):
                made.release()
    except (*CLEAR, RuntimeError) as error:
        shown = error.name if isinstance(error, iommufd.IommufdError) else type(error).__name__
        return f"{shown}: {error}"
    return ""


# What needs no open file: ending what has ended, what is known from before.
HARMLESS = {
    *("close", "close_fd", "closed", "devices", "objects", "mappings", "last", "live", "hwpt", "hwpts", "wait_async"),
    *("readable", "writeable", "mappable", "migration", "dma_log"),
}


@pytest.mark.parametrize("thing", [thing for thing in THINGS if thing != "eventfd"])
def test_when_the_context_is_closed(rig: Rig, thing: str) -> None:
    rig.things["access"].close()
    rig.context.close()
    for name, way in methods(rig.things[thing]):
        if way != "set" and name not in HARMLESS and (thing, name) != ("config", "mmap"):
            assert attempt(rig, thing, name, way).startswith("EBADF: "), name
    assert rig.context.objects == []


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_in_a_forked_child(rig: Rig) -> None:
    before = take(rig.machine.world, rig.machine.contexts)

    def work() -> str:
        wrong = []
        for thing in THINGS:
            for name, way in methods(rig.things[thing]):
                if way == "call" and name not in HARMLESS and (thing, name) != ("config", "mmap"):
                    said = attempt(rig, thing, name, way)
                    if not said.startswith("RuntimeError: ") or "belongs to the parent" not in said:
                        wrong.append(f"{thing}.{name}: {said}")
        return "\n".join(wrong)

    assert child_says(work) == ""
    assert difference(before, take(rig.machine.world, rig.machine.contexts)) == []


def test_from_many_threads() -> None:
    """Any call beside any other; then everything can be closed, and nothing is owed."""
    wrong: list[str] = []
    until = time.monotonic() + 1.5
    while time.monotonic() < until:
        rig = Rig()
        every = [(thing, name, way) for thing in THINGS for name, way in methods(rig.things[thing]) if way != "set"]
        every = [call for call in every if call[:2] not in (("context", "close"), ("context", "close_fd"))]

        def work(rig: Rig, seed: int, every: list[tuple[str, str, str]] = every) -> None:
            dice = random.Random(seed)
            for _ in range(150):
                thing, name, way = dice.choice(every)
                if name in ("close", "destroy") and dice.random() < 0.9:
                    continue
                try:
                    attempt(rig, thing, name, way)
                except BaseException as error:  # judged below
                    wrong.append(f"{thing}.{name}: {error!r}")

        threads = [threading.Thread(target=work, args=(rig, seed)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        rig.close()
        assert rig.machine.contexts == []
    assert wrong == []


# ---------------------------------------------------------------------------------------------------- plain data


@pytest.mark.parametrize(
    "make",
    [
        lambda n: iommufd.VTDStage1(n).pack(),
        lambda n: iommufd.VTDStage1(0, n).pack(),
        lambda n: iommufd.SMMUv3Stage(n).pack(),
        lambda n: iommufd.SMMUv3Stage(0, n).pack(),
        lambda n: iommufd.SMMUv3Stage.translate(n),
        lambda n: iommufd.AMDGuest((0, 0, 0, n)).pack(),
        lambda n: iommufd.AMDGuest.translate(n),
        lambda n: iommufd.VTDInvalidation(n).pack(),
        lambda n: iommufd.VTDInvalidation(0, n).pack(),
        lambda n: iommufd.SMMUv3Invalidation(n).pack(),
        lambda n: iommufd.SMMUv3Invalidation.tlbi_nh_asid(n),
        lambda n: iommufd.SMMUv3Invalidation.atc_inv(n),
        lambda n: mock.nested_data(n),
        lambda n: mock.invalidate_iotlb(n),
        lambda n: mock.invalidate_cache(0, n),
        lambda n: iommufd.adopt(n),
    ],
)
def test_numbers_in_plain_data(make: Callable[[Any], object]) -> None:
    for number in (-1, 2**64, -(2**70)):
        with pytest.raises(ValueError, match=rf"{number}|{number:#x}"):
            make(number)
    for wrong in ("1", None, 1.5, [1]):
        with pytest.raises(TypeError, match="is a whole number, not"):
            make(wrong)


def test_what_is_opened() -> None:
    for call in (
        lambda: iommufd.open(machine=5),
        lambda: iommufd.open(machine=b"mock"),
        lambda: iommufd.open(machine="mock", kernel=6.6),  # type: ignore[arg-type]  # wrong on purpose
        lambda: iommufd.open(machine="nowhere"),
        lambda: iommufd.open(backend="hardware"),
        lambda: iommufd.open(backend=5),  # type: ignore[arg-type]  # wrong on purpose
        lambda: iommufd.open(machine="mock", backend="kernel"),
        lambda: iommufd.vfio_open("0000:01:00.0", None),  # type: ignore[arg-type]  # wrong on purpose
    ):
        before = os.listdir("/proc/self/fd")
        with pytest.raises((TypeError, ValueError), match=r"\w+ \w+ \w+"):
            call()
        assert os.listdir("/proc/self/fd") == before
