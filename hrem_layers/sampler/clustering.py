"""k-means of image features, for NeighborBatchSampler: scikit-learn's, on a sample, then in chunks on the rest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hrem_layers._core.checks import check_int
from hrem_layers.sampler.arrays import random_keys, sort_by

Features = npt.NDArray[np.floating[Any]] | Tensor

_SAMPLE_BYTES = 2**28
_CHUNK_BYTES = 2**25
_INIT_PER_CLUSTER = 20


def cluster_features(
    image_features: Features,
    num_clusters: int,
    *,
    seed: int = 0,
    sample_per_cluster: int = 256,
    max_iter: int = 50,
) -> npt.NDArray[np.int64]:
    """k-means labels of image features, shape (images,), values in ``[0, num_clusters)``.

    The centres are fitted by ``sklearn.cluster.KMeans`` (k-means++ start, Lloyd's iterations) on a random sample of
    at most ``sample_per_cluster`` rows a cluster, and of no more than 256 MiB as float32 or a quarter of the rows,
    whichever is more; then every row gets the label of its nearest centre, 32 MiB at a time. So the features may be a
    memory-mapped file larger than the memory; they are read twice (once to look for NaN) and, unless they are smaller
    than the sample may be, never copied whole. Distances are Euclidean, on the features as they are: for cosine
    neighbourhoods give L2-normalised ones. A cluster may end up without images.

    The fit runs on one thread, because the order in which threads add up is left to chance: the same features and
    seed give the same labels again on the same machine. Other processors may round differently; where ranks must
    agree, compute the labels once.

    Args:
        image_features: floating-point numpy array (``np.memmap`` too) or CPU tensor of shape (images, dimensions).
        num_clusters: 1 .. images.
        seed: at least 0.
        sample_per_cluster: rows a cluster to fit on, at least 1.
        max_iter: most iterations of Lloyd's algorithm, at least 1; it ends earlier when the centres stand still.

    Raises:
        TypeError, ValueError: for anything else, and for features that are NaN or infinite as float32.
    """
    images, dimensions = check_features(image_features)
    check_int("num_clusters", num_clusters, minimum=1)
    check_int("seed", seed, minimum=0)
    check_int("sample_per_cluster", sample_per_cluster, minimum=1)
    check_int("max_iter", max_iter, minimum=1)
    if num_clusters > images:
        raise ValueError(f"num_clusters must be at most the number of images, {images}, got {num_clusters}")
    for start, chunk in _chunks(image_features):
        bad = np.flatnonzero(~np.isfinite(chunk).all(axis=1))
        if len(bad):
            raise ValueError(
                f"image_features must be finite as float32, got NaN, inf or too large a value in row {start + bad[0]}"
            )

    from sklearn.cluster import KMeans, kmeans_plusplus
    from threadpoolctl import threadpool_limits

    draw = random_keys(seed, 0)
    most = max(_SAMPLE_BYTES // (4 * dimensions), images // 4, num_clusters)
    chosen = sort_by([], draw(images))[: min(sample_per_cluster * num_clusters, most)]
    sample = _rows(image_features, np.sort(chosen))
    for_init = sort_by([], draw(len(sample)))[: _INIT_PER_CLUSTER * num_clusters]
    state = int(draw(1)[0] >> np.uint64(32))
    with threadpool_limits(limits=1):
        centres, _ = kmeans_plusplus(sample[for_init], num_clusters, random_state=state)
        means = KMeans(num_clusters, init=centres, n_init=1, max_iter=max_iter, copy_x=False, random_state=state)
        means.fit(sample)
    del sample
    labels = np.empty(images, np.int64)
    for start, chunk in _chunks(image_features):
        labels[start : start + len(chunk)] = means.predict(chunk)
    return labels


def check_seed(seed: object) -> int:
    """An int in [0, 2^128): what numpy's SeedSequence tells apart."""
    return check_int("seed", seed, minimum=0, maximum=2**128 - 1)


def check_num_clusters(num_clusters: object, images: int) -> int:
    number = check_int("num_clusters", num_clusters, minimum=1)
    if number > images:
        raise ValueError(f"num_clusters must be at most the number of images, {images}, got {number}")
    return number


def check_features(image_features: object) -> tuple[int, int]:
    """Images and dimensions of features that :func:`cluster_features` takes."""
    wanted = "image_features must be a floating-point numpy array or CPU tensor of shape (images, dimensions)"
    if isinstance(image_features, Tensor):
        said = f"shape {tuple(image_features.shape)}, {image_features.dtype}, {image_features.device}"
        floating = image_features.dtype.is_floating_point
        if image_features.device.type != "cpu" or image_features.layout != torch.strided:
            raise ValueError(f"{wanted}, got {said}, {image_features.layout}")
    elif isinstance(image_features, np.ndarray):
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


def _chunks(features: Features) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    images, dimensions = features.shape
    rows = max(_CHUNK_BYTES // (4 * dimensions), 1)
    for start in range(0, images, rows):
        yield start, _rows(features, slice(start, start + rows))


def _rows(features: Features, which: slice | npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    if isinstance(features, Tensor):
        taken = features.detach()[which if isinstance(which, slice) else torch.from_numpy(which)]
        return np.ascontiguousarray(taken.to(torch.float32).numpy())
    with np.errstate(over="ignore"):  # what becomes infinite is reported by row
        return np.ascontiguousarray(features[which], dtype=np.float32)
