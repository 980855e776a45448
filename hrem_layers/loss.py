"""The whole training objective, on plain and on relation-enhanced embeddings (paper, section 3.5)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from hrem_layers._core.batch import Batch, check_batch
from hrem_layers._core.checks import (
    check_bool,
    check_int,
    check_number,
    check_tensor,
    check_weights,
    said,
)
from hrem_layers._core.exchange import ALONE, Alone, Exchange
from hrem_layers._core.numerics import compute_dtype, l2_normalize
from hrem_layers._core.warmup import CallCounter, count_call, recomputing
from hrem_layers.distributed import agree, gather_embeddings, is_distributed, one_random_stream
from hrem_layers.graph import AssociationGraph
from hrem_layers.interaction import RelationInteraction
from hrem_layers.losses import TripletLoss
from hrem_layers.losses.terms import PairLoss, Pairs, check_scalar
from hrem_layers.relations import Cosines, pair_cosines
from hrem_layers.relations.sparse import AnyGraph, SparseRelationGraph, check_any_graph

_Result = TypeVar("_Result")


class HREMTerms(NamedTuple):
    """Scalars for logging, unweighted but for ``total``, which is what is trained; 0 where not computed.

    Example:
        >>> loss = HREMLoss(64)
        >>> v, u = torch.randn(4, 64), torch.randn(4, 64)
        >>> regions, words = torch.randn(4, 36, 64), torch.randn(4, 12, 64)
        >>> {name: value.item() for name, value in loss.terms(v, u, regions, words)._asdict().items()}.keys()
        dict_keys(['total', 'base', 'enhanced', 'cross_image', 'cross_text', 'regularization'])
    """

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


class Relations(NamedTuple):
    """What :meth:`HREMLoss.relate` gives.

    Example:
        >>> loss = HREMLoss(64)
        >>> v, u = torch.randn(4, 64), torch.randn(4, 64)
        >>> regions, words = torch.randn(4, 36, 64), torch.randn(4, 12, 64)
        >>> relations = loss.relate(v, u, regions, words)
        >>> relations.graph.block("i2t").connection.shape, relations.image_enhanced.shape
        (torch.Size([4, 4]), torch.Size([4, 64]))
    """

    graph: AnyGraph
    image_enhanced: Tensor
    """v̄ (N, D), L2-normalised."""
    text_enhanced: Tensor
    """ū (M, D), L2-normalised."""


class HREMLoss(nn.Module):
    r"""Teaches two encoders through the relations among the samples of a batch.

    .. math::
        L(v, u) + w_e L(\bar v, \bar u) + w_c [L(\bar v, u) + L(v, \bar u)] + w_r L_\mathrm{reg}

    v, u are the embeddings, v̄, ū their enhanced forms from attention over the batch's graph, L the pair
    loss on cosines. The relation modules are needed in training only; they live in this module, so give
    its parameters to the optimizer and its ``state_dict`` to the checkpoint.

    A term whose weight is 0 is not computed, nor are the relations if no term needs them. Embeddings may come in
    any of float16, bfloat16, float32 and float64: cosines and losses are computed in float32 or better.

    Args:
        embed_dim: the size D of an embedding.
        graph: module ``(image_embedding, text_embedding, image_fragments, text_fragments, image_mask, text_mask, *,
            image_index, positives, cosines, exchange) -> RelationGraph`` or :class:`SparseRelationGraph` (take
            ``**_`` for what it has no use for) and, unless ``regularization_weight`` is 0, with a method
            ``regularization`` as that of :class:`AssociationGraph`; None = ``AssociationGraph()``.
        interaction: module ``(image_embedding, text_embedding, graph) -> (v̄, ū)``; None =
            ``RelationInteraction(embed_dim)``.
        pair_loss: callable ``(similarity, positives) -> scalar``, similarity (N, M) of cosines, positives
            (N, M) bool; None = ``TripletLoss()``. A module's parameters are trained along. Where the graph has
            ``candidates``, a loss with a method ``from_embeddings`` gets the embeddings and streams: no term is then
            as large as all pairs. Others get the whole matrices.
        enhanced_pair_loss: another for L(v̄, ū); None = ``pair_loss``.
        cross_pair_loss: another for L(v̄, u) and L(v, ū); None = ``pair_loss``.
        enhanced_weight: w_e, at least 0.
        cross_weight: w_c, at least 0.
        regularization_weight: w_r, at least 0.
        warmup_steps: for so many training calls only L(v, u) is computed, at its own cost. The calls are counted in
            the buffer ``step``, which is part of ``state_dict``; calls in eval mode do not count. (Activation
            checkpointing computes a call again as the latest one was: at the end of the warm-up, run backward before
            the next call.)
        gather_distributed: under ``torch.distributed``, build graph and loss over the batches of all
            processes. Needs every process to call. Without a process group, or in a group of one, it changes nothing.

    Example:
        >>> loss = HREMLoss(64)
        >>> v, u = torch.randn(4, 64, requires_grad=True), torch.randn(4, 64, requires_grad=True)
        >>> loss(v, u, torch.randn(4, 36, 64), torch.randn(4, 12, 64)).backward()
    """

    step: Tensor

    def __init__(
        self,
        embed_dim: int,
        *,
        graph: nn.Module | None = None,
        interaction: nn.Module | None = None,
        pair_loss: PairLoss | None = None,
        enhanced_pair_loss: PairLoss | None = None,
        cross_pair_loss: PairLoss | None = None,
        enhanced_weight: float = 1.0,
        cross_weight: float = 1.0,
        regularization_weight: float = 10.0,
        warmup_steps: int = 0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        self.embed_dim = check_int("embed_dim", embed_dim, minimum=1)
        self.enhanced_weight = check_number("enhanced_weight", enhanced_weight, minimum=0)
        self.cross_weight = check_number("cross_weight", cross_weight, minimum=0)
        self.regularization_weight = check_number("regularization_weight", regularization_weight, minimum=0)
        self.gather_distributed = check_bool("gather_distributed", gather_distributed)
        for name, module in (("graph", graph), ("interaction", interaction)):
            if module is not None and not isinstance(module, nn.Module):
                raise TypeError(f"{name} must be a torch.nn.Module or None, got {said(module)}")
        if graph is not None and self.regularization_weight and not callable(getattr(graph, "regularization", None)):
            raise TypeError(
                f"graph must have a method regularization, or regularization_weight be 0, got {type(graph).__name__}"
            )
        if getattr(interaction, "embed_dim", self.embed_dim) != self.embed_dim:
            raise ValueError(f"interaction must have embed_dim {embed_dim} like the loss, got {interaction!r}")
        for name, given in (
            ("pair_loss", pair_loss),
            ("enhanced_pair_loss", enhanced_pair_loss),
            ("cross_pair_loss", cross_pair_loss),
        ):
            if given is not None and (not callable(given) or isinstance(given, type)):
                got = f"the class {given.__name__}" if isinstance(given, type) else said(given)
                raise TypeError(f"{name} must be a callable (similarity, positives) -> scalar, got {got}")
        self._counter = CallCounter(check_int("warmup_steps", warmup_steps, minimum=0))
        self.graph = AssociationGraph() if graph is None else graph
        self.interaction = _default_interaction(self.embed_dim) if interaction is None else interaction
        self.pair_loss = TripletLoss() if pair_loss is None else pair_loss
        self.enhanced_pair_loss, self.cross_pair_loss = enhanced_pair_loss, cross_pair_loss
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.register_load_state_dict_post_hook(_count_from_state)  # type: ignore[no-untyped-call]

    @property
    def warmup_steps(self) -> int:
        return self._counter.limit

    @warmup_steps.setter
    def warmup_steps(self, value: int) -> None:
        self._counter.set(check_int("warmup_steps", value, minimum=0), self._counter.calls)

    def extra_repr(self) -> str:
        return (
            f"{self.embed_dim}, enhanced_weight={self.enhanced_weight}, cross_weight={self.cross_weight}, "
            f"regularization_weight={self.regularization_weight}, warmup_steps={self.warmup_steps}, "
            f"gather_distributed={self.gather_distributed}"
            # modules are printed below, like graph and interaction
            + "".join(
                f", {name}={getattr(self, name)!r}"
                for name in ("pair_loss", "enhanced_pair_loss", "cross_pair_loss")
                if not isinstance(getattr(self, name), nn.Module)
            )
        )

    def relation_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of graph and interaction, for an optimizer group of their own (a smaller rate, say)."""
        yield from self.graph.parameters()
        yield from self.interaction.parameters()

    def forward(
        self,
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
    ) -> Tensor:
        """The total of :meth:`terms`, a scalar to call ``backward()`` on. Same arguments."""
        return self.terms(
            image_embedding, text_embedding, image_fragments, text_fragments, image_mask, text_mask, image_ids,
            image_index=image_index, positives=positives,
        ).total  # fmt: skip

    def terms(
        self,
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
    ) -> HREMTerms:
        """
        Args:
            image_embedding: (N, D), of any length: normalised here.
            text_embedding: (M, D) likewise; M is N, row by row, unless ``image_index``
                says otherwise.
            image_fragments: (N, R, F) regions.
            text_fragments: (M, W, F) words.
            image_mask: (N, R) bool, True = real; None = all real.
            text_mask: (M, W) likewise.
            image_ids: (N,) integer; equal ids are positives of one another. None = row number.
            image_index: (M,) integer in [0, N), the image that each text describes: several captions per image, each
                image encoded and aligned once. None = row by row.
            positives: (N, M) bool, which pairs belong together, for data with several right captions; instead of
                ``image_ids``. Not with ``gather_distributed``: it does not say who belongs together across processes.

        Returns:
            HREMTerms of scalars in float32 or better.

        Raises:
            TypeError, ValueError: an argument has the wrong type, dtype, shape or device, or a module of your own
                returned something else than it should.
        """
        batch = Batch(
            image_embedding, text_embedding, image_fragments, text_fragments, image_mask, text_mask, image_ids,
            image_index, positives,
        )  # fmt: skip
        return self._over_all(batch, self._terms)

    def relate(
        self,
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
    ) -> Relations:
        """The graph and the enhanced embeddings that :meth:`terms` works on, for logging, re-ranking or an objective
        of your own. Same arguments; counts no step and does not look at the warm-up.

        Returns:
            ``(graph, image_enhanced (N, D), text_enhanced (M, D))``, the latter L2-normalised; with
            ``gather_distributed`` of all processes.
        """
        batch = Batch(
            image_embedding, text_embedding, image_fragments, text_fragments, image_mask, text_mask, image_ids,
            image_index, positives,
        )  # fmt: skip

        def relate(whole: Batch, exchange: Exchange) -> Relations:
            pairs = self._pairs(whole, exchange)
            graph = self._graph(pairs, None if pairs.streamed else pair_cosines(*whole[:2]))
            return Relations(_whole(graph), *self._enhance(pairs, graph)[1])

        return self._over_all(batch, relate)

    def _over_all(self, own: Batch, work: Callable[[Batch, Exchange], _Result]) -> _Result:
        """``work`` on the batch, checked and with normalised embeddings; over several processes, those of all."""
        if not (self.gather_distributed and is_distributed()):
            self._check(own, empty=False)
            return work(_normalized(own), ALONE)
        problem = None
        try:
            self._check(own, empty=True)
            if own.positives is not None:
                raise ValueError("positives must be None with gather_distributed=True: give image_ids")
        except (TypeError, ValueError) as error:
            problem = error  # the other processes wait: tell them first
        device = self.step.device if problem is not None else own.image_embedding.device
        shares = agree(own, problem, training=self.training, warming=self._counter.warming, device=device)
        with one_random_stream(device):
            return work(*gather_embeddings(_normalized(own), shares))

    def _check(self, batch: Batch, *, empty: bool) -> None:
        check_batch(batch, self.embed_dim, empty=empty)
        check_weights("image_embedding", batch.image_embedding, self)

    def _pairs(self, batch: Batch, exchange: Exchange) -> Pairs:
        uses_lists = getattr(self.graph, "uses_lists", None)
        if callable(uses_lists) and uses_lists(*(x.shape[0] for x in batch[:2])):
            return Pairs(batch, True, exchange)
        return Pairs(batch, False, exchange)  # not bool(...): PyTorch 2.5 traces none of a comparison of sizes

    def _graph(self, pairs: Pairs, cosines: Cosines | None) -> AnyGraph:
        batch = pairs.batch
        v, u = batch.image_embedding, batch.text_embedding
        if not pairs.streamed:
            together = {"positives": pairs.matrix(), "cosines": cosines}
        else:  # such matrices are as large as what the lists are there to avoid
            together = {"positives": batch.positives}
            if batch.image_ids is not None:
                together["image_ids"] = batch.image_ids
        graph = self.graph(
            v, u, batch.image_fragments, batch.text_fragments, batch.image_mask, batch.text_mask,
            image_index=batch.image_index, exchange=pairs.exchange, **together,
        )  # fmt: skip
        return check_any_graph(graph, v.shape[0], u.shape[0], v.device)

    def _enhance(self, pairs: Pairs, graph: AnyGraph) -> tuple[Pairs, tuple[Tensor, Tensor]]:
        """Enhanced images and texts, normalised, and the pairs that know which of them are this process's own."""
        v, u = pairs.batch.image_embedding, pairs.batch.text_embedding
        enhanced = self.interaction(v, u, graph if self._interaction_shares() else _whole(graph))
        if not isinstance(enhanced, tuple) or len(enhanced) != 2:
            raise TypeError(f"interaction must return (image_enhanced, text_enhanced), got {said(enhanced)}")
        for name, x, like in zip(("image_enhanced", "text_enhanced"), enhanced, (v, u), strict=True):
            check_tensor(f"what interaction returns as {name}", x, tuple(like.shape), device=v.device)
        images, texts = (l2_normalize(x.to(compute_dtype(x.dtype))) for x in enhanced)
        exchange = pairs.exchange if self._interaction_shares() else ALONE  # made alike everywhere: so is its gradient
        if pairs.streamed and not isinstance(exchange, Alone):
            for side, x, unit in (("image", enhanced[0], images), ("text", enhanced[1], texts)):
                own = exchange.own_rows(side, x)
                exchange = exchange.remember(l2_normalize(own.to(compute_dtype(own.dtype))), unit)
        return Pairs(pairs.batch, pairs.streamed, exchange), (images, texts)

    def _interaction_shares(self) -> bool:
        """Whether each process computes its own rows of the enhanced embeddings, given neighbour lists."""
        return bool(getattr(self.interaction, "takes_lists", False))  # of torch.compile(interaction) too

    def _terms(self, batch: Batch, exchange: Exchange) -> HREMTerms:
        warming = self.training and self._counter.warming
        if recomputing():  # activation checkpointing: what the call before it did
            warming = self.training and self._counter.calls - 1 < self._counter.limit
        elif self.training:  # at once: a loss that differentiates on its way may have this run again before it ends
            count_call(self.step, self._counter.key)
        relational = bool(self.enhanced_weight or self.cross_weight or self.regularization_weight)
        return self._base_terms(batch, exchange) if warming or not relational else self._all_terms(batch, exchange)

    def _base_terms(self, batch: Batch, exchange: Exchange) -> HREMTerms:
        base = self._pairs(batch, exchange).loss("pair_loss", self.pair_loss, *batch[:2])
        zero = torch.zeros_like(base)
        idle = self.graph, self.interaction, self.enhanced_pair_loss, self.cross_pair_loss
        return HREMTerms(self._reach(base, idle), base, zero, zero, zero, zero)

    def _all_terms(self, batch: Batch, exchange: Exchange) -> HREMTerms:
        v, u = batch.image_embedding, batch.text_embedding
        pairs = self._pairs(batch, exchange)
        cosines = None if pairs.streamed else pair_cosines(v, u)
        similarity = None if cosines is None else cosines.across.to(v.dtype)
        base = pairs.loss("pair_loss", self.pair_loss, v, u, similarity)
        graph = self._graph(pairs, cosines)
        enhanced = cross_image = cross_text = regularization = torch.zeros_like(base)
        if self.regularization_weight:  # before the enhanced embeddings are there, which it has no use for
            regularize = cast("Callable[..., Tensor]", self.graph.regularization)
            kind = type(self.graph._modules.get("_orig_mod", self.graph))  # what torch.compile(graph) holds
            known = getattr(kind, "regularization", None) is AssociationGraph.regularization
            regularization = regularize(graph if known else _whole(graph), v, u, cosines=cosines)
            regularization = check_scalar("regularization", regularization, v.device)
        idle: list[object] = []
        if self.enhanced_weight or self.cross_weight:
            pairs, (v_enhanced, u_enhanced) = self._enhance(pairs, graph)
        else:
            idle.append(self.interaction)
        if self.enhanced_weight:
            pair_loss = self.pair_loss if self.enhanced_pair_loss is None else self.enhanced_pair_loss
            enhanced = pairs.loss("enhanced_pair_loss", pair_loss, v_enhanced, u_enhanced)
        else:
            idle.append(self.enhanced_pair_loss)
        if self.cross_weight:
            pair_loss = self.pair_loss if self.cross_pair_loss is None else self.cross_pair_loss
            cross_image = pairs.loss("cross_pair_loss", pair_loss, v_enhanced, u)
            cross_text = pairs.loss("cross_pair_loss", pair_loss, v, u_enhanced)
        else:
            idle.append(self.cross_pair_loss)
        total = (
            base
            + self.enhanced_weight * enhanced
            + self.cross_weight * (cross_image + cross_text)
            + self.regularization_weight * regularization
        )
        return HREMTerms(self._reach(total, idle), base, enhanced, cross_image, cross_text, regularization)

    def _reach(self, total: Tensor, idle: Iterable[object]) -> Tensor:
        """``total``, from which every parameter of the ``idle``, which had no part in it, gets a gradient of zero,
        whatever it holds: DistributedDataParallel waits for the gradients of all. With ``gather_distributed`` in one
        process too, so that an optimizer makes the same of it in one and in many."""
        if not (self.gather_distributed or is_distributed()) or not torch.is_grad_enabled():
            return total
        parameters = (p for part in idle if isinstance(part, nn.Module) for p in part.parameters())
        reached: Tensor = _ReachAll.apply(total, *(p for p in parameters if p.requires_grad))  # type: ignore[no-untyped-call]
        return reached


