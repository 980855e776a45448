"""Sums over anchors like those of ``_rows.py``, from embeddings: the similarity is never whole, unless it is small.

A chunk of anchors is multiplied with the other side, its value and the gradient of its similarities are found in one
go, and two more products turn this gradient into that of the embeddings before the next chunk is taken. What stays
for the backward pass is as large as the embeddings; over several processes, which add it up at once, as this one's own.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hrem_layers._core.checks import check_bool, check_int, check_sides, said
from hrem_layers._core.exchange import Alone, Exchange, check_exchange, share_gathered
from hrem_layers._core.numerics import autocast_off, compute_dtype, l2_normalize
from hrem_layers._core.recompute import compute_twice
from hrem_layers.losses._pairs import one_if_finite
from hrem_layers.losses._positives import Positives, check_positive_pairs
from hrem_layers.losses._rows import CHUNK_ELEMENTS, RowLoss, Ways, in_chunks, sum_over_anchors

CPU_TILE, GPU_TILE = 2**21, 2**22
"""Similarities in one chunk where the caller names no size: 8 and 16 MB in float32."""

LEAST_ROWS = 128
"""But no fewer rows than a fast product needs."""

SPARSE = 64
"""Where fewer than one in so many similarities have a gradient, those are multiplied alone."""


class Plan(NamedTuple):
    """Who belongs together, which anchors are summed over, and how many at a time."""

    positives: Positives
    rows: tuple[slice, slice]
    """Images and texts that are anchors here, both with a start and a stop."""
    chunk_size: int | None
    exchange: Exchange
    """Of the processes whose parts of the loss are added up."""


SIDES = ("image", "text")


def open_stream(
    image_embedding: Tensor,
    text_embedding: Tensor,
    *,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    positives: Tensor | None,
    normalize: bool,
    chunk_size: int | None,
    image_rows: slice | None,
    text_rows: slice | None,
    exchange: Exchange,
) -> tuple[Tensor, Tensor, Plan]:
    """The arguments of ``from_embeddings``, checked; both embeddings in the dtype that is computed in."""
    dtype = streamed_dtype(image_embedding, text_embedding)
    n, m, device = image_embedding.shape[0], text_embedding.shape[0], image_embedding.device
    for name, length in (("image_embedding", n), ("text_embedding", m)):
        if not length:
            raise ValueError(f"{name} must hold at least 1 item, got an empty batch")
    pairs = check_positive_pairs(n, m, device, image_ids=image_ids, text_ids=text_ids, positives=positives)
    check_bool("normalize", normalize)
    check_exchange("exchange", exchange)
    if chunk_size is not None and not torch.compiler.is_compiling():
        check_int("chunk_size", chunk_size, minimum=1)
    rows = (_check_rows("image_rows", image_rows, n), _check_rows("text_rows", text_rows, m))
    x, y = image_embedding.to(dtype), text_embedding.to(dtype)
    if normalize:
        x, y = l2_normalize(x), l2_normalize(y)
    return x, y, Plan(pairs, rows, chunk_size, exchange)


def streamed_dtype(image_embedding: Tensor, text_embedding: Tensor) -> torch.dtype:
    """The dtype in which both are multiplied, after a look at what they are."""
    check_sides(image_embedding, text_embedding)
    return torch.promote_types(*(compute_dtype(x.dtype) for x in (image_embedding, text_embedding)))


def _check_rows(name: str, rows: slice | None, length: int) -> slice:
    if rows is None:
        return slice(0, length)
    if not isinstance(rows, slice):
        raise TypeError(f"{name} must be a slice of anchors or None, got {said(rows)}")
    ends = [end for end in (rows.start, rows.stop) if end is not None]
    whole = torch.compiler.is_compiling() or all(isinstance(end, numbers.Integral) for end in ends)
    if rows.step not in (None, 1) or not whole or any(not 0 <= end <= length for end in ends):
        raise ValueError(f"{name} must be a slice of step 1 within the {length} anchors, got {rows}")
    start = rows.start or 0
    return slice(start, max(start, length if rows.stop is None else rows.stop))


def streamed_sum(
    loss: RowLoss, x: Tensor, y: Tensor, plan: Plan, *, ways: Ways, shared: tuple[Tensor, ...] = ()
) -> Tensor:
    """``loss`` summed over the plan's images and, with a second entry of ``ways``, over its texts, as a scalar.

    Args:
        loss: as for :func:`~hrem_layers.losses._rows.sum_over_anchors`.
        x: (N, D); y: (M, D), of one dtype. Their products are the similarities.
        plan: as :func:`open_stream` makes it.
        ways: what each anchor has of its own, of all N images and all M texts; no gradient.
        shared: 0-dimensional tensors, to which gradient flows as to the embeddings.

    Returns:
        A scalar; NaN where a similarity that was looked at, or one of ``shared`` is not finite.
    """
    exchange = plan.exchange
    with autocast_off(x.device):
        if torch.compiler.is_compiling():
            x, y = share_gathered(exchange, "image", x), share_gathered(exchange, "text", y)
            total, finite = _by_autograd(loss, x, y, plan, ways, shared, recompute=True), x.new_ones(())
        elif _is_small(x, y, plan, ways):
            s = x @ y.t()
            flags = plan.positives.rows(0, plan.rows[0])
            total, finite = sum_over_anchors(loss, s, flags, ways=ways, shared=shared), one_if_finite(s)
        elif not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, y, *shared))):
            total, finite = _in_chunks(loss, x, y, plan, ways, shared, grads=None)
        else:
            own = exchange.own_rows("image", x), exchange.own_rows("text", y)
            total, finite, *_ = _StreamedSum.apply(loss, plan, ways, x.detach(), y.detach(), *own, *shared)  # type: ignore[no-untyped-call]
    return total * (finite * one_if_finite(*shared) if shared else finite)


def _chunks(rows: slice, chunk_size: int | None, others: Tensor) -> list[slice]:
    size = chunk_size or max(LEAST_ROWS, (CPU_TILE if others.device.type == "cpu" else GPU_TILE) // len(others))
    return [slice(start, min(start + size, rows.stop)) for start in range(rows.start, rows.stop, size)]


def _in_chunks(
    loss: RowLoss, x: Tensor, y: Tensor, plan: Plan, ways: Ways, shared: tuple[Tensor, ...],
    grads: tuple[Tensor, ...] | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The sum, and 1 if all was finite, else NaN; gradients of embeddings and shared are added to ``grads``."""
    sides = x.detach(), y.detach()
    total, finite = x.new_zeros((), dtype=x.dtype), x.new_ones(())
    for way, here, per_anchor in _pieces(plan, ways, sides):
        own, others = sides[way][here], sides[1 - way]
        s, flags = own @ others.t(), plan.positives.rows(way, here)
        finite = finite * one_if_finite(s)
        if grads is None:
            total += in_chunks(loss, s, flags, per_anchor, shared, grads=None)
            continue
        # of one way the gradient of a similarity takes its place, which nothing looks at again
        of_s = s if len(per_anchor) == 1 else torch.empty_like(s)
        total += in_chunks(loss, s, flags, per_anchor, shared, grads=(of_s, *grads[2:]))
        _add_products(of_s, own, others, grads[way][here], grads[1 - way])
        del s, of_s, flags  # before the next are made
    return total, finite


