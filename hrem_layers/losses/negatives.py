"""Ways of choosing negatives: pure functions of similarity and positives, for anchors that are the rows.

Two kinds. One negative per anchor: :func:`hardest_negative` and :func:`distance_weighted_negative` return its
similarity and whether there is one; a function of yours with that signature is a ``negative_sampling`` of
:class:`~hrem_layers.TripletLoss` as well. Many negatives per anchor: :func:`every_negative_weights` and
:func:`expected_negative_weights` return the weight of each in a sum.

Bad arguments are a TypeError or ValueError that names them; a NaN or an infinity in ``similarity`` or ``noise`` makes
what is computed from them NaN. Half precision is computed in float32, and so are the results. Below each stands what it
computes, for callers that have checked and look at what is finite themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hrem_layers._core.checks import check_int, check_tensor
from hrem_layers._core.numerics import tie_tolerance
from hrem_layers.losses._pairs import as_bytes, check_constant, check_pairs, one_if_finite


def hardest_negative(similarity: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
    """The most similar negative per anchor.

    Negatives equal to it up to a few units of rounding share the gradient evenly: which of them is the largest would
    be chance.

    Args:
        similarity: (N, M) cosines; anchors are the rows.
        positives: (N, M) bool.

    Returns:
        Its similarity (N, 1), 0 without one, and whether there is one (N, 1) bool.

    Example:
        >>> import torch
        >>> from hrem_layers.losses import hardest_negative
        >>> similarity = torch.tensor([[0.9, 0.3, 0.1]])
        >>> hardest_negative(similarity, torch.tensor([[True, False, False]]))
        (tensor([[0.3000]]), tensor([[True]]))
    """
    s = check_pairs(similarity, positives)
    mean, found = find_hardest(s, positives)
    return mean * one_if_finite(s), found


def find_hardest(similarity: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
    negatives = torch.where(positives, -torch.inf, similarity)
    hardest = negatives.detach().amax(dim=1, keepdim=True)
    found = hardest > -torch.inf
    tied = negatives.detach() >= torch.where(found, hardest - tie_tolerance(similarity.dtype), torch.inf)
    chosen = as_bytes(tied).to(similarity.dtype)
    mean = (similarity * chosen).sum(dim=1, keepdim=True) / chosen.sum(dim=1, keepdim=True).clamp(min=1)
    return mean, found


def distance_weighted_negative(
    similarity: Tensor,
    positives: Tensor,
    *,
    cutoff: float = 0.5,
    nonzero_cutoff: float = 1.7,
    weight_dim: int = 512,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One negative per anchor, drawn with probability ∝ w (:func:`distance_log_weights`).

    Args:
        similarity: (N, M) cosines; anchors are the rows.
        positives: (N, M) bool.
        cutoff, nonzero_cutoff, weight_dim: of the weights.
        noise: (N, 1) in [0, 1), uniform: the draw is the first column at which the cumulative weight exceeds
            ``noise`` times the total. None = drawn from torch's default generator.

    Returns:
        Its similarity (N, 1), and whether there is a candidate (N, 1) bool.

    Example:
        >>> import torch
        >>> from hrem_layers.losses import distance_weighted_negative
        >>> similarity = torch.tensor([[0.9, 0.3, -0.8]])  # the last one is at a distance of 1.9
        >>> distance_weighted_negative(similarity, torch.tensor([[True, False, False]]))
        (tensor([[0.3000]]), tensor([[True]]))
    """
    s = check_pairs(similarity, positives)
    check_weight_options(cutoff, nonzero_cutoff, weight_dim)
    if noise is None:
        noise = torch.rand(s.shape[0], 1, dtype=s.dtype, device=s.device)
    else:
        check_tensor("noise", noise, (s.shape[0], 1), device=s.device)
    negative, found = draw_by_distance(s, positives, noise, cutoff, nonzero_cutoff, weight_dim)
    return negative * one_if_finite(s, noise), found


def draw_by_distance(
    similarity: Tensor, positives: Tensor, noise: Tensor, cutoff: float, nonzero_cutoff: float, weight_dim: int
) -> tuple[Tensor, Tensor]:
    drawn, found = draw(log_weights(similarity, positives, cutoff, nonzero_cutoff, weight_dim), noise)
    return similarity.gather(1, drawn), found


def every_negative_weights(similarity: Tensor, positives: Tensor) -> Tensor:
    """1 for every negative, 0 for positives: (N, M).

    Example:
        >>> import torch
        >>> from hrem_layers.losses import every_negative_weights
        >>> every_negative_weights(torch.zeros(1, 3), torch.tensor([[True, False, False]]))
        tensor([[0., 1., 1.]])
    """
    s = check_pairs(similarity, positives)
    return weigh_all(s, positives) * one_if_finite(s)


