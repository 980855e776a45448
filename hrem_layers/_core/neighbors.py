r"""Products along the edges of a graph whose rows each know their own few neighbours.

Three operators, each linear in both of its tensors, for h heads and K neighbours per row, ``index`` (n, K) into m
nodes:

- :func:`neighbor_products`: :math:`s_{ijh} = \langle x_{ih}, y_{index(i,j),h}\rangle`
- :func:`neighbor_sums`: :math:`o_{ih} = \sum_j w_{ijh}\, y_{index(i,j),h}`
- :func:`neighbor_scatter`: :math:`o_{ch} = \sum_{ij:\,index(i,j) = c} w_{ijh}\, x_{ih}`

The gradients of each are the other two, so all of them can be differentiated any number of times, and nothing is kept
for the backward pass but what goes in. Neighbours are gathered a chunk of rows at a time: time O(n·K·D), and beyond
arguments and result the memory of one chunk.

Where the nodes y lie over several processes, :func:`with_all` gathers them for one operator, and again for its backward
pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hrem_layers._core.exchange import Alone, Rows
from hrem_layers._core.numerics import autocast_off, compute_dtype, rows_at

# numbers in one chunk of gathered neighbours: what stays in a CPU's cache, and what fills a GPU
_CPU_CHUNK, _GPU_CHUNK = 2**18, 2**26


class NeighborBias(NamedTuple):
    """An attention bias on the edges of neighbour lists, in the place of an (n, m) matrix."""

    index: Tensor  # type: ignore[assignment]  # tuple has a method of this name, of no use here
    """(n, K) int64 in [0, m)."""
    bias: Tensor
    """(n, K), added to the attention's scores; −inf removes a neighbour."""
    rows: Rows
    """How the rows that receive lie over the processes; n are here."""
    nodes: Rows
    """How those that give do; m in all."""


def attend_neighbors(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, bias: Tensor, rows: Rows, nodes: Rows, dropout: float
) -> Tensor:
    r""":math:`\mathrm{dropout}(\mathrm{softmax}(q k^\top / \sqrt d + \mathrm{bias}))\, v` over the neighbours alone.

    q (n, h, d), k and v (m, h, d), of several processes this one's own; index and bias (n, K), the former into the
    nodes of all, the latter not −inf in all places of a row -> (n, h, d). Holds a few (n, K, h) tensors for the
    backward pass, where the masked matrix would take (h, n, m).
    """
    scores = with_all(neighbor_products, q * q.shape[-1] ** -0.5, k, index, nodes)  # [n, k, h]
    bias = bias.to(scores.dtype).unsqueeze(-1)
    weights = torch.where(bias == -torch.inf, -torch.inf, scores + bias).softmax(dim=1)
    if dropout:
        weights = drop_rows(weights, rows, dropout)
    return with_all(neighbor_sums, weights, v, index, nodes).to(v.dtype)


def drop_rows(x: Tensor, rows: Rows, dropout: float) -> Tensor:
    """Dropout of rows that may be one process's own: the same draws as in one process."""
    return torch.where(rows.keep(x, 1 - dropout), x / (1 - dropout), 0)


