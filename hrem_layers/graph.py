"""The association graph: who of a batch is connected, and how relevant they are (paper, section 3.3)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

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
    said,
)
from hrem_layers._core.exchange import ALONE, Alone, Exchange, check_exchange
from hrem_layers._core.numerics import autocast_dtype, autocast_off, compute_dtype, module_dtype
from hrem_layers._core.recompute import recompute
from hrem_layers.alignment import MODES, Scores, align_fragments
from hrem_layers.alignment.candidates import align_candidates
from hrem_layers.alignment.parts import Part, align_in_parts
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
from hrem_layers.relations.neighbors import edge_cosines, exact_units, nearest_rows
from hrem_layers.relations.sparse import (
    AnyGraph,
    SparseRelationBlock,
    SparseRelationGraph,
    assemble,
    check_any_graph,
    count_texts,
    list_divergence,
)

Alignment = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, int], Scores]
"""``(image_fragments, text_fragments, image_mask, text_mask, topk) -> Scores``."""

_ROUNDING = 4 * sys.float_info.epsilon


class _Fragments(NamedTuple):
    """This process's own."""

    images: Tensor
    texts: Tensor
    image_mask: Tensor | None
    text_mask: Tensor | None


class _Direction(NamedTuple):
    """Across the modalities, rows receive: p and S of all pairs (N, M), or of the candidates (N, k)."""

    mean: Tensor
    relevance: Tensor


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
        self.mlp_i2t = _relevance_mlp(self.topk)
        self.mlp_t2i = _relevance_mlp(self.topk)

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
        fragments = _Fragments(image_fragments, text_fragments, image_mask, text_mask)
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
        self, fragments: _Fragments, excluded: Tensor | None, exchange: Exchange
    ) -> tuple[RelationBlock, RelationBlock]:
        """Edges and relevance of both directions, (N, M) and (M, N)."""
        i2t, t2i = self._all_pairs(fragments, exchange)
        n, m = i2t.mean.shape
        allowed = None if excluded is None else ~excluded
        back = None if allowed is None else allowed.t()
        return (
            RelationBlock(nearest(i2t.mean, self._neighbors(m), scale=self._scale, allowed=allowed), i2t.relevance),
            RelationBlock(nearest(t2i.mean, self._neighbors(n), scale=self._scale, allowed=back), t2i.relevance),
        )

    def _lists(
        self, v: Tensor, u: Tensor, fragments: _Fragments, excluded: Tensor | PairIds | None, exchange: Exchange
    ) -> SparseRelationGraph:
        """The graph of ``candidates=k``. The nodes are found, aligned and weighed by their lists alone."""
        assert self.candidates is not None
        (n, m), k = (v.shape[0], u.shape[0]), self.candidates
        wide, dtype = compute_dtype(v.dtype), _result_dtype(v)
        images, texts = exchange.own("image", n), exchange.own("text", m)  # this process's rows
        alone = isinstance(exchange, Alone)
        with autocast_off(v.device):
            of_fragments = compute_dtype(fragments.images.dtype)

            def search(own: Tensor, other: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
                """Units of own rows, of a side and of the other one: the nearest to both among all of the first. Over
                several processes these are there in float64 for one side at a time."""
                units, count = own if alone else exact_units(embedding.detach()), embedding.shape[0]
                near = nearest_rows(own, units, min(k, self._neighbors(count)), wide)
                return near, nearest_rows(other, units, min(k, count), of_fragments)

            own_images, own_texts = exact_units(v.detach()[images]), exact_units(u.detach()[texts])
            near_images, t2i = search(own_images, own_texts, v)
            near_texts, i2t = search(own_texts, own_images, u)
            del own_images, own_texts

            def within(side: str, embedding: Tensor, index: Tensor) -> SparseRelationBlock:
                def weigh(own: Tensor) -> Tensor:
                    units = exact_units(own)
                    everyone = units if alone else exchange.share_rows(side, units, exact_units(embedding.detach()))
                    return self._within(edge_cosines(units, everyone, index), wide).to(dtype)

                relevance = recompute(weigh, exchange.own_rows(side, embedding))
                edges = torch.ones_like(index, dtype=torch.bool)
                return SparseRelationBlock(index, relevance, edges, embedding.shape[0])

            i2i, t2t = within("image", v, near_images), within("text", u, near_texts)
        found = self._candidate_pairs(fragments, i2t, t2i, exchange)

        def across(found: _Direction, index: Tensor, count: int, allowed: Tensor | None) -> SparseRelationBlock:
            neighbors = min(self._neighbors(count), index.shape[1])
            edges = nearest(found.mean, neighbors, scale=self._scale, allowed=allowed)
            return SparseRelationBlock(index, found.relevance.to(dtype), edges, count)

        return assemble(
            i2i,
            across(found[0], i2t, m, None if excluded is None else ~pairs_at(excluded, i2t, images)),
            across(found[1], t2i, n, None if excluded is None else ~pairs_at(turn_pairs(excluded), t2i, texts)),
            t2t,
            excluded,
            None if alone else exchange,
        )

    @property
    def _scale(self) -> float | None:
        """The magnitude of p of which an ulp is meant; None = the largest of the row."""
        return 1.0 if self.alignment in ("cosine", "scan") else None

    def _all_pairs(self, fragments: _Fragments, exchange: Exchange) -> tuple[_Direction, _Direction]:
        """p and S of all pairs. Each process aligns its own texts with all images (or its images with all texts,
        if those are the cheaper ones to send), and p and S are put together; q stays where it was made."""
        images, texts, image_mask, text_mask = fragments
        if exchange.travels == "image":
            images, image_mask = exchange.gather_fragments("image", images, image_mask)
        else:
            texts, text_mask = exchange.gather_fragments("text", texts, text_mask)
        aligned = self._align(images, texts, image_mask, text_mask)
        means = exchange.gather_pairs(aligned.mean_i2t.detach(), aligned.mean_t2i.detach())  # for the connection
        relevances = exchange.gather_pairs(
            _relevance(self.mlp_i2t, aligned.top_i2t, aligned.mean_i2t),
            _relevance(self.mlp_t2i, aligned.top_t2i, aligned.mean_t2i),
        )
        return _Direction(means[0], relevances[0]), _Direction(means[1], relevances[1])

    def _align(self, images: Tensor, texts: Tensor, image_mask: Tensor | None, text_mask: Tensor | None) -> Scores:
        if isinstance(self.alignment, str):
            return align_fragments(
                images, texts, image_mask, text_mask,
                topk=self.topk, mode=self.alignment, chunk_size=self.chunk_size,
            )  # fmt: skip
        scores = self.alignment(images, texts, image_mask, text_mask, self.topk)
        if not isinstance(scores, Scores):
            raise TypeError(f"alignment must return hrem_layers.Scores, got {said(scores)}")
        n, m = images.shape[0], texts.shape[0]
        shapes = (n, m), (m, n), (n, m, self.topk), (m, n, self.topk)
        for name, x, shape in zip(Scores._fields, scores, shapes, strict=True):
            check_tensor(f"what alignment returns as {name}", x, shape, device=images.device)
        return scores

    def _candidate_pairs(
        self, fragments: _Fragments, i2t: Tensor, t2i: Tensor, exchange: Exchange
    ) -> tuple[_Direction, _Direction]:
        """p and S of the candidates of this process's rows, (n, k) and (m, k), which ``i2t`` and ``t2i`` name."""
        images, texts, image_mask, text_mask = fragments
        mode = check_choice("alignment", self.alignment, MODES)
        # backward would need all of them again
        at_once = torch.is_grad_enabled() and (images.requires_grad or texts.requires_grad)

        def align(side: str, rows: Tensor, mask: Tensor | None, index: Tensor, mlp: nn.Module) -> _Direction:
            other = "text" if side == "image" else "image"
            given = (texts, text_mask) if side == "image" else (images, image_mask)
            parts = None if at_once else exchange.parts(other, given[0], index)
            if parts is None:
                others, others_mask, where = exchange.fetch_fragments(other, *given, index)
                mean, top = align_candidates(
                    rows, others, mask, others_mask, where, topk=self.topk, mode=mode, chunk_size=self.chunk_size
                )
            else:
                fetched = (Part(ids, *exchange.fetch_fragments(other, *given, ids)[:2]) for ids in parts)
                mean, top = align_in_parts(
                    rows, mask, index, fetched, topk=self.topk, mode=mode, chunk_size=self.chunk_size
                )
            return _Direction(mean.detach(), _relevance(mlp, top, mean))

        return (
            align("image", images, image_mask, i2t, self.mlp_i2t),
            align("text", texts, text_mask, t2i, self.mlp_t2i),
        )

    def _within(self, cosine: Tensor, dtype: torch.dtype) -> Tensor:
        return distance_relevance(cosine, self.sigma, squared=self.squared_distance, dtype=dtype)

    def _neighbors(self, count: int) -> int:
        share = count * self.neighbor_ratio
        return max(1, int(share + _ROUNDING * share))  # 0.29 · 100 is 28.999999999999996


def _assemble(i2i: Tensor, i2t: Tensor, t2i: Tensor, t2t: Tensor) -> Tensor:
    return torch.cat([torch.cat([i2i, i2t], dim=1), torch.cat([t2i, t2t], dim=1)])


def _result_dtype(embedding: Tensor) -> torch.dtype:
    return embedding.dtype if autocast_dtype(embedding.device) is None else compute_dtype(embedding.dtype)


def _relevance_mlp(topk: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(topk, topk), nn.ReLU(), nn.Linear(topk, 1))


def _relevance(mlp: nn.Module, top: Tensor, mean: Tensor) -> Tensor:
    """MLP(q) + p: top (N, M, topk), mean (N, M) -> (N, M), in the dtype of ``mean``."""
    q = top.to(module_dtype(mlp))  # p and q are float32 also when the module is half
    learned: Tensor = mlp(q)
    return learned.squeeze(-1).to(mean.dtype) + mean
