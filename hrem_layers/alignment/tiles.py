"""All pairs, tile by tile: the working memory is that of one tile, and the results are those of the whole.

Similarities may be kept for backward as far as a buffer of fixed size reaches; beyond, backward multiplies again. How
the pairs are cut is in :mod:`~hrem_layers.alignment.cuts`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hrem_layers._core.numerics import compute_dtype
from hrem_layers.alignment.block import activate_, block_backward, block_maxima, block_pool
from hrem_layers.alignment.cuts import Setting, Tile, image_sides, most_runs, side_of, tiles_of
from hrem_layers.alignment.pooling import tie_margin
from hrem_layers.alignment.products import Store, add_product, write_product
from hrem_layers.alignment.scores import PairGrads, PairScores, Scores
from hrem_layers.alignment.sides import Run, Side, fragments_grad


def score_all(
    image_fragments: Tensor,
    text_fragments: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    setting: Setting,
    kept: Tensor,
) -> Scores:
    """Fragments (I, R, D) and (T, W, D), masks or None -> Scores in float32 or better.

    ``kept`` (any length) is filled with similarities for backward, as far as it reaches.
    """
    i, t, k = image_fragments.shape[0], text_fragments.shape[0], setting.topk
    image_runs, text_runs = most_runs(image_fragments, text_fragments, image_mask, text_mask, setting)
    texts = side_of(text_fragments, text_mask, setting, text_runs)
    wide = compute_dtype(setting.dtype)
    shapes = (t, i), (t, i), (t, i, k), (t, i, k)
    out = PairScores(*(torch.zeros(shape, dtype=wide, device=kept.device) for shape in shapes))
    store = Store(kept, filled=False)
    for items, images in image_sides(image_fragments, image_mask, texts, t, setting, image_runs):
        part = out.window(slice(0, t), items)
        for tile in tiles_of(images, texts, items.stop - items.start, t, setting):
            x, _ = _take(store, tile)
            _product(images, texts, tile, x)
            activate_(x, setting.mode)
            best = tile.maxima(x)
            for text_run, image_run, block in tile.blocks(x):
                masks = _zeros_of(texts, text_run), _zeros_of(images, image_run)
                block_maxima(block, *masks, tile.window(best, text_run, image_run), mode=setting.mode)
            real = _real_of(texts, tile.text_runs), _real_of(images, tile.image_runs)
            clean = not any(run.padded for run in (*tile.text_runs, *tile.image_runs))
            block_pool(best, *real, part.window(tile.texts(), tile.images()), clean=clean)
        if images.order is not None:  # then these are all images
            out = _reordered(out, 1, images.order.argsort())
    kept[store.used :].zero_()
    return out.scores() if texts.order is None else out.scores_in(texts.order.argsort())


def score_all_backward(
    image_fragments: Tensor,
    text_fragments: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    grad: PairGrads,
    setting: Setting,
    kept: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to both fragment tensors."""
    t = text_fragments.shape[0]
    image_runs, text_runs = most_runs(image_fragments, text_fragments, image_mask, text_mask, setting)
    texts = side_of(text_fragments, text_mask, setting, text_runs)
    pair_grad = grad.reordered(0, texts.order)
    wide = compute_dtype(setting.dtype)
    grad_images = image_fragments.new_empty(image_fragments.shape)
    grad_texts = torch.zeros_like(texts.rows, dtype=wide)
    store, scratch = Store(kept, filled=True), Store(kept.new_empty(0), filled=False)
    for items, images in image_sides(image_fragments, image_mask, texts, t, setting, image_runs):
        part = pair_grad.window(slice(0, t), items).reordered(1, images.order)
        grad_rows = torch.zeros_like(images.rows, dtype=wide)
        for tile in tiles_of(images, texts, items.stop - items.start, t, setting):
            s, filled = _take(store, tile)
            if not filled:
                activate_(_product(images, texts, tile, s), setting.mode)
            grad_x, _ = _take(scratch, tile)
            for (text_run, image_run, block), (_, _, place) in zip(tile.blocks(s), tile.blocks(grad_x), strict=True):
                masks = _mask_of(texts, text_run), _mask_of(images, image_run)
                window = part.window(text_run.items(), image_run.items())
                margin = _margin(wide, texts, images, text_run, image_run)
                block_backward(block, *masks, window, place, mode=setting.mode, margin=margin)
            regions, words = tile.regions(), tile.words()
            add_product(grad_rows[regions], grad_x.t(), texts.rows[words])
            add_product(grad_texts[words], grad_x, images.rows[regions])
        grad_images[items] = fragments_grad(grad_rows, images, image_fragments[items])
    return grad_images, fragments_grad(grad_texts, texts, text_fragments)


def _take(store: Store, tile: Tile) -> tuple[Tensor, bool]:
    regions = tile.regions().stop - tile.regions().start
    room, filled = store.take(tile.words().stop - tile.words().start, regions)
    return room[:, :regions], filled


def _product(images: Side, texts: Side, tile: Tile, out: Tensor) -> Tensor:
    return write_product(texts.rows[tile.words()], images.rows[tile.regions()], out)


def _mask_of(side: Side, run: Run) -> Tensor | None:
    return side.real[run.items(), : run.width] if run.padded and side.real is not None else None


def _zeros_of(side: Side, run: Run) -> Tensor | None:
    return None if side.copies else _mask_of(side, run)


def _margin(dtype: torch.dtype, texts: Side, images: Side, text_run: Run, image_run: Run) -> float | Tensor:
    """How far values that tie may be apart, per pair (t, i) of a block if their scale differs."""
    if texts.longest is None or images.longest is None:
        return tie_margin(dtype, None)
    lengths = texts.longest[text_run.items()].unsqueeze(1), images.longest[image_run.items()]
    return tie_margin(dtype, (lengths[0].to(dtype), lengths[1].to(dtype)))


def _real_of(side: Side, runs: list[Run]) -> Tensor | None:
    """Which places of a tile's maxima belong to real fragments; None = all."""
    width = max(run.width for run in runs)
    if side.real is None or all(run.width == width and not run.padded for run in runs):
        return None
    return side.real[runs[0].start : runs[-1].stop, :width]


def _reordered(scores: PairScores, dim: int, order: Tensor | None) -> PairScores:
    return scores if order is None else PairScores(*(x.index_select(dim, order) for x in scores))
