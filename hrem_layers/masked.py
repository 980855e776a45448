"""Reductions over padded fragments, and the numerics that every part shares.

Masks are bool, True = real. What is masked is left out before a maximum or a mean is taken; it is
never multiplied by zero, so NaN or inf in the padding reaches neither a value nor a gradient.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which reductions run: float32 for the half types, else the dtype itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def zero_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x`` (..., R, D) with exact zeros where ``mask`` (..., R) is False, whatever stood there."""
    return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0)


def l2_normalize(x: Tensor) -> Tensor:
    """``x / ‖x‖₂`` over the last dimension, in the dtype of ``x``; the norm is taken in float32 or better.

    A zero vector stays zero and gets a zero gradient. (A norm clamped to a small epsilon instead
    would hand such a vector the gradient divided by that epsilon.)
    """
    wide = x.to(compute_dtype(x.dtype))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    # 1 / norm² appears in the gradient and must not overflow
    return (wide * safe_reciprocal(norm, torch.finfo(wide.dtype).tiny ** 0.5)).to(x.dtype)


def safe_reciprocal(x: Tensor, smallest: float) -> Tensor:
    """``1 / x`` where ``x > smallest``, elsewhere 0 with zero gradient."""
    nonzero = x > smallest
    return torch.where(nonzero, 1 / torch.where(nonzero, x, 1), 0)


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
    changes ``k`` for the other items.
    """
    wide = x.to(compute_dtype(x.dtype))
    k = min(k, x.shape[1])
    if mask is None:
        return wide.topk(k, dim=1).values.mean(dim=1).to(x.dtype)
    largest = wide.masked_fill(~mask.unsqueeze(-1), -torch.inf).topk(k, dim=1).values  # [n, k, d]
    count = mask.sum(dim=1).clamp(max=k)  # [n]
    taken = torch.arange(k, device=x.device) < count.unsqueeze(1)  # [n, k]
    return masked_mean(largest, taken).to(x.dtype)


def cosine_matrix(x: Tensor, y: Tensor) -> Tensor:
    """Products of normalised rows, x (N, D), y (M, D) -> (N, M), in float32 or better also under autocast.

    A cosine in bfloat16 keeps 8 bits: neighbours tie that do not, and a margin of 0.2 becomes 50 steps.
    """
    with autocast_off(x.device):
        return x.to(compute_dtype(x.dtype)) @ y.to(compute_dtype(y.dtype)).t()


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype in which autocast multiplies on ``device``; None where it is off, or unknown as on meta."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def autocast_off(device: torch.device) -> AbstractContextManager[object]:
    """A context in which ``device`` computes in the dtypes that are given, whatever autocast says outside."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
