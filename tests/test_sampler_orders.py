"""The order of an epoch: recorded over its options, and how loose pieces, groups and rounds lie in it."""

from __future__ import annotations

import itertools
import warnings
import zlib

import numpy as np
import pytest

from hrem_layers import NeighborBatchSampler
from hrem_layers.sampler.arrays import no_keys, random_keys
from hrem_layers.sampler.batching import arrange
from hrem_layers.sampler.distinct import keep_distinct
from hrem_layers.sampler.epoch import step_bounds
from hrem_layers.sampler.layout import Layout

# labels of the images, captions of each: what kinds of cluster there are
DATA = {
    "even": (np.arange(240) % 12, np.full(240, 3)),
    "uneven": (np.arange(300) ** 2 % 41, np.arange(300) % 7),
    "small clusters": (np.arange(150) // 2, np.full(150, 2)),
    "one cluster": (np.zeros(60, int), np.full(60, 5)),
    "one rich image": (np.arange(90) % 9, np.where(np.arange(90) == 7, 60, 1)),
    "rich images": (np.arange(24) % 4, np.where(np.arange(24) < 4, 30, 1)),
    "few images": (np.arange(6) // 3, np.array([9, 1, 1, 2, 8, 3])),
}
SHAPES = [(2, 4, 1), (3, 1, 2), (1, 7, 3), (4, 3, 2)]  # clusters and images per batch, ranks
RECORDED = {  # by kind, drop_last, shuffle
    ("even", True, True): 4095451966,
    ("even", True, False): 1069390701,
    ("even", False, True): 1749701309,
    ("even", False, False): 1412005569,
    ("uneven", True, True): 2899562382,
    ("uneven", True, False): 545724698,
    ("uneven", False, True): 2242088228,
    ("uneven", False, False): 3003930768,
    ("small clusters", True, True): 3279513311,
    ("small clusters", True, False): 1427992915,
    ("small clusters", False, True): 258875447,
    ("small clusters", False, False): 3631043725,
    ("one cluster", True, True): 2267199915,
    ("one cluster", True, False): 919360396,
    ("one cluster", False, True): 4048835705,
    ("one cluster", False, False): 2580615769,
    ("one rich image", True, True): 1006726279,
    ("one rich image", True, False): 2615927071,
    ("one rich image", False, True): 1015237398,
    ("one rich image", False, False): 621024586,
    ("rich images", True, True): 1744270366,
    ("rich images", True, False): 4057991036,
    ("rich images", False, True): 1459656494,
    ("rich images", False, False): 2618997875,
    ("few images", True, True): 2709692342,
    ("few images", True, False): 3187374416,
    ("few images", False, True): 454246928,
    ("few images", False, False): 544153779,
}


def order(kind: str, drop_last: bool, shuffle: bool) -> int:
    """A checksum of all batches in all shapes, on all ranks."""
    labels, counts = DATA[kind]
    checksum = 0
    for clusters, images, ranks in SHAPES:
        for rank in range(ranks):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                sampler = NeighborBatchSampler(
                    cluster_ids=labels, captions_per_image=counts, clusters_per_batch=clusters,
                    images_per_cluster=images, drop_last=drop_last, shuffle=shuffle, seed=5, num_replicas=ranks,
                    rank=rank,
                )  # fmt: skip
            sampler.set_epoch(2)
            for batch in sampler:
                checksum = zlib.crc32(np.array([*batch, -1], "<i8").tobytes(), checksum)
    return checksum


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_recorded_orders(kind: str, drop_last: bool, shuffle: bool) -> None:
    assert order(kind, drop_last, shuffle) == RECORDED[kind, drop_last, shuffle]


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("drop_last", [True, False])
def test_an_exchange_moves_little(kind: str, drop_last: bool) -> None:
    """``keep_distinct`` keeps the sizes of the steps and all captions, and leaves an order alone that needs nothing."""
    labels, counts = DATA[kind]
    layout = Layout.build(counts, labels)
    draw = random_keys(3, 0)
    before = arrange(layout, 3, 4, draw)
    bounds = step_bounds(layout.captions, 12, 1, drop_last)
    after = before.copy()
    keep_distinct(after, bounds, layout, draw)
    assert sorted(after) == sorted(before)
    again = after.copy()
    keep_distinct(again, bounds, layout, draw)
    if kind in ("even", "uneven", "small clusters"):  # where nothing need remain
        assert np.array_equal(again, after)
    assert (after != before).mean() < 0.25 or kind in ("rich images", "few images", "one rich image")


def steps_of_the_clusters(clusters: int, captions: int, slots: int, group_size: int, seed: int) -> np.ndarray:
    """(clusters, captions) steps, in ascending order, of the pieces of clusters of one image less than a group."""
    size = group_size - 1
    layout = Layout.build(np.full(clusters * size, captions), np.arange(clusters * size) // size)
    placed = arrange(layout, slots, group_size, random_keys(seed, 0))
    step = np.empty(len(placed), int)
    step[placed] = np.arange(len(placed)) // (slots * group_size)
    return np.sort(step.reshape(clusters, size, captions)[:, 0], axis=1)


@pytest.mark.parametrize("captions", [2, 5])
def test_the_pieces_of_a_cluster_are_spread_over_the_epoch(captions: int) -> None:
    """The k-th of p comes in the k-th p-th of the steps, anywhere in it."""
    steps = steps_of_the_clusters(400, captions, 6 * captions // 5 * 3, 4, seed=0)
    total = steps.max() + 1
    part = total / captions
    at = steps - np.arange(captions) * part
    assert total >= 40 and at.min() > -2 and at.max() < part + 2
    assert np.abs(at.mean(0) - part / 2).max() < 0.1 * part, "anywhere in its part of the epoch"
    assert at.std(0).min() > 0.22 * part  # of a uniform distribution: 0.29


@pytest.mark.parametrize("captions", [3, 5, 6])
def test_the_pieces_of_a_cluster_are_a_step_apart_even_in_a_short_epoch(captions: int) -> None:
    """8 steps: they move together, since each by itself would often meet the next one in a step."""
    short = 0
    for seed in range(5):
        steps = steps_of_the_clusters(64, captions, 6 * captions, 4, seed)
        assert steps.max() + 1 == 8
        short += int((np.diff(steps, axis=1) == 0).sum())
        assert len(np.unique(steps[:, 0])) >= 8 // captions, "not all clusters at the same time"
    assert short <= 0.02 * 5 * 64 * (captions - 1)


def test_in_a_long_epoch_the_pieces_move_independently() -> None:
    steps = steps_of_the_clusters(600, 2, 6, 4, seed=0)
    total = steps.max() + 1
    within = steps / total - np.arange(2) / 2
    assert abs(np.corrcoef(within.T)[0, 1]) < 0.15


def test_extra_captions_of_one_image_are_spread_over_the_epoch() -> None:
    """An image with as many captions as there are steps, far more than others: one per step, not in a heap."""
    counts = np.ones(799, int)
    counts[5] = 50
    layout = Layout.build(counts, np.arange(799) % 17)
    placed = arrange(layout, 4, 4, random_keys(0, 0))
    steps = np.sort(np.flatnonzero(layout.image_of(placed) == 5) // 16)
    assert np.abs(steps - np.arange(50) * 53 / 50).max() < 6


def test_groups_of_a_large_cluster_are_far_apart_in_a_step() -> None:
    """Half of the images are of one cluster: of 8 groups in a step 4, which lie apart so that ranks share them."""
    labels = np.where(np.arange(640) < 320, 0, 1 + np.arange(640) % 40)
    layout = Layout.build(np.ones(640, int), labels)
    for seed in range(4):
        groups = labels[arrange(layout, 8, 4, random_keys(seed, 0))].reshape(-1, 8, 4)
        large = (groups == 0).all(2)
        assert (large.sum(1) == 4).all()
        assert large[:, :4].sum(1).min() >= 1 and large[:, 4:].sum(1).min() >= 1


@pytest.mark.parametrize("huge", [10**6, 2**40, 2**62])
@pytest.mark.parametrize(("clusters", "images"), [("huge", 1), (1, "huge"), ("huge", "huge")])
@pytest.mark.parametrize("drop_last", [True, False])
def test_batches_larger_than_all_captions(huge: int, clusters: object, images: object, drop_last: bool) -> None:
    sizes = [huge if size == "huge" else size for size in (clusters, images)]
    options = {"cluster_ids": [0, 1, 1], "captions_per_image": 2, "drop_last": drop_last}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        sampler = NeighborBatchSampler(clusters_per_batch=sizes[0], images_per_cluster=sizes[1], **options)
    batches = list(sampler)
    assert len(sampler) == len(batches) == (not drop_last)
    assert drop_last or sorted(batches[0]) == list(range(6))


@pytest.mark.parametrize(("clusters", "images"), [(2**62, 1), (1, 2**62), (2**62, 2**62)])
def test_a_huge_batch_has_the_order_of_one_that_is_just_too_large(clusters: int, images: int) -> None:
    def batches(clusters: int, images: int) -> list[list[int]]:
        return list(
            NeighborBatchSampler(
                cluster_ids=np.arange(20) % 3, captions_per_image=2, clusters_per_batch=clusters,
                images_per_cluster=images, drop_last=False,
            )
        )  # fmt: skip

    assert batches(clusters, images) == batches(min(clusters, 41), min(images, 41))


def test_without_keys_the_order_is_that_of_the_indices() -> None:
    layout = Layout.build(np.ones(12, int), np.arange(12) // 4)
    assert arrange(layout, 3, 4, no_keys).tolist() == list(range(12))


@pytest.mark.parametrize("sizes", list(itertools.product([1, 2, 3], repeat=3)))
def test_layout_offsets_and_images(sizes: tuple[int, ...]) -> None:
    layout = Layout.build(np.array([*sizes, 0]), np.array([7, 3, 7, 9]))
    assert layout.labels.tolist() == [1, 0, 1, 2] and layout.clusters == 3
    assert layout.captions == sum(sizes)
    assert layout.image_of(np.arange(sum(sizes))).tolist() == np.repeat(range(3), sizes).tolist()
