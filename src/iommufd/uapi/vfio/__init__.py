"""``linux/vfio.h`` of Linux 7.3, as far as iommufd and PCI devices under it serve it, under the C names.

Left out: SPAPR and EEH, CCW, AP, zPCI, NVLink, graphics planes and the withdrawn migration protocol v1. What came
before 6.2, the first release with iommufd, is marked as of 6.2, because no earlier release is ever imitated. The
header names its flags by ``#define`` only; the names of the IntFlag classes are ours.
"""

# ruff: noqa: F403 - a package stands for one C header: whatever its modules declare is imported from here

from iommufd.uapi.vfio.cdev import *
from iommufd.uapi.vfio.container import *
from iommufd.uapi.vfio.device import *
from iommufd.uapi.vfio.feature import *
from iommufd.uapi.vfio.group import *
from iommufd.uapi.vfio.numbers import *
