"""The software backend: an in-process machine behind the eight calls."""

from iommufd.client.backends.software.backend import SoftwareBackend, SoftwareError

__all__ = ["SoftwareBackend", "SoftwareError"]
