"""Reductions over padded fragments.

Masks are bool, True = real. What is masked is left out before a maximum or a mean is taken; it is
never multiplied by zero, so NaN or inf in the padding reaches neither a value nor a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hrem_layers._core.numerics import compute_dtype, tie_tolerance


def zero_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x`` (..., R, D) with exact zeros where ``mask`` (..., R) is False, whatever stood there."""
    return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0)


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of the real rows of ``x`` (N, R, D) under ``mask`` (N, R) -> (N, D); no real row gives 0."""
    wide = x.to(compute_dtype(x.dtype))
    if mask is None:
        return wide.mean(dim=1).to(x.dtype)
    total = zero_padding(wide, mask).sum(dim=1)  # [n, d]
    count = mask.sum(dim=1, keepdim=True).clamp(min=1)  # [n, 1]
    return (total / count).to(x.dtype)


def masked_max_k_mean(x: Tensor, mask: Tensor | None, k: int) -> Tensor:
    """Per dimension, the mean of the ``k`` largest real values: x (N, R, D), mask (N, R) -> (N, D).

    An item with fewer than ``k`` real rows averages those it has; one without any gives 0. Neither
    changes ``k`` for the other items. Values that tie with the k-th (a few ulp apart) share its gradient.
    """
    wide = x.to(compute_dtype(x.dtype))
    k = min(k, x.shape[1])
    if mask is not None:
        wide = zero_padding(wide, mask)
    with torch.no_grad():
        values = wide if mask is None else wide.masked_fill(~mask.unsqueeze(-1), -torch.inf)
        largest = values.topk(k, dim=1).values  # [n, k, d]
        if mask is None:
            last, taken = largest[:, -1:], torch.full((1, 1, 1), k, device=x.device)
        else:
            taken = mask.sum(dim=1).clamp(max=k).view(-1, 1, 1)  # [n, 1, 1]
            last = largest.gather(1, (taken - 1).clamp(min=0).expand(-1, 1, x.shape[2]))  # [n, 1, d]
        tolerance = tie_tolerance(wide.dtype) * last.abs()
        above = values > last + tolerance
        tied = (values - last).abs() <= tolerance  # -inf - -inf is NaN: padding ties with nothing
        if mask is not None:
            tied &= mask.unsqueeze(-1)
        above, tied = above.to(wide.dtype), tied.to(wide.dtype)
        share = (taken - above.sum(dim=1, keepdim=True)) / tied.sum(dim=1, keepdim=True).clamp(min=1)
        weights = (above + tied * share) / taken.clamp(min=1)  # [n, r, d]
    return (wide * weights).sum(dim=1).to(x.dtype)
