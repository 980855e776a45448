"""How many items are ahead of each query's best match, exactly, and without an (n, m) matrix.

A query's rank is 1 + the number of items ahead of its best match: those that do not match the query and
score higher than that match or, with pessimistic ties, as high. Ranks thus hang on whether two
similarities are equal, and a floating-point matmul rounds one and the same dot product differently in
blocks of different shapes. So the normalised embeddings are rounded to fixed point, 26 bits after the
point, before they are multiplied in float64. Every product and every partial sum is then a whole number
below 2^53 (a partial sum is bounded by the product of the norms, Cauchy-Schwarz), which float64 holds
exactly: nothing is rounded and the order of summation cannot matter. Equal embeddings tie exactly, and
chunk size, number of threads, device, TF32 and autocast change no figure. The price is a resolution of
about 1e-8 in the cosine, which is finer than what a float32 matmul has.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hrem_layers._core.checks import describe

_FIXED_POINT_ONE = 2**26
# Rows of the blocks in which the matching pairs are looked for. Such a block is as wide as the texts of
# all its images together, so the lower it is, the fewer pairs that do not match are computed with them.
_MATCHING_ROWS = 256

_Rows = slice | Tensor


class Cosines(NamedTuple):
    """Similarities that are computed block by block; exact, see the head of this file."""

    images: Tensor  # (n, D) int32, fixed point
    texts: Tensor  # (m, D)

    @classmethod
    def of(cls, image_embedding: Tensor, text_embedding: Tensor) -> Cosines:
        return cls(fixed_point("image_embedding", image_embedding), fixed_point("text_embedding", text_embedding))

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64

    def block(self, rows: _Rows, columns: _Rows) -> Tensor:
        # In units of 2^-52: only their order matters.
        return self.images[rows].double() @ self.texts[columns].double().T

    def select(self, rows: Tensor, columns: Tensor) -> Cosines:
        return Cosines(self.images[rows], self.texts[columns])


class Given(NamedTuple):
    """Similarities that are there already."""

    similarity: Tensor  # (n, m)

    @property
    def dtype(self) -> torch.dtype:
        return self.similarity.dtype

    def block(self, rows: _Rows, columns: _Rows) -> Tensor:
        if isinstance(rows, Tensor):
            rows = rows[:, None]
        return self.similarity[rows, columns]

    def select(self, rows: Tensor, columns: Tensor) -> Given:
        return Given(self.block(rows, columns))


def exact_device(embedding: Tensor) -> torch.device:
    """Where the cosines are computed: not on Apple's GPUs, which have no float64."""
    return torch.device("cpu") if embedding.device.type == "mps" else embedding.device


def fixed_point(name: str, embedding: Tensor) -> Tensor:
    """(n, D) to int32: the L2-normalised rows in units of 2^-26."""
    fixed = torch.empty(embedding.shape, dtype=torch.int32, device=exact_device(embedding))
    rows = max(1, 2**20 // embedding.shape[1])
    for start in range(0, embedding.shape[0], rows):
        part = embedding[start : start + rows].to(fixed.device).double()
        peak = part.abs().amax(dim=1, keepdim=True)
        finite = peak.isfinite()
        if not finite.all():
            row = start + int((~finite[:, 0]).nonzero()[0])
            raise ValueError(f"{name} must be finite, row {row} is not, got {describe(embedding)}")
        # Dividing by the largest element first keeps squares from over- and underflow.
        part = part / torch.where(peak > 0, peak, 1.0)
        norm = ordered_sum(part.square()).sqrt()
        part = part / torch.where(norm > 0, norm, 1.0)
        fixed[start : start + rows] = (part * _FIXED_POINT_ONE).round()
    return fixed


def ordered_sum(values: Tensor) -> Tensor:
    """Sum over the last dimension, kept, in an order that depends on nothing but its length."""
    while (length := values.shape[-1]) > 1:
        half = length // 2
        left, right, odd = values.split([half, half, length % 2], dim=-1)
        values = torch.cat([left + right, odd], dim=-1)
    return values


def items_ahead(
    similarity: Cosines | Given, image_ids: Tensor, text_ids: Tensor, ties: str, chunk_size: int | None
) -> tuple[Tensor, Tensor]:
    """(n,) and (m,) int64: how many items are ahead of each image's, each text's best match.

    Meaningless for a query that has no match.
    """
    if chunk_size is None:
        chunk_size = 1024 if image_ids.device.type == "cpu" else 8192
    image_best, text_best = _best_matches(similarity, image_ids, text_ids, chunk_size)
    ahead_of = torch.ge if ties == "pessimistic" else torch.gt
    image_ahead = torch.zeros_like(image_ids)
    text_ahead = torch.zeros_like(text_ids)
    for rows in _slices(len(image_ids), chunk_size):
        for columns in _slices(len(text_ids), chunk_size):
            block = similarity.block(rows, columns)
            # int32: several times faster on a CPU than torch's own choice; a block is far from its limit
            image_ahead[rows] += ahead_of(block, image_best[rows, None]).sum(dim=1, dtype=torch.int32)
            text_ahead[columns] += ahead_of(block, text_best[columns]).sum(dim=0, dtype=torch.int32)
    if ties == "pessimistic":
        # A match cannot exceed the best match, but it equals it: those were counted as well.
        for rows, columns, block, match in _matching_blocks(similarity, image_ids, text_ids, chunk_size):
            image_ahead[rows] -= ((block >= image_best[rows, None]) & match).sum(dim=1)
            text_ahead[columns] -= ((block >= text_best[columns]) & match).sum(dim=0)
    return image_ahead, text_ahead


def _best_matches(
    similarity: Cosines | Given, image_ids: Tensor, text_ids: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """(n,) and (m,): the largest similarity of each image, each text with any that matches it."""
    image_best = torch.full_like(image_ids, -torch.inf, dtype=similarity.dtype)
    text_best = torch.full_like(text_ids, -torch.inf, dtype=similarity.dtype)
    for rows, columns, block, match in _matching_blocks(similarity, image_ids, text_ids, chunk_size):
        block = block.masked_fill(~match, -torch.inf)
        image_best[rows] = torch.maximum(image_best[rows], block.amax(dim=1))
        text_best[columns] = torch.maximum(text_best[columns], block.amax(dim=0))
    return image_best, text_best


def _matching_blocks(
    similarity: Cosines | Given, image_ids: Tensor, text_ids: Tensor, chunk_size: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Blocks that hold all matching pairs: (rows, columns, similarity, whether the pair matches).

    With images and texts sorted by id, the matches of a run of images are a run of texts. So this is a
    narrow band of the matrix when each id has few texts, and never more than all of it.
    """
    image_order, text_order = image_ids.argsort(), text_ids.argsort()
    runs = image_order.split(min(chunk_size, _MATCHING_ROWS))
    sorted_texts = text_ids[text_order]
    starts = torch.searchsorted(sorted_texts, image_ids[torch.stack([run[0] for run in runs])])
    ends = torch.searchsorted(sorted_texts, image_ids[torch.stack([run[-1] for run in runs])], right=True)
    for rows, start, end in zip(runs, starts.tolist(), ends.tolist(), strict=True):
        for columns in text_order[start:end].split(chunk_size) if end > start else ():
            match = image_ids[rows, None] == text_ids[columns]
            yield rows, columns, similarity.block(rows, columns), match


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))
