"""Fault queues and vEVENTQs: reading, waiting, for and async for, answers, and the end of a queue."""

from __future__ import annotations

import asyncio
import errno
import select
import threading
import time

import pytest

import iommufd
from iommufd.testing.mock import APERTURE, READ, WRITE, MockDevice, alloc_veventq, alloc_viommu, nested_data


@pytest.fixture
def queue(context: iommufd.Context) -> iommufd.FaultQueue:
    return context.alloc_fault_queue()


@pytest.fixture
def device(context: iommufd.Context, ioas: iommufd.IOAS, queue: iommufd.FaultQueue) -> MockDevice:
    """Its page faults go to ``queue``."""
    device = MockDevice(context, ioas, pasid=True)
    device.replace(ioas.alloc_hwpt(device, fault_queue=queue, pasid=True))
    return device


def test_faults_are_read_and_answered(queue: iommufd.FaultQueue, device: MockDevice) -> None:
    assert queue.read() == []
    assert not queue.wait(0)
    device.trigger_fault(0x1001, perm=READ | WRITE, group=4)
    device.trigger_fault(0x2000, group=5)
    assert queue.wait(0)
    first, second = queue.read()
    (request,) = first.requests
    assert request == iommufd.PageRequest(device.number, None, 4, READ | WRITE, 0x1001, True, first.cookie)
    assert (first.address, first.perm, first.pasid, first.device_id) == (0x1001, READ | WRITE, None, device.number)
    assert first.device is device and len(first) == 1 and list(first) == [request]
    assert first.cookie != second.cookie
    first.respond()
    with pytest.raises(iommufd.IommufdError) as at:
        first.respond()
    assert at.value.errno == errno.EINVAL
    second.respond(second.INVALID)
    assert queue.read() == []


def test_several_answers_at_once(queue: iommufd.FaultQueue, device: MockDevice) -> None:
    for i in range(300):  # more than one read delivers
        device.trigger_fault(i * 4096, group=i)
    groups = queue.read()
    assert [g.address for g in groups] == [i * 4096 for i in range(300)]
    queue.respond(groups[:200])
    queue.respond([g.cookie for g in groups[200:299]])
    with pytest.raises(iommufd.IommufdError) as at:
        queue.respond([groups[299], groups[0]])
    assert at.value.errno == errno.EINVAL
    with pytest.raises(iommufd.IommufdError):
        queue.respond(groups[299])  # was answered before the bad one


def test_a_pasid(ioas: iommufd.IOAS, queue: iommufd.FaultQueue, device: MockDevice) -> None:
    device.attach(ioas.alloc_hwpt(device, fault_queue=queue, pasid=True), pasid=3)
    device.trigger_fault(0x1000, pasid=3)
    assert next(queue).pasid == 3


def test_detaching_voids_what_waits(queue: iommufd.FaultQueue, device: MockDevice) -> None:
    device.trigger_fault(0x1000)
    (group,) = queue.read()
    device.detach()
    with pytest.raises(iommufd.IommufdError) as at:
        group.respond()
    assert at.value.errno == errno.EINVAL


def test_it_can_be_selected(queue: iommufd.FaultQueue, device: MockDevice) -> None:
    assert select.select([queue], [], [], 0)[0] == []
    device.trigger_fault(0x1000)
    assert select.select([queue], [], [], 1)[0] == [queue]


def test_read_waits(queue: iommufd.FaultQueue, device: MockDevice) -> None:
    start = time.monotonic()
    assert queue.read(timeout=0.05) == []
    assert time.monotonic() - start >= 0.04
    threading.Timer(0.05, device.trigger_fault, [0x1000]).start()
    assert [g.address for g in queue.read(timeout=10)] == [0x1000]


def test_for_ends_when_the_queue_is_closed(queue: iommufd.FaultQueue, device: MockDevice) -> None:
    seen = []

    def serve() -> None:
        for group in queue:
            seen.append(group.address)
            group.respond()

    thread = threading.Thread(target=serve)
    thread.start()
    for i in range(5):
        device.trigger_fault(i)
    while len(seen) < 5:
        time.sleep(0.001)
    queue.close()
    thread.join(10)
    assert not thread.is_alive()
    assert seen == [0, 1, 2, 3, 4]
    assert device.hwpt is None  # its page table reported into the queue


def test_async_for(queue: iommufd.FaultQueue, device: MockDevice) -> None:
    async def main() -> list[int]:
        seen = []

        async def serve(name: str) -> None:
            async for group in queue:
                group.respond()
                seen.append(group.address)

        servers = [asyncio.create_task(serve(name)) for name in "ab"]  # two tasks share a queue
        for i in range(10):
            device.trigger_fault(i)
            await asyncio.sleep(0)
        while len(seen) < 10:
            await asyncio.sleep(0.001)
        queue.close()
        await asyncio.wait_for(asyncio.gather(*servers), 10)
        return seen

    assert sorted(asyncio.run(main())) == list(range(10))


