r"""What is computed from the similarities of one block of image-text pairs, and its derivative.

A block holds ``x`` (t, w, i, r): the product of every word of t texts with every region of i images.
Words lead because a CPU then reduces over them in long vectorised rows, and because the words of one
text are adjacent rows of the matrix product, so that texts of one length form a block without padding.

With :math:`s = \mathrm{LeakyReLU}_{0.1}(x)` ("scan") or :math:`s = x` ("cosine", "dot"):

.. math::
    a_{wr} = s_{wr} / \lVert s_{\cdot r} \rVert,\quad  f_w = \max_r a_{wr},\quad
    b_{wr} = s_{wr} / \lVert s_{w \cdot} \rVert,\quad  g_r = \max_w b_{wr}

("cosine" and "dot": a = b = s). The mean and the largest values of f over the real words are p and q of
text→image, those of g over the real regions are p and q of image→text.

Both are one formula along different dimensions, a :class:`Direction`. The functions up to ``similarity_grad`` take
one; :mod:`~hrem_layers.alignment.candidates` uses them for blocks with a direction of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hrem_layers.alignment.pooling import pool, pool_backward
from hrem_layers.alignment.scores import PairGrads, PairScores

LEAKY_SLOPE = 0.1
_AT_ONE_TIME = 32


class Direction(NamedTuple):
    """Which dimension of a block holds the fragments that receive, and which those that give."""

    receive: int
    give: int


T2I, I2T = Direction(receive=1, give=3), Direction(receive=3, give=1)


class Maxima(NamedTuple):
    """What is left of the similarities: a value per word and one per region of every pair."""

    per_word: Tensor  # [t, w, i], f
    per_region: Tensor  # [t, i, r], g

    @classmethod
    def empty(cls, like: Tensor, t: int, w: int, i: int, r: int, *, by_place: bool) -> Maxima:
        """Room for them, laid out as a block with regions outside of images (``by_place``) or inside."""
        per_region = like.new_empty(t, r, i).transpose(1, 2) if by_place else like.new_empty(t, i, r)
        return cls(like.new_empty(t, w, i), per_region)

    def window(self, texts: slice, words: int, images: slice, regions: int) -> Maxima:
        return Maxima(self.per_word[texts, :words, images], self.per_region[texts, images, :regions])


class Part(NamedTuple):
    """One direction's share of the derivative."""

    grad: Tensor  # of a (b), the shape of the block; overwritten
    best: Tensor  # f (g)
    inverse_norm: Tensor | None
    direction: Direction


def activate_(x: Tensor, mode: str) -> Tensor:
    """x -> s, in place."""
    return F.leaky_relu_(x, LEAKY_SLOPE) if mode == "scan" else x


def inverse_norms(s: Tensor, mode: str, *directions: Direction) -> list[Tensor | None]:
    """Per direction 1 / ‖s‖ over the fragments that receive, that dimension kept; None where nothing is divided.

    Below the rounding error of a cosine the direction of s is noise: there 0.
    """
    if mode != "scan":
        return [None] * len(directions)
    square, smallest = s * s, torch.finfo(s.dtype).eps ** 2
    sums = (square.sum(dim=direction.receive, keepdim=True) for direction in directions)
    return [torch.threshold_(x, smallest, torch.inf).rsqrt_() for x in sums]


def maxima(
    s: Tensor, inverse: Tensor | None, real: Tensor | None, direction: Direction, out: Tensor | None = None
) -> Tensor:
    """The largest of s / ‖s‖ over the ``real`` fragments that give (broadcasts to s; None = all), 0 if none is."""
    scaled = _scaled(s, inverse, real)
    return _drop_empty_(_largest(scaled, direction.give, out), real, direction)


def maxima_and_winners(
    s: Tensor, inverse: Tensor | None, real: Tensor | None, direction: Direction, margin: float | Tensor
) -> tuple[Tensor, Tensor]:
    """The same, and 1 where a maximum is or what ties with it, else 0, in the shape and dtype of s.

    ``margin``: how far values that tie may be apart, a number or what broadcasts to the maxima.
    """
    scaled = _scaled(s, inverse, real)
    best = _largest(scaled, direction.give)
    winners = (scaled.clone() if scaled is s else scaled).ge_((best - margin).unsqueeze(direction.give))
    return _drop_empty_(best, real, direction), winners


def share_(winners: Tensor, grad: Tensor, direction: Direction) -> Tensor:
    """The gradient of the maxima, shared evenly among the winners, which are overwritten."""
    share = torch.sum(winners, direction.give, out=_without(winners, direction.give))
    return winners.mul_(torch.div(grad, share, out=share).unsqueeze(direction.give))


def similarity_grad(s: Tensor, parts: list[Part], mode: str, out: Tensor) -> Tensor:
    """Writes the derivative with respect to x, the sum over one or two ``parts``, to ``out``.

    d(s / ‖s‖) = (g − a <g, a>) / ‖s‖ along the normed dimension; g ≠ 0 only where a is the maximum.
    """
    first, *others = parts
    if mode != "scan":
        return torch.add(first.grad, others[0].grad, out=out) if others else out.copy_(first.grad)
    along = [
        (grad * best.unsqueeze(direction.give))
        .sum(dim=direction.receive, keepdim=True)
        .mul_(_present(inverse).square())
        for grad, best, inverse, direction in parts
    ]
    grad_s = first.grad.mul_(_present(first.inverse_norm))
    for other in others:
        grad_s.addcmul_(other.grad, _present(other.inverse_norm))
    for x in along:
        grad_s.addcmul_(s, x, value=-1)
    # s > 0 exactly where x > 0
    torch.ops.aten.leaky_relu_backward.grad_input(grad_s, s, LEAKY_SLOPE, True, grad_input=out)
    return out


