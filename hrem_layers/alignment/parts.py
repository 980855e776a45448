"""The alignment on chosen pairs whose candidates come a part at a time: a process then holds no more than that.

Within a part the rows have different numbers of candidates. Rows that have equally many are aligned together, so that
no pair is computed that is not asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from hrem_layers.alignment.candidates import _CPU_CHUNK, _GPU_CHUNK, _align_op, _dtypes, _prepare


class Part(NamedTuple):
    """Some of the items that rows may have as candidates."""

    ids: Tensor
    """(C,) ascending, by which rows name them."""
    fragments: Tensor
    """(C, G, D)."""
    mask: Tensor | None
    """(C, G) bool, True = real."""


@torch.no_grad()
def align_in_parts(
    receiving: Tensor,
    receiving_mask: Tensor | None,
    index: Tensor,
    parts: Iterable[Part],
    *,
    topk: int,
    mode: str,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """:func:`~hrem_layers.alignment.candidates.align_candidates` of ``receiving`` (N, M, D) with what ``index`` (N, k)
    names, every number of which is in one of the ``parts``; without gradients.

    Returns:
        p (N, k) and q (N, k, topk).
    """
    n, k = index.shape
    mean: Tensor | None = None
    budget = _CPU_CHUNK if receiving.device.type == "cpu" else _GPU_CHUNK
    at_once = max(1, budget // max(1, receiving[:1].numel()))  # rows, which are copied
    for part in parts:
        wide, dtype = _dtypes(receiving, part.fragments)
        if mean is None:
            x = _prepare(receiving, receiving_mask, mode, wide, dtype)
            mean, top = x.new_zeros(n * k, dtype=wide), x.new_zeros(n * k, topk, dtype=wide)
        if not len(part.ids):
            continue
        y, y_mask = _prepare(part.fragments, part.mask, mode, wide, dtype), part.mask
        place = torch.searchsorted(part.ids, index).clamp_(max=len(part.ids) - 1)
        here = part.ids[place] == index
        del part  # the fragments as they came
        counts = here.sum(dim=1)
        slots = torch.arange(n * k, device=index.device).view(n, k)
        for count in counts.unique().tolist():
            if not count:
                continue
            for rows in (counts == count).nonzero().squeeze(1).split(at_once):
                mine = here[rows]
                mask = None if receiving_mask is None else receiving_mask[rows]
                found = _align_op(x[rows], y, mask, y_mask, place[rows][mine].view(-1, count), mode, topk, chunk_size)
                mean[slots[rows][mine]], top[slots[rows][mine]] = found[0].flatten(), found[1].flatten(0, 1)
        del y, y_mask  # before the next are fetched
    assert mean is not None, "there is a part at least"
    return mean.view(n, k), top.view(n, k, topk)
