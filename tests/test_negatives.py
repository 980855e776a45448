"""Ways of choosing negatives: ties, thresholds, draws at the edges, and a way of one's own in TripletLoss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support import generator
from torch import nn

from hrem_layers import TripletLoss
from hrem_layers._core.numerics import tie_tolerance
from hrem_layers.losses import (
    distance_log_weights,
    distance_weighted_negative,
    every_negative_weights,
    expected_negative_weights,
    hardest_negative,
    triplet_loss,
)
from hrem_layers.losses.negatives import draw

DOUBLE = torch.float64


def none_of(s):
    return torch.zeros_like(s, dtype=torch.bool)


# the hardest


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("ulps", [0, 1, 4])
def test_negatives_equal_up_to_rounding_share_the_gradient_evenly(dtype, ulps):
    top = 0.75
    values = [top, 0.3, top - ulps * torch.finfo(dtype).eps, top + 0, 0.9]
    s = torch.tensor([values], dtype=dtype, requires_grad=True)
    negative, found = hardest_negative(s, torch.tensor([[False, False, False, False, True]]))
    negative.sum().backward()
    assert found.all()
    assert negative.item() == pytest.approx(top, abs=tie_tolerance(dtype))
    assert s.grad[0].tolist() == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3, 0])


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_negatives_that_differ_by_more_than_rounding_do_not_share(dtype):
    s = torch.tensor([[0.75, 0.75 - 20 * torch.finfo(dtype).eps, 0.1]], dtype=dtype, requires_grad=True)
    negative, _ = hardest_negative(s, none_of(s))
    negative.sum().backward()
    assert negative.item() == 0.75
    assert s.grad[0].tolist() == [1, 0, 0]


def test_the_loss_does_not_depend_on_which_of_tied_negatives_comes_first():
    s = torch.full((4, 4), 0.5, dtype=DOUBLE).requires_grad_()
    TripletLoss(negative_sampling="hardest")(s, torch.eye(4, dtype=torch.bool)).backward()
    off = s.grad[~torch.eye(4, dtype=torch.bool)]
    assert off.tolist() == pytest.approx([2 / 3] * 12)
    assert s.grad.diagonal().tolist() == [-2] * 4


def test_an_anchor_without_negative_is_not_found():
    s = torch.tensor([[0.3, 0.2], [0.3, 0.2]], requires_grad=True)
    positives = torch.tensor([[True, True], [True, False]])
    negative, found = hardest_negative(s, positives)
    negative.sum().backward()
    assert found.tolist() == [[False], [True]]
    assert negative[0].item() == 0
    assert s.grad.tolist() == [[0, 0], [0, 1]]


# distances


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize(("similarity", "nonzero_cutoff"), [(-1.0, 2.0), (0.5, 1.0), (-0.125, 1.5)])
def test_at_nonzero_cutoff_itself_the_weight_is_zero(dtype, similarity, nonzero_cutoff):
    # distances that are exact in floating point: 2, 1 and 1.5
    s = torch.tensor([[similarity, similarity + 0.01]], dtype=dtype)
    log_w = distance_log_weights(s, none_of(s), nonzero_cutoff=nonzero_cutoff)
    assert log_w[0, 0] == -math.inf
    assert torch.isfinite(log_w[0, 1])


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("cutoff", [1e-3, 0.1, 0.5, 1.0])
def test_the_cutoff_is_where_the_weight_becomes_flat(dtype, cutoff):
    d = cutoff * torch.tensor([[0.25, 0.5, 0.9, 1.1, 1.5]], dtype=DOUBLE)
    s = (1 - d**2 / 2).to(dtype)
    log_w = distance_log_weights(s, none_of(s), cutoff=cutoff, nonzero_cutoff=2, weight_dim=512)[0].double()
    d = d.clamp(min=cutoff)[0]
    expected = -510 * d.log() - 254.5 * (1 - d**2 / 4).log()
    assert log_w[0] == log_w[1] == log_w[2] > log_w[3] > log_w[4]
    # a distance of 1e-3 is 5e-7 away from 1 in s: float32 holds it to a tenth
    assert (log_w - expected).abs().max() < (1e-6 if dtype == DOUBLE else 60 if cutoff == 1e-3 else 0.05)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_near_opposite_points_the_weight_is_that_of_the_formula(dtype):
    for rest in (1e-1, 1e-2, 1e-4, 1e-5):  # 1 − d²/4 = (1 + s) / 2
        s = torch.tensor([[2 * rest - 1]], dtype=dtype)
        log_w = distance_log_weights(s, none_of(s), nonzero_cutoff=2, weight_dim=9).item()
        d2 = 4 * (1 - rest)
        assert log_w == pytest.approx(-7 / 2 * math.log(d2) - 3 * math.log(rest), rel=3e-3)


@pytest.mark.parametrize("over", [1 + 1.2e-7, 1 + 1e-5, -1 - 1.2e-7])
@pytest.mark.parametrize("sampling", ["distance_weighted", "expected"])
def test_beyond_1_by_rounding_there_is_no_nan(over, sampling):
    s = torch.tensor([[0.9, over], [over, 0.9]], requires_grad=True)
    loss = TripletLoss(negative_sampling=sampling, nonzero_cutoff=2)(s, torch.eye(2, dtype=torch.bool))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(s.grad).all()
    log_w = distance_log_weights(s, none_of(s), nonzero_cutoff=2)
    assert not torch.isnan(log_w).any()


# draws


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_a_draw_is_where_the_cumulative_weight_exceeds_the_noise(dtype):
    log_w = torch.tensor([[-math.inf, math.log(1), -math.inf, math.log(3), math.log(4), -math.inf]], dtype=dtype)
    for noise, expected in ((0, 1), (0.124, 1), (0.126, 3), (0.499, 3), (0.501, 4), (1 - 2**-24, 4)):
        drawn, found = draw(log_w, torch.tensor([[noise]], dtype=dtype))
        assert (drawn.item(), found.item()) == (expected, True)


@pytest.mark.parametrize("noise", [0.0, 0.5, 1 - 2**-24, 1.0])
@pytest.mark.parametrize("m", [1, 7, 5000])
def test_a_weight_of_zero_is_never_drawn(noise, m):
    g = generator(m)
    log_w = 200 * torch.randn(64, m, generator=g)
    log_w[torch.rand(64, m, generator=g) < 0.7] = -math.inf
    log_w[:, -1] = -math.inf
    drawn, found = draw(log_w, torch.full((64, 1), noise))
    assert torch.equal(found, (log_w > -math.inf).any(dim=1, keepdim=True))
    assert ((log_w.gather(1, drawn) > -math.inf) | ~found).all()


def test_draws_among_many_equal_negatives_are_even():
    """20,000 equal weights in float32: sums of their parts keep every one of them within reach."""
    log_w = torch.zeros(1, 20000).expand(50, -1)
    noise = ((torch.arange(50.0) + 0.5) / 50).unsqueeze(1)
    drawn, _ = draw(log_w, noise)
    assert (drawn - noise * 20000).abs().max() <= 2


def test_expected_weights_are_the_shares_of_draws():
    g = generator(3)
    s = 2 * torch.rand(1, 9, generator=g, dtype=DOUBLE) - 1
    positives = torch.arange(9).unsqueeze(0) == 4
    options = {"cutoff": 0.5, "nonzero_cutoff": 1.7, "weight_dim": 6}
    # evenly spaced noise makes the shares exact to 1 / 20000 per item
    noise = ((torch.arange(20000, dtype=DOUBLE) + 0.5) / 20000).unsqueeze(1)
    negative, found = distance_weighted_negative(s.expand(20000, 9), positives.expand(20000, 9), noise=noise, **options)
    assert found.all()
    shares = (negative == s).double().mean(dim=0)
    assert (shares - expected_negative_weights(s, positives, **options)[0]).abs().max() <= 1e-4


def test_weights_of_all_and_expected():
    s = torch.tensor([[0.9, 0.3, 0.3], [0.1, -0.9, 0.2]])
    positives = torch.tensor([[True, False, False], [True, False, True]])
    assert every_negative_weights(s, positives).tolist() == [[0, 1, 1], [0, 1, 0]]
    weights = expected_negative_weights(s, positives)
    assert weights.tolist() == [[0, 0.5, 0.5], [0, 0, 0]]  # at a distance of 1.95 there is no candidate


# one's own


def by_columns(similarity, positives):
    """The first negative of each row: any rule that tells rows from columns."""
    first = (~positives).to(torch.uint8).argmax(dim=1, keepdim=True)
    return similarity.gather(1, first), ~positives.all(dim=1, keepdim=True)


def test_a_callable_is_asked_for_both_directions():
    g = generator(0)
    s = torch.rand(3, 5, generator=g, dtype=DOUBLE, requires_grad=True)
    positives = torch.rand(3, 5, generator=g) < 0.4
    positives[1] = True
    seen = []

    def choose(similarity, flags):
        seen.append((similarity.shape, flags.shape))
        return by_columns(similarity, flags)

    loss = TripletLoss(0.4, negative_sampling=choose)(s, positives)
    assert seen == [((3, 5), (3, 5)), ((5, 3), (5, 3))]
    expected = s.new_zeros(())
    for x, flags in ((s, positives), (s.t(), positives.t())):
        for row, flag in zip(x, flags, strict=True):
            others = [k for k in range(len(row)) if not flag[k]]
            if others:
                expected = expected + sum((0.4 - row[k] + row[others[0]]).clamp(min=0) for k in flag.nonzero()[:, 0])
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    ours, theirs = torch.autograd.grad(loss, s)[0], torch.autograd.grad(expected, s)[0]
    assert (ours - theirs).abs().max() < 1e-12
    assert TripletLoss(negative_sampling=choose).draw_noise(s) is None


def test_the_librarys_own_functions_are_such_callables():
    g = generator(1)
    s, positives = 2 * torch.rand(6, 8, generator=g, dtype=DOUBLE) - 1, torch.rand(6, 8, generator=g) < 0.3
    for name, function in (("hardest", hardest_negative), ("distance_weighted", distance_weighted_negative)):
        values = []
        for choice in (name, function):
            torch.manual_seed(2)
            values.append(triplet_loss(s, positives, negative_sampling=choice))
        if name == "hardest":
            assert values[0] == values[1]
        else:  # one generator, in the same order: N numbers, then M
            assert values[0].item() == pytest.approx(values[1].item(), abs=1e-12)


class Learned(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, similarity, positives):
        negative, found = hardest_negative(similarity, positives)
        return negative + self.shift, found


def test_a_module_is_trained_along():
    loss = TripletLoss(negative_sampling=Learned())
    assert [name for name, _ in loss.named_parameters()] == ["negative_sampling.shift"]
    loss(torch.rand(4, 4), torch.eye(4, dtype=torch.bool)).backward()
    assert loss.negative_sampling.shift.grad.item() > 0
    assert "negative_sampling=Learned" in repr(loss)
    assert "negative_sampling=by_columns" in repr(TripletLoss(negative_sampling=by_columns))


def test_a_half_result_and_a_list_are_fine():
    s, positives = torch.rand(3, 3), torch.eye(3, dtype=torch.bool)

    def half(similarity, flags):
        negative, found = hardest_negative(similarity, flags)
        return [negative.half(), found]

    value = TripletLoss(negative_sampling=half)(s, positives)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(triplet_loss(s, positives, negative_sampling="hardest").item(), abs=1e-2)


S = torch.zeros(3, 4)
COLUMN, FOUND = torch.zeros(3, 1), torch.ones(3, 1, dtype=torch.bool)


@pytest.mark.parametrize(
    ("result", "error", "said"),
    [
        (None, TypeError, r"must return \(negative, found\), got None"),
        (COLUMN, TypeError, r"must return \(negative, found\), got a tensor of shape \(3, 1\)"),
        ((COLUMN,), TypeError, r"must return \(negative, found\), got a tuple of 1"),
        ((COLUMN, FOUND, FOUND), TypeError, r"must return \(negative, found\), got a tuple of 3"),
        ((COLUMN.flatten(), FOUND), ValueError, r"negative.*must have shape \(3, 1\), got shape \(3,\)"),
        ((COLUMN.long(), FOUND), TypeError, "negative.*must be a floating-point tensor, got .*int64"),
        ((COLUMN.numpy(), FOUND), TypeError, "negative.*must be a tensor of shape .*, got ndarray"),
        ((COLUMN, FOUND.flatten()), ValueError, r"found.*must have shape \(3, 1\).*, got shape \(3,\)"),
        ((COLUMN, FOUND.float()), TypeError, "found.*must be a dense bool tensor.*, got .*float32"),
        ((COLUMN, True), TypeError, "found.*must be a bool tensor.*, got True"),
        ((COLUMN.to("meta"), FOUND), ValueError, "negative.*must be on cpu"),
        ((COLUMN, FOUND.to("meta")), ValueError, "found.*must be on cpu"),
    ],
)
def test_what_a_callable_returns_is_checked(result, error, said):
    loss = TripletLoss(negative_sampling=lambda similarity, positives: result)
    with pytest.raises(error, match=f"negative_sampling.*{said}|{said}"):
        loss(S, none_of(S))


@pytest.mark.parametrize("call", [TripletLoss, lambda **o: triplet_loss(S, none_of(S), **o)])
@pytest.mark.parametrize(
    ("value", "error", "said"),
    [
        (Learned, TypeError, "got the class Learned: pass an instance"),
        ("closest", ValueError, r"'hardest', 'all', 'expected', or a callable .* got 'closest' \(str\)"),
        (3, ValueError, r"or a callable .* got 3 \(int\)"),
        (None, ValueError, "or a callable .* got None"),
        (np.zeros(3), ValueError, "or a callable .* got an array"),
    ],
)
def test_what_no_way_of_choosing_is(call, value, error, said):
    with pytest.raises(error, match=f"negative_sampling must be .*{said}"):
        call(negative_sampling=value)