def block_maxima(s: Tensor, text_mask: Tensor | None, image_mask: Tensor | None, out: Maxima, *, mode: str) -> None:
    """``s`` (t, w, i, r) with zeros at padded words and regions, masks (t, w) and (i, r); writes ``out``.

    What ``out`` gets at padded words and regions is undefined.
    """
    if mode != "scan" and text_mask is None and image_mask is None:  # of small blocks the steps below cost a third
        _largest(s, T2I.give, out.per_word)
        _largest(s, I2T.give, out.per_region)
        return
    inverse_words, inverse_regions = inverse_norms(s, mode, T2I, I2T)
    words, regions = _of_words(text_mask), _of_regions(image_mask)
    maxima(s, inverse_words, regions, T2I, out.per_word)
    maxima(s, inverse_regions, words, I2T, out.per_region)


def block_pool(
    best: Maxima, real_words: Tensor | None, real_regions: Tensor | None, out: PairScores, *, clean: bool
) -> None:
    """Means and largest values over the real words (t, w) and regions (i, r), None = all; writes ``out``.

    ``out`` must hold zeros; places of q for which there is no value are left alone. ``clean``: ``best`` is 0 where
    nothing is real.
    """
    real_words = None if real_words is None else real_words.unsqueeze(1)  # [t, 1, w]
    pool(best.per_word.transpose(1, 2), real_words, out.mean_t2i, out.top_t2i, clean=clean)
    pool(best.per_region, real_regions, out.mean_i2t, out.top_i2t, clean=clean)


def block_backward(
    s: Tensor,
    text_mask: Tensor | None,
    image_mask: Tensor | None,
    grad: PairGrads,
    out: Tensor,
    *,
    mode: str,
    margin: float | Tensor,
) -> None:
    """Writes to ``out`` the gradient with respect to a block's ``x`` (t, w, i, r), given s and that of the scores, of
    which there is one at least. A direction without one is not looked at.

    ``margin``: how far values of a pair that tie may be apart, a number or (t, i).
    """
    t2i, i2t = (grad.mean_t2i, grad.top_t2i), (grad.mean_i2t, grad.top_i2t)
    asked = [way for way, grads in ((T2I, t2i), (I2T, i2t)) if any(x is not None for x in grads)]
    inverse = dict(zip(asked, inverse_norms(s, mode, *asked), strict=True))
    margins = (margin, margin) if isinstance(margin, float) else (margin.unsqueeze(1), margin.unsqueeze(2))
    parts = []
    if T2I in asked:
        f, winners = maxima_and_winners(s, inverse[T2I], _of_regions(image_mask), T2I, margins[0])
        real_words = None if text_mask is None else text_mask.unsqueeze(1)  # [t, 1, w]
        grad_f = pool_backward(f.transpose(1, 2), real_words, *t2i, margin).transpose(1, 2)
        parts.append(Part(share_(winners, grad_f, T2I), f, inverse[T2I], T2I))
    if I2T in asked:
        g, winners = maxima_and_winners(s, inverse[I2T], _of_words(text_mask), I2T, margins[1])
        grad_g = pool_backward(g, image_mask, *i2t, margin)
        parts.append(Part(share_(winners, grad_g, I2T), g, inverse[I2T], I2T))
    similarity_grad(s, parts, mode, out)


def _largest(x: Tensor, dim: int, out: Tensor | None = None) -> Tensor:
    """``amax``. On a CPU it takes 32 numbers of a row at one time and what is left over one by one, which for 49 takes
    twice as long as the last 32 once more."""
    n = x.shape[dim]
    left = n % _AT_ONE_TIME
    plain = x.device.type != "cpu" or torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled())
    if plain:
        return x.amax(dim) if out is None else torch.amax(x, dim, out=out)
    if x.stride(dim) != 1 or n < _AT_ONE_TIME or left <= _AT_ONE_TIME // 4:
        return torch.amax(x, dim, out=_without(x, dim) if out is None else out)
    first, last = x.narrow(dim, 0, n - left).amax(dim), x.narrow(dim, n - _AT_ONE_TIME, _AT_ONE_TIME).amax(dim)
    return torch.maximum(first, last, out=first if out is None else out)


def _without(x: Tensor, dim: int) -> Tensor:
    """Room for x without ``dim``, laid out as x is: operations on both then run along the memory of both."""
    return torch.empty_like(x.select(dim, 0))


def _scaled(s: Tensor, inverse: Tensor | None, real: Tensor | None) -> Tensor:
    """s / ‖s‖ with −inf where nothing is real; s itself where neither changes it."""
    scaled = s if inverse is None else s * inverse
    return scaled if real is None else scaled.masked_fill(~real, -torch.inf)


def _drop_empty_(best: Tensor, real: Tensor | None, direction: Direction) -> Tensor:
    """0, in place, where there was nothing real to take the maximum of."""
    return best if real is None else best.masked_fill_(~real.any(dim=direction.give), 0)


def _of_words(text_mask: Tensor | None) -> Tensor | None:
    return None if text_mask is None else text_mask[:, :, None, None]


def _of_regions(image_mask: Tensor | None) -> Tensor | None:
    return None if image_mask is None else image_mask[None, None]


def _present(inverse: Tensor | None) -> Tensor:
    assert inverse is not None  # mode "scan" divides in every direction
    return inverse
