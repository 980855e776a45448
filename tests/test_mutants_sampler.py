"""Corners of the sampler that faults put into it have shown to be untested."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
from torch.utils.data import SequentialSampler

from hrem_layers import NeighborBatchSampler
from hrem_layers.sampler.arrays import sort_by
from hrem_layers.sampler.assignment import Assignment
from hrem_layers.sampler.epoch import step_bounds
from hrem_layers.sampler.iteration import Position
from hrem_layers.sampler.layout import Layout
from hrem_layers.sampler.pieces import _times
from hrem_layers.sampler.processes import refuse_to_be_shared_out_twice
from hrem_layers.sampler.seeding import _squared_distances


@pytest.mark.parametrize(("bits", "order"), [(50, [0, 1]), (51, [0, 1]), (52, [1, 0])])
def test_from_twelve_leading_bits_of_the_last_key_on_the_rest_does_not_count(bits, order):
    """Two items need a bit for the index; the last key is told apart by its lowest bit alone."""
    found = sort_by([(np.zeros(2, np.int64), 2**bits)], np.array([1, 0], np.uint64))
    assert found.tolist() == order


def test_every_image_is_listed_with_each_step_that_holds_it_once() -> None:
    layout = Layout.build(np.array([2, 3, 1]), np.zeros(3, np.int64))
    order = np.array([0, 2, 1, 3, 5, 4])  # images 0, 1 | 0, 1 | 2, 1
    assignment = Assignment(order, np.array([0, 2, 4, 6]), layout)
    images, steps = assignment.steps_per_image(np.array([1, 0]))
    assert images.tolist() == [0, 0, 0, 1, 1] and steps.tolist() == [0, 1, 2, 0, 1]


@pytest.mark.parametrize(("items", "ranks"), [(16, 0), (17, 4), (19, 4), (20, 0), (21, 0)])
def test_ranks_are_in_a_state_where_they_are_more_than_what_is_left_over(items: int, ranks: int) -> None:
    sampler = NeighborBatchSampler(
        cluster_ids=[0] * items, images_per_cluster=2, clusters_per_batch=2, num_replicas=4, rank=0, drop_last=False
    )
    assert sampler.state_dict()["ranks_sharing_left_over"] == ranks


def test_the_only_step_begins_at_the_first_caption() -> None:
    """Even if it has fewer captions than there are ranks, of which no step before it can give up some."""
    assert step_bounds(captions=2, step_size=16, ranks=4, drop_last=False).tolist() == [0, 2]


def test_a_cluster_that_a_signed_number_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match=r"and below 2\^63, got 0 .. 9223372036854775808"):
        NeighborBatchSampler(cluster_ids=np.array([0, 2**63], np.uint64), images_per_cluster=1, clusters_per_batch=1)


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ((np.zeros((4, 2)), 2), {}),
        ((), {"sampler": None}),
        ((), {"batch_size": 2}),
        ((SequentialSampler(range(4)),), {}),
    ],
)
def test_a_call_like_those_of_torchs_batch_sampler_is_refused(args, options) -> None:
    with pytest.raises(TypeError, match="it was called like torch's BatchSampler"):
        NeighborBatchSampler(*args, **options)


def test_the_nearest_caller_that_shares_out_batches_is_found(monkeypatch) -> None:
    class Sharing:
        def ask(self, ranks: int) -> None:
            refuse_to_be_shared_out_twice(ranks)

    module = types.SimpleNamespace(BatchSamplerShard=Sharing, DataLoaderDispatcher=type("Other", (), {}))
    monkeypatch.setitem(sys.modules, "accelerate.data_loader", module)
    with pytest.raises(ValueError, match="num_replicas=2"):
        Sharing().ask(2)
    Sharing().ask(1)
    refuse_to_be_shared_out_twice(2)


def test_the_latest_time_of_a_piece_is_within_the_epoch() -> None:
    """Not 2^64, which 64 bits cannot hold."""
    latest = np.array([2**64 - 1], np.uint64)
    assert _times(np.array([0]), np.array([1]), 1, latest, lambda n: latest).tolist() == [2**64 - 2**11]


def test_squared_distances_of_rows_far_from_zero_are_not_negative() -> None:
    rows = 1e8 + np.random.default_rng(0).random((50, 3))
    assert (_squared_distances(rows, np.einsum("nd,nd->n", rows, rows), np.arange(50)) >= 0).all()


def test_a_sampler_begins_with_the_first_batch_of_epoch_zero() -> None:
    assert (Position().epoch, Position().resume_at, Position().epoch_before_load) == (0, 0, 0)
