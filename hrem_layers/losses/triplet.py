"""The triplet loss and how it takes its negatives (paper, section 3.5; Wu et al., ICCV 2017)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hrem_layers._core.checks import check_choice, check_int, check_number, check_tensor, said
from hrem_layers._core.numerics import compute_dtype
from hrem_layers.losses._pairs import REDUCTIONS, check_pair_flags, check_pairs, one_if_finite
from hrem_layers.losses._rows import RowLoss, Ways, sum_over_anchors
from hrem_layers.losses.hinge import hinge_against_many, hinge_against_one
from hrem_layers.losses.negatives import (
    distance_weighted_negative,
    every_negative_weights,
    expected_negative_weights,
    hardest_negative,
)

NEGATIVES = ("distance_weighted", "hardest", "all", "expected")

FIRST, SECOND = "the first result of negative_sampling (negative)", "the second result of negative_sampling (found)"

NegativeSampling = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""``(similarity (N, M), positives (N, M)) -> (negative (N, 1), found (N, 1) bool)``; anchors are the rows."""


def triplet_loss(
    similarity: Tensor,
    positives: Tensor,
    *,
    margin: float = 0.2,
    negative_sampling: str | NegativeSampling = "distance_weighted",
    cutoff: float = 0.5,
    nonzero_cutoff: float = 1.7,
    weight_dim: int = 512,
    reduction: str = "sum",
    noise: Tensor | None = None,
) -> Tensor:
    """What :class:`~hrem_layers.TripletLoss` computes, as a function; same options, arguments and errors.

    Example:
        >>> import torch
        >>> from hrem_layers.losses import triplet_loss
        >>> similarity = torch.tensor([[0.9, 0.8], [0.1, 0.7]])
        >>> triplet_loss(similarity, torch.eye(2, dtype=torch.bool), negative_sampling="hardest")
        tensor(0.4000)
    """
    if not torch.compiler.is_compiling():  # numbers may be symbols there
        check_options(margin, negative_sampling, cutoff, nonzero_cutoff, weight_dim, reduction)
    s = check_pairs(similarity, positives)
    n, m = s.shape
    if noise is not None:
        check_tensor("noise", noise, (n + m,), device=s.device)
    elif negative_sampling == "distance_weighted":
        noise = anchor_noise(s)
    options = {"cutoff": cutoff, "nonzero_cutoff": nonzero_cutoff, "weight_dim": weight_dim}
    ways: Ways = ((), ())
    row_loss: RowLoss
    if negative_sampling == "distance_weighted":
        assert noise is not None
        ways = tuple((x.unsqueeze(1),) for x in (noise[:n], noise[n:]))
        row_loss = partial(_against_drawn, margin=margin, options=options)
    elif negative_sampling == "hardest":
        row_loss = partial(_against_hardest, margin=margin)
    elif negative_sampling == "all":
        row_loss = partial(_against_all, margin=margin)
    elif negative_sampling == "expected":
        row_loss = partial(_against_expected, margin=margin, options=options)
    if isinstance(negative_sampling, str):
        loss = sum_over_anchors(row_loss, s, positives, ways=ways)
    else:
        loss = _against_chosen(s, positives, negative_sampling, margin=margin)
        loss = loss + _against_chosen(s.t(), positives.t(), negative_sampling, margin=margin)
    if reduction == "mean":
        loss = loss / torch.count_nonzero(positives).clamp(min=1)
    return loss * one_if_finite(s, *(() if noise is None else (noise,)))


def _against_drawn(s: Tensor, positives: Tensor, noise: Tensor, *, margin: float, options: dict[str, Any]) -> Tensor:
    negative, found = distance_weighted_negative(s, positives, noise=noise, **options)
    return hinge_against_one(s, positives, negative, found, margin=margin)


def _against_hardest(s: Tensor, positives: Tensor, *, margin: float) -> Tensor:
    return hinge_against_one(s, positives, *hardest_negative(s, positives), margin=margin)


def _against_all(s: Tensor, positives: Tensor, *, margin: float) -> Tensor:
    return hinge_against_many(s, positives, every_negative_weights(s, positives), margin=margin)


def _against_expected(s: Tensor, positives: Tensor, *, margin: float, options: dict[str, Any]) -> Tensor:
    return hinge_against_many(s, positives, expected_negative_weights(s, positives, **options), margin=margin)


def _against_chosen(s: Tensor, positives: Tensor, choose: NegativeSampling, *, margin: float) -> Tensor:
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


def anchor_noise(similarity: Tensor) -> Tensor:
    """(N + M,) uniform in [0, 1), one number per anchor, images first, from torch's default generator."""
    return torch.rand(sum(similarity.shape), dtype=compute_dtype(similarity.dtype), device=similarity.device)


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
    check_number("cutoff", cutoff, above=0, below=2)
    check_number("nonzero_cutoff", nonzero_cutoff, above=cutoff, maximum=2)
    check_int("weight_dim", weight_dim, minimum=2)
    check_choice("reduction", reduction, REDUCTIONS)


