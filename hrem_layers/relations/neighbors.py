"""The k nearest rows, found a chunk of rows at a time: never all similarities in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from hrem_layers._core.neighbors import neighbor_products
from hrem_layers._core.numerics import autocast_off, l2_normalize, tie_tolerance

# similarities held at one time
_CPU_CHUNK, _GPU_CHUNK = 2**21, 2**26
# numbers of rows that are normalised at one time
_UNITS_CHUNK = 2**19


def exact_units(embedding: Tensor) -> Tensor:
    """Rows of length 1 in float64 where the device has it: near 1 a distance needs what float32 rounds away.

    Without a gradient some rows at a time: the steps' copies of all would be as large as the result.
    """
    dtype = torch.float32 if embedding.device.type == "mps" else torch.float64
    rows = max(1, _UNITS_CHUNK // max(1, embedding.shape[1]))
    kept = torch.compiler.is_compiling() or (embedding.requires_grad and torch.is_grad_enabled())
    if kept or embedding.shape[0] <= rows:
        return l2_normalize(embedding.to(dtype))
    out = embedding.new_empty(embedding.shape, dtype=dtype)
    for start in range(0, embedding.shape[0], rows):
        out[start : start + rows] = l2_normalize(embedding[start : start + rows].to(dtype))
    return out


def edge_cosines(x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    """Products of rows of :func:`exact_units`, x (n, D) with their own few of y (m, D): index (n, k) -> (n, k)."""
    return neighbor_products(x.unsqueeze(1), y.unsqueeze(1), index).squeeze(-1)


def nearest_rows(x: Tensor, y: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """For each row of ``x`` (n, D) the ``k`` rows of ``y`` (m, D) with the largest product; no gradient.

    The choice is that of :func:`hrem_layers.relations.nearest` on products rounded to ``dtype``: those up to a few ulp
    of 1 apart tie. It keeps all that tie with the k-th; a list of k places cannot. Where more tie than fit, the places
    left go to those of the smallest numbers: which edges there are then depends on the order of the batch, but never
    on rounding. NaN counts as near, so that it goes on to whatever is computed over the edges.

    Args:
        x: (n, D), rows of length 1 (or 0), in the dtype to multiply in.
        y: (m, D) likewise.
        k: from 1 to m.
        dtype: floating point.

    Returns:
        (n, k) int64, each row in ascending order.
    """
    out: Tensor = _nearest_rows(x.detach(), y.detach(), k, dtype)
    return out


@torch.library.custom_op("hrem_layers::nearest_rows", mutates_args=())
def _nearest_rows(x: Tensor, y: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    n, m = x.shape[0], y.shape[0]
    if k >= m:
        return torch.arange(m, device=x.device).expand(n, m).contiguous()
    on_cpu = x.device.type == "cpu"
    per_chunk = max(1, (_CPU_CHUNK if on_cpu else _GPU_CHUNK) // m)
    out = torch.empty(n, k, dtype=torch.long, device=x.device)
    tolerance, columns = tie_tolerance(dtype), torch.arange(m, dtype=torch.int32, device=x.device)
    with autocast_off(x.device):
        for start in range(0, n, per_chunk):
            similarity = (x[start : start + per_chunk] @ y.t()).to(dtype)
            values, index = similarity.topk(k + 1, dim=1)
            last = values[:, k - 1 : k]
            crowded = ~(values[:, k:] < last - tolerance)  # [b, 1]: the k-th place is contested
            found = index[:, :k]
            if not on_cpu:  # a look at the values would make it wait: settle every row
                found = torch.where(crowded, _settle(similarity, last, tolerance, columns, k), found)
            elif bool(crowded.any()):
                rows = crowded.squeeze(1)
                found[rows] = _settle(similarity[rows], last[rows], tolerance, columns, k)
            out[start : start + per_chunk] = found.sort(dim=1).values
    return out


@_nearest_rows.register_fake
def _(x: Tensor, y: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty((x.shape[0], min(k, y.shape[0])), dtype=torch.long)


def _settle(similarity: Tensor, last: Tensor, tolerance: float, columns: Tensor, k: int) -> Tensor:
    """The k of each row: what is above those that tie with the k-th, then these, smaller numbers first."""
    m = similarity.shape[1]
    above, near = ~(similarity <= last + tolerance), ~(similarity < last - tolerance)
    return (m * (above.int() + near.int()) - columns).topk(k, dim=1).indices
