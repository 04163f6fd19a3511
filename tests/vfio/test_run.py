"""An unmodified program finds VFIO devices and drives them, under `iommufd run`."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.interposed

FIND = """
import fcntl, glob, mmap, os, struct, sys
def cdev_of(address):
    return "/dev/vfio/devices/" + os.listdir(f"/sys/bus/pci/devices/{address}/vfio-dev")[0]
def ioctl(fd, nr, layout, *values):
    buffer = bytearray(struct.pack(layout, *values))
    fcntl.ioctl(fd, 0x3B00 + nr, buffer)
    return struct.unpack(layout, buffer)
addresses = sorted(map(os.path.basename, glob.glob("/sys/bus/pci/devices/*")))
iommufd = os.open("/dev/iommu", os.O_RDWR)
ioas = ioctl(iommufd, 0x81, "III", 12, 0, 0)[2]
"""


def _run(script: str, machine: str = "pci") -> list[str]:
    command = [sys.executable, "-m", "iommufd", "run", "--machine", machine, "--", sys.executable, "-c", FIND + script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done
    return done.stdout.splitlines()


def test_from_the_bus_to_the_device() -> None:
    """All of them can use the automatic page table the first one brought about."""
    assert _run(
        """
for address in addresses:
    if not os.path.exists(f"/sys/bus/pci/devices/{address}/driver"):
        continue  # a bridge
    fd = os.open(cdev_of(address), os.O_RDWR)
    dev = ioctl(fd, 118, "IIiI", 16, 0, iommufd, 0)[3]
    hwpt = ioctl(fd, 119, "III", 12, 0, ioas)[2]
    group = os.path.basename(os.path.realpath(f"/sys/bus/pci/devices/{address}/iommu_group"))
    print(address, group, dev, hwpt, os.pread(fd, 4, 7 << 40).hex())
"""
    ) == [
        "0000:00:03.0 0 2 3 f41af010",
        "0000:01:00.0 1 4 3 f41af010",
        "0000:01:00.1 1 5 3 f41af010",
    ]


def test_addresses_above_user_space() -> None:
    """The VFS looks at them before the device does, whatever is there to be moved."""
    assert (
        _run(
            """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
fd = os.open(cdev_of("0000:00:03.0"), os.O_RDWR)
def answers(call):
    high = -4096
    for addr, count, at in ((high, 0, 7 << 40), (high, 4, 6 << 40), (4096, 2**63, 0), (16, 4, 9 << 40), (high, 4, -1)):
        call(fd, ctypes.c_long(addr), ctypes.c_ulong(count), ctypes.c_long(at))
        yield os.strerror(ctypes.get_errno())
for bound in (False, True):
    if bound:
        ioctl(fd, 118, "IIiI", 16, 0, iommufd, 0)
    for call in (libc.pread, libc.pwrite):
        print(*answers(call), sep=", ")
"""
        )
        == ["Bad address, Bad address, Bad address, Invalid argument, Invalid argument"] * 4
    )


def test_bars_are_shared_memory() -> None:
    assert _run(
        """
fd = os.open(cdev_of("0000:00:03.0"), os.O_RDWR)
ioctl(fd, 118, "IIiI", 16, 0, iommufd, 0)
os.pwrite(fd, b"by write", 0x100)
bar = mmap.mmap(fd, 0x10000)
print(bar[0x100:0x108].decode())
bar[0x2000:0x2006] = b"by map"
print(os.pread(fd, 6, 0x2000).decode())
if os.fork() == 0:
    bar[0x3000:0x3005] = b"child"
    os._exit(0)
os.wait()
print(os.pread(fd, 5, 0x3000).decode())
ioctl(fd, 111, "")  # VFIO_DEVICE_RESET
print(bar[0x100], bar[0x2000])
"""
    ) == ["by write", "by map", "child", "0 0"]


def test_interrupts_reach_the_program() -> None:
    assert _run(
        """
fd = os.open(cdev_of("0000:00:03.0"), os.O_RDWR)
ioctl(fd, 118, "IIiI", 16, 0, iommufd, 0)
events = [os.eventfd(0) for _ in range(3)]
ioctl(fd, 110, "IIIIIiii", 32, 4 | 32, 2, 0, 3, *events)  # MSI-X: an eventfd each
ioctl(fd, 110, "IIIII", 20, 1 | 32, 2, 1, 2)  # trigger the last two
import select
print(*(bool(select.select([event], [], [], 0)[0]) for event in events))
"""
    ) == ["False True True"]


def test_the_older_way_through_a_group() -> None:
    assert _run(
        """
container = os.open("/dev/vfio/vfio", os.O_RDWR)
group = os.open("/dev/vfio/1", os.O_RDWR)
print(ioctl(group, 103, "II", 8, 0)[1])
ioctl(group, 104, "i", container)
print(fcntl.ioctl(container, 0x3B65, 1), fcntl.ioctl(container, 0x3B66, 1))
device = fcntl.ioctl(group, 0x3B6A, bytearray(b"0000:01:00.1" + bytes(8)))
print(os.readlink(f"/proc/self/fd/{device}"), ioctl(device, 107, "IIII", 16, 0, 0, 0)[1:])
memory = mmap.mmap(-1, 1 << 16)
import ctypes
va = ctypes.addressof(ctypes.c_char.from_buffer(memory))
ioctl(container, 113, "IIQQQ", 32, 3, va, 0x100000, 1 << 16)
print(hex(ioctl(container, 114, "IIQQ", 24, 0, 0x104000, 0x4000)[3]))
"""
    ) == ["1", "1 0", "anon_inode:[vfio-device] (3, 9, 5)", "0x4000"]


def test_the_driver_is_taken_and_given_back() -> None:
    assert _run(
        """
driver = "/sys/bus/pci/drivers/vfio-pci"
def write(path, text):
    with open(path, "w") as file:
        file.write(text)
print(os.path.exists("/dev/vfio/0"), len(glob.glob(driver + "/0000:*")))
write(driver + "/unbind", "0000:00:03.0")
print(os.path.exists("/dev/vfio/0"), len(glob.glob(driver + "/0000:*")))
write("/sys/bus/pci/drivers_probe", "0000:00:03.0")
print(os.path.exists("/dev/vfio/0"), len(glob.glob(driver + "/0000:*")))
"""
    ) == ["True 3", "False 2", "True 3"]
