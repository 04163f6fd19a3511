"""The client: one typed API over the kernel's ``/dev/iommu`` and the software one.

It knows the uAPI and the eight calls of a backend, and nothing of the engine. ``iommufd`` exports its names.
"""
