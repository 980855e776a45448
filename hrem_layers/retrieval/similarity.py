"""Similarities by which items are compared: cosines, computed exactly, or those that the caller has.

A position hangs on whether two similarities are equal, and a floating-point matmul rounds one and the same dot
product differently in blocks of different shapes. So the normalised embeddings are rounded to fixed point, 26 bits
after the point, before they are multiplied in float64. Every product and every partial sum is then a whole number
below 2^53 (a partial sum is bounded by the product of the norms, Cauchy-Schwarz), which float64 holds exactly:
nothing is rounded and the order of summation cannot matter. Equal embeddings tie exactly, and chunk size, number of
threads, device, TF32 and autocast change no figure. The price is a resolution of about 1e-8 in the cosine, which is
finer than what a float32 matmul has.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hrem_layers._core.checks import describe

FIXED_POINT_ONE = 2**26
# Rows, and their elements, that are worked on at a time at the most: with fewer, what takes the time is the number of
# calls; with more, their float64 copies leave a core's own cache.
_ROWS, _PART = 256, 2**18
# Squares of float64 numbers beyond these over- or underflow; a power of two scales without rounding.
_LARGE, _SMALL, _SCALE = 2.0**500, 2.0**-400, 2.0**600

Rows = slice | Tensor


class Cosines(NamedTuple):
    """Cosines in units of 2^-52, whole numbers in float64, computed block by block or pair by pair."""

    images: Tensor  # (n, D) int32, fixed point
    texts: Tensor  # (m, D)

    @classmethod
    def of(cls, image_embedding: Tensor, text_embedding: Tensor) -> Cosines:
        return cls(fixed_point("image_embedding", image_embedding), fixed_point("text_embedding", text_embedding))

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64

    @property
    def device(self) -> torch.device:
        return self.images.device

    def block(self, rows: Rows, columns: Rows) -> Tensor:
        """(rows, columns): every one of these images with every one of these texts."""
        return self.images[rows].double() @ self.texts[columns].double().T

    def pairs(self, rows: Tensor, columns: Tensor) -> Tensor:
        """(p,): image ``rows[i]`` with text ``columns[i]``."""
        at_once = _rows_at_once(self.images.shape[1])
        return torch.cat([
            self.images.index_select(0, i).double().mul_(self.texts.index_select(0, j)).sum(dim=1)
            for i, j in zip(torch.split(rows, at_once), torch.split(columns, at_once), strict=True)
        ])  # fmt: skip

    def select(self, rows: Tensor, columns: Tensor) -> Cosines:
        return Cosines(self.images[rows], self.texts[columns])


class Given(NamedTuple):
    """Similarities that are there already; half types are compared in float32, which holds them exactly."""

    similarity: Tensor  # (n, m)

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.similarity.dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        return self.similarity.device

    def block(self, rows: Rows, columns: Rows) -> Tensor:
        if isinstance(rows, Tensor):
            rows = rows[:, None]
        return self.similarity[rows, columns].to(self.dtype)

    def pairs(self, rows: Tensor, columns: Tensor) -> Tensor:
        return self.similarity[rows, columns].to(self.dtype)

    def select(self, rows: Tensor, columns: Tensor) -> Given:
        return Given(self.similarity[rows[:, None], columns])


def exact_device(embedding: Tensor) -> torch.device:
    """Where the cosines are computed: not on Apple's GPUs, which have no float64."""
    return torch.device("cpu") if embedding.device.type == "mps" else embedding.device


def fixed_point(name: str, embedding: Tensor) -> Tensor:
    """(n, D) to int32: the L2-normalised rows in units of 2^-26; zeros stay zeros."""
    count, width = embedding.shape
    fixed = torch.empty(embedding.shape, dtype=torch.int32, device=exact_device(embedding))
    finite = torch.empty(count, dtype=torch.bool, device=fixed.device)
    at_once = min(count, _rows_at_once(width))
    # room for all parts: memory that was never touched costs more than what is written into it
    wide, squares = (torch.empty(at_once, width, dtype=torch.float64, device=fixed.device) for _ in range(2))
    for start in range(0, count, at_once):
        given = embedding[start : start + at_once].detach().to(fixed.device)
        part = wide[: len(given)].copy_(_scaled(given) if given.dtype == torch.float64 else given)
        norm = ordered_sum(torch.square(part, out=squares[: len(given)])).sqrt_()
        # without under- or overflow, a sum of squares is finite if and only if every element is
        finite[start : start + at_once] = norm[:, 0].isfinite()
        unit = torch.where(norm > 0, norm, 1.0).div_(FIXED_POINT_ONE)
        fixed[start : start + at_once] = part.div_(unit).round_()
    if not finite.all():
        bad = (~finite).nonzero()[:, 0]
        raise ValueError(
            f"{name} must be finite, row {int(bad[0])} is not ({len(bad)} of {count} rows), got {describe(embedding)}"
        )
    return fixed


def _rows_at_once(width: int) -> int:
    return max(1, min(_ROWS, _PART // width))


def _scaled(part: Tensor) -> Tensor:
    """float64 rows times a power of two of their own, so that their squares neither over- nor underflow."""
    peak = part.abs().amax(dim=1, keepdim=True)
    scale = torch.ones_like(peak).masked_fill_(peak > _LARGE, 1 / _SCALE).masked_fill_(peak < _SMALL, _SCALE)
    return part * scale


def ordered_sum(values: Tensor) -> Tensor:
    """(n, D) to (n, 1): the sum of each row, in an order that depends on nothing but D; ``values`` is overwritten."""
    length = values.shape[1]
    while length > 1:
        half = length // 2
        values[:, :half].add_(values[:, half : 2 * half])  # += would copy the result onto itself
        if length % 2:
            values[:, half] = values[:, length - 1]
        length = half + length % 2
    return values[:, :1]
