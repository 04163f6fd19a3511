"""The generic IOMMU layer: what drivers implement, and the state it keeps for all of them."""
