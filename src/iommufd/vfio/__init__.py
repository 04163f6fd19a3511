"""VFIO: device files, groups, and PCI functions behind them, as programs see them through iommufd."""
