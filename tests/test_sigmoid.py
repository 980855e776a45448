"""SigmoidLoss against a loop over pairs, and its scale and bias."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import assert_near, generator
from torch import nn

from hrem_layers import SigmoidLoss
from hrem_layers.losses import _rows, sigmoid_loss

DOUBLE = torch.float64


def case(n, m, seed, density=0.3):
    g = generator(seed)
    s = (2 * torch.rand(n, m, generator=g, dtype=DOUBLE) - 1).requires_grad_()
    return s, torch.rand(n, m, generator=g) < density


def by_loop(s, positives, scale, bias, reduction):
    total = s.new_zeros(())
    for row, flags in zip(s, positives, strict=True):
        for value, positive in zip(row, flags, strict=True):
            z = 1 if positive else -1
            total = total + (1 + (-z * (scale * value + bias)).exp()).log()
    return total / max(s.shape) if reduction == "mean" else total


@pytest.mark.parametrize("elements", [2**40, 11], ids=["whole", "in chunks"])
@pytest.mark.parametrize(("scale", "bias"), [(True, False), (False, True), (True, True), (False, False)])
def test_numbers_that_are_tensors_are_numbers_with_a_gradient(monkeypatch, elements, scale, bias):
    monkeypatch.setattr(_rows, "CHUNK_ELEMENTS", elements)
    s, positives = case(6, 8, 4)
    numbers = {"scale": 3.0, "bias": -1.0}
    numbers |= {
        name: torch.tensor(numbers[name], dtype=DOUBLE, requires_grad=True)
        for name, given in (("scale", scale), ("bias", bias))
        if given
    }
    leaves = [s, *(x for x in numbers.values() if isinstance(x, torch.Tensor))]
    actual, expected = sigmoid_loss(s, positives, **numbers), by_loop(s, positives, **numbers, reduction="mean")
    assert_near(actual, expected, 1e-12)
    for x, y in zip(*(torch.autograd.grad(loss, leaves) for loss in (actual, expected)), strict=True):
        assert_near(x, y, 1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("learnable", [True, False])
@settings(max_examples=15)
@given(n=st.integers(1, 5), m=st.integers(1, 8), seed=st.integers(0, 2**31), density=st.sampled_from([0, 0.3, 1.0]))
def test_loss_is_that_of_the_loop_over_pairs(reduction, learnable, n, m, seed, density):
    s, positives = case(n, m, seed, density)
    loss = SigmoidLoss(0.25, bias=-1.5, learnable=learnable, reduction=reduction)
    expected = by_loop(s, positives, 4.0, -1.5, reduction)
    actual = loss(s, positives)
    assert_near(actual, expected, 1e-6 if learnable else 1e-12)  # the parameter is a float32 logarithm
    assert_near(torch.autograd.grad(actual, s)[0], torch.autograd.grad(expected, s)[0], 1e-6 if learnable else 1e-10)


def test_with_one_positive_per_row_it_is_the_papers_mean_over_images():
    s, _ = case(6, 6, 0)
    z = 2 * torch.eye(6, dtype=DOUBLE) - 1
    papers = -torch.nn.functional.logsigmoid(z * (10 * s - 10)).sum() / 6
    assert_near(SigmoidLoss(learnable=False)(s, torch.eye(6, dtype=torch.bool)), papers, 1e-12)


@pytest.mark.parametrize(("n", "m"), [(3, 15), (15, 3)])
def test_mean_divides_by_the_larger_side(n, m):
    s, positives = case(n, m, 1)
    mean, total = (sigmoid_loss(s, positives, reduction=r) for r in ("mean", "sum"))
    assert_near(mean * 15, total, 1e-12)


def test_scale_and_bias_are_parameters_that_learn():
    loss = SigmoidLoss()
    assert {name for name, _ in loss.named_parameters()} == {"log_scale", "bias"} == set(loss.state_dict())
    assert loss.log_scale.item() == pytest.approx(math.log(10))
    assert loss.bias.item() == -10
    s, positives = case(4, 4, 2)
    loss(s, positives).backward()
    assert loss.log_scale.grad.item() != 0
    assert loss.bias.grad.item() != 0
    fixed = SigmoidLoss(learnable=False)
    assert not list(fixed.parameters())
    assert not fixed.state_dict()


@pytest.mark.parametrize("what", ["log_scale", "bias"])
def test_gradcheck(what):
    s, positives = case(3, 4, 3)
    loss = SigmoidLoss(0.5, bias=-1.0).double()
    assert torch.autograd.gradcheck(lambda x: loss(x, positives), s)
    x = torch.tensor(0.3, dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: torch.func.functional_call(loss, {what: x}, (s.detach(), positives)), x)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_parameters_of_a_model_are_shared(shape):
    model = nn.Module()
    model.logit_scale = nn.Parameter(torch.full(shape, 2.0))
    model.logit_bias = nn.Parameter(torch.full(shape, -3.0))
    loss = SigmoidLoss(log_scale=model.logit_scale, bias=model.logit_bias)
    assert loss.log_scale is model.logit_scale
    assert loss.bias is model.logit_bias
    assert not list(loss.parameters())
    assert not loss.state_dict()
    s, positives = case(4, 5, 4)
    value = loss(s, positives)
    assert_near(value, by_loop(s, positives, math.exp(2.0), -3.0, "mean"), 1e-6)
    value.backward()
    assert model.logit_scale.grad.abs().item() > 0
    assert model.logit_bias.grad.abs().item() > 0
    # one of them can be the loss's own
    mixed = SigmoidLoss(bias=model.logit_bias)
    assert [name for name, _ in mixed.named_parameters()] == ["log_scale"]
    both = copy.deepcopy(nn.ModuleDict({"model": model, "loss": loss}))
    assert both["loss"].log_scale is both["model"].logit_scale


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32(dtype):
    s, positives = case(5, 6, 5)
    half = s.detach().to(dtype).requires_grad_()
    value = SigmoidLoss()(half, positives)
    assert value.dtype == torch.float32
    assert torch.equal(value, SigmoidLoss()(half.float(), positives))
    value.backward()
    assert half.grad.dtype == dtype


def test_large_logits_do_not_overflow():
    s = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], requires_grad=True)
    positives = torch.eye(2, dtype=torch.bool)
    right, wrong = (SigmoidLoss(1e-3, bias=0.0, reduction="sum")(x, positives) for x in (s, -s))
    assert right.item() == 0
    assert wrong.item() == pytest.approx(4e3)
    wrong.backward()
    assert torch.isfinite(s.grad).all()


def test_order_of_the_batch():
    s, positives = case(5, 6, 6)
    rows, columns = torch.randperm(5), torch.randperm(6)
    loss = SigmoidLoss()
    assert_near(loss(s[rows][:, columns], positives[rows][:, columns]), loss(s, positives), 1e-12)
    assert_near(loss(s.t(), positives.t()), loss(s, positives), 1e-12)


def test_repr_rebuilds():
    loss = SigmoidLoss(0.2, bias=-5.0, learnable=False, reduction="sum")
    rebuilt = eval(repr(loss), {"SigmoidLoss": SigmoidLoss})
    assert (
        repr(rebuilt) == repr(loss) == ("SigmoidLoss(0.2, bias=-5.0, learnable=False, log_scale=None, reduction='sum')")
    )


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"temperature": 0}, ValueError, "temperature must be finite and greater than 0, got 0"),
        ({"temperature": "0.1"}, TypeError, "temperature must be a number, got '0.1'"),
        ({"temperature": torch.ones(2)}, TypeError, "temperature must be a number, got a tensor"),
        ({"bias": math.nan}, ValueError, "bias must be finite, got nan"),
        ({"bias": None}, TypeError, "bias must be a number, got None"),
        ({"bias": nn.Parameter(torch.zeros(2))}, ValueError, "bias must have one element, got shape"),
        ({"learnable": 1}, TypeError, "learnable must be True or False"),
        ({"log_scale": 2.0}, TypeError, "log_scale must be a torch.nn.Parameter of one element"),
        ({"log_scale": torch.zeros(())}, TypeError, "log_scale must be a torch.nn.Parameter of one element"),
        ({"log_scale": nn.Parameter(torch.zeros(2, 2))}, ValueError, "log_scale must have"),
        ({"log_scale": nn.Parameter(torch.zeros(())), "temperature": 0.2}, ValueError, "log_scale must come without"),
        ({"reduction": "none"}, ValueError, "reduction must be one of 'sum', 'mean'"),
    ],
)
def test_options_are_checked(options, error, said):
    with pytest.raises(error, match=said):
        SigmoidLoss(**options)
