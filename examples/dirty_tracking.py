"""Find the pages a device has written, as live migration does: track, read, clear, read again.

Needs a test kernel (CONFIG_IOMMUFD_TEST), or: IOMMUFD_MACHINE=mock python examples/dirty_tracking.py
"""

import mmap

import iommufd
from iommufd.testing.mock import APERTURE, MockDevice, mark_dirty

PAGE, PAGES = 4096, 64

with iommufd.open() as context, context.alloc_ioas() as ioas:
    memory = mmap.mmap(-1, PAGES * PAGE)
    # page by page: neighbours in one mapping may be neighbours in memory and share an entry of the hardware's table
    mappings = ioas.map_many(
        [memoryview(memory)[i * PAGE : (i + 1) * PAGE] for i in range(PAGES)],
        [APERTURE + i * PAGE for i in range(PAGES)],
    )
    device = MockDevice(context, ioas)
    table = ioas.alloc_hwpt(device, dirty_tracking=True)
    device.replace(table)
    table.set_dirty_tracking(True)

    mark_dirty(table, APERTURE, [1, 5, 6, 7, 40])  # the device writes

    for iova, length in table.dirty_ranges(APERTURE, PAGES * PAGE, clear=False):
        print(f"dirty: [{iova:#x}, {iova + length - 1:#x}]")
    dirty = table.dirty_pages(APERTURE, PAGES * PAGE)  # a NumPy array of bool; reading cleans
    print(f"{dirty.sum()} of {dirty.size} pages are to be sent: {dirty.nonzero()[0].tolist()}")
    print(f"written since: {table.dirty_pages(APERTURE, PAGES * PAGE).sum()}")
    print(f"{len(mappings)} mappings go with {ioas}")