def _pieces(plan: Plan, ways: Ways, sides: tuple[Tensor, Tensor]) -> Iterator[tuple[int, slice, Ways]]:
    """The side and place of each chunk of anchors, and what each of them has of its own; where one chunk holds all
    images and one all texts, both at once, with the images: their similarities are the same."""
    if _is_one_chunk(plan, ways, sides):
        yield 0, plan.rows[0], ways
        return
    for way, per_row in enumerate(ways):
        for here in _chunks(plan.rows[way], plan.chunk_size, sides[1 - way]):
            yield way, here, (tuple(t[here] for t in per_row),)


def _is_one_chunk(plan: Plan, ways: Ways, sides: tuple[Tensor, Tensor]) -> bool:
    return all(
        _chunks(plan.rows[way], plan.chunk_size, sides[1 - way]) == [slice(0, len(sides[way]))]
        for way in range(len(ways))
    )


def _is_small(x: Tensor, y: Tensor, plan: Plan, ways: Ways) -> bool:
    """Whether the similarity is one chunk of this process, and so small that autograd may keep what it likes of it:
    its steps then take less time than what saves memory."""
    small = len(x) * len(y) <= CHUNK_ELEMENTS and isinstance(plan.exchange, Alone)
    return small and _is_one_chunk(plan, ways, (x, y))