def neighbor_products(x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    """x (n, h, d), y (m, h, d), index (n, K) in [0, m) -> (n, K, h), in float32 or better."""
    out: Tensor = _products(x, y, index)
    return out


def neighbor_sums(weights: Tensor, y: Tensor, index: Tensor) -> Tensor:
    """weights (n, K, h), y (m, h, d), index (n, K) in [0, m) -> (n, h, d), in float32 or better."""
    out: Tensor = _sums(weights, y, index)
    return out


def neighbor_scatter(weights: Tensor, x: Tensor, index: Tensor, nodes: int) -> Tensor:
    """weights (n, K, h), x (n, h, d), index (n, K) in [0, nodes) -> (nodes, h, d), in float32 or better."""
    out: Tensor = _scatter(weights, x, index, nodes)
    return out


Operator = Callable[[Tensor, Tensor, Tensor], Tensor]
""":func:`neighbor_products` or :func:`neighbor_sums`."""


def with_all(operator: Operator, x: Tensor, own: Tensor, index: Tensor, nodes: Rows) -> Tensor:
    """``operator(x, y, index)`` with y (m, h, d) the ``nodes`` of all processes, of which ``own`` are here.

    What stays for the backward pass is ``own``: y, as large on a thousand processes as on two, is gathered again there.
    (Traced, a compiler keeps y.)
    """
    if isinstance(nodes.exchange, Alone) or torch.compiler.is_compiling():
        return operator(x, nodes.gather(own), index)
    # a copy, for own may be some columns of a larger tensor, which would stay with it
    out: Tensor = _WithAll.apply(operator, x, own.contiguous(), index, nodes)  # type: ignore[no-untyped-call]
    return out


class _WithAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operator: Operator, x: Tensor, own: Tensor, index: Tensor, nodes: Rows) -> Tensor:
        ctx.operator, ctx.nodes = operator, nodes
        ctx.save_for_backward(x, own, index)
        return operator(x, nodes.gather(own), index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, own, index = ctx.saved_tensors
        of_x = of_own = None
        if ctx.needs_input_grad[1]:
            of_x = _of_first(ctx.operator, grad, x, ctx.nodes.gather(own), index)
        if ctx.needs_input_grad[2]:
            of_y = _of_second(ctx.operator, grad, x, index, ctx.nodes.total)
            of_own = ctx.nodes.add_up(of_y.to(own.dtype))
        return None, of_x, of_own, None, None


@torch.library.custom_op("hrem_layers::neighbor_products", mutates_args=())
def _products(x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    wide = _wide(x, y)
    out = x.new_empty((*index.shape, x.shape[1]), dtype=wide)
    with autocast_off(x.device):
        for rows in _chunks(index, x):
            near = rows_at(y, index[rows]).to(wide)  # [b, k, h, d]
            torch.sum(near.mul_(x[rows].unsqueeze(1)), dim=-1, out=out[rows])
    return out


@torch.library.custom_op("hrem_layers::neighbor_sums", mutates_args=())
def _sums(weights: Tensor, y: Tensor, index: Tensor) -> Tensor:
    wide = _wide(weights, y)
    out = y.new_empty((index.shape[0], *y.shape[1:]), dtype=wide)
    with autocast_off(y.device):
        for rows in _chunks(index, y):
            near = rows_at(y, index[rows]).to(wide)
            torch.sum(near.mul_(weights[rows].unsqueeze(-1)), dim=1, out=out[rows])
    return out


@torch.library.custom_op("hrem_layers::neighbor_scatter", mutates_args=())
def _scatter(weights: Tensor, x: Tensor, index: Tensor, nodes: int) -> Tensor:
    wide = _wide(weights, x)
    out = x.new_zeros((nodes, *x.shape[1:]), dtype=wide)
    flat = out.flatten(1)
    with autocast_off(x.device):
        for rows in _chunks(index, x):
            given = weights[rows].to(wide).unsqueeze(-1) * x[rows].unsqueeze(1)  # [b, k, h, d]
            flat.index_add_(0, index[rows].reshape(-1), given.flatten(0, 1).flatten(1))
    return out


@_products.register_fake
def _(x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    return x.new_empty((*index.shape, x.shape[1]), dtype=_wide(x, y))


@_sums.register_fake
def _(weights: Tensor, y: Tensor, index: Tensor) -> Tensor:
    return y.new_empty((index.shape[0], *y.shape[1:]), dtype=_wide(weights, y))


@_scatter.register_fake
def _(weights: Tensor, x: Tensor, index: Tensor, nodes: int) -> Tensor:
    return x.new_empty((nodes, *x.shape[1:]), dtype=_wide(weights, x))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _of_first(operator: Operator, grad: Tensor, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    other = neighbor_sums if operator is neighbor_products else neighbor_products
    return other(grad, y, index).to(x.dtype)


def _of_second(operator: Operator, grad: Tensor, x: Tensor, index: Tensor, nodes: int) -> Tensor:
    return neighbor_scatter(*((grad, x) if operator is neighbor_products else (x, grad)), index, nodes)


def _products_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(neighbor_products, ctx, grad)


def _sums_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(neighbor_sums, ctx, grad)


def _gradients(operator: Operator, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, y, index = ctx.saved_tensors
    of_x = _of_first(operator, grad, x, y, index) if ctx.needs_input_grad[0] else None
    of_y = _of_second(operator, grad, x, index, y.shape[0]).to(y.dtype) if ctx.needs_input_grad[1] else None
    return of_x, of_y, None


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weights, x, index = ctx.saved_tensors
    of_weights = neighbor_products(x, grad, index).to(weights.dtype) if ctx.needs_input_grad[0] else None
    of_x = neighbor_sums(weights, grad, index).to(x.dtype) if ctx.needs_input_grad[1] else None
    return of_weights, of_x, None, None


_products.register_autograd(_products_backward, setup_context=_keep)
_sums.register_autograd(_sums_backward, setup_context=_keep)
_scatter.register_autograd(_scatter_backward, setup_context=_keep)


def _wide(x: Tensor, y: Tensor) -> torch.dtype:
    return compute_dtype(torch.promote_types(x.dtype, y.dtype))


def _chunks(index: Tensor, x: Tensor) -> Iterator[slice]:
    n, k = index.shape
    budget = (_CPU_CHUNK if x.device.type == "cpu" else _GPU_CHUNK) * (
        torch.get_num_threads() if x.device.type == "cpu" else 1
    )
    rows = max(1, budget // max(1, k * x.shape[1] * x.shape[2]))
    for start in range(0, n, rows):
        yield slice(start, start + rows)
