"""Frames: the identity of physical pages, without a list of pages anywhere.

A *chunk* is a run of frames that came into being together (one VMA at its first pin, one stretch of a file, one
dma-buf). It has an *order*: ``1 << order`` frames form a physically contiguous, naturally aligned block, and frames of
different blocks are never adjacent, so hardware formats cannot see contiguity that is not there. An *extent* is a
slice of a chunk; whatever is pinned or mapped is a short tuple of extents, so 1 TiB costs what 4 KiB costs.
"""