def _add_products(of_s: Tensor, own: Tensor, others: Tensor, grad_own: Tensor, grad_others: Tensor) -> None:
    """Adds ``of_s @ others`` and ``of_s.T @ own``.

    One negative per anchor leaves ``of_s`` zero nearly everywhere. On a CPU, where looking for it waits for nothing,
    what is not zero is then multiplied alone, as many at a time as ``others`` has rows.
    """
    if of_s.device.type == "cpu" and SPARSE * int(torch.count_nonzero(of_s)) < of_s.numel():
        places = of_s.nonzero(as_tuple=True)
        for i, j, values in zip(*(t.split(len(others)) for t in (*places, of_s[places].unsqueeze(1))), strict=True):
            grad_own.index_add_(0, i, values * others[j])
            grad_others.index_add_(0, j, values * own[i])
        return
    grad_own.addmm_(of_s, others)
    grad_others.addmm_(of_s.t(), own)


def _by_autograd(
    loss: RowLoss, x: Tensor, y: Tensor, plan: Plan, ways: Ways, shared: tuple[Tensor, ...], *, recompute: bool
) -> Tensor:
    """The same by autograd: traced, and differentiable twice. ``recompute``: every chunk is computed again in the
    backward pass instead of being kept (torch.func knows no such thing)."""

    def chunk(own: Tensor, others: Tensor, flags: Tensor, per_anchor: tuple[Tensor, ...], *shared: Tensor) -> Tensor:
        s = own @ others.t()
        return loss(s, flags, *per_anchor, *shared) * one_if_finite(s)

    run = partial(compute_twice, chunk) if recompute else chunk
    total = x.new_zeros(())
    for way, per_row in enumerate(ways):
        anchors, others = (x, y) if not way else (y, x)
        for here in _chunks(plan.rows[way], plan.chunk_size, others):
            flags, per_anchor = plan.positives.rows(way, here), tuple(t[here] for t in per_row)
            total = total + run(anchors[here], others, flags, per_anchor, *shared)
    return total


class _StreamedSum(torch.autograd.Function):
    """The sum, with the gradient found on the way and, for this process's own rows, added up over the processes. A
    second derivative is that of autograd, which keeps all chunks."""

    @staticmethod
    def forward(
        loss: RowLoss, plan: Plan, ways: Ways, x: Tensor, y: Tensor, own_x: Tensor, own_y: Tensor, *shared: Tensor
    ) -> tuple[Tensor, ...]:
        grads = tuple(torch.zeros_like(t) for t in (x, y, *shared))
        total, finite = _in_chunks(loss, x, y, plan, ways, shared, grads)
        of_own = (plan.exchange.add_up_rows(side, grad) for side, grad in zip(SIDES, grads[:2], strict=True))
        return total, finite, *of_own, *grads[2:]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.loss, plan, ctx.ways, _, _, *tensors = inputs
        ctx.plan = plan._replace(exchange=plan.exchange.forget())  # what is kept is no longer than the own rows
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[2:], *tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: under activation checkpointing a second look is an error
        known, tensors = saved[: len(saved) // 2], saved[len(saved) // 2 :]
        nothing = (None,) * 5
        if grad is None:
            return *nothing, *(None for _ in tensors)
        if not torch.is_grad_enabled():
            return *nothing, *(grad * x for x in known)
        leaves = [x for x in tensors if x.requires_grad]  # create_graph=True
        x, y = (ctx.plan.exchange.gather_shared_rows(side, own) for side, own in zip(SIDES, tensors, strict=False))
        value = _by_autograd(ctx.loss, x, y, ctx.plan, ctx.ways, tensors[2:], recompute=False)
        found = iter(torch.autograd.grad(value, leaves, grad, create_graph=True))
        return *nothing, *(next(found) if x.requires_grad else None for x in tensors)
