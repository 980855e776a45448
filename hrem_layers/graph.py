"""The graph over all images and texts of a batch: who is connected, and how relevant (paper, section 3.3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrem_layers._core.checks import check_bool, check_choice, check_int, check_number, check_tensor
from hrem_layers._core.numerics import autocast_dtype, compute_dtype, cosine_matrix, l2_normalize
from hrem_layers.alignment import MODES, align_fragments
from hrem_layers.alignment.candidates import align_candidates, scatter_rows
from hrem_layers.distributed import Shares
from hrem_layers.relations import RelationGraph, check_graph


class _Direction(NamedTuple):
    """Across the modalities, rows receive: p and S of all pairs (N, M), or of the candidates (N, k)."""

    mean: Tensor
    relevance: Tensor


class AssociationGraph(nn.Module):
    r"""Connection A and relevance S among the 2N nodes of a batch, images first.

    - **Connection.** Each row keeps, in each of its two blocks, its :math:`k = \max(1, \lfloor N\rho\rfloor)`
      nearest nodes (ρ = ``neighbor_ratio``) and all that tie with the k-th: within a modality by the cosine
      of the embeddings, across modalities by the mean alignment p. No gradient flows through A.
    - **Relevance within a modality**: :math:`S_{ij} = \exp(-\lVert x_i - x_j\rVert / \sigma)` on
      L2-normalised embeddings.
    - **Relevance across modalities**: :math:`S = \mathrm{MLP}(q) + p`, an MLP a direction, Linear(topk, topk),
      ReLU, Linear(topk, 1). p and q: :func:`hrem_layers.align_fragments`.

    How this differs from the paper and the release: the paper squares the distance
    (``squared_distance=True``) and aligns by the dot product (``alignment="dot"``); the defaults are the
    release's. Padded fragments are left out (in the release they change p and S), texts with fewer words than
    ``topk`` work (there they crash), and so does a batch of 1.

    Args:
        topk: how many alignment values describe a pair, at least 1.
        neighbor_ratio: ρ, the share of the N nodes of a block to which a node is connected, in (0, 1].
        sigma: σ > 0, in units of the distance (of its square with ``squared_distance``).
        squared_distance: use :math:`\lVert x_i - x_j\rVert^2`, as the paper does.
        alignment: ``"scan"``, ``"cosine"`` or ``"dot"``.
        detach_fragments: no gradient from p and q to the fragments. False costs two more products of all
            words by all regions, in memory that stays bounded.
        chunk_size: image-text pairs aligned at one time; see :func:`hrem_layers.align_fragments`.
        candidates: None = p, q and S for all N² pairs. An integer k: across modalities each row (an image and
            its texts, a text and its images) has p, q and S only for the k nodes of the other modality whose
            embeddings have the largest cosine with its own; k ≥ N is the same as None. A pair that is no
            candidate has no edge and relevance 0; a row has at most k edges across; L_reg compares the two
            distributions over the row's candidates. No gradient flows through the choice. The cost of the
            alignment grows as N·k instead of N²; each direction aligns its own candidates, so from k = N/2
            on None costs less. See docs/scaling.md.
    """

    def __init__(
        self,
        *,
        topk: int = 10,
        neighbor_ratio: float = 0.5,
        sigma: float = 1.0,
        squared_distance: bool = False,
        alignment: str = "scan",
        detach_fragments: bool = True,
        chunk_size: int | None = None,
        candidates: int | None = None,
    ) -> None:
        super().__init__()
        self.topk = check_int("topk", topk, minimum=1)
        self.neighbor_ratio = check_number("neighbor_ratio", neighbor_ratio, above=0, maximum=1)
        self.sigma = check_number("sigma", sigma, above=0)
        self.squared_distance = check_bool("squared_distance", squared_distance)
        self.alignment = check_choice("alignment", alignment, MODES)
        self.detach_fragments = check_bool("detach_fragments", detach_fragments)
        self.chunk_size = None if chunk_size is None else check_int("chunk_size", chunk_size, minimum=1)
        self.candidates = None if candidates is None else check_int("candidates", candidates, minimum=1)
        self.mlp_i2t = _relevance_mlp(topk)
        self.mlp_t2i = _relevance_mlp(topk)

    def extra_repr(self) -> str:
        return (
            f"topk={self.topk}, neighbor_ratio={self.neighbor_ratio}, sigma={self.sigma}, "
            f"squared_distance={self.squared_distance}, alignment={self.alignment!r}, "
            f"detach_fragments={self.detach_fragments}, chunk_size={self.chunk_size}, "
            f"candidates={self.candidates}"
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
        shares: Shares | None = None,
    ) -> RelationGraph:
        """
        Args:
            image_embedding, text_embedding: (N, D); row i of both belongs together. Normalised here.
            image_fragments: (N, R, F) regions, R at least 1.
            text_fragments: (N, W, F) words, W at least 1.
            image_mask: (N, R) bool, True = real; None = all real.
            text_mask: (N, W) likewise.
            shares: for HREMLoss under ``torch.distributed``: the embeddings are those of all processes,
                fragments and masks those of this one, and the alignment is shared among the processes.

        Returns:
            RelationGraph of connection (2N, 2N) bool and relevance (2N, 2N) in the dtype of the embeddings
            (under autocast float32).

        Raises:
            TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
        """
        check_tensor("image_embedding", image_embedding, ("N", "D"))
        n, d = image_embedding.shape
        device = image_embedding.device
        check_tensor("text_embedding", text_embedding, (n, d), device=device)
        own = n if shares is None else shares.sizes[shares.rank]
        check_tensor("image_fragments", image_fragments, (own, "R", "F"), device=device)
        check_tensor("text_fragments", text_fragments, (own, "W", image_fragments.shape[2]), device=device)
        if n < 1:
            raise ValueError("image_embedding must hold at least 1 item, got an empty batch")

        if self.detach_fragments:
            image_fragments, text_fragments = image_fragments.detach(), text_fragments.detach()
        images, texts = (_normalize_wide(x) for x in (image_embedding, text_embedding))
        fragments = image_fragments, text_fragments, image_mask, text_mask
        k = _neighbors(n, self.neighbor_ratio)
        if self.candidates is None or self.candidates >= n:
            i2t, t2i = self._all_pairs(*fragments) if shares is None else self._all_pairs_shared(*fragments, shares)
            edges_i2t, edges_t2i = nearest(i2t.mean, k), nearest(t2i.mean, k)
            relevance_i2t, relevance_t2i = i2t.relevance, t2i.relevance
        else:
            index = _candidate_index(images, texts, self.candidates)
            edges_k = min(k, self.candidates)
            (edges_i2t, relevance_i2t), (edges_t2i, relevance_t2i) = (
                (scatter_rows(nearest(x.mean, edges_k), where), scatter_rows(x.relevance, where))
                for x, where in zip(self._candidate_pairs(*fragments, index, shares), index, strict=True)
            )
        connection = torch.cat(
            [
                torch.cat([nearest(cosine_matrix(images, images), k), edges_i2t], dim=1),
                torch.cat([edges_t2i, nearest(cosine_matrix(texts, texts), k)], dim=1),
            ]
        )  # [2n, 2n]
        relevance = torch.cat(
            [
                torch.cat([self._within(images), relevance_i2t], dim=1),
                torch.cat([relevance_t2i, self._within(texts)], dim=1),
            ]
        )  # [2n, 2n]
        if autocast_dtype(device) is None:
            relevance = relevance.to(image_embedding.dtype)
        return RelationGraph(connection, relevance)

    def regularization(self, graph: RelationGraph, image_embedding: Tensor, text_embedding: Tensor) -> Tensor:
        r"""L_reg, which keeps the learned cross-modal relevance near the geometry of the embeddings.

        .. math::
            \mathrm{KL}(\mathrm{softmax}(S_{IT}) \,\|\, \mathrm{softmax}(G)) +
            \mathrm{KL}(\mathrm{softmax}(S_{TI}) \,\|\, \mathrm{softmax}(G^\top)),
            \quad G_{ij} = \exp(-\lVert v_i - u_j\rVert / \sigma)

        softmax over each row, mean over rows; G on normalised embeddings, without gradient. A scalar in
        float32 or better.

        Raises:
            TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
        """
        check_tensor("image_embedding", image_embedding, ("N", "D"))
        n, d = image_embedding.shape
        check_tensor("text_embedding", text_embedding, (n, d), device=image_embedding.device)
        check_graph(graph, 2 * n, image_embedding.device)
        images, texts = (_normalize_wide(x.detach()) for x in (image_embedding, text_embedding))
        guide = distance_relevance(images, texts, self.sigma, squared=self.squared_distance)
        learned = graph.relevance.to(guide.dtype)
        i2t, t2i, guide_i2t, guide_t2i = learned[:n, n:], learned[n:, :n], guide, guide.t()
        if self.candidates is not None and self.candidates < n:
            index_i2t, index_t2i = _candidate_index(images, texts, self.candidates)  # the same as in forward
            i2t, guide_i2t = i2t.gather(1, index_i2t), guide_i2t.gather(1, index_i2t)
            t2i, guide_t2i = t2i.gather(1, index_t2i), guide_t2i.gather(1, index_t2i)
        return _row_kl(i2t, guide_i2t) + _row_kl(t2i, guide_t2i)

    def _all_pairs(
        self, images: Tensor, texts: Tensor, image_mask: Tensor | None, text_mask: Tensor | None
    ) -> tuple[_Direction, _Direction]:
        """Fragments (I, R, F) and (T, W, F) -> p and S, (I, T) and (T, I)."""
        aligned = align_fragments(
            images, texts, image_mask, text_mask,
            topk=self.topk, mode=self.alignment, chunk_size=self.chunk_size,
        )  # fmt: skip
        return (
            _Direction(aligned.mean_i2t, _across(self.mlp_i2t, aligned.top_i2t, aligned.mean_i2t)),
            _Direction(aligned.mean_t2i, _across(self.mlp_t2i, aligned.top_t2i, aligned.mean_t2i)),
        )

    def _all_pairs_shared(
        self, images: Tensor, texts: Tensor, image_mask: Tensor | None, text_mask: Tensor | None, shares: Shares
    ) -> tuple[_Direction, _Direction]:
        """The same over all processes: each aligns its texts with all images (or its images with all texts,
        if those are the narrower ones to send), and p and S are put together. q stays where it was made."""
        texts_stay = shares.image_width <= shares.text_width
        if texts_stay:
            images, image_mask = shares.gather_images(images, image_mask)
        else:
            texts, text_mask = shares.gather_texts(texts, text_mask)
        i2t, t2i = self._all_pairs(images, texts, image_mask, text_mask)

        def put_together(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            stacked = torch.stack([x.t(), y] if texts_stay else [x, y.t()], dim=1)  # [own, 2, N]
            x, y = shares.gather_results(stacked).unbind(1)  # [N, N] each
            return (x.t(), y) if texts_stay else (x, y.t())

        means = put_together(i2t.mean.detach(), t2i.mean.detach())  # only for the connection
        relevances = put_together(i2t.relevance, t2i.relevance)
        return tuple(_Direction(*both) for both in zip(means, relevances, strict=True))  # type: ignore[return-value]

    def _candidate_pairs(
        self,
        images: Tensor,
        texts: Tensor,
        image_mask: Tensor | None,
        text_mask: Tensor | None,
        index: tuple[Tensor, Tensor],
        shares: Shares | None,
    ) -> tuple[_Direction, _Direction]:
        """p and S of every row's candidates, (N, k) each; over several processes each does its own rows."""
        index_i2t, index_t2i = index
        all_images, all_texts = (images, image_mask), (texts, text_mask)
        if shares is not None:
            index_i2t, index_t2i = index_i2t[shares.own], index_t2i[shares.own]
            all_images, all_texts = shares.gather_images(*all_images), shares.gather_texts(*all_texts)

        def align(rows: Tensor, mask: Tensor | None, others: tuple, where: Tensor, mlp: nn.Module) -> _Direction:
            mean, top = align_candidates(
                rows, others[0], mask, others[1], where,
                topk=self.topk, mode=self.alignment, chunk_size=self.chunk_size,
            )  # fmt: skip
            relevance = _across(mlp, top, mean)
            if shares is None:
                return _Direction(mean, relevance)
            return _Direction(shares.gather_results(mean.detach()), shares.gather_results(relevance))

        return (
            align(images, image_mask, all_texts, index_i2t, self.mlp_i2t),
            align(texts, text_mask, all_images, index_t2i, self.mlp_t2i),
        )

    def _within(self, x: Tensor) -> Tensor:
        return distance_relevance(x, x, self.sigma, squared=self.squared_distance)


