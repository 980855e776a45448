"""What NeighborBatchSampler is given: features or labels, captions of each image, ranks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor

from hrem_layers._core.checks import check_int
from hrem_layers.sampler.arrays import Ints
from hrem_layers.sampler.clustering import check_features

Ranks = tuple[int, int]  # number of ranks, this one


def check_source(image_features: object, cluster_ids: object) -> int:
    """The number of images; exactly one of the two must be given."""
    if (image_features is None) == (cluster_ids is None):
        raise ValueError(
            "exactly one of image_features and cluster_ids must be given, got "
            + ("neither" if image_features is None else "both")
        )
    if image_features is not None:
        return check_features(image_features)[0]
    return len(check_labels(cluster_ids))


def check_labels(cluster_ids: object) -> Ints:
    """A copy of the labels: (images,) integers of at least 0."""
    return _whole_numbers("cluster_ids", cluster_ids)


def check_counts(captions_per_image: object, images: int) -> Ints:
    """Captions of each image: (images,)."""
    if isinstance(captions_per_image, int):
        return np.full(images, check_int("captions_per_image", captions_per_image, minimum=1), np.int64)
    counts = _whole_numbers("captions_per_image", captions_per_image)
    if len(counts) != images:
        raise ValueError(f"captions_per_image must be one number or one for each of {images} images, got {len(counts)}")
    if not counts.any():
        raise ValueError("captions_per_image must count at least one caption, got only zeros")
    return counts


def _whole_numbers(name: str, values: object) -> Ints:
    wanted = f"{name} must be a list, array or tensor of shape (images,) of integers of at least 0"
    if isinstance(values, Tensor):
        if values.dtype.is_floating_point or values.dtype.is_complex:
            raise TypeError(f"{wanted}, got {values.dtype}")
        values = values.detach().cpu().numpy()
    elif not isinstance(values, (np.ndarray, list, tuple)):
        raise TypeError(f"{wanted}, got {type(values).__name__}")
    try:
        array = np.asarray(values)
    except ValueError as error:  # lists of different lengths
        raise ValueError(f"{wanted}, got nested lists") from error
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{wanted}, got shape {array.shape}")
    if array.dtype.kind not in "iu":
        raise TypeError(f"{wanted}, got {array.dtype}")
    if array.min() < 0 or array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{wanted} and below 2^63, got {array.min()} .. {array.max()}")
    return array.astype(np.int64)  # a copy, always


def check_ranks(num_replicas: object, rank: object) -> Ranks | None:
    """Ranks as far as they are given; None if they are to come from torch.distributed."""
    if num_replicas is None and rank is None:
        return None
    group = (dist.get_world_size(), dist.get_rank()) if _in_group() else None
    if num_replicas is None:
        if group is None:
            raise ValueError(f"rank={rank} needs num_replicas, because torch.distributed is not initialised")
        number = group[0]
    else:
        number = check_int("num_replicas", num_replicas, minimum=1)
    if rank is None:
        if number > 1 and (group is None or group[0] != number):
            processes = "is not initialised" if group is None else f"has {group[0]} processes"
            raise ValueError(f"num_replicas={number} needs rank, because torch.distributed {processes}")
        rank = group[1] if group and number > 1 else 0
    if check_int("rank", rank, minimum=0) >= number:
        raise ValueError(f"rank must be below num_replicas={number}, got {rank}")
    return number, rank  # type: ignore[return-value]


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
