"""The kernel's mock IOMMU hardware, typed: devices without hardware, on a test kernel and on the machine "mock" alike.

A kernel built with CONFIG_IOMMUFD_TEST has a command that makes mock devices and lets them do what devices do: DMA,
page faults, events. These helpers are that command for users of the client (``struct iommu_test_cmd``); on a kernel or
machine without it they raise IommufdError ENOTTY.

::

    with iommufd.open(machine="mock") as context, context.alloc_ioas() as ioas:
        mapping = ioas.map(bytearray(4096), 0x1000000, writeable=True)
        device = MockDevice(context, ioas)
        with MockAccess(ioas) as dma:
            dma.write(mapping.iova, b"written by a device")
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import TYPE_CHECKING

from iommufd.client.buffers import Scratch, too_much, where
from iommufd.client.calls import pack
from iommufd.client.device import Device
from iommufd.client.errors import IommufdError
from iommufd.client.handle import Handle
from iommufd.client.hwpt import HWPT, NestedHWPT
from iommufd.client.invalidation import RawEntry
from iommufd.client.ioas import IOAS
from iommufd.client.mapping import Mapping, span
from iommufd.client.nesting import RawData
from iommufd.client.numbers import instance, items, number
from iommufd.client.objects import PageTable
from iommufd.uapi import iommufd_test as t
from iommufd.uapi.iommufd import iommu_hwpt_pgfault_perm

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from typing_extensions import Buffer

    from iommufd.client.buffers import HasArrayInterface
    from iommufd.client.context import Context
    from iommufd.client.veventq import VEventQueue
    from iommufd.client.viommu import VIOMMU
    from iommufd.uapi.declare import Struct

APERTURE = t.MOCK_APERTURE_START
"""The lowest IOVA a mock device reaches; the highest is ``t.MOCK_APERTURE_LAST``."""

READ, WRITE = iommu_hwpt_pgfault_perm.READ, iommu_hwpt_pgfault_perm.WRITE


class MockDevice(Device):
    """A mock device, attached to ``target`` from the start.

    ``dirty``: its IOMMU can track dirty pages; ``pasid``: it has PASIDs. ``stdev`` is the number of the test object
    behind it, ``number`` that of the device."""

    _adoptable = False

    def __init__(self, context: Context, target: PageTable, *, dirty: bool = True, pasid: bool = False) -> None:
        flags = (0 if dirty else t.MOCK_FLAGS_DEVICE_NO_DIRTY) | (t.MOCK_FLAGS_DEVICE_PASID if pasid else 0)
        made = context.do(t.test_mock_domain_flags(id=target.id, dev_flags=flags))
        self.stdev = made.out_stdev_id
        super().__init__(context, made.out_idev_id)
        self._note(target, 0, self._hwpt_of(target, made.out_hwpt_id))

    # PASID 0 of the test command is the device itself

    def _attach_pt(self, pt_id: int, pasid: int) -> int:
        return self._do(t.test_pasid_attach(id=self.stdev, pasid=pasid, pt_id=pt_id)).pt_id

    def _replace_pt(self, pt_id: int, pasid: int) -> int:
        if pasid:
            return self._do(t.test_pasid_replace(id=self.stdev, pasid=pasid, pt_id=pt_id)).pt_id
        return self._do(t.test_mock_domain_replace(id=self.stdev, pt_id=pt_id)).pt_id

    def _detach_pt(self, pasid: int) -> None:
        self._do(t.test_pasid_detach(id=self.stdev, pasid=pasid))

    def _unbind(self) -> None:
        from iommufd.uapi.iommufd import iommu_destroy

        for pasid in sorted(self._hwpts, reverse=True):
            if pasid:  # the kernel would leak it
                self._detach_pt(pasid)
        self._do(iommu_destroy(id=self.stdev))

    # ----------------------------------------------------------------------------------------- what devices do

    def trigger_fault(
        self,
        address: int,
        *,
        perm: int = READ,
        group: int = 0,
        pasid: int | None = None,
    ) -> None:
        """Sends one page request, to the fault queue, if there is one, of what the device (or PASID) is attached to."""
        self._do(
            t.test_trigger_iopf(
                dev_id=self._id,
                pasid=pasid or 0,
                grpid=number(group, "group", 2**32 - 1),
                perm=number(perm, "perm", 2**32 - 1),
                addr=number(address, "address"),
            )
        )

    def trigger_event(self) -> None:
        """Reports one virtual event. ENOENT unless attached through a vIOMMU, EOPNOTSUPP without a vEVENTQ."""
        self._do(t.test_trigger_vevent(dev_id=self._id))

    def cache_is(self, index: int, value: int) -> bool:
        """Whether word ``index`` (0 to 3) of the device's mock cache is ``value``."""
        return self._holds(t.test_dev_check_cache(id=self._id, arm_id=index, cache=value))

    def attached_to(self, hwpt: HWPT | NestedHWPT | None, pasid: int = 0) -> bool:
        """Whether the hardware says that ``hwpt`` (None: nothing) is attached at ``pasid``."""
        hwpt_id = instance(hwpt, PageTable, "hwpt").id if hwpt is not None else 0
        return self._holds(
            t.test_pasid_check_hwpt(id=self.stdev, pasid=number(pasid, "pasid", 2**32 - 1), hwpt_id=hwpt_id)
        )

    def _holds(self, question: Struct) -> bool:
        try:
            self._do(question)
        except IommufdError as error:
            if error.errno == errno.EINVAL:
                return False
            raise
        return True


