"""DeviceFile: one open of a VFIO device, through its cdev or its group (kernel: struct vfio_device_file).

devices.md 11. Invariants:

* A cdev file can do nothing but BIND_IOMMUFD until that has succeeded (``granted``); a group's file has access from
  birth and can never be bound. Its access goes with its last reference, and with the last access the device.
* Region ``index`` is at offset ``index << 40``. Configuration space answers EFAULT beyond its end, BARs EINVAL.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from iommufd.engine.context import Context
from iommufd.engine.dispatch import find_nonzero
from iommufd.engine.file import File
from iommufd.errors import KernelError
from iommufd.uapi import vfio as v
from iommufd.vfio import feature, hot_reset
from iommufd.vfio.pci_config import BarKind
from iommufd.vfio.pci_function import REGION_SHIFT

if TYPE_CHECKING:
    from iommufd.engine.task import Task
    from iommufd.vfio.device import VfioDevice

CONFIG, ROM = v.VFIO_PCI_CONFIG_REGION_INDEX, v.VFIO_PCI_ROM_REGION_INDEX
IO_LIMIT = 1 << 20  # bytes of one read or write that are moved; the rest is a short count
MSIX_CAP = v.vfio_info_cap_header(id=v.VFIO_REGION_INFO_CAP_MSIX_MAPPABLE, version=1, next=0)


class DeviceFile(File):
    """See the module. ``group_fd``: made by VFIO_GROUP_GET_DEVICE_FD on a device that counts this user already."""

    mappable = True

    def __init__(self, device: VfioDevice, *, group_fd: bool = False, mode: int = 2) -> None:
        super().__init__()
        self.device = device
        self.group_fd = group_fd
        self.granted = group_fd
        self.mode = mode
        self.link = "anon_inode:[vfio-device]" if group_fd else f"/dev/vfio/devices/{device.node}"
        self._position = 0

    def release(self) -> None:
        device = self.device
        if not self.granted:
            return
        with device.lock:
            device.function.take_store_back(self.memory_fd)
            device.close()
        if not self.group_fd:
            device.group.unblock()

    def _check_granted(self) -> None:
        if not self.granted:
            raise KernelError(errno.EINVAL, f"{self.device.name} is not bound to an iommufd yet")

    # --- ioctls

    def ioctl(self, task: Task, cmd: int, arg: int) -> int:
        world = self.device.world
        cdev = _CDEV.get(cmd) if world.kernel >= (6, 6) else None
        found = cdev or _TABLE.get(cmd)
        if world.fail_call is not None and found is not None:
            world.fail_call(found[0], task)
        binding = cdev is not None and cmd == v.VFIO_DEVICE_BIND_IOMMUFD
        if not binding:  # 11.1
            self._check_granted()
        if found is None or (cdev is not None and self.group_fd and not binding):
            raise KernelError(errno.ENOTTY, f"{self.device.name} has no command {cmd:#x}")
        return found[1](self, task, arg)

    def bind(self, task: Task, arg: int) -> int:
        """VFIO_DEVICE_BIND_IOMMUFD (11.2)."""
        device = self.device
        full = v.vfio_device_bind_iommufd.size_in(device.world.kernel)  # before tokens, the struct was shorter
        argsz = int.from_bytes(task.read(arg, 4), "little")  # row 1
        if argsz < 16:  # row 2
            raise KernelError(errno.EINVAL, f"argsz {argsz} is less than 16")
        if full > 16 and argsz > full:  # row 3
            find_nonzero(task, arg + full, arg + argsz)
        cmd = v.vfio_device_bind_iommufd.unpack(task.read(arg, min(argsz, full)))
        known = v.VFIO_DEVICE_BIND_FLAG_TOKEN if full > 16 else 0
        if cmd.iommufd < 0 or cmd.flags & ~known:  # row 4
            raise KernelError(errno.EINVAL, f"descriptor {cmd.iommufd} or flags {cmd.flags:#x} are not possible")
        if self.group_fd:  # row 5
            raise KernelError(errno.EINVAL, f"this descriptor of {device.name} came from a VFIO group")
        device.group.block()  # row 6
        try:
            with device.lock:
                self._bind_locked(task, arg, cmd)
        except BaseException:
            device.group.unblock()
            raise
        return 0

    def _bind_locked(self, task: Task, arg: int, cmd: v.vfio_device_bind_iommufd) -> None:
        device = self.device
        if self.granted:  # row 7
            raise KernelError(errno.EINVAL, f"this descriptor of {device.name} is bound already")
        if cmd.flags & v.VFIO_DEVICE_BIND_FLAG_TOKEN:  # row 8
            task.read(cmd.token_uuid_ptr, 16)
            raise KernelError(errno.EINVAL, f"{device.name} has no virtual functions and no VF token")
        context = context_of(task, cmd.iommufd)  # row 9
        try:
            device.open(context, shared=False)  # rows 10-13
        finally:
            context.put()
        try:
            assert device.idev is not None
            task.write(arg + 12, device.idev.id.to_bytes(4, "little"))  # row 14
        except BaseException:
            device.close()
            raise
        self.granted = True  # row 15

    def attach(self, task: Task, arg: int) -> int:
        """VFIO_DEVICE_ATTACH_IOMMUFD_PT (11.3)."""
        device = self.device
        argsz, flags, pt_id = _words(task.read(arg, 12))  # row 1
        pasid = self._pasid_argument(task, arg, argsz, flags, 12)  # rows 2-5
        with device.lock:
            if pasid is None:  # row 6
                hwpt = device.attach(task, pt_id)
            else:
                hwpt = device.attach_pasid(task, pt_id, pasid)
            try:
                task.write(arg + 8, hwpt.to_bytes(4, "little"))  # row 7
            except BaseException:
                device.detach()  # the RID, whatever was attached
                raise
        return 0

    def detach(self, task: Task, arg: int) -> int:
        """VFIO_DEVICE_DETACH_IOMMUFD_PT (11.4)."""
        device = self.device
        argsz, flags = _words(task.read(arg, 8))  # row 1
        pasid = self._pasid_argument(task, arg, argsz, flags, 8)  # rows 2-5
        with device.lock:  # row 6
            if pasid is None:
                device.detach()
            else:
                device.detach_pasid(pasid)
        return 0

    def _pasid_argument(self, task: Task, arg: int, argsz: int, flags: int, minimum: int) -> int | None:
        """Rows 2 to 5 of 11.3 and 11.4: the PASID behind the first ``minimum`` bytes, None when none is meant."""
        if argsz < minimum:
            raise KernelError(errno.EINVAL, f"argsz {argsz} is less than {minimum}")
        known = v.VFIO_DEVICE_ATTACH_PASID if self.device.world.kernel >= (6, 15) else 0
        if flags & ~known:
            raise KernelError(errno.EINVAL, f"flags {flags:#x} are not known")
        if not flags:
            return None
        if argsz < minimum + 4:
            raise KernelError(errno.EINVAL, f"argsz {argsz} leaves no room for a PASID")
        return int.from_bytes(task.read(arg + minimum, 4), "little")

    def get_info(self, task: Task, arg: int) -> int:
        """VFIO_DEVICE_GET_INFO."""
        argsz = _argsz(task, arg, 16)
        flags = v.VFIO_DEVICE_FLAGS_PCI | (v.VFIO_DEVICE_FLAGS_RESET if self.device.function.resettable else 0)
        info = v.vfio_device_info(
            argsz=argsz, flags=flags, num_regions=v.VFIO_PCI_NUM_REGIONS, num_irqs=v.VFIO_PCI_NUM_IRQS
        )
        task.write(arg, info.pack()[: min(argsz, v.vfio_device_info.SIZE)])
        return 0

    def get_region_info(self, task: Task, arg: int) -> int:
        """VFIO_DEVICE_GET_REGION_INFO; the MSI-X table's BAR says with a capability that it can be mapped whole."""
        argsz = _argsz(task, arg, 32)
        info = v.vfio_region_info.unpack(task.read(arg, 32))
        index = info.index
        info.size, info.flags = self._region(index)
        info.offset = index << REGION_SHIFT
        layout = self.device.function.layout
        if layout.msix and index == layout.msix_bar and info.flags & v.VFIO_REGION_INFO_FLAG_MMAP:
            info.flags |= v.VFIO_REGION_INFO_FLAG_CAPS
            if argsz < 40:
                info.argsz, info.cap_offset = 40, 0
            else:
                task.write(arg + 32, MSIX_CAP.pack())
                info.cap_offset = 32
        task.write(arg, info.pack())
        return 0

    def _region(self, index: int) -> tuple[int, int]:
        """(size, flags) of region ``index``, 0 of what is not there; EINVAL for a number that is no region."""
        function = self.device.function
        read, write = v.VFIO_REGION_INFO_FLAG_READ, v.VFIO_REGION_INFO_FLAG_WRITE
        if index == CONFIG:
            return function.config.size, read | write
        if index == ROM:
            return (function.layout.rom_size, read) if function.layout.rom_size else (0, 0)
        if index > CONFIG:
            raise KernelError(errno.EINVAL, f"{self.device.name} has no region {index}")
        bar = function.layout.bar(index)
        if bar is None:
            return 0, 0
        return bar.size, read | write | (v.VFIO_REGION_INFO_FLAG_MMAP if function.bar_mapped(index) else 0)

    def get_irq_info(self, task: Task, arg: int) -> int:
        """VFIO_DEVICE_GET_IRQ_INFO."""
        info = v.vfio_irq_info.unpack(task.read(arg, 16))
        if info.argsz < 16:
            raise KernelError(errno.EINVAL, f"argsz {info.argsz} is less than 16")
        if info.index >= v.VFIO_PCI_NUM_IRQS:
            raise KernelError(errno.EINVAL, f"{self.device.name} has no interrupt index {info.index}")
        interrupts = self.device.function.interrupts
        info.flags, info.count = interrupts.flags(info.index), interrupts.count(info.index)
        task.write(arg, info.pack())
        return 0

    def set_irqs(self, task: Task, arg: int) -> int:
        """VFIO_DEVICE_SET_IRQS."""
        self.device.function.interrupts.set(task, arg)
        return 0

    def reset(self, task: Task, arg: int) -> int:
        """VFIO_DEVICE_RESET."""
        if not self.device.function.resettable:
            raise KernelError(errno.EINVAL, f"{self.device.name} cannot be reset by itself")
        self.device.function.config.wake()
        self.device.reset()
        return 0

    # --- regions

    def read(self, task: Task, addr: int, count: int, pos: int | None = None) -> int:
        self._check_granted()
        at = self._position if pos is None else pos
        data = self._read_region(at >> REGION_SHIFT, at & ((1 << REGION_SHIFT) - 1), min(count, IO_LIMIT))
        if data:
            task.write(addr, data)
        if pos is None:
            self._position = at + len(data)
        return len(data)

    def write(self, task: Task, addr: int, count: int, pos: int | None = None) -> int:
        self._check_granted()
        at = self._position if pos is None else pos
        done = self._write_region(task, addr, at >> REGION_SHIFT, at & ((1 << REGION_SHIFT) - 1), min(count, IO_LIMIT))
        if pos is None:
            self._position = at + done
        return done

    def _read_region(self, index: int, offset: int, count: int) -> bytes:
        if not count:
            return b""
        function = self.device.function
        if index == CONFIG:
            return function.config.read(offset, count)
        count = self._clip(index, offset, count, writing=False)
        if index == ROM:
            return function.rom_read(offset, count)
        return function.bar_read(index, offset, count)

    def _write_region(self, task: Task, addr: int, index: int, offset: int, count: int) -> int:
        if not count:
            return 0
        function = self.device.function
        if index == CONFIG:
            function.config.check(offset, count)
            data = task.read(addr, count)
            with function.interrupts.line_switch():
                function.config.write(offset, data)
            if function.config.reset_requested:
                function.config.reset_requested = False
                self.device.reset()
            return count
        count = self._clip(index, offset, count, writing=True)
        function.bar_write(index, offset, task.read(addr, count))
        return count

    def _clip(self, index: int, offset: int, count: int, *, writing: bool) -> int:
        """How many bytes of a BAR or the ROM can be moved: EINVAL outside, EIO while it does not answer."""
        function = self.device.function
        size, flags = self._region(index)
        needed = v.VFIO_REGION_INFO_FLAG_WRITE if writing else v.VFIO_REGION_INFO_FLAG_READ
        if not flags & needed or offset >= size:
            raise KernelError(
                errno.EINVAL, f"offset {offset:#x} of region {index}, which has {size:#x} bytes and flags {flags:#x}"
            )
        count = min(count, size - offset)
        bar = function.layout.bar(index)
        asleep = (bar is None or bar.kind is not BarKind.IO) and not function.config.memory_enabled
        if asleep and not function.only_table(index, offset, count):
            raise KernelError(errno.EIO, f"memory access to {self.device.name} is disabled in its command register")
        return count

    def mmap(self, task: Task, offset: int, length: int, prot: int, shared: bool) -> tuple[int, int]:
        """A memory BAR, or part of it; EINVAL for anything else, and for a private mapping.

        One open of a device at a time can have mappings; a second one, which only a group can give, is refused too."""
        self._check_granted()
        device = self.device
        index, start = offset >> REGION_SHIFT, offset & ((1 << REGION_SHIFT) - 1)
        bar = device.function.bar_mapped(index)
        if not shared or self.mode == 0 or bar is None or start + length > bar.size:
            raise KernelError(
                errno.EINVAL, f"[{start:#x}, {start + length:#x}) of region {index} cannot be mapped, or not privately"
            )
        with device.lock:
            if not device.function.lend_store(self.memory_fd):
                raise KernelError(errno.EINVAL, f"{device.name} is mapped through another descriptor")
        self.get()
        return self.memory_fd, offset


