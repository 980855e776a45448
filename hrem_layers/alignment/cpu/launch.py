"""Launching the compiled kernels: when they apply, the matrix products around them, and their threads."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hrem_layers._core.numerics import compute_dtype, tie_tolerance
from hrem_layers.alignment.block import activate_
from hrem_layers.alignment.cpu.arguments import Array, ImageColumns, ScoreArrays, TextRows
from hrem_layers.alignment.cpu.layout import (
    Images,
    Rows,
    Texts,
    cut_evenly,
    lay_out_images,
    lay_out_texts,
    make_rows,
    rows_grad,
)
from hrem_layers.alignment.cuts import Setting
from hrem_layers.alignment.products import Store, add_product, write_product
from hrem_layers.alignment.scores import Scores

# Images of a chunk: enough for long vectorised loops. And similarities of a tile (12 MB of float32), for as many texts
# as an efficient product likes: each product makes a copy of the images' rows for itself.
_IMAGES, _TILE = 64, 3 * 2**20
# Similarities of a thread's share: fewer are done before a thread has begun.
_LEAST_SHARE = 2**18


def compiled_applies(image_fragments: Tensor, text_fragments: Tensor) -> bool:
    """Whether the kernels can do it: on a CPU, something to do, and Numba at hand."""
    i, t = image_fragments.shape[0], text_fragments.shape[0]
    return image_fragments.device.type == "cpu" and i > 0 and t > 0 and _has_numba()


def score_all_compiled(
    image_fragments: Tensor,
    text_fragments: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    setting: Setting,
    kept: Tensor,
) -> Scores | None:
    """As :func:`hrem_layers.alignment.tiles.score_all`; None where a product may not be finite, for which the kernels
    do not look."""
    from hrem_layers.alignment.cpu.kernel import pool_texts

    i, t, k = image_fragments.shape[0], text_fragments.shape[0], setting.topk
    given = _Given.of(image_fragments, text_fragments, image_mask, text_mask, setting)
    if given is None:
        return None
    make = kept.new_empty if given.complete else kept.new_zeros
    scores = Scores(*(make(shape) for shape in ((i, t), (t, i), (i, t, k), (t, i, k))))
    out, store = ScoreArrays(*(x.numpy() for x in scores)), Store(kept, filled=False)
    for images in given.chunks:
        rows = given.image_rows(images)
        if rows is None:
            return None
        columns = given.columns(images, rows)
        for tile in given.tiles:
            x, _ = store.take(given.words(tile), len(images.source))
            given.multiply(tile, rows, x)
            _for_each(
                given.shares(tile, x.numel()), functools.partial(pool_texts, x.numpy(), columns, *given.form, out)
            )
    kept[store.used :].zero_()
    return scores


def score_all_compiled_backward(
    image_fragments: Tensor,
    text_fragments: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    grads: Sequence[Tensor | None],
    setting: Setting,
    kept: Tensor,
) -> tuple[Tensor, Tensor] | None:
    """As :func:`hrem_layers.alignment.tiles.score_all_backward`, given the gradients of Scores; None where
    :func:`score_all_compiled` gave None."""
    from hrem_layers.alignment.cpu.kernel import pool_texts_grad

    given = _Given.of(image_fragments, text_fragments, image_mask, text_mask, setting)
    if given is None:
        return None
    i, t = image_fragments.shape[0], text_fragments.shape[0]
    scores = ScoreArrays(*(
        (kept.new_zeros(shape) if grad is None else grad.contiguous()).numpy()
        for grad, shape in zip(grads, ((i, t), (t, i), (i, t, 0), (t, i, 0)), strict=True)
    ))  # fmt: skip
    grad_images, grad_texts = kept.new_zeros(image_fragments.shape), kept.new_zeros(text_fragments.shape)
    grad_text_rows = torch.zeros_like(given.text_rows.rows, dtype=kept.dtype)
    store, scratch = Store(kept, filled=True), Store(kept.new_empty(0), filled=False)
    for images in given.chunks:
        rows = given.image_rows(images)
        if rows is None:
            return None
        columns, grad_rows = given.columns(images, rows), torch.zeros_like(rows.rows, dtype=kept.dtype)
        for tile in given.tiles:
            size = given.words(tile), len(images.source)
            (s, filled), (grad_x, _) = store.take(*size), scratch.take(*size)
            if not filled:
                given.multiply(tile, rows, s)
            arrays = s.numpy(), columns, *given.form, scores, grad_x.numpy()
            _for_each(given.shares(tile, s.numel()), functools.partial(pool_texts_grad, *arrays))
            grad_x, words = grad_x[:, : size[1]], given.rows(tile)
            add_product(grad_rows, grad_x.t(), given.text_rows.rows[words])
            add_product(grad_text_rows[words], grad_x, rows.rows)
        rows_grad(grad_rows, rows, images.source, grad_images)
    rows_grad(grad_text_rows, given.text_rows, given.texts.source, grad_texts)
    return grad_images.to(image_fragments.dtype), grad_texts.to(text_fragments.dtype)


class _Given(NamedTuple):
    """What is to be aligned: texts ready to be multiplied, images to be made ready chunk by chunk."""

    setting: Setting
    image_fragments: Tensor
    texts: Texts
    text_rows: Rows
    text_scale: Array  # [t]
    chunks: list[Images]
    tiles: list[slice]  # of the texts: each tile is some of them with a chunk
    complete: bool  # no text without a word, no image without a region

    @classmethod
    def of(
        cls,
        image_fragments: Tensor,
        text_fragments: Tensor,
        image_mask: Tensor | None,
        text_mask: Tensor | None,
        setting: Setting,
    ) -> _Given | None:
        """None if a word is not finite."""
        texts = lay_out_texts(text_fragments, text_mask)
        rows = make_rows(text_fragments, texts.source, normalize=setting.mode != "dot", dtype=setting.dtype)
        if rows is None:
            return None
        t, tolerance = len(texts.texts), tie_tolerance(setting.dtype)
        scale = np.full(t, tolerance) if rows.lengths is None else texts.longest(rows.lengths) * tolerance
        scale = scale.astype(np.float64 if setting.dtype == torch.float64 else np.float32)
        chunks = lay_out_images(image_fragments, image_mask, min(_IMAGES, setting.chunk_size or _IMAGES))
        images, regions = (len(chunks[0].images), len(chunks[0].source)) if chunks else (1, 1)
        if setting.chunk_size is None:
            per_tile = -(-t // max(1, round(len(texts.source) * regions / _TILE)))
        else:
            per_tile = setting.chunk_size // images
        complete = t == len(text_fragments) and sum(len(x.images) for x in chunks) == len(image_fragments)
        return cls(setting, image_fragments, texts, rows, scale, chunks, cut_evenly(t, max(1, per_tile)), complete)

    @property
    def form(self) -> tuple[bool, float]:
        return self.setting.mode == "scan", torch.finfo(compute_dtype(self.setting.dtype)).eps ** 2

    def image_rows(self, images: Images) -> Rows | None:
        """None if a region or, in mode "dot", its product with a word may not be finite."""
        normalize, dtype = self.setting.mode != "dot", self.setting.dtype
        rows = make_rows(self.image_fragments, images.source, normalize=normalize, dtype=dtype)
        if rows is not None and rows.lengths is not None and self.text_rows.lengths is not None:
            longest = float(rows.lengths.max()), float(self.text_rows.lengths.max(initial=0))
            if not max(*longest, longest[0] * longest[1]) < torch.finfo(dtype).max / 2:  # nor is it in a half type
                return None
        return rows

    def columns(self, images: Images, rows: Rows) -> ImageColumns:
        n, dtype = len(images.images), self.text_scale.dtype
        scale = np.ones(n, dtype) if rows.lengths is None else images.longest(rows.lengths).astype(dtype)
        return ImageColumns(images.images, images.lengths, images.places, scale)

    def rows(self, tile: slice) -> slice:
        """Which of the texts' rows a tile has."""
        return slice(int(self.texts.starts[tile.start]), int(self.texts.starts[tile.stop]))

    def words(self, tile: slice) -> int:
        return int(self.texts.starts[tile.stop] - self.texts.starts[tile.start])

    def multiply(self, tile: slice, images: Rows, out: Tensor) -> None:
        """Writes s."""
        out = out[:, : len(images.rows)]
        activate_(write_product(self.text_rows.rows[self.rows(tile)], images.rows, out), self.setting.mode)

    def shares(self, tile: slice, similarities: int) -> list[TextRows]:
        """The tile's texts, cut for the threads."""
        starts = self.texts.starts[tile.start : tile.stop + 1]
        given = TextRows(self.texts.texts[tile], starts - starts[0], self.text_scale[tile])
        threads = min(torch.get_num_threads(), tile.stop - tile.start, similarities // _LEAST_SHARE)
        if threads <= 1:
            return [given]
        cuts = given.starts.searchsorted(np.linspace(0, given.starts[-1], threads + 1)).tolist()
        return [
            TextRows(given.texts[a:b], given.starts[a : b + 1], given.scale[a:b])
            for a, b in itertools.pairwise(cuts)
            if a < b
        ]


def _for_each(shares: list[TextRows], work: Callable[[TextRows], None]) -> None:
    """One in this thread, each of the others in one of its own: the kernels let go of Python's lock."""
    if len(shares) == 1:
        work(shares[0])
        return
    with ThreadPoolExecutor(len(shares) - 1) as pool:
        others = [pool.submit(work, share) for share in shares[1:]]
        work(shares[0])
    for other in others:
        other.result()


@functools.cache
def _has_numba() -> bool:
    """Whether Numba is there and can be imported; a release that does not go with this NumPy cannot."""
    if importlib.util.find_spec("numba") is None:
        return False
    try:
        importlib.import_module("numba")
    except Exception as error:
        warnings.warn(
            f"Numba is installed, but cannot be imported ({error}): align_fragments runs on a CPU without it, slower",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True
