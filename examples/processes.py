"""One process, or several started by torchrun: the few things in which they differ."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional
from torch import Tensor


def start(device: str) -> torch.device:
    """Joins the group that torchrun's environment describes, if any; the device of this process.

    A process that waits for a dead one gives up after a minute (gloo) instead of half an hour.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if planned() > 1:
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(seconds=60))
    return torch.device(device)


def planned() -> int:
    """How many processes torchrun starts; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    return rank() == 0


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def shard(n: int) -> range:
    """Which of n items this process handles: consecutive, sizes that differ by at most one."""
    return range(n * rank() // count(), n * (rank() + 1) // count())


def gather_shards(mine: Tensor, n: int) -> Tensor:
    """The rows of all processes' :func:`shard` of n items, in order, on every process."""
    if count() == 1:
        return mine
    most = -(-n // count())
    padded = torch.cat([mine, mine.new_zeros(most - len(mine), *mine.shape[1:])])
    parts = [torch.empty_like(padded) for _ in range(count())]
    dist.all_gather(parts, padded)
    sizes = [n * (r + 1) // count() - n * r // count() for r in range(count())]
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def from_main(text: str) -> str:
    """A string of the main process, on all."""
    if count() == 1:
        return text
    box = [text]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def wait() -> None:
    """Until all processes are here."""
    if count() > 1:
        dist.barrier()


def gather_objects(mine: object) -> list:
    """Small picklable objects of all processes, in rank order."""
    if count() == 1:
        return [mine]
    everyone: list = [None] * count()
    dist.all_gather_object(everyone, mine)
    return everyone


def gather_rows(x: Tensor) -> Tensor:
    """The rows of all processes in rank order, with gradient; every process has equally many."""
    if count() == 1:
        return x
    if not x.dtype.is_floating_point:
        parts = [torch.empty_like(x) for _ in range(count())]
        dist.all_gather(parts, x)
        return torch.cat(parts)
    return torch.cat(torch.distributed.nn.functional.all_gather(x))


def progress(items: Any, what: str, **options: Any) -> Any:
    """A bar on what takes longer than two seconds; only the main process shows it."""
    from tqdm.auto import tqdm

    return tqdm(items, desc=what, delay=2, leave=False, dynamic_ncols=True, disable=not is_main(), **options)
