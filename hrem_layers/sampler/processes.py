"""Process ranks: from the caller, from torch.distributed, and where a framework would share the batches out again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from hrem_layers._core.checks import check_int
from hrem_layers.sampler.arrays import Ints

Ranks = tuple[int, int]  # number of ranks, this one

_FRAMES = 12  # to look through: a DataLoader makes its iterator within 5


def check_ranks(num_replicas: object, rank: object) -> Ranks | None:
    """Ranks as far as they are given; None if they are to come from torch.distributed."""
    if num_replicas is None and rank is None:
        return None
    given = None if num_replicas is None else check_int("num_replicas", num_replicas, minimum=1)
    own = None if rank is None else check_int("rank", rank, minimum=0)
    group = (dist.get_world_size(), dist.get_rank()) if _in_group() else None
    if given is None:
        if group is None:
            raise ValueError(f"rank={rank} needs num_replicas, because torch.distributed is not initialised")
        given = group[0]
    if own is None:
        if given > 1 and (group is None or group[0] != given):
            processes = "is not initialised" if group is None else f"has {group[0]} processes"
            raise ValueError(f"num_replicas={given} needs rank, because torch.distributed {processes}")
        own = group[1] if group and given > 1 else 0
    if own >= given:
        raise ValueError(f"rank must be below num_replicas={given}, got {own}")
    return given, own


def ranks_of_the_group() -> Ranks | None:
    """From torch.distributed; None if it is not initialised."""
    if not _in_group():
        return None
    accelerate = sys.modules.get("accelerate.state")
    if dist.get_world_size() > 1 and accelerate is not None and accelerate.is_initialized():
        raise ValueError(
            "num_replicas=None is refused while an accelerate.Accelerator exists: its prepare() shares the batches of "
            "a sampler out among the processes, and so would the sampler. Give num_replicas=1 if the DataLoader goes "
            "through prepare(), num_replicas and rank if it does not"
        )
    return dist.get_world_size(), dist.get_rank()


def refuse_to_be_shared_out_twice(num_replicas: int) -> None:
    """Raise if accelerate is asking for the batches to share them out, and this sampler has done so already.

    accelerate's classes do not tell the sampler that they do; they are found among the callers.
    """
    module = sys.modules.get("accelerate.data_loader")
    if num_replicas == 1 or module is None:
        return
    sharing = (module.BatchSamplerShard, module.DataLoaderDispatcher)
    frame = sys._getframe(1)
    for _ in range(_FRAMES):
        if isinstance(frame.f_locals.get("self"), sharing):
            raise ValueError(
                f"the batches would be shared out twice: by the sampler, with num_replicas={num_replicas}, and by "
                "accelerate's prepare(). Give num_replicas=1 if the DataLoader goes through prepare()"
            )
        if frame.f_back is None:
            return
        frame = frame.f_back


def made_by_rank_0(make: Callable[[], Ints]) -> Ints:
    """Rank 0 makes it, all get it; its error, too, so that nobody waits for ever."""
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            box[0] = make()
        except Exception as error:
            box[0] = error
    dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], Exception):
        raise box[0]
    return box[0]  # type: ignore[no-any-return]


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized()
