"""Answer a device's page faults in an asyncio program: map what it asks for, then let it go on.

Needs a test kernel (CONFIG_IOMMUFD_TEST), or: IOMMUFD_MACHINE=mock python examples/page_faults.py
"""

import asyncio
import mmap

import iommufd
from iommufd.testing.mock import APERTURE, READ, WRITE, MockDevice

PAGE = 4096


async def serve(queue: iommufd.FaultQueue, ioas: iommufd.IOAS, memory: mmap.mmap) -> None:
    """Every fault in the memory gets its page; others are refused."""
    async for group in queue:
        page = (group.address - APERTURE) // PAGE
        if 0 <= page < len(memory) // PAGE:
            ioas.map(memory, APERTURE + page * PAGE, PAGE, page * PAGE)
            group.respond()
            print(f"{group.address:#x} ({group.perm.name}): mapped page {page}")
        else:
            group.respond(group.INVALID)
            print(f"{group.address:#x}: refused")


async def main() -> None:
    with iommufd.open() as context:
        ioas, queue = context.alloc_ioas(), context.alloc_fault_queue()
        device = MockDevice(context, ioas)
        device.replace(ioas.alloc_hwpt(device, fault_queue=queue))

        with mmap.mmap(-1, 16 * PAGE) as memory:
            server = asyncio.create_task(serve(queue, ioas, memory))
            for address, perm in ((APERTURE, READ), (APERTURE + 5 * PAGE, WRITE), (0x7000_0000, READ)):
                device.trigger_fault(address, perm=perm, group=1)
                await asyncio.sleep(0.01)
            print(f"served: {ioas}")
            queue.close()  # the page table that reports into it goes first; the loop over the queue ends
            await server
            ioas.close()


asyncio.run(main())
