r"""The alignment on chosen pairs only: every row has k candidates of the other modality.

The formulas are those of :mod:`hrem_layers.alignment`, one direction at a time. Let x be the fragments of the
item that receives (m of them) and y those of one candidate (n of them), s their similarities (m, n) after the
LeakyReLU. Both directions of the dense alignment are then the same:

.. math:: b_{mn} = s_{mn} / \lVert s_{\cdot n} \rVert, \quad g_m = \max_n b_{mn},

the norm over the fragments that receive; p is the mean and q the largest values of g. ("cosine" and "dot": b = s.)

A dense product shares its operands among all pairs; here the candidates' fragments must be gathered first, k
times as many as there are. Both passes do so chunk by chunk, and the backward pass computes the similarities
again, so that the working memory is that of one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from hrem_layers._core.checks import check_bool_tensor, check_choice, check_int, check_tensor, describe
from hrem_layers._core.masked import zero_padding
from hrem_layers._core.numerics import autocast_dtype, autocast_off, compute_dtype, l2_normalize, safe_reciprocal
from hrem_layers.alignment.block import LEAKY_SLOPE, MODES

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
    mode: str = "scan",
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Aligns every row with its own k candidates.

    Args:
        receiving: (N, M, D) fragments of the rows.
        giving: (C, G, D) fragments of all that may be candidates, same dtype and device.
        receiving_mask: (N, M) bool, True = real; None = all real.
        giving_mask: (C, G) likewise.
        index: (N, k) integer in [0, C): the candidates of each row. Values out of range are an IndexError
            on a CPU and undefined on a GPU.
        topk: length of q, at least 1.
        mode: ``"scan"``, ``"cosine"`` or ``"dot"``.
        chunk_size: pairs aligned at one time, at least 1. None = as many as make 2 million numbers on a CPU,
            67 million elsewhere.

    Returns:
        p (N, k) and q (N, k, topk), as ``mean_*`` and ``top_*`` of
        :func:`hrem_layers.align_fragments` at the pairs of ``index``: with rows that are images those of
        image→text, with rows that are texts those of text→image. float32 for half types, else the dtype
        of the fragments. Differentiable once with respect to the fragments.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value.
    """
    check_choice("mode", mode, MODES)
    check_int("topk", topk, minimum=1)
    if chunk_size is not None:
        check_int("chunk_size", chunk_size, minimum=1)
    check_tensor("receiving", receiving, ("N", "M", "D"))
    n, m, d = receiving.shape
    check_tensor("giving", giving, ("C", "G", d), device=receiving.device)
    dtype = _product_dtype(receiving)
    if _product_dtype(giving) != dtype:
        raise TypeError(f"giving must have the dtype of receiving, {receiving.dtype}, got {giving.dtype}")
    if min(m, giving.shape[1]) < 1:
        raise ValueError(f"receiving and giving must be at least 1 wide, got {m} and {giving.shape[1]} fragments")
    for name, mask, x in (
        ("receiving_mask", receiving_mask, receiving),
        ("giving_mask", giving_mask, giving),
    ):
        if mask is not None:
            check_bool_tensor(name, mask, tuple(x.shape[:2]), device=receiving.device)
    if not isinstance(index, Tensor) or index.dtype != torch.long or index.dim() != 2 or index.shape[0] != n:
        came = describe(index) if isinstance(index, Tensor) else type(index).__name__
        raise ValueError(f"index must be an int64 tensor of shape ({n}, k), got {came}")

    receiving, giving = zero_padding(receiving, receiving_mask), zero_padding(giving, giving_mask)
    if mode != "dot":
        receiving, giving = l2_normalize(receiving), l2_normalize(giving)
    receiving, giving = receiving.to(dtype), giving.to(dtype)
    return _align_op(receiving, giving, receiving_mask, giving_mask, index, mode, topk, chunk_size)


def _product_dtype(fragments: Tensor) -> torch.dtype:
    """As in the dense alignment: autocast's dtype, if it is on and concerns them, else their own."""
    dtype = autocast_dtype(fragments.device)
    return fragments.dtype if dtype is None or fragments.dtype == torch.float64 else dtype


def scatter_rows(values: Tensor, index: Tensor) -> Tensor:
    """``values`` (N, k) at the columns ``index`` (N, k) of an (N, N) matrix of zeros (False)."""
    n = values.shape[0]
    return values.new_zeros(n, n).scatter(1, index, values)


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
    (n, k), dtype = index.shape, compute_dtype(x.dtype)
    mean, top = x.new_zeros(n, k, dtype=dtype), x.new_zeros(n, k, topk, dtype=dtype)
    with autocast_off(x.device):
        for rows, places in _chunks(x, y, index, chunk_size):
            similarity, _ = _similarity(x[rows], y, index[rows, places])
            g, _, _ = _best(similarity, _pick(y_mask, index[rows, places]), mode)
            mean[rows, places], top[rows, places] = _pool(g, _rows(x_mask, rows), topk)
    return mean, top


