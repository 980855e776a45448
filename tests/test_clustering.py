"""k-means of features: right labels, for arrays, tensors and mapped files, in little memory, the same every time."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from hrem_layers.sampler import clustering
from hrem_layers.sampler.clustering import cluster_features


def blobs(images: int, clusters: int, dimensions: int = 8, dtype: object = np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Features around well-separated centres, and which centre."""
    random = np.random.default_rng(0)
    centres = 20 * random.standard_normal((clusters, dimensions))
    which = random.integers(0, clusters, images)
    return (centres[which] + random.standard_normal((images, dimensions))).astype(dtype), which


def same_partition(labels: np.ndarray, expected: np.ndarray) -> bool:
    pairs = len(set(zip(labels.tolist(), expected.tolist(), strict=True)))
    return pairs == len(set(labels.tolist())) == len(set(expected.tolist()))


def test_finds_the_clusters() -> None:
    features, which = blobs(600, 12)
    labels = cluster_features(features, 12)
    assert labels.shape == (600,) and labels.dtype == np.int64
    assert same_partition(labels, which)
    assert set(labels.tolist()) == set(range(12))


def test_every_row_has_its_nearest_centre(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when fitted on a sample and assigned in chunks that do not divide the rows."""
    monkeypatch.setattr(clustering, "_CHUNK_BYTES", 4 * 8 * 37)
    features = np.random.default_rng(1).standard_normal((500, 8)).astype(np.float32)
    labels = cluster_features(features, 10, sample_per_cluster=15)
    kept: dict[str, np.ndarray] = {}

    import sklearn.cluster

    class Watched(sklearn.cluster.KMeans):
        def fit(self, sample: np.ndarray) -> Watched:
            kept["sample"] = sample.copy()
            super().fit(sample)
            kept["centres"] = self.cluster_centers_
            return self

    monkeypatch.setattr(sklearn.cluster, "KMeans", Watched)
    assert np.array_equal(cluster_features(features, 10, sample_per_cluster=15), labels)
    assert kept["sample"].shape == (150, 8)
    rows = {row.tobytes() for row in features}
    assert len({row.tobytes() for row in kept["sample"]} & rows) == 150, "different rows, unchanged"
    distance = ((features[:, None] - kept["centres"]) ** 2).sum(-1)
    assert np.array_equal(labels, distance.argmin(1))
    one_go = cluster_features(features, 10, sample_per_cluster=15)
    assert np.array_equal(one_go, labels)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_arrays_tensors_and_mapped_files_give_the_same(dtype: type, tmp_path: Path) -> None:
    features, _ = blobs(300, 6, dtype=dtype)
    expected = cluster_features(features.astype(np.float32), 6)
    np.save(tmp_path / "features.npy", features)
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    assert isinstance(mapped, np.memmap)
    wide = np.repeat(features, 2, axis=1)[:, ::2]  # not contiguous
    swapped = features.astype(features.dtype.newbyteorder())
    for given in (features, mapped, torch.from_numpy(features.copy()), wide, swapped):
        before = given.clone() if isinstance(given, torch.Tensor) else np.array(given)
        assert np.array_equal(cluster_features(given, 6), expected)
        after = torch.equal(given, before) if isinstance(given, torch.Tensor) else np.array_equal(given, before)
        assert after, "the features were changed"


def test_tensors_with_gradient_and_bfloat16() -> None:
    features, which = blobs(300, 6)
    for tensor in (torch.from_numpy(features).requires_grad_(), torch.from_numpy(features).bfloat16()):
        assert same_partition(cluster_features(tensor, 6), which)


def test_hangs_on_features_and_seed_only() -> None:
    features = np.random.default_rng(2).standard_normal((400, 8)).astype(np.float32)
    labels = cluster_features(features, 20, seed=3)
    np.random.seed(5)
    torch.manual_seed(5)
    assert np.array_equal(cluster_features(features, 20, seed=3), labels)
    assert not np.array_equal(cluster_features(features, 20, seed=4), labels)
    assert len(cluster_features(features, 20, seed=2**80)) == 400


def test_the_fit_runs_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    import sklearn.cluster
    from threadpoolctl import threadpool_info, threadpool_limits

    threads: list[int] = []

    class Watched(sklearn.cluster.KMeans):
        def fit(self, sample: np.ndarray) -> Watched:
            threads.extend(pool["num_threads"] for pool in threadpool_info())
            return super().fit(sample)

    monkeypatch.setattr(sklearn.cluster, "KMeans", Watched)
    with threadpool_limits(limits=2):
        cluster_features(blobs(100, 4)[0], 4)
        assert {pool["num_threads"] for pool in threadpool_info()} == {2}, "set back afterwards"
    assert threads and set(threads) == {1}


@pytest.mark.parametrize("mapped", [False, True])
def test_features_are_never_copied_whole(mapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustering, "_CHUNK_BYTES", 2**20)
    monkeypatch.setattr(clustering, "_SAMPLE_BYTES", 2**20)
    features, which = blobs(40000, 20, 128)
    if mapped:
        np.save(tmp_path / "features.npy", features)
        features = np.load(tmp_path / "features.npy", mmap_mode="r")
    cluster_features(features[:100], 4)  # imports
    tracemalloc.start()
    try:
        labels = cluster_features(features, 20)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert same_partition(labels, which)
    assert peak < features.nbytes / 2, f"{peak / 2**20:.0f} MiB for {features.nbytes / 2**20:.0f} MiB of features"


def test_no_more_rows_are_sampled_than_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import sklearn.cluster

    sizes: list[int] = []

    class Watched(sklearn.cluster.KMeans):
        def fit(self, sample: np.ndarray) -> Watched:
            sizes.append(len(sample))
            return super().fit(sample)

    monkeypatch.setattr(sklearn.cluster, "KMeans", Watched)
    features, _ = blobs(1200, 10)
    cluster_features(features, 2)  # 256 rows a cluster
    cluster_features(features, 10)  # all
    monkeypatch.setattr(clustering, "_SAMPLE_BYTES", 4 * 8 * 400)
    cluster_features(features, 10)  # so many bytes
    monkeypatch.setattr(clustering, "_SAMPLE_BYTES", 4 * 8 * 200)
    cluster_features(features, 10)  # a quarter
    cluster_features(features, 500)  # but a row for each centre
    assert sizes == [512, 1200, 400, 300, 500]


def test_scikit_learn_is_imported_when_used() -> None:
    program = (
        "import sys, numpy, hrem_layers, hrem_layers.sampler, hrem_layers.sampler.clustering as c\n"
        "loaded = [name for name in ('sklearn', 'scipy', 'threadpoolctl') if name in sys.modules]\n"
        "assert not loaded, loaded\n"
        "hrem_layers.NeighborBatchSampler(cluster_ids=[0, 0], clusters_per_batch=1, images_per_cluster=2)\n"
        "assert 'sklearn' not in sys.modules\n"
        "c.cluster_features(numpy.eye(4), 2)\n"
        "assert 'sklearn' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.parametrize(
    ("features", "error", "match"),
    [
        ([[0.0]], TypeError, r"image_features must be a floating-point numpy array or CPU tensor .* got list"),
        (np.zeros((3, 2), int), TypeError, r"image_features must be .* got shape \(3, 2\), int64"),
        (torch.zeros(3, 2, dtype=torch.int8), TypeError, r"image_features must be .* got shape \(3, 2\), torch.int8"),
        (np.zeros((3, 2), complex), TypeError, "image_features must be .* complex128"),
        (np.zeros(3), ValueError, r"image_features must be .* got shape \(3,\)"),
        (torch.zeros(3, 2, 2), ValueError, r"image_features must be .* got shape \(3, 2, 2\)"),
        (np.zeros((0, 2)), ValueError, r"image_features must be .* neither of them 0, got shape \(0, 2\)"),
        (np.zeros((3, 0)), ValueError, r"image_features must be .* neither of them 0, got shape \(3, 0\)"),
        (torch.zeros(3, 2, device="meta"), ValueError, "image_features must be .* got .* meta"),
        (torch.eye(3).to_sparse(), ValueError, "image_features must be .* got .* torch.sparse_coo"),
    ],
)
def test_bad_features(features: object, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        cluster_features(features, 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39])
@pytest.mark.parametrize("tensor", [False, True])
def test_values_that_are_not_finite_are_named(bad: float, tensor: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustering, "_CHUNK_BYTES", 4 * 2 * 3)
    features = np.zeros((10, 2))
    features[7, 1] = features[9, 0] = bad
    with pytest.raises(ValueError, match=r"image_features must be finite as float32, got .* in row 7$"):
        cluster_features(torch.from_numpy(features) if tensor else features, 2)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_clusters": 0}, "num_clusters must be at least 1, got 0"),
        ({"num_clusters": 11}, "num_clusters must be at most the number of images, 10, got 11"),
        ({"num_clusters": 2.0}, "num_clusters must be an int"),
        ({"num_clusters": 2, "seed": -1}, "seed must be at least 0, got -1"),
        ({"num_clusters": 2, "sample_per_cluster": 0}, "sample_per_cluster must be at least 1, got 0"),
        ({"num_clusters": 2, "max_iter": 0}, "max_iter must be at least 1, got 0"),
    ],
)
def test_bad_options(options: dict, match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        cluster_features(np.zeros((10, 2)), **options)
