"""NeighborBatchSampler by itself: what an epoch holds, on all ranks, in any sizes; position, arguments, copies."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
import zlib
from collections import Counter
from itertools import chain
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_flow
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from hrem_layers import NeighborBatchSampler
from hrem_layers.sampler import processes
from hrem_layers.sampler.arrays import random_keys, sort_by
from hrem_layers.sampler.assignment import Assignment
from hrem_layers.sampler.batching import arrange
from hrem_layers.sampler.epoch import step_bounds
from hrem_layers.sampler.layout import Layout
from hrem_layers.sampler.paths import exchange_along_paths


class Case(NamedTuple):
    labels: list[int]
    counts: int | list[int]
    clusters: int
    images: int
    ranks: int
    drop_last: bool
    shuffle: bool
    seed: int
    epoch: int

    @property
    def each(self) -> list[int]:
        return [self.counts] * len(self.labels) if isinstance(self.counts, int) else self.counts

    @property
    def captions(self) -> int:
        return sum(self.each)

    @property
    def step(self) -> int:
        return self.ranks * self.clusters * self.images

    def sampler(self, rank: int = 0, **options: object) -> NeighborBatchSampler:
        arguments = {
            "cluster_ids": self.labels, "captions_per_image": self.counts, "clusters_per_batch": self.clusters,
            "images_per_cluster": self.images, "drop_last": self.drop_last, "shuffle": self.shuffle,
            "seed": self.seed, "num_replicas": self.ranks, "rank": rank,
        }  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            made = NeighborBatchSampler(**{**arguments, **options})
        made.set_epoch(self.epoch)
        return made

    def batches(self) -> list[list[list[int]]]:
        """By rank."""
        return [list(self.sampler(rank)) for rank in range(self.ranks)]

    def steps(self) -> list[list[int]]:
        return [list(chain.from_iterable(parts)) for parts in zip(*self.batches(), strict=True)]

    def image_of(self) -> list[int]:
        return [image for image, count in enumerate(self.each) for _ in range(count)]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    images = draw(st.integers(1, 30))
    labels = draw(st.lists(st.integers(0, draw(st.integers(0, 9))), min_size=images, max_size=images))
    several = st.lists(st.integers(0, 6), min_size=images, max_size=images).filter(any)
    counts = draw(st.integers(1, 5) | several)
    ranks = draw(st.integers(1, 4))
    case = Case(
        labels, counts, draw(st.integers(1, 4)), draw(st.integers(1, 5)), ranks, draw(st.booleans()),
        draw(st.booleans()), draw(st.integers(0, 2**70)), draw(st.integers(0, 2**40)),
    )  # fmt: skip
    return case if case.drop_last or case.captions >= ranks else case._replace(ranks=1)


@given(cases())
@settings(max_examples=120)
def test_every_caption_at_most_once_and_the_ranks_in_step(case: Case) -> None:
    by_rank = case.batches()
    flat = [caption for batches in by_rank for batch in batches for caption in batch]
    assert {type(caption) for caption in flat} <= {int}
    assert len(flat) == len(set(flat)), "a caption came twice"
    assert set(flat) <= set(range(case.captions))
    lengths = [len(case.sampler(rank)) for rank in range(case.ranks)]
    assert [len(batches) for batches in by_rank] == lengths == lengths[:1] * case.ranks
    sizes = np.array([[len(batch) for batch in batches] for batches in by_rank]).reshape(case.ranks, -1)
    size = case.clusters * case.images
    if case.drop_last:
        assert len(flat) == case.captions // case.step * case.step, "more was dropped than does not fill a step"
        assert (sizes == size).all()
    else:
        assert sorted(flat) == list(range(case.captions))
        left = case.captions % case.step
        few = 0 < left < case.ranks and case.captions > case.step
        assert (sizes[:, : lengths[0] - 1 - few] == size).all()
        assert sizes.min() >= 1
        assert (sizes.max(axis=0) - sizes.min(axis=0) <= 1).all()
        assert sizes.max() <= size + (size == 1)
        if few and size > 1:
            assert (sizes[:, -1] == 1).all()


@pytest.mark.parametrize(
    ("captions", "ranks", "per_batch", "sizes"),
    [
        (22, 4, 2, [[2, 2, 2], [2, 2, 2], [2, 2, 1], [2, 2, 1]]),  # 6 are left for 4 ranks
        (19, 4, 2, [[2, 2, 1], [2, 2, 1], [2, 2, 1], [2, 1, 1]]),  # 3 are left: one rank gives one
        (17, 4, 2, [[2, 2, 1], [2, 1, 1], [2, 1, 1], [2, 1, 1]]),
        (16, 4, 2, [[2, 2]] * 4),
        (7, 4, 2, [[2], [2], [2], [1]]),
        (4, 4, 2, [[1]] * 4),
        (11, 4, 1, [[1, 2], [1, 2], [1, 2], [1, 1]]),
        (10, 4, 1, [[1, 2], [1, 2], [1, 1], [1, 1]]),  # nothing to give up: two join
        (5, 4, 1, [[2], [1], [1], [1]]),
    ],
)
def test_sizes_of_the_last_batches(captions: int, ranks: int, per_batch: int, sizes: list[list[int]]) -> None:
    got = [
        [
            len(batch)
            for batch in NeighborBatchSampler(
                cluster_ids=[0] * captions, clusters_per_batch=1, images_per_cluster=per_batch, drop_last=False,
                num_replicas=ranks, rank=rank,
            )
        ]
        for rank in range(ranks)
    ]  # fmt: skip
    assert got == sizes


def most_distinct(counts: list[int], sizes: list[int]) -> int:
    """The largest sum over the steps of different images in it that any arrangement has: a flow of captions."""
    images, steps = len(counts), len(sizes)
    source, sink = images + steps, images + steps + 1
    edges = [(source, i, count) for i, count in enumerate(counts)]
    edges += [(i, images + s, 1) for i in range(images) for s in range(steps)]
    edges += [(images + s, sink, size) for s, size in enumerate(sizes)]
    start, end, capacity = np.array(edges, np.int32).T
    return maximum_flow(csr_matrix((capacity, (start, end)), shape=(sink + 1,) * 2), source, sink).flow_value


@given(cases())
@settings(max_examples=120)
def test_no_step_holds_an_image_twice_where_that_can_be_avoided(case: Case) -> None:
    steps, image_of = case.steps(), case.image_of()
    if not steps:
        return
    images = [[image_of[caption] for caption in step] for step in steps]
    distinct = sum(len(set(step)) for step in images)
    assert distinct == most_distinct(case.each, [len(step) for step in steps])
    full = sum(len(step) == case.step for step in steps)
    if all(len(step) <= case.step for step in steps):
        for step in images:
            doubled = [image for image, times in Counter(step).items() if times > 1]
            assert all(case.each[image] > full for image in doubled)


@given(cases())
@settings(max_examples=120)
def test_exchanges_along_paths_alone_reach_the_best(case: Case) -> None:
    """Without trials before them, from any order, dropped captions or not."""
    layout = Layout.build(np.array(case.each), np.array(case.labels))
    order = np.random.default_rng(case.seed).permutation(case.captions)
    bounds = step_bounds(case.captions, case.step, 1, case.drop_last)
    sizes = np.diff(bounds).tolist()
    steps = Assignment(order, bounds, layout)
    images = np.arange(len(case.each))
    passes = 0
    while exchange_along_paths(steps, images):
        passes += 1
        assert passes < 100
    assert sorted(order) == list(range(case.captions))
    assert np.array_equal(order[steps.place], np.arange(case.captions))
    parts = np.split(layout.image_of(order), bounds[1:])[: len(sizes)]
    assert sum(len(np.unique(part)) for part in parts) == most_distinct(case.each, sizes)


@pytest.mark.parametrize("steps", [2, 3, 5, 9])
@pytest.mark.parametrize("images", [2, 4, 7])
@pytest.mark.parametrize("dropped", [0, 1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_exchanges_along_paths_where_every_step_must_hold_every_image(
    steps: int, images: int, dropped: int, seed: int
) -> None:
    """As many captions of each image as steps, and a few more of the first one, which can only be dropped."""
    counts = np.full(images, steps)
    counts[0] += dropped
    layout = Layout.build(counts, np.zeros(images, int))
    order = np.random.default_rng(seed).permutation(layout.captions)
    assignment = Assignment(order, np.arange(steps + 1) * images, layout)
    while exchange_along_paths(assignment, np.arange(images)):
        pass
    of = layout.image_of(order)
    assert all(len(set(part)) == images for part in of[: steps * images].reshape(steps, images).tolist())
    assert (of[steps * images :] == 0).all()
    assert sorted(order) == list(range(layout.captions))


def test_a_chain_of_three_steps() -> None:
    """Of aab, b and ac only all three together have a better arrangement: a to the second, b to the third, c back."""
    layout = Layout.build(np.array([3, 2, 1]), np.zeros(3, int))
    order = np.array([0, 1, 3, 4, 2, 5])
    assert exchange_along_paths(Assignment(order, np.array([0, 3, 4, 6]), layout), np.arange(3))
    images = layout.image_of(order)
    assert [sorted(part.tolist()) for part in np.split(images, [3, 4])] == [[0, 1, 2], [0], [0, 1]]


@pytest.mark.parametrize("dropped", [0, 1, 4])
@pytest.mark.parametrize("seed", range(60))
def test_exchanges_along_paths_between_steps_of_any_sizes(dropped: int, seed: int) -> None:
    """Only there are chains long."""
    random = np.random.default_rng(seed)
    sizes = random.integers(1, 7, random.integers(2, 9))
    owner = random.integers(0, random.integers(2, 8), sizes.sum() + dropped)
    layout = Layout.build(np.bincount(owner), np.zeros(owner.max() + 1, int))
    order = random.permutation(layout.captions)
    bounds = np.append(0, np.cumsum(sizes))
    assignment = Assignment(order, bounds, layout)
    while exchange_along_paths(assignment, np.arange(len(layout.counts))):
        pass
    parts = np.split(layout.image_of(order), bounds[1:])[: len(sizes)]
    best = most_distinct(layout.counts.tolist(), sizes.tolist())
    assert sum(len(np.unique(part)) for part in parts) == best
    assert sorted(order) == list(range(layout.captions))


@given(cases())
@settings(max_examples=60)
def test_ranks_share_the_steps_of_one_process(case: Case) -> None:
    one = case._replace(ranks=1, clusters=case.clusters * case.ranks)
    left = case.captions % case.step
    if case.drop_last or left == 0 or left >= case.ranks:
        assert case.steps() == one.steps()


@given(cases(), st.data())
@settings(max_examples=60)
def test_goes_on_from_any_batch(case: Case, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, case.ranks - 1))
    whole = list(case.sampler(rank))
    done = data.draw(st.integers(0, len(whole)))
    begun = case.sampler(rank)
    iterator = iter(begun)
    assert [next(iterator) for _ in range(done)] == whole[:done]
    assert begun.state_dict() == begun.state_dict(batches_done=done)
    state = case.sampler((rank + 1) % case.ranks).state_dict(batches_done=done)
    assert state == begun.state_dict(), "one rank's state serves all"
    resumed = case.sampler(rank)
    resumed.set_epoch(0)
    resumed.load_state_dict(state)
    assert resumed.epoch == case.epoch
    assert resumed.state_dict() == state
    assert len(resumed) == len(whole)
    assert list(resumed) == whole[done:]
    assert list(resumed) == whole, "only the next iteration goes on from there"


def regular(**options: object) -> NeighborBatchSampler:
    """12 clusters of 20 images with 3 captions each; label = image % 12."""
    arguments = {
        "cluster_ids": np.arange(240) % 12, "captions_per_image": 3, "clusters_per_batch": 3, "images_per_cluster": 5,
    }  # fmt: skip
    return NeighborBatchSampler(**{**arguments, **options})


def test_a_batch_is_so_many_clusters_with_so_many_images_each() -> None:
    for epoch in range(5):
        sampler = regular(num_replicas=2, rank=1)
        sampler.set_epoch(epoch)
        assert len(sampler) == 24
        for batch in sampler:
            images = [caption // 3 for caption in batch]
            assert len(set(images)) == 15
            groups = [{image % 12 for image in images[i : i + 5]} for i in range(0, 15, 5)]
            assert [len(group) for group in groups] == [1, 1, 1], "a group is of one cluster"
            assert len(set.union(*groups)) == 3, "the groups are of different clusters"


def test_as_many_clusters_as_a_step_takes_are_all_in_every_step() -> None:
    sampler = regular(clusters_per_batch=12)
    for batch in sampler:
        assert Counter(caption // 3 % 12 for caption in batch) == dict.fromkeys(range(12), 5)


@pytest.mark.parametrize("sizes", [(60, 20, 40), (40, 40, 40), (100, 10, 10)])
def test_a_cluster_too_large_to_be_once_a_step_is_equally_often_in_all_and_on_different_ranks(sizes: tuple) -> None:
    """Of the 6 groups of a step, 3, 1 and 2; 2 each; 5, 1/2 and 1/2 on average."""
    labels = np.repeat(range(3), sizes)
    samplers = [
        NeighborBatchSampler(
            cluster_ids=labels, clusters_per_batch=2, images_per_cluster=2, num_replicas=3, rank=rank,
            captions_per_image=4,
        )
        for rank in range(3)
    ]  # fmt: skip
    for parts in zip(*samplers, strict=True):
        clusters = [Counter(labels[np.array(part) // 4].tolist()) for part in parts]
        step = sum(clusters, Counter())
        if sizes[0] == 100:
            assert step in ({0: 10, 1: 2}, {0: 10, 2: 2})
        else:
            assert step == {cluster: size // 10 for cluster, size in enumerate(sizes)}
            assert all(len(counter) == 2 for counter in clusters), "never two groups of one cluster on a rank"


def share_of_whole_groups(labels: np.ndarray, captions: int, **options: int) -> float:
    sampler = NeighborBatchSampler(cluster_ids=labels, captions_per_image=captions, **options)
    size = options["images_per_cluster"]
    whole = [
        len(set(labels[np.array(batch[i : i + size]) // captions])) == 1
        for batch in sampler
        for i in range(0, len(batch), size)
    ]
    return float(np.mean(whole))


def test_few_captions_are_outside_groups_of_one_cluster() -> None:
    labels = np.random.default_rng(0).integers(0, 60, 6000)
    share = share_of_whole_groups(labels, 5, clusters_per_batch=8, images_per_cluster=16)
    # a cluster leaves fewer than 16 of about 500 captions over, 8 on average
    assert share >= 1 - 60 * 15 / 30000
    assert share > 0.98


@pytest.mark.parametrize("captions", [1, 5])
def test_small_clusters_stay_together(captions: int) -> None:
    """Clusters of 3 with groups of 4: pieces of 3, one round each, cut only where a step ends."""
    labels = np.arange(1200) // 3
    sampler = NeighborBatchSampler(
        cluster_ids=labels, captions_per_image=captions, clusters_per_batch=15, images_per_cluster=4
    )
    together = [
        max(Counter(labels[np.array(batch) // captions].tolist()).values()) == 3
        and sum(times == 3 for times in Counter(labels[np.array(batch) // captions].tolist()).values()) >= 18
        for batch in sampler
    ]
    assert all(together), "of 20 pieces in a batch, at most the first and the last are cut"


def test_an_image_with_far_more_captions_does_not_break_up_its_cluster() -> None:
    labels = np.arange(400) % 20
    counts = np.ones(400, int)
    counts[7] = 57  # 57 steps of 8
    image_of = np.repeat(np.arange(400), counts)
    whole = 0
    for seed in range(10):
        sampler = NeighborBatchSampler(
            cluster_ids=labels, captions_per_image=counts, clusters_per_batch=2, images_per_cluster=4, seed=seed
        )
        batches = [image_of[batch] for batch in sampler]
        assert len(batches) == 57
        assert all(np.count_nonzero(batch == 7) == 1 for batch in batches)
        whole += sum((labels[batch[i : i + 4]] == 7).all() for batch in batches for i in (0, 4))
    assert whole >= 40, "of 60: the 20 images make 6 groups with this one in each"


def test_what_is_dropped_is_left_to_chance() -> None:
    """Also where some captions never fit a group: one cluster of 3 among clusters of 8, groups of 4."""
    labels = np.concatenate([np.repeat(np.arange(10), 8), [10, 10, 10]])
    sampler = NeighborBatchSampler(cluster_ids=labels, clusters_per_batch=3, images_per_cluster=4, seed=3)
    seen = np.zeros(83)
    epochs = 1500
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        seen[np.concatenate(list(sampler))] += 1
    expected = 72 / 83
    error = (expected * (1 - expected) / epochs) ** 0.5
    assert np.abs(seen / epochs - expected).max() < 5 * error


def test_neighbours_change_from_epoch_to_epoch() -> None:
    """Every two images of a cluster come together about equally often, and every two clusters."""
    sampler = NeighborBatchSampler(cluster_ids=np.arange(60) % 6, clusters_per_batch=2, images_per_cluster=5)
    images, clusters = np.zeros((10, 10)), np.zeros((6, 6))
    epochs = 1000
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for batch in sampler:
            first = [image // 6 for image in batch if image % 6 == 0]
            images[np.ix_(first, first)] += 1
            present = sorted({image % 6 for image in batch})
            clusters[np.ix_(present, present)] += 1
    apart = ~np.eye(10, dtype=bool)
    assert np.abs(images[apart] / epochs - 4 / 9).max() < 0.06
    apart = ~np.eye(6, dtype=bool)
    # not exactly equal: clusters that follow each other in the table are in different steps where they can be
    assert clusters[apart].min() / epochs > 0.2 and clusters[apart].max() / epochs < 0.6


def test_captions_of_an_image_come_in_any_order() -> None:
    sampler = NeighborBatchSampler(
        cluster_ids=[0] * 8, captions_per_image=3, clusters_per_batch=1, images_per_cluster=8
    )
    orders: Counter[tuple[int, ...]] = Counter()
    for epoch in range(300):
        sampler.set_epoch(epoch)
        orders[tuple(next(c % 3 for c in batch if c // 3 == 5) for batch in sampler)] += 1
    assert len(orders) == 6 and min(orders.values()) > 20


def test_an_image_comes_again_only_after_the_others_of_its_cluster() -> None:
    """20 images with 3 captions in groups of 5: the first 4 groups of a cluster hold each image once, and so on."""
    for epoch in range(5):
        sampler = regular()
        sampler.set_epoch(epoch)
        images = np.concatenate(list(sampler)) // 3
        for cluster in range(12):
            rounds = images[images % 12 == cluster].reshape(3, 20)
            assert all(len(set(each.tolist())) == 20 for each in rounds)
            assert len({tuple(each) for each in rounds.tolist()}) == 3


@pytest.mark.parametrize(
    ("images", "clusters", "counts"), [(6000, 300, 5), (6000, 100, (3, 9)), (6000, 3000, 5), (6000, 2, 5)]
)
def test_little_is_left_to_exchange(images: int, clusters: int, counts: int | tuple[int, int]) -> None:
    """Groups and pieces are laid so that few images are doubled in a step before exchanges mend that."""
    random = np.random.default_rng(0)
    each = np.full(images, counts) if isinstance(counts, int) else random.integers(*counts, images)
    layout = Layout.build(each, random.integers(0, clusters, images))
    order = arrange(layout, 8, 16, random_keys(0, 0))
    steps = np.arange(len(order)) // 128
    doubled = len(order) - len(np.unique(steps * images + layout.image_of(order)))
    assert doubled < 0.003 * len(order)


def test_order_hangs_on_seed_and_epoch_only() -> None:
    def batches(seed: int, epoch: int) -> list[list[int]]:
        sampler = regular(seed=seed)
        np.random.seed(epoch % 1000)
        torch.manual_seed(epoch % 1000)
        for before in (5, epoch):
            sampler.set_epoch(before)
        return list(sampler)

    orders = {(seed, epoch): str(batches(seed, epoch)) for seed in range(3) for epoch in (0, 1, 2**33)}
    assert len(set(orders.values())) == 9
    assert all(str(batches(*key)) == order for key, order in orders.items())
    assert str(list(regular())) == orders[0, 0], "epoch 0 unless set"


def test_order_is_this_one_for_ever() -> None:
    """Recorded: another platform, or another numpy, must give the same."""
    small = NeighborBatchSampler(
        cluster_ids=[4, 4, 0, 0, 4, 0, 9, 0, 4, 0], captions_per_image=2, clusters_per_batch=2, images_per_cluster=2,
        drop_last=False, seed=11,
    )  # fmt: skip
    small.set_epoch(3)
    assert list(small) == [[17, 3, 18, 6], [1, 13, 14, 4], [0, 2, 10, 19], [15, 5, 8, 16], [12, 9, 11, 7]]
    large = NeighborBatchSampler(
        cluster_ids=np.arange(5000) ** 2 % 83, captions_per_image=np.arange(5000) % 7, clusters_per_batch=8,
        images_per_cluster=8, seed=2**40,
    )  # fmt: skip
    assert zlib.crc32(np.array(list(large), "<i8").tobytes()) == 2873195827


def test_without_shuffling_nothing_hangs_on_seed_or_epoch() -> None:
    plain = regular(shuffle=False, images_per_cluster=4, clusters_per_batch=4)
    other = regular(shuffle=False, images_per_cluster=4, clusters_per_batch=4, seed=5)
    other.set_epoch(7)
    batches = list(plain)
    assert list(other) == batches
    # clusters 0, 3, 6, 9 have the first, second, ... group of their streams in the first, second, ... step
    images = [[caption // 3 for caption in batch] for batch in batches]
    assert [image % 12 for image in images[0]] == [0] * 4 + [3] * 4 + [6] * 4 + [9] * 4
    stream = [image for batch in images[:15] for image in batch[:4]]
    assert stream == [12 * i for i in range(20)] * 3, "images by index, round after round"
    captions = [caption % 3 for batch in batches[:15] for caption in batch[:4]]
    assert captions == [0] * 20 + [1] * 20 + [2] * 20, "captions by number"


def test_without_shuffling_the_last_captions_are_dropped() -> None:
    sampler = NeighborBatchSampler(cluster_ids=[0] * 11, clusters_per_batch=1, images_per_cluster=4, shuffle=False)
    assert list(sampler) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_lists_are_fresh() -> None:
    sampler = regular()
    first = list(sampler)
    expected = copy.deepcopy(first)
    for batch in first:
        batch.clear()
    assert list(sampler) == expected


def test_set_epoch_through_the_attribute_sampler() -> None:
    sampler, other = regular(), regular()
    sampler.sampler.set_epoch(4)
    other.set_epoch(4)
    assert sampler.epoch == 4
    assert list(sampler) == list(other)


def test_an_iteration_that_has_begun_goes_on_as_it_was() -> None:
    sampler = regular()
    expected = list(sampler)
    iterator = iter(sampler)
    got = [next(iterator), next(iterator)]
    state = sampler.state_dict()
    sampler.set_epoch(1)
    assert sampler.state_dict()["batches_done"] == 0
    assert next(iter(sampler)) != expected[0]
    got.append(next(iterator))
    sampler.refresh(cluster_ids=np.zeros(240, int))
    got.extend(iterator)
    assert got == expected
    with pytest.raises(StopIteration):
        next(iterator)
    assert state["batches_done"] == 2 and state["epoch"] == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_in_a_plain_data_loader(workers: int) -> None:
    """With workers the loader fetches ahead, and makes one iterator that it does not use."""
    expected = [torch.tensor(batch) for batch in regular()]

    def equal(got: list[torch.Tensor], batches: list[torch.Tensor]) -> bool:
        return len(got) == len(batches) and all(torch.equal(x, y) for x, y in zip(got, batches, strict=True))

    sampler = regular()
    loader = DataLoader(torch.arange(720), batch_sampler=sampler, num_workers=workers)
    assert len(loader) == 48
    assert equal(list(loader), expected)
    iterator = iter(loader)
    for _ in range(5):
        next(iterator)
    assert sampler.state_dict()["batches_done"] == (5 if workers == 0 else 5 + 2 * workers)
    state = sampler.state_dict(batches_done=5)
    del iterator

    resumed = regular(seed=0)
    resumed.load_state_dict(state)
    resumed.set_epoch(0)  # as a training loop does before each epoch; it is the one that was loaded
    loader = DataLoader(torch.arange(720), batch_sampler=resumed, num_workers=workers)
    assert equal(list(loader), expected[5:])
    assert equal(list(loader), expected)


def test_another_epoch_does_not_go_on_from_the_loaded_batch() -> None:
    sampler = regular()
    sampler.load_state_dict(sampler.state_dict(batches_done=5))
    sampler.set_epoch(1)
    assert len(list(sampler)) == 48


def test_state_is_plain_and_loads_with_weights_only(tmp_path) -> None:
    state = regular().state_dict(batches_done=7)
    assert {type(value) for value in state.values()} == {int, bool}
    torch.save(state, tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == state


def test_state_serves_another_number_of_ranks_with_the_same_steps() -> None:
    state = regular(clusters_per_batch=6).state_dict(batches_done=3)
    halves = [regular(num_replicas=2, rank=rank) for rank in (0, 1)]
    for half in halves:
        half.load_state_dict(state)
    joined = [first + second for first, second in zip(*halves, strict=True)]
    assert joined == list(regular(clusters_per_batch=6))[3:]


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"seed": 1}, "seed"),
        ({"shuffle": False}, "shuffle"),
        ({"drop_last": False}, "drop_last"),
        ({"images_per_cluster": 6}, "images_per_cluster"),
        ({"clusters_per_batch": 2}, "clusters_per_step"),
        ({"num_replicas": 2, "rank": 0}, "clusters_per_step"),
        ({"captions_per_image": 2}, "captions"),
        ({"captions_per_image": [2, 4] * 120}, "clusters_checksum"),
        ({"cluster_ids": np.arange(240) % 13}, "clusters_checksum"),
    ],
)
def test_a_state_of_another_sampler_is_refused(options: dict, key: str) -> None:
    with pytest.raises(ValueError, match=f"is of another sampler: {key} is"):
        regular(**options).load_state_dict(regular().state_dict(batches_done=2))


def test_a_state_is_refused_where_the_steps_hang_on_the_ranks() -> None:
    """3 left-over captions are one step on 1 or 2 ranks; on 4, the step before gives one."""
    options = {"cluster_ids": [0] * 19, "images_per_cluster": 2, "drop_last": False}
    one = NeighborBatchSampler(clusters_per_batch=8, **options)
    two = NeighborBatchSampler(clusters_per_batch=4, num_replicas=2, rank=0, **options)
    four = NeighborBatchSampler(clusters_per_batch=2, num_replicas=4, rank=0, **options)
    two.load_state_dict(one.state_dict())
    with pytest.raises(ValueError, match="ranks_sharing_left_over is 4 here, 0 there"):
        four.load_state_dict(one.state_dict())


@pytest.mark.parametrize(
    ("state", "match"),
    [
        ({"epoch": 1}, "must have the keys epoch, batches_done, .*, got epoch$"),
        ([1], "must have the keys .*, got list"),
        ({"batches_done": 49}, r"\['batches_done'\] must be at most 48, got 49"),
        ({"batches_done": -1}, r"\['batches_done'\] must be at least 0, got -1"),
        ({"epoch": -1}, r"\['epoch'\] must be at least 0, got -1"),
        ({"epoch": 2**63}, r"\['epoch'\] must be at most"),
        ({"seed": 2**128}, r"\['seed'\] must be at most 340282366920938463463374607431768211455"),
        ({"seed": 2**128 - 1}, "of another sampler: seed is 0 here, 340282366920938463463374607431768211455 there"),
        ({}, "must have the keys .*, got none"),
    ],
)
def test_a_malformed_state_is_refused_and_changes_nothing(state: object, match: str) -> None:
    sampler = regular()
    if "the keys" not in match:
        state = {**sampler.state_dict(), **state}
    with pytest.raises(ValueError, match=match):
        sampler.load_state_dict(state)
    assert sampler.state_dict() == regular().state_dict()


@pytest.mark.parametrize("key", regular().state_dict())
@pytest.mark.parametrize(
    "value",
    [None, 1.5, "1", -1, 2**130, [1], np.zeros(2), torch.zeros(2), torch.tensor(1), object(), float("nan")],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_a_damaged_state_is_refused_by_its_key_and_changes_nothing(key: str, value: object) -> None:
    sampler = regular()
    sampler.load_state_dict({**regular().state_dict(), "epoch": 3, "batches_done": 2})
    before = sampler.state_dict()
    with pytest.raises((TypeError, ValueError), match=key):
        sampler.load_state_dict({**before, key: value})
    assert sampler.state_dict() == before
    del before[key]
    with pytest.raises(ValueError, match="must have the keys"):
        sampler.load_state_dict(before)
    with pytest.raises(ValueError, match="must have the keys"):
        sampler.load_state_dict({**regular().state_dict(), key + "_": 1})


@pytest.mark.parametrize("key", ["shuffle", "drop_last"])
def test_a_state_holds_bools_where_it_should(key: str) -> None:
    with pytest.raises(TypeError, match=rf"state_dict\['{key}'\] must be True or False, got 1"):
        regular().load_state_dict({**regular().state_dict(), key: 1})
    with pytest.raises(TypeError, match=r"state_dict\['seed'\] must be an int, got False"):
        regular().load_state_dict({**regular().state_dict(), "seed": False})


def test_an_iteration_loads_a_state_by_itself() -> None:
    state = regular(seed=0).state_dict(batches_done=7)
    sampler = regular()
    sampler.set_epoch(5)
    iterator = iter(sampler)
    iterator.load_state_dict(state)
    assert sampler.epoch == 0 and iterator.state_dict() == state == sampler.state_dict()
    assert list(iterator) == list(regular())[7:]


def test_ranks_are_in_a_state_only_where_they_matter() -> None:
    options = {"cluster_ids": [0] * 19, "images_per_cluster": 2, "clusters_per_batch": 2, "num_replicas": 4, "rank": 0}
    assert NeighborBatchSampler(**options).state_dict()["ranks_sharing_left_over"] == 0
    assert NeighborBatchSampler(**options, drop_last=False).state_dict()["ranks_sharing_left_over"] == 4
    assert regular().state_dict()["ranks_sharing_left_over"] == 0


def test_all_batches_may_be_done() -> None:
    sampler = regular()
    sampler.load_state_dict(regular().state_dict(batches_done=48))
    assert list(sampler) == []
    assert len(list(sampler)) == 48


def test_batches_done_is_checked() -> None:
    with pytest.raises(ValueError, match="batches_done must be at most the batches of an epoch, 48, got 49"):
        regular().state_dict(batches_done=49)
    with pytest.raises(TypeError, match=r"batches_done must be an int, got 1\.0"):
        regular().state_dict(batches_done=1.0)


def test_refresh_equals_a_new_sampler() -> None:
    features = np.random.default_rng(0).standard_normal((240, 8)).astype(np.float32)
    for source in ({"cluster_ids": np.arange(240) // 20 * 7}, {"image_features": features}):
        sampler = regular(num_clusters=9)
        sampler.set_epoch(2)
        list(sampler)
        sampler.refresh(**source)
        new = regular(num_clusters=9, **{"cluster_ids": None, **source})
        new.set_epoch(2)
        assert list(sampler) == list(new)
        assert np.array_equal(sampler.cluster_ids, new.cluster_ids)
        again = regular()
        again.refresh(cluster_ids=sampler.cluster_ids)
        again.load_state_dict(sampler.state_dict(batches_done=1))
        assert list(again) == list(new)[1:]


def test_refresh_is_refused_with_other_images_or_in_mid_epoch() -> None:
    sampler = regular()
    with pytest.raises(ValueError, match="labels of all 240 images, got 239"):
        sampler.refresh(cluster_ids=[0] * 239)
    with pytest.raises(ValueError, match="exactly one of image_features and cluster_ids must be given, got neither"):
        sampler.refresh()
    sampler.load_state_dict(sampler.state_dict(batches_done=5))
    with pytest.raises(ValueError, match="refresh in mid-epoch: load_state_dict set batch 5 of epoch 0"):
        sampler.refresh(cluster_ids=[0] * 240)
    list(sampler)
    sampler.refresh(cluster_ids=[0] * 240)


def test_labels_may_be_anything_countable_with_gaps() -> None:
    expected = list(regular())
    for ids in (
        (np.arange(240) % 12).tolist(),
        tuple((np.arange(240) % 12 * 1000 + 5).tolist()),
        torch.arange(240) % 12,
        (np.arange(240) % 12).astype(np.uint8),
        (np.arange(240) % 12).astype(np.uint64) * np.uint64(2**58),
    ):
        assert list(regular(cluster_ids=ids)) == expected


def test_labels_are_a_copy() -> None:
    labels = np.arange(240) % 12
    sampler = regular(cluster_ids=labels)
    labels[:] = 0
    sampler.cluster_ids[:] = 0
    assert np.array_equal(sampler.cluster_ids, np.arange(240) % 12)


def test_captions_may_be_counted_image_by_image() -> None:
    expected = list(regular())
    for counts in ([3] * 240, np.full(240, 3, np.uint8), torch.full((240,), 3)):
        assert list(regular(captions_per_image=counts)) == expected
    counts = np.arange(240) % 4  # some images have none
    got = sorted(chain.from_iterable(regular(captions_per_image=counts, drop_last=False)))
    assert got == list(range(counts.sum()))


def test_default_number_of_clusters() -> None:
    features = np.random.default_rng(0).standard_normal((100, 4))
    sampler = NeighborBatchSampler(features, clusters_per_batch=2, images_per_cluster=3)
    assert len(set(sampler.cluster_ids.tolist())) == 9  # one for every 12 images, begun ones too
    small = NeighborBatchSampler(features[:2], clusters_per_batch=1, images_per_cluster=2)
    assert small.cluster_ids.tolist() == [0, 0]


def test_features_are_clustered_as_cluster_features_does() -> None:
    from hrem_layers.sampler.clustering import cluster_features

    features = np.random.default_rng(0).standard_normal((100, 4))
    sampler = NeighborBatchSampler(features, num_clusters=7, clusters_per_batch=2, images_per_cluster=3, seed=5)
    assert np.array_equal(sampler.cluster_ids, cluster_features(features, 7, seed=5))
    assert not any(isinstance(value, np.ndarray) and value.shape == features.shape for value in vars(sampler).values())


def test_signature() -> None:
    expected = (
        "image_features=None, *, cluster_ids=None, num_clusters=None, clusters_per_batch, images_per_cluster, "
        "captions_per_image=1, drop_last=True, shuffle=True, seed=0, num_replicas=None, rank=None"
    )
    for function in (NeighborBatchSampler, NeighborBatchSampler.__init__):
        parameters = [
            parameter.replace(annotation=inspect.Parameter.empty)
            for name, parameter in inspect.signature(function).parameters.items()
            if name != "self"
        ]
        assert str(inspect.Signature(parameters)) == f"({expected})"


def test_numpy_numbers_are_numbers() -> None:
    numbers = {
        "clusters_per_batch": np.int8(3), "images_per_cluster": np.uint64(5), "captions_per_image": np.int32(3),
        "seed": np.int64(4), "num_replicas": np.int64(2), "rank": np.uint8(1), "drop_last": np.False_,
        "shuffle": np.True_, "num_clusters": np.int16(9),
    }  # fmt: skip
    plain = {name: value.item() for name, value in numbers.items()}
    sampler, other = regular(**numbers), regular(**plain)
    for made in (sampler, other):
        made.set_epoch(np.int64(2))
    assert list(sampler) == list(other)
    assert repr(sampler) == repr(other)
    assert sampler.state_dict() == other.state_dict()
    assert {type(value) for value in sampler.state_dict(batches_done=np.int64(1)).values()} == {int, bool}
    for name in ("batch_size", "seed", "num_clusters", "num_replicas", "rank", "captions_per_image", "epoch"):
        assert type(getattr(sampler, name)) is int


@pytest.mark.parametrize(
    "made",
    [list, tuple, np.array, torch.tensor, lambda ids: np.array(ids, ">i2"), lambda ids: np.repeat(ids, 2)[::2],
     lambda ids: torch.tensor(ids).repeat_interleave(2)[::2], lambda ids: torch.tensor(ids, dtype=torch.uint8)],
)  # fmt: skip
def test_labels_and_counts_of_every_kind(made: object) -> None:
    ids, counts = [image % 12 for image in range(240)], [image % 4 for image in range(240)]
    expected = list(regular(cluster_ids=ids, captions_per_image=counts))
    assert list(regular(cluster_ids=made(ids), captions_per_image=made(counts))) == expected


def test_labels_may_be_a_range() -> None:
    options = {"clusters_per_batch": 2, "images_per_cluster": 1}
    by_range = NeighborBatchSampler(cluster_ids=range(6), **options)
    assert list(by_range) == list(NeighborBatchSampler(cluster_ids=list(range(6)), **options))


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((SequentialSampler([0]), 4, True), {}),
        ((SequentialSampler([0]),), {"batch_size": 4, "drop_last": True}),
        ((), {"sampler": SequentialSampler([0]), "batch_size": 4, "drop_last": True}),
        ((SequentialSampler([0]),), {"clusters_per_batch": 2, "images_per_cluster": 2}),
    ],
)
def test_rebuilt_as_a_batch_sampler_it_says_what_to_do(args: tuple, kwargs: dict) -> None:
    with pytest.raises(TypeError, match=r"like torch's BatchSampler.*use_distributed_sampler=False"):
        NeighborBatchSampler(*args, **kwargs)


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'batch'"):
        regular(batch=3)
    with pytest.raises(TypeError, match="clusters_per_batch"):
        NeighborBatchSampler(cluster_ids=[0])


def test_what_frameworks_look_at() -> None:
    sampler = regular()
    assert (sampler.batch_size, sampler.drop_last, sampler.num_replicas, sampler.rank) == (15, True, 1, 0)
    assert not isinstance(sampler, BatchSampler)
    assert isinstance(sampler, torch.utils.data.Sampler)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"cluster_ids": None}, ValueError, "exactly one of image_features and cluster_ids .* got neither"),
        ({"image_features": np.zeros((240, 2))}, ValueError, "exactly one of .* got both"),
        ({"cluster_ids": [0.5] * 240}, TypeError, "cluster_ids must be .* integers of at least 0, got float64"),
        ({"cluster_ids": torch.zeros(240)}, TypeError, "cluster_ids must be .* got torch.float32"),
        ({"cluster_ids": [True] * 240}, TypeError, "cluster_ids must be .* got bool"),
        ({"cluster_ids": "abc"}, TypeError, "cluster_ids must be .* got str"),
        ({"cluster_ids": [[0, 1], [0]]}, ValueError, "cluster_ids must be .* got nested lists"),
        ({"cluster_ids": np.zeros((2, 2), int)}, ValueError, r"cluster_ids must be .* got shape \(2, 2\)"),
        ({"cluster_ids": []}, ValueError, r"cluster_ids must be .* got shape \(0,\)"),
        ({"cluster_ids": [0] * 239 + [-1]}, ValueError, r"cluster_ids must be .* got -1 \.\. 0"),
        ({"cluster_ids": np.full(240, 2**63, np.uint64)}, ValueError, "cluster_ids must be .* below 2"),
        ({"num_clusters": 0}, ValueError, "num_clusters must be at least 1, got 0"),
        ({"num_clusters": 241}, ValueError, "num_clusters must be at most the number of images, 240, got 241"),
        ({"clusters_per_batch": 0}, ValueError, "clusters_per_batch must be at least 1, got 0"),
        ({"images_per_cluster": 2.0}, TypeError, "images_per_cluster must be an int"),
        ({"captions_per_image": 0}, ValueError, "captions_per_image must be at least 1, got 0"),
        ({"captions_per_image": [1] * 239}, ValueError, "captions_per_image must be one .* 240 images, got 239"),
        ({"captions_per_image": [-1] + [1] * 239}, ValueError, r"captions_per_image must be .* got -1 \.\. 1"),
        ({"captions_per_image": [0] * 240}, ValueError, "captions_per_image must count at least one caption"),
        ({"captions_per_image": True}, TypeError, "captions_per_image must be an int, got True"),
        ({"captions_per_image": 1.5}, TypeError, "captions_per_image must be .* got float"),
        ({"drop_last": 1}, TypeError, "drop_last must be True or False, got 1"),
        ({"shuffle": None}, TypeError, "shuffle must be True or False, got None"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"num_replicas": 0}, ValueError, "num_replicas must be at least 1, got 0"),
        ({"num_replicas": 2}, ValueError, "num_replicas=2 needs rank, because torch.distributed is not initialised"),
        ({"rank": 1}, ValueError, "rank=1 needs num_replicas, because torch.distributed is not initialised"),
        ({"num_replicas": 2, "rank": 2}, ValueError, "rank must be below num_replicas=2, got 2"),
        ({"num_replicas": 2, "rank": -1}, ValueError, "rank must be at least 0, got -1"),
        ({"cluster_ids": ["a"] * 240}, TypeError, "cluster_ids must be .* got <U1"),
        ({"cluster_ids": [None] * 240}, TypeError, "cluster_ids must be .* got object"),
        ({"cluster_ids": [0] * 239 + [True]}, TypeError, "cluster_ids must be .* got bool at index 239"),
        ({"cluster_ids": [0, np.True_] * 120}, TypeError, "cluster_ids must be .* got bool at index 1"),
        ({"cluster_ids": [-1] * 239 + [2**63]}, ValueError, "cluster_ids must be .* below .* got 9.* at index 239"),
        ({"cluster_ids": [-(2**63) - 1] * 240}, ValueError, "cluster_ids must be .* below .* at index 0"),
        ({"cluster_ids": [2**70] * 240}, ValueError, "cluster_ids must be .* below .* at index 0"),
        ({"cluster_ids": np.ma.arange(240)}, TypeError, "cluster_ids must be .* got MaskedArray"),
        ({"cluster_ids": {0: 1}}, TypeError, "cluster_ids must be .* got dict"),
        ({"cluster_ids": iter(range(240))}, TypeError, "cluster_ids must be .* got range_iterator"),
        ({"cluster_ids": np.array(3)}, ValueError, r"cluster_ids must be .* got shape \(\)"),
        ({"cluster_ids": np.zeros(240, "M8[s]")}, TypeError, "cluster_ids must be .* got datetime64"),
        ({"cluster_ids": torch.zeros(240, dtype=torch.bool)}, TypeError, "cluster_ids must be .* got bool"),
        ({"cluster_ids": torch.arange(240).to_sparse()}, TypeError, "cluster_ids must be .* got shape .*sparse"),
        ({"cluster_ids": torch.zeros(240, dtype=int, device="meta")}, TypeError, "cluster_ids must be .* meta"),
        ({"cluster_ids": torch.zeros(240, dtype=torch.complex64)}, TypeError, "cluster_ids must be .*complex64"),
        ({"num_clusters": True}, TypeError, "num_clusters must be an int, got True"),
        ({"num_clusters": 1.0}, TypeError, "num_clusters must be an int"),
        ({"clusters_per_batch": 2**63}, ValueError, "clusters_per_batch must be at most"),
        ({"clusters_per_batch": np.array([1])}, TypeError, "clusters_per_batch must be an int, got an array"),
        ({"images_per_cluster": torch.tensor(3)}, TypeError, "images_per_cluster must be an int, got a tensor"),
        ({"images_per_cluster": "3"}, TypeError, "images_per_cluster must be an int, got '3'"),
        ({"captions_per_image": np.True_}, TypeError, "captions_per_image must be an int"),
        ({"captions_per_image": 2**62 // 240 + 1}, ValueError, "captions_per_image must be at most"),
        ({"captions_per_image": [2**61] * 240}, ValueError, "captions_per_image must count at most"),
        ({"captions_per_image": [1.0] * 240}, TypeError, "captions_per_image must be .* got float64"),
        ({"captions_per_image": None}, TypeError, "captions_per_image must be .* got NoneType"),
        ({"seed": 2**128}, ValueError, "seed must be at most"),
        ({"seed": 1.0}, TypeError, "seed must be an int"),
        ({"seed": True}, TypeError, "seed must be an int"),
        ({"num_replicas": True, "rank": 0}, TypeError, "num_replicas must be an int"),
        ({"num_replicas": 2, "rank": True}, TypeError, "rank must be an int"),
        ({"num_replicas": 2, "rank": 1.0}, TypeError, "rank must be an int"),
        ({"rank": "0"}, TypeError, "rank must be an int, got '0'"),
        (
            {"cluster_ids": [0], "captions_per_image": 3, "drop_last": False, "num_replicas": 4, "rank": 0},
            ValueError, "at least one caption for each of num_replicas=4, got 3",
        ),
    ],
)  # fmt: skip
def test_bad_arguments(options: dict, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        regular(**options)


@pytest.mark.parametrize("epoch", [-1, 1.0, None])
def test_bad_epoch(epoch: object) -> None:
    with pytest.raises((TypeError, ValueError), match="epoch must be"):
        regular().set_epoch(epoch)


def test_too_few_captions_for_a_step_is_said() -> None:
    with pytest.warns(UserWarning, match=r"no batch: its 3 captions do not fill one step of .* = 4, and drop_last"):
        sampler = NeighborBatchSampler(cluster_ids=[0, 0, 0], clusters_per_batch=1, images_per_cluster=4)
    assert len(sampler) == 0 and list(sampler) == []


def test_too_few_captions_for_all_ranks_is_said() -> None:
    options = {"cluster_ids": [0] * 7, "clusters_per_batch": 1, "images_per_cluster": 4, "rank": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NeighborBatchSampler(**options, num_replicas=1)
    with pytest.warns(UserWarning, match=r"its 7 captions do not fill one step of .* = 8, and drop_last"):
        NeighborBatchSampler(**options, num_replicas=2)


def test_copies_give_the_same_and_go_their_own_way() -> None:
    sampler = regular(seed=3)
    sampler.set_epoch(2)
    size = len(pickle.dumps(sampler))
    expected = list(sampler)
    assert len(pickle.dumps(sampler)) <= size, "the order does not travel along"
    sampler.load_state_dict(sampler.state_dict(batches_done=4))
    for made in (copy.copy(sampler), copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        assert list(made) == expected[4:]
        assert list(made) == expected
    assert list(sampler) == expected[4:]
    for made in (copy.copy(sampler), copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        made.sampler.set_epoch(9)
        assert (made.epoch, sampler.epoch) == (9, 2)


def test_repr() -> None:
    assert repr(regular(num_replicas=2, rank=1)) == (
        "NeighborBatchSampler(cluster_ids=<240 images in 12 clusters>, num_clusters=None, clusters_per_batch=3, "
        "images_per_cluster=5, captions_per_image=3, drop_last=True, shuffle=True, seed=0, num_replicas=2, rank=1)"
    )
    assert "captions_per_image=<480 captions of 240 images>" in repr(regular(captions_per_image=[1, 3] * 120))


@given(st.data())
@settings(max_examples=60)
def test_sorting_by_several_keys(data: st.DataObject) -> None:
    """Packed into one number where they fit, and the same where they do not."""
    size = data.draw(st.integers(0, 40))
    bounds = data.draw(st.lists(st.sampled_from([1, 2, 5, 2**20, 2**45]), max_size=3))
    keys = [
        (np.array(data.draw(st.lists(st.integers(0, b - 1), min_size=size, max_size=size)), int), b) for b in bounds
    ]
    last = random_keys(data.draw(st.integers(0, 99)), 0)(size)
    expected = sorted(range(size), key=lambda i: (*(key[i] for key, _ in keys), last[i]))
    assert sort_by(keys, last).tolist() == expected
    if keys:
        expected = sorted(range(size), key=lambda i: tuple(key[i] for key, _ in keys))
        assert sort_by(keys).tolist() == expected


@pytest.mark.slow
@pytest.mark.parametrize("images_per_cluster", [1, 16])
def test_ten_million_captions(images_per_cluster: int) -> None:
    labels = np.random.default_rng(0).integers(0, 16000, 2_000_000)
    sampler = NeighborBatchSampler(
        cluster_ids=labels, captions_per_image=5, clusters_per_batch=128 // images_per_cluster,
        images_per_cluster=images_per_cluster, drop_last=False,
    )  # fmt: skip
    seen = np.zeros(10_000_000, np.int8)
    for batch in sampler:
        images = np.array(batch) // 5
        assert len(np.unique(images)) == len(batch)
        seen[batch] += 1
    assert (seen == 1).all()


@pytest.fixture
def in_group(request, monkeypatch):
    """Makes torch.distributed say that this is process ``group[1]`` of ``group[0]``, or, with None, that it is none."""
    group = request.param
    monkeypatch.setattr(processes, "_in_group", lambda: group is not None)
    if group is not None:
        monkeypatch.setattr(processes.dist, "get_world_size", lambda: group[0])
        monkeypatch.setattr(processes.dist, "get_rank", lambda: group[1])


@pytest.mark.parametrize(("in_group", "given", "expected"), [
    (None, (1, None), (1, 0)), (None, (3, 2), (3, 2)), (None, (None, None), None),
    ((2, 1), (2, None), (2, 1)), ((2, 1), (1, None), (1, 0)), ((2, 1), (None, 0), (2, 0)), ((2, 1), (3, 2), (3, 2)),
], indirect=["in_group"])  # fmt: skip
def test_ranks_that_are_not_given_come_from_the_group(in_group, given, expected):
    assert processes.check_ranks(*given) == expected


@pytest.mark.parametrize(("in_group", "given"), [
    (None, (2, None)), ((2, 1), (3, None)), (None, (None, 0)), (None, (2, 2)),
], indirect=["in_group"])  # fmt: skip
def test_ranks_that_do_not_fit_the_group(in_group, given):
    with pytest.raises(ValueError, match="num_replicas"):
        processes.check_ranks(*given)
