"""What the loss computes from one batch, without leaving a trace in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hrem_layers._core.batch import Batch, find_positives
from hrem_layers._core.numerics import compute_dtype, l2_normalize
from hrem_layers.loss import HREMLoss, HREMTerms
from hrem_layers.relations import RelationGraph


class Observed(NamedTuple):
    """Embeddings are L2-normalised, float32 or better."""

    image: Tensor  # (N, D)
    text: Tensor  # (M, D)
    image_enhanced: Tensor | None  # (N, D); None if no term of the loss needs the relations
    text_enhanced: Tensor | None  # (M, D)
    positives: Tensor  # (N, M) bool
    graph: RelationGraph | None
    terms: HREMTerms


def observe(loss: HREMLoss, batch: Batch) -> Observed:
    """In eval mode, without gradients, on this process's own batch."""
    device = batch.image_embedding.device
    v, u = (l2_normalize(x.detach().to(compute_dtype(x.dtype))) for x in batch[:2])
    positives = find_positives(v.shape[0], batch.image_ids, batch.image_index, batch.positives, device)
    given: dict[str, Any] = {"image_index": batch.image_index, "positives": batch.positives}
    with torch.no_grad(), untouched(loss, device):
        terms = loss.terms(*batch[:7], **given)
        if not (loss.enhanced_weight or loss.cross_weight or loss.regularization_weight):
            return Observed(v, u, None, None, positives, None, terms)
        graph, v_enhanced, u_enhanced = loss.relate(*batch[:7], **given)
    return Observed(v, u, v_enhanced, u_enhanced, positives, graph.dense(), terms)


@contextmanager
def untouched(loss: HREMLoss, device: torch.device) -> Iterator[None]:
    """Eval mode, one process, and the random numbers as if nothing had been drawn; as it was before, afterwards."""
    modes = [(module, module.training) for module in loss.modules()]
    gather = loss.gather_distributed
    devices = [device] if device.type == "cuda" else []
    try:
        loss.gather_distributed = False
        loss.eval()
        with torch.random.fork_rng(devices):
            yield
    finally:
        loss.gather_distributed = gather
        for module, training in modes:
            module.training = training
