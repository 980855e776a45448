"""Corners of the sampler that faults put into it have shown to be untested."""

from __future__ import annotations

import numpy as np
import pytest

from hrem_layers.sampler.arrays import sort_by
from hrem_layers.sampler.assignment import Assignment
from hrem_layers.sampler.layout import Layout


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
