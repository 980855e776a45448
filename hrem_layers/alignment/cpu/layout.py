"""Real fragments as rows of a matrix, in the order in which the compiled kernels read them, and the way back."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hrem_layers._core.numerics import compute_dtype, unit_rows
from hrem_layers.alignment.cpu.arguments import Array
from hrem_layers.alignment.sides import row_lengths


class Texts(NamedTuple):
    """All texts that have a word, their rows item by item."""

    texts: Array  # [t]: which they are
    starts: Array  # [t + 1]: at which row each begins
    source: Array  # [rows]: from where in (T * W)

    def longest(self, lengths: Array) -> Array:
        """The largest of each text's rows."""
        return np.maximum.reduceat(lengths, self.starts[:-1])


class Images(NamedTuple):
    """Some images, those with most regions first, their rows place by place."""

    images: Array  # [n]: which they are
    lengths: Array  # [n]: their numbers of regions, descending, at least 1
    places: Array  # [longest + 1]: at which row each place begins
    source: Array  # [rows]: from where in (I * R)

    def longest(self, lengths: Array) -> Array:
        """The largest of each image's rows."""
        first = lengths[: len(self.images)].copy()
        for start, stop in zip(self.places[1:-1], self.places[2:], strict=True):
            np.maximum(first[: stop - start], lengths[start:stop], out=first[: stop - start])
        return first


class Rows(NamedTuple):
    """Ready to be multiplied."""

    rows: Tensor  # [rows, d], normalised if the mode asks for it, in the dtype of the product
    inverse_norm: Array | None  # [rows], 0 for a zero row; None = not normalised
    lengths: Array | None  # [rows]; None = normalised


def lay_out_texts(fragments: Tensor, mask: Tensor | None) -> Texts:
    n, width, _ = fragments.shape
    if mask is None:
        return Texts(np.arange(n), np.arange(n + 1) * width, np.arange(n * width))
    lengths = mask.numpy().sum(axis=1)
    texts = np.flatnonzero(lengths)
    return Texts(texts, np.concatenate([[0], lengths[texts].cumsum()]), np.flatnonzero(mask.numpy()))


def lay_out_images(fragments: Tensor, mask: Tensor | None, most: int) -> list[Images]:
    """All images that have a region, cut evenly into chunks of ``most`` images at the most."""
    n, width, _ = fragments.shape
    if mask is None:
        places = np.arange(width)
        return [
            Images(images, np.full(len(images), width), np.arange(width + 1) * len(images),
                   (images * width + places[:, None]).ravel())
            for images in (np.arange(part.start, part.stop) for part in cut_evenly(n, most))
        ]  # fmt: skip
    lengths = mask.numpy().sum(axis=1)
    order = np.argsort(-lengths, kind="stable")[: np.count_nonzero(lengths)]
    return [_place_by_place(order[part], lengths[order[part]], mask.numpy()) for part in cut_evenly(len(order), most)]


def _place_by_place(images: Array, lengths: Array, mask: Array) -> Images:
    there = np.arange(lengths[0])[:, None] < lengths  # [place, image]
    real_first = np.argsort(~mask[images], axis=1, kind="stable").T
    source = (images * mask.shape[1] + real_first[: lengths[0]])[there]
    return Images(images, lengths, np.concatenate([[0], there.sum(axis=1).cumsum()]), source)


def cut_evenly(n: int, most: int) -> list[slice]:
    size = -(-n // -(-n // most)) if n else 1
    return [slice(start, min(n, start + size)) for start in range(0, n, size)]


def make_rows(fragments: Tensor, source: Array, *, normalize: bool, dtype: torch.dtype) -> Rows | None:
    """Rows in ``dtype``; None if one of them is not finite."""
    from hrem_layers.alignment.cpu.unit_rows import unit_rows as usual_unit_rows

    flat = fragments.detach().reshape(-1, fragments.shape[-1])
    if not normalize:
        rows = flat.index_select(0, torch.from_numpy(source))
        lengths = row_lengths(rows).flatten().numpy()
        return Rows(rows.to(dtype), None, lengths) if np.isfinite(lengths).all() else None
    wide = flat.to(compute_dtype(dtype)).contiguous()
    rows, limits = wide.new_empty(len(source), wide.shape[1]), torch.finfo(wide.dtype)
    inverse = np.empty(len(source), rows.numpy().dtype)
    if not usual_unit_rows(wide.numpy(), source, limits.tiny / limits.eps, limits.max, rows.numpy(), inverse):
        rows, found = unit_rows(wide.index_select(0, torch.from_numpy(source)))  # of any lengths
        inverse = found.flatten().numpy()
        if not rows.isfinite().all():
            return None
    return Rows(rows.to(dtype), inverse, None)


def rows_grad(grad: Tensor, rows: Rows, source: Array, out: Tensor) -> None:
    """Writes the gradient of rows to ``out`` (n, width, d), where they came from; both in float32 or better."""
    from hrem_layers.alignment.cpu.unit_rows import unit_rows_grad

    if rows.inverse_norm is None:
        out.flatten(0, 1).index_copy_(0, torch.from_numpy(source), grad)
    else:
        unit = rows.rows.to(grad.dtype)
        unit_rows_grad(unit.numpy(), grad.numpy(), rows.inverse_norm, source, out.flatten(0, 1).numpy())
