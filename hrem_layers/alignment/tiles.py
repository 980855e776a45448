"""All pairs, tile by tile: the working memory is that of one tile, and the results are those of the whole.

A tile is one matrix product; a block is the part of it between one run of texts and one run of images, small
enough for a core's own cache. Similarities may be kept for backward as far as a buffer of fixed size reaches;
beyond, backward multiplies again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hrem_layers._core.numerics import compute_dtype
from hrem_layers.alignment.block import Maxima, activate_, block_backward, block_maxima, block_pool
from hrem_layers.alignment.pooling import tie_margin
from hrem_layers.alignment.scores import PairGrads, PairScores, Scores
from hrem_layers.alignment.sides import Run, Side, fragments_grad, make_side

# Similarities of a tile if the caller does not say. CPU: large enough for an efficient product, small enough
# for the last-level cache. Elsewhere: enough to fill the chip.
_CPU_TILE, _OTHER_TILE = 2**21, 2**24
_CPU_TILE_ROWS = 2304
# A row of a tile begins at a multiple of this many similarities: where rows begin within a cache line, a product on a
# CPU loses up to 40% of its speed.
ROW_MULTIPLE = 16
# A CPU takes so many columns at one time when it reduces over rows; a number of images that is a multiple of it stands
# place by place.
_COLUMNS = 32
# Similarities of a block on a CPU (1 MB): about a core's second-level cache.
_CPU_BLOCK = 2**18


class Setting(NamedTuple):
    """What does not depend on the data."""

    mode: str
    topk: int
    chunk_size: int | None
    packed: bool
    dtype: torch.dtype  # of the product


class Tile(NamedTuple):
    image_runs: list[Run]
    text_runs: list[Run]
    by_place: bool  # as the images' side; then there is one run of them, and the tile has all of it

    def images(self) -> slice:
        return slice(self.image_runs[0].start, self.image_runs[-1].stop)

    def texts(self) -> slice:
        return slice(self.text_runs[0].start, self.text_runs[-1].stop)

    def regions(self) -> slice:
        return slice(self.image_runs[0].row, self.image_runs[-1].rows().stop)

    def words(self) -> slice:
        return slice(self.text_runs[0].row, self.text_runs[-1].rows().stop)

    def maxima(self, like: Tensor) -> Maxima:
        """Room for the tile's maxima; what no block writes to is 0."""
        images, texts = self.images(), self.texts()
        words, regions = ([run.width for run in runs] for runs in (self.text_runs, self.image_runs))
        n = texts.stop - texts.start, images.stop - images.start
        best = Maxima.empty(like, n[0], max(words), n[1], max(regions), by_place=self.by_place)
        for part, widths in ((best.per_word, words), (best.per_region, regions)):
            if min(widths) < max(widths):
                part.zero_()
        return best

    def window(self, best: Maxima, text_run: Run, image_run: Run) -> Maxima:
        texts = _shifted(text_run.items(), self.text_runs[0].start)
        images = _shifted(image_run.items(), self.image_runs[0].start)
        return best.window(texts, text_run.width, images, image_run.width)

    def blocks(self, x: Tensor) -> Iterator[tuple[Run, Run, Tensor]]:
        """Text run, image run and their part of ``x`` (words, regions), viewed as (t, w, i, r)."""
        first_word, first_region = self.text_runs[0].row, self.image_runs[0].row
        for text_run in self.text_runs:
            words = x[_shifted(text_run.rows(), first_word)]
            for image_run in self.image_runs:
                i, r = image_run.stop - image_run.start, image_run.width
                if self.by_place:
                    block = words.view(-1, text_run.width, r, i).transpose(2, 3)
                else:
                    regions = _shifted(image_run.rows(), first_region)
                    block = words[:, regions].view(-1, text_run.width, i, r)
                yield text_run, image_run, block


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
    texts = _side(text_fragments, text_mask, setting)
    wide = compute_dtype(setting.dtype)
    shapes = (t, i), (t, i), (t, i, k), (t, i, k)
    out = PairScores(*(torch.zeros(shape, dtype=wide, device=kept.device) for shape in shapes))
    store = _Store(kept, filled=False)
    for items, images in _image_sides(image_fragments, image_mask, texts, t, setting):
        part = out.window(slice(0, t), items)
        for tile in _tiles(images, texts, items.stop - items.start, t, setting):
            x, _ = store.take(tile)
            _product(images, texts, tile, x)
            activate_(x, setting.mode)
            best = tile.maxima(x)
            for text_run, image_run, block in tile.blocks(x):
                masks = _mask_of(texts, text_run), _mask_of(images, image_run)
                block_maxima(block, *masks, tile.window(best, text_run, image_run), mode=setting.mode)
            real = _real_of(texts, tile.text_runs), _real_of(images, tile.image_runs)
            clean = texts.mask is None and images.mask is None
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
    texts = _side(text_fragments, text_mask, setting)
    pair_grad = grad.reordered(0, texts.order)
    wide = compute_dtype(setting.dtype)
    grad_images = image_fragments.new_empty(image_fragments.shape)
    grad_texts = torch.zeros_like(texts.rows, dtype=wide)
    store, scratch = _Store(kept, filled=True), _Store(kept.new_empty(0), filled=False)
    for items, images in _image_sides(image_fragments, image_mask, texts, t, setting):
        part = pair_grad.window(slice(0, t), items).reordered(1, images.order)
        grad_rows = torch.zeros_like(images.rows, dtype=wide)
        for tile in _tiles(images, texts, items.stop - items.start, t, setting):
            s, filled = store.take(tile)
            if not filled:
                activate_(_product(images, texts, tile, s), setting.mode)
            grad_x, _ = scratch.take(tile)
            for (text_run, image_run, block), (_, _, place) in zip(tile.blocks(s), tile.blocks(grad_x), strict=True):
                masks = _mask_of(texts, text_run), _mask_of(images, image_run)
                window = part.window(text_run.items(), image_run.items())
                margin = _margin(wide, texts, images, text_run, image_run)
                block_backward(block, *masks, window, place, mode=setting.mode, margin=margin)
            regions, words = tile.regions(), tile.words()
            _add_product(grad_rows[regions], grad_x.t(), texts.rows[words])
            _add_product(grad_texts[words], grad_x, images.rows[regions])
        grad_images[items] = fragments_grad(grad_rows, images, image_fragments[items])
    return grad_images, fragments_grad(grad_texts, texts, text_fragments)