def _default_interaction(embed_dim: int) -> RelationInteraction:
    heads = next(h for h in range(16, 0, -1) if embed_dim % h == 0)
    if heads < 16:
        raise ValueError(
            f"embed_dim must be a multiple of 16, the default number of attention heads, got {embed_dim}; give "
            f"interaction=RelationInteraction({embed_dim}, num_heads={heads})"
        )
    return RelationInteraction(embed_dim)


def _normalized(batch: Batch) -> Batch:
    """Both embeddings on the unit sphere, in float32 or better and of one dtype."""
    dtype = torch.promote_types(*(compute_dtype(x.dtype) for x in batch[:2]))
    v, u = (l2_normalize(x.to(dtype)) for x in batch[:2])
    return Batch(v, u, *batch[2:])  # dynamo of torch 2.5 knows no _replace


def _whole(graph: AnyGraph) -> AnyGraph:
    """With the rows of all processes: what a module of the caller's own is told of."""
    return graph.whole() if isinstance(graph, SparseRelationGraph) else graph


def _count_from_state(module: HREMLoss, _incompatible: object) -> None:
    if module.step.device.type != "meta":
        module._counter.set(module._counter.limit, int(module.step))


class _ReachAll(torch.autograd.Function):
    """``x``, with a gradient of zero for every one of ``others``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
        ctx.save_for_backward(*others)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros_like(other) for other in ctx.saved_tensors)
