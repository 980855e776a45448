"""How all pairs are cut: images and texts into runs and sides, their product into tiles, a tile into blocks.

A tile is one matrix product; a block is the part of it between one run of texts and one run of images, small
enough for a core's own cache, and large enough that it pays to begin it.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt
from typing import NamedTuple

import torch
from torch import Tensor

from hrem_layers.alignment.block import Maxima
from hrem_layers.alignment.sides import Run, Side, count_widths_and_rows, make_side

# Similarities of a tile if the caller does not say. CPU: large enough for an efficient product, small enough
# for the last-level cache. Elsewhere: enough to fill the chip.
_CPU_TILE, _OTHER_TILE = 2**21, 2**24
_CPU_TILE_ROWS = 2304
# A CPU takes so many columns at one time when it reduces over rows; a number of images that is a multiple of it stands
# place by place.
_COLUMNS = 32
# Similarities of a block on a CPU (1 MB): about a core's second-level cache.
_CPU_BLOCK = 2**18
# A block of less takes longer to begin than to compute: then items of several widths share a run.
_CPU_LEAST_BLOCK = 2**16


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


def side_of(
    fragments: Tensor, mask: Tensor | None, setting: Setting, most_runs: int | None, *, by_place: bool = False
) -> Side:
    return make_side(
        fragments, mask, packed=setting.packed, normalize=setting.mode != "dot", dtype=setting.dtype,
        most_runs=most_runs, by_place=by_place, copies=setting.mode != "scan",
    )  # fmt: skip


def most_runs(
    image_fragments: Tensor, text_fragments: Tensor, image_mask: Tensor | None, text_mask: Tensor | None,
    setting: Setting,
) -> tuple[int | None, int | None]:  # fmt: skip
    """Of the images and of the texts, so that a block, a run of each, has something to compute; None = any number."""
    if not setting.packed:
        return None, None
    images, image_rows = count_widths_and_rows(image_fragments, image_mask)
    texts, text_rows = count_widths_and_rows(text_fragments, text_mask)
    blocks = max(1, image_rows * text_rows // _CPU_LEAST_BLOCK)
    if images * texts <= blocks:
        return None, None
    few = max(1, min(images, texts, isqrt(blocks)))
    many = blocks // few
    return (few, many) if images <= texts else (many, few)


def image_sides(
    fragments: Tensor, mask: Tensor | None, texts: Side, t: int, setting: Setting, most_runs: int | None
) -> Iterator[tuple[slice, Side]]:
    """The images that stand in one tile after another, ready to be multiplied. With a mask all at once: of more images
    more have equal numbers of regions."""
    i, r, _ = fragments.shape
    if mask is not None:
        yield slice(0, i), side_of(fragments, mask, setting, most_runs)
        return
    size = max(1, _sizes(r, texts.rows, i, t, setting)[0])
    start = 0
    while start < i:
        stop = min(i, start + size)
        if setting.chunk_size is None and i - stop < size // 2:  # what is left over is no tile of its own
            stop = i
        by_place = fragments.device.type == "cpu" and (stop - start) % _COLUMNS == 0
        yield slice(start, stop), side_of(fragments[start:stop], None, setting, None, by_place=by_place)
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


def tiles_of(images: Side, texts: Side, i: int, t: int, setting: Setting) -> Iterator[Tile]:
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


def _shifted(rows: slice, start: int) -> slice:
    return slice(rows.start - start, rows.stop - start)
