"""The association graph: who of a batch is connected, and how relevant they are (paper, section 3.3)."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from hrem_layers._core.batch import (
    PairIds,
    check_embeddings,
    check_fragments,
    check_image_ids,
    check_positives,
    pair_ids,
    pairs_at,
    turn_pairs,
)
from hrem_layers._core.checks import (
    check_bool,
    check_choice,
    check_int,
    check_number,
    check_sides,
    check_tensor,
    check_weights,
)
from hrem_layers._core.exchange import ALONE, Alone, Exchange, check_exchange
from hrem_layers._core.numerics import autocast_dtype, autocast_off, compute_dtype
from hrem_layers.alignment import MODES
from hrem_layers.cross_modal import Alignment, Direction, Fragments, Weigher, relevance_mlp
from hrem_layers.relations import (
    Cosines,
    RelationBlock,
    RelationGraph,
    check_cosines,
    distance_relevance,
    guide_divergence,
    nearest,
    pair_cosines,
)
from hrem_layers.relations.lists import block_within, find_lists
from hrem_layers.relations.sparse import (
    AnyGraph,
    SparseRelationBlock,
    SparseRelationGraph,
    assemble,
    check_any_graph,
    count_texts,
    list_divergence,
)

_ROUNDING = 4 * sys.float_info.epsilon


class AssociationGraph(nn.Module):
    r"""Connection A and relevance S among the nodes of a batch, N images and then M texts.

    - **Connection.** Each row keeps, in each of its two blocks, its :math:`k = \max(1, \lfloor c\rho\rfloor)`
      nearest of the c nodes there (ρ = ``neighbor_ratio``) and all that tie with the k-th: within a modality by
      the cosine of the embeddings, across modalities by the mean alignment p. No gradient flows through A.
    - **Relevance within a modality**: :math:`S_{ij} = \exp(-\lVert x_i - x_j\rVert / \sigma)` on
      L2-normalised embeddings.
    - **Relevance across modalities**: :math:`S = \mathrm{MLP}(q) + p`, one MLP per direction, Linear(topk, topk),
      ReLU, Linear(topk, 1). p and q: :func:`hrem_layers.align_fragments`.

    How this differs from the paper and the release: the paper squares the distance
    (``squared_distance=True``) and aligns by the dot product (``alignment="dot"``); the release aligns by
    ``"scan"``, in which p follows the length of the caption more than the match, and takes the connection within
    a modality from products across. Padded fragments are left out (in the release they change p and S), texts
    with fewer words than ``topk`` work (there they crash), and so does a batch of 1.

    Args:
        topk: how many alignment values describe a pair, at least 1.
        neighbor_ratio: ρ, the share of the nodes of a block to which a node is connected, in (0, 1].
        sigma: σ > 0, in units of the distance (of its square with ``squared_distance``).
        squared_distance: use :math:`\lVert x_i - x_j\rVert^2`, as the paper does.
        alignment: ``"cosine"``, ``"scan"`` (the release), ``"dot"`` (the paper), or a callable
            ``(image_fragments, text_fragments, image_mask, text_mask, topk) -> Scores`` of your own.
        detach_fragments: no gradient from p and q to the fragments. False costs two more products of all
            words by all regions, in memory that stays bounded.
        exclude_positives: no edge across the modalities between samples that belong together, whose embeddings
            would otherwise leak into one another; the k nearest are chosen among the others. The standalone
            interaction then leaves out edges within a modality that would lead there over a third node.
            Holds for an interaction of one layer.
        chunk_size: image-text pairs aligned at one time; see :func:`hrem_layers.align_fragments`. An alignment of your
            own sees to its memory itself.
        candidates: None = p, q and S for all N·M pairs, and a :class:`RelationGraph`. An integer k: a
            :class:`SparseRelationGraph` of at most k neighbours per row and block, in time and memory that grow as
            N·k but for the search of the neighbours. Across the modalities each row (an image and its texts, a text
            and its images) has p, q and S only for the k nodes of the other one whose embeddings have the largest
            cosine with its own, and of these edges to the nearest by p; L_reg compares the two distributions over
            these candidates. Within a modality it has edges to its min(k, ⌊cρ⌋) nearest. Where more tie with the
            last than fit, those of the smallest numbers are taken (a row's nodes across that tie by p all keep their
            edge). No gradient flows through the choice. k of at least N and M is the same as None; each direction
            aligns its own candidates, so from k = N/2 on None costs less.

    Example:
        >>> graph = AssociationGraph()
        >>> v, u = torch.randn(4, 64), torch.randn(4, 64)
        >>> regions, words = torch.randn(4, 36, 64), torch.randn(4, 12, 64)
        >>> graph(v, u, regions, words).connection.shape
        torch.Size([8, 8])
    """

    def __init__(
        self,
        *,
        topk: int = 10,
        neighbor_ratio: float = 0.5,
        sigma: float = 1.0,
        squared_distance: bool = False,
        alignment: str | Alignment = "cosine",
        detach_fragments: bool = True,
        exclude_positives: bool = False,
        chunk_size: int | None = None,
        candidates: int | None = None,
    ) -> None:
        super().__init__()
        self.topk = check_int("topk", topk, minimum=1)
        self.neighbor_ratio = check_number("neighbor_ratio", neighbor_ratio, above=0, maximum=1)
        self.sigma = check_number("sigma", sigma, above=0)
        self.squared_distance = check_bool("squared_distance", squared_distance)
        own = callable(alignment) and not isinstance(alignment, type)
        self.alignment = alignment if own else check_choice("alignment", alignment, MODES)
        self.detach_fragments = check_bool("detach_fragments", detach_fragments)
        self.exclude_positives = check_bool("exclude_positives", exclude_positives)
        self.chunk_size = None if chunk_size is None else check_int("chunk_size", chunk_size, minimum=1)
        self.candidates = None if candidates is None else check_int("candidates", candidates, minimum=1)
        if own and self.candidates is not None:
            raise ValueError("candidates must be None with an alignment of your own, which aligns all pairs")
        self.mlp_i2t = relevance_mlp(self.topk)
        self.mlp_t2i = relevance_mlp(self.topk)

    def extra_repr(self) -> str:
        return (
            f"topk={self.topk}, neighbor_ratio={self.neighbor_ratio}, sigma={self.sigma}, "
            f"squared_distance={self.squared_distance}, alignment={self.alignment!r}, "
            f"detach_fragments={self.detach_fragments}, exclude_positives={self.exclude_positives}, "
            f"chunk_size={self.chunk_size}, candidates={self.candidates}"
        )

    def forward(
        self,
        image_embedding: Tensor,
        text_embedding: Tensor,
        image_fragments: Tensor,
        text_fragments: Tensor,
        image_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        *,
        image_index: Tensor | None = None,
        image_ids: Tensor | None = None,
        positives: Tensor | None = None,
        cosines: Cosines | None = None,
        exchange: Exchange = ALONE,
    ) -> AnyGraph:
        """
        Args:
            image_embedding: (N, D), of any length: normalised here.
            text_embedding: (M, D) likewise.
            image_fragments: (N, R, F) regions, R at least 1.
            text_fragments: (M, W, F) words, W at least 1.
            image_mask: (N, R) bool, True = real; None = all real.
            text_mask: (M, W) likewise.
            image_index: (M,) integer in [0, N), the image that each text describes; None = M is N, row by row.
            image_ids: (N,) integer, equal ids belong together, for ``exclude_positives``; None = every image is its
                own. A text belongs to the image that it describes.
            positives: (N, M) bool, which pairs belong together, instead of ``image_ids``.
            cosines: those of the embeddings (:func:`hrem_layers.pair_cosines`), if the caller has them already; a
                sparse graph has no use for them.
            exchange: of several processes. The embeddings are then those of all, fragments and masks those of this
                one, and the alignment is shared among the processes.

        Returns:
            RelationGraph of connection (N + M, N + M) bool and relevance (N + M, N + M) in the dtype of
            ``image_embedding`` (float32 under autocast); with ``candidates`` less than N or M a SparseRelationGraph.

        Raises:
            TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
        """
        check_exchange("exchange", exchange)
        check_embeddings(image_embedding, text_embedding, image_index, "D", empty=False)
        n, m, device = image_embedding.shape[0], text_embedding.shape[0], image_embedding.device
        own = [exchange.own(side, count) for side, count in (("image", n), ("text", m))]
        n_own, m_own = (rows.stop - rows.start for rows in own)
        check_fragments("image", image_fragments, image_mask, n_own, "F", device)
        check_fragments("text", text_fragments, text_mask, m_own, image_fragments.shape[2], device)
        check_positives(positives, n, m, device)
        check_image_ids(image_ids, n, positives, device)
        check_weights("image_embedding", image_embedding, self)
        check_cosines(cosines, n, m, device)

        if self.detach_fragments:
            image_fragments, text_fragments = image_fragments.detach(), text_fragments.detach()
        fragments = Fragments(image_fragments, text_fragments, image_mask, text_mask)
        excluded: Tensor | PairIds | None = None
        if self.exclude_positives:
            excluded = pair_ids(n, image_ids, image_index, device) if positives is None else positives
        if self.uses_lists(n, m):
            return self._lists(image_embedding, text_embedding, fragments, excluded, exchange)
        if isinstance(excluded, PairIds):
            excluded = excluded.matrix()
        if cosines is None:
            cosines = pair_cosines(image_embedding, text_embedding)
        wide = compute_dtype(image_embedding.dtype)
        i2t, t2i = self._across(fragments, excluded, exchange)
        connection = _assemble(
            nearest(cosines.images.to(wide), self._neighbors(n)), i2t.connection,
            t2i.connection, nearest(cosines.texts.to(wide), self._neighbors(m)),
        )  # fmt: skip
        relevance = _assemble(
            self._within(cosines.images, wide), i2t.relevance, t2i.relevance, self._within(cosines.texts, wide)
        )
        relevance = relevance.to(_result_dtype(image_embedding))
        return RelationGraph(connection, relevance, n, excluded=excluded)

    def uses_lists(self, n: int, m: int) -> bool:
        """Whether a batch of N images and M texts gets a :class:`SparseRelationGraph`."""
        return self.candidates is not None and self.candidates < max(n, m)

    def regularization(
        self,
        graph: AnyGraph,
        image_embedding: Tensor,
        text_embedding: Tensor,
        *,
        cosines: Cosines | None = None,
    ) -> Tensor:
        r"""L_reg, which keeps the learned cross-modal relevance near the geometry of the embeddings.

        .. math::
            \mathrm{KL}(\mathrm{softmax}(S_{IT}) \,\|\, \mathrm{softmax}(G)) +
            \mathrm{KL}(\mathrm{softmax}(S_{TI}) \,\|\, \mathrm{softmax}(G^\top)),
            \quad G_{ij} = \exp(-\lVert v_i - u_j\rVert / \sigma)

        softmax over each row (over its candidates, if the graph has some), mean over rows; G on normalised
        embeddings, without gradient. With ``detach_fragments`` it reaches the two MLPs alone.

        Args:
            graph: over these N images and M texts.
            image_embedding: (N, D), of any length.
            text_embedding: (M, D) likewise.
            cosines: those of the embeddings, if the caller has them already.

        Returns:
            A scalar, float32 or better.

        Raises:
            TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
        """
        check_tensor("image_embedding", image_embedding, ("N", "D"))
        n = image_embedding.shape[0]
        check_sides(image_embedding, text_embedding, count_texts(graph, n))
        graph = check_any_graph(graph, n, text_embedding.shape[0], image_embedding.device)
        check_cosines(cosines, n, text_embedding.shape[0], image_embedding.device)
        if isinstance(graph, SparseRelationGraph):
            x, y, dtype = image_embedding.detach(), text_embedding.detach(), compute_dtype(image_embedding.dtype)
            return list_divergence(graph, x, y, self.sigma, squared=self.squared_distance, dtype=dtype)
        if cosines is None:
            cosines = pair_cosines(image_embedding.detach(), text_embedding.detach())
        wide = compute_dtype(image_embedding.dtype)
        return guide_divergence(graph, cosines.across, self.sigma, squared=self.squared_distance, dtype=wide)

    def _across(
        self, fragments: Fragments, excluded: Tensor | None, exchange: Exchange
    ) -> tuple[RelationBlock, RelationBlock]:
        """Edges and relevance of both directions, (N, M) and (M, N)."""
        weigher = self._weigher()
        i2t, t2i = weigher.all_pairs(fragments, exchange)
        n, m = i2t.mean.shape
        allowed = None if excluded is None else ~excluded
        back = None if allowed is None else allowed.t()
        return (
            RelationBlock(nearest(i2t.mean, self._neighbors(m), scale=weigher.scale(), allowed=allowed), i2t.relevance),
            RelationBlock(nearest(t2i.mean, self._neighbors(n), scale=weigher.scale(), allowed=back), t2i.relevance),
        )

    def _lists(
        self, v: Tensor, u: Tensor, fragments: Fragments, excluded: Tensor | PairIds | None, exchange: Exchange
    ) -> SparseRelationGraph:
        """The graph of ``candidates=k``. The nodes are found, aligned and weighed by their lists alone."""
        assert self.candidates is not None
        n, m, weigher = v.shape[0], u.shape[0], self._weigher()
        wide, dtype = compute_dtype(v.dtype), _result_dtype(v)

        def relevance(cosine: Tensor) -> Tensor:
            return self._within(cosine, wide).to(dtype)

        with autocast_off(v.device):
            dtypes = wide, compute_dtype(fragments.images.dtype)
            lists = find_lists(v, u, self.candidates, self._neighbors, exchange, dtypes=dtypes)
            i2i = block_within("image", v, lists.i2i, exchange, relevance)
            t2t = block_within("text", u, lists.t2t, exchange, relevance)
        found = weigher.candidates(fragments, lists.i2t, lists.t2i, exchange)

        def across(found: Direction, index: Tensor, count: int, allowed: Tensor | None) -> SparseRelationBlock:
            neighbors = min(self._neighbors(count), index.shape[1])
            edges = nearest(found.mean, neighbors, scale=weigher.scale(), allowed=allowed)
            return SparseRelationBlock(index, found.relevance.to(dtype), edges, count)

        not_i2t = not_t2i = None
        if excluded is not None:
            not_i2t = ~pairs_at(excluded, lists.i2t, exchange.own("image", n))
            not_t2i = ~pairs_at(turn_pairs(excluded), lists.t2i, exchange.own("text", m))
        return assemble(
            i2i, across(found[0], lists.i2t, m, not_i2t), across(found[1], lists.t2i, n, not_t2i), t2t,
            excluded, None if isinstance(exchange, Alone) else exchange,
        )  # fmt: skip

    def _weigher(self) -> Weigher:
        return Weigher(self.alignment, self.topk, self.chunk_size, self.mlp_i2t, self.mlp_t2i)

    def _within(self, cosine: Tensor, dtype: torch.dtype) -> Tensor:
        return distance_relevance(cosine, self.sigma, squared=self.squared_distance, dtype=dtype)

    def _neighbors(self, count: int) -> int:
        share = count * self.neighbor_ratio
        return max(1, int(share + _ROUNDING * share))  # 0.29 · 100 is 28.999999999999996


def _assemble(i2i: Tensor, i2t: Tensor, t2i: Tensor, t2t: Tensor) -> Tensor:
    return torch.cat([torch.cat([i2i, i2t], dim=1), torch.cat([t2i, t2t], dim=1)])


def _result_dtype(embedding: Tensor) -> torch.dtype:
    return embedding.dtype if autocast_dtype(embedding.device) is None else compute_dtype(embedding.dtype)
