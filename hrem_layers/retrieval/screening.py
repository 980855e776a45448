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
    """Counts the items ahead of every query's best match, block by block.

    Rows and columns of the blocks are queries in the order of their best similarity, so that those that have few
    items ahead, mostly, are together: of their blocks hardly more than the largest values need to be looked at.
    """

    def __init__(self, similarity: Cosines, image_best: Tensor, text_best: Tensor, ties: str, chunk_size: int) -> None:
        self.similarity, self.ties = similarity, ties
        self.parts = _parts(similarity.images.shape[1])
        error = error_bound(similarity.images.shape[1])
        # A bar is at most one and a half float32 steps above best + error, and a step below 2^53 is 2^29.
        self.reach = _round_up(torch.tensor(2 * error + 2.0**30, dtype=torch.float64, device="cpu"))
        self.images = _Queries.of(image_best, error, self.reach)
        self.texts = _Queries.of(text_best, error, self.reach)
        size = min(chunk_size, len(image_best)) * min(chunk_size, len(text_best))
        self.buffers = [torch.empty(size, dtype=torch.float32, device=similarity.device) for _ in range(2)]
        self.factor: tuple[slice, Tensor] | None = None

    def count(self, rows: slice, columns: slice) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Which images and texts these rows and columns are, each with its count as by :func:`count_ahead`."""
        images, texts = self.images.at(rows), self.texts.at(columns)
        product, other = self._product(images, texts, columns)
        seen = _count_by_largest(product, images, texts, self.reach) or _count_all(
            product, images, texts, self.reach, other
        )
        (by_image, image_near), (by_text, text_near) = seen
        near = len(image_near.rows) + len(text_near.rows)
        if near * _PAIR_COST > product.numel():
            block = self.similarity.block(images.items, texts.items)
            by_image, by_text = count_ahead(block, images.best, texts.best, self.ties)
        else:
            by_image = by_image + self._look_again(image_near, images, texts, images.best, 0)
            by_text = by_text + self._look_again(text_near, images, texts, texts.best, 1)
        return (images.items, by_image), (texts.items, by_text)

    def _product(self, images: _Queries, texts: _Queries, columns: slice) -> tuple[Tensor, Tensor]:
        """The block in float32, and a tensor like it to compute in."""
        if self.factor is None or self.factor[0] != columns:  # the same for a whole column of blocks
            self.factor = columns, self.similarity.texts.index_select(0, texts.items).float()
        left, right = self.similarity.images.index_select(0, images.items).float(), self.factor[1]
        shape = len(left), len(right)
        product, other = (buffer[: math.prod(shape)].view(shape) for buffer in self.buffers)
        with autocast_off(left.device):
            for part in self.parts:
                target = product if part.start == 0 else other
                torch.mm(left[:, part], right[:, part].T, out=target)
                if target is other:
                    product += other
        return product, other

    def _look_again(self, near: Near, images: _Queries, texts: _Queries, best: Tensor, side: int) -> Tensor:
        """How many of the pairs ``near`` are ahead, for each query of the side: (rows,) or (columns,)."""
        count = torch.zeros_like(best, dtype=torch.int64)
        if len(near.rows):
            exact = self.similarity.pairs(images.items[near.rows], texts.items[near.columns])
            ahead = exact >= best[near[side]] if self.ties == "pessimistic" else exact > best[near[side]]
            count.index_add_(0, near[side], ahead.long())
        return count


class _Queries(NamedTuple):
    """One side, from the lowest best similarity to the highest."""

    items: Tensor  # which image or text
    best: Tensor  # float64, exact
    bar: Tensor  # float32: as similar as this or more is ahead for certain
    low: Tensor  # float32: less than this is not

    @classmethod
    def of(cls, best: Tensor, error: float, reach: Tensor) -> _Queries:
        best, items = best.sort()
        # a query without a match has the best similarity -inf: nothing needs to be counted for it
        bar = _round_up(best + error).masked_fill_(best == -torch.inf, torch.inf)
        return cls(items, best, bar, -_round_up(-(bar.double() - reach)))

    def at(self, part: slice) -> _Queries:
        return _Queries(*(each[part] for each in self))


class Near(NamedTuple):
    """Pairs of a block whose float32 product is too near to the best match's similarity to tell."""

    rows: Tensor
    columns: Tensor


