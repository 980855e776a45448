r"""One global batch from the batches of all processes; the result is that of one process (docs/distributed.md).

Why the gradients come out right. W processes, L the loss that one process would compute on the concatenated
batch. DDP and FSDP average: a parameter ends up with :math:`\frac{1}{W}\sum_p g_p`, which is to be dL/dθ, so
the gradients of the processes must add up to W · dL/dθ.

- *Replicated* work: after :func:`gather_replicated` every process computes the same from the same inputs with
  the same random numbers. A parameter used there gets dL/dθ on each process: together W · dL/dθ. A gathered
  row x continues backwards on its owner alone, so the owner must pass on W · dL/dx. It has dL/dx already, as
  have all, so the backward pass is "my slice, times W" and needs no communication.
- *Shared* work: process p aligns its own texts with all images, and the blocks are put together by
  ``gather_replicated``, which hands W · dL/d(block p) to p. Whatever made block p gets W times its part through
  block p. Parameters used in all blocks: the parts add up to W · dL/dθ. The texts of p are in no other block:
  W · dL/dc, complete. An image is in all blocks, so its owner must collect the parts: the backward pass of
  :func:`gather_shared` sums over the processes (a reduce-scatter), W · dL/dr. :func:`fetch` is the same where each
  process wants only some rows of the others, in an all-to-all there and back.
- *Shared* work on what was gathered for replicated work (the embeddings): :func:`share` lets its gradient pass the
  gather by, straight to the owner's rows: the sum over the processes, as if they had been gathered for it. Where only
  the gathered rows are at hand, :func:`take_own` divides by W, as the gather multiplies by W once more. A sum whose
  parts are shared, :func:`add_up`, is a gather of scalars for replicated work.
- The gradient of a streamed loss is known before its backward pass begins, but for a factor that all processes have
  alike: :func:`add_up_rows` adds up the parts at once, and no process keeps more than its own rows of the sum. It is
  what the backward pass of :func:`gather_shared` does; the gradient of each is the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def is_distributed() -> bool:
    """Whether there is a process group of more than one."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather_replicated(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Rows of all processes, ``sizes`` of each; what follows is the same on all. Backward: my slice, times W."""
    out: Tensor = _GatherReplicated.apply(x, sizes)  # type: ignore[no-untyped-call]
    return out


