"""The life of contexts and objects: closing, forgetting, two threads at once, fork, copies of errors."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable

import pytest

import iommufd
from iommufd.testing.mock import APERTURE, MockAccess, MockDevice, alloc_veventq, alloc_viommu, nested_data


def opened(system: str) -> iommufd.Context:
    return iommufd.open("mock" if system == "software" else None, None if system == "software" else "kernel")


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


# ------------------------------------------------------------------------------------------------------------- closing


def test_a_context_takes_everything_with_it(system: str) -> None:
    keeper = opened(system)  # so that a software machine's own descriptors are not counted
    before = descriptors()
    with opened(system) as context:
        ioas, queue = context.alloc_ioas(), context.alloc_fault_queue()
        mapping = ioas.map(mmap.mmap(-1, 4096), APERTURE)
        device = MockDevice(context, ioas, pasid=True)
        table = ioas.alloc_hwpt(device, fault_queue=queue, pasid=True)
        device.replace(table)
        device.attach(table, pasid=5)
        viommu = alloc_viommu(ioas.alloc_hwpt(device, nest_parent=True), device)
        events = alloc_veventq(viommu)
        objects = context.objects
        assert len(objects) == 7
        assert descriptors() > before
    assert context.closed and context.objects == []
    assert all(obj.closed for obj in objects)
    assert not mapping.live
    assert list(queue) == [] and list(events) == []
    assert descriptors() == before
    context.close()  # again does nothing
    for obj in objects:
        obj.close()
    keeper.close()


CALLS: dict[str, Callable[[iommufd.Context, iommufd.IOAS], object]] = {
    "alloc_ioas": lambda c, i: c.alloc_ioas(),
    "alloc_fault_queue": lambda c, i: c.alloc_fault_queue(),
    "with": lambda c, i: c.__enter__(),
    "fileno": lambda c, i: c.fileno(),
    "option": lambda c, i: c.rlimit_mode,
    "open_device": lambda c, i: c.open_device("/dev/vfio/devices/vfio0"),
    "ioas with": lambda c, i: i.__enter__(),
    "ioas id": lambda c, i: i.id,
    "ioas map": lambda c, i: i.map(bytearray(8)),
    "ioas map_file": lambda c, i: i.map_file(0, length=1),
    "ioas unmap": lambda c, i: i.unmap(0, 4096),
    "ioas unmap_all": lambda c, i: i.unmap_all(),
    "ioas ranges": lambda c, i: i.iova_ranges(),
    "ioas allow": lambda c, i: i.allow([]),
    "ioas copy": lambda c, i: i.copy_to(i, 0, 4096),
    "ioas option": lambda c, i: i.huge_pages,
    "ioas destroy": lambda c, i: i.destroy(),
}


@pytest.mark.parametrize("call", CALLS)
def test_nothing_works_on_a_closed_context(call: str, system: str) -> None:
    context = opened(system)
    ioas = context.alloc_ioas()
    context.close()
    with pytest.raises(iommufd.IommufdError, match="the iommufd context is closed") as at:
        CALLS[call](context, ioas)
    assert at.value.errno == errno.EBADF


@pytest.mark.parametrize("call", [call for call in CALLS if call.startswith("ioas")])
def test_nothing_works_on_a_closed_object(call: str, context: iommufd.Context) -> None:
    """Even when its number names another object by now."""
    ioas = context.alloc_ioas()
    number = ioas.id
    ioas.close()
    again = context.alloc_ioas()
    assert again.id == number
    with pytest.raises(iommufd.IommufdError, match=r"<IOAS \d+: closed> is gone") as at:
        CALLS[call](context, ioas)
    assert at.value.errno == errno.EBADF
    assert again.mappings == [] and not again.closed


def test_an_error_in_the_block_is_not_lost(context: iommufd.Context) -> None:
    with pytest.raises(ZeroDivisionError):
        fail_with(context.alloc_ioas())
    assert context.objects[0].closed is False
    assert len(context.objects) == 1  # the device: bound, and attached to nothing


def fail_with(ioas: iommufd.IOAS) -> None:
    with ioas:
        MockDevice(ioas.context, ioas)
        raise ZeroDivisionError


def test_a_forgotten_context_warns_and_closes(system: str) -> None:
    context = opened(system)
    before = descriptors()
    context.alloc_ioas().map(bytearray(8))
    held = [context]
    del context
    with pytest.warns(ResourceWarning, match=r"unclosed <Context fd \d+"):
        forget(held)
    assert descriptors() < before


def forget(held: list[iommufd.Context]) -> None:
    held.clear()
    gc.collect()


def test_dropping_a_variable_ends_nothing(context: iommufd.Context) -> None:
    context.alloc_ioas().map(bytearray(8))
    gc.collect()
    (ioas,) = context.objects
    assert isinstance(ioas, iommufd.IOAS)
    assert len(ioas.mappings) == 1


def test_an_object_can_be_taken_over_by_number(context: iommufd.Context, ioas: iommufd.IOAS) -> None:
    from iommufd.uapi.iommufd import iommu_ioas_alloc

    made = context.do(iommu_ioas_alloc())
    other = context.adopt(iommufd.IOAS, made.out_ioas_id)
    assert other.id == made.out_ioas_id != ioas.id
    other.map(bytearray(8))
    other.close()
    with pytest.raises(ValueError, match="an object's number -4"):
        context.adopt(iommufd.IOAS, -4)
    wrong = context.adopt(iommufd.HWPT, ioas.number)
    with pytest.raises(FileNotFoundError):
        wrong.set_dirty_tracking(True)


def test_a_struct_of_any_command(context: iommufd.Context) -> None:
    from iommufd.uapi.iommufd import iommu_destroy, iommu_ioas_map, iommu_iova_range

    with pytest.raises(FileNotFoundError):
        context.do(iommu_destroy(id=77))
    with pytest.raises(TypeError, match="iommu_iova_range is not the struct of an iommufd command"):
        context.do(iommu_iova_range())
    with pytest.raises(ValueError, match=r"iommu_ioas_map.flags 0x100000000 is not between"):
        context.do(iommu_ioas_map(flags=1 << 32))
    data = bytearray(12)
    with pytest.raises(iommufd.IommufdError) as at:
        context.ioctl(0x3B81, data)
    assert at.value.errno == errno.EINVAL  # size 0


# --------------------------------------------------------------------------------------------------------- two threads


def calls(function: Callable[[], object]) -> Callable[[int], object]:
    """The same for every thread."""
    return lambda _: function()


def in_threads(count: int, work: Callable[[int], object]) -> list[BaseException]:
    """``count`` threads that do ``work`` at once, each with its number; what they raised."""
    errors: list[BaseException] = []
    gate = threading.Barrier(count)

    def run(index: int) -> None:
        gate.wait()
        try:
            work(index)
        except BaseException as error:  # the thread that asked looks at it
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return errors


def test_threads_map_and_unmap_in_one_address_space(ioas: iommufd.IOAS) -> None:
    buffers = [bytearray(4096) for _ in range(4)]

    def work(index: int) -> None:
        for _ in range(50):
            mappings = [ioas.map(buffers[index]) for _ in range(3)]  # the kernel gives away freed IOVAs again
            with MockAccess(ioas) as dma:
                dma.write(mappings[1], bytes([index + 1]) * 8)
            for mapping in mappings:
                mapping.unmap()

    assert in_threads(4, work) == []
    assert ioas.mappings == []
    for index, buffer in enumerate(buffers):
        assert buffer[:8] == bytes([index + 1]) * 8
        buffer.append(1)


def test_of_several_that_unmap_one_does(ioas: iommufd.IOAS) -> None:
    for _ in range(20):
        mapping = ioas.map(bytearray(4096))
        errors = in_threads(4, calls(mapping.unmap))
        assert len(errors) == 3
        assert all(isinstance(e, iommufd.IommufdError) and e.errno == errno.EBADF for e in errors), errors
    assert ioas.mappings == []


def test_of_several_that_destroy_one_does(context: iommufd.Context) -> None:
    for _ in range(20):
        ioas = context.alloc_ioas()
        errors = in_threads(4, calls(ioas.destroy))
        assert len(errors) == 3
        assert all(isinstance(e, iommufd.IommufdError) and e.errno == errno.EBADF for e in errors), errors
        other = context.alloc_ioas()
        assert in_threads(4, calls(other.close)) == []
    assert context.objects == []


def test_closing_while_others_work(system: str) -> None:
    """They get EBADF; nothing crashes, nothing stays."""
    keeper = opened(system)
    before = descriptors()
    for _ in range(10):
        context = opened(system)
        ioas = context.alloc_ioas()

        def work(index: int, context: iommufd.Context = context, ioas: iommufd.IOAS = ioas) -> None:
            if index == 0:
                context.close()
                return
            for _ in range(200):
                ioas.map(bytearray(64)).unmap()

        errors = in_threads(3, work)
        assert all(isinstance(e, iommufd.IommufdError) and e.errno == errno.EBADF for e in errors), errors
    del context, ioas
    gc.collect()
    assert descriptors() == before
    keeper.close()


# ---------------------------------------------------------------------------------------------------------------- fork


def child_says(work: Callable[[], str]) -> str:
    """What ``work`` returns in a forked child, or what it died of."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(20)
            try:
                answer = work()
            except BaseException:  # a child of fork: whatever it was must reach the parent
                answer = traceback.format_exc()
            os.write(writer, answer.encode()[:4000])
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        answer = pipe.read().decode()
    _, status = os.waitpid(pid, 0)
    return answer if status == 0 else f"status {status}: {answer}"


pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


def test_a_child_cannot_use_its_parents_context(system: str) -> None:
    with opened(system) as context:
        ioas, queue = context.alloc_ioas(), context.alloc_fault_queue()
        mapping = ioas.map(bytearray(64))

        def work() -> str:
            refusals = []
            for call in (
                context.alloc_ioas,
                mapping.unmap,
                ioas.destroy,
                ioas.unmap_all,
                queue.read,
                queue.fileno,
                lambda: list(queue),
                lambda: ioas.map(bytearray(8)),
                lambda: context.backend.open("/dev/iommu", os.O_RDWR) if system == "software" else context.fileno(),
            ):
                try:
                    call()
                    refusals.append("it worked")
                except RuntimeError as error:
                    if f"process {os.getpid()})" in str(error) or f"({os.getpid()})" in str(error):
                        refusals.append("refused")
                    else:
                        refusals.append(repr(error))
            context.close()  # and whatever a child ends by, the parent's is not ended
            ioas.close()
            gc.collect()
            return " ".join(refusals)

        assert child_says(work) == " ".join(["refused"] * 9)
        mapping.unmap()
        ioas.map(bytearray(8))
        queue.close()


def test_a_child_opens_its_own(system: str) -> None:
    with opened(system) as context:
        context.alloc_ioas()

        def work() -> str:
            with opened(system) as own:
                ioas = own.alloc_ioas()
                return f"{ioas.number} {ioas.map(bytearray(8)).length}"

        assert child_says(work) == "1 8"


