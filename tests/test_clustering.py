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
from hrem_layers.sampler import features as features_module
from hrem_layers.sampler.clustering import cluster_features
from hrem_layers.sampler.features import CentredFeatures


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
    monkeypatch.setattr(features_module, "_CHUNK_BYTES", 4 * 8 * 37)
    features = np.random.default_rng(1).standard_normal((500, 8)).astype(np.float32)
    labels = cluster_features(features, 10, sample_per_cluster=15)
    kept: dict[str, np.ndarray] = {}
    fit = clustering._fit

    def watched(sample: np.ndarray, *arguments: object) -> object:
        kept["sample"] = sample.copy()
        means = fit(sample, *arguments)
        kept["centres"] = means.cluster_centers_
        return means

    monkeypatch.setattr(clustering, "_fit", watched)
    assert np.array_equal(cluster_features(features, 10, sample_per_cluster=15), labels)
    centred = CentredFeatures.of(features).rows(np.arange(500), np.float32)
    assert kept["sample"].shape == (150, 8)
    rows = {row.tobytes() for row in centred}
    assert len({row.tobytes() for row in kept["sample"]} & rows) == 150, "different rows"
    distance = ((centred[:, None] - kept["centres"]) ** 2).sum(-1)
    assert np.array_equal(labels, distance.argmin(1))


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
        def fit(self, sample: np.ndarray, **options: object) -> Watched:
            threads.extend(pool["num_threads"] for pool in threadpool_info())
            return super().fit(sample, **options)

    monkeypatch.setattr(sklearn.cluster, "KMeans", Watched)
    with threadpool_limits(limits=2):
        cluster_features(blobs(100, 4)[0], 4)
        assert {pool["num_threads"] for pool in threadpool_info()} == {2}, "set back afterwards"
    assert threads and set(threads) == {1}


@pytest.mark.parametrize("mapped", [False, True])
def test_features_are_never_copied_whole(mapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "_CHUNK_BYTES", 2**20)
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
    sizes: list[int] = []
    fit = clustering._fit

    def watched(sample: np.ndarray, *arguments: object) -> object:
        if sample.dtype == np.float32:  # perhaps once more in float64
            sizes.append(len(sample))
        return fit(sample, *arguments)

    monkeypatch.setattr(clustering, "_fit", watched)
    features, _ = blobs(1200, 10)
    cluster_features(features, 2)  # 256 rows per cluster
    cluster_features(features, 10)  # all
    monkeypatch.setattr(clustering, "_SAMPLE_BYTES", 4 * 8 * 400)
    cluster_features(features, 10)  # so many bytes
    monkeypatch.setattr(clustering, "_SAMPLE_BYTES", 4 * 8 * 200)
    cluster_features(features, 10)  # a quarter
    cluster_features(features, 500)  # but a row for each centre
    assert sizes == [512, 1200, 400, 300, 500]


