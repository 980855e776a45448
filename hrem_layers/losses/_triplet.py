"""What :mod:`hrem_layers.losses.triplet` sums per anchor for each choice of negatives, and its options."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hrem_layers._core.checks import check_choice, check_number, check_tensor, said
from hrem_layers._core.numerics import compute_dtype
from hrem_layers.losses._pairs import REDUCTIONS, check_pair_flags, one_if_finite
from hrem_layers.losses._rows import RowLoss
from hrem_layers.losses.hinge import hinge_against_many, hinge_against_one
from hrem_layers.losses.negatives import (
    check_weight_options,
    draw_by_distance,
    find_hardest,
    weigh_all,
    weigh_expected,
)

NEGATIVES = ("distance_weighted", "hardest", "all", "expected")

FIRST, SECOND = "the first result of negative_sampling (negative)", "the second result of negative_sampling (found)"

NegativeSampling = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""``(similarity (N, M), positives (N, M)) -> (negative (N, 1), found (N, 1) bool)``; anchors are the rows."""


def row_loss(negative_sampling: str, margin: float, **options: Any) -> RowLoss:
    """The sum over anchors for a named choice; ``options`` are those of the weights."""
    if negative_sampling == "distance_weighted":
        return partial(_against_drawn, margin=margin, options=options)
    if negative_sampling == "expected":
        return partial(_against_expected, margin=margin, options=options)
    return partial({"hardest": _against_hardest, "all": _against_all}[negative_sampling], margin=margin)


def _against_drawn(s: Tensor, positives: Tensor, noise: Tensor, *, margin: float, options: dict[str, Any]) -> Tensor:
    return hinge_against_one(s, positives, *draw_by_distance(s, positives, noise, **options), margin=margin)


def _against_hardest(s: Tensor, positives: Tensor, *, margin: float) -> Tensor:
    return hinge_against_one(s, positives, *find_hardest(s, positives), margin=margin)


def _against_all(s: Tensor, positives: Tensor, *, margin: float) -> Tensor:
    return hinge_against_many(s, positives, weigh_all(s, positives), margin=margin)


def _against_expected(s: Tensor, positives: Tensor, *, margin: float, options: dict[str, Any]) -> Tensor:
    return hinge_against_many(s, positives, weigh_expected(s, positives, **options), margin=margin)


def against_chosen(s: Tensor, positives: Tensor, choose: NegativeSampling, *, margin: float) -> Tensor:
    negative, found = _chosen(choose, s, positives)
    loss = hinge_against_one(s, positives, negative, found, margin=margin)
    return loss * one_if_finite(torch.where(found, negative, 0))


def _chosen(choose: NegativeSampling, similarity: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
    """What a callable of the user returns, checked."""
    result = choose(similarity, positives)
    # a pair of types: dynamo of PyTorch 2.5 knows no union
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        got = f"a {type(result).__name__} of {len(result)}" if isinstance(result, (tuple, list)) else said(result)
        raise TypeError(f"negative_sampling must return (negative, found), got {got}")
    negative, found = result
    column = similarity[:, :1]
    check_tensor(FIRST, negative, tuple(column.shape), device=column.device)
    check_pair_flags(SECOND, found, column, "the anchor has a negative")
    return negative.to(similarity.dtype), found


def anchor_noise(anchors: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(N + M,) uniform in [0, 1), one number per anchor, images first, from torch's default generator."""
    return torch.rand(anchors, dtype=compute_dtype(dtype), device=device)


def check_options(
    margin: float, negative_sampling: str | NegativeSampling, cutoff: float, nonzero_cutoff: float, weight_dim: int,
    reduction: str,
) -> None:  # fmt: skip
    check_number("margin", margin, minimum=0)
    if not (callable(negative_sampling) or (isinstance(negative_sampling, str) and negative_sampling in NEGATIVES)):
        known = ", ".join(map(repr, NEGATIVES))
        raise ValueError(
            f"negative_sampling must be one of {known}, or a callable (similarity, positives) -> (negative, found), "
            f"got {said(negative_sampling)}"
        )
    if isinstance(negative_sampling, type):
        raise TypeError(
            "negative_sampling must be a callable (similarity, positives) -> (negative, found), got the class "
            f"{negative_sampling.__name__}: pass an instance of it"
        )
    check_weight_options(cutoff, nonzero_cutoff, weight_dim)
    check_choice("reduction", reduction, REDUCTIONS)
