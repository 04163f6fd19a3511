"""Map a NumPy array for DMA, read its IOVA, unmap it.

Uses /dev/iommu if this system has one; elsewhere: IOMMUFD_BACKEND=software python examples/map_numpy.py
"""

import numpy as np

import iommufd

array = np.arange(1024, dtype=np.uint64)

with iommufd.open() as context, context.alloc_ioas() as ioas:
    mapping = ioas.map(array)
    print(f"a device sees the array's {array.nbytes} bytes at IOVA {mapping.iova:#x}")
    mapping.unmap()
    print(f"unmapped: {mapping}")