@pytest.mark.parametrize("side", [-1, 1])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 3.0, 1e30])
@pytest.mark.parametrize("offset", [0.0, 7.0])
def test_centred_features_have_mean_0_and_at_most_1(
    side: int, scale: float, offset: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever side the largest is on, in whichever chunk."""
    monkeypatch.setattr(features_module, "_CHUNK_BYTES", 4 * 3 * 7)
    features = np.random.default_rng(0).standard_normal((40, 3))
    features[9, 1] = 50 * side
    features = (scale * (offset + features)).astype(np.float32)
    centred = CentredFeatures.of(features)
    rows = centred.rows(np.arange(40), np.float64)
    assert np.abs(rows.mean(0)).max() < 1e-7
    assert 0.5 <= np.abs(rows).max() <= 1
    assert np.abs(rows).max() == abs(rows[9, 1])
    expected = features.astype(np.float64) - features.mean(0, dtype=np.float64)
    assert np.allclose(rows, expected * centred.scale, rtol=1e-6, atol=1e-9)
    assert np.log2(centred.scale) % 1 == 0
    chunks = list(centred.chunks(np.float64))
    assert [rows.stop - rows.start for rows, _ in chunks] == [7] * 5 + [5]
    assert np.array_equal(np.concatenate([chunk for _, chunk in chunks]), rows)
    assert np.array_equal(centred.rows(np.array([5, 38, 2]), np.float32), rows[[5, 38, 2]].astype(np.float32))


def test_the_largest_float32_is_a_value() -> None:
    largest = float(np.finfo(np.float32).max)
    features = np.array([[largest], [-largest], [largest]])
    for dtype in (np.float32, np.float64):
        labels = cluster_features(features.astype(dtype), 2)
        assert same_partition(labels, np.array([0, 1, 0]))


@pytest.mark.parametrize(("dimensions", "offset"), [(2048, 30.0), (256, 100.0), (256, -1e4), (8, 1e5)])
@pytest.mark.parametrize("sampled", [False, True])
def test_a_common_offset_does_not_matter(dimensions: int, offset: float, sampled: bool) -> None:
    """In float32, where the squared norms leave no room for the distances between the clusters."""
    random = np.random.default_rng(0)
    apart = max(0.05, 1e-5 * abs(offset))
    which = np.arange(600) % 12
    features = apart * (
        random.standard_normal((12, dimensions))[which] + 0.1 * random.standard_normal((600, dimensions))
    )
    labels = cluster_features((offset + features).astype(np.float32), 12, sample_per_cluster=25 if sampled else 256)
    assert same_partition(labels, which)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1e-42, 1e-37, 1e-20, 1e-5, 1e5, 1e20, 1e36])
@pytest.mark.parametrize("sampled", [False, True])
def test_the_scale_does_not_matter(scale: float, dtype: type, sampled: bool) -> None:
    features, which = blobs(600, 12, dtype=np.float64)
    labels = cluster_features((scale * features).astype(dtype), 12, sample_per_cluster=25 if sampled else 256)
    assert same_partition(labels, which)


@pytest.mark.parametrize("scale", [1e-310, 1e-200])
def test_float64_features_may_be_smaller_than_float32_has_numbers(scale: float) -> None:
    features, which = blobs(600, 12, dtype=np.float64)
    assert same_partition(cluster_features(scale * features, 12), which)


def test_float64_features_are_centred_before_they_are_rounded() -> None:
    features, which = blobs(600, 12, dtype=np.float64)
    assert same_partition(cluster_features(1e9 + features, 12), which)


def test_constant_columns_do_not_matter() -> None:
    features, which = blobs(600, 12)
    for dtype in (np.float32, np.float64):
        constant = np.tile(np.array([0.0, 0.1, -1e6, 1e-30, 1e38], dtype), (600, 1))
        assert same_partition(cluster_features(np.concatenate([features, constant], 1), 12), which)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("sampled", [False, True])
def test_one_feature_far_above_the_others_does_not_blur_them(dtype: type, sampled: bool) -> None:
    """Its square is 10^12 and theirs 1: float32 has no room for both, so that the fit is repeated in float64."""
    features, which = blobs(900, 12, dtype=np.float64)
    half = np.arange(900) % 2
    features = np.concatenate([features, 1e6 * half[:, None]], 1).astype(dtype)
    labels = cluster_features(features, 24, sample_per_cluster=25 if sampled else 256)
    assert same_partition(labels, 2 * which + half)


def test_float64_only_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    types: list[type] = []
    fit = clustering._fit

    def watched(sample: np.ndarray, *arguments: object) -> object:
        types.append(sample.dtype.type)
        return fit(sample, *arguments)

    monkeypatch.setattr(clustering, "_fit", watched)
    cluster_features(blobs(600, 12)[0], 12)
    cluster_features(np.random.default_rng(0).standard_normal((600, 8)), 12)
    assert types == [np.float32] * 2
    cluster_features(np.eye(4).repeat(5, 0), 4)
    assert types[2:] == [np.float32, np.float64]
    for spread, again in ((3e-3, True), (3e-2, False)):  # of a cluster, against the distance of the clusters
        types.clear()
        centres = np.eye(8)[np.arange(900) % 8]
        cluster_features(centres + spread * np.random.default_rng(0).standard_normal((900, 8)), 8)
        assert types == [np.float32, np.float64][: 1 + again]


@pytest.mark.parametrize("number", [5, 6, 9, 200])
@pytest.mark.parametrize("apart", [1.0, 1e-3, 1e-7])
def test_with_few_different_rows_each_is_a_cluster(number: int, apart: float) -> None:
    """``apart``: of the last two rows, against a norm of 1."""
    different = np.concatenate([np.eye(4), np.eye(4)[3:]])
    different[4, 0] = apart
    features = different.repeat(40, 0)

    def cluster() -> None:
        labels = cluster_features(features, number)
        assert same_partition(labels, np.arange(5).repeat(40))
        assert labels.max() < number

    if number == 5:
        cluster()
    else:
        with pytest.warns(
            UserWarning, match=rf"has 5 different rows .* num_clusters is {number}: {number - 5} cl"
        ) as caught:
            cluster()
        assert len(caught) == 1 and caught[0].filename == __file__


@pytest.mark.parametrize("value", [0.0, 0.1, 1e30])
def test_all_rows_equal(value: float) -> None:
    with pytest.warns(UserWarning, match="1 different rows"):
        labels = cluster_features(np.full((50, 3), value), 4)
    assert len(set(labels.tolist())) == 1
    assert cluster_features(np.full((50, 3), value), 1).tolist() == [0] * 50


def test_as_many_clusters_as_images() -> None:
    features = np.random.default_rng(0).standard_normal((40, 3))
    assert sorted(cluster_features(features, 40).tolist()) == list(range(40))
    assert cluster_features(features[:1], 1).tolist() == [0]


def inertia(features: np.ndarray, labels: np.ndarray) -> float:
    """The mean squared distance to the mean of the cluster."""
    means = np.stack(
        [features[labels == i].mean(0) if (labels == i).any() else features[0] for i in range(1 + max(labels))]
    )
    return float(np.square(features - means[labels]).sum(1).mean())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_without_any_structure_few_clusters_are_tiny_and_the_sum_of_squares_is_that_of_scikit_learn(seed: int) -> None:
    """In noise of many dimensions Lloyd's iterations leave a quarter of the centres with next to no rows."""
    from sklearn.cluster import KMeans

    features = np.random.default_rng(seed).standard_normal((6000, 128)).astype(np.float32)
    labels = cluster_features(features, 90, seed=seed, max_iter=20)
    assert (np.bincount(labels, minlength=90) < 6000 / 90 / 4).sum() <= 9
    theirs = KMeans(90, n_init=1, random_state=seed).fit_predict(features)
    assert inertia(features, labels) <= 1.001 * inertia(features, theirs)


@pytest.mark.parametrize("at_one_time", [1, 5, 2**22])
def test_a_small_cluster_moves_only_if_that_lowers_the_sum_of_squares(
    at_one_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clustering, "_AT_ONE_TIME", at_one_time)
    random = np.random.default_rng(0)
    near, far = random.standard_normal((4, 8)), 30 + random.standard_normal((4, 8))
    middle = random.standard_normal((200, 8))
    wide = random.standard_normal((200, 8)) + 8 * np.sign(random.standard_normal((200, 1))) - 20
    rows = np.concatenate([near, far, middle, wide])
    labels = np.repeat([0, 1, 2, 3], [4, 4, 200, 200])
    centres = np.stack([rows[labels == i].mean(0) for i in range(4)])
    moved = clustering.move_small(rows, labels, centres)
    assert np.array_equal(moved[[1, 2]], centres[[1, 2]]), "far from all others; not small"
    halves = np.stack([wide[wide[:, 0] < -20].mean(0), wide[wide[:, 0] > -20].mean(0)])
    assert np.allclose(np.sort(moved[[0, 3]], 0), halves), "the one near a large cluster helps to split the widest"

    alone = centres[[1, 2]]  # the middle would gain less by a split than those far away would lose
    assert np.array_equal(clustering.move_small(rows[4:208], labels[4:208] - 1, alone), alone)
    assert np.array_equal(clustering.move_small(middle, np.arange(200) % 4, centres), centres), "none is small"


@pytest.mark.filterwarnings("error")
def test_a_cluster_without_rows_or_one_of_equal_rows_moves_nothing_into_itself() -> None:
    rows = np.repeat(np.eye(3), [50, 50, 1], axis=0)
    centres = np.concatenate([np.eye(3), np.full((1, 3), 9.0)])  # the last has no rows, and no other is worth a split
    moved = clustering.move_small(rows, np.repeat([0, 1, 2], [50, 50, 1]), centres)
    assert np.array_equal(moved, centres)


@pytest.mark.parametrize(("clusters", "images"), [(12, 600), (60, 6000), (200, 10000)])
def test_the_start_finds_well_separated_clusters(clusters: int, images: int) -> None:
    features, which = blobs(images, clusters, 16)
    labels = cluster_features(features, clusters)
    pairs = len(set(zip(labels.tolist(), which.tolist(), strict=True)))
    assert pairs <= 1.02 * clusters
    assert len(set(labels.tolist())) >= 0.98 * clusters


def test_within_a_percent_of_scikit_learn_run_to_its_end() -> None:
    """The sum of squared distances, on features without clusters and with overlapping ones."""
    from sklearn.cluster import KMeans

    random = np.random.default_rng(0)
    noise = random.standard_normal((3000, 24)).astype(np.float32)
    for features in (noise, noise + 1.5 * random.standard_normal((50, 24)).astype(np.float32)[np.arange(3000) % 50]):
        ours = len(features) * inertia(features, cluster_features(features, 50))
        assert ours < 1.01 * KMeans(50, n_init=1, random_state=0).fit(features).inertia_


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
        (torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]), ValueError, "image_features must be .* nested"),
        (np.ma.masked_array(np.eye(3)), TypeError, "image_features must be .* got MaskedArray"),
        (np.eye(3).astype(bool), TypeError, "image_features must be .* bool"),
        (np.eye(3).astype(object), TypeError, "image_features must be .* object"),
        (np.eye(3).astype(str), TypeError, "image_features must be .* <U"),
        (None, TypeError, "image_features must be .* got NoneType"),
        ("features.npy", TypeError, "image_features must be .* got str"),
    ],
)
def test_bad_features(features: object, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        cluster_features(features, 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39])
@pytest.mark.parametrize("tensor", [False, True])
def test_values_that_are_not_finite_are_named(bad: float, tensor: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "_CHUNK_BYTES", 4 * 2 * 3)
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
        ({"num_clusters": True}, "num_clusters must be an int, got True"),
        ({"num_clusters": 10**30}, "num_clusters must be at most"),
        ({"num_clusters": "2"}, "num_clusters must be an int, got '2'"),
        ({"num_clusters": 2, "seed": 2**128}, "seed must be at most"),
        ({"num_clusters": 2, "seed": 1.0}, "seed must be an int"),
        ({"num_clusters": 2, "sample_per_cluster": 10**30}, "sample_per_cluster must be at most"),
        ({"num_clusters": 2, "max_iter": 10**12}, "max_iter must be at most"),
    ],
)
def test_bad_options(options: dict, match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        cluster_features(np.zeros((10, 2)), **options)


def test_numpy_numbers_are_numbers() -> None:
    features, _ = blobs(100, 4)
    numbers = {"seed": np.uint8(3), "sample_per_cluster": np.int32(20), "max_iter": np.int64(5)}
    expected = cluster_features(features, 4, **{name: int(number) for name, number in numbers.items()})
    assert np.array_equal(cluster_features(features, np.int16(4), **numbers), expected)


@pytest.mark.parametrize("at_once", [1, 2**22])
def test_what_it_costs_to_do_without_a_cluster(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustering, "_AT_ONE_TIME", at_once)
    random = np.random.default_rng(0)
    rows, own, others = random.standard_normal((20, 3)), random.standard_normal((2, 3)), random.standard_normal((4, 3))
    of = [np.array([3, 7, 1]), np.array([0, 19])]
    expected = [
        sum(np.square(rows[i] - others).sum(1).min() - np.square(rows[i] - centre).sum() for i in numbers)
        for numbers, centre in zip(of, own, strict=True)
    ]
    np.testing.assert_allclose(clustering._costs_without(rows, of, own, others), expected)
