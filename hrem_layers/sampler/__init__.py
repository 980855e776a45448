"""Batches of neighbourhoods: clusters of similar images, and captions drawn from them."""

from hrem_layers.sampler.neighbor import NeighborBatchSampler

__all__ = ["NeighborBatchSampler"]
