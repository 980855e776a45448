"""Values that are NaN or infinite, in what is given, in the parameters and in the history."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from hrem_layers._core.batch import Batch
from hrem_layers.loss import HREMLoss
from hrem_layers.tools.diagnosis.findings import Finding
from hrem_layers.tools.diagnosis.history import Record


def look_at_values(loss: HREMLoss, batch: Batch, history: Sequence[Record]) -> list[Finding]:
    """One finding that names all places, or none. Padding may hold anything."""
    places = [*_in_batch(batch), *_in_loss(loss), *_in_history(history)]
    if not places:
        return []
    remedy = (
        "Look at the first place named: embeddings and fragments come from the encoders (float16 "
        "overflows at 65504, the "
        "square root of 0 and the mean over no words have no finite gradient or value); parameters "
        "and gradients became so "
        "in an earlier step: go back to a checkpoint, lower the learning rate, clip the gradient, and do not step "
        "when its norm is not finite."
    )
    return [Finding("non-finite values", f"NaN or infinity in {', '.join(places)}.", remedy)]


def _in_batch(batch: Batch) -> Iterator[str]:
    for name in ("image_embedding", "text_embedding"):
        yield from _rows(name, ~getattr(batch, name).isfinite().all(dim=1), "rows")
    for side in ("image", "text"):
        bad = ~getattr(batch, f"{side}_fragments").isfinite().all(dim=2)
        mask = getattr(batch, f"{side}_mask")
        yield from _rows(f"{side}_fragments", bad if mask is None else bad & mask, "real fragments")


def _rows(name: str, bad: Tensor, what: str) -> Iterator[str]:
    if count := int(bad.sum()):
        yield f"{name} ({count} of {bad.numel()} {what}, the first at {tuple(bad.nonzero()[0].tolist())})"


def _in_loss(loss: HREMLoss) -> Iterator[str]:
    for name, parameter in loss.named_parameters():
        if not bool(parameter.isfinite().all()):
            yield f"the parameter {name} of the loss"
        elif parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
            yield f"the gradient of {name} of the loss"


def _in_history(history: Sequence[Record]) -> Iterator[str]:
    for step, record in enumerate(history):
        for name, value in record.items():
            if not math.isfinite(value):
                yield f"history[{step}] ({name} = {value})"
                return
