"""One global batch from the batches of all processes, with gradient (contract: equal to one process)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class Batch(NamedTuple):
    """What HREMLoss works on; the fields are its arguments."""

    image_embedding: Tensor
    text_embedding: Tensor
    image_fragments: Tensor
    text_fragments: Tensor
    image_mask: Tensor | None
    text_mask: Tensor | None
    image_ids: Tensor | None


def is_distributed() -> bool:
    """Whether there is a process group of more than one."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather_batch(batch: Batch) -> Batch:
    """The batches of all processes, concatenated in rank order.

    Widths are padded to the widest process's; numbers of items may differ. Gradients flow back to the process
    that owns a row, summed over all processes: each of them computes the whole loss, so that DDP's
    average over W processes, of gradients that were W times summed, is the gradient of one process.
    """
    n, r = batch.image_fragments.shape[:2]
    w = batch.text_fragments.shape[1]
    mine = torch.tensor([n, r, w, *(x is not None for x in batch[4:])], device=batch.image_embedding.device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    table = torch.stack(everyone).tolist()
    sizes = [row[0] for row in table]
    most_n, most_r, most_w = (max(row[place] for row in table) for place in range(3))
    if len({row[5] for row in table}) > 1:
        given = [rank for rank, row in enumerate(table) if row[5]]
        raise ValueError(f"image_ids must be given on all processes or on none, got them on ranks {given}")
    image_mask = _mask(batch.image_mask, batch.image_fragments, any(row[3] or row[1] < most_r for row in table))
    text_mask = _mask(batch.text_mask, batch.text_fragments, any(row[4] or row[2] < most_w for row in table))

    def gather(x: Tensor | None, width: int | None = None) -> Tensor | None:
        if x is None:
            return None
        if width is not None:
            x = _pad(x, 1, width)
        return _gather_rows(_pad(x, 0, most_n), sizes)

    return Batch(
        gather(batch.image_embedding),
        gather(batch.text_embedding),
        gather(batch.image_fragments, most_r),
        gather(batch.text_fragments, most_w),
        gather(image_mask, most_r),
        gather(text_mask, most_w),
        gather(batch.image_ids),
    )


def broadcast_first(x: Tensor) -> Tensor:
    """``x`` of the first process, on all."""
    x = x.contiguous()
    dist.broadcast(x, src=0)
    return x


def _mask(mask: Tensor | None, fragments: Tensor, needed: bool) -> Tensor | None:
    """A mask where any process has one or will be padded."""
    if mask is None and needed:
        return torch.ones(fragments.shape[:2], dtype=torch.bool, device=fragments.device)
    return mask


def _pad(x: Tensor, dim: int, size: int) -> Tensor:
    missing = size - x.shape[dim]
    return F.pad(x, [0, 0] * (x.dim() - 1 - dim) + [0, missing]) if missing else x


def _gather_rows(x: Tensor, sizes: list[int]) -> Tensor:
    parts = _AllGather.apply(x.contiguous()) if x.dtype.is_floating_point else _all_gather(x.contiguous())
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _all_gather(x: Tensor) -> tuple[Tensor, ...]:
    wire = x.to(torch.uint8) if x.dtype == torch.bool else x
    parts = [torch.empty_like(wire) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, wire)
    return tuple(part.to(x.dtype) for part in parts)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> tuple[Tensor, ...]:  # noqa: ANN001
        return _all_gather(x)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> Tensor:  # noqa: ANN001
        total = torch.stack(grads)
        dist.all_reduce(total)
        return total[dist.get_rank()]
