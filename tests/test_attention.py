"""Attention in parts is attention, with the dropout that forward drew, and holds few weights."""

from __future__ import annotations

import pytest
import torch
from support import assert_near
from torch.nn.functional import scaled_dot_product_attention

from hrem_layers._core import attention
from hrem_layers._core.attention import _draw_kept_, attend

N, HEADS, L, M, D = 5, 4, 6, 7, 3
BIASES = [(L, M), (1, L, M), (HEADS, L, M), (N, 1, L, M), (N, 1, 1, M), (1, HEADS, L, M)]


@pytest.fixture(params=[(1, L), (2, L), (3, L), (1, 4), (2, 1)], ids=lambda cut: f"{cut[0]} x {cut[1]} at a time")
def in_parts(request, monkeypatch):
    """Every call in parts of so many items of the first dimension and so many queries (the last may have fewer)."""
    apply = attention._AttendInParts.apply
    calls = []

    def called(*arguments):
        calls.append(arguments)
        return apply(*arguments[:-1], attention._Cut(*request.param))

    monkeypatch.setattr(attention, "_WEIGHTS_AT_ONCE", 1)
    monkeypatch.setattr(attention._AttendInParts, "apply", called)
    yield
    assert calls


def tensors(*bias_shape, dtype=torch.float64):
    lead = (HEADS,) if len(bias_shape) == 3 else (N, HEADS)
    shapes = (*lead, L, D), (*lead, M, D), (*lead, M, D), bias_shape
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("bias_shape", BIASES, ids=str)
def test_parts_give_the_whole(bias_shape, in_parts):
    q, k, v, bias = given = tensors(*bias_shape)
    with torch.no_grad():
        bias[..., 2] = -torch.inf
    grad = torch.randn_like(q)
    results = [f(q, k, v, bias, 0.0) for f in (attend, scaled_dot_product_attention)]
    assert_near(*results, 1e-12)
    for ours, theirs in zip(*(torch.autograd.grad(x, given, grad) for x in results), strict=True):
        assert_near(ours, theirs, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_parts_keep_the_dtype_and_compute_in_float32(dtype, autocast, in_parts):
    given = tensors(1, L, M, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in given]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = attend(*given, 0.0)
    assert out.dtype == dtype
    out.sum().backward()
    scaled_dot_product_attention(*exact).sum().backward()
    for ours, theirs in zip(given, exact, strict=True):
        assert ours.grad.dtype == dtype
        assert_near(ours.grad.double(), theirs.grad, 20 * torch.finfo(dtype).eps)


def test_backward_draws_the_dropout_of_forward_and_leaves_the_random_state_alone(in_parts):
    given = tensors(1, L, M)

    def seeded(*given):
        torch.manual_seed(5)
        out = attend(*given, 0.5)
        torch.manual_seed(6)  # what backward finds must not matter
        return out

    assert not torch.equal(seeded(*given), attend(*given, 0.0))
    assert torch.autograd.gradcheck(seeded, given)
    out = seeded(*given)
    before = torch.get_rng_state()
    out.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_drops_its_share_and_keeps_the_mean(in_parts):
    bias = tensors(1, L, M)[3]
    eye = torch.eye(M, dtype=torch.float64).expand(HEADS, M, M)  # the output is then the weights
    outs = torch.stack([attend(torch.zeros(HEADS, L, M).double(), eye, eye, bias, 0.25) for _ in range(200)])
    whole = scaled_dot_product_attention(torch.zeros(HEADS, L, M).double(), eye, eye, bias)
    assert ((outs == 0).double().mean() - 0.25).abs() < 0.02
    assert ((outs.mean(dim=0) - whole).abs() < 0.3 * whole.max()).all()
    kept = outs != 0
    assert_near(outs[kept], (whole / 0.75).expand_as(outs)[kept], 1e-12)


def test_few_weights_are_held_for_backward(monkeypatch):
    def saved(weights_at_once):
        monkeypatch.setattr(attention, "_WEIGHTS_AT_ONCE", weights_at_once)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            q, k, v = (torch.randn(HEADS, 50, 2, requires_grad=True) for _ in range(3))
            attend(q, k, v, torch.zeros(1, 50, 50, requires_grad=True), 0.1)
        return max(sizes)

    assert saved(2**21) == HEADS * 50 * 50
    assert saved(1) <= 50 * 50


def test_one_long_item_is_cut_between_its_queries(monkeypatch):
    seen = []
    room = attention._room
    monkeypatch.setattr(attention, "_WEIGHTS_AT_ONCE", 4 * 60)
    monkeypatch.setattr(attention, "_room", lambda *given: seen.append(room(*given)) or seen[-1])
    q, k, v = (torch.randn(1, 2, 60, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = torch.zeros(1, 1, 1, 60, dtype=torch.float64).masked_fill(torch.arange(60) > 40, -torch.inf)
    torch.manual_seed(0)
    attend(q, k, v, mask, 0.5).sum().backward()
    assert seen
    assert all(x.numel() <= 4 * 60 for x in seen)


def test_second_derivatives_are_refused(in_parts):
    q, *others = tensors(1, L, M)
    (grad,) = torch.autograd.grad(attend(q, *others, 0.0).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("requires_grad", [False, True])
def test_without_a_learned_bias_torch_does_it(monkeypatch, requires_grad):
    monkeypatch.setattr(attention._AttendInParts, "apply", None)
    monkeypatch.setattr(attention, "_WEIGHTS_AT_ONCE", 1)
    q, k, v, bias = tensors(1, L, M)
    attend(q, k, v, None, 0.0)
    attend(q, k, v, bias.detach(), 0.0)
    attend(q, k, v, bias.detach(), 0.0)
    if not requires_grad:
        with torch.no_grad():
            attend(q, k, v, bias, 0.0)


@pytest.mark.parametrize("dropout", [2.0**-18, 0.1, 0.5, 0.999999])
def test_dropout_in_parts_keeps_the_share_that_it_should_and_the_mean(dropout):
    torch.manual_seed(0)
    n = 2**20 + 3  # no multiple of the draws in a word
    keep = _draw_kept_(torch.empty(n), dropout)
    probability = max(1, round((1 - dropout) * 2**16)) / 2**16
    assert abs(probability - (1 - dropout)) <= 2**-16
    assert set(keep.unique().tolist()) <= {0.0, float(torch.tensor(1 / probability, dtype=torch.float32))}
    spread = (probability * (1 - probability) / n) ** 0.5
    assert abs(float((keep > 0).double().mean()) - probability) <= 5 * spread
    four = (keep[: n // 4 * 4].view(-1, 4) > 0).double()  # the draws of one word: alike, and independent
    assert (four.mean(dim=0) - probability).abs().max() <= 10 * spread
    products = (four[:, :, None] * four[:, None]).mean(dim=0)
    off_diagonal = products[~torch.eye(4, dtype=torch.bool)]
    assert (off_diagonal - probability**2).abs().max() <= 20 * spread
    torch.manual_seed(0)
    assert torch.equal(_draw_kept_(torch.empty(n), dropout), keep), "the generator's seed decides"
