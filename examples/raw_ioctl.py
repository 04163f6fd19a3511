"""Raw ioctls on /dev/iommu, as any program makes them. Knows nothing of the iommufd package: standard library only.

Runs on a kernel with CONFIG_IOMMUFD_TEST, and just the same under `iommufd run --machine mock`. It maps memory, lets a
device write into it, asks for two things no kernel grants, and leaves its mappings behind (on purpose).
"""

import ctypes
import errno
import fcntl
import mmap
import os
import struct
import sys

IOAS_ALLOC, IOVA_RANGES, MAP, UNMAP, TEST = 0x3B81, 0x3B84, 0x3B85, 0x3B86, 0x3BA0
FIXED, WRITEABLE, READABLE = 1, 2, 4
MIB = 1 << 20

iommu = os.open("/dev/iommu", os.O_RDWR)


def ioctl(what: str, number: int, layout: str, *fields: int, refusable: bool = False) -> tuple[int, ...]:
    """One ioctl: the struct starts with its own size. Returns the fields as the kernel left them."""
    buffer = bytearray(struct.pack(layout, struct.calcsize(layout), *fields))
    try:
        fcntl.ioctl(iommu, number, buffer)
    except OSError as error:
        print(f"{what}: {errno.errorcode[error.errno or 0]}")
        if not refusable:
            sys.exit("cannot go on")
        return ()
    answer: tuple[int, ...] = struct.unpack(layout, buffer)
    print(what)
    return answer


def address(buffer: mmap.mmap | bytearray) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


# An address space for DMA, and a (mock) device attached to it: TEST op 2 is MOCK_DOMAIN.
ioas = ioctl("allocate an I/O address space", IOAS_ALLOC, "III", 0, 0)[2]
ioctl("attach a device to it", TEST, "IIIIII48x", 2, ioas, 0, 0, 0)

ranges = bytearray(64)
count = ioctl("ask which IOVAs the device can reach", IOVA_RANGES, "IIIIQQ", ioas, 4, 0, address(ranges), 0)[2]
for index in range(count):
    print("    [{:#x}, {:#x}]".format(*struct.unpack_from("QQ", ranges, 16 * index)))

# Ordinary memory of this process becomes visible to the device.
memory = mmap.mmap(-1, 2 * MIB)
here = address(memory)
rights = WRITEABLE | READABLE
ioctl("map 1 MiB at IOVA 0x1000000", MAP, "IIIIQQQ", FIXED | rights, ioas, 0, here, MIB, 0x1000000)
chosen = ioctl("map 1 MiB where the kernel likes", MAP, "IIIIQQQ", rights, ioas, 0, here + MIB, MIB, 0)[6]
print(f"    it chose {chosen:#x}")

# A device writes into it by IOVA: TEST op 5 is CREATE_ACCESS, op 8 ACCESS_RW with the flag WRITE.
words = bytearray(b"written by a device")
access = ioctl("make a device that does DMA", TEST, "IIIIII48x", 5, ioas, 0, 0, 0)[4]
ioctl("let it write to IOVA 0x1000040", TEST, "IIIIQQQI28x", 8, access, 0, 0x1000040, len(words), address(words), 1)
print(f"    our memory at 0x40 now says {memory[0x40 : 0x40 + len(words)]!r}")
os.close(access)

# No kernel grants these. The program learns an errno; `iommufd run --explain` says why.
ioctl("map over a mapping that exists", MAP, "IIIIQQQ", FIXED | rights, ioas, 0, here, MIB, 0x1080000, refusable=True)
ioctl("unmap half of a mapping", UNMAP, "IIQQ", ioas, 0x1000000, MIB // 2, refusable=True)

print("leave, with both mappings still there")