class _Seen(NamedTuple):
    """What float32 says of a block."""

    by_image: tuple[Tensor, Near]  # (rows,) int64, ahead for certain; pairs that may be
    by_text: tuple[Tensor, Near]  # (columns,)


def _count_by_largest(product: Tensor, images: _Queries, texts: _Queries, reach: Tensor) -> _Seen | None:
    """From those groups of rows in a column whose largest value is not too low; None if these are many."""
    largest = torch.cat([groups.amax(dim=1) for _, groups in _groups(product)])
    low = torch.cat([groups.amin(dim=1) for _, groups in _groups(images.low[:, None])])
    group, column = (largest >= torch.minimum(low, texts.low)).nonzero().unbind(dim=1)
    if len(group) * _GROUP * 8 > product.numel():
        return None
    row = group[:, None] * _GROUP + torch.arange(_GROUP, device=group.device)
    real = row < len(product)
    row = row.clamp_(max=len(product) - 1)
    values = product[row, column[:, None]].masked_fill_(~real, -torch.inf)
    sides = []
    for side, queries in enumerate((images, texts)):
        query = row if side == 0 else column[:, None].expand_as(row)
        gap = values - queries.bar[query]
        count = torch.zeros_like(queries.items).index_add_(0, query.flatten(), (gap >= 0).long().flatten())
        which, inner = ((gap < 0) & (gap >= -reach)).nonzero().unbind(dim=1)
        sides.append((count, Near(row[which, inner], column[which])))
    return _Seen(*sides)


def _count_all(product: Tensor, images: _Queries, texts: _Queries, reach: Tensor, gap: Tensor) -> _Seen:
    """Overwrites ``gap``."""
    sides = []
    for dim, bar in ((1, images.bar[:, None]), (0, texts.bar)):
        torch.sub(product, bar, out=gap)  # its sign is right: the rounded difference of unequal floats is not 0
        near = _find_near(gap.view(torch.int32), _SIGN + int(reach.view(torch.int32)))
        sides.append((torch.ge(gap, 0, out=gap).sum(dim=dim).long(), near))
    return _Seen(*sides)


def _find_near(gap: Tensor, most: int) -> Near:
    """Where ``gap``, float32 seen as int32, is below zero, but not too far: at most ``most``.

    Of negative floats, the bits seen as a whole number grow as they go away from zero; those of positive ones are
    positive. So the least of a group says whether there is such a pair in it, in one pass without a mask.
    """
    found = []
    for start, groups in _groups(gap):
        group, column = (groups.amin(dim=1) <= most).nonzero().unbind(dim=1)
        which, row = (groups[group, :, column] <= most).nonzero().unbind(dim=1)
        found.append(Near(start + group[which] * _GROUP + row, column[which]))
    return Near(*(torch.cat(indices) for indices in zip(*found, strict=True)))


def _groups(block: Tensor) -> list[tuple[int, Tensor]]:
    """(first row, (groups, rows, columns)): groups of equally many rows, and the rest as a lower group of its own."""
    whole = len(block) - len(block) % _GROUP
    parts = ((0, block[:whole].view(-1, _GROUP, block.shape[1])), (whole, block[whole:].unsqueeze(0)))
    return [(start, groups) for start, groups in parts if groups.numel()]


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


def error_bound(width: int) -> float:
    """A number above the largest error of a product of rows of ``width`` whole numbers; see the head of this file."""
    parts = _parts(width)
    roundings = float(max(part.stop - part.start for part in parts) + len(parts) + 1) * _UNIT
    norm = FIXED_POINT_ONE + math.sqrt(width) / 2 + 1  # rounding to whole numbers adds at most half of √width
    return roundings / (1 - roundings) * norm * norm * 1.000001 + 1


def _parts(width: int) -> list[slice]:
    count = -(-width // _WIDEST_PART)
    bounds = [width * i // count for i in range(count + 1)]
    return [slice(low, high) for low, high in itertools.pairwise(bounds)]


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
