"""What Python programs import: one typed API over a real or a software /dev/iommu."""
