"""Share memory: one memfd in two address spaces, and a copy that outlives its original.

Needs a test kernel (CONFIG_IOMMUFD_TEST), or: IOMMUFD_MACHINE=mock python examples/share_memory.py
"""

import mmap
import os

import iommufd
from iommufd.testing.mock import MockAccess

MIB = 1 << 20

fd = os.memfd_create("shared")
os.ftruncate(fd, 4 * MIB)
memory = mmap.mmap(fd, 4 * MIB)

with iommufd.open() as context:
    sender, receiver = context.alloc_ioas(), context.alloc_ioas()

    # the file itself is mapped, so another process that has it may do the mapping, and this one may end
    whole = sender.map_file(fd, length=4 * MIB)
    os.close(fd)
    half = receiver.map(memory, offset=2 * MIB, writeable=False)
    print(f"{whole}\n{half}")

    with MockAccess(sender) as writes, MockAccess(receiver) as reads:
        writes.write(whole.iova + 2 * MIB, b"through one space, ")
        memory[2 * MIB + 19 : 2 * MIB + 38] = b"and by the program."
        print(f"the receiver reads {reads.read(half.iova, 38)!r}")
        try:
            reads.write(half, b"no")
        except PermissionError as error:
            print(f"it may not write: {error.strerror}")

    # a copy shares the pages: they are pinned and charged once, however many spaces have them
    copy = sender.copy_to(receiver, whole.iova, MIB, to=0x1000_0000)
    sender.close()
    with MockAccess(receiver) as reads:
        memory[:10] = b"still here"
        print(f"{copy} outlives its origin: {reads.read(copy.iova, 10)!r}")
