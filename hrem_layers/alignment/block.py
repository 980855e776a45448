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
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LEAKY_SLOPE = 0.1
MODES = ("scan", "cosine", "dot")


class Scores(NamedTuple):
    """The row is the side that receives: ``*_i2t`` lead with images, ``*_t2i`` with texts."""

    mean_i2t: Tensor  # [i, t]
    mean_t2i: Tensor  # [t, i]
    top_i2t: Tensor  # [i, t, k]
    top_t2i: Tensor  # [t, i, k]


class PairScores(NamedTuple):
    """The same four, all with texts in front, as the blocks of the product have them."""

    mean_i2t: Tensor  # [t, i]
    mean_t2i: Tensor  # [t, i]
    top_i2t: Tensor  # [t, i, k]
    top_t2i: Tensor  # [t, i, k]

    @classmethod
    def of(cls, scores: Scores) -> PairScores:
        return cls(scores.mean_i2t.t(), scores.mean_t2i, scores.top_i2t.transpose(0, 1), scores.top_t2i)

    def scores(self) -> Scores:
        return Scores(
            self.mean_i2t.t().contiguous(),
            self.mean_t2i.contiguous(),
            self.top_i2t.transpose(0, 1).contiguous(),
            self.top_t2i.contiguous(),
        )

    def window(self, texts: slice, images: slice) -> PairScores:
        return PairScores(*(x[texts, images] for x in self))


def activate_(x: Tensor, mode: str) -> Tensor:
    """x -> s, in place."""
    return F.leaky_relu_(x, LEAKY_SLOPE) if mode == "scan" else x


class Maxima(NamedTuple):
    """What is left of the similarities: a value per word and one per region of every pair."""

    per_word: Tensor  # [t, w, i], f
    per_region: Tensor  # [t, i, r], g

    @classmethod
    def empty(cls, like: Tensor, t: int, w: int, i: int, r: int) -> Maxima:
        return cls(like.new_empty(t, w, i), like.new_empty(t, i, r))

    def window(self, texts: slice, words: int, images: slice, regions: int) -> Maxima:
        return Maxima(self.per_word[texts, :words, images], self.per_region[texts, images, :regions])


def block_maxima(s: Tensor, text_mask: Tensor | None, image_mask: Tensor | None, out: Maxima, *, mode: str) -> None:
    """``s`` (t, w, i, r) with zeros at padded words and regions, masks (t, w) and (i, r); writes ``out``.

    What ``out`` gets at padded words and regions is undefined.
    """
    inverse_words, inverse_regions = _inverse_norms(s, mode)
    torch.amax(_fill(_scaled(s, inverse_words), image_mask, dim=3), dim=3, out=out.per_word)
    torch.amax(_fill(_scaled(s, inverse_regions), text_mask, dim=1), dim=1, out=out.per_region)
    _drop_empty_(out.per_word, image_mask)
    _drop_empty_(out.per_region, text_mask)


def pool(best: Maxima, real_words: Tensor | None, real_regions: Tensor | None, out: PairScores) -> None:
    """Means and largest values over the real words (t, w) and regions (i, r), None = all; writes ``out``.

    ``out`` must hold zeros; places of q for which there is no value are left alone.
    """
    _pool(best.per_word.transpose(1, 2), _expand_words(real_words), out.mean_t2i, out.top_t2i)
    _pool(best.per_region, real_regions, out.mean_i2t, out.top_i2t)


def block_backward(
    s: Tensor, text_mask: Tensor | None, image_mask: Tensor | None, grad: PairScores, out: Tensor, *, mode: str
) -> None:
    """Writes to ``out`` the gradient with respect to a block's ``x`` (t, w, i, r), given s and that of the scores.

    Regions (words) that share the maximum share its gradient evenly.
    """
    inverse_words, inverse_regions = _inverse_norms(s, mode)

    a = _fill(_scaled(s, inverse_words), image_mask, dim=3)
    per_word = a.amax(dim=3)  # [t, w, i]
    best = _equal(a, per_word.unsqueeze(3), s)  # [t, w, i, r] of 0 and 1
    _drop_empty_(per_word, image_mask)
    grad_word = _pool_backward(
        per_word.transpose(1, 2), _expand_words(text_mask), grad.mean_t2i, grad.top_t2i
    ).transpose(1, 2)  # [t, w, i]
    grad_a = best.mul_((grad_word / best.sum(dim=3)).unsqueeze(3))

    b = _fill(_scaled(s, inverse_regions), text_mask, dim=1)
    per_region = b.amax(dim=1)  # [t, i, r]
    best = _equal(b, per_region.unsqueeze(1), s)
    _drop_empty_(per_region, text_mask)
    grad_region = _pool_backward(per_region, image_mask, grad.mean_i2t, grad.top_i2t)  # [t, i, r]
    grad_b = best.mul_((grad_region / best.sum(dim=1)).unsqueeze(1))

    if inverse_words is None or inverse_regions is None:
        torch.add(grad_a, grad_b, out=out)
        return
    # d(s / ‖s‖) = (g − a <g, a>) / ‖s‖ along the normed dimension; g ≠ 0 only where a is the maximum
    along_words = (grad_a * per_word.unsqueeze(3)).sum(dim=1, keepdim=True).mul_(inverse_words.square())
    along_regions = (grad_b * per_region.unsqueeze(1)).sum(dim=3, keepdim=True).mul_(inverse_regions.square())
    grad_s = grad_a.mul_(inverse_words).addcmul_(grad_b, inverse_regions)
    grad_s.addcmul_(s, along_words, value=-1).addcmul_(s, along_regions, value=-1)
    # s > 0 exactly where x > 0
    torch.ops.aten.leaky_relu_backward.grad_input(grad_s, s, LEAKY_SLOPE, True, grad_input=out)


