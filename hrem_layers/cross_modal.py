"""From fragments to p and S across the modalities (paper, section 3.3): aligned, and weighed by one MLP per direction.

Of all pairs, or of each row's candidates. Over several processes each aligns its share, and asks an ``exchange`` for
what is the others'.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hrem_layers._core.checks import check_choice, check_tensor, said
from hrem_layers._core.exchange import Exchange
from hrem_layers._core.numerics import module_dtype
from hrem_layers.alignment import MODES, Scores, align_fragments
from hrem_layers.alignment.candidates import align_candidates
from hrem_layers.alignment.parts import Part, align_in_parts

Alignment = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, int], Scores]
"""``(image_fragments, text_fragments, image_mask, text_mask, topk) -> Scores``."""


class Fragments(NamedTuple):
    """This process's own."""

    images: Tensor  # [n, r, f]
    texts: Tensor  # [m, w, f]
    image_mask: Tensor | None
    text_mask: Tensor | None


class Direction(NamedTuple):
    """Across the modalities, rows receive: p and S of all pairs (N, M), or of the candidates (N, k)."""

    mean: Tensor  # without gradient: edges are chosen by it
    relevance: Tensor


class Weigher(NamedTuple):
    """How a pair's fragments become p and S."""

    alignment: str | Alignment
    topk: int
    chunk_size: int | None
    mlp_i2t: nn.Module
    mlp_t2i: nn.Module

    def scale(self) -> float | None:
        """The magnitude of p of which an ulp is meant where values tie; None = the largest of the row. (No
        property: the compiler of PyTorch 2.5 cannot trace one here.)"""
        return 1.0 if self.alignment in ("cosine", "scan") else None

    def all_pairs(self, fragments: Fragments, exchange: Exchange) -> tuple[Direction, Direction]:
        """p and S of all pairs. Each process aligns its own texts with all images (or its images with all texts,
        if those are the cheaper ones to send), and p and S are put together; q stays where it was made."""
        images, texts, image_mask, text_mask = fragments
        if exchange.travels == "image":
            images, image_mask = exchange.gather_fragments("image", images, image_mask)
        else:
            texts, text_mask = exchange.gather_fragments("text", texts, text_mask)
        aligned = self._align(images, texts, image_mask, text_mask)
        means = exchange.gather_pairs(aligned.mean_i2t.detach(), aligned.mean_t2i.detach())
        relevances = exchange.gather_pairs(
            _relevance(self.mlp_i2t, aligned.top_i2t, aligned.mean_i2t),
            _relevance(self.mlp_t2i, aligned.top_t2i, aligned.mean_t2i),
        )
        return Direction(means[0], relevances[0]), Direction(means[1], relevances[1])

    def candidates(
        self, fragments: Fragments, i2t: Tensor, t2i: Tensor, exchange: Exchange
    ) -> tuple[Direction, Direction]:
        """p and S of the candidates of this process's rows, (n, k) and (m, k), which ``i2t`` and ``t2i`` name."""
        images, texts, image_mask, text_mask = fragments
        mode = check_choice("alignment", self.alignment, MODES)
        # backward would need all of them again
        at_once = torch.is_grad_enabled() and (images.requires_grad or texts.requires_grad)

        def align(side: str, rows: Tensor, mask: Tensor | None, index: Tensor, mlp: nn.Module) -> Direction:
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
            return Direction(mean.detach(), _relevance(mlp, top, mean))

        return (
            align("image", images, image_mask, i2t, self.mlp_i2t),
            align("text", texts, text_mask, t2i, self.mlp_t2i),
        )

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


def relevance_mlp(topk: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(topk, topk), nn.ReLU(), nn.Linear(topk, 1))


def _relevance(mlp: nn.Module, top: Tensor, mean: Tensor) -> Tensor:
    """MLP(q) + p: top (N, M, topk), mean (N, M) -> (N, M), in the dtype of ``mean``."""
    q = top.to(module_dtype(mlp))  # p and q are float32 also when the module is half
    learned: Tensor = mlp(q)
    return learned.squeeze(-1).to(mean.dtype) + mean