def context_of(task: Task, fd: int) -> Context:
    """devices.md 1.5: the iommufd context behind a descriptor, with one more reference. EBADF, EBADFD."""
    file = task.file(fd)
    if isinstance(file, Context) and file.hold():
        return file
    if not isinstance(file, File):
        file.close()
    raise KernelError(errno.EBADFD, f"descriptor {fd} is not an iommufd")


def _argsz(task: Task, arg: int, minimum: int) -> int:
    """The first word of a struct of which ``minimum`` bytes must be readable: EFAULT, or EINVAL when it says less."""
    argsz = int.from_bytes(task.read(arg, minimum)[:4], "little")
    if argsz < minimum:
        raise KernelError(errno.EINVAL, f"argsz {argsz} is less than {minimum}")
    return argsz


def _words(data: bytes) -> list[int]:
    return [int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), 4)]


Handler = Callable[[DeviceFile, "Task", int], int]

_CDEV: dict[int, tuple[str, Handler]] = {
    v.VFIO_DEVICE_BIND_IOMMUFD: ("VFIO_DEVICE_BIND_IOMMUFD", DeviceFile.bind),
    v.VFIO_DEVICE_ATTACH_IOMMUFD_PT: ("VFIO_DEVICE_ATTACH_IOMMUFD_PT", DeviceFile.attach),
    v.VFIO_DEVICE_DETACH_IOMMUFD_PT: ("VFIO_DEVICE_DETACH_IOMMUFD_PT", DeviceFile.detach),
}
_TABLE: dict[int, tuple[str, Handler]] = {
    v.VFIO_DEVICE_GET_INFO: ("VFIO_DEVICE_GET_INFO", DeviceFile.get_info),
    v.VFIO_DEVICE_GET_REGION_INFO: ("VFIO_DEVICE_GET_REGION_INFO", DeviceFile.get_region_info),
    v.VFIO_DEVICE_GET_IRQ_INFO: ("VFIO_DEVICE_GET_IRQ_INFO", DeviceFile.get_irq_info),
    v.VFIO_DEVICE_SET_IRQS: ("VFIO_DEVICE_SET_IRQS", DeviceFile.set_irqs),
    v.VFIO_DEVICE_RESET: ("VFIO_DEVICE_RESET", DeviceFile.reset),
    v.VFIO_DEVICE_GET_PCI_HOT_RESET_INFO: ("VFIO_DEVICE_GET_PCI_HOT_RESET_INFO", hot_reset.get_info),
    v.VFIO_DEVICE_PCI_HOT_RESET: ("VFIO_DEVICE_PCI_HOT_RESET", hot_reset.reset),
    v.VFIO_DEVICE_FEATURE: ("VFIO_DEVICE_FEATURE", feature.feature),
}