def weigh_all(similarity: Tensor, positives: Tensor) -> Tensor:
    return as_bytes(~positives).to(similarity.dtype)


def expected_negative_weights(
    similarity: Tensor, positives: Tensor, *, cutoff: float = 0.5, nonzero_cutoff: float = 1.7, weight_dim: int = 512
) -> Tensor:
    """The probability with which :func:`distance_weighted_negative` draws each negative: (N, M), without gradient.

    Rows sum to 1; a row without a candidate is 0.

    Example:
        >>> import torch
        >>> from hrem_layers.losses import expected_negative_weights
        >>> similarity = torch.tensor([[0.9, 0.3, 0.3]])
        >>> expected_negative_weights(similarity, torch.tensor([[True, False, False]]))
        tensor([[0.0000, 0.5000, 0.5000]])
    """
    s = check_pairs(similarity, positives)
    check_weight_options(cutoff, nonzero_cutoff, weight_dim)
    return weigh_expected(s, positives, cutoff, nonzero_cutoff, weight_dim) * one_if_finite(s)


def weigh_expected(
    similarity: Tensor, positives: Tensor, cutoff: float, nonzero_cutoff: float, weight_dim: int
) -> Tensor:
    log_w = log_weights(similarity, positives, cutoff, nonzero_cutoff, weight_dim)
    found = (log_w > -torch.inf).any(dim=1, keepdim=True)
    return torch.where(found, torch.where(found, log_w, 0).softmax(dim=1), 0)


def distance_log_weights(
    similarity: Tensor, positives: Tensor, *, cutoff: float = 0.5, nonzero_cutoff: float = 1.7, weight_dim: int = 512
) -> Tensor:
    r"""log w of every pair as a negative (N, M), without gradient; −inf: no candidate.

    .. math::
        \log w = (2 - n) \log d - \frac{n - 3}{2} \log(1 - d^2 / 4), \quad d = \max(\sqrt{2 - 2s}, \mathrm{cutoff})

    (Wu et al., ICCV 2017, equation 5: the inverse of the density of distances between random points of the unit
    sphere in n = ``weight_dim`` dimensions), and −inf for positives and where d ≥ ``nonzero_cutoff``.

    Example:
        >>> import torch
        >>> from hrem_layers.losses import distance_log_weights
        >>> distance_log_weights(torch.tensor([[1.0, 0.0]]), torch.tensor([[True, False]]), weight_dim=3)
        tensor([[   -inf, -0.3466]])
    """
    s = check_pairs(similarity, positives)
    check_weight_options(cutoff, nonzero_cutoff, weight_dim)
    return log_weights(s, positives, cutoff, nonzero_cutoff, weight_dim) * one_if_finite(s)


def log_weights(similarity: Tensor, positives: Tensor, cutoff: float, nonzero_cutoff: float, weight_dim: int) -> Tensor:
    s = similarity.detach()
    distance = (2 - 2 * s).clamp(min=0).sqrt().clamp(min=cutoff)
    # 1 − d²/4 is 0 at d = 2, where only nonzero_cutoff = 2 looks, and below 0 by rounding
    rest = (1 - distance.square() / 4).clamp(min=torch.finfo(s.dtype).eps)
    log_w = (2 - weight_dim) * distance.log() - (weight_dim - 3) / 2 * rest.log()
    return log_w.masked_fill(positives | (distance >= nonzero_cutoff), -torch.inf)


def check_weight_options(cutoff: float, nonzero_cutoff: float, weight_dim: int) -> None:
    check_constant("cutoff", cutoff, above=0, below=2)
    check_constant("nonzero_cutoff", nonzero_cutoff, above=cutoff, maximum=2)
    if not torch.compiler.is_compiling():  # a symbol there
        check_int("weight_dim", weight_dim, minimum=2, maximum=2**31)


def draw(log_weights: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """One column per row, drawn ∝ exp(log_weights) by ``noise`` (N, 1) in [0, 1): its index (N, 1), and whether there
    was one to draw (N, 1).

    Shares of a row's total below the rounding of its dtype are drawn too often or too rarely by that much; a weight
    of 0 is never drawn.
    """
    heaviest = log_weights.amax(dim=1, keepdim=True)
    found = heaviest > -torch.inf
    weights = (log_weights - torch.where(found, heaviest, 0)).exp()
    reached = weights.cumsum(dim=1).contiguous()
    target = noise.to(reached.dtype) * reached[:, -1:]
    drawn = torch.searchsorted(reached, target, right=True).clamp(max=log_weights.shape[1] - 1)
    # where noise · total rounds up to the total, or sums in parallel are not monotonous by a rounding
    missed = weights.gather(1, drawn) == 0
    return torch.where(missed, weights.argmax(dim=1, keepdim=True), drawn), found
