"""Sums of hinges [margin − s⁺ + s⁻]₊ over the rows of a similarity, against one or against many negatives per row."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hrem_layers.losses._pairs import as_bytes


def hinge_against_one(
    similarity: Tensor, positives: Tensor, negative: Tensor, found: Tensor, *, margin: float
) -> Tensor:
    """Σ over positive pairs of ``[margin − s_positive + negative]₊``, a scalar.

    Args:
        similarity: (N, M); anchors are the rows.
        positives: (N, M) bool.
        negative: (N, 1), the similarity of the anchor's negative.
        found: (N, 1) bool; an anchor without a negative contributes 0.
        margin: α.
    """
    threshold = torch.where(found, negative + margin, -torch.inf)
    return (F.relu(threshold - similarity) * as_bytes(positives).to(similarity.dtype)).sum()


def hinge_against_many(similarity: Tensor, positives: Tensor, weights: Tensor, *, margin: float) -> Tensor:
    """Σ over positive pairs and negatives of ``weights · [margin − s_positive + s_negative]₊``, a scalar.

    ``weights`` (N, M) is 0 at positives. Written out, several positives per row would make N·M·M triplets.
    Instead, the negatives of a row are sorted; those over a positive's threshold are then a prefix, whose
    Σw and Σw·s two cumulative sums hold.
    """
    ordered, order = similarity.masked_fill(positives, -torch.inf).sort(dim=1, descending=True)
    w = weights.gather(1, order)
    w_s = w * torch.where(ordered > -torch.inf, ordered, 0)
    # how many negatives have s_negative > s_positive − margin
    reach = torch.searchsorted(-ordered.detach(), (margin - similarity.detach()).contiguous())  # [n, m]
    sum_w, sum_w_s = (F.pad(x.cumsum(dim=1), (1, 0)).gather(1, reach) for x in (w, w_s))
    return torch.where(positives, sum_w * (margin - similarity) + sum_w_s, 0).sum()