# -------------------------------------------------------------------------------------------------------------- errors


def test_errors_are_those_of_python(ioas: iommufd.IOAS) -> None:
    ioas.map(bytearray(8), 0x1000)
    with pytest.raises(FileExistsError) as at:
        ioas.map(bytearray(8), 0x1000)
    error = at.value
    assert isinstance(error, iommufd.IommufdError) and isinstance(error, OSError)
    assert (error.errno, error.name) == (errno.EEXIST, "EEXIST")
    assert str(error) == f"[Errno 17] File exists: {error.why}"
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert (str(again), again.why, again.request) == (str(error), error.why, error.request)


def test_the_software_machine_says_why() -> None:
    with iommufd.open(machine="mock") as context:
        ioas = context.alloc_ioas()
        ioas.map(bytearray(8), 0x1000)
        with pytest.raises(FileExistsError) as at:
            ioas.map(bytearray(8), 0x1004)
    assert isinstance(at.value, iommufd.IommufdError)
    assert at.value.why == "IOVA [0x1004, 0x100b] overlaps the area [0x1000, 0x1007]"


def test_an_invalidation_error_keeps_its_count(context: iommufd.Context, ioas: iommufd.IOAS) -> None:
    device = MockDevice(context, ioas)
    nested = ioas.alloc_hwpt(device, nest_parent=True).alloc_nested(device, nested_data())
    with pytest.raises(iommufd.InvalidationError) as at:
        nested.invalidate([iommufd.RawEntry(7, b"12345678")])
    again = pickle.loads(pickle.dumps(at.value))
    assert type(again) is iommufd.InvalidationError
    assert again.handled == 0


def test_a_call_in_flight_keeps_its_number(system: str) -> None:
    """Closing waits for it; a long one closes the descriptor itself, and the number names nothing else till then."""
    context = opened(system)
    fd = context.fileno()
    inside, leave = threading.Event(), threading.Event()
    call = context._call

    def slow(fd: int, cmd: int, arg: bytearray | int) -> int:
        inside.set()
        leave.wait(20)
        return call(fd, cmd, arg)

    context._call = slow
    made: list[iommufd.IOAS] = []
    worker = threading.Thread(target=lambda: made.append(context.alloc_ioas()))
    worker.start()
    inside.wait(20)
    context.close()
    assert context.closed
    other = opened(system)
    assert other.fileno() != fd  # still taken
    leave.set()
    worker.join(20)
    assert made[0].number == 1 and made[0].closed
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    other.close()