class _Store:
    """Room for the tiles' similarities: first in the buffer that is kept, then in one that is used again."""

    def __init__(self, kept: Tensor, *, filled: bool) -> None:
        self.kept, self.filled, self.used, self.scratch = kept, filled, 0, kept.new_empty(0)

    def take(self, tile: Tile) -> tuple[Tensor, bool]:
        """A matrix (words, regions) for ``tile``, and whether it lies in the kept buffer."""
        words, regions = (s.stop - s.start for s in (tile.words(), tile.regions()))
        stride = -(-regions // ROW_MULTIPLE) * ROW_MULTIPLE
        size = words * stride
        if self.used + size <= self.kept.numel():
            self.used += size
            room = self.kept[self.used - size : self.used].view(words, stride)
            if not self.filled:
                room[:, regions:].zero_()  # an operator's output is defined in every element
            return room[:, :regions], True
        if self.scratch.numel() < size:
            self.scratch = self.kept.new_empty(size)
        return self.scratch[:size].view(words, stride)[:, :regions], False


def _side(fragments: Tensor, mask: Tensor | None, setting: Setting, *, by_place: bool = False) -> Side:
    return make_side(
        fragments, mask, packed=setting.packed, normalize=setting.mode != "dot", dtype=setting.dtype, by_place=by_place
    )


def _image_sides(
    fragments: Tensor, mask: Tensor | None, texts: Side, t: int, setting: Setting
) -> Iterator[tuple[slice, Side]]:
    """The images that stand in one tile after another, ready to be multiplied. With a mask all at once: of more images
    more have equal numbers of regions."""
    i, r, _ = fragments.shape
    if mask is not None:
        yield slice(0, i), _side(fragments, mask, setting)
        return
    size = max(1, _sizes(r, texts.rows, i, t, setting)[0])
    start = 0
    while start < i:
        stop = min(i, start + size)
        if setting.chunk_size is None and i - stop < size // 2:  # what is left over is no tile of its own
            stop = i
        by_place = fragments.device.type == "cpu" and (stop - start) % _COLUMNS == 0
        yield slice(start, stop), _side(fragments[start:stop], None, setting, by_place=by_place)
        start = stop


def _sizes(r: int, word_rows: Tensor, i: int, t: int, setting: Setting) -> tuple[int, int, int | None]:
    """Images and texts of a tile, and the most rows of a block: as many texts as the product likes and images, of r
    regions, to fill up, evenly; or at most ``chunk_size`` pairs."""
    on_cpu = word_rows.device.type == "cpu"
    w = max(1, -(-word_rows.shape[0] // max(1, t)))  # rows per text
    even = _even if setting.chunk_size is None else min
    pairs = setting.chunk_size or max(1, (_CPU_TILE if on_cpu else _OTHER_TILE) // (r * w))
    texts = max(1, even(t, min(pairs, max(1, _CPU_TILE_ROWS // w)) if on_cpu else pairs))
    images = max(1, even(i, max(1, pairs // texts)))
    if on_cpu and setting.chunk_size is None and i >= _COLUMNS:
        images = max(1, round(images / _COLUMNS)) * _COLUMNS
    texts = max(1, even(t, max(texts, pairs // images)))
    return images, texts, max(1, _CPU_BLOCK // (images * r)) if on_cpu else None


def _even(n: int, size: int) -> int:
    """n cut into equal parts of about ``size``, at most one and a half times of it: the size of a part."""
    parts = max(1, (2 * n + size) // (2 * size))  # n / size, rounded
    return -(-n // parts)


def _tiles(images: Side, texts: Side, i: int, t: int, setting: Setting) -> Iterator[Tile]:
    r = max(1, -(-images.rows.shape[0] // max(1, i)))  # rows per image
    per_image, per_text, block_rows = _sizes(r, texts.rows, i, t, setting)
    if images.by_place:
        per_image = i
    text_tiles = list(_gather(texts.runs, per_text, block_rows))
    for image_runs in _gather(images.runs, per_image, None):
        for text_runs in text_tiles:
            yield Tile(image_runs, text_runs, images.by_place)


def _gather(runs: list[Run], size: int, most_rows: int | None) -> Iterator[list[Run]]:
    """The runs cut and joined into lists of ``size`` items, so that short runs share one product."""
    tile: list[Run] = []
    room = size
    for run in runs:
        most = size if most_rows is None else max(1, most_rows // run.width)
        start = run.start
        while start < run.stop:
            stop = min(run.stop, start + room, start + most)
            tile.append(run.piece(start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield tile
                tile, room = [], size
    if tile:
        yield tile


def _product(images: Side, texts: Side, tile: Tile, out: Tensor) -> Tensor:
    """words @ regionsᵀ, written to ``out`` (words, regions)."""
    words, regions = texts.rows[tile.words()], images.rows[tile.regions()]
    if words.dtype == out.dtype:
        return torch.mm(words, regions.t(), out=out)
    return out.copy_(words @ regions.t())


def _add_product(total: Tensor, x: Tensor, y: Tensor) -> None:
    """total += x @ y; the sum over tiles is kept in the dtype of ``total``."""
    if y.dtype == total.dtype:
        torch.addmm(total, x, y, out=total)
    else:
        total += x.to(y.dtype) @ y


def _shifted(rows: slice, start: int) -> slice:
    return slice(rows.start - start, rows.stop - start)


def _mask_of(side: Side, run: Run) -> Tensor | None:
    return None if side.mask is None else side.mask[run.items()]


def _margin(dtype: torch.dtype, texts: Side, images: Side, text_run: Run, image_run: Run) -> float | Tensor:
    """How far values that tie may be apart, per pair (t, i) of a block if their scale differs."""
    if texts.longest is None or images.longest is None:
        return tie_margin(dtype, None)
    lengths = texts.longest[text_run.items()].unsqueeze(1), images.longest[image_run.items()]
    return tie_margin(dtype, (lengths[0].to(dtype), lengths[1].to(dtype)))


def _real_of(side: Side, runs: list[Run]) -> Tensor | None:
    """Which places of a tile's maxima belong to real fragments; None = all."""
    width = max(run.width for run in runs)
    if side.real is None or (side.mask is None and all(run.width == width for run in runs)):
        return None
    return side.real[runs[0].start : runs[-1].stop, :width]


def _reordered(scores: PairScores, dim: int, order: Tensor | None) -> PairScores:
    return scores if order is None else PairScores(*(x.index_select(dim, order) for x in scores))
