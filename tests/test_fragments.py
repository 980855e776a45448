"""FragmentRelation: its formula, and that padding is not there."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import assert_near, generator, gradients, random_mask, repad
from torch import nn

from hrem_layers import FragmentRelation

D, HEADS = 8, 2


def relation(**options):
    torch.manual_seed(1)
    return FragmentRelation(D, num_heads=HEADS, **options).double().eval()


def fragments(n, r, seed=0):
    return torch.randn(n, r, D, generator=generator(seed), dtype=torch.float64)


def by_hand(module, x):
    """The formula on the real fragments of one item, x (R, D), with PyTorch's own layers."""
    related = x
    for layer in module.layers:
        torch_layer = nn.TransformerEncoderLayer(
            D, HEADS, layer.linear1.out_features, dropout=0.0, batch_first=True
        ).double()
        torch_layer.load_state_dict(layer.state_dict())
        related = torch_layer(related.unsqueeze(0)).squeeze(0)
    k = min(module.max_pool_k, len(x))
    pooled = x.sort(dim=0, descending=True).values[:k].mean(dim=0)
    return module.beta * pooled + (1 - module.beta) * related.mean(dim=0)


@settings(max_examples=40)
@given(
    n=st.integers(1, 4), r=st.integers(1, 6), seed=st.integers(0, 2**31), padded=st.booleans(),
    beta=st.sampled_from([0.0, 0.3, 0.8, 1.0]), k=st.integers(1, 7), layers=st.integers(1, 2),
    ffn_dim=st.sampled_from([None, 12]),
)  # fmt: skip
def test_formula(n, r, seed, padded, beta, k, layers, ffn_dim):
    module = relation(beta=beta, max_pool_k=k, num_layers=layers, ffn_dim=ffn_dim)
    x, mask = fragments(n, r, seed), random_mask(n, r, seed) if padded else None
    expected = torch.stack([by_hand(module, row if mask is None else row[keep]) for row, keep in
                            zip(x, [None] * n if mask is None else mask, strict=True)])  # fmt: skip
    assert_near(module(x, mask), expected, 1e-12)


@settings(max_examples=40)
@given(
    n=st.integers(1, 4), r=st.integers(1, 5), extra=st.integers(0, 4), seed=st.integers(0, 2**31),
    fill=st.sampled_from([None, math.nan, math.inf, -math.inf, 1e300]),
)  # fmt: skip
def test_padding_may_hold_anything_anywhere(n, r, extra, seed, fill):
    module = relation()
    x, mask = fragments(n, r, seed).requires_grad_(), random_mask(n, r, seed, at_least=0)
    wide, wide_mask, back = repad(x, mask, fill=fill, extra=extra, seed=seed)
    here, there = module(x, mask), module(wide, wide_mask)
    assert_near(there, here, 1e-12)
    here_grad, there_grad = gradients({"x": x}, here)["x"], gradients({"x": wide}, there)["x"]
    assert_near(back(there_grad), here_grad, 1e-10)
    assert not there_grad[~wide_mask].any()
    parameters = dict(module.named_parameters())
    here_grads, there_grads = (gradients(parameters, module(a, m)) for a, m in ((x, mask), (wide, wide_mask)))
    for name in parameters:
        # of n items without a real fragment nothing is left to compare with
        if mask.any():
            assert_near(there_grads[name], here_grads[name], 1e-9, name)
        assert torch.isfinite(there_grads[name]).all(), name


def test_order_of_the_batch_and_of_the_fragments():
    module, x, mask = relation(), fragments(4, 5), random_mask(4, 5, 0)
    out = module(x, mask)
    items, places = torch.tensor([2, 0, 3, 1]), torch.tensor([4, 2, 0, 1, 3])
    assert_near(module(x[items], mask[items]), out[items], 1e-12)
    assert_near(module(x[:, places], mask[:, places]), out, 1e-12)


def test_an_item_without_any_real_fragment_is_zero():
    module, x = relation(), fragments(3, 4).requires_grad_()
    mask = torch.tensor([[True, True, False, True], [False] * 4, [True] * 4])
    out = module(x, mask)
    assert not out[1].any()
    assert_near(out[[0, 2]], module(x[[0, 2]], mask[[0, 2]]), 1e-12)
    out.square().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert not x.grad[1].any()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())


def test_all_real_is_the_same_as_no_mask_and_an_empty_batch_has_no_rows():
    module, x = relation(), fragments(3, 4)
    assert_near(module(x, torch.ones(3, 4, dtype=torch.bool)), module(x), 1e-12)
    assert module(x[:0]).shape == (0, D)
    assert module(x[:0], torch.ones(0, 4, dtype=torch.bool)).shape == (0, D)


@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(masked):
    module, x = relation(), fragments(2, 4).requires_grad_()
    mask = torch.tensor([[True, False, True, True], [False, True, False, False]]) if masked else None
    assert torch.autograd.gradcheck(lambda leaf: module(leaf, mask), x)
    names = [name for name, _ in module.named_parameters()]

    def with_parameters(*parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x.detach(), mask))

    assert torch.autograd.gradcheck(with_parameters, tuple(module.parameters()), fast_mode=True)


def test_defaults():
    module = FragmentRelation(32)
    assert (module.beta, module.max_pool_k, len(module.layers)) == (0.8, 2, 1)
    layer = module.layers[0]
    assert (layer.self_attn.num_heads, layer.linear1.out_features, layer.dropout.p) == (16, 32, 0.1)
    assert layer.self_attn.dropout == 0.1
