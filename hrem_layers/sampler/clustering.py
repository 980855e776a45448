"""k-means of image features, for NeighborBatchSampler: scikit-learn's, on a sample, then in chunks on the rest."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from hrem_layers._core.checks import check_int
from hrem_layers.sampler.arrays import Keys, random_keys, sort_by
from hrem_layers.sampler.features import CentredFeatures, Features, Floats, check_features
from hrem_layers.sampler.seeding import plus_plus

_SAMPLE_BYTES = 2**28
# The start is chosen from so many means of rows: 3 per cluster and 100 more, each of 5 rows or so.
_MEANS_PER_CLUSTER, _MORE_MEANS, _ROWS_PER_MEAN = 3, 100, 5
_ITERATIONS_TO_MEANS, _ITERATIONS_ON_MEANS = 2, 5
_BEFORE_MOVING = 3  # Lloyd's iterations until small clusters show
_SMALL = 0.25  # of the mean number of rows
_SPLIT_ITERATIONS = 3
_AT_ONE_TIME = 2**22  # distances held
_ROUNDING = 1e3  # how many times the rounding of float32 a mean squared distance must be


def cluster_features(
    image_features: Features,
    num_clusters: int,
    *,
    seed: int = 0,
    sample_per_cluster: int = 256,
    max_iter: int = 10,
) -> npt.NDArray[np.int64]:
    """k-means labels of image features, shape (images,), values in ``[0, num_clusters)``.

    The centres are fitted by ``sklearn.cluster.KMeans`` on a random sample of at most ``sample_per_cluster`` rows per
    cluster, and of no more than 256 MiB as float32 or a quarter of the rows, whichever is more; then every row gets the
    label of its nearest centre, 32 MiB at a time. So the features may be a memory-mapped file larger than the memory;
    they are read three times (once to look for NaN and for their mean) and, unless they are smaller than the sample may
    be, never copied whole. Distances are Euclidean: for cosine neighbourhoods give L2-normalised features. A cluster
    may end up without images.

    *The start.* k-means++ on the rows themselves is slow and takes outliers for clusters. Here some three times as many
    centres as are wanted are drawn from the rows and moved by a few of Lloyd's iterations, to means of a few rows each;
    weighted k-means++ and k-means on these choose the start, from which Lloyd's iterations go on with all rows of the
    sample.

    *Small clusters.* After three iterations centres with few rows, less than a quarter of the mean number, are moved
    into clusters that are worth splitting, where that lowers the sum of squared distances. Lloyd's iterations alone
    hardly ever do so: a centre that has few rows is long, and repels others.

    *Precision.* The mean is taken away and a power of two brings the largest value near 1, in float64 and once for all
    steps, so that neither a common offset nor the scale matters; the rest is done in float32. Where the mean squared
    distance of a row to its centre is so small against the rows' norm that float32 would blur it (one feature far
    larger than the others, or clusters far smaller than their distances), it is done again in float64, in
    twice the memory.

    *Duplicates.* Equal rows get equal labels. With no more different rows in the sample than ``num_clusters``, each of
    them is a cluster; the others are empty.

    The fit runs on one thread, because the order in which threads add up is left to chance: the same features and
    seed give the same labels again on the same machine. Other processors may round differently; where ranks must
    agree, compute the labels once.

    Args:
        image_features: floating-point numpy array (``np.memmap`` too) or CPU tensor of shape (images, dimensions).
        num_clusters: 1 .. images.
        seed: at least 0, below 2^128.
        sample_per_cluster: rows per cluster to fit on, at least 1.
        max_iter: most iterations of Lloyd's algorithm, at least 1; it ends earlier when the centres stand still.

    Raises:
        TypeError, ValueError: for anything else, and for features that are NaN or infinite as float32.

    Warns:
        UserWarning: if the sample has fewer different rows than ``num_clusters``.

    Example:
        >>> import numpy as np
        >>> from hrem_layers.sampler.clustering import cluster_features
        >>> features = np.array([[0.0, 1.0], [9.0, 9.0], [0.1, 1.0], [9.0, 9.1]])
        >>> labels = cluster_features(features, num_clusters=2)
        >>> bool(labels[0] == labels[2]), bool(labels[1] == labels[3]), bool(labels[0] == labels[1])
        (True, True, False)
    """
    images, dimensions = check_features(image_features)
    number = check_num_clusters(num_clusters, images)
    draw = random_keys(check_seed(seed), 0)
    per_cluster = check_int("sample_per_cluster", sample_per_cluster, minimum=1)
    iterations = check_int("max_iter", max_iter, minimum=1, maximum=2**31 - 1)
    features = CentredFeatures.of(image_features)

    from threadpoolctl import threadpool_limits

    most = max(_SAMPLE_BYTES // (4 * dimensions), images // 4, number)
    chosen = np.sort(sort_by([], draw(images))[: min(per_cluster * number, most)])
    keys = draw(len(chosen) + 1)
    with threadpool_limits(limits=1):
        means = _fit(features.rows(chosen, np.float32), number, iterations, keys)
        if means is None:
            means = _fit(features.rows(chosen, np.float64), number, iterations, keys)
    if len(chosen) == images:
        return means.labels_.astype(np.int64)  # type: ignore[no-any-return]
    labels = np.empty(images, np.int64)
    for rows, chunk in features.chunks(means.cluster_centers_.dtype.type):
        labels[rows] = means.predict(chunk)
    return labels


def check_seed(seed: object) -> int:
    """An int in [0, 2^128): what numpy's SeedSequence tells apart."""
    return check_int("seed", seed, minimum=0, maximum=2**128 - 1)


