"""The dtype that things are computed in, norms and cosines: one rule for every part."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which reductions run: float32 for the half types, else the dtype itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def tie_tolerance(dtype: torch.dtype) -> float:
    """Two values of scale 1 that are computed in ``dtype`` and differ by no more than this count as equal.

    The same product comes out a few ulp apart with another chunk, another batch order or another thread count:
    what such a difference decides would be decided by chance.
    """
    return 8 * torch.finfo(compute_dtype(dtype)).eps


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype in which autocast multiplies on ``device``; None where it is off, or unknown as on meta."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def product_dtype(x: Tensor, y: Tensor) -> tuple[torch.dtype, bool]:
    """The dtype in which ``x`` and ``y`` are multiplied, and whether autocast chose it.

    Autocast's, if it is on and neither is float64; else the wider of their own. (Where autocast chose, products
    may be rounded to it, as everywhere under autocast.)
    """
    own, cast = torch.promote_types(x.dtype, y.dtype), autocast_dtype(x.device)
    return (own, False) if cast is None or own == torch.float64 else (cast, True)


def autocast_off(device: torch.device) -> AbstractContextManager[object]:
    """A context in which ``device`` computes in the dtypes that are given, whatever autocast says outside."""
    off = device.type == "meta" or not torch.is_autocast_enabled(device.type)
    return nullcontext() if off else torch.autocast(device.type, enabled=False)


def l2_normalize(x: Tensor) -> Tensor:
    """``x / ‖x‖₂`` over the last dimension, in the dtype of ``x``; the norm is taken in float32 or better.

    Rows of any length: each is first divided by its largest magnitude, so that no square over- or underflows.
    A zero row (all magnitudes up to ``finfo.tiny``) gives zeros and a zero gradient. (A norm clamped to a small
    epsilon instead would hand such a row the gradient divided by that epsilon.) A row that is not finite gives NaN.
    """
    wide = x.to(compute_dtype(x.dtype))
    if wide.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        unit: Tensor = _UnitRows.apply(wide)[0]  # type: ignore[no-untyped-call]
        return unit.to(x.dtype)
    return unit_rows(wide)[0].to(x.dtype)


def unit_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`l2_normalize` of float32 or float64, and ``1 / ‖x‖`` (..., 1), which is 0 for a zero row."""
    values = x.detach()  # largest magnitude: on a CPU ten times faster than the norm of order infinity
    peak = torch.maximum(values.amax(dim=-1, keepdim=True), -values.amin(dim=-1, keepdim=True))
    zero = peak <= torch.finfo(x.dtype).tiny  # a NaN is not: it goes on
    peak = peak.masked_fill(zero, 1)
    scaled = x / peak
    inverse = (1 / torch.linalg.vector_norm(scaled, dim=-1, keepdim=True).masked_fill(zero, 1)).masked_fill(zero, 0)
    unit = scaled * inverse if scaled.requires_grad else scaled.mul_(inverse)
    return unit, inverse / peak


class _UnitRows(torch.autograd.Function):
    """:func:`unit_rows`. Autograd alone would keep a copy of x beside x̂, which is kept anyway by what comes next."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return unit_rows(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output)
        ctx.save_for_forward(*output)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> tuple[Tensor, Tensor]:
        unit, inverse = ctx.saved_tensors
        along = (tangent * unit).sum(dim=-1, keepdim=True)
        return (tangent - unit * along) * inverse, -along * inverse * inverse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_inverse: Tensor) -> Tensor:
        """dx̂ = (dx − x̂ <x̂, dx>) / ‖x‖ and d(1 / ‖x‖) = −<x̂, dx> / ‖x‖², which the second derivative asks for."""
        unit, inverse = ctx.saved_tensors
        along = (grad * unit).sum(dim=-1, keepdim=True) + grad_inverse * inverse
        found: Tensor = torch.addcmul(grad, unit, along, value=-1) * inverse
        return found


def safe_reciprocal(x: Tensor, smallest: float) -> Tensor:
    """``1 / x``, but 0 with zero gradient where ``x <= smallest``; NaN stays NaN."""
    zero = x <= smallest
    return (1 / x.masked_fill(zero, 1)).masked_fill(zero, 0)


def cosine_matrix(x: Tensor, y: Tensor) -> Tensor:
    """Products of normalised rows, x (N, D), y (M, D) -> (N, M), in float32 or better also under autocast.

    A cosine in bfloat16 keeps 8 bits: neighbours tie that do not, and a margin of 0.2 becomes 50 steps.
    """
    dtype = compute_dtype(torch.promote_types(x.dtype, y.dtype))
    with autocast_off(x.device):
        return x.to(dtype) @ y.to(dtype).t()


def module_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of a module's weights, which it computes in; float32 if it has none."""
    for parameter in module.parameters():
        if parameter.dtype.is_floating_point:
            return parameter.dtype
    return torch.float32


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """``x[index]`` of x (n, ...) and an index of any shape, in a quarter of its time on a CPU: copies whole rows."""
    return x.index_select(0, index.reshape(-1)).view(*index.shape, *x.shape[1:])
