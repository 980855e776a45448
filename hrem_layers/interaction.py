"""Relation interaction: attention over the graph gives relation-enhanced embeddings (paper, section 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hrem_layers._core.checks import check_choice, check_int, check_number, check_tensor
from hrem_layers._core.numerics import l2_normalize
from hrem_layers._core.transformer import TransformerLayer
from hrem_layers.relations import RelationGraph, check_graph

MECHANISMS = ("fusion", "standalone")


class RelationInteraction(nn.Module):
    r"""Transformer layers whose attention runs on the edges of the graph, weighted by relevance.

    .. math:: \mathrm{softmax}(Q K^\top / \sqrt{d_k} + \lambda S)\, V \quad \text{on edges only,}

    with the same bias in every head (λ = ``relation_weight``).

    - ``"fusion"``: one self-attention transformer over the 2N nodes.
    - ``"standalone"``: each layer is first cross-attention (images query texts with A and S of I→T, texts
      query images with those of T→I, both from the same values), then self-attention within each modality
      (I→I, T→T). The four have weights of their own; each step has its residual, norm and feed-forward.

    The input is L2-normalised first. A node without any edge in a step keeps its value through the residual
    (in the release the softmax of nothing is NaN, and λ = 0 gives 0 · (−inf) = NaN). The standalone
    mechanism is described in the paper and missing from the release.

    Args:
        embed_dim: D; a multiple of ``num_heads``.
        mechanism: ``"fusion"`` or ``"standalone"``.
        num_heads: attention heads.
        num_layers: transformer layers (standalone: pairs of cross- and self-attention).
        ffn_dim: width of the feed-forward layers; None = ``embed_dim``.
        dropout: dropout probability, in [0, 1).
        relation_weight: λ, any finite number; 0 attends on edges without regard to relevance.
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
    ) -> None:
        super().__init__()
        self.embed_dim = check_int("embed_dim", embed_dim, minimum=1)
        self.mechanism = check_choice("mechanism", mechanism, MECHANISMS)
        self.num_heads, self.num_layers, self.dropout = num_heads, num_layers, dropout
        self.ffn_dim = embed_dim if ffn_dim is None else ffn_dim
        self.relation_weight = check_number("relation_weight", relation_weight)
        check_int("num_layers", num_layers, minimum=1)
        options = {"num_heads": num_heads, "ffn_dim": ffn_dim, "dropout": dropout}

        def layer() -> TransformerLayer:
            return TransformerLayer(embed_dim, **options)

        if mechanism == "fusion":
            self.layers = nn.ModuleList(layer() for _ in range(num_layers))
        else:
            steps = ("i2t", "t2i", "i2i", "t2t")
            self.layers = nn.ModuleList(nn.ModuleDict({step: layer() for step in steps}) for _ in range(num_layers))

    def extra_repr(self) -> str:
        return (
            f"{self.embed_dim}, mechanism={self.mechanism!r}, num_heads={self.num_heads}, "
            f"num_layers={self.num_layers}, ffn_dim={self.ffn_dim}, dropout={self.dropout}, "
            f"relation_weight={self.relation_weight}"
        )

    def forward(self, image_embedding: Tensor, text_embedding: Tensor, graph: RelationGraph) -> tuple[Tensor, Tensor]:
        """
        Args:
            image_embedding, text_embedding: (N, D). Normalised here.
            graph: over their 2N nodes, images first.

        Returns:
            image_enhanced, text_enhanced: (N, D) each, not normalised.

        Raises:
            TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
        """
        check_tensor("image_embedding", image_embedding, ("N", self.embed_dim))
        n = image_embedding.shape[0]
        check_tensor("text_embedding", text_embedding, (n, self.embed_dim), device=image_embedding.device)
        check_graph(graph, 2 * n, image_embedding.device)

        images, texts = l2_normalize(image_embedding), l2_normalize(text_embedding)
        return (self._fusion if self.mechanism == "fusion" else self._standalone)(images, texts, graph)

    def _fusion(self, images: Tensor, texts: Tensor, graph: RelationGraph) -> tuple[Tensor, Tensor]:
        nodes = torch.cat([images, texts])  # [2n, d]
        bias = graph.attention_bias(self.relation_weight)  # [2n, 2n]
        for layer in self.layers:
            nodes = layer(nodes, bias)
        n = images.shape[0]
        return nodes[:n], nodes[n:]

    def _standalone(self, images: Tensor, texts: Tensor, graph: RelationGraph) -> tuple[Tensor, Tensor]:
        weight = self.relation_weight
        i2t, t2i, i2i, t2t = (
            graph.block(name).attention_bias(weight) for name in ("i2t", "t2i", "i2i", "t2t")
        )  # [n, n] each
        for layer in self.layers:
            images, texts = layer["i2t"](images, i2t, context=texts), layer["t2i"](texts, t2i, context=images)
            images, texts = layer["i2i"](images, i2i), layer["t2t"](texts, t2t)
        return images, texts
