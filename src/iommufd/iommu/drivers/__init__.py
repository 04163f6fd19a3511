"""IOMMU drivers, one module or package per kind of hardware."""
