"""The attention and the layer against PyTorch's own, and what a row without any key does."""

from __future__ import annotations

import pytest
import torch
from support import assert_near, random_mask
from torch import nn

from hrem_layers._core.transformer import BiasedAttention, TransformerLayer

N, L, M, D, HEADS = 3, 6, 4, 16, 4


def torch_layer(ffn_dim):
    return nn.TransformerEncoderLayer(D, HEADS, ffn_dim, dropout=0.0, batch_first=True).double()


def shake(module):
    """Weights away from where they are initialised: biases of 0 and scales of 1 hide mistakes."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize("ffn_dim", [None, 40])
@pytest.mark.parametrize("biased", [False, True])
def test_layer_is_the_encoder_layer_of_torch(ffn_dim, biased):
    theirs = shake(torch_layer(ffn_dim or D))
    ours = TransformerLayer(D, num_heads=HEADS, ffn_dim=ffn_dim).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(N, L, D, dtype=torch.float64)
    bias = None
    if biased:
        bias = torch.randn(N, L, L, dtype=torch.float64).masked_fill(
            ~random_mask(N * L, L, 1).view(N, L, L), -torch.inf
        )
    results = []
    for module, mask in ((ours, bias), (theirs, None if bias is None else bias.repeat_interleave(HEADS, dim=0))):
        leaf = x.clone().requires_grad_()
        y = module(leaf, mask)
        y.square().sum().backward()
        results.append((y, leaf.grad, {name: p.grad for name, p in module.named_parameters()}))
    assert_near(results[0][0], results[1][0], 1e-12)
    assert_near(results[0][1], results[1][1], 1e-12)
    for name, grad in results[1][2].items():
        assert_near(results[0][2][name], grad, 1e-11, name)


def test_cross_attention_is_the_multihead_attention_of_torch():
    theirs = shake(nn.MultiheadAttention(D, HEADS, batch_first=True).double())
    ours = BiasedAttention(D, num_heads=HEADS).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    query, context = torch.randn(N, L, D).double(), torch.randn(N, M, D).double()
    bias = torch.randn(L, M).double()
    assert_near(ours(query, context, bias), theirs(query, context, context, attn_mask=bias)[0], 1e-12)
    assert_near(ours(query[0], context[0], bias), ours(query, context, bias)[0], 1e-12)  # without a batch
    assert_near(ours(query, query.clone(), None), ours(query, query, None), 1e-12)  # self- as cross-attention


def test_weights_start_as_in_torch():
    torch.manual_seed(3)
    theirs = nn.MultiheadAttention(D, HEADS)
    torch.manual_seed(3)
    ours = BiasedAttention(D, num_heads=HEADS)
    bound = (6 / (3 * D + D)) ** 0.5
    assert ours.in_proj_weight.abs().max() <= bound
    assert ours.in_proj_weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert not ours.in_proj_bias.any()
    assert not ours.out_proj.bias.any()
    assert theirs.in_proj_weight.std().item() == pytest.approx(ours.in_proj_weight.std().item(), rel=0.1)


def test_a_query_without_any_key_gets_zeros_and_leaves_the_others_alone():
    module = shake(BiasedAttention(D, num_heads=HEADS).double())
    x = torch.randn(L, D, dtype=torch.float64)
    bias = torch.zeros(L, L, dtype=torch.float64)
    bias[2] = -torch.inf
    leaf = x.clone().requires_grad_()
    y = module(leaf, leaf, bias)
    y.square().sum().backward()
    assert not y[2].any()
    assert torch.isfinite(leaf.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())
    others = [0, 1, 3, 4, 5]
    assert_near(y[others], module(x, x, torch.zeros_like(bias))[others], 1e-12)


def test_bias_is_additive_before_the_softmax():
    module = BiasedAttention(D, num_heads=1).double()
    x = torch.randn(L, D, dtype=torch.float64)
    bias = torch.randn(L, L, dtype=torch.float64)
    q, k, v = nn.functional.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, dim=-1)
    expected = module.out_proj(((q @ k.t()) / D**0.5 + bias).softmax(dim=-1) @ v)
    assert_near(module(x, x, bias), expected, 1e-12)


def test_dropout_acts_in_training_only_and_on_the_attention_weights_too():
    x = torch.randn(N, L, D)
    attention = BiasedAttention(D, num_heads=HEADS, dropout=0.5)
    assert not torch.equal(attention(x, x, None), attention(x, x, None))
    assert torch.equal(attention.eval()(x, x, None), attention(x, x, None))
    layer = TransformerLayer(D, num_heads=HEADS, dropout=0.5)
    layer.self_attn.dropout = 0.0
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))
    with torch.no_grad():  # dropout 0: training and evaluation agree
        still = TransformerLayer(D, num_heads=HEADS, dropout=0.0)
        assert torch.equal(still.train()(x), still.eval()(x))