def nearest(similarity: Tensor, k: int) -> Tensor:
    """Per row of ``similarity`` (N, M), True at the ``k`` largest values and at all that tie with the k-th."""
    similarity = similarity.detach()
    threshold = similarity.topk(k, dim=1).values[:, -1:]  # [n, 1]
    return similarity >= threshold


def distance_relevance(x: Tensor, y: Tensor, sigma: float, *, squared: bool) -> Tensor:
    """``exp(−‖x_i − y_j‖ / sigma)``, or with the squared norm, for normalised x (N, D), y (M, D) -> (N, M).

    The gradient at distance 0 is 0.
    """
    if x.device.type == "cpu":
        distance = _distance_by_product(x, y)
    else:  # float64 may be slow there, or missing
        distance = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    return torch.exp(-(distance.square() if squared else distance) / sigma)  # [n, m]


def _distance_by_product(x: Tensor, y: Tensor) -> Tensor:
    """``‖x_i − y_j‖`` for normalised x (N, D), y (M, D) -> (N, M), by a matrix product in float64.

    In float32, ‖x‖² + ‖y‖² − 2xy of two equal rows rounds to a distance of 5e-4 instead of 0. In float64 its
    rounding error is below (1e-7)², the last bit of a float32 distance of 1: what is nearer counts as equal. Taking
    differences, as cdist does, is as exact and on a CPU five times slower.
    """
    a, b = x.double(), y.double()
    square = a.square().sum(dim=1, keepdim=True) + b.square().sum(dim=1) - 2 * cosine_matrix(a, b)
    equal = square < 1e-14
    return square.masked_fill(equal, 1).sqrt().masked_fill(equal, 0).to(x.dtype)


def _candidate_index(images: Tensor, texts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Per image the ``k`` texts, per text the ``k`` images of largest cosine: (N, k) each, no gradient."""
    cosine = cosine_matrix(images.detach(), texts.detach())
    return cosine.topk(k, dim=1).indices, cosine.t().topk(k, dim=1).indices


def _relevance_mlp(topk: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(topk, topk), nn.ReLU(), nn.Linear(topk, 1))


def _across(mlp: nn.Module, top: Tensor, mean: Tensor) -> Tensor:
    """MLP(q) + p: top (N, M, topk), mean (N, M) -> (N, M), in the dtype of ``mean``."""
    q = top.to(mlp[0].weight.dtype)  # p and q are float32 also when the module is half
    return mlp(q).squeeze(-1).to(mean.dtype) + mean


def _neighbors(n: int, ratio: float) -> int:
    return max(1, int(n * ratio))


def _normalize_wide(x: Tensor) -> Tensor:
    return l2_normalize(x.to(compute_dtype(x.dtype)))


def _row_kl(logits: Tensor, guide: Tensor) -> Tensor:
    return F.kl_div(guide.log_softmax(dim=1), logits.log_softmax(dim=1), reduction="batchmean", log_target=True)