def gather_shared(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Rows of all processes; what follows differs between them. Backward: my slice of the sum over all."""
    out: Tensor = _GatherShared.apply(x, sizes)  # type: ignore[no-untyped-call]
    return out


class Route(NamedTuple):
    """Which rows go where in a :func:`fetch`."""

    rows: Tensor
    """My rows that others (and I) want, in the order of who wants them."""
    sent: list[int]
    """How many of them go to each process."""
    received: list[int]


def route(wanted: Tensor, sizes: tuple[int, ...]) -> Route:
    """``wanted``: numbers of rows of all processes, ascending, each one time."""
    count = torch.tensor([len(wanted)], device=wanted.device)
    counts = gather_constant(count, (1,) * len(sizes)).tolist()
    of_all = gather_constant(wanted, tuple(counts)).split(counts)
    borders = torch.tensor([sum(sizes[:i]) for i in range(len(sizes) + 1)], device=wanted.device)
    rank = dist.get_rank()
    parts = [ids[(ids >= borders[rank]) & (ids < borders[rank + 1])] - borders[rank] for ids in of_all]
    received = torch.searchsorted(wanted, borders).diff().tolist()
    return Route(torch.cat(parts), [len(part) for part in parts], received)


def fetch(x: Tensor, path: Route) -> Tensor:
    """The rows that I want of each process; what follows differs. Backward: the sum of what all make of mine."""
    out: Tensor = _Fetch.apply(x, path)  # type: ignore[no-untyped-call]
    return out


def share(own: Tensor, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """``x``, the rows of all, of which ``own`` are mine; what follows differs between the processes. Backward, to
    ``own``: my slice of the sum over all."""
    out: Tensor = _Share.apply(own, x.detach(), sizes)  # type: ignore[no-untyped-call]
    return out


def take_own(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """My rows of :func:`gather_replicated`, for work that differs. Backward: by W."""
    out: Tensor = _TakeOwn.apply(x, sizes)  # type: ignore[no-untyped-call]
    return out


def add_up(x: Tensor) -> Tensor:
    """The sum over the processes of a scalar. Backward: times W."""
    return gather_replicated(x.reshape(1), (1,) * dist.get_world_size()).sum()


def add_up_rows(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """My rows of the sum over the processes. Backward: the rows of all."""
    out: Tensor = _AddUpRows.apply(x, sizes)  # type: ignore[no-untyped-call]
    return out


def gather_constant(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Rows of all processes, without gradient; on the way every part is as long as the longest."""
    most = max(sizes)
    wire = pad(x.detach(), 0, most).contiguous()
    if x.dtype == torch.bool:
        wire = wire.to(torch.uint8)
    rows = wire.new_empty(len(sizes) * most, *x.shape[1:])
    all_gather(rows, wire)
    if min(sizes) < most:
        rows = torch.cat([part[:size] for part, size in zip(rows.split(most), sizes, strict=True)])
    return rows.to(x.dtype)


def own_rows(sizes: tuple[int, ...], rank: int) -> slice:
    """The rows of one process among those of all."""
    start = sum(sizes[:rank])
    return slice(start, start + sizes[rank])


def pad(x: Tensor, dim: int, size: int) -> Tensor:
    missing = size - x.shape[dim]
    return F.pad(x, [0, 0] * (x.dim() - 1 - dim) + [0, missing]) if missing else x


def all_gather(out: Tensor, x: Tensor) -> None:
    # torch 2.13 renamed the collective and deprecates the old name
    (dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor)(out, x)


def reduce_scatter(out: Tensor, x: Tensor) -> None:
    (dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor)(out, x)


class _GatherReplicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        ctx.sizes, ctx.rank = sizes, dist.get_rank()
        return gather_constant(x, sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[own_rows(ctx.sizes, ctx.rank)] * len(ctx.sizes), None


class _GatherShared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        ctx.sizes = sizes
        return gather_constant(x, sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return add_up_rows(grad, ctx.sizes), None


class _AddUpRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        ctx.sizes = sizes
        return _sum_of_mine(x, sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return gather_shared(grad, ctx.sizes), None


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, path: Route) -> Tensor:
        ctx.path, ctx.shape = path, x.shape
        out = x.new_empty(sum(path.received), *x.shape[1:])
        dist.all_to_all_single(out, x.detach()[path.rows], path.received, path.sent)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        path: Route = ctx.path
        back = grad.new_empty(sum(path.sent), *grad.shape[1:])
        dist.all_to_all_single(back, grad.contiguous(), path.sent, path.received)
        return grad.new_zeros(ctx.shape).index_add_(0, path.rows, back), None


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        ctx.sizes = sizes
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return add_up_rows(grad, ctx.sizes), None, None


class _TakeOwn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        ctx.sizes, ctx.shape = sizes, x.shape
        return x[own_rows(sizes, dist.get_rank())].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        out = grad.new_zeros(ctx.shape)
        out[own_rows(ctx.sizes, dist.get_rank())] = grad / len(ctx.sizes)
        return out, None


def _sum_of_mine(grad: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """My rows of the sum over all processes: a reduce-scatter, on whose way every part is as long as the longest."""
    most = max(sizes)
    # of equal parts no copy, which would be as large as what all processes have
    wire = grad if min(sizes) == most else torch.cat([pad(part, 0, most) for part in grad.split(sizes)])
    mine = wire.new_empty(most, *wire.shape[1:])
    reduce_scatter(mine, wire.contiguous())
    return mine[: sizes[dist.get_rank()]]


@contextmanager
def one_random_stream(device: torch.device) -> Iterator[None]:
    """Inside, all processes draw the numbers that rank 0 draws; afterwards each has its own stream again.

    This makes replicated work the same on all, dropout and sampled negatives included. Rank 0's generators
    move on as they would in one process.
    """
    streams = [torch] if device.type == "cpu" else [torch, torch.get_device_module(device)]
    arguments = [()] if device.type == "cpu" else [(), (device,)]
    states = [stream.get_rng_state(*given) for stream, given in zip(streams, arguments, strict=True)]
    wire = torch.cat(states).to(device)
    dist.broadcast(wire, src=0)
    keep: AbstractContextManager[None]
    if dist.get_rank() == 0:
        keep = nullcontext()
    elif device.type == "cpu":
        keep = torch.random.fork_rng(devices=[])
    else:
        keep = torch.random.fork_rng(devices=[device], device_type=device.type)
    with keep:
        parts = wire.cpu().split([len(state) for state in states])
        for stream, state, given in zip(streams, parts, arguments, strict=True):
            stream.set_rng_state(state.clone(), *given)
        yield