def test_async_for_ends_when_another_thread_closes(queue: iommufd.FaultQueue) -> None:
    async def main() -> list[object]:
        closer = threading.Timer(0.05, queue.close)
        closer.start()
        try:
            return [group async for group in queue]
        finally:
            closer.join()

    assert asyncio.run(asyncio.wait_for(main(), 10)) == []


def test_a_cancelled_task_leaves_the_queue_usable(queue: iommufd.FaultQueue, device: MockDevice) -> None:
    async def main() -> int:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(queue), 0.02)
        device.trigger_fault(0x5000)
        return (await asyncio.wait_for(anext(queue), 10)).address

    assert asyncio.run(main()) == 0x5000


def test_a_closed_queue(context: iommufd.Context, queue: iommufd.FaultQueue) -> None:
    with pytest.raises(iommufd.IommufdError) as at:
        queue.destroy()  # its own descriptor holds it
    assert at.value.errno == errno.EBUSY
    queue.close()
    assert queue.closed and list(queue) == []
    for call in (queue.read, queue.fileno, lambda: queue.respond(1), queue.wait):
        with pytest.raises(iommufd.IommufdError, match="FaultQueue 1 is closed") as at:
            call()
        assert at.value.errno == errno.EBADF
    assert context.objects == []


# -------------------------------------------------------------------------------------------------------------- events


@pytest.fixture
def viommu(context: iommufd.Context, ioas: iommufd.IOAS) -> iommufd.VIOMMU:
    device = MockDevice(context, ioas)
    return alloc_viommu(ioas.alloc_hwpt(device, nest_parent=True), device)


def guest(viommu: iommufd.VIOMMU, virt_id: int) -> MockDevice:
    """A device in the guest."""
    parent = viommu.parent
    assert parent is not None and parent.ioas is not None
    device = MockDevice(viommu.context, parent.ioas)
    viommu.alloc_vdevice(device, virt_id)
    device.replace(viommu.alloc_nested(device, nested_data()))
    return device


def test_events(viommu: iommufd.VIOMMU) -> None:
    device = guest(viommu, 0x99)
    with pytest.raises(iommufd.IommufdError) as at:
        device.trigger_event()
    assert at.value.errno == errno.EOPNOTSUPP
    queue = alloc_veventq(viommu, depth=2)
    device.trigger_event()
    assert next(queue) == iommufd.VEvent(0, 0, b"\x99\0\0\0")
    for _ in range(5):
        device.trigger_event()
    assert queue.read() == [
        iommufd.VEvent(1, 0, b"\x99\0\0\0"),
        iommufd.VEvent(2, 0, b"\x99\0\0\0"),
        iommufd.LostEvents(5, 3),
    ]
    for _ in range(3):
        device.trigger_event()
    device.trigger_event()
    assert [type(e).__name__ for e in queue.read()] == ["VEvent", "VEvent", "LostEvents"]
    device.trigger_event()
    assert queue.read() == [iommufd.VEvent(10, 0, b"\x99\0\0\0")]


def test_a_gap_tells_how_many_were_lost(viommu: iommufd.VIOMMU) -> None:
    """A LOST record goes when a later event is stored: the sequence numbers remain (events 8.2)."""
    device = guest(viommu, 0x99)
    queue = alloc_veventq(viommu, depth=2)
    for _ in range(3):
        device.trigger_event()
    assert queue._handle.read(12)  # one leaves, unseen by the client: room for one more
    device.trigger_event()
    events = queue.read()
    assert [(e.sequence, e.lost) for e in events] == [(1, 1), (3, 1)]


def test_events_in_an_event_loop(viommu: iommufd.VIOMMU) -> None:
    device = guest(viommu, 1)
    queue = alloc_veventq(viommu)

    async def main() -> object:
        asyncio.get_running_loop().call_later(0.02, device.trigger_event)
        return await asyncio.wait_for(anext(queue), 10)

    assert asyncio.run(main()) == iommufd.VEvent(0, 0, b"\1\0\0\0")


def test_one_queue_of_a_type(viommu: iommufd.VIOMMU) -> None:
    queue = alloc_veventq(viommu)
    with pytest.raises(FileExistsError):
        alloc_veventq(viommu)
    with pytest.raises(ValueError, match="give event_size"):
        viommu.alloc_veventq(0x77)
    with pytest.raises(iommufd.IommufdError) as at:
        viommu.destroy()
    assert at.value.errno == errno.EBUSY
    viommu.close()
    assert queue.closed


def test_an_smmuv3_event_is_taken_apart() -> None:
    """Formats 10.3: a translation fault of stream 5, substream 3, on a read."""
    words = (0x10 | 1 << 11 | 3 << 12 | 5 << 32, 1 << 35, APERTURE, 0)
    event = iommufd.VEvent(0, 0, b"".join(w.to_bytes(8, "little") for w in words)).smmuv3()
    assert (event.name, event.sid, event.ssid, event.read, event.address) == ("F_TRANSLATION", 5, 3, True, APERTURE)
    assert iommufd.SMMUv3Event((0x7F, 0, 0, 0)).name == "event 0x7f"
    assert iommufd.SMMUv3Event((0x04, 0, 0, 0)).ssid is None
