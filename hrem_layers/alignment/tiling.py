"""All pairs, tile by tile: the working memory is that of one tile, and the results are those of the whole.

Two layouts share the loop. *Packed* (CPU): only the real fragments are multiplied; items are sorted by
their number of fragments so that each run of equal numbers is a block without padding. Finding the runs
reads the masks, which on a GPU would make the host wait; there, and wherever the host cannot look, the
*padded* layout treats all items as one run and masks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hrem_layers.alignment.formula import Scores, score_block, score_block_backward
from hrem_layers.masked import compute_dtype

# Similarities at one time if the caller does not say: on a CPU what the last-level cache holds, on a GPU
# enough to fill the chip. Times 4 bytes and, with temporaries, about 6 (forward) or 9 (backward).
_CPU_TILE, _GPU_TILE = 2**20, 2**24


class Run(NamedTuple):
    """Consecutive items of one side that have the same width (number of rows) in the product."""

    start: int  # first item, in the side's order
    stop: int
    row: int  # first row
    width: int

    def rows(self) -> slice:
        return slice(self.row, self.row + (self.stop - self.start) * self.width)


class Side(NamedTuple):
    """One modality, ready to be multiplied."""

    rows: Tensor  # [total rows, d]
    runs: list[Run]
    mask: Tensor | None  # [n, width], only in the padded layout
    order: Tensor | None  # [n]: which item stands at each place; None = as they came
    source: Tensor | None  # [total rows]: where each row came from in (n * width); None = as they came


def padded_side(fragments: Tensor, mask: Tensor | None) -> Side:
    n, width, d = fragments.shape
    return Side(fragments.reshape(n * width, d), [Run(0, n, 0, width)] if n and width else [], mask, None, None)


def packed_side(fragments: Tensor, mask: Tensor | None) -> Side:
    if mask is None:
        return padded_side(fragments, None)
    n, width, d = fragments.shape
    lengths, order = mask.sum(dim=1).sort(stable=True)
    positions = torch.arange(n * width, device=mask.device).view(n, width)[order]
    source = positions[mask[order]]  # [total real rows], item by item
    runs, item, row = [], 0, 0
    for length, count in zip(*(x.tolist() for x in torch.unique_consecutive(lengths, return_counts=True)), strict=True):
        if length:
            runs.append(Run(item, item + count, row, length))
        item, row = item + count, row + count * length
    return Side(fragments.reshape(n * width, d)[source], runs, None, order, source)


def score_all(
    image_fragments: Tensor,
    text_fragments: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    *,
    mode: str,
    topk: int,
    chunk_size: int | None,
    packed: bool,
) -> Scores:
    """Fragments (I, R, D) and (T, W, D), zero where padded, masks or None -> Scores in float32 or better."""
    images, texts = _sides(image_fragments, text_fragments, image_mask, text_mask, packed)
    i, t = image_fragments.shape[0], text_fragments.shape[0]
    options = {"dtype": compute_dtype(image_fragments.dtype), "device": image_fragments.device}
    out = Scores(
        torch.zeros(i, t, **options),
        torch.zeros(t, i, **options),
        torch.zeros(i, t, topk, **options),
        torch.zeros(t, i, topk, **options),
    )
    for image_run, text_runs in _tiles(images, texts, image_fragments, text_fragments, chunk_size):
        x = _product(images, texts, image_run, text_runs)
        for run, block in _blocks(x, image_run, text_runs):
            here = _window(out, image_run, run)
            masks = _mask_of(texts, run), _mask_of(images, image_run)
            for place, value in zip(here, score_block(block, *masks, mode=mode, topk=topk), strict=True):
                place.copy_(value)
    return _restore_order(out, images.order, texts.order)


def score_all_backward(
    image_fragments: Tensor,
    text_fragments: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    grad: Scores,
    *,
    mode: str,
    topk: int,
    chunk_size: int | None,
    packed: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to both fragment tensors; the similarities are computed again, tile by tile."""
    images, texts = _sides(image_fragments, text_fragments, image_mask, text_mask, packed)
    grad = _apply_order(grad, images.order, texts.order)
    dtype = compute_dtype(image_fragments.dtype)
    grad_images = torch.zeros_like(images.rows, dtype=dtype)
    grad_texts = torch.zeros_like(texts.rows, dtype=dtype)
    for image_run, text_runs in _tiles(images, texts, image_fragments, text_fragments, chunk_size):
        x = _product(images, texts, image_run, text_runs)  # [words, regions]
        for run, block in _blocks(x, image_run, text_runs):
            masks = _mask_of(texts, run), _mask_of(images, image_run)
            here = _window(grad, image_run, run)
            block.copy_(score_block_backward(block, *masks, here, mode=mode, topk=topk))
        regions, words = image_run.rows(), slice(text_runs[0].row, text_runs[-1].rows().stop)
        x = x.to(image_fragments.dtype)
        if x.dtype == dtype:
            grad_images[regions].addmm_(x.t(), texts.rows[words])
            grad_texts[words].addmm_(x, images.rows[regions])
        else:  # sums over tiles are kept in float32
            grad_images[regions] += x.t() @ texts.rows[words]
            grad_texts[words] += x @ images.rows[regions]
    return (
        _unpack(grad_images, images, image_fragments),
        _unpack(grad_texts, texts, text_fragments),
    )


