"""Says in words what goes wrong in a training and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hrem_layers._core.batch import Batch, check_batch
from hrem_layers._core.checks import check_number, check_weights, said
from hrem_layers.loss import HREMLoss, HREMTerms
from hrem_layers.tools.diagnosis.embeddings import look_at_embeddings
from hrem_layers.tools.diagnosis.findings import Diagnosis, Finding
from hrem_layers.tools.diagnosis.graph import look_at_graph
from hrem_layers.tools.diagnosis.history import look_at_history, read_history
from hrem_layers.tools.diagnosis.masks import look_at_masks
from hrem_layers.tools.diagnosis.observed import observe
from hrem_layers.tools.diagnosis.regularizer import look_at_regularizer
from hrem_layers.tools.diagnosis.terms import look_at_terms
from hrem_layers.tools.diagnosis.values import look_at_values

__all__ = ["Diagnosis", "Finding", "diagnose"]


def diagnose(
    loss: torch.nn.Module,
    image_embedding: Tensor,
    text_embedding: Tensor,
    image_fragments: Tensor,
    text_fragments: Tensor,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    image_ids: Tensor | None = None,
    *,
    image_index: Tensor | None = None,
    positives: Tensor | None = None,
    history: Sequence[HREMTerms | Mapping[str, float | Tensor]] | None = None,
    max_grad_norm: float | None = None,
) -> Diagnosis:
    """Looks at one batch, at the loss's parameters and, if given, at what was logged so far.

    Looked for are: values that are not finite; masks that are inverted or call padding real; samples without any
    real fragment; embeddings, plain or enhanced, that have become (nearly) one vector; a pair loss that stands where
    equal similarities would put it (the hinge at 2·margin per pair); anchors that have nobody to be compared with; a
    graph that is nearly empty or full; relevance that is the same on all edges; L_reg far larger or smaller than the
    pair terms; gradient clipping that is always active. Nothing found is no proof that all is well.

    It computes the terms once more, in eval mode and without gradients, and leaves the loss as it was: no step is
    counted,
    no random number drawn, no gradient touched. Call it now and then or when something looks wrong, not in each step.
    It looks at this process's own batch, also with ``gather_distributed``.

    Args:
        loss: an HREMLoss, or what DistributedDataParallel or ``torch.compile`` made of one.
        image_embedding: (N, D), and so on: the arguments of :meth:`hrem_layers.HREMLoss.terms`.
        text_embedding: (M, D).
        image_fragments: (N, R, F).
        text_fragments: (M, W, F).
        image_mask: (N, R) bool, True = real.
        text_mask: (M, W) likewise.
        image_ids: (N,) integer.
        image_index: (M,) integer.
        positives: (N, M) bool.
        history: one entry per step, oldest first: :class:`~hrem_layers.HREMTerms`, or a mapping with any of its names
            and ``"grad_norm"``, the gradient's norm before clipping.
        max_grad_norm: what the gradient is clipped to; needs ``grad_norm`` in the history.

    Returns:
        Diagnosis: a list of findings, each with a name, what was seen and what to do; ``str()`` of it is a text to
            print.

    Raises:
        TypeError, ValueError: as the loss itself raises them; or the history has another form.

    Example:
        >>> import torch
        >>> from hrem_layers import HREMLoss
        >>> from hrem_layers.tools import diagnose
        >>> v = torch.ones(8, 64)  # every image the same vector
        >>> found = diagnose(HREMLoss(64), v, torch.randn(8, 64), torch.randn(8, 36, 64), torch.randn(8, 12, 64))
        >>> "collapsed embeddings" in found.names
        True
    """
    own = _unwrapped(loss)
    batch = Batch(
        image_embedding, text_embedding, image_fragments, text_fragments, image_mask, text_mask, image_ids,
        image_index, positives,
    )  # fmt: skip
    check_batch(batch, own.embed_dim, empty=False)
    check_weights("image_embedding", image_embedding, own)
    if max_grad_norm is not None:
        max_grad_norm = check_number("max_grad_norm", max_grad_norm, above=0)
    records = read_history(history)

    found = look_at_values(own, batch, records)
    finite = not found
    found += look_at_masks(batch)
    if finite:  # else every further number would be one of NaN
        seen = observe(own, batch)
        found += look_at_embeddings(seen)
        found += look_at_terms(own, seen, records)
        found += look_at_graph(own, seen)
        found += look_at_regularizer(own, seen)
    return Diagnosis(found + look_at_history(records, max_grad_norm))


def _unwrapped(loss: object) -> HREMLoss:
    inner = loss
    while not isinstance(inner, HREMLoss):
        wrapped = getattr(inner, "module", None) or getattr(inner, "_orig_mod", None)
        if wrapped is None:
            raise TypeError(f"loss must be an HREMLoss, got {said(loss)}")
        inner = wrapped
    return inner