def check_num_clusters(num_clusters: object, images: int) -> int:
    number = check_int("num_clusters", num_clusters, minimum=1)
    if number > images:
        raise ValueError(f"num_clusters must be at most the number of images, {images}, got {number}")
    return number


def _fit(rows: Floats, number: int, iterations: int, keys: Keys) -> Any:
    """A fitted ``sklearn.cluster.KMeans``; None if the rows are float32 and should be float64.

    ``keys`` are one random number for each row and one more. The rows may change by their rounding.
    """
    start = _start(rows, number, keys)
    norms = float(np.vdot(rows, rows))
    means = _k_means(rows, start, min(iterations, _BEFORE_MOVING))
    if iterations > _BEFORE_MOVING:
        moved = move_small(rows, means.labels_, means.cluster_centers_)
        if means.n_iter_ == _BEFORE_MOVING or not np.array_equal(moved, means.cluster_centers_):
            means = _k_means(rows, moved, iterations - _BEFORE_MOVING)
    if rows.dtype == np.float32 and means.inertia_ <= _ROUNDING * np.finfo(np.float32).eps * norms:
        return None
    if len(np.unique(means.labels_)) == number:
        return means
    different = np.unique(rows, axis=0)
    if len(different) > number:
        return means
    if len(different) < number:
        warnings.warn(
            f"image_features has {len(different)} different rows (of those looked at) and num_clusters is {number}: "
            f"{number - len(different)} clusters stay empty",
            stacklevel=3,
        )
    return _k_means(rows, different, 1)


def _start(rows: Floats, number: int, keys: Keys) -> Floats:
    """``number`` rows or means of rows to begin from."""
    weights = None
    number_of_means = _MEANS_PER_CLUSTER * number + _MORE_MEANS
    if len(rows) > number_of_means:
        some = rows[sort_by([], keys[:-1])[: _ROWS_PER_MEAN * number_of_means]]
        over = _k_means(some, some[:number_of_means], _ITERATIONS_TO_MEANS)
        rows, weights = over.cluster_centers_, np.bincount(over.labels_, minlength=number_of_means).astype(rows.dtype)
    state = int(keys[-1] >> np.uint64(32))
    chosen = rows[plus_plus(rows, number, weights, state)]
    return _k_means(rows.copy(), chosen, _ITERATIONS_ON_MEANS, weights).cluster_centers_  # type: ignore[no-any-return]


def move_small(rows: Floats, labels: npt.NDArray[np.integer[Any]], centres: Floats) -> Floats:
    """The centres (k, D), of which those with few rows stand in the clusters that gain most by being split.

    The cheapest to do without comes first: its rows go to the nearest of the other centres. It goes on while the sum
    of squared distances falls. A far cluster that is small keeps its centre.
    """
    sizes = np.bincount(labels, minlength=len(centres))
    small = np.flatnonzero(sizes < _SMALL * len(rows) / len(centres))
    if not 0 < len(small) < len(centres):
        return centres
    of = np.split(np.argsort(labels, kind="stable"), np.cumsum(sizes)[:-1])  # row numbers, cluster by cluster
    others = np.setdiff1d(np.arange(len(centres)), small)
    costs = _costs_without(rows, [of[i] for i in small], centres[small], centres[others])
    squares = np.bincount(labels, np.einsum("nd,nd->n", rows, rows), minlength=len(centres))
    spread = (squares - sizes * np.square(centres).sum(1))[others]
    moved, cheapest, widest = centres.copy(), np.argsort(costs, kind="stable"), np.argsort(-spread, kind="stable")
    for i, j in zip(cheapest, others[widest], strict=False):
        halves, gain = _split(rows[of[j]])
        if gain > costs[i]:
            moved[small[i]], moved[j] = halves
    return moved


def _costs_without(rows: Floats, of: list[npt.NDArray[np.intp]], own: Floats, others: Floats) -> Floats:
    """How much farther, squared and summed, the rows that ``of`` names, cluster by cluster, are from the nearest of
    ``others`` (k, D) than from the centre of their ``own``."""
    numbers, cluster = np.concatenate(of), np.repeat(np.arange(len(of)), [len(rows_of) for rows_of in of])
    lengths, costs = np.square(others).sum(1), np.zeros(len(of))
    for start in range(0, len(numbers), most := max(1, _AT_ONE_TIME // len(others))):
        here = cluster[start : start + most]
        some, centre = rows[numbers[start : start + most]], own[here]
        nearest = (lengths - 2 * some @ others.T).min(1)
        farther = nearest - (np.square(centre) - 2 * some * centre).sum(1)
        costs += np.bincount(here, farther, minlength=len(of))
    return costs


def _split(rows: Floats) -> tuple[Floats, float]:
    """Two means of rows (n, D), (2, D), and by how much they are nearer to the rows, squared and summed, than one."""
    centre = rows.mean(0)
    rows = rows - centre
    halves = np.stack([rows[np.square(rows).sum(1).argmax()], np.zeros_like(centre)])
    halves[1] = -halves[0]
    for _ in range(_SPLIT_ITERATIONS):
        first = rows @ (halves[0] - halves[1]) > (np.square(halves[0]).sum() - np.square(halves[1]).sum()) / 2
        if first.all() or not first.any():
            return np.stack([centre, centre]), 0.0
        halves = np.stack([rows[first].mean(0), rows[~first].mean(0)])
    sizes = np.array([first.sum(), (~first).sum()])
    return centre + halves, float((sizes * np.square(halves).sum(1)).sum())


def _k_means(rows: Floats, start: Floats, iterations: int, weights: Floats | None = None) -> Any:
    """``sklearn.cluster.KMeans``, fitted on one thread."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    means = KMeans(len(start), init=start, n_init=1, max_iter=iterations, copy_x=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of equal rows
        return means.fit(rows, sample_weight=weights)
