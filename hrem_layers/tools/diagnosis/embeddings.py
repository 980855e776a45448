"""Embeddings that no longer tell the samples apart."""

from __future__ import annotations

import torch
from torch import Tensor

from hrem_layers.tools.diagnosis.findings import Finding
from hrem_layers.tools.diagnosis.observed import Observed

COLLAPSED = 0.99
"""Mean cosine of different samples from which on they count as one vector."""
FEW_DIMENSIONS, ENOUGH_SAMPLES = 1.5, 8

PLAIN = (
    "All similarities are then alike and the gradient of their differences vanishes. Start again "
    "from a checkpoint before "
    'it, with a lower learning rate or a warm-up of it; TripletLoss("hardest" negatives) from the '
    "first step is a common "
    'cause: start with "all" or "distance_weighted". Look whether the encoder gets different inputs at all (a mask, a '
    "normalisation or a pooling that leaves only a bias), and whether a large mean vector is added to every embedding."
)
ENHANCED = (
    "The relation modules moved faster than the encoders. Give loss.relation_parameters() a tenth of "
    "the learning rate, "
    "use warmup_steps (10 to 30% of all steps), and keep RelationInteraction's residual and gate=0; restart "
    "the relation modules, "
    "for they seldom come back by themselves."
)


def look_at_embeddings(seen: Observed) -> list[Finding]:
    """Plain ones first; enhanced ones only if theirs is another trouble."""
    plain = [*_collapse("image_embedding", seen.image), *_collapse("text_embedding", seen.text)]
    if plain:
        return [Finding("collapsed embeddings", " ".join(plain), PLAIN)]
    if seen.image_enhanced is None or seen.text_enhanced is None:
        return []
    enhanced = [
        *_collapse("the enhanced image embeddings", seen.image_enhanced),
        *_collapse("the enhanced text embeddings", seen.text_enhanced),
    ]
    return [Finding("collapsed enhanced embeddings", " ".join(enhanced), ENHANCED)] if enhanced else []


def _collapse(name: str, x: Tensor) -> list[str]:
    """A sentence if the rows of ``x`` (N, D), of length 1, are nearly one vector or lie on a line."""
    n, d = x.shape
    if n < 2:
        return []
    mean = mean_cosine(x)
    if mean > COLLAPSED:
        return [f"The rows of {name} have a mean cosine of {mean:.4f} with one another (1 = one vector)."]
    if n >= ENOUGH_SAMPLES and d >= ENOUGH_SAMPLES:
        dimensions = effective_dimensions(x)
        if dimensions < FEW_DIMENSIONS:
            return [f"The rows of {name} vary in {dimensions:.2f} of {d} dimensions only."]
    return []


def mean_cosine(x: Tensor) -> float:
    """Of different rows, from their sum: (‖Σx‖² − Σ‖x‖²) / (n (n − 1)). Zero rows count as apart."""
    n = x.shape[0]
    wide = x.double() if x.device.type != "mps" else x
    return float((wide.sum(dim=0).square().sum() - wide.square().sum()) / (n * (n - 1)))


def effective_dimensions(x: Tensor) -> float:
    """(Σλ)² / Σλ² of the covariance: how many directions share the variance; 0 if there is none."""
    centred = x - x.mean(dim=0)
    gram = centred @ centred.t() if x.shape[0] < x.shape[1] else centred.t() @ centred
    square = float(gram.square().sum())
    return float(gram.trace()) ** 2 / square if square > torch.finfo(x.dtype).tiny else 0.0
