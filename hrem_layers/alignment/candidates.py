r"""The alignment on chosen pairs only: every row has k candidates of the other modality.

The formulas are those of :mod:`hrem_layers.alignment.block`, and computed there, one direction at a time: the
fragments of the row receive (m of them), those of its candidate give (n of them). A block here is (b, m, k, n), m
fragments of b rows by n fragments of k candidates of each.

A dense product shares its operands among all pairs; here the candidates' fragments must be gathered first, k
times as many as there are. Both passes do so chunk by chunk, and the backward pass computes the similarities
again, so that the working memory is that of one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hrem_layers._core.checks import check_bool_tensor, check_choice, check_index_tensor, check_int, check_tensor
from hrem_layers._core.masked import zero_padding
from hrem_layers._core.numerics import autocast_off, compute_dtype, l2_normalize, product_dtype, rows_at
from hrem_layers.alignment.block import (
    Direction,
    Part,
    activate_,
    inverse_norms,
    maxima,
    maxima_and_winners,
    share_,
    similarity_grad,
)
from hrem_layers.alignment.pooling import pool, pool_backward, tie_margin
from hrem_layers.alignment.scores import MODES
from hrem_layers.alignment.sides import row_lengths

_DIRECTION = Direction(receive=1, give=3)
# numbers in one chunk's largest tensor (candidates' fragments or similarities) if the caller does not say
_CPU_CHUNK, _GPU_CHUNK = 2**21, 2**26


def align_candidates(
    receiving: Tensor,
    giving: Tensor,
    receiving_mask: Tensor | None,
    giving_mask: Tensor | None,
    index: Tensor,
    *,
    topk: int = 10,
    mode: str = "cosine",
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Aligns every row with its own k candidates.

    Args:
        receiving: (N, M, D) fragments of the rows.
        giving: (C, G, D) fragments of all that may be candidates, same device. Of two dtypes both become the
            wider; each gets its gradient in its own.
        receiving_mask: (N, M) bool, True = real; None = all real.
        giving_mask: (C, G) likewise.
        index: (N, k) integer in [0, C): the candidates of each row. Values out of range are an IndexError
            on a CPU and undefined on a GPU.
        topk: length of q, at least 1.
        mode: ``"cosine"``, ``"dot"`` or ``"scan"``.
        chunk_size: pairs aligned at one time, at least 1. None = as many as make 2 million numbers on a CPU,
            67 million elsewhere.

    Returns:
        p (N, k) and q (N, k, topk), as ``mean_*`` and ``top_*`` of
        :func:`hrem_layers.align_fragments` at the pairs of ``index``: with rows that are images those of
        image→text, with rows that are texts those of text→image; ties, zero vectors and what is not finite
        as there. float32 for half types, else the dtype of the fragments. Differentiable once with respect to
        the fragments.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value.
        IndexError: ``index`` names a candidate that is not there (on a CPU).
    """
    check_choice("mode", mode, MODES)
    check_int("topk", topk, minimum=1)
    if chunk_size is not None:
        check_int("chunk_size", chunk_size, minimum=1)
    check_tensor("receiving", receiving, ("N", "M", "D"))
    n, m, d = receiving.shape
    check_tensor("giving", giving, ("C", "G", d), device=receiving.device)
    if m < 1 or giving.shape[1] < 1 or d < 1:
        raise ValueError(
            f"receiving and giving must be at least 1 wide, got {m} and {giving.shape[1]} fragments and D = {d}"
        )
    for name, mask, x in (
        ("receiving_mask", receiving_mask, receiving),
        ("giving_mask", giving_mask, giving),
    ):
        if mask is not None:
            check_bool_tensor(name, mask, tuple(x.shape[:2]), device=receiving.device)
    check_index_tensor("index", index, (n, "k"), device=receiving.device)

    wide, dtype = _dtypes(receiving, giving)
    x, y = _prepare(receiving, receiving_mask, mode, wide, dtype), _prepare(giving, giving_mask, mode, wide, dtype)
    mean, top = _align_op(x, y, receiving_mask, giving_mask, index.long(), mode, topk, chunk_size)
    return mean, top


