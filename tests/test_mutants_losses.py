"""Corners of the pair losses that faults put into them have shown to be untested."""

from __future__ import annotations

import math

import pytest
import torch

from hrem_layers import TransformerLayer
from hrem_layers.losses import (
    InfoNCELoss,
    SigmoidLoss,
    distance_log_weights,
    distance_weighted_negative,
    every_negative_weights,
    expected_negative_weights,
    hardest_negative,
    info_nce_loss,
    sigmoid_loss,
)
from hrem_layers.losses.negatives import check_weight_options

EYE = torch.eye(3, dtype=torch.bool)
LARGEST = torch.finfo(torch.float32).max


@pytest.mark.parametrize(("loss", "name"), [(info_nce_loss, "scale"), (sigmoid_loss, "scale"), (sigmoid_loss, "bias")])
def test_a_number_that_float32_cannot_hold_is_refused_by_name(loss, name):
    with pytest.raises(ValueError, match=rf"{name} must be a number that float32 can hold"):
        loss(torch.zeros(3, 3), EYE, **{name: 1e300})
    loss(torch.zeros(3, 3), EYE, **{name: LARGEST})  # the largest that it can hold


WAYS = [
    lambda s: hardest_negative(s, EYE)[0],
    lambda s: distance_weighted_negative(s, EYE)[0],
    lambda s: every_negative_weights(s, EYE),
    lambda s: expected_negative_weights(s, EYE),
    lambda s: distance_log_weights(s, EYE).masked_fill(EYE, 0),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0), (0, 1), (2, 1)])
def test_every_choice_of_negatives_hands_non_finite_similarities_on(way, value, place):
    s = torch.rand(3, 3)
    assert torch.isfinite(way(s)).all()
    s[place] = value
    assert not torch.isfinite(way(s)).all()


@pytest.mark.parametrize("noise", [math.nan, math.inf])
def test_noise_that_is_not_finite_is_handed_on(noise):
    noise = torch.tensor([[0.5], [noise], [0.5]])
    assert distance_weighted_negative(torch.rand(3, 3), EYE, noise=noise)[0].isnan().all()


@pytest.mark.parametrize("name", ["log_scale", "bias"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [InfoNCELoss, SigmoidLoss])
def test_a_temperature_that_is_not_finite_is_neither_the_limit_nor_zero(make, training, value, name):
    loss = make(learnable=True).train(training)
    if not hasattr(loss, name):
        return
    getattr(loss, name).data.fill_(value)
    x = torch.eye(3, 4)
    assert loss(x @ x.t(), EYE).isnan()
    assert loss.from_embeddings(x, x).isnan()
    assert not torch.isfinite(getattr(loss, name))


def test_a_temperature_on_another_device_is_called_by_its_name():
    for make in (InfoNCELoss, SigmoidLoss):
        with pytest.raises(ValueError, match="log_scale must be on cpu"):
            make(learnable=True).to("meta")(torch.eye(3), EYE)


@pytest.mark.parametrize("way", WAYS)
def test_half_precision_is_computed_in_float32(way):
    s = torch.rand(3, 3).bfloat16()
    torch.manual_seed(1)
    found = way(s)
    torch.manual_seed(1)
    assert torch.equal(found, way(s.float()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5, 9)}, r"x must have shape \(\.\.\., n, 8\)"),
        ({"x": torch.zeros(2, 5, 8).double()}, r"x must be torch.float32 like the weights"),
        ({"x": torch.zeros(8)}, "x must have shape"),
        ({"bias": torch.zeros(5, 4)}, r"bias must have shape \(\.\.\., 5, 5\)"),
        ({"bias": torch.zeros(2, 5, 5, dtype=torch.bool)}, "bias must be a floating-point tensor"),
        ({"context": torch.zeros(2, 4, 9)}, "context must have shape"),
        ({"context": None, "x": [1.0]}, "x must be a tensor"),
    ],
)
def test_a_layer_names_the_argument_that_is_wrong(change, message):
    given = {"x": torch.zeros(2, 5, 8), **change}
    with pytest.raises((TypeError, ValueError), match=message):
        TransformerLayer(8, num_heads=2)(**given)


@pytest.mark.parametrize(
    ("weights", "x", "autocast", "message"),
    [
        (torch.float32, torch.float64, torch.bfloat16, "x must be torch.float32 like the weights"),
        (torch.bfloat16, torch.float32, torch.bfloat16, "x must be torch.bfloat16 like the weights"),
        (torch.bfloat16, torch.bfloat16, torch.float16, "autocast must be off, or to torch.bfloat16 like the weights"),
        (torch.float32, torch.bfloat16, torch.bfloat16, None),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16, None),
    ],
)
def test_which_dtypes_a_layer_takes_under_autocast(weights, x, autocast, message):
    layer, x = TransformerLayer(8, num_heads=2).to(weights), torch.zeros(2, 5, 8, dtype=x)
    with torch.autocast("cpu", dtype=autocast):
        if message is None:
            assert layer(x).shape == x.shape
        else:
            with pytest.raises(TypeError, match=message):
                layer(x)


def test_embeddings_on_a_circle_are_the_narrowest_with_weights():
    check_weight_options(cutoff=0.5, nonzero_cutoff=1.4, weight_dim=2)
    with pytest.raises(ValueError, match="weight_dim must be at least 2, got 1"):
        check_weight_options(cutoff=0.5, nonzero_cutoff=1.4, weight_dim=1)