def _inverse_norms(s: Tensor, mode: str) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """The reciprocal norms over the words (t, 1, i, r) and over the regions (t, w, i, 1)."""
    if mode != "scan":
        return None, None
    square = s * s
    return _inverse_root(square.sum(dim=1, keepdim=True)), _inverse_root(square.sum(dim=3, keepdim=True))


def _inverse_root(square: Tensor) -> Tensor:
    """1 / √square, in place. Below the rounding error of a cosine the direction of s is noise: there 0."""
    return F.threshold_(square, torch.finfo(square.dtype).eps ** 2, torch.inf).rsqrt_()


def _scaled(s: Tensor, inverse: Tensor | None) -> Tensor:
    return s if inverse is None else s * inverse


def _equal(x: Tensor, maximum: Tensor, s: Tensor) -> Tensor:
    """1 where ``x`` is its maximum, else 0, in the dtype of ``x``, which may be overwritten unless it is ``s``."""
    return (x.clone() if x is s else x).eq_(maximum)


def _expand_words(text_mask: Tensor | None) -> Tensor | None:
    return None if text_mask is None else text_mask.unsqueeze(1)  # [t, 1, w]


def _fill(x: Tensor, mask: Tensor | None, dim: int) -> Tensor:
    """−inf at the padded words (``dim=1``) or regions (``dim=3``) of ``x`` (t, w, i, r)."""
    if mask is None:
        return x
    return x.masked_fill(~(mask[:, :, None, None] if dim == 1 else mask), -torch.inf)


def _drop_empty_(best: Tensor, mask: Tensor | None) -> None:
    """0, in place, where there was nothing real to take the maximum of."""
    if mask is not None:
        best.masked_fill_(best == -torch.inf, 0)


def _pool(f: Tensor, mask: Tensor | None, out_mean: Tensor, out_top: Tensor) -> None:
    """Mean (t, i) and largest values (t, i, k) of ``f`` (t, i, m) over the real m; ``mask`` broadcasts."""
    k = min(out_top.shape[-1], f.shape[-1])
    if mask is None:
        mean, top = f.mean(dim=-1), f.topk(k, dim=-1).values
    else:
        count = mask.sum(dim=-1)  # [t, 1] or [i]
        mean = f.masked_fill(~mask, 0).sum(dim=-1) / count.clamp(min=1)
        top = f.masked_fill(~mask, -torch.inf).topk(k, dim=-1).values
        top = top.masked_fill(~_taken(count, k), 0)
    out_mean.copy_(mean)
    out_top[..., :k].copy_(top)


def _pool_backward(f: Tensor, mask: Tensor | None, grad_mean: Tensor, grad_top: Tensor) -> Tensor:
    k = min(grad_top.shape[-1], f.shape[-1])
    if mask is None:
        index = f.topk(k, dim=-1).indices
        grad = (grad_mean / f.shape[-1]).unsqueeze(-1).expand(f.shape).contiguous()
        return grad.scatter_add_(-1, index, grad_top[..., :k])
    count = mask.sum(dim=-1)
    index = f.masked_fill(~mask, -torch.inf).topk(k, dim=-1).indices
    grad = (grad_mean / count.clamp(min=1)).unsqueeze(-1).masked_fill(~mask, 0).contiguous()
    return grad.scatter_add_(-1, index, grad_top[..., :k].masked_fill(~_taken(count, k), 0))


def _taken(count: Tensor, k: int) -> Tensor:
    """Which of k sorted places hold a real value, given how many real values there are."""
    return torch.arange(k, device=count.device) < count.unsqueeze(-1)  # [t, 1, k] or [i, k]
