"""``linux/iommufd.h`` of Linux 7.3: every struct, enum and ioctl number, under the C names.

One module per family of objects; import everything from here. Each constant exists twice: as an int under its
full C name (``IOMMU_IOAS_MAP_READABLE``, for fast tests) and as a member, without the common prefix, of the enum the
header declares it in (``iommufd_ioas_map_flags.READABLE``, for showing).
"""

from iommufd.uapi.iommufd.dirty import *  # noqa: F403
from iommufd.uapi.iommufd.faults import *  # noqa: F403
from iommufd.uapi.iommufd.hw_info import *  # noqa: F403
from iommufd.uapi.iommufd.hwpt import *  # noqa: F403
from iommufd.uapi.iommufd.ioas import *  # noqa: F403
from iommufd.uapi.iommufd.numbers import *  # noqa: F403
from iommufd.uapi.iommufd.viommu import *  # noqa: F403
