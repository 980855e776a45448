"""The masked reductions against loops, and the numerics that every part shares."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import assert_near, generator, random_mask

from hrem_layers._core.masked import masked_max_k_mean, masked_mean, zero_padding
from hrem_layers._core.numerics import (
    autocast_dtype,
    autocast_off,
    compute_dtype,
    cosine_matrix,
    l2_normalize,
    safe_reciprocal,
)

sizes = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 3))
seeds = st.integers(0, 2**31)


def case(size, seed, *, padded=True):
    n, r, d = size
    x = torch.randn(n, r, d, generator=generator(seed), dtype=torch.float64)
    return x, random_mask(n, r, seed, at_least=0) if padded else None


def real_rows(x, mask):
    return list(x) if mask is None else [row[keep] for row, keep in zip(x, mask, strict=True)]


@given(sizes, seeds, st.booleans())
def test_masked_mean_is_the_mean_of_the_real_rows(size, seed, padded):
    x, mask = case(size, seed, padded=padded)
    expected = [rows.mean(dim=0) if len(rows) else torch.zeros(size[2]).double() for rows in real_rows(x, mask)]
    assert_near(masked_mean(x, mask), torch.stack(expected), 1e-12)


@given(sizes, seeds, st.booleans(), st.integers(1, 8))
def test_max_k_mean_is_the_mean_of_the_k_largest_of_the_real_rows(size, seed, padded, k):
    x, mask = case(size, seed, padded=padded)
    expected = torch.zeros(size[0], size[2], dtype=torch.float64)
    for item, rows in enumerate(real_rows(x, mask)):
        for dimension in range(size[2]):
            largest = sorted(rows[:, dimension].tolist(), reverse=True)[:k]
            expected[item, dimension] = sum(largest) / max(1, len(largest))
    assert_near(masked_max_k_mean(x, mask, k), expected, 1e-12)


@pytest.mark.parametrize("reduce", [masked_mean, lambda x, mask: masked_max_k_mean(x, mask, 2)])
@pytest.mark.parametrize("fill", [math.nan, math.inf, -math.inf, 1e38])
def test_padding_reaches_neither_value_nor_gradient(reduce, fill):
    x = torch.randn(3, 5, 2)
    mask = torch.tensor([[True, False, True, True, False], [False, True, False, False, False], [False] * 5])
    plain = x.clone().requires_grad_()
    filled = x.masked_fill(~mask.unsqueeze(-1), fill).requires_grad_()
    results = [reduce(each, mask) for each in (plain, filled)]
    grads = [
        torch.autograd.grad(result.square().sum(), each)[0]
        for result, each in zip(results, (plain, filled), strict=True)
    ]
    assert torch.equal(*results)
    assert torch.equal(*grads)
    assert not grads[1][~mask].any()
    assert not results[1][2].any()  # nothing real


def test_one_short_item_does_not_change_k_for_the_others():
    x = torch.tensor([[[4.0], [2.0], [1.0]], [[5.0], [3.0], [9.0]]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert masked_max_k_mean(x, mask, 2).flatten().tolist() == [3.0, 5.0]


def test_zero_padding():
    x = torch.tensor([[[1.0], [math.nan]]])
    assert zero_padding(x, torch.tensor([[True, False]])).flatten().tolist() == [1.0, 0.0]
    assert zero_padding(x, None) is x


def test_half_types_are_reduced_in_float32():
    # a sum of 409600 is infinite in float16
    x = torch.full((1, 4096, 1), 100.0, dtype=torch.float16)
    mask = torch.ones(1, 4096, dtype=torch.bool)
    assert masked_mean(x, mask).item() == masked_mean(x, None).item() == 100
    assert masked_max_k_mean(x, mask, 4000).item() == masked_max_k_mean(x, None, 4000).item() == 100
    assert l2_normalize(torch.full((1, 4), 300.0, dtype=torch.float16)).tolist() == [[0.5] * 4]  # 4·300² > 65504
    assert [compute_dtype(d) for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)] == [
        torch.float32, torch.float32, torch.float32, torch.float64,
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept(dtype):
    x, mask = torch.randn(2, 3, 4).to(dtype), torch.ones(2, 3, dtype=torch.bool)
    assert l2_normalize(x).dtype == masked_mean(x, mask).dtype == masked_max_k_mean(x, mask, 2).dtype == dtype


def test_l2_normalize():
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    assert_near(l2_normalize(x), torch.nn.functional.normalize(x, dim=-1), 1e-12)
    assert torch.autograd.gradcheck(l2_normalize, x)


def test_a_zero_vector_stays_zero_with_zero_gradient():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    y = l2_normalize(x)
    (y * torch.tensor([[1.0, 2.0], [3.0, 1.0]])).sum().backward()
    assert_near(y, torch.tensor([[0.0, 0.0], [0.6, 0.8]]), 1e-6)
    assert x.grad[0].tolist() == [0.0, 0.0]
    assert x.grad[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_however_short_a_vector_is_its_gradient_is_finite(dtype):
    lowest = round(math.log10(torch.finfo(dtype).tiny))
    for exponent in range(lowest - 5, 1):
        x = torch.tensor([[1.0, -2.0, 0.5]], dtype=dtype) * 10.0**exponent
        y = l2_normalize(x.requires_grad_())
        y[0, 0].backward()
        assert torch.isfinite(x.grad).all(), exponent
        assert min(abs(y.norm().item() - 1), y.norm().item()) < 1e-2, exponent  # of length 1, or counted as 0


def test_safe_reciprocal():
    x = torch.tensor([0.0, 1e-9, 1e-3, 4.0], requires_grad=True)
    y = safe_reciprocal(x, 1e-6)
    y.sum().backward()
    assert_near(y, torch.tensor([0.0, 0.0, 1e3, 0.25]), 1e-6)
    assert_near(x.grad, torch.tensor([0.0, 0.0, -1e6, -0.0625]), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cosines_are_float32_also_under_autocast_and_from_half_types(dtype):
    x, y = (l2_normalize(torch.randn(4, 64)) for _ in range(2))
    with torch.autocast("cpu", dtype=dtype):
        under_autocast = cosine_matrix(x, y)
    assert under_autocast.dtype == torch.float32
    assert_near(under_autocast, x @ y.t(), 1e-6)
    from_half = cosine_matrix(x.to(dtype), y.to(dtype))
    assert from_half.dtype == torch.float32
    assert_near(from_half, x.to(dtype).float() @ y.to(dtype).float().t(), 1e-6)


def test_what_autocast_says():
    cpu, meta = torch.device("cpu"), torch.device("meta")
    assert autocast_dtype(cpu) is None
    assert autocast_dtype(meta) is None
    x = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert autocast_dtype(cpu) == torch.bfloat16
        with autocast_off(cpu), autocast_off(meta):
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16
