"""The association graph: who of a batch is connected, and how relevant they are (paper, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hrem_layers._core.batch import check_embeddings, check_fragments, check_positives, find_positives
from hrem_layers._core.checks import (
    check_bool,
    check_choice,
    check_int,
    check_number,
    check_same_device,
    check_tensor,
    said,
)
from hrem_layers._core.exchange import ALONE, Exchange
from hrem_layers._core.numerics import autocast_dtype, compute_dtype, module_dtype
from hrem_layers.alignment import MODES, Scores, align_fragments
from hrem_layers.alignment.candidates import align_candidates
from hrem_layers.relations import (
    Candidates,
    Cosines,
    RelationBlock,
    RelationGraph,
    check_graph,
    distance_relevance,
    guide_divergence,
    nearest,
    nearest_candidates,
    pair_cosines,
    scatter_rows,
    text_count,
)

Alignment = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, int], Scores]
"""``(image_fragments, text_fragments, image_mask, text_mask, topk) -> Scores``."""


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
        chunk_size: image-text pairs aligned at one time; see :func:`hrem_layers.align_fragments`.
        candidates: None = p, q and S for all N·M pairs. An integer k: across modalities each row (an image and
            its texts, a text and its images) has p, q and S only for the k nodes of the other modality whose
            embeddings have the largest cosine with its own; k of at least N and M is the same as None. A pair
            that is no candidate has no edge and relevance 0; a row has at most k edges across; L_reg compares the
            two distributions over the row's candidates. No gradient flows through the choice. The cost of the
            alignment grows as N·k instead of N·M; each direction aligns its own candidates, so from k = N/2
            on None costs less.

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
        positives: Tensor | None = None,
        cosines: Cosines | None = None,
        exchange: Exchange = ALONE,
    ) -> RelationGraph:
        """
        Args:
            image_embedding: (N, D), of any length: normalised here.
            text_embedding: (M, D) likewise.
            image_fragments: (N, R, F) regions, R at least 1.
            text_fragments: (M, W, F) words, W at least 1.
            image_mask: (N, R) bool, True = real; None = all real.
            text_mask: (M, W) likewise.
            image_index: (M,) integer in [0, N), the image that each text describes; None = M is N, row by row.
            positives: (N, M) bool, which pairs belong together, for ``exclude_positives``; None = as
                ``image_index`` says.
            cosines: those of the embeddings (:func:`hrem_layers.pair_cosines`), if the caller has them already.
            exchange: of several processes. The embeddings are then those of all, fragments and masks those of this
                one, and the alignment is shared among the processes.

        Returns:
            RelationGraph of connection (N + M, N + M) bool and relevance (N + M, N + M) in the dtype of
            ``image_embedding`` (float32 under autocast).

        Raises:
            TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
        """
        check_embeddings(image_embedding, text_embedding, image_index, "D", empty=False)
        n, m, device = image_embedding.shape[0], text_embedding.shape[0], image_embedding.device
        own = [exchange.own(side, count) for side, count in (("image", n), ("text", m))]
        n_own, m_own = (rows.stop - rows.start for rows in own)
        check_fragments("image", image_fragments, image_mask, n_own, "F", device)
        check_fragments("text", text_fragments, text_mask, m_own, image_fragments.shape[2], device)
        check_positives(positives, n, m, device)
        check_same_device("image_embedding", image_embedding, self)

        if self.detach_fragments:
            image_fragments, text_fragments = image_fragments.detach(), text_fragments.detach()
        fragments = _Fragments(image_fragments, text_fragments, image_mask, text_mask)
        if cosines is None:
            cosines = pair_cosines(image_embedding, text_embedding)
        excluded = find_positives(n, None, image_index, positives, device) if self.exclude_positives else None
        wide = compute_dtype(image_embedding.dtype)
        i2t, t2i, candidates = self._across(fragments, cosines, excluded, exchange)
        connection = _assemble(
            nearest(cosines.images.to(wide), self._neighbors(n)), i2t.connection,
            t2i.connection, nearest(cosines.texts.to(wide), self._neighbors(m)),
        )  # fmt: skip
        relevance = _assemble(
            self._within(cosines.images, wide), i2t.relevance, t2i.relevance, self._within(cosines.texts, wide)
        )
        if autocast_dtype(device) is None:
            relevance = relevance.to(image_embedding.dtype)
        return RelationGraph(connection, relevance, n, candidates, excluded)

    def regularization(
        self,
        graph: RelationGraph,
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
        n, d = image_embedding.shape
        check_tensor("text_embedding", text_embedding, (text_count(graph, n), d), device=image_embedding.device)
        check_graph(graph, n, text_embedding.shape[0], image_embedding.device)
        if cosines is None:
            cosines = pair_cosines(image_embedding.detach(), text_embedding.detach())
        wide = compute_dtype(image_embedding.dtype)
        return guide_divergence(graph, cosines.across, self.sigma, squared=self.squared_distance, dtype=wide)

    def _across(
        self, fragments: _Fragments, cosines: Cosines, excluded: Tensor | None, exchange: Exchange
    ) -> tuple[RelationBlock, RelationBlock, Candidates | None]:
        """Edges and relevance of both directions, (N, M) and (M, N), and the candidates that they were taken from."""
        n, m = cosines.across.shape
        allowed = None if excluded is None else ~excluded
        back = None if allowed is None else allowed.t()
        scale = 1.0 if self.alignment in ("cosine", "scan") else None
        k_i2t, k_t2i = self._neighbors(m), self._neighbors(n)
        if self.candidates is None or self.candidates >= max(n, m):
            i2t, t2i = self._all_pairs(fragments, exchange)
            return (
                RelationBlock(nearest(i2t.mean, k_i2t, scale=scale, allowed=allowed), i2t.relevance),
                RelationBlock(nearest(t2i.mean, k_t2i, scale=scale, allowed=back), t2i.relevance),
                None,
            )
        index = nearest_candidates(cosines.across.to(compute_dtype(fragments.images.dtype)), self.candidates)
        i2t, t2i = self._candidate_pairs(fragments, index, exchange)

        def spread(found: _Direction, where: Tensor, k: int, columns: int, allowed: Tensor | None) -> RelationBlock:
            here = None if allowed is None else allowed.gather(1, where)
            edges = nearest(found.mean, min(k, where.shape[1]), scale=scale, allowed=here)
            return RelationBlock(scatter_rows(edges, where, columns), scatter_rows(found.relevance, where, columns))

        return spread(i2t, index.i2t, k_i2t, m, allowed), spread(t2i, index.t2i, k_t2i, n, back), index

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
        self, fragments: _Fragments, index: Candidates, exchange: Exchange
    ) -> tuple[_Direction, _Direction]:
        """p and S of every row's candidates, (N, k) and (M, k); each process does its own rows."""
        images, texts, image_mask, text_mask = fragments
        mode = check_choice("alignment", self.alignment, MODES)

        def align(side: str, rows: Tensor, mask: Tensor | None, where: Tensor, mlp: nn.Module) -> _Direction:
            given = (texts, text_mask) if side == "image" else (images, image_mask)
            others, others_mask = exchange.gather_fragments("text" if side == "image" else "image", *given)
            mean, top = align_candidates(
                rows, others, mask, others_mask, where[exchange.own(side, where.shape[0])],
                topk=self.topk, mode=mode, chunk_size=self.chunk_size,
            )  # fmt: skip
            relevance = _relevance(mlp, top, mean)
            return _Direction(exchange.gather_rows(side, mean.detach()), exchange.gather_rows(side, relevance))

        return (
            align("image", images, image_mask, index.i2t, self.mlp_i2t),
            align("text", texts, text_mask, index.t2i, self.mlp_t2i),
        )

    def _within(self, cosine: Tensor, dtype: torch.dtype) -> Tensor:
        return distance_relevance(cosine, self.sigma, squared=self.squared_distance, dtype=dtype)

    def _neighbors(self, count: int) -> int:
        return max(1, int(count * self.neighbor_ratio))


def _assemble(i2i: Tensor, i2t: Tensor, t2i: Tensor, t2t: Tensor) -> Tensor:
    return torch.cat([torch.cat([i2i, i2t], dim=1), torch.cat([t2i, t2t], dim=1)])


def _relevance_mlp(topk: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(topk, topk), nn.ReLU(), nn.Linear(topk, 1))


def _relevance(mlp: nn.Module, top: Tensor, mean: Tensor) -> Tensor:
    """MLP(q) + p: top (N, M, topk), mean (N, M) -> (N, M), in the dtype of ``mean``."""
    q = top.to(module_dtype(mlp))  # p and q are float32 also when the module is half
    learned: Tensor = mlp(q)
    return learned.squeeze(-1).to(mean.dtype) + mean
