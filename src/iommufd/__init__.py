"""Linux's IOMMU user API, complete in user space."""

__version__ = "0.1.0"