class TripletLoss(nn.Module):
    r"""Hinge on pairs of positives and negatives, images against texts and texts against images.

    .. math::
        \sum_{(x, y)} [\alpha - s(x, y) + s(x, y')]_+ + \sum_{(x, y)} [\alpha - s(x, y) + s(x', y)]_+

    over all positive pairs (x, y). Negatives are pairs that are not positives, chosen as

    - ``"distance_weighted"``: one negative per anchor and direction, drawn with probability ∝ w, where
      :math:`\log w = (2 - n) \log d - \frac{n - 3}{2} \log(1 - d^2 / 4)`,
      :math:`d = \max(\sqrt{2 - 2s}, \mathrm{cutoff})`, n = ``weight_dim``, and w = 0 from
      ``nonzero_cutoff`` on (Wu et al., ICCV 2017). Draws come from torch's default generator:
      ``torch.manual_seed`` repeats them.
    - ``"hardest"``: the most similar negative; negatives equal to it up to rounding share the gradient evenly.
    - ``"all"``: every negative, summed.
    - ``"expected"``: the expectation of the distance-weighted loss, :math:`\sum_{y'} w\,[\cdot]_+` with w
      normalised over the negatives; no randomness.
    - a callable ``(similarity, positives) -> (negative, found)``, for a choice of your own: for anchors that are the
      rows of ``similarity`` (N, M) and of ``positives`` (N, M) bool it returns the similarity of one negative per
      anchor, (N, 1), with the gradient that it should have, and whether the anchor has one, (N, 1) bool. It is called
      twice, the second time with the transposed matrices. A module's parameters are trained along.

    The first two are such functions, :func:`~hrem_layers.losses.distance_weighted_negative` and
    :func:`~hrem_layers.losses.hardest_negative`. ``"all"`` and ``"expected"`` are not: they sum over many negatives,
    with the weights of :func:`~hrem_layers.losses.every_negative_weights` and
    :func:`~hrem_layers.losses.expected_negative_weights`.

    How this differs from the release: an anchor without a candidate contributes 0 and leaves the others
    alone (there the loss of that direction becomes 0 for the whole batch); all equal ids are positives
    (its hinge takes only the diagonal); an anchor with several positives has one draw for all of them
    (there one for each, from the same distribution). Similarities rounded over 1 give no NaN. A NaN or an infinity
    anywhere in ``similarity`` or ``noise`` makes the loss NaN.

    Memory grows as N·M for every choice, also for ``"all"`` with several positives per row.

    Args:
        margin: α, in units of cosine, at least 0.
        negative_sampling: as above.
        cutoff: smallest distance used for w, in (0, 2).
        nonzero_cutoff: distance from which w = 0, in (cutoff, 2] (the release: 1.7 on Flickr30K, 1.9 on COCO).
        weight_dim: n, dimension of the sphere whose distances w corrects for, at least 2.
        reduction: ``"sum"`` (the release's scale) or ``"mean"``, the sum divided by the number of positive pairs.

    Raises:
        TypeError, ValueError: an option has the wrong type or is out of its range.

    Example:
        >>> import torch
        >>> from hrem_layers.losses import TripletLoss
        >>> similarity = torch.tensor([[0.9, 0.8], [0.1, 0.7]])
        >>> TripletLoss(negative_sampling="hardest")(similarity, torch.eye(2, dtype=torch.bool))
        tensor(0.4000)
    """

    def __init__(
        self,
        margin: float = 0.2,
        *,
        negative_sampling: str | NegativeSampling = "distance_weighted",
        cutoff: float = 0.5,
        nonzero_cutoff: float = 1.7,
        weight_dim: int = 512,
        reduction: str = "sum",
    ) -> None:
        super().__init__()
        check_options(margin, negative_sampling, cutoff, nonzero_cutoff, weight_dim, reduction)
        self.margin = float(margin)
        self.negative_sampling = negative_sampling
        self.cutoff = float(cutoff)
        self.nonzero_cutoff = float(nonzero_cutoff)
        self.weight_dim = int(weight_dim)
        self.reduction = reduction

    def extra_repr(self) -> str:
        choice = self.negative_sampling
        shown = repr(choice) if isinstance(choice, str) else getattr(choice, "__name__", type(choice).__name__)
        return (
            f"{self.margin}, negative_sampling={shown}, cutoff={self.cutoff}, "
            f"nonzero_cutoff={self.nonzero_cutoff}, weight_dim={self.weight_dim}, reduction={self.reduction!r}"
        )

    def draw_noise(self, similarity: Tensor) -> Tensor | None:
        """The random numbers of one call, (N + M,) uniform in [0, 1), the images' first; None where nothing is drawn.

        For callers that need the same draw elsewhere (several processes): pass it to :meth:`forward`.
        """
        return anchor_noise(similarity) if self.negative_sampling == "distance_weighted" else None

    def forward(self, similarity: Tensor, positives: Tensor, noise: Tensor | None = None) -> Tensor:
        """
        Args:
            similarity: (N, M) cosines, N images by M texts.
            positives: (N, M) bool, True = the pair belongs together.
            noise: (N + M,) as from :meth:`draw_noise`; None = drawn here.

        Returns:
            A scalar, float32 or better. 0 where there is no positive pair or no negative.

        Raises:
            TypeError, ValueError: an argument, or a result of a callable ``negative_sampling``, has the wrong type,
                dtype, shape or device.
        """
        if noise is None and self.negative_sampling == "distance_weighted":
            check_pairs(similarity, positives)
            noise = self.draw_noise(similarity)
        return triplet_loss(
            similarity,
            positives,
            margin=self.margin,
            negative_sampling=self.negative_sampling,
            cutoff=self.cutoff,
            nonzero_cutoff=self.nonzero_cutoff,
            weight_dim=self.weight_dim,
            reduction=self.reduction,
            noise=noise,
        )
