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

from hrem_layers.masked import safe_reciprocal

LEAKY_SLOPE = 0.1
MODES = ("scan", "cosine", "dot")


class Scores(NamedTuple):
    """The row is the side that receives: ``*_i2t`` lead with images, ``*_t2i`` with texts."""

    mean_i2t: Tensor  # [i, t]
    mean_t2i: Tensor  # [t, i]
    top_i2t: Tensor  # [i, t, k]
    top_t2i: Tensor  # [t, i, k]


def score_block(
    x: Tensor, text_mask: Tensor | None, image_mask: Tensor | None, *, mode: str, topk: int
) -> Scores:
    """``x`` (t, w, i, r) with zeros at padded words and regions, masks (t, w) and (i, r) -> Scores.

    ``x`` is overwritten.
    """
    s, inverse_words, inverse_regions = _activate(x, mode)
    per_word = _max_over(s * inverse_words if mode == "scan" else s, image_mask, dim=3)  # [t, w, i]
    per_region = _max_over(s * inverse_regions if mode == "scan" else s, text_mask, dim=1)  # [t, i, r]
    mean_t2i, top_t2i = _pool(per_word.transpose(1, 2), _expand_words(text_mask), topk)
    mean_i2t, top_i2t = _pool(per_region, image_mask, topk)
    return Scores(mean_i2t.t(), mean_t2i, top_i2t.transpose(0, 1), top_t2i)


def score_block_backward(
    x: Tensor, text_mask: Tensor | None, image_mask: Tensor | None, grad: Scores, *, mode: str, topk: int
) -> Tensor:
    """The gradient of :func:`score_block` with respect to ``x`` (t, w, i, r); ``x`` is overwritten.

    Where several regions (words) share the maximum, one of them receives the gradient.
    """
    slope = torch.where(x > 0, 1.0, LEAKY_SLOPE).to(x.dtype) if mode == "scan" else None
    s, inverse_words, inverse_regions = _activate(x, mode)

    a = s * inverse_words if mode == "scan" else s
    per_word, best_region = _fill(a, image_mask, dim=3).max(dim=3)  # [t, w, i]
    per_word = _drop_empty(per_word, image_mask)
    grad_word = _pool_backward(
        per_word.transpose(1, 2), _expand_words(text_mask), grad.mean_t2i, grad.top_t2i, topk
    ).transpose(1, 2)  # [t, w, i]
    grad_a = torch.zeros_like(s).scatter_(3, best_region.unsqueeze(3), grad_word.unsqueeze(3))

    b = s * inverse_regions if mode == "scan" else s
    per_region, best_word = _fill(b, text_mask, dim=1).max(dim=1)  # [t, i, r]
    per_region = _drop_empty(per_region, text_mask)
    grad_region = _pool_backward(
        per_region, image_mask, grad.mean_i2t.t(), grad.top_i2t.transpose(0, 1), topk
    )  # [t, i, r]
    grad_b = torch.zeros_like(s).scatter_(1, best_word.unsqueeze(1), grad_region.unsqueeze(1))

    if slope is None:
        return grad_a.add_(grad_b)
    # d(s / ‖s‖) = (g - a <g, a>) / ‖s‖ along the normed dimension
    grad_a.sub_((grad_a * a).sum(dim=1, keepdim=True) * a).mul_(inverse_words)
    grad_b.sub_((grad_b * b).sum(dim=3, keepdim=True) * b).mul_(inverse_regions)
    return grad_a.add_(grad_b).mul_(slope)


def _activate(x: Tensor, mode: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """s, the reciprocal norms over the words (t, 1, i, r) and over the regions (t, w, i, 1)."""
    if mode != "scan":
        return x, None, None
    s = F.leaky_relu_(x, LEAKY_SLOPE)
    square = s * s
    # below the rounding error of a cosine the direction of s is noise: such a row counts as zero
    smallest = torch.finfo(s.dtype).eps
    inverse_words = safe_reciprocal(square.sum(dim=1, keepdim=True).sqrt_(), smallest)
    inverse_regions = safe_reciprocal(square.sum(dim=3, keepdim=True).sqrt_(), smallest)
    return s, inverse_words, inverse_regions


def _expand_words(text_mask: Tensor | None) -> Tensor | None:
    return None if text_mask is None else text_mask.unsqueeze(1)  # [t, 1, w]


def _fill(x: Tensor, mask: Tensor | None, dim: int) -> Tensor:
    """−inf at the padded words (``dim=1``) or regions (``dim=3``) of ``x`` (t, w, i, r)."""
    if mask is None:
        return x
    return x.masked_fill(~(mask[:, :, None, None] if dim == 1 else mask), -torch.inf)


def _drop_empty(best: Tensor, mask: Tensor | None) -> Tensor:
    """0 where there was nothing real to take the maximum of."""
    return best if mask is None else best.masked_fill(best == -torch.inf, 0)


def _max_over(x: Tensor, mask: Tensor | None, dim: int) -> Tensor:
    return _drop_empty(_fill(x, mask, dim).amax(dim=dim), mask)


def _pool(f: Tensor, mask: Tensor | None, topk: int) -> tuple[Tensor, Tensor]:
    """Mean (t, i) and ``topk`` largest (t, i, topk) of ``f`` (t, i, m) over the real m; ``mask`` broadcasts."""
    m = f.shape[-1]
    k = min(topk, m)
    if mask is None:
        mean, top = f.mean(dim=-1), f.topk(k, dim=-1).values
    else:
        count = mask.sum(dim=-1)  # [t, 1] or [i]
        mean = f.masked_fill(~mask, 0).sum(dim=-1) / count.clamp(min=1)
        top = f.masked_fill(~mask, -torch.inf).topk(k, dim=-1).values
        top = top.masked_fill(~_taken(count, k), 0)
    return mean, F.pad(top, (0, topk - k))


def _pool_backward(f: Tensor, mask: Tensor | None, grad_mean: Tensor, grad_top: Tensor, topk: int) -> Tensor:
    m = f.shape[-1]
    k = min(topk, m)
    if mask is None:
        index = f.topk(k, dim=-1).indices
        grad = (grad_mean / m).unsqueeze(-1).expand(f.shape).contiguous()
        return grad.scatter_add_(-1, index, grad_top[..., :k])
    count = mask.sum(dim=-1)
    index = f.masked_fill(~mask, -torch.inf).topk(k, dim=-1).indices
    grad = (grad_mean / count.clamp(min=1)).unsqueeze(-1).masked_fill(~mask, 0).contiguous()
    return grad.scatter_add_(-1, index, grad_top[..., :k].masked_fill(~_taken(count, k), 0))


def _taken(count: Tensor, k: int) -> Tensor:
    """Which of k sorted places hold a real value, given how many real values there are."""
    return torch.arange(k, device=count.device) < count.unsqueeze(-1)  # [t, 1, k] or [i, k]
