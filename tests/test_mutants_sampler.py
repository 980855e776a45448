"""Corners of the sampler that faults put into it have shown to be untested."""

from __future__ import annotations

import numpy as np
import pytest

from hrem_layers.sampler.arrays import sort_by


@pytest.mark.parametrize(("bits", "order"), [(50, [0, 1]), (51, [0, 1]), (52, [1, 0])])
def test_from_twelve_leading_bits_of_the_last_key_on_the_rest_does_not_count(bits, order):
    """Two items need a bit for the index; the last key is told apart by its lowest bit alone."""
    found = sort_by([(np.zeros(2, np.int64), 2**bits)], np.array([1, 0], np.uint64))
    assert found.tolist() == order


def test_pairs_of_images_and_steps_are_found_by_image() -> None:
    """Every image is in the steps that hold one of its captions, each once."""
    from hrem_layers import NeighborBatchSampler

    features = np.random.default_rng(0).standard_normal((40, 4)).astype(np.float32)
    sampler = NeighborBatchSampler(
        features, num_clusters=5, clusters_per_batch=2, images_per_cluster=4, captions_per_image=3
    )
    batches = [np.array(batch) // 3 for batch in sampler]
    assert all(len(np.unique(batch)) == len(batch) for batch in batches)  # no image twice in a batch
