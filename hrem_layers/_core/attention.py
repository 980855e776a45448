"""Scaled dot-product attention with a learned bias, in bounded memory where PyTorch's kernels have none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hrem_layers._core.numerics import autocast_off, compute_dtype

# Attention weights that are held at one time on a CPU (8 MB of float32)
_WEIGHTS_AT_ONCE = 2**21


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
    r""":math:`\mathrm{dropout}(\mathrm{softmax}(q k^\top / \sqrt d + \mathrm{bias}))\, v`.

    q (..., n, d), k and v (..., m, d), bias broadcastable to (..., n, m) or None -> (..., n, d).

    PyTorch's fused kernels for CPUs have no gradient for the bias; with it, autograd keeps several copies of all
    weights. If there are many, they are therefore computed a part at a time, and again in backward (which is then
    differentiable once). Under ``torch.compile`` the choice is left to the compiler.
    """
    if q.device.type == "cpu" and bias is not None and bias.requires_grad and not torch.compiler.is_compiling():
        parts = -(-q.shape[:-1].numel() * k.shape[-2] // _WEIGHTS_AT_ONCE)
        if parts > 1 and torch.is_grad_enabled():
            return _AttendInParts.apply(q, k, v, bias, dropout, -(-q.shape[0] // parts))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)


class _AttendInParts(torch.autograd.Function):
    """A part is ``size`` consecutive items of the first dimension (heads, or a batch of them).

    The same few matrices serve all parts: memory that is freed and asked for again is not always found again.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, dropout: float, size: int) -> Tensor:
        ctx.dropout, ctx.size = dropout, size
        ctx.random_state = torch.get_rng_state() if dropout else None
        out = torch.empty_like(q)
        with autocast_off(q.device):
            for part, weights, keep in _parts(q, k, bias, dropout, size):
                kept = weights if keep is None else weights.mul_(keep)
                out[part] = kept @ v[part].to(kept.dtype)
        ctx.save_for_backward(q, k, v, bias, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, out = ctx.saved_tensors
        grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (q, k, v))
        wide = compute_dtype(q.dtype)
        grad_bias = torch.zeros_like(bias, dtype=wide)
        scale = q.shape[-1] ** -0.5
        with autocast_off(q.device), torch.random.fork_rng(devices=[], enabled=ctx.dropout > 0):
            if ctx.dropout:
                torch.set_rng_state(ctx.random_state)
            all_scratch = _room(q, k, ctx.size)
            for part, weights, keep in _parts(q, k, bias, ctx.dropout, ctx.size):
                g, own_v, scratch = grad[part].to(wide), v[part].to(wide), all_scratch[: len(weights)]
                # Σ_m weights · their gradient, which softmax takes off, is <out, its gradient>
                along = (g * out[part]).sum(dim=-1, keepdim=True)
                if keep is None:
                    grad_v[part] = weights.mT @ g
                    grad_weights = torch.matmul(g, own_v.mT, out=scratch)
                else:
                    grad_v[part] = torch.mul(weights, keep, out=scratch).mT @ g
                    grad_weights = torch.matmul(g, own_v.mT, out=scratch).mul_(keep)
                grad_scores = grad_weights.sub_(along).mul_(weights)
                here = _of(grad_bias, part, q.dim())
                here += grad_scores.sum_to_size(here.shape)
                grad_q[part] = (grad_scores @ k[part].to(wide)).mul_(scale)
                grad_k[part] = (grad_scores.mT @ q[part].to(wide)).mul_(scale)
        return grad_q, grad_k, grad_v, grad_bias.to(bias.dtype), None, None


def _parts(
    q: Tensor, k: Tensor, bias: Tensor, dropout: float, size: int
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Of every part: where it is, its weights before dropout, and what dropout multiplies them by."""
    wide = compute_dtype(q.dtype)
    all_scores, all_weights = _room(q, k, size), _room(q, k, size)
    keep = None
    for start in range(0, q.shape[0], size):
        part = slice(start, start + size)
        own_q, own_k = q[part].to(wide) * q.shape[-1] ** -0.5, k[part].to(wide)
        scores, weights = all_scores[: len(own_q)], all_weights[: len(own_q)]
        torch.matmul(own_q, own_k.mT, out=scores).add_(_of(bias, part, q.dim()))
        torch.softmax(scores, dim=-1, out=weights)
        if dropout:
            keep = scores.bernoulli_(1 - dropout).div_(1 - dropout)
        yield part, weights, keep


def _room(q: Tensor, k: Tensor, size: int) -> Tensor:
    """For the weights of a part; the last one may fill it in part."""
    return q.new_empty((size, *q.shape[1:-1], k.shape[-2]), dtype=compute_dtype(q.dtype))


def _of(bias: Tensor, part: slice, dims: int) -> Tensor:
    """The part's own rows of the bias, or all of it if all parts share it."""
    return bias if bias.dim() < dims or bias.shape[0] == 1 else bias[part]
