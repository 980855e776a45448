"""What NeighborBatchSampler's epochs have in common: the captions of each image and the cluster of each image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hrem_layers.sampler.arrays import Ints


@dataclass(frozen=True)
class Layout:
    """What stays the same from epoch to epoch: the captions of each image and the cluster of each image."""

    counts: Ints  # (images,) captions of each image
    offsets: Ints  # (images + 1,) first caption of each image
    labels: Ints  # (images,) cluster of each image, 0 .. clusters - 1, none empty
    clusters: int

    @classmethod
    def build(cls, counts: Ints, cluster_ids: Ints) -> Layout:
        if cluster_ids.max() < 2 * len(cluster_ids):  # quicker than sorting
            present = np.bincount(cluster_ids) > 0
            labels, clusters = (np.cumsum(present) - 1)[cluster_ids], int(present.sum())
        else:
            names, labels = np.unique(cluster_ids, return_inverse=True)
            clusters = len(names)
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return cls(counts.astype(np.int64), offsets, labels.astype(np.int64).reshape(-1), clusters)

    @property
    def captions(self) -> int:
        return int(self.offsets[-1])

    def image_of(self, captions: npt.NDArray[Any]) -> Ints:
        return np.searchsorted(self.offsets, captions, side="right") - 1
