"""The alignment as the paper writes it (section 3.3), one pair and one fragment at a time.

What every other file here computes fast. It is differentiable, in any floating dtype, and slow: tests and benchmarks
compare with it, in float64; readers find each line of the formula in it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hrem_layers._core.numerics import tie_tolerance
from hrem_layers.alignment.scores import Scores


def align_by_loops(
    image_fragments: Tensor,
    text_fragments: Tensor,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    *,
    topk: int = 10,
    mode: str = "cosine",
) -> Scores:
    """As :func:`hrem_layers.align_fragments`: (I, R, D), (T, W, D) and masks (I, R), (T, W) -> Scores."""
    images = (
        image_fragments.unbind()
        if image_mask is None
        else [x[m] for x, m in zip(image_fragments, image_mask, strict=True)]
    )
    texts = (
        text_fragments.unbind() if text_mask is None else [x[m] for x, m in zip(text_fragments, text_mask, strict=True)]
    )
    pairs = [[_pair(regions, words, topk, mode) for words in texts] for regions in images]
    mean_i2t, top_i2t, mean_t2i, top_t2i = (
        torch.stack([torch.stack([pair[part] for pair in row]) for row in pairs]) for part in range(4)
    )
    return Scores(mean_i2t, mean_t2i.transpose(0, 1), top_i2t, top_t2i.transpose(0, 1))


def _pair(regions: Tensor, words: Tensor, topk: int, mode: str) -> tuple[Tensor, ...]:
    """The real regions (m, D) of one image and words (n, D) of one text -> p and q of I→T, p and q of T→I."""
    if not len(regions) or not len(words):
        nothing = (regions.sum() + words.sum()) * 0
        return (nothing, nothing.expand(topk)) * 2
    scale = regions.detach().norm(dim=1).max() * words.detach().norm(dim=1).max() if mode == "dot" else 1.0
    margin = tie_tolerance(regions.dtype) * float(scale)  # values less far apart are equal
    if mode != "dot":
        regions, words = _unit(regions, 0), _unit(words, 0)
    to_image = to_text = s = regions @ words.t()  # s_mn = cos(r_m, c_n)
    if mode == "scan":
        s = torch.where(s > 0, s, 0.1 * s)  # LeakyReLU
        noise = torch.finfo(s.dtype).eps  # below the rounding of a cosine s has no direction
        to_text = _unit(s, noise)  # s / ‖s_m·‖: over the words of the text
        to_image = _unit(s.t(), noise).t()  # s / ‖s_·n‖: over the regions of the image
    per_word = torch.stack([_largest(to_text[:, n], 1, margin)[0] for n in range(len(words))])  # max over regions
    per_region = torch.stack([_largest(to_image[m], 1, margin)[0] for m in range(len(regions))])  # max over words
    return per_region.mean(), _largest(per_region, topk, margin), per_word.mean(), _largest(per_word, topk, margin)


def _unit(rows: Tensor, smallest: float) -> Tensor:
    """Each row over its norm; a row no longer than ``smallest`` is 0."""
    return torch.stack([x * 0 if x.detach().norm() <= smallest else x / x.norm() for x in rows])


def _largest(values: Tensor, k: int, margin: float) -> Tensor:
    """The k largest values in descending order, then zeros: each the mean of those that tie with it."""
    found = [values[(values - x).abs() <= margin].mean() for x in values.detach().sort(descending=True).values[:k]]
    return torch.stack(found + [torch.zeros_like(found[0])] * (k - len(found)))