def _sides(
    image_fragments: Tensor,
    text_fragments: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    packed: bool,
) -> tuple[Side, Side]:
    make = packed_side if packed else padded_side
    return make(image_fragments, image_mask), make(text_fragments, text_mask)


def _tiles(
    images: Side, texts: Side, image_fragments: Tensor, text_fragments: Tensor, chunk_size: int | None
) -> Iterator[tuple[Run, list[Run]]]:
    """Pieces of the image runs, each with consecutive pieces of text runs: at most ``chunk_size`` pairs."""
    i, r, _ = image_fragments.shape
    t, w, _ = text_fragments.shape
    if chunk_size is None:
        budget = _CPU_TILE if image_fragments.device.type == "cpu" else _GPU_TILE
        chunk_size = max(1, budget // max(1, r * w))
    per_image = max(1, min(i, math.isqrt(chunk_size)))
    per_text = max(1, min(t, chunk_size // per_image))
    per_image = max(1, min(i, chunk_size // per_text))
    text_tiles = list(_gather(texts.runs, per_text))
    for run in images.runs:
        for start in range(run.start, run.stop, per_image):
            piece = _piece(run, start, min(start + per_image, run.stop))
            for text_runs in text_tiles:
                yield piece, text_runs


def _piece(run: Run, start: int, stop: int) -> Run:
    return Run(start, stop, run.row + (start - run.start) * run.width, run.width)


def _gather(runs: list[Run], size: int) -> Iterator[list[Run]]:
    """The runs cut and joined into lists of ``size`` items, so that short runs share one product."""
    tile: list[Run] = []
    room = size
    for run in runs:
        start = run.start
        while start < run.stop:
            stop = min(run.stop, start + room)
            tile.append(_piece(run, start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield tile
                tile, room = [], size
    if tile:
        yield tile


def _product(images: Side, texts: Side, image_run: Run, text_runs: list[Run]) -> Tensor:
    words = slice(text_runs[0].row, text_runs[-1].rows().stop)
    x = texts.rows[words] @ images.rows[image_run.rows()].t()  # [words, regions]
    return x.to(compute_dtype(x.dtype))


def _blocks(x: Tensor, image_run: Run, text_runs: list[Run]) -> Iterator[tuple[Run, Tensor]]:
    """Each text run's rows of ``x`` as (t, w, i, r)."""
    first = text_runs[0].row
    for run in text_runs:
        rows = run.rows()
        shape = (run.stop - run.start, run.width, image_run.stop - image_run.start, image_run.width)
        yield run, x[rows.start - first : rows.stop - first].view(shape)


def _mask_of(side: Side, run: Run) -> Tensor | None:
    return None if side.mask is None else side.mask[run.start : run.stop]


def _window(scores: Scores, image_run: Run, text_run: Run) -> Scores:
    i, t = slice(image_run.start, image_run.stop), slice(text_run.start, text_run.stop)
    return Scores(
        scores.mean_i2t[i, t], scores.mean_t2i[t, i], scores.top_i2t[i, t], scores.top_t2i[t, i]
    )


def _apply_order(scores: Scores, image_order: Tensor | None, text_order: Tensor | None) -> Scores:
    def pick(x: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
        x = x if rows is None else x[rows]
        return x if columns is None else x[:, columns]

    return Scores(
        pick(scores.mean_i2t, image_order, text_order),
        pick(scores.mean_t2i, text_order, image_order),
        pick(scores.top_i2t, image_order, text_order),
        pick(scores.top_t2i, text_order, image_order),
    )


def _restore_order(scores: Scores, image_order: Tensor | None, text_order: Tensor | None) -> Scores:
    back = (None if order is None else order.argsort() for order in (image_order, text_order))
    return _apply_order(scores, *back)


def _unpack(grad_rows: Tensor, side: Side, fragments: Tensor) -> Tensor:
    n, width, d = fragments.shape
    if side.source is not None:
        grad_rows = grad_rows.new_zeros(n * width, d).index_copy_(0, side.source, grad_rows)
    return grad_rows.view(n, width, d).to(fragments.dtype)
