"""What the pair losses check and share."""

from __future__ import annotations

from torch import Tensor

from hrem_layers._core.checks import check_bool_tensor, check_tensor
from hrem_layers._core.numerics import compute_dtype

REDUCTIONS = ("sum", "mean")


def check_pairs(similarity: Tensor, positives: Tensor) -> Tensor:
    """Checks both arguments; returns the similarity in float32 or better."""
    check_tensor("similarity", similarity, ("N", "M"))
    check_bool_tensor("positives", positives, tuple(similarity.shape), device=similarity.device)
    if 0 in similarity.shape:
        raise ValueError(f"similarity must hold at least 1 pair, got shape {tuple(similarity.shape)}")
    return similarity.to(compute_dtype(similarity.dtype))
