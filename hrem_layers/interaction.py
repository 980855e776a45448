"""Relation interaction: attention over the graph gives relation-enhanced embeddings (paper, section 3.4)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from hrem_layers._core.batch import turn_pairs
from hrem_layers._core.checks import check_bool, check_choice, check_int, check_number, check_tensor, check_weights
from hrem_layers._core.neighbors import NeighborBias
from hrem_layers._core.numerics import l2_normalize, module_dtype
from hrem_layers._core.transformer import LayerFactory, TransformerLayer, make_layers, run_layer
from hrem_layers.relations import BLOCKS, RelationBlock
from hrem_layers.relations.sparse import (
    AnyGraph,
    SparseRelationBlock,
    SparseRelationGraph,
    check_any_graph,
    count_texts,
    without_detours,
)

MECHANISMS = ("fusion", "standalone")
_STEPS = ("i2t", "t2i", "i2i", "t2t")


class RelationInteraction(nn.Module):
    r"""Transformer layers whose attention runs on the edges of the graph, weighted by relevance.

    .. math:: \mathrm{softmax}(Q K^\top / \sqrt{d_k} + \lambda S)\, V \quad \text{on edges only,}

    with the same bias in every head (λ = ``relation_weight``).

    - ``"fusion"``: one self-attention transformer over all nodes.
    - ``"standalone"``: each layer is first cross-attention (images query texts with A and S of I→T, texts
      query images with those of T→I, both from the same values), then self-attention within each modality
      (I→I, T→T). The four have weights of their own; each step has its residual, norm and feed-forward.

    The input is L2-normalised first. A node without any edge in a step keeps its value through the residual
    (in the release the softmax of nothing is NaN, and λ = 0 gives 0 · (−inf) = NaN). The standalone
    mechanism is described in the paper and missing from the release. How many images and texts there are, the
    graph says: N and M may differ.

    On a :class:`SparseRelationGraph` each row attends to its own neighbours, which are gathered: the numbers of the
    masked attention over its ``dense()``, in time and memory that grow as N·K instead of N². A ``layer`` of your own
    gets the dense matrix.

    Args:
        embed_dim: D; a multiple of ``num_heads``.
        mechanism: ``"fusion"`` or ``"standalone"``.
        num_heads: attention heads.
        num_layers: transformer layers (standalone: pairs of cross- and self-attention).
        ffn_dim: width of the feed-forward layers; None = ``embed_dim``.
        dropout: dropout probability, in [0, 1).
        relation_weight: λ, any finite number; 0 attends on edges without regard to relevance.
        residual: give ``v + g · x / ‖x‖`` of the normalised embedding v and what the layers make of it, x; False = x
            alone, as the release does. Without it all x can become one vector within a few steps of a large learning
            rate, at a loss of twice the margin and without a gradient that leads back (docs/results.md).
        gate: with ``residual``, what the learned scalar g starts from. At 0 the enhanced embeddings are the plain ones
            at first and relations come in as far as they serve the loss: a warm-up that needs no number of steps.
            None = g is 1 and not learned.
        layer: a function without arguments that makes another layer, called once per layer (standalone: four times):
            a module ``(x (n, D), bias (n, m), context (m, D) or None) -> (n, D)``, bias −inf where there is no edge.
            ``num_heads``, ``ffn_dim`` and ``dropout`` are then not used.

    Example:
        >>> v, u = torch.randn(4, 64), torch.randn(4, 64)
        >>> graph = AssociationGraph()(v, u, torch.randn(4, 36, 64), torch.randn(4, 12, 64))
        >>> image_enhanced, text_enhanced = RelationInteraction(64, num_heads=4)(v, u, graph)
        >>> image_enhanced.shape
        torch.Size([4, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        mechanism: str = "fusion",
        num_heads: int = 16,
        num_layers: int = 1,
        ffn_dim: int | None = None,
        dropout: float = 0.1,
        relation_weight: float = 1.0,
        residual: bool = True,
        gate: float | None = 0.0,
        layer: LayerFactory | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim = check_int("embed_dim", embed_dim, minimum=1)
        self.mechanism = check_choice("mechanism", mechanism, MECHANISMS)
        self.num_heads = check_int("num_heads", num_heads, minimum=1)
        self.num_layers = check_int("num_layers", num_layers, minimum=1)
        self.ffn_dim = self.embed_dim if ffn_dim is None else check_int("ffn_dim", ffn_dim, minimum=1)
        self.dropout = check_number("dropout", dropout, minimum=0, below=1)
        self.relation_weight = check_number("relation_weight", relation_weight)
        self.residual = check_bool("residual", residual)
        self.gate = None if gate is None else check_number("gate", gate)
        # [1]: what shards parameters takes none without a dimension
        learned = self.residual and self.gate is not None
        self.learned_gate = nn.Parameter(torch.full((1,), self.gate or 0.0)) if learned else None
        default = partial(
            TransformerLayer, self.embed_dim, num_heads=self.num_heads, ffn_dim=self.ffn_dim, dropout=self.dropout
        )
        if self.mechanism == "fusion":
            self.layers = nn.ModuleList(make_layers(layer, self.num_layers, default))
        else:
            made = make_layers(layer, self.num_layers * len(_STEPS), default)
            self.layers = nn.ModuleList(
                nn.ModuleDict(dict(zip(_STEPS, made[start : start + len(_STEPS)], strict=True)))
                for start in range(0, len(made), len(_STEPS))
            )

    def extra_repr(self) -> str:
        return (
            f"{self.embed_dim}, mechanism={self.mechanism!r}, num_heads={self.num_heads}, "
            f"num_layers={self.num_layers}, ffn_dim={self.ffn_dim}, dropout={self.dropout}, "
            f"relation_weight={self.relation_weight}, residual={self.residual}, gate={self.gate}"
        )

    def forward(self, image_embedding: Tensor, text_embedding: Tensor, graph: AnyGraph) -> tuple[Tensor, Tensor]:
        """
        Args:
            image_embedding: (N, D), of any length: normalised here. Any of float16, bfloat16, float32 and float64,
                whatever the dtype of the weights, which is what the layers compute in.
            text_embedding: (M, D) likewise.
            graph: over their N + M nodes, images first, of either form.

        Returns:
            image_enhanced (N, D) and text_enhanced (M, D), not normalised, in the dtype of each embedding.

        Raises:
            TypeError, ValueError: an argument, or what a ``layer`` of your own returns, has the wrong type, dtype,
                shape or device.
        """
        check_tensor("image_embedding", image_embedding, ("N", self.embed_dim))
        device = image_embedding.device
        m = count_texts(graph, image_embedding.shape[0])
        check_tensor("text_embedding", text_embedding, (m, self.embed_dim), device=device)
        graph = check_any_graph(graph, image_embedding.shape[0], text_embedding.shape[0], device)
        check_weights("image_embedding", image_embedding, self)

        if isinstance(graph, SparseRelationGraph) and not all(map(_takes_lists, self._all_layers())):
            graph = graph.dense()
        dtype = module_dtype(self)
        images, texts = image_embedding, text_embedding
        shared = graph if isinstance(graph, SparseRelationGraph) and graph.exchange is not None else None
        if shared is not None:
            images, texts = shared.rows("i").own(images), shared.rows("t").own(texts)
        images, texts = l2_normalize(images), l2_normalize(texts)
        related = (self._fusion if self.mechanism == "fusion" else self._standalone)(
            images.to(dtype), texts.to(dtype), graph
        )
        images, texts = self._result(images, related[0]), self._result(texts, related[1])
        if shared is not None:
            (images,), (texts,) = shared.rows("i").collect(images), shared.rows("t").collect(texts)
        return images, texts

    def _result(self, plain: Tensor, related: Tensor) -> Tensor:
        related = related.to(plain.dtype)
        if not self.residual:
            return related
        related = l2_normalize(related)
        return plain + (related if self.learned_gate is None else self.learned_gate.to(plain.dtype) * related)

    @property
    def takes_lists(self) -> bool:
        """Whether it runs on neighbour lists, and over several processes on their own rows; else on the matrix."""
        own = type(self).forward is not RelationInteraction.forward
        return not own and all(map(_takes_lists, self._all_layers()))

    def _all_layers(self) -> Iterator[nn.Module]:
        for layer in self.layers:
            yield from layer.values() if self.mechanism == "standalone" else (layer,)  # type: ignore[operator]

    def _fusion(self, images: Tensor, texts: Tensor, graph: AnyGraph) -> tuple[Tensor, Tensor]:
        nodes = torch.cat([images, texts])  # [n + m, d]
        bias = graph.attention_bias(self.relation_weight)  # [n + m, n + m]
        for layer in self.layers:
            nodes = run_layer(layer, nodes, bias)
        n = images.shape[0]
        return nodes[:n], nodes[n:]

    def _standalone(self, images: Tensor, texts: Tensor, graph: AnyGraph) -> tuple[Tensor, Tensor]:
        bias = {name: block.attention_bias(self.relation_weight) for name, block in _blocks(graph).items()}
        if isinstance(graph, SparseRelationGraph) and graph.exchange is not None:
            for name, here in bias.items():
                assert isinstance(here, NeighborBias)
                bias[name] = here._replace(rows=graph.rows(name[0]), nodes=graph.rows(name[2]))
        for steps in self.layers:
            assert isinstance(steps, nn.ModuleDict)
            images, texts = (
                run_layer(steps["i2t"], images, bias["i2t"], texts),
                run_layer(steps["t2i"], texts, bias["t2i"], images),
            )
            images, texts = run_layer(steps["i2i"], images, bias["i2i"]), run_layer(steps["t2t"], texts, bias["t2t"])
        return images, texts


def _blocks(graph: AnyGraph) -> Mapping[str, RelationBlock | SparseRelationBlock]:
    """The four blocks, those within a modality without what leads to excluded pairs over a third node."""
    if isinstance(graph, SparseRelationGraph):
        return _lists(graph)
    blocks = {name: graph.block(name) for name in BLOCKS}
    if graph.excluded is not None:
        blocks["i2i"] = _without_detours(blocks["i2i"], blocks["i2t"], graph.excluded)
        blocks["t2t"] = _without_detours(blocks["t2t"], blocks["t2i"], graph.excluded.t())
    return blocks


def _lists(graph: SparseRelationGraph) -> Mapping[str, SparseRelationBlock]:
    lists = {name: graph.block(name) for name in BLOCKS}
    if graph.excluded is None:
        return lists
    whole = graph.whole()  # a neighbour's own edges may be another process's
    for within, across, excluded in (("i2i", "i2t", graph.excluded), ("t2t", "t2i", turn_pairs(graph.excluded))):
        own = graph.rows(within[0]).owned()
        lists[within] = without_detours(lists[within], whole.block(across), excluded, own)
    return lists


def _takes_lists(layer: nn.Module) -> bool:
    return isinstance(layer, TransformerLayer) and type(layer).forward is TransformerLayer.forward


def _without_detours(within: RelationBlock, across: RelationBlock, excluded: Tensor) -> RelationBlock:
    """``within`` (N, N) without its edges to rows that have just attended, ``across`` (N, M), to what is excluded."""
    detours = excluded.float() @ across.connection.float().t()  # [n, n]: over how many excluded nodes
    return within._replace(connection=within.connection & (detours == 0))
