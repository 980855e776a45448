"""From one value per fragment that receives to p and q: means and largest values, forward and backward.

``values`` is (a, b, m), for each of a · b pairs the values of m fragments; ``real`` says which of them count and
broadcasts to it, None = all. This is the one pooling of the alignment, and :func:`tie_margin` its one rule of what
counts as equal: what a few units in the last place decide would be decided by chance.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import Tensor

from hrem_layers._core.numerics import tie_tolerance

# NumPy sorts short rows with vector instructions, seven times faster than torch.topk selects from them, but on one
# thread: with more than this many, topk on all of them is as good.
_SORT_THREADS = 4


def tie_margin(dtype: torch.dtype, lengths: tuple[Tensor, Tensor] | None) -> float | Tensor:
    """How far two values of a pair may be apart and still be equal: the tolerance of their dtype times their scale.

    The scale is 1 for what comes from cosines (``lengths`` None). Products of vectors are rounded in proportion to
    the vectors' lengths: there ``lengths`` are those of the longest fragments of both items, broadcast to (a, b), and
    each pair has a margin of its own.
    """
    tolerance = tie_tolerance(dtype)
    return tolerance if lengths is None else lengths[0] * tolerance * lengths[1]


def pool(values: Tensor, real: Tensor | None, out_mean: Tensor, out_top: Tensor, *, clean: bool = False) -> None:
    """Writes the mean (a, b) and the largest values (a, b, k), in descending order, of the real ``values``.

    ``out_top`` must hold zeros; places for which there is no value are left alone. ``clean``: values that are not real
    are 0.
    """
    k = min(out_top.shape[-1], values.shape[-1])
    if real is None:
        out_mean.copy_(values.mean(dim=-1))
        _write_largest(values, k, out_top)
        return
    count = real.sum(dim=-1)
    values = values.contiguous()  # words come transposed; and the sum along memory is rounded less
    filled = values if clean else values.masked_fill(~real, 0)
    out_mean.copy_(filled.sum(dim=-1) / count.clamp(min=1))
    if clean:  # adding is faster than filling
        least = torch.zeros_like(real, dtype=values.dtype).masked_fill_(~real, -torch.inf)
        filled = values + least
    else:
        filled.masked_fill_(~real, -torch.inf)
    _write_largest(filled, k, out_top, owned=True).masked_fill_(~_taken(count, k), 0)


def _write_largest(values: Tensor, k: int, out: Tensor, *, owned: bool = False) -> Tensor:
    """The k largest of values (..., m), in descending order, NaN larger than all, to out (..., :k), which is returned.

    ``owned``: ``values`` may be overwritten.
    """
    out = out[..., :k]
    if not _sorts_well(values):
        return out.copy_(values.topk(k, dim=-1).values)
    if not (owned and values.is_contiguous()):
        values = values.clone(memory_format=torch.contiguous_format)
    rows = values.numpy()
    rows.sort(axis=-1)
    np.copyto(out.numpy(), rows[..., : -k - 1 : -1])
    return out


def largest_and_places(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same, and where they stand (int64); of equal ones any may come first."""
    if not _sorts_well(values) or values.dtype != torch.float32:
        found = values.topk(k, dim=-1)
        return found.values, found.indices
    # A float's bits, those of a negative one turned over, are a whole number of the same order (a NaN's once its sign
    # is plus). With the place below it in 64 bits, one sort gives both.
    bits = values.masked_fill(values.isnan(), torch.nan).contiguous().view(torch.int32)
    keys = torch.empty(*values.shape, 2, dtype=torch.int32, device="cpu")
    low, high = (0, 1) if sys.byteorder == "little" else (1, 0)
    torch.bitwise_xor(bits, (bits >> 31) & 0x7FFFFFFF, out=keys[..., high])
    keys[..., low] = torch.arange(values.shape[-1], dtype=torch.int32, device="cpu")
    order = torch.from_numpy(np.sort(keys.view(torch.int64).squeeze(-1).numpy(), axis=-1))[..., -k:].flip(-1)
    places = order & 0xFFFFFFFF
    return values.gather(-1, places), places


def _sorts_well(values: Tensor) -> bool:
    return values.device.type == "cpu" and torch.get_num_threads() <= _SORT_THREADS


def pool_backward(
    values: Tensor, real: Tensor | None, grad_mean: Tensor | None, grad_top: Tensor | None, margin: float | Tensor
) -> Tensor:
    """The gradient (a, b, m) of the values. Each place of q gives its own evenly to all values that tie with it.

    ``margin`` is that of :func:`tie_margin`, a number or (a, b). None: no gradient flows back from p, or from q.
    """
    grad = torch.zeros_like(values) if grad_mean is None else _mean_backward(values, real, grad_mean)
    if grad_top is None:
        return grad
    m = values.shape[-1]
    k = min(grad_top.shape[-1], m)
    grad_top = grad_top[..., :k]
    if real is not None:
        grad_top = grad_top.masked_fill(~_taken(real.sum(dim=-1), k), 0)
        values = values.masked_fill(~real, -torch.inf)
    top, index = largest_and_places(values, min(k + 1, m))
    margin = margin if isinstance(margin, float) else margin.unsqueeze(-1)
    if values.device.type != "cpu":  # no look at the values, which would wait for them
        return grad.add_(_shared(values, top[..., :k], grad_top, margin))
    tied = (top[..., :-1] - top[..., 1:] <= margin).any(dim=-1)
    grad.scatter_add_(-1, index[..., :k], grad_top.masked_fill(tied.unsqueeze(-1), 0))
    rows = tied.nonzero(as_tuple=True)  # few, as a rule
    if rows[0].numel():
        margin = margin if isinstance(margin, float) else margin[rows]
        grad[rows] += _shared(values[rows], top[..., :k][rows], grad_top[rows], margin)
    return grad


def _mean_backward(values: Tensor, real: Tensor | None, grad_mean: Tensor) -> Tensor:
    if real is None:
        return (grad_mean / values.shape[-1]).unsqueeze(-1).expand(values.shape).contiguous()
    share = grad_mean / real.sum(dim=-1).clamp(min=1)
    return share.unsqueeze(-1).masked_fill(~real, 0).contiguous()


def _shared(values: Tensor, largest: Tensor, grad_top: Tensor, margin: float | Tensor) -> Tensor:
    """The gradients (..., k) of the places, each shared among the values (..., m) that tie with what stands there."""
    grad = torch.zeros_like(values)
    for place in range(largest.shape[-1]):
        tied = (values - largest[..., place : place + 1]).abs() <= margin
        share = grad_top[..., place : place + 1] / tied.sum(dim=-1, keepdim=True).clamp(min=1)
        grad.add_(torch.where(tied, share, 0))
    return grad


def _taken(count: Tensor, k: int) -> Tensor:
    """Which of k sorted places hold a real value, given how many real values there are."""
    return torch.arange(k, device=count.device) < count.unsqueeze(-1)
