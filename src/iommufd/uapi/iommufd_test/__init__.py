"""``iommufd_test.h``: the command of kernels built with CONFIG_IOMMUFD_TEST, and what its mock hardware exchanges.

Layout and values: mock device chapter, section 1. Import everything from here.
"""

# ruff: noqa: F403 - a package stands for one C header: whatever its modules declare is imported from here

from iommufd.uapi.iommufd_test.command import *
from iommufd.uapi.iommufd_test.hardware import *
