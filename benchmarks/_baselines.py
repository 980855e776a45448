"""Two plain ways to write the alignment, as people write it first; only to compare speed and memory with.

What is right says :mod:`hrem_layers.alignment.reference`; these must be quick enough to be timed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dense(
    images: Tensor,
    texts: Tensor,
    text_mask: Tensor,
    topk: int = 10,
    mode: str = "cosine",
    *,
    image_mask: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """All similarities at once, padding masked. images (I, R, D), texts (T, W, D), text_mask (T, W) and image_mask
    (I, R; not with mode "scan") bool."""
    images = F.normalize(images, dim=-1)
    texts = F.normalize(texts.masked_fill(~text_mask.unsqueeze(-1), 0), dim=-1)
    s = torch.einsum("ird,twd->itrw", images, texts)
    real = text_mask[None, :, None, :]
    to_word, to_region = _scaled(s, 3, 2, mode)
    if image_mask is not None:
        to_word = to_word.masked_fill(~image_mask[:, None, :, None], -torch.inf)
    per_word = to_word.amax(dim=2)  # [i, t, w]
    per_region = to_region.masked_fill(~real, -torch.inf).amax(dim=3)  # [i, t, r]
    count = text_mask.sum(dim=1)
    mean_t2i = per_word.masked_fill(~text_mask, 0).sum(dim=2) / count
    k = min(topk, texts.shape[1])
    top_t2i = per_word.masked_fill(~text_mask, -torch.inf).topk(k, dim=2).values
    top_t2i = top_t2i.masked_fill(torch.arange(k, device=count.device) >= count[None, :, None], 0)
    k = min(topk, images.shape[1])
    if image_mask is None:
        return per_region.mean(dim=2), mean_t2i.t(), per_region.topk(k, dim=2).values, top_t2i.transpose(0, 1)
    regions, count = image_mask.unsqueeze(1), image_mask.sum(dim=1, keepdim=True)
    mean_i2t = per_region.masked_fill(~regions, 0).sum(dim=2) / count
    top_i2t = per_region.masked_fill(~regions, -torch.inf).topk(k, dim=2).values
    top_i2t = top_i2t.masked_fill(torch.arange(k, device=count.device) >= count.unsqueeze(-1), 0)
    return mean_i2t, mean_t2i.t(), top_i2t, top_t2i.transpose(0, 1)


def per_caption(
    images: Tensor, texts: Tensor, lengths: list[int], topk: int = 10, mode: str = "cosine"
) -> tuple[Tensor, ...]:
    """A Python loop over the captions, each without its padding against all images: the usual form of SCAN."""
    images = F.normalize(images, dim=-1)
    columns: list[tuple[Tensor, ...]] = []
    for words, length in zip(texts, lengths, strict=True):
        c = F.normalize(words[:length], dim=-1).expand(len(images), -1, -1)
        to_word, to_region = _scaled(torch.bmm(images, c.transpose(1, 2)), 2, 1, mode)  # [i, r, w]
        per_word, per_region = to_word.amax(dim=1), to_region.amax(dim=2)
        top = per_word.topk(min(topk, length), dim=1).values
        columns.append((
            per_region.mean(dim=1), per_word.mean(dim=1),
            per_region.topk(min(topk, images.shape[1]), dim=1).values, F.pad(top, (0, topk - top.shape[1])),
        ))  # fmt: skip
    mean_i2t, mean_t2i, top_i2t, top_t2i = (torch.stack(x, dim=1) for x in zip(*columns, strict=True))
    return mean_i2t, mean_t2i.t(), top_i2t, top_t2i.transpose(0, 1)


def _scaled(s: Tensor, words: int, regions: int, mode: str) -> tuple[Tensor, Tensor]:
    """What the maxima per word and per region are taken of."""
    if mode != "scan":
        return s, s
    s = F.leaky_relu(s, 0.1)
    return tuple(s / s.norm(dim=dim, keepdim=True).clamp(min=1e-8) for dim in (words, regions))