def _dtypes(receiving: Tensor, giving: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """What is computed in, and what is multiplied: a product in a half type would be rounded to it, so that autocast
    must ask for one."""
    dtype, rounded = product_dtype(receiving, giving)
    wide = compute_dtype(torch.promote_types(receiving.dtype, giving.dtype))
    return wide, dtype if rounded else wide


def _prepare(x: Tensor, mask: Tensor | None, mode: str, wide: torch.dtype, dtype: torch.dtype) -> Tensor:
    """Fragments (N, R, D) without what stands in the padding, in ``mode`` "cosine" and "scan" of length 1.

    Without a gradient, items are done a few at a time: the steps' copies of all would be the largest tensors of a large
    batch.
    """

    def some(items: slice) -> Tensor:
        z = zero_padding(x[items], None if mask is None else mask[items]).to(wide)
        if mode == "dot":  # a product of −inf would hide behind the other maxima
            return z.masked_fill(row_lengths(z.detach()).isnan(), torch.nan).to(dtype)
        return l2_normalize(z).to(dtype)

    budget = _CPU_CHUNK if x.device.type == "cpu" else _GPU_CHUNK
    if torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()) or x.numel() <= budget:
        return some(slice(None))
    out, items = x.new_empty(x.shape, dtype=dtype), max(1, budget // (x.shape[1] * x.shape[2]))
    for start in range(0, x.shape[0], items):
        out[start : start + items] = some(slice(start, start + items))
    return out


@torch.library.custom_op("hrem_layers::align_candidates", mutates_args=())
def _align_op(
    x: Tensor,
    y: Tensor,
    x_mask: Tensor | None,
    y_mask: Tensor | None,
    index: Tensor,
    mode: str,
    topk: int,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    _check_range(index, y)
    (n, k), dtype = index.shape, compute_dtype(x.dtype)
    mean, top = x.new_zeros(n, k, dtype=dtype), x.new_zeros(n, k, topk, dtype=dtype)
    with autocast_off(x.device):
        for rows, places in _chunks(x, y, index, chunk_size):
            here = index[rows, places]  # [b, k]
            s = activate_(_similarity(x[rows], y, here)[0], mode)
            (inverse,) = inverse_norms(s, mode, _DIRECTION)
            g = maxima(s, inverse, _giving(y_mask, here), _DIRECTION).transpose(1, 2)  # [b, k, m]
            pool(g, _receiving(x_mask, rows), mean[rows, places], top[rows, places])
    return mean, top


@_align_op.register_fake
def _(
    x: Tensor,
    y: Tensor,
    x_mask: Tensor | None,
    y_mask: Tensor | None,
    index: Tensor,
    mode: str,
    topk: int,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    n, k = index.shape
    dtype = compute_dtype(x.dtype)
    return x.new_empty(n, k, dtype=dtype), x.new_empty(n, k, topk, dtype=dtype)


@torch.library.custom_op("hrem_layers::align_candidates_backward", mutates_args=())
def _align_backward_op(
    x: Tensor,
    y: Tensor,
    x_mask: Tensor | None,
    y_mask: Tensor | None,
    index: Tensor,
    grad_mean: Tensor,
    grad_top: Tensor,
    mode: str,
    topk: int,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(x.dtype)
    grad_x, grad_y = torch.zeros_like(x, dtype=dtype), torch.zeros_like(y, dtype=dtype)
    longest = [row_lengths(z).squeeze(2).amax(dim=1) for z in (y, x)] if mode == "dot" else None  # [c], [n]
    with autocast_off(x.device):
        for rows, places in _chunks(x, y, index, chunk_size):
            here = index[rows, places]  # [b, k]
            s, chosen = _similarity(x[rows], y, here)
            activate_(s, mode)
            (inverse,) = inverse_norms(s, mode, _DIRECTION)
            margin = tie_margin(dtype, (longest[0][here], longest[1][rows].unsqueeze(1)) if longest else None)  # [b, k]
            margins = margin if isinstance(margin, float) else margin.unsqueeze(1)
            g, winners = maxima_and_winners(s, inverse, _giving(y_mask, here), _DIRECTION, margins)  # g: [b, m, k]
            grad_g = pool_backward(
                g.transpose(1, 2), _receiving(x_mask, rows), grad_mean[rows, places], grad_top[rows, places], margin
            ).transpose(1, 2)
            part = Part(share_(winners, grad_g, _DIRECTION), g, inverse, _DIRECTION)
            grad = similarity_grad(s, [part], mode, torch.empty_like(s)).flatten(2).to(x.dtype)  # [b, m, k * n]
            grad_x[rows] += grad @ chosen
            grad_chosen = (grad.transpose(1, 2) @ x[rows]).to(dtype)  # [b, k * n, d]
            grad_y.index_add_(0, here.reshape(-1), grad_chosen.view(-1, *y.shape[1:]))
    return grad_x.to(x.dtype), grad_y.to(y.dtype)


@_align_backward_op.register_fake
def _(x: Tensor, y: Tensor, *_rest: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), y.new_empty(y.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.mode, ctx.topk, ctx.chunk_size = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_mean: Tensor, grad_top: Tensor) -> tuple[Tensor | None, ...]:
    grads = _align_backward_op(*ctx.saved_tensors, grad_mean, grad_top, ctx.mode, ctx.topk, ctx.chunk_size)
    return *grads, None, None, None, None, None, None


_align_op.register_autograd(_backward, setup_context=_setup_context)


def _chunks(x: Tensor, y: Tensor, index: Tensor, chunk_size: int | None) -> Iterator[tuple[slice, slice]]:
    """Rows and places of ``index``: whole rows where a row fits into a chunk, pieces of one row otherwise."""
    n, k = index.shape
    if chunk_size is None:
        m, (_, w, d) = x.shape[1], y.shape
        budget = _CPU_CHUNK if x.device.type == "cpu" else _GPU_CHUNK
        chunk_size = max(1, budget // max(1, m * w, w * d))
    per_row = max(1, min(k, chunk_size))
    per_chunk = max(1, chunk_size // per_row)
    for start in range(0, n, per_chunk):
        for place in range(0, k, per_row):
            yield slice(start, start + per_chunk), slice(place, place + per_row)


def _similarity(x: Tensor, y: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """x (b, m, d), all y, index (b, k) -> similarities (b, m, k, n), the candidates' fragments (b, k * n, d)."""
    b, k = index.shape
    chosen = rows_at(y, index).flatten(1, 2)  # [b, k * n, d]
    s = x @ chosen.transpose(1, 2)
    return s.to(compute_dtype(s.dtype)).view(b, x.shape[1], k, y.shape[1]), chosen


def _receiving(mask: Tensor | None, rows: slice) -> Tensor | None:
    return None if mask is None else mask[rows].unsqueeze(1)  # [b, 1, m]


def _giving(mask: Tensor | None, index: Tensor) -> Tensor | None:
    return None if mask is None else rows_at(mask, index).unsqueeze(1)  # [b, 1, k, n]


def _check_range(index: Tensor, y: Tensor) -> None:
    if index.device.type == "cpu" and index.numel():
        smallest, largest = (int(x) for x in index.aminmax())
        if smallest < 0 or largest >= len(y):
            raise IndexError(
                f"index must name rows of giving, from 0 to {len(y) - 1}, got values from {smallest} to {largest}"
            )
