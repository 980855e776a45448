"""One modality's fragments as rows of a matrix, ready to be multiplied, and the way back for gradients.

Two layouts. *Packed* (CPU): only the real fragments are rows; items are sorted by their number of fragments,
so that each run of equal numbers is a block without padding. Where blocks would be too small for that to pay,
neighbouring numbers share a run, as wide as its widest item, and the others are filled up: with their first row
again, which changes no maximum, or with zeros, which add nothing to a norm. Finding the runs reads the mask, which on
a GPU would make the host wait; there, and wherever the host cannot look, the *padded* layout treats all items as one
run, filled up with zeros.

Rows of a side without a mask may stand *place by place*, the first fragment of every item, then the second: a CPU
takes the maximum over an item's fragments in long vectorised rows then, three times as fast.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hrem_layers._core.masked import zero_padding
from hrem_layers._core.numerics import compute_dtype, safe_reciprocal, unit_rows


class Run(NamedTuple):
    """Consecutive items of one side that have the same width (number of rows) in the product."""

    start: int  # first item, in the side's order
    stop: int
    row: int  # first row
    width: int
    padded: bool  # some of its items are narrower; else all rows are real

    def items(self) -> slice:
        return slice(self.start, self.stop)

    def rows(self) -> slice:
        return slice(self.row, self.row + (self.stop - self.start) * self.width)

    def piece(self, start: int, stop: int) -> Run:
        return Run(start, stop, self.row + (start - self.start) * self.width, self.width, self.padded)


class Side(NamedTuple):
    """One modality, ready to be multiplied."""

    rows: Tensor  # [total rows, d], normalised if the mode asks for it, in the dtype of the product
    inverse_norm: Tensor | None  # [rows that came, 1], 0 for a zero row; None = not normalised
    longest: Tensor | None  # [n]: length of each item's longest row; None = normalised
    runs: list[Run]
    real: Tensor | None  # [n, width]: where the items, in this order, have a fragment; None = everywhere
    order: Tensor | None  # [n]: which item stands at each place; None = as they came
    source: Tensor | None  # [rows that came]: from where in (n * width); None = all of them, in order
    place: Tensor | None  # [rows that came]: at which of the total rows each stands; None = one after another
    by_place: bool  # row = place * n + item; then there is one run
    copies: bool  # what fills up a run are copies; else zeros


def make_side(
    fragments: Tensor,
    mask: Tensor | None,
    *,
    packed: bool,
    normalize: bool,
    dtype: torch.dtype,
    most_runs: int | None = None,
    by_place: bool = False,
    copies: bool = False,
) -> Side:
    """fragments (n, width, d) and their mask (n, width) -> Side with rows in ``dtype``.

    ``most_runs``: of a packed side; None = as many as there are numbers of fragments. ``by_place``: rows place by
    place; only without a mask. ``copies``: fills up the runs of a packed side with copies, not with zeros.
    """
    assert not (by_place and mask is not None)
    n, width, d = fragments.shape
    order = source = place = None
    real = mask
    runs = [Run(0, n, 0, width, mask is not None)] if n else []
    if mask is None:
        rows = fragments.transpose(0, 1) if by_place else fragments.reshape(n * width, d)
    elif packed:
        runs, order, source, real = _find_runs(mask, most_runs)
        rows = fragments.reshape(n * width, d).index_select(0, source)
    else:
        rows = zero_padding(fragments, mask).reshape(n * width, d)
    inverse = longest = None
    if normalize:
        wide = rows.to(compute_dtype(dtype))
        owned = mask is not None or wide is not rows
        rows, inverse = _unit_rows(wide, owned=owned)
    else:
        lengths = row_lengths(rows)
        # a product of −inf would hide behind the other maxima
        rows, lengths = rows.masked_fill(lengths.isnan(), torch.nan), lengths.flatten()
        if source is not None and real is not None:
            lengths = lengths.new_zeros(n * width).masked_scatter_(real.flatten(), lengths)
        longest = lengths.view(width, n).amax(dim=0) if by_place else lengths.view(n, width).amax(dim=1)
    if by_place:
        rows, inverse = rows.reshape(n * width, d), None if inverse is None else inverse.reshape(n * width, 1)
    rows = rows.to(dtype)
    if packed and real is not None and any(run.padded for run in runs):
        place, filled = _fill_up(runs, real)
        rows = rows.index_select(0, filled) if copies else rows.new_zeros(len(filled), d).index_copy_(0, place, rows)
    return Side(rows, inverse, longest, runs, real, order, source, place, by_place, packed and copies)


def _unit_rows(rows: Tensor, *, owned: bool) -> tuple[Tensor, Tensor]:
    """:func:`unit_rows` of rows (..., d), with fewer passes over rows of usual lengths on a CPU. ``owned``: may be
    overwritten."""
    if rows.device.type == "cpu" and rows.numel():
        norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        shortest, longest = norm.aminmax()
        limits = torch.finfo(rows.dtype)
        if shortest > (limits.tiny / limits.eps) ** 0.5 and longest < limits.max**0.5:  # no square was lost; not NaN
            out = rows if owned else rows.new_empty(rows.shape)  # contiguous, whatever the rows are
            return torch.mul(rows, norm.reciprocal_(), out=out), norm
    return unit_rows(rows)


def row_lengths(rows: Tensor) -> Tensor:
    """‖row‖ (..., 1) of rows (..., d) of any length, in float32 or better; NaN for a row that is not finite."""
    return safe_reciprocal(unit_rows(rows.to(compute_dtype(rows.dtype)))[1], 0)


def fragments_grad(grad_rows: Tensor, side: Side, fragments: Tensor) -> Tensor:
    """The gradient of the rows, float32 or better (overwritten) -> that of the fragments (n, width, d)."""
    n, width, d = fragments.shape
    rows = side.rows
    if side.place is not None:
        rows, grad_rows = (x.index_select(0, side.place) for x in (rows, grad_rows))
    if side.inverse_norm is not None:  # x̂ = x / ‖x‖: (g − x̂ <x̂, g>) / ‖x‖
        rows = rows.to(grad_rows.dtype)
        along = torch.bmm(rows.unsqueeze(1), grad_rows.unsqueeze(2)).squeeze(2)  # a dot product per row
        grad_rows.addcmul_(rows, along, value=-1).mul_(side.inverse_norm)
    grad_rows = grad_rows.to(fragments.dtype)
    if side.source is not None:
        grad_rows = grad_rows.new_zeros(n * width, d).index_copy_(0, side.source, grad_rows)
    grad = grad_rows.view(width, n, d).transpose(0, 1) if side.by_place else grad_rows.view(n, width, d)
    packed = side.source is not None
    return grad if packed or side.real is None else grad.masked_fill_(~side.real.unsqueeze(-1), 0)


def _find_runs(mask: Tensor, most: int | None) -> tuple[list[Run], Tensor, Tensor, Tensor]:
    """The runs, ``most`` at the most, and the side's order, source and real places, of a mask on a CPU. In NumPy, whose
    small steps cost less."""
    width, places = mask.shape[1], mask.numpy()
    lengths = places.sum(axis=1)
    order = lengths.argsort(kind="stable")
    lengths = lengths[order]
    source = (order[:, None] * width + np.arange(width))[places[order]]  # [total real rows], item by item
    first, items = int(lengths.searchsorted(1)), len(lengths)  # what has no fragment is in no run
    starts = first + np.flatnonzero(np.diff(lengths[first:], prepend=0))
    if most is not None and len(starts) > most:
        starts = first + np.arange(most) * (items - first) // most
    runs, row = [], 0
    for start, stop in itertools.pairwise([*starts.tolist(), items]):
        shortest, longest = int(lengths[start]), int(lengths[stop - 1])
        runs.append(Run(start, stop, row, longest, shortest < longest))
        row += (stop - start) * longest
    real = np.arange(width) < lengths[:, None]
    return runs, torch.from_numpy(order), torch.from_numpy(source), torch.from_numpy(real)


def _fill_up(runs: list[Run], real: Tensor) -> tuple[Tensor, Tensor]:
    """Of runs where items lack rows: at which row each real one stands, and which of the real ones stands at each row,
    an item's first where it lacks one."""
    counts = [run.stop - run.start for run in runs]
    items = real.numpy()[runs[0].start :]
    in_run = np.arange(items.shape[1]) < np.repeat([run.width for run in runs], counts)[:, None]
    place = np.flatnonzero(items[in_run])
    lengths = items.sum(axis=1)
    firsts = lengths.cumsum() - lengths
    filled = firsts.repeat(in_run.sum(axis=1))
    filled[place] = np.arange(len(place))
    return torch.from_numpy(place), torch.from_numpy(filled)


def count_widths_and_rows(fragments: Tensor, mask: Tensor | None) -> tuple[int, int]:
    """How many different numbers of fragments (n, width, d) there are, and how many fragments, on a CPU."""
    if mask is None:
        return 1, fragments.shape[0] * fragments.shape[1]
    lengths = mask.numpy().sum(axis=1).tolist()
    return len(set(lengths)), sum(lengths)
