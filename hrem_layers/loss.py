"""The whole training objective, on plain and on relation-enhanced embeddings (paper, section 3.5)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hrem_layers._core.checks import check_bool, check_int, check_number, check_tensor, describe
from hrem_layers._core.numerics import cosine_matrix, l2_normalize
from hrem_layers.distributed import (
    Batch,
    Shares,
    agree,
    check_own_batch,
    gather_batch,
    is_distributed,
    one_random_stream,
)
from hrem_layers.graph import AssociationGraph
from hrem_layers.interaction import RelationInteraction
from hrem_layers.losses import TripletLoss


class HREMTerms(NamedTuple):
    """Scalars for logging, unweighted but for ``total``, which is what is trained."""

    total: Tensor
    base: Tensor
    """L(v, u): image and text embeddings."""
    enhanced: Tensor
    """L(v̄, ū): both enhanced."""
    cross_image: Tensor
    """L(v̄, u): enhanced images, plain texts."""
    cross_text: Tensor
    """L(v, ū): plain images, enhanced texts."""
    regularization: Tensor
    """L_reg of the graph."""


class HREMLoss(nn.Module):
    r"""Teaches two encoders through the relations among the samples of a batch.

    .. math::
        L(v, u) + w_e L(\bar v, \bar u) + w_c [L(\bar v, u) + L(v, \bar u)] + w_r L_\mathrm{reg}

    v, u are the embeddings, v̄, ū their enhanced forms from attention over the batch's graph, L the pair
    loss on cosines. The relation modules are needed in training only; they live in this module, so give
    its parameters to the optimizer and its ``state_dict`` to the checkpoint.

    Args:
        embed_dim: D.
        graph: module ``(image_embedding, text_embedding, image_fragments, text_fragments, image_mask,
            text_mask) -> RelationGraph`` with a method ``regularization``; None = ``AssociationGraph()``.
        interaction: module ``(image_embedding, text_embedding, graph) -> (v̄, ū)``; None =
            ``RelationInteraction(embed_dim)``.
        pair_loss: callable ``(similarity, positives) -> scalar``, similarity (N, N) of cosines, positives
            (N, N) bool; None = ``TripletLoss()``. A module's parameters are trained along.
        enhanced_weight: w_e, at least 0.
        cross_weight: w_c, at least 0.
        regularization_weight: w_r, at least 0.
        warmup_steps: for so many training calls only L(v, u) counts. The calls are counted in the buffer
            ``step``, which is part of ``state_dict``; calls in eval mode do not count.
        gather_distributed: under ``torch.distributed``, build graph and loss over the batches of all
            processes. Needs every process to call; see docs/distributed.md. Without a process group, or in
            a group of one, it changes nothing.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        graph: nn.Module | None = None,
        interaction: nn.Module | None = None,
        pair_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        enhanced_weight: float = 1.0,
        cross_weight: float = 1.0,
        regularization_weight: float = 10.0,
        warmup_steps: int = 0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        self.embed_dim = check_int("embed_dim", embed_dim, minimum=1)
        for name, module in (("graph", graph), ("interaction", interaction)):
            if module is not None and not isinstance(module, nn.Module):
                raise TypeError(f"{name} must be a torch.nn.Module or None, got {type(module).__name__}")
        if graph is not None and not callable(getattr(graph, "regularization", None)):
            raise TypeError(f"graph must have a method regularization, got {type(graph).__name__}")
        if getattr(interaction, "embed_dim", embed_dim) != embed_dim:
            raise ValueError(f"interaction must have embed_dim {embed_dim} like the loss, got {interaction.embed_dim}")
        if pair_loss is not None and (not callable(pair_loss) or isinstance(pair_loss, type)):
            got = f"the class {pair_loss.__name__}" if isinstance(pair_loss, type) else type(pair_loss).__name__
            raise TypeError(f"pair_loss must be a callable (similarity, positives) -> scalar, got {got}")
        self.enhanced_weight = check_number("enhanced_weight", enhanced_weight, minimum=0)
        self.cross_weight = check_number("cross_weight", cross_weight, minimum=0)
        self.regularization_weight = check_number("regularization_weight", regularization_weight, minimum=0)
        self.warmup_steps = check_int("warmup_steps", warmup_steps, minimum=0)
        self.gather_distributed = check_bool("gather_distributed", gather_distributed)
        self.graph = AssociationGraph() if graph is None else graph
        self.interaction = RelationInteraction(embed_dim) if interaction is None else interaction
        self.pair_loss = TripletLoss() if pair_loss is None else pair_loss
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def extra_repr(self) -> str:
        return (
            f"{self.embed_dim}, enhanced_weight={self.enhanced_weight}, cross_weight={self.cross_weight}, "
            f"regularization_weight={self.regularization_weight}, warmup_steps={self.warmup_steps}, "
            f"gather_distributed={self.gather_distributed}"
            # a module is printed below, like graph and interaction
            + ("" if isinstance(self.pair_loss, nn.Module) else f", pair_loss={self.pair_loss!r}")
        )

    def forward(
        self,
        image_embedding: Tensor,
        text_embedding: Tensor,
        image_fragments: Tensor,
        text_fragments: Tensor,
        image_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        image_ids: Tensor | None = None,
    ) -> Tensor:
        """The total of :meth:`terms`, a scalar to call ``backward()`` on. Same arguments."""
        return self.terms(
            image_embedding, text_embedding, image_fragments, text_fragments, image_mask, text_mask, image_ids
        ).total

    def terms(
        self,
        image_embedding: Tensor,
        text_embedding: Tensor,
        image_fragments: Tensor,
        text_fragments: Tensor,
        image_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        image_ids: Tensor | None = None,
    ) -> HREMTerms:
        """
        Args:
            image_embedding, text_embedding: (N, D); row i of both belongs together. Normalised here.
            image_fragments: (N, R, F) regions.
            text_fragments: (N, W, F) words.
            image_mask: (N, R) bool, True = real; None = all real.
            text_mask: (N, W) likewise.
            image_ids: (N,) integer; equal ids are positives of one another. None = row number.

        Returns:
            HREMTerms of scalars in float32 or better.

        Raises:
            TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
        """
        batch = Batch(
            image_embedding, text_embedding, image_fragments, text_fragments, image_mask, text_mask, image_ids
        )
        if self.gather_distributed and is_distributed():
            return self._gathered_terms(batch)
        self._check(batch)
        return self._terms(_normalized(batch))

    def _check(self, batch: Batch) -> None:
        check_tensor("image_embedding", batch.image_embedding, ("N", self.embed_dim))
        n, device = batch.image_embedding.shape[0], batch.image_embedding.device
        check_tensor("text_embedding", batch.text_embedding, (n, self.embed_dim), device=device)
        if batch.image_ids is not None:
            _check_ids(batch.image_ids, n, device)

    def _gathered_terms(self, own: Batch) -> HREMTerms:
        problem = None
        try:
            self._check(own)
            check_own_batch(own)
        except (TypeError, ValueError) as error:
            problem = error  # the other processes wait: tell them first
        device = self.step.device if problem is not None else own.image_embedding.device
        shares = agree(own, problem, training=self.training, device=device)
        # a graph that can share its work gets its own process's fragments, any other those of all
        share = "shares" in inspect.signature(self.graph.forward).parameters
        with one_random_stream(device):
            batch = gather_batch(_normalized(own), shares, fragments=not share)
            return self._terms(batch, shares if share else None)

    def _terms(self, batch: Batch, shares: Shares | None = None) -> HREMTerms:
        v, u = batch.image_embedding, batch.text_embedding
        options = {} if shares is None else {"shares": shares}
        graph = self.graph(
            v, u, batch.image_fragments, batch.text_fragments, batch.image_mask, batch.text_mask, **options
        )
        v_enhanced, u_enhanced = (l2_normalize(x) for x in self.interaction(v, u, graph))
        positives = _positives(batch.image_ids, v)

        def pair(x: Tensor, y: Tensor) -> Tensor:
            loss = self.pair_loss(cosine_matrix(x, y), positives)
            if not isinstance(loss, Tensor) or loss.dim():
                got = describe(loss) if isinstance(loss, Tensor) else type(loss).__name__
                raise TypeError(f"pair_loss must return a scalar tensor, got {got}")
            return loss

        base = pair(v, u)
        enhanced = pair(v_enhanced, u_enhanced)
        cross_image, cross_text = pair(v_enhanced, u), pair(v, u_enhanced)
        regularization = self.graph.regularization(graph, v, u)
        relational = (
            self.enhanced_weight * enhanced
            + self.cross_weight * (cross_image + cross_text)
            + self.regularization_weight * regularization
        )
        if self.training and self.warmup_steps:
            relational = torch.where(self.step < self.warmup_steps, 0, relational)
            self.step.add_(1)
        return HREMTerms(base + relational, base, enhanced, cross_image, cross_text, regularization)


def _normalized(batch: Batch) -> Batch:
    return batch._replace(
        image_embedding=l2_normalize(batch.image_embedding), text_embedding=l2_normalize(batch.text_embedding)
    )


def _positives(ids: Tensor | None, like: Tensor) -> Tensor:
    if ids is None:
        return torch.eye(like.shape[0], dtype=torch.bool, device=like.device)
    return ids.unsqueeze(1) == ids.unsqueeze(0)  # [n, n]


def _check_ids(ids: Tensor, n: int, device: torch.device) -> None:
    if not isinstance(ids, Tensor):
        raise TypeError(f"image_ids must be an integer tensor of shape ({n},), got {type(ids).__name__}")
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise TypeError(f"image_ids must be an integer tensor, got {describe(ids)}")
    if tuple(ids.shape) != (n,):
        raise ValueError(f"image_ids must have shape ({n},), got {describe(ids)}")
    if ids.device != device:
        raise ValueError(f"image_ids must be on {device} like the other inputs, got {describe(ids)}")
