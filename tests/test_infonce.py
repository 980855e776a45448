"""InfoNCELoss against torch's cross-entropy and against a loop, and its learnable temperature."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import assert_near, generator

from hrem_layers import InfoNCELoss

DOUBLE = torch.float64


def cosines(n, m, seed=0):
    return (2 * torch.rand(n, m, generator=generator(seed), dtype=DOUBLE) - 1).requires_grad_()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("learnable", [False, True])
def test_unique_ids_are_cross_entropy_both_ways(reduction, temperature, learnable):
    s = cosines(6, 6)
    loss = InfoNCELoss(temperature, learnable=learnable, reduction=reduction).double()
    target = torch.arange(6)
    expected = sum(F.cross_entropy(x / temperature, target, reduction=reduction) for x in (s, s.t())) / 2
    actual = loss(s, torch.eye(6, dtype=torch.bool))
    assert_near(actual, expected, 1e-7 if learnable else 1e-12)  # the parameter starts as a float32 logarithm
    for x, y in zip(torch.autograd.grad(actual, s), torch.autograd.grad(expected, s), strict=True):
        assert_near(x, y, 1e-6 if learnable else 1e-10)


def one_way_by_loop(s, positives, temperature, reduction):
    terms = []
    for row, is_positive in zip(s, positives, strict=True):
        if is_positive.any():
            normaliser = sum((x / temperature).exp() for x in row)
            logs = [((x / temperature).exp() / normaliser).log() for x, p in zip(row, is_positive, strict=True) if p]
            terms.append(-sum(logs) / len(logs))
    if not terms:
        return s.new_zeros(())
    return sum(terms) / (len(terms) if reduction == "mean" else 1)


@settings(max_examples=40)
@given(
    n=st.integers(1, 5), m=st.integers(1, 6), seed=st.integers(0, 2**31), reduction=st.sampled_from(["mean", "sum"]),
    density=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
)  # fmt: skip
def test_any_positives_are_the_loop(n, m, seed, reduction, density):
    s = cosines(n, m, seed)
    positives = torch.rand(n, m, generator=generator(seed + 1)) < density
    actual = InfoNCELoss(0.2, reduction=reduction)(s, positives)
    expected = sum(one_way_by_loop(*x, 0.2, reduction) for x in ((s, positives), (s.t(), positives.t()))) / 2
    assert abs(actual.item() - expected.item()) <= 1e-11 * max(1.0, expected.item())
    (ours,) = torch.autograd.grad(actual, s)
    theirs = torch.autograd.grad(expected, s)[0] if expected.requires_grad else torch.zeros_like(s)
    assert (ours - theirs).abs().max() <= 1e-10 * max(1.0, theirs.abs().max().item())


@pytest.mark.parametrize("learnable", [False, True])
def test_gradcheck(learnable):
    s = cosines(4, 5)
    positives = torch.rand(4, 5, generator=generator(1)) < 0.4
    loss = InfoNCELoss(0.5, learnable=learnable).double()
    assert torch.autograd.gradcheck(lambda x: loss(x, positives), s)
    if learnable:
        scale = torch.tensor(0.3, dtype=DOUBLE, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda x: torch.func.functional_call(loss, {"log_scale": x}, (s.detach(), positives)), scale
        )


def test_temperature_is_a_parameter_only_if_learnable():
    assert not list(InfoNCELoss().parameters())
    loss = InfoNCELoss(0.1, learnable=True)
    assert [name for name, _ in loss.named_parameters()] == ["log_scale"]
    assert loss.log_scale.item() == pytest.approx(math.log(10), rel=1e-6)
    loss(cosines(4, 4).float(), torch.eye(4, dtype=torch.bool)).backward()
    assert loss.log_scale.grad.item() != 0


def test_the_limit_on_the_temperature_is_held_and_left_again():
    """At the limit the gradient goes on, as in CLIP; a temperature that has reached 0.01 is not stuck there."""
    loss = InfoNCELoss(0.01, learnable=True)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.05)
    good, bad = torch.eye(4) * 0.1, 0.1 - torch.eye(4) * 0.1
    positives = torch.eye(4, dtype=torch.bool)

    def step(similarity):
        optimizer.zero_grad()
        value = loss(similarity, positives)
        value.backward()
        optimizer.step()
        return value

    for _ in range(50):  # all is well: a sharper softmax would be better still
        step(good)
    held = loss(good, positives)
    assert loss.log_scale.item() <= math.log(100) + 1e-6
    assert_near(held, F.cross_entropy(good * 100, torch.arange(4)), 1e-5)
    step(bad)
    assert loss.log_scale.item() < math.log(100) - 1e-3
    with torch.no_grad():
        loss.log_scale.fill_(10.0)
    loss.eval()
    assert_near(loss(good, positives), F.cross_entropy(good * 100, torch.arange(4)), 1e-5)
    assert loss.log_scale.item() == 10.0  # evaluation changes nothing


def test_several_calls_before_one_backward():
    # HREMLoss calls its pair loss four times
    loss = InfoNCELoss(0.01, learnable=True)
    with torch.no_grad():
        loss.log_scale.fill_(10.0)
    s, positives = cosines(4, 4).float(), torch.eye(4, dtype=torch.bool)
    sum(loss(s * k, positives) for k in range(1, 5)).backward()
    assert torch.isfinite(loss.log_scale.grad)


def test_large_logits_do_not_overflow():
    s = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], requires_grad=True)
    value = InfoNCELoss(1e-4)(s, torch.eye(2, dtype=torch.bool))
    worse = InfoNCELoss(1e-4)(-s, torch.eye(2, dtype=torch.bool))
    assert value.item() == 0
    assert worse.item() == pytest.approx(2e4)
    worse.backward()
    assert torch.isfinite(s.grad).all()


@pytest.mark.parametrize("fill", [True, False])
def test_all_or_no_positives(fill):
    s = cosines(3, 4)
    value = InfoNCELoss()(s, torch.full((3, 4), fill))
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(s.grad).all()
    if not fill:
        assert value.item() == 0
        assert not s.grad.any()


def test_batch_of_one():
    s = torch.tensor([[0.3]], requires_grad=True)
    value = InfoNCELoss()(s, torch.tensor([[True]]))
    value.backward()
    assert value.item() == 0
    assert s.grad.item() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32(dtype):
    s = cosines(5, 5).detach().to(dtype).requires_grad_()
    loss = InfoNCELoss(learnable=True).to(dtype)
    value = loss(s, torch.eye(5, dtype=torch.bool))
    assert value.dtype == torch.float32
    value.backward()
    assert s.grad.dtype == loss.log_scale.grad.dtype == dtype
    assert_near(value, InfoNCELoss()(s.float(), torch.eye(5, dtype=torch.bool)), 0.02)


def test_order_of_the_batch():
    s = cosines(5, 6)
    positives = torch.rand(5, 6, generator=generator(3)) < 0.4
    rows, columns = torch.randperm(5), torch.randperm(6)
    loss = InfoNCELoss()
    assert_near(loss(s[rows][:, columns], positives[rows][:, columns]), loss(s, positives), 1e-12)
    assert_near(loss(s.t(), positives.t()), loss(s, positives), 1e-12)


def test_defaults():
    loss = InfoNCELoss()
    assert (loss.temperature, loss.learnable, loss.reduction) == (0.07, False, "mean")
