"""The alignment as one operator: its value, its derivative and its shapes, opaque to tracing.

Behind an operator, the CPU path may look at the masks (packing costs a look at them) and the loop over
tiles stays a loop, while ``torch.compile`` sees one node with symbolic sizes and a shape rule.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hrem_layers.alignment.formula import Scores
from hrem_layers.alignment.tiling import score_all, score_all_backward
from hrem_layers.masked import compute_dtype


@torch.library.custom_op("hrem_layers::align_fragments", mutates_args=())
def align_op(
    image_fragments: Tensor,
    text_fragments: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    mode: str,
    topk: int,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    packed = image_fragments.device.type == "cpu"
    with torch.autocast(image_fragments.device.type, enabled=False):
        scores = score_all(
            image_fragments, text_fragments, image_mask, text_mask,
            mode=mode, topk=topk, chunk_size=chunk_size, packed=packed,
        )  # fmt: skip
    return tuple(x.contiguous() for x in scores)  # type: ignore[return-value]


@align_op.register_fake
def _(image_fragments, text_fragments, image_mask, text_mask, mode, topk, chunk_size):  # noqa: ANN001, ANN202
    i, t = image_fragments.shape[0], text_fragments.shape[0]
    dtype = compute_dtype(image_fragments.dtype)
    shapes = (i, t), (t, i), (i, t, topk), (t, i, topk)
    return tuple(image_fragments.new_empty(shape, dtype=dtype) for shape in shapes)


@torch.library.custom_op("hrem_layers::align_fragments_backward", mutates_args=())
def align_backward_op(
    image_fragments: Tensor,
    text_fragments: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    grad_mean_i2t: Tensor,
    grad_mean_t2i: Tensor,
    grad_top_i2t: Tensor,
    grad_top_t2i: Tensor,
    mode: str,
    topk: int,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    packed = image_fragments.device.type == "cpu"
    grad = Scores(grad_mean_i2t, grad_mean_t2i, grad_top_i2t, grad_top_t2i)
    with torch.autocast(image_fragments.device.type, enabled=False):
        return score_all_backward(
            image_fragments, text_fragments, image_mask, text_mask, grad,
            mode=mode, topk=topk, chunk_size=chunk_size, packed=packed,
        )  # fmt: skip


@align_backward_op.register_fake
def _(image_fragments, text_fragments, *_rest):  # noqa: ANN001, ANN002, ANN202
    return image_fragments.new_empty(image_fragments.shape), text_fragments.new_empty(text_fragments.shape)


def _setup_context(ctx, inputs, output) -> None:  # noqa: ANN001
    image_fragments, text_fragments, image_mask, text_mask, ctx.mode, ctx.topk, ctx.chunk_size = inputs
    ctx.save_for_backward(image_fragments, text_fragments, image_mask, text_mask)


def _backward(ctx, *grads):  # noqa: ANN001, ANN002, ANN202
    tensors = ctx.saved_tensors
    image_grad, text_grad = align_backward_op(*tensors, *grads, ctx.mode, ctx.topk, ctx.chunk_size)
    return image_grad, text_grad, None, None, None, None, None


align_op.register_autograd(_backward, setup_context=_setup_context)
