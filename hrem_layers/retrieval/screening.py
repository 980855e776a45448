"""Which items are ahead: by a float32 product where that can tell, exactly where it cannot.

A float64 product takes twice the time of a float32 one, and is needed only where two similarities are too close for
float32. How close that is follows from the standard bound. Let X, Y be rows of fixed point (whole numbers) with
norms of at most ν, u = 2^-24, γ_k = k·u / (1 - k·u). Their elements are rounded to float32, which changes each by a
factor of 1 ± u at most; a dot product of L of them is off by at most γ_L · Σ|x||y| **in whatever order and with
whatever fused operations it is summed**; s such parts of the width are added up. All in all

    |float32 dot - X·Y| <= γ_(L + s + 1) · Σ|X||Y| <= γ_(L + s + 1) · ν²

by Cauchy-Schwarz. With the best match's exact similarity b and any ε above that bound, an item at b + ε or more is
ahead and one below b - ε is not; those in between, about one pair in a thousand, are multiplied again, exactly. The
bound grows with L, so wide embeddings are multiplied in parts of a few hundred dimensions.

The bound supposes IEEE float32. Accelerators, which may use TF32, and CPUs that are told to multiply float32 in
bfloat16 take the float64 product for all pairs instead.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from hrem_layers._core.numerics import autocast_off
from hrem_layers.retrieval.similarity import FIXED_POINT_ONE, Cosines

_UNIT: float = 2.0**-24  # the largest relative error of rounding to float32
_WIDEST_PART = 512
# Rows that are looked through together for pairs that float32 cannot tell.
_GROUP = 16
# An exact look at single pairs costs as much per pair as an exact product of the block costs for this many.
_PAIR_COST = 64
_SIGN = -(2**31)


class Screen:
    """Counts the items ahead of every query's best match, block by block."""

    def __init__(self, similarity: Cosines, image_best: Tensor, text_best: Tensor, ties: str, chunk_size: int) -> None:
        self.similarity = similarity
        self.image_best, self.text_best, self.ties = image_best, text_best, ties
        self.parts = _parts(similarity.images.shape[1])
        error = error_bound(similarity.images.shape[1])
        self.image_bar, self.text_bar = _bar(image_best, error), _bar(text_best, error)
        # A bar is at most one and a half float32 steps above best + error, and a step below 2^53 is 2^29.
        reach = _round_up(torch.tensor(2 * error + 2.0**30, dtype=torch.float64, device="cpu"))
        self.reach = _SIGN + int(reach.view(torch.int32))
        rows, columns = (min(chunk_size, len(best)) for best in (image_best, text_best))
        self.buffers = [torch.empty(rows * columns, dtype=torch.float32, device=similarity.device) for _ in range(2)]
        self.columns: tuple[slice, Tensor] | None = None

    def count(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """(rows,) and (columns,) int64: as :func:`count_ahead` of the exact block."""
        product, gap = self._product(rows, columns)
        by_image, image_near = self._compare(product, self.image_bar[rows, None], gap, dim=1)
        by_text, text_near = self._compare(product, self.text_bar[columns], gap, dim=0)
        near = len(image_near.rows) + len(text_near.rows)
        if near * _PAIR_COST > product.numel():
            block = self.similarity.block(rows, columns)
            return count_ahead(block, self.image_best[rows], self.text_best[columns], self.ties)
        if near:
            exact = self.similarity.pairs(
                torch.cat([image_near.rows, text_near.rows]) + rows.start,
                torch.cat([image_near.columns, text_near.columns]) + columns.start,
            )
            for count, queries, best, values in (
                (by_image, image_near.rows, self.image_best[rows], exact[: len(image_near.rows)]),
                (by_text, text_near.columns, self.text_best[columns], exact[len(image_near.rows) :]),
            ):
                count.index_add_(0, queries, _ahead(values, best[queries], self.ties).to(count.dtype))
        return by_image, by_text

    def _product(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """The block in float32, and a tensor like it to compute in."""
        if self.columns is None or self.columns[0] != columns:  # the same for a whole column of blocks
            self.columns = columns, self.similarity.texts[columns].T.float().contiguous()
        images, texts = self.similarity.images[rows].float(), self.columns[1]
        shape = len(images), texts.shape[1]
        product, other = (buffer[: math.prod(shape)].view(shape) for buffer in self.buffers)
        with autocast_off(images.device):
            for part in self.parts:
                target = product if part.start == 0 else other
                torch.mm(images[:, part], texts[part], out=target)
                if target is other:
                    product += other
        return product, other

    def _compare(self, product: Tensor, bar: Tensor, gap: Tensor, dim: int) -> tuple[Tensor, Near]:
        """How many of the block are ahead for certain, along ``dim``, and the pairs that may be; overwrites ``gap``."""
        torch.sub(
            product, bar, out=gap
        )  # its sign is right: a rounded difference of floats is 0 only if they are equal
        near = _find_near(gap.view(torch.int32), self.reach)
        return torch.ge(gap, 0, out=gap).sum(dim=dim).long(), near


class Near(NamedTuple):
    """Pairs of a block whose float32 product is too near to the best match's similarity to tell."""

    rows: Tensor
    columns: Tensor


def _find_near(gap: Tensor, reach: int) -> Near:
    """Where ``gap``, float32 seen as int32, is below zero but by no more than ``reach``.

    Of negative floats, the bits seen as a whole number grow as they go away from zero; those of positive ones are
    positive. So the least of a group says whether there is such a pair in it, in one pass without a mask.
    """
    whole = len(gap) - len(gap) % _GROUP
    found = []
    for start, groups in ((0, gap[:whole].view(-1, _GROUP, gap.shape[1])), (whole, gap[whole:].unsqueeze(0))):
        if groups.numel():
            group, column = (groups.amin(dim=1) <= reach).nonzero().unbind(dim=1)
            which, row = (groups[group, :, column] <= reach).nonzero().unbind(dim=1)
            found.append(Near(start + group[which] * _GROUP + row, column[which]))
    return Near(*(torch.cat(indices) for indices in zip(*found, strict=True)))


def count_ahead(block: Tensor, image_best: Tensor, text_best: Tensor, ties: str) -> tuple[Tensor, Tensor]:
    """(rows,) and (columns,) int64: how many of a block of similarities are ahead of each query's best match.

    Matches are counted like all others: with pessimistic ties those that are as good as the best one are included.
    """
    ahead_of = torch.ge if ties == "pessimistic" else torch.gt
    if block.device.type != "cpu":
        by_image = ahead_of(block, image_best[:, None]).sum(dim=1, dtype=torch.int32)
        return by_image.long(), ahead_of(block, text_best).sum(dim=0, dtype=torch.int32).long()
    ahead = torch.empty_like(block)  # ones and zeros as floats: several times faster on a CPU than as bools
    by_image = ahead_of(block, image_best[:, None], out=ahead).sum(dim=1).long()
    return by_image, ahead_of(block, text_best, out=ahead).sum(dim=0).long()


def _ahead(values: Tensor, best: Tensor, ties: str) -> Tensor:
    return values >= best if ties == "pessimistic" else values > best


def error_bound(width: int) -> float:
    """A number above the largest error of a product of rows of ``width`` whole numbers; see the head of this file."""
    parts = _parts(width)
    roundings = (max(part.stop - part.start for part in parts) + len(parts) + 1) * _UNIT
    norm = FIXED_POINT_ONE + math.sqrt(width) / 2 + 1  # rounding to whole numbers adds at most half of √width
    return roundings / (1 - roundings) * norm * norm * 1.000001 + 1


def _parts(width: int) -> list[slice]:
    count = -(-width // _WIDEST_PART)
    bounds = [width * i // count for i in range(count + 1)]
    return [slice(low, high) for low, high in itertools.pairwise(bounds)]


def _bar(best: Tensor, error: float) -> Tensor:
    """``best + error`` rounded up to float32; -inf, of a query without a match, becomes the lowest number."""
    return _round_up(best + error)


def _round_up(value: Tensor) -> Tensor:
    return torch.nextafter(value.float(), torch.full_like(value, torch.inf, dtype=torch.float32))


def float32_is_exact_enough(images: Tensor) -> bool:
    """Whether float32 products here are IEEE float32: on a CPU, and tried, as many settings could say otherwise.

    The factor has a bit in each part that a format of fewer bits, or a sum of two such, would drop.
    """
    if images.device.type != "cpu":
        return False
    factor = 1 + 2.0**-12 + 2.0**-23
    probe = torch.zeros(64, min(images.shape[1], _WIDEST_PART), dtype=torch.float32, device="cpu")
    probe[:, 0] = factor
    with autocast_off(probe.device):
        product = torch.mm(probe, probe.T.contiguous())
    return bool((product.double() - factor**2).abs().max() <= 2.0**-23)