@_align_op.register_fake
def _(x, y, x_mask, y_mask, index, mode, topk, chunk_size):
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
    with autocast_off(x.device):
        for rows, places in _chunks(x, y, index, chunk_size):
            here = index[rows, places]  # [b, k]
            similarity, chosen = _similarity(x[rows], y, here)
            g, b, (best, inverse) = _best(similarity, _pick(y_mask, here), mode)
            grad_g = _pool_backward(g, _rows(x_mask, rows), grad_mean[rows, places], grad_top[rows, places], topk)
            grad = torch.zeros_like(b).scatter_(3, best, grad_g.transpose(1, 2).unsqueeze(3))
            if inverse is not None:  # d(s / ‖s‖) = (grad - b <grad, b>) / ‖s‖ along the normed dimension
                grad = grad.sub_((grad * b).sum(dim=1, keepdim=True) * b).mul_(inverse)
                # ``False``: similarity is what went in. torch.where(..., LEAKY_SLOPE) would round it to float32
                grad = torch.ops.aten.leaky_relu_backward(grad, similarity, LEAKY_SLOPE, False)
            grad = grad.flatten(2).to(x.dtype)  # [b, m, k * n]
            grad_x[rows] += grad @ chosen
            grad_chosen = (grad.transpose(1, 2) @ x[rows]).to(dtype)  # [b, k * n, d]
            grad_y.index_add_(0, here.reshape(-1), grad_chosen.view(-1, *y.shape[1:]))
    return grad_x.to(x.dtype), grad_y.to(y.dtype)


@_align_backward_op.register_fake
def _(x, y, *_rest):
    return x.new_empty(x.shape), y.new_empty(y.shape)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.mode, ctx.topk, ctx.chunk_size = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_mean, grad_top):
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
    chosen = y[index].flatten(1, 2)  # [b, k * n, d]
    s = x @ chosen.transpose(1, 2)
    return s.to(compute_dtype(s.dtype)).view(b, x.shape[1], k, y.shape[1]), chosen


def _best(s: Tensor, giving_mask: Tensor | None, mode: str) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor | None]]:
    """g (b, k, m), b (b, m, k, n) and, for the derivative, where the maximum stands and the reciprocal norms."""
    inverse = None
    if mode == "scan":
        s = F.leaky_relu(s, LEAKY_SLOPE)
        norm = (s * s).sum(dim=1, keepdim=True).sqrt_()
        inverse = safe_reciprocal(norm, torch.finfo(s.dtype).eps)  # as in the dense alignment
        s = s * inverse
    filled = s if giving_mask is None else s.masked_fill(~giving_mask.unsqueeze(1), -torch.inf)
    g, best = filled.max(dim=3, keepdim=True)
    if giving_mask is not None:
        g = g.masked_fill(g == -torch.inf, 0)  # a candidate without any real fragment
    return g.squeeze(3).transpose(1, 2), s, (best, inverse)


def _pool(g: Tensor, mask: Tensor | None, topk: int) -> tuple[Tensor, Tensor]:
    """Mean (b, k) and ``topk`` largest (b, k, topk) of g (b, k, m) over the real m; ``mask`` (b, 1, m)."""
    take = min(topk, g.shape[2])
    if mask is None:
        mean, top = g.mean(dim=2), g.topk(take, dim=2).values
    else:
        count = mask.sum(dim=2)  # [b, 1]
        mean = g.masked_fill(~mask, 0).sum(dim=2) / count.clamp(min=1)
        top = g.masked_fill(~mask, -torch.inf).topk(take, dim=2).values.masked_fill(~_taken(count, take), 0)
    return mean, F.pad(top, (0, topk - take))


def _pool_backward(g: Tensor, mask: Tensor | None, grad_mean: Tensor, grad_top: Tensor, topk: int) -> Tensor:
    take = min(topk, g.shape[2])
    grad_top = grad_top[..., :take]
    if mask is None:
        grad = (grad_mean / g.shape[2]).unsqueeze(2).expand(g.shape).contiguous()
    else:
        count = mask.sum(dim=2)
        grad = (grad_mean / count.clamp(min=1)).unsqueeze(2).masked_fill(~mask, 0).contiguous()
        grad_top = grad_top.masked_fill(~_taken(count, take), 0)
        g = g.masked_fill(~mask, -torch.inf)
    return grad.scatter_add_(2, g.topk(take, dim=2).indices, grad_top)


def _taken(count: Tensor, k: int) -> Tensor:
    """Which of k sorted places hold a real value: count (b, 1) -> (b, 1, k)."""
    return torch.arange(k, device=count.device) < count.unsqueeze(2)


def _rows(mask: Tensor | None, rows: slice) -> Tensor | None:
    return None if mask is None else mask[rows].unsqueeze(1)  # [b, 1, m]


def _pick(mask: Tensor | None, index: Tensor) -> Tensor | None:
    return None if mask is None else mask[index]  # [b, k, n]
