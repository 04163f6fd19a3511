"""``linux/iommufd.h`` of Linux 7.3: every struct, enum and ioctl number, under the C names.

One module per family of objects; import everything from here. Each constant exists twice: as an int under its
full C name (``IOMMU_IOAS_MAP_READABLE``, for fast tests) and as a member, without the common prefix, of the enum the
header declares it in (``iommufd_ioas_map_flags.READABLE``, for showing).
"""

# ruff: noqa: F403 - a package stands for one C header: whatever its modules declare is imported from here

from iommufd.uapi.iommufd.dirty import *
from iommufd.uapi.iommufd.faults import *
from iommufd.uapi.iommufd.hw_info import *
from iommufd.uapi.iommufd.hwpt import *
from iommufd.uapi.iommufd.ioas import *
from iommufd.uapi.iommufd.numbers import *
from iommufd.uapi.iommufd.viommu import *
