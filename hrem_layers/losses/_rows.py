"""Sums over the rows and over the columns of a large matrix, computed a few rows at a time.

Every pair loss here is a sum over anchors, and an anchor needs nothing but its own row (or column) of the
similarity. On a CPU a dozen elementwise steps over a matrix of 64 MB wait for memory; the same steps over a few rows
stay in the cache. Value and gradient of these rows are computed in one go, so that no step's result is kept for the
backward pass but the gradient itself.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from hrem_layers._core.recompute import saved_tensors_are_fixed

CHUNK_ELEMENTS = 2**17
"""Elements per thread in one chunk of rows: half a megabyte in float32, what a core's own cache holds."""

RowLoss = Callable[..., Tensor]
"""``(similarity (n, M), positives (n, M), *per_row (n, 1), *shared ()) -> scalar``, a sum over its n rows.

One that has a method ``with_gradients``, of the same arguments, which returns the sum, its gradient in ``similarity``
and those in ``shared``, is not differentiated by autograd where rows are computed a few at a time.
"""

Ways = tuple[tuple[Tensor, ...], ...]
"""``per_row`` of the rows and, if the columns are anchors too, ``per_row`` of the columns."""


def is_taken_whole(similarity: Tensor) -> bool:
    """Whether nothing is gained by computing a few rows at a time."""
    return (
        torch.compiler.is_compiling()
        or similarity.device.type != "cpu"
        or similarity.numel() <= CHUNK_ELEMENTS * torch.get_num_threads()
    )


def sum_over_anchors(
    loss: RowLoss, similarity: Tensor, positives: Tensor, *, ways: Ways, shared: tuple[Tensor, ...] = ()
) -> Tensor:
    """``loss`` summed over all rows and, with a second entry of ``ways``, over all columns, as a scalar.

    Gradients flow to ``similarity`` and ``shared``, none to ``per_row``. A small matrix, a traced one and one that is
    not in a CPU's memory are computed whole, by autograd; a compiler fuses the steps by itself.
    """
    if is_taken_whole(similarity):
        return _whole(loss, similarity, positives, ways, shared)
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in (similarity, *shared))):
        return in_chunks(loss, similarity, positives, ways, shared, grads=None)
    tensors = (similarity, positives, *shared, *(x for way in ways for x in way))
    total: Tensor = _SumOverAnchors.apply(loss, len(shared), [len(way) for way in ways], *tensors)[0]  # type: ignore[no-untyped-call]
    return total


def _whole(loss: RowLoss, similarity: Tensor, positives: Tensor, ways: Ways, shared: tuple[Tensor, ...]) -> Tensor:
    total = loss(similarity, positives, *ways[0], *shared)
    if len(ways) == 2:
        total = total + loss(similarity.t(), positives.t(), *ways[1], *shared)
    return total


def in_chunks(
    loss: RowLoss, similarity: Tensor, positives: Tensor, ways: Ways, shared: tuple[Tensor, ...],
    grads: tuple[Tensor, ...] | None,
) -> Tensor:  # fmt: skip
    """The sum; the gradient of similarity is written to ``grads``, where similarity itself may be if there is one way;
    those of shared are added there.

    A few rows at a time on a CPU, all of them elsewhere.
    """
    on_cpu = similarity.device.type == "cpu"
    total = similarity.new_zeros((), dtype=torch.float64 if on_cpu else similarity.dtype)
    for way, per_row in enumerate(ways):
        length, width = similarity.shape[way], similarity.shape[1 - way]
        rows = max(1, CHUNK_ELEMENTS * torch.get_num_threads() // width) if on_cpu else length
        for start in range(0, length, rows):
            here = slice(start, start + rows)
            chunk, flags, own = _cut(similarity, way, here), _cut(positives, way, here), [x[here] for x in per_row]
            if grads is None:
                with torch.no_grad():
                    total += loss(chunk, flags, *own, *shared)
                continue
            value, of_chunk, *of_shared = _with_gradients(loss, chunk, flags, own, [x.detach() for x in shared])
            total += value
            if way:
                grads[0][:, here] += of_chunk.t().contiguous()
            else:
                grads[0][here] = of_chunk
            for x, y in zip(grads[1:], of_shared, strict=True):
                x += y
    return total.to(similarity.dtype)


def _with_gradients(
    loss: RowLoss, similarity: Tensor, positives: Tensor, per_row: list[Tensor], shared: list[Tensor]
) -> tuple[Tensor, ...]:
    """The sum, its gradient in ``similarity`` and those in ``shared``; none of the arguments requires one."""
    known: Callable[..., tuple[Tensor, ...]] | None = getattr(loss, "with_gradients", None)
    if known is not None:
        with torch.no_grad():
            return known(similarity, positives, *per_row, *shared)
    with torch.enable_grad(), _saved_as_they_are():
        leaves = [x.requires_grad_() for x in (similarity, *shared)]
        value = loss(similarity, positives, *per_row, *leaves[1:])
        return value.detach(), *torch.autograd.grad(value, leaves)


def _saved_as_they_are() -> AbstractContextManager[object]:
    """Activation checkpointing keeps no tensor: it would run all that it holds anew for the gradient of each chunk."""
    if saved_tensors_are_fixed():
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda x: x)


def _cut(x: Tensor, way: int, here: slice) -> Tensor:
    """Rows, or columns as rows, without gradient, side by side in memory. Of columns first the block, then its
    transpose: step by step through the rows of a large matrix, each number would cost a cache line."""
    if not way:
        return x.detach()[here]
    return x.detach()[:, here].clone(memory_format=torch.contiguous_format).t().contiguous()


class _SumOverAnchors(torch.autograd.Function):
    """The sum, with the gradient found on the way. A second derivative is that of the plain computation."""

    @staticmethod
    def forward(loss: RowLoss, shared: int, lengths: list[int], *tensors: Tensor) -> tuple[Tensor, ...]:
        arguments = _arguments(shared, lengths, tensors)
        grads = (torch.empty_like(tensors[0]), *(torch.zeros_like(x) for x in arguments[3]))
        return in_chunks(loss, *arguments, grads=grads), *grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.loss, ctx.shared, ctx.lengths, *tensors = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[1:], *tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: under activation checkpointing a second look is an error
        known, tensors = saved[: 1 + ctx.shared], saved[1 + ctx.shared :]
        nothing = (None,) * (len(tensors) - 2 - ctx.shared)
        if grad is None:
            return (None,) * (3 + len(tensors))
        if torch.is_grad_enabled():  # create_graph=True
            arguments = _arguments(ctx.shared, ctx.lengths, tensors)
            leaves = [x for x in (tensors[0], *arguments[3]) if x.requires_grad]
            found = iter(torch.autograd.grad(_whole(ctx.loss, *arguments), leaves, grad, create_graph=True))
            grads = [next(found) if x.requires_grad else None for x in (tensors[0], *arguments[3])]
        else:
            grads = [grad * x for x in known]
        return None, None, None, grads[0], None, *grads[1:], *nothing


def _arguments(
    shared: int, lengths: list[int], tensors: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Ways, tuple[Tensor, ...]]:
    """similarity, positives, ways, shared out of the flat list that an autograd function takes."""
    rest, ways = list(tensors[2 + shared :]), []
    for length in lengths:
        ways.append(tuple(rest[:length]))
        del rest[:length]
    return tensors[0], tensors[1], tuple(ways), tensors[2 : 2 + shared]
