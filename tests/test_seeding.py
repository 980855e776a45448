"""Where k-means begins: the choices of scikit-learn's kmeans_plusplus, and what must be true of any."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrem_layers.sampler import seeding
from hrem_layers.sampler.seeding import plus_plus


@pytest.fixture(params=[0, 2**22], ids=["step by step", "all distances at once"], autouse=True)
def _few_pairs(request, monkeypatch):
    monkeypatch.setattr(seeding, "_FEW_PAIRS", request.param)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("state", range(5))
def test_chooses_as_scikit_learn_does(state, weighted):
    kmeans_plusplus = pytest.importorskip("sklearn.cluster").kmeans_plusplus
    random = np.random.default_rng(state)
    rows = random.standard_normal((200, 6)) + 5 * random.standard_normal((1, 6))
    weights = random.integers(0, 4, 200).astype(float) if weighted else None
    _, expected = kmeans_plusplus(rows, 30, sample_weight=weights, random_state=state)
    assert np.array_equal(plus_plus(rows, 30, weights, state), expected)


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(1, 30), different=st.integers(1, 30), number=st.integers(1, 30), state=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([np.float32, np.float64]), offset=st.sampled_from([0.0, 100.0]),
)  # fmt: skip
def test_different_rows_come_before_equal_ones(n, different, number, state, dtype, offset):
    random = np.random.default_rng(state)
    values = random.standard_normal((different, 3)) + offset
    of = random.integers(0, different, n)
    rows = values[of].astype(dtype)
    number = min(number, n)
    chosen = plus_plus(rows, number, None, state)
    assert len(np.unique(of[chosen])) == min(number, len(np.unique(of)))


def test_no_row_of_weight_zero_is_chosen():
    rows = np.random.default_rng(0).standard_normal((40, 3))
    weights = np.repeat([0.0, 1.0], 20)
    for state in range(10):
        assert sorted(plus_plus(rows, 20, weights, state)) == list(range(20, 40))


def test_the_state_decides():
    rows = np.random.default_rng(0).standard_normal((100, 3))
    first, again, other = (plus_plus(rows, 10, None, state) for state in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
