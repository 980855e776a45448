"""Scaled dot-product attention in bounded memory where PyTorch's kernels have none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hrem_layers._core.numerics import autocast_off, compute_dtype

# Attention weights that are held at one time on a CPU (2 MB of float32)
_WEIGHTS_AT_ONCE = 2**19


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
    r""":math:`\mathrm{dropout}(\mathrm{softmax}(q k^\top / \sqrt d + \mathrm{bias}))\, v`.

    q (..., n, d), k and v (..., m, d), bias broadcastable to (..., n, m) or None -> (..., n, d).

    PyTorch's fused kernels for CPUs have no gradient for the bias and no dropout; with either, autograd keeps
    several copies of all weights. If there are many, they are therefore computed a part at a time, and again in
    backward (which is then differentiable once). Under ``torch.compile`` the choice is left to the compiler.
    """
    learned = bias is not None and bias.requires_grad and torch.is_grad_enabled()
    if q.device.type == "cpu" and (learned or dropout) and not torch.compiler.is_compiling():
        cut = _cut(q.shape, k.shape[-2])
        if cut is not None:
            out: Tensor = _AttendInParts.apply(q, k, v, bias, dropout, cut)  # type: ignore[no-untyped-call]
            return out
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)


class _Cut(NamedTuple):
    """A part is ``items`` consecutive items of the first dimension (heads, or a batch of them) and ``rows`` queries."""

    items: int
    rows: int


class _Part(NamedTuple):
    items: slice
    rows: slice
    weights: Tensor  # before dropout
    keep: Tensor | None  # what dropout multiplies them by


def _cut(q_shape: torch.Size, m: int) -> _Cut | None:
    """None where all weights may be held at one time."""
    first, n = (1 if len(q_shape) < 3 else q_shape[0]), q_shape[-2]
    weights = q_shape[:-1].numel() * m
    if weights <= _WEIGHTS_AT_ONCE or len(q_shape) < 3:
        return None
    per_item = weights // first
    if per_item <= _WEIGHTS_AT_ONCE:
        return _Cut(-(-first // -(-weights // _WEIGHTS_AT_ONCE)), n)
    return _Cut(1, max(1, _WEIGHTS_AT_ONCE // (per_item // n)))


class _AttendInParts(torch.autograd.Function):
    """The same few matrices serve all parts: memory that is freed and asked for again is not always found again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float, cut: _Cut) -> Tensor:
        ctx.dropout, ctx.cut = dropout, cut
        ctx.random_state = torch.get_rng_state() if dropout else None
        out = torch.empty_like(q)
        with autocast_off(q.device):
            for part in _parts(q, k, bias, dropout, cut):
                kept = part.weights if part.keep is None else part.weights.mul_(part.keep)
                out[part.items][..., part.rows, :] = kept @ v[part.items].to(kept.dtype)
        ctx.save_for_backward(q, k, v, bias, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, out = ctx.saved_tensors
        wide = compute_dtype(q.dtype)
        grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=wide) for x in (q, k, v))
        grad_bias = torch.zeros_like(bias, dtype=wide) if ctx.needs_input_grad[3] else None
        scale = q.shape[-1] ** -0.5
        with autocast_off(q.device), torch.random.fork_rng(devices=[], enabled=ctx.dropout > 0):
            if ctx.dropout:
                torch.set_rng_state(ctx.random_state)
            all_scratch = _room(q, k, ctx.cut)
            for items, rows, weights, keep in _parts(q, k, bias, ctx.dropout, ctx.cut):
                g, own_q = (x[items][..., rows, :].to(wide) for x in (grad, q))
                own_k, own_v = k[items].to(wide), v[items].to(wide)
                scratch = all_scratch[: len(weights), ..., : weights.shape[-2], :]
                # Σ_m weights · their gradient, which softmax takes off, is <out, its gradient>
                along = (g * out[items][..., rows, :]).sum(dim=-1, keepdim=True)
                dropped = weights if keep is None else torch.mul(weights, keep, out=scratch)
                grad_v[items] += dropped.mT @ g
                grad_weights = torch.matmul(g, own_v.mT, out=scratch)
                if keep is not None:
                    grad_weights.mul_(keep)
                grad_scores = grad_weights.sub_(along).mul_(weights)
                if grad_bias is not None:
                    here = _of(grad_bias, items, rows, q.dim())
                    here += grad_scores.sum_to_size(here.shape)
                grad_q[items][..., rows, :] = (grad_scores @ own_k).mul_(scale)
                grad_k[items] += (grad_scores.mT @ own_q).mul_(scale)
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), grad_bias, None, None


def _parts(q: Tensor, k: Tensor, bias: Tensor | None, dropout: float, cut: _Cut) -> Iterator[_Part]:
    wide = compute_dtype(q.dtype)
    all_scores, all_weights = _room(q, k, cut), _room(q, k, cut)
    keep = None
    for item in range(0, q.shape[0], cut.items):
        items = slice(item, item + cut.items)
        own_k = k[items].to(wide)
        for row in range(0, q.shape[-2], cut.rows):
            rows = slice(row, row + cut.rows)
            own_q = q[items][..., rows, :].to(wide) * q.shape[-1] ** -0.5
            scores, weights = (x[: len(own_q), ..., : own_q.shape[-2], :] for x in (all_scores, all_weights))
            torch.matmul(own_q, own_k.mT, out=scores)
            if bias is not None:
                scores.add_(_of(bias, items, rows, q.dim()))
            torch.softmax(scores, dim=-1, out=weights)
            if dropout:
                keep = _draw_kept_(scores, dropout)
            yield _Part(items, rows, weights, keep)


def _draw_kept_(out: Tensor, dropout: float) -> Tensor:
    """What dropout multiplies by, written to ``out``: 0, or 1 over the probability of being kept.

    A draw is 16 bits of PyTorch's generator, for a fifth of the time of ``bernoulli_``. The probability is thus
    ``1 - dropout`` to 2^-17, and the mean is 1 exactly, as what is kept is divided by the probability that it has.
    """
    kept = max(1, round((1 - dropout) * 2**16))
    words = torch.empty(-(-out.numel() // 4), dtype=torch.int64, device=out.device).random_(-(2**63), None)
    draws = words.view(torch.int16)[: out.numel()].view(out.shape)  # uniform in [-2^15, 2^15)
    if kept == 2**16:
        return out.fill_(1)
    # in the place that is there already: comparing the integers would take another of the same size
    return out.copy_(draws).lt_(kept - 2**15).mul_(2**16 / kept)


def _room(q: Tensor, k: Tensor, cut: _Cut) -> Tensor:
    """For the weights of a part; the last one may fill it in part."""
    return q.new_empty((cut.items, *q.shape[1:-2], cut.rows, k.shape[-2]), dtype=compute_dtype(q.dtype))


def _of(bias: Tensor, items: slice, rows: slice, dims: int) -> Tensor:
    """The part's own items and rows of the bias, or all of it if all parts share it."""
    if bias.shape[-2] > 1:
        bias = bias[..., rows, :]
    return bias if bias.dim() < dims or bias.shape[0] == 1 else bias[items]
