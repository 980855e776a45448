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
  :func:`gather_shared` sums over the processes (a reduce-scatter), W · dL/dr.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hrem_layers._core.checks import check_bool_tensor, check_tensor, describe


class Batch(NamedTuple):
    """What HREMLoss works on; the fields are its arguments."""

    image_embedding: Tensor
    text_embedding: Tensor
    image_fragments: Tensor
    text_fragments: Tensor
    image_mask: Tensor | None
    text_mask: Tensor | None
    image_ids: Tensor | None


class Shares(NamedTuple):
    """How the global batch lies over the processes. A graph module whose ``forward`` has a keyword ``shares``
    gets this together with all embeddings and its own process's fragments, and puts its results together."""

    sizes: tuple[int, ...]
    """Items of each process, in rank order."""
    rank: int
    image_width: int
    """R of the widest process."""
    text_width: int
    image_masked: bool
    """Whether the global batch has an image mask: some process has one, or is padded."""
    text_masked: bool

    @property
    def own(self) -> slice:
        """The rows of this process in the global batch."""
        start = sum(self.sizes[: self.rank])
        return slice(start, start + self.sizes[self.rank])

    def gather_images(self, fragments: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Fragments (N, R, F) and mask of all processes from this one's, for work that differs between them."""
        return self._gather_fragments(fragments, mask, self.image_width, self.image_masked)

    def gather_texts(self, fragments: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self._gather_fragments(fragments, mask, self.text_width, self.text_masked)

    def gather_results(self, x: Tensor) -> Tensor:
        """Results (n, ...) for this process's items -> those of all (N, ...), in rank order."""
        return gather_replicated(x, self)

    def _gather_fragments(
        self, fragments: Tensor, mask: Tensor | None, width: int, masked: bool
    ) -> tuple[Tensor, Tensor | None]:
        rows = gather_shared(_pad(fragments, 1, width), self)
        return rows, _gather_mask(fragments, mask, width, masked, self)


def is_distributed() -> bool:
    """Whether there is a process group of more than one."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def check_own_batch(batch: Batch) -> None:
    """What the graph module would find wrong with this process's part, found before anyone waits for it."""
    n, device = batch.image_embedding.shape[0], batch.image_embedding.device
    for name, letter in (("image", "R"), ("text", "W")):
        fragments = check_tensor(
            f"{name}_fragments", getattr(batch, f"{name}_fragments"), (n, letter, "F"), device=device
        )
        if fragments.shape[1] < 1:
            raise ValueError(f"{name}_fragments must be at least 1 wide, got {describe(fragments)}")
        mask = getattr(batch, f"{name}_mask")
        if mask is not None:
            check_bool_tensor(f"{name}_mask", mask, tuple(fragments.shape[:2]), device=device)
    for name, x in zip(Batch._fields[:4], batch[:4], strict=True):
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {describe(x)}")


def agree(batch: Batch, problem: Exception | None, *, training: bool, device: torch.device) -> Shares:
    """Exchanges sizes and dtypes, some numbers a process, before any data.

    Args:
        batch: this process's part.
        problem: what is wrong with it, if anything is; ``batch`` is then not looked at.
        training: whether the loss is in training mode here.
        device: where the numbers travel.

    Raises:
        TypeError, ValueError: on all processes if one has a problem or if they do not fit together.
    """
    row = [0] * len(_TABLE) if problem is not None else _describe_own(batch, training)
    mine = torch.tensor(row, dtype=torch.long, device=device)
    everyone = mine.new_empty(dist.get_world_size() * len(row))
    _all_gather(everyone, mine)
    table = [dict(zip(_TABLE, values, strict=True)) for values in everyone.view(-1, len(row)).tolist()]
    if not all(entry["valid"] for entry in table):
        _raise_everywhere(problem)
    for column, message, show in _MUST_AGREE:
        values = [entry[column] for entry in table]
        if len(set(values)) > 1:
            got = ", ".join(f"{show(value)} on rank {rank}" for rank, value in enumerate(values))
            raise ValueError(f"{message}, got {got}")
    image_width, text_width = (max(entry[f"{side}_width"] for entry in table) for side in ("image", "text"))
    return Shares(
        sizes=tuple(entry["items"] for entry in table),
        rank=dist.get_rank(),
        image_width=image_width,
        text_width=text_width,
        image_masked=any(entry["image_mask"] or entry["image_width"] < image_width for entry in table),
        text_masked=any(entry["text_mask"] or entry["text_width"] < text_width for entry in table),
    )


def gather_batch(batch: Batch, shares: Shares, *, fragments: bool) -> Batch:
    """The batches of all processes, concatenated in rank order, for work that all of them replicate.

    ``fragments=False`` leaves fragments and masks as they are: this process's own.
    """
    v, u = batch.image_embedding, batch.text_embedding
    if v.dtype == u.dtype:  # one collective for both
        v, u = gather_replicated(torch.cat([v, u], dim=1), shares).split(v.shape[1], dim=1)
    else:
        v, u = gather_replicated(v, shares), gather_replicated(u, shares)
    ids = None if batch.image_ids is None else _collect(batch.image_ids.to(torch.long), shares)
    r, c, r_mask, c_mask = batch[2:6]
    if fragments:
        r_mask = _gather_mask(r, r_mask, shares.image_width, shares.image_masked, shares)
        c_mask = _gather_mask(c, c_mask, shares.text_width, shares.text_masked, shares)
        r = gather_replicated(_pad(r, 1, shares.image_width), shares)
        c = gather_replicated(_pad(c, 1, shares.text_width), shares)
    return Batch(v, u, r, c, r_mask, c_mask, ids)


def gather_replicated(x: Tensor, shares: Shares) -> Tensor:
    """Rows of all processes; what follows is the same on all. Backward: my slice, times W."""
    return _GatherReplicated.apply(x, shares)


def gather_shared(x: Tensor, shares: Shares) -> Tensor:
    """Rows of all processes; what follows differs between them. Backward: my slice of the sum over all."""
    return _GatherShared.apply(x, shares)


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


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_TABLE = (
    "valid", "items", "image_width", "text_width", "embed_dim", "image_dim", "text_dim",
    "image_embedding", "text_embedding", "image_fragments", "text_fragments",
    "image_mask", "text_mask", "ids", "image_grad", "text_grad", "grad_enabled", "training",
)  # fmt: skip
_YES_NO = ("no", "yes").__getitem__


def _dtype_name(code: int) -> str:
    return str(_DTYPES[code])


_MUST_AGREE = (
    ("ids", "image_ids must be given on all processes or on none", _YES_NO),
    ("embed_dim", "image_embedding must have the same D on all processes", str),
    ("image_dim", "image_fragments must have the same size F of a fragment on all processes", str),
    ("text_dim", "text_fragments must have the same size F of a fragment on all processes", str),
    *((name, f"{name} must have the same dtype on all processes", _dtype_name) for name in Batch._fields[:4]),
    ("image_grad", "image_fragments must require gradients on all processes or on none", _YES_NO),
    ("text_grad", "text_fragments must require gradients on all processes or on none", _YES_NO),
    ("grad_enabled", "gradients must be enabled on all processes or on none", _YES_NO),
    ("training", "the loss must be in training mode on all processes or on none", _YES_NO),
)  # what would otherwise hang, fail on one process alone, or make replicated work differ


def _describe_own(batch: Batch, training: bool) -> list[int]:
    r, c = batch.image_fragments, batch.text_fragments
    return [
        1, r.shape[0], r.shape[1], c.shape[1], batch.image_embedding.shape[1], r.shape[2], c.shape[2],
        *(_DTYPES.index(x.dtype) for x in batch[:4]),
        *(x is not None for x in batch[4:]),
        r.requires_grad, c.requires_grad, torch.is_grad_enabled(), training,
    ]  # fmt: skip


def _raise_everywhere(problem: Exception | None) -> None:
    """Own problem as it is; on the other processes, what was wrong and where."""
    said: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(said, None if problem is None else str(problem))
    if problem is not None:
        raise problem
    rank, message = next((rank, text) for rank, text in enumerate(said) if text is not None)
    raise ValueError(f"on rank {rank}: {message}")


def _gather_mask(fragments: Tensor, mask: Tensor | None, width: int, masked: bool, shares: Shares) -> Tensor | None:
    if not masked:
        return None
    if mask is None:
        mask = torch.ones(fragments.shape[:2], dtype=torch.bool, device=fragments.device)
    return _collect(_pad(mask, 1, width), shares)


def _pad(x: Tensor, dim: int, size: int) -> Tensor:
    missing = size - x.shape[dim]
    return F.pad(x, [0, 0] * (x.dim() - 1 - dim) + [0, missing]) if missing else x


def _collect(x: Tensor, shares: Shares) -> Tensor:
    """Rows of all processes, without gradient; on the way every part is as long as the longest."""
    most = max(shares.sizes)
    wire = _pad(x.detach(), 0, most).contiguous()
    if x.dtype == torch.bool:
        wire = wire.to(torch.uint8)
    rows = wire.new_empty(len(shares.sizes) * most, *x.shape[1:])
    _all_gather(rows, wire)
    if min(shares.sizes) < most:
        rows = torch.cat([part[:size] for part, size in zip(rows.split(most), shares.sizes, strict=True)])
    return rows.to(x.dtype)


def _all_gather(out: Tensor, x: Tensor) -> None:
    # torch 2.13 renamed the collective and deprecates the old name
    (dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor)(out, x)


def _reduce_scatter(out: Tensor, x: Tensor) -> None:
    (dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor)(out, x)


class _GatherReplicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, shares: Shares) -> Tensor:
        ctx.shares = shares
        return _collect(x, shares)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.shares.own] * len(ctx.shares.sizes), None


class _GatherShared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, shares: Shares) -> Tensor:
        ctx.shares = shares
        return _collect(x, shares)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        sizes, rank = ctx.shares.sizes, ctx.shares.rank
        most = max(sizes)
        wire = torch.cat([_pad(part, 0, most) for part in grad.split(sizes)])
        mine = wire.new_empty(most, *wire.shape[1:])
        _reduce_scatter(mine, wire.contiguous())
        return mine[: sizes[rank]], None
