"""Features read piece by piece, centred and scaled once for all that k-means does with them.

k-means does not change when all features move or grow alike, but its arithmetic does: the usual
``|x|^2 - 2 x c + |c|^2`` loses the distances where the features have a large common offset, and overflows or
underflows where they are very large or small.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hrem_layers._core.checks import DTYPES, describe
from hrem_layers.sampler.arrays import Ints

Features = npt.NDArray[np.floating[Any]] | Tensor
Floats = npt.NDArray[np.floating[Any]]
Precision = type[np.float32] | type[np.float64]

_CHUNK_BYTES = 2**25


def check_features(image_features: object) -> tuple[int, int]:
    """Images and dimensions of features that :func:`hrem_layers.sampler.clustering.cluster_features` takes."""
    wanted = "image_features must be a floating-point numpy array or CPU tensor of shape (images, dimensions)"
    if isinstance(image_features, Tensor):
        said = describe(image_features)
        floating = image_features.dtype in DTYPES and not image_features.is_quantized
        if image_features.is_nested or image_features.device.type != "cpu" or image_features.layout != torch.strided:
            raise ValueError(f"{wanted}, got {said}")
    elif isinstance(image_features, np.ndarray) and not isinstance(image_features, np.ma.MaskedArray):
        said = f"shape {image_features.shape}, {image_features.dtype}"
        floating = image_features.dtype.kind == "f"
    else:
        raise TypeError(f"{wanted}, got {type(image_features).__name__}")
    if not floating:
        raise TypeError(f"{wanted}, got {said}")
    if image_features.ndim != 2 or 0 in image_features.shape:
        raise ValueError(f"{wanted}, neither of them 0, got {said}")
    images, dimensions = image_features.shape
    return int(images), int(dimensions)


@dataclass(frozen=True)
class CentredFeatures:
    """Features minus their mean, times a power of two that brings the largest to between 0.5 and 1."""

    features: Features  # (images, dimensions)
    mean: npt.NDArray[np.float64]  # (dimensions,)
    scale: float

    @classmethod
    def of(cls, features: Features) -> CentredFeatures:
        """Reads them once.

        Raises:
            ValueError: if one is NaN or infinite as float32; names its row.
        """
        images, dimensions = features.shape
        total = np.zeros(dimensions)
        lowest, highest = np.full(dimensions, np.inf), np.full(dimensions, -np.inf)
        for low, high in _pieces(images, dimensions):
            rows = _read(features, slice(low, high))
            _check_finite(rows, low)
            total += rows.sum(axis=0, dtype=np.float64)
            lowest, highest = np.minimum(lowest, rows.min(axis=0)), np.maximum(highest, rows.max(axis=0))
        mean = np.clip(total / images, lowest, highest)  # of equal values exactly that value
        largest = float(np.maximum(highest - mean, mean - lowest).max())
        exponent = max(int(np.frexp(largest)[1]), -1000)  # beyond that, the power of two would be infinite
        return cls(features, mean, float(np.ldexp(1.0, -exponent)))

    @property
    def images(self) -> int:
        return int(self.features.shape[0])

    @property
    def dimensions(self) -> int:
        return int(self.features.shape[1])

    def rows(self, which: Ints, precision: Precision) -> Floats:
        """(len(which), dimensions)."""
        taken = np.empty((len(which), self.dimensions), precision)
        for low, high in _pieces(len(which), self.dimensions):
            taken[low:high] = self._centred(which[low:high])
        return taken

    def chunks(self, precision: Precision) -> Iterator[tuple[slice, Floats]]:
        """All rows, in order, a chunk at a time, and which rows these are."""
        for low, high in _pieces(self.images, self.dimensions):
            yield slice(low, high), self._centred(slice(low, high)).astype(precision, copy=False)

    def _centred(self, which: slice | Ints) -> npt.NDArray[np.float64]:
        rows = np.subtract(_read(self.features, which), self.mean, dtype=np.float64)
        rows *= self.scale
        return rows


def _pieces(rows: int, dimensions: int) -> Iterator[tuple[int, int]]:
    number = max(_CHUNK_BYTES // (4 * dimensions), 1)
    for low in range(0, rows, number):
        yield low, min(low + number, rows)


def _read(features: Features, which: slice | Ints) -> Floats:
    if not isinstance(features, Tensor):
        return np.asarray(features[which])
    rows = features.detach()[which if isinstance(which, slice) else torch.from_numpy(which)]
    return rows.numpy() if rows.dtype in (torch.float32, torch.float64) else rows.float().numpy()


def _check_finite(rows: Floats, first: int) -> None:
    bad = ~(np.abs(rows) <= np.finfo(np.float32).max).all(axis=1)  # NaN compares as False
    if bad.any():
        raise ValueError(
            "image_features must be finite as float32, got NaN, inf or too large a value in row "
            f"{first + int(np.argmax(bad))}"
        )