class MockAccess:
    """A software device: it reads and writes memory by its IOVA (an iommufd access of the test command).

    ``pins``: it may also pin memory, which raises the IOAS's alignment to a page. Close it before the IOAS."""

    def __init__(self, ioas: IOAS, *, pins: bool = False) -> None:
        flags = t.MOCK_FLAGS_ACCESS_CREATE_NEEDS_PIN_PAGES if pins else 0
        made = ioas.context.do(t.test_create_access(id=ioas.id, flags=flags))
        self.context = ioas.context
        self._handle = Handle(ioas.context.backend, made.out_access_fd, "the mock access")

    def read(self, iova: int | Mapping, length: int | None = None, *, slow: bool = False) -> bytes:
        """``length`` bytes at ``iova``. ENOENT where nothing is mapped, EPERM where reading is not allowed."""
        iova, length = span(iova, length)
        memory = Scratch(length=length)
        self._rw(iova, length, memory.address, t.MOCK_ACCESS_RW_SLOW_PATH if slow else 0)
        return memory.bytes()

    def write(self, iova: int | Mapping, data: Buffer | HasArrayInterface, *, slow: bool = False) -> None:
        """Writes ``data`` at ``iova``."""
        at = iova.iova if isinstance(iova, Mapping) else number(iova, "iova")
        address, length = where(data)
        self._rw(at, length, address, t.MOCK_ACCESS_RW_WRITE | (t.MOCK_ACCESS_RW_SLOW_PATH if slow else 0))

    def _rw(self, iova: int, length: int, address: int, flags: int) -> None:
        self.context.do(t.test_access_rw(id=self._handle.fileno(), iova=iova, length=length, uptr=address, flags=flags))

    def pin(self, iova: int | Mapping, length: int | None = None, *, write: bool = False) -> int:
        """Pins memory until :meth:`unpin` or the IOVA is unmapped; what names the pin."""
        iova, length = span(iova, length)
        flags = t.MOCK_FLAGS_ACCESS_WRITE if write else 0
        query = t.test_access_pages(id=self._handle.fileno(), flags=flags, iova=iova, length=length)
        return self.context.do(query).out_access_pages_id

    def unpin(self, pin: int) -> None:
        """Ends a pin. ENOENT when the IOVA was unmapped meanwhile."""
        self.context.do(t.test_destroy_access_pages(id=self._handle.fileno(), access_pages_id=pin))

    def move(self, ioas: IOAS) -> None:
        """Goes over to another IOAS; all pins end."""
        target = instance(ioas, IOAS, "ioas").id
        self.context.do(t.test_access_replace_ioas(id=self._handle.fileno(), ioas_id=target))

    def close(self) -> None:
        """Ends the access and its pins."""
        self._handle.close_fd()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def mark_dirty(hwpt: HWPT, iova: int | Mapping, pages: Iterable[int], *, page_size: int = 4096) -> None:
    """As if a device had written to these ``pages``, counted from ``iova``. EINVAL unless tracking is on."""
    start = iova.iova if isinstance(iova, Mapping) else number(iova, "iova")
    chosen = sorted({number(page, "a page") for page in items(pages, "pages")})
    if not chosen:
        return
    try:
        bits = bytearray(chosen[-1] // 8 + 1)
    except (MemoryError, OverflowError):
        raise too_much(chosen[-1] // 8 + 1) from None
    for page in chosen:
        bits[page // 8] |= 1 << page % 8
    memory = Scratch(bytes(bits))
    length = (chosen[-1] + 1) * page_size
    hwpt._do(t.test_dirty(id=hwpt.id, iova=start, length=length, page_size=page_size, uptr=memory.address))


def reserve(ioas: IOAS, start: int, length: int) -> None:
    """Reserves IOVAs as a device would, until the IOAS goes. EADDRINUSE where something is mapped or allowed."""
    ioas.context.do(t.test_add_reserved(id=ioas.id, start=number(start, "start"), length=number(length, "length")))


def maps(hwpt: HWPT, mapping: Mapping, memory: Buffer | HasArrayInterface) -> bool:
    """Whether the hardware translates the mapping's IOVAs to the very pages of ``memory``, from its first byte on."""
    address, _ = where(memory)
    query = t.test_md_check_map(id=hwpt.id, iova=mapping.iova, length=mapping.length, uptr=address)
    try:
        hwpt._do(query)
    except IommufdError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    return True


def nested_data(iotlb: int = t.IOMMU_TEST_IOTLB_DEFAULT) -> RawData:
    """Data for a nested HWPT of mock hardware, whose four mock IOTLB words start as ``iotlb``."""
    return RawData(t.IOMMU_HWPT_DATA_SELFTEST, pack(t.iommu_hwpt_selftest(iotlb=iotlb)))


def huge_data() -> RawData:
    """Data for a paging HWPT with pages of 4 KiB and 1 MiB, and 256 GiB of IOVAs."""
    return RawData(t.IOMMU_HWPT_DATA_SELFTEST, pack(t.iommu_hwpt_selftest(pagetable_type=t.MOCK_IOMMUPT_HUGE)))


def invalidate_iotlb(index: int, *, everything: bool = False) -> RawEntry:
    """An entry for a mock nested HWPT: drops IOTLB word ``index``, or all of them."""
    flags = t.IOMMU_TEST_INVALIDATE_FLAG_ALL if everything else 0
    entry = t.iommu_hwpt_invalidate_selftest(flags=flags, iotlb_id=index)
    return RawEntry(t.IOMMU_HWPT_INVALIDATE_DATA_SELFTEST, pack(entry))


def invalidate_cache(virt_id: int, index: int, *, everything: bool = False) -> RawEntry:
    """An entry for a mock vIOMMU: drops cache word ``index`` of the device known as ``virt_id``, or all of them."""
    flags = t.IOMMU_TEST_INVALIDATE_FLAG_ALL if everything else 0
    entry = t.iommu_viommu_invalidate_selftest(flags=flags, vdev_id=virt_id, cache_id=index)
    return RawEntry(t.IOMMU_VIOMMU_INVALIDATE_DATA_SELFTEST, pack(entry))


def iotlb_is(hwpt: NestedHWPT, index: int, value: int) -> bool:
    """Whether IOTLB word ``index`` (0 to 3) of a mock nested HWPT is ``value``."""
    try:
        hwpt.context.do(t.test_md_check_iotlb(id=hwpt.id, arm_id=index, iotlb=value))
    except IommufdError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    return True


def alloc_viommu(parent: HWPT, device: MockDevice, loopback: int = 0) -> VIOMMU:
    """A mock vIOMMU. Its first word of device memory, and ``data.out_data``, are ``loopback``."""
    return parent.alloc_viommu(device, t.IOMMU_VIOMMU_TYPE_SELFTEST, t.iommu_viommu_selftest(in_data=loopback))


def alloc_veventq(viommu: VIOMMU, depth: int = 64) -> VEventQueue:
    """A queue for events of a mock vIOMMU; each is the device's ``virt_id``, four bytes."""
    return viommu.alloc_veventq(t.IOMMU_VEVENTQ_TYPE_SELFTEST, depth, event_size=t.iommu_viommu_event_selftest.SIZE)
