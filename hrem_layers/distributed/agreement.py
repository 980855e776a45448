"""What processes tell each other before any data: sizes and dtypes, and who has a problem.

A process that found its arguments wrong must not leave the others waiting in a collective: all raise together.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from hrem_layers._core.batch import Batch
from hrem_layers._core.checks import DTYPES
from hrem_layers.distributed.collectives import all_gather
from hrem_layers.distributed.shares import Shares

_FLOATS = ("image_embedding", "text_embedding", "image_fragments", "text_fragments")
_YES_NO = ("no", "yes").__getitem__


def _dtype_name(code: int) -> str:
    return str(DTYPES[code])


_TABLE = (
    "valid", "images", "texts", "image_width", "text_width", "embed_dim", "image_dim", "text_dim", *_FLOATS,
    "image_mask", "text_mask", "ids", "index", "image_grad", "text_grad",
    "image_embedding_grad", "text_embedding_grad", "grad_enabled", "training", "warming",
)  # fmt: skip

_MUST_AGREE: tuple[tuple[str, str, Callable[[int], str]], ...] = (
    ("ids", "image_ids must be given on all processes or on none", _YES_NO),
    ("index", "image_index must be given on all processes or on none", _YES_NO),
    ("embed_dim", "image_embedding must have the same D on all processes", str),
    ("image_dim", "image_fragments must have the same size F of a fragment on all processes", str),
    ("text_dim", "text_fragments must have the same size F of a fragment on all processes", str),
    *((name, f"{name} must have the same dtype on all processes", _dtype_name) for name in _FLOATS),
    ("image_grad", "image_fragments must require gradients on all processes or on none", _YES_NO),
    ("text_grad", "text_fragments must require gradients on all processes or on none", _YES_NO),
    *(
        (f"{side}_embedding_grad", f"{side}_embedding must require gradients on all processes or on none", _YES_NO)
        for side in ("image", "text")
    ),
    ("grad_enabled", "gradients must be enabled on all processes or on none", _YES_NO),
    ("training", "the loss must be in training mode on all processes or on none", _YES_NO),
    ("warming", "the loss must be in its warm-up on all processes or on none (load its state on all)", _YES_NO),
)  # what would otherwise hang, fail on one process alone, or make replicated work differ


def agree(batch: Batch, problem: Exception | None, *, training: bool, warming: bool, device: torch.device) -> Shares:
    """Exchanges some numbers per process.

    Args:
        batch: this process's part, checked.
        problem: what is wrong with it, if anything is; ``batch`` is then not looked at.
        training: whether the loss is in training mode here.
        warming: whether it is in its warm-up.
        device: where the numbers travel.

    Raises:
        TypeError, ValueError: on all processes if one has a problem or if they do not fit together.
    """
    row = [0] * len(_TABLE) if problem is not None else _describe_own(batch, training, warming)
    mine = torch.tensor(row, dtype=torch.long, device=device)
    everyone = mine.new_empty(dist.get_world_size() * len(row))
    all_gather(everyone, mine)
    table = [dict(zip(_TABLE, values, strict=True)) for values in everyone.view(-1, len(row)).tolist()]
    if not all(entry["valid"] for entry in table):
        _raise_everywhere(problem)
    for column, message, show in _MUST_AGREE:
        values = [entry[column] for entry in table]
        if len(set(values)) > 1:
            got = ", ".join(f"{show(value)} on rank {rank}" for rank, value in enumerate(values))
            raise ValueError(f"{message}, got {got}")
    for side in ("image", "text"):
        if not any(entry[f"{side}s"] for entry in table):
            raise ValueError(f"{side}_embedding must hold at least 1 item on some process, got an empty batch")
    image_width, text_width = (max(entry[f"{side}_width"] for entry in table) for side in ("image", "text"))
    return Shares(
        image_sizes=tuple(entry["images"] for entry in table),
        text_sizes=tuple(entry["texts"] for entry in table),
        rank=dist.get_rank(),
        image_width=image_width,
        text_width=text_width,
        image_masked=any(entry["image_mask"] or entry["image_width"] < image_width for entry in table),
        text_masked=any(entry["text_mask"] or entry["text_width"] < text_width for entry in table),
    )


def _describe_own(batch: Batch, training: bool, warming: bool) -> list[int]:
    r, c = batch.image_fragments, batch.text_fragments
    floats: tuple[Tensor, ...] = (batch.image_embedding, batch.text_embedding, r, c)
    return [
        1, r.shape[0], c.shape[0], r.shape[1], c.shape[1], batch.image_embedding.shape[1], r.shape[2], c.shape[2],
        *(DTYPES.index(x.dtype) for x in floats),
        *(x is not None for x in (batch.image_mask, batch.text_mask, batch.image_ids, batch.image_index)),
        r.requires_grad, c.requires_grad, batch.image_embedding.requires_grad, batch.text_embedding.requires_grad,
        torch.is_grad_enabled(), training, warming,
    ]  # fmt: skip


def _raise_everywhere(problem: Exception | None) -> None:
    """Own problem as it is; on the other processes, what was wrong and where."""
    reported: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reported, None if problem is None else str(problem))
    if problem is not None:
        raise problem
    rank, message = next((rank, text) for rank, text in enumerate(reported) if text is not None)
    raise ValueError(f"on rank {rank}: {message}")
