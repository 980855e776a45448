"""The alignment as one operator: its value, its derivative and its shapes, opaque to tracing.

Four ways to compute it, chosen here: on a CPU compiled kernels where Numba is, else packed tiles; the fused kernel on
CUDA where it applies; padded tiles elsewhere. Behind an operator, the CPU path may look at the masks (packing costs a
look at them), a loop over tiles stays a loop and a kernel a kernel, while ``torch.compile`` sees one node with symbolic
sizes and a shape rule.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hrem_layers._core.numerics import autocast_off, compute_dtype
from hrem_layers.alignment.cpu.launch import compiled_applies, score_all_compiled, score_all_compiled_backward
from hrem_layers.alignment.cuts import Setting
from hrem_layers.alignment.gpu.launch import kernel_applies, score_all_fused, score_all_fused_backward
from hrem_layers.alignment.products import ROW_MULTIPLE
from hrem_layers.alignment.scores import PairGrads, Scores
from hrem_layers.alignment.tiles import score_all, score_all_backward

# Similarities kept for backward, in elements of their dtype (64 MB of float32). What does not fit is
# multiplied again in backward, so that memory does not grow with R·W.
KEEP_AT_MOST = 2**24


@torch.library.custom_op("hrem_layers::align_fragments", mutates_args=())
def align_op(
    image_fragments: Tensor,
    text_fragments: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    mode: str,
    topk: int,
    chunk_size: int | None,
    dtype: torch.dtype,
    rounded: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The four Scores, and similarities for backward (none unless ``keep``).

    ``dtype`` is what fragments are multiplied in; whether the products may be ``rounded`` to it as well (autocast
    does) or a half type has to be widened before (the fused kernel never rounds them).
    """
    kept = image_fragments.new_empty(_kept_size(image_fragments, text_fragments, keep), dtype=compute_dtype(dtype))
    setting = _setting(image_fragments, mode, topk, chunk_size, dtype if rounded else compute_dtype(dtype))
    tensors = image_fragments, text_fragments, image_mask, text_mask
    with autocast_off(image_fragments.device):
        if kernel_applies(image_fragments, text_fragments, dtype):
            return *score_all_fused(*tensors, mode=mode, topk=topk, dtype=dtype), kept
        scores = None
        if compiled_applies(image_fragments, text_fragments):
            scores = score_all_compiled(*tensors, setting, kept)
        return *(score_all(*tensors, setting, kept) if scores is None else scores), kept


@align_op.register_fake
def _(
    image_fragments: Tensor,
    text_fragments: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    mode: str,
    topk: int,
    chunk_size: int | None,
    dtype: torch.dtype,
    rounded: bool,
    keep: bool,
) -> tuple[Tensor, ...]:
    kept_shape = (_kept_size(image_fragments, text_fragments, keep),)
    shapes = *_score_shapes(image_fragments, text_fragments, topk), kept_shape
    return tuple(image_fragments.new_empty(shape, dtype=compute_dtype(dtype)) for shape in shapes)


@torch.library.custom_op("hrem_layers::align_fragments_backward", mutates_args=())
def align_backward_op(
    image_fragments: Tensor,
    text_fragments: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    kept: Tensor,
    grad_mean_i2t: Tensor | None,
    grad_mean_t2i: Tensor | None,
    grad_top_i2t: Tensor | None,
    grad_top_t2i: Tensor | None,
    mode: str,
    topk: int,
    chunk_size: int | None,
    dtype: torch.dtype,
    rounded: bool,
) -> tuple[Tensor, Tensor]:
    """None: no gradient flows back from that score."""
    grads = grad_mean_i2t, grad_mean_t2i, grad_top_i2t, grad_top_t2i
    setting = _setting(image_fragments, mode, topk, chunk_size, dtype if rounded else compute_dtype(dtype))
    tensors = image_fragments, text_fragments, image_mask, text_mask
    with autocast_off(image_fragments.device):
        if kernel_applies(image_fragments, text_fragments, dtype):
            shapes = _score_shapes(image_fragments, text_fragments, topk)
            grad = Scores(*(kept.new_zeros(s) if x is None else x for x, s in zip(grads, shapes, strict=True)))
            return score_all_fused_backward(*tensors, grad, mode=mode, topk=topk, dtype=dtype)
        found = None
        if compiled_applies(image_fragments, text_fragments):
            found = score_all_compiled_backward(*tensors, grads, setting, kept)
        return score_all_backward(*tensors, PairGrads.of(*grads), setting, kept) if found is None else found


@align_backward_op.register_fake
def _(image_fragments: Tensor, text_fragments: Tensor, *_rest: object) -> tuple[Tensor, Tensor]:
    return image_fragments.new_empty(image_fragments.shape), text_fragments.new_empty(text_fragments.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, mode, topk, chunk_size, dtype, rounded, _keep = inputs
    ctx.options = mode, topk, chunk_size, dtype, rounded
    ctx.save_for_backward(*tensors, output[4])
    ctx.mark_non_differentiable(output[4])
    ctx.set_materialize_grads(False)  # what is not asked for is not computed


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: under activation checkpointing a second look is an error
    if all(grad is None for grad in grads[:4]):
        return (None,) * 10
    return *align_backward_op(*saved, *grads[:4], *ctx.options), *[None] * 8


align_op.register_autograd(_backward, setup_context=_setup_context)


def _setting(fragments: Tensor, mode: str, topk: int, chunk_size: int | None, dtype: torch.dtype) -> Setting:
    return Setting(mode, topk, chunk_size, packed=fragments.device.type == "cpu", dtype=dtype)


def _score_shapes(image_fragments: Tensor, text_fragments: Tensor, topk: int) -> tuple[tuple[int, ...], ...]:
    i, t = image_fragments.shape[0], text_fragments.shape[0]
    return (i, t), (t, i), (i, t, topk), (t, i, topk)


def _kept_size(image_fragments: Tensor, text_fragments: Tensor, keep: bool) -> int:
    """All similarities if they fit; written without a branch, so that tracing need not know the sizes."""
    if not keep:
        return 0
    (i, r, _), (t, w, _) = image_fragments.shape, text_fragments.shape
    size: int = torch.sym_min((i * r + ROW_MULTIPLE - 1) * t * w, KEEP_AT_MOST)
    return size
