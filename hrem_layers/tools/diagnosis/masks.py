"""Masks that say the opposite, or nothing. A mask alone cannot be wrong: what it hides and shows is compared."""

from __future__ import annotations

from torch import Tensor

from hrem_layers._core.batch import Batch
from hrem_layers.tools.diagnosis.findings import Finding

SHARE = 0.02
"""From this share of the fragments on, padding that counts as real is told of."""

INVERSE = (
    "Here True = real, as in the attention_mask of transformers. The key_padding_mask of "
    "torch.nn.MultiheadAttention is "
    "the inverse: give ~key_padding_mask. If the batch is padded on the left, this is right and nothing need be done."
)
PADDED = (
    "Give the mask that the encoder itself uses, True = real: torch.arange(W) < lengths.unsqueeze(1), or "
    "attention_mask.bool(). Padding that counts as real takes part in every maximum and mean of the alignment."
)


def look_at_masks(batch: Batch) -> list[Finding]:
    found = []
    for side in ("image", "text"):
        fragments, mask = getattr(batch, f"{side}_fragments"), getattr(batch, f"{side}_mask")
        found += _look(side, fragments.detach(), mask)
    return found


def _look(side: str, fragments: Tensor, mask: Tensor | None) -> list[Finding]:
    alike = padding_like(fragments)  # (N, R)
    real = mask.new_ones(mask.shape) if mask is not None else alike.new_ones(alike.shape)
    if mask is not None:
        inverted = _inverted(side, alike, mask)
        if inverted is not None:
            return [inverted]
        real = mask
    found = []
    empty = int((~real.any(dim=1)).sum())
    if empty:
        seen = f"{empty} of {real.shape[0]} rows of {side}_mask have no True at all."
        remedy = (
            "Such a sample aligns with nothing (p = 0, q = 0). An empty caption or an image without "
            "boxes should be left "
            f"out of the batch. Or the mask is inverted: {INVERSE}"
        )
        found.append(Finding("samples without fragments", seen, remedy))
    wrong = int((real & alike).sum())
    if wrong > SHARE * int(real.sum()):
        what = f"{side}_mask is None" if mask is None else f"{side}_mask"
        all_true = mask is None or bool(mask.all())
        seen = (
            f"{what}{'' if mask is None else ' is all True' if all_true else ' calls padding real'}, but {wrong} of "
            f"{int(real.sum())} fragments that count as real are zero, or one and the same vector up "
            "to the end of the row."
        )
        found.append(Finding("padding counts as real", seen, PADDED))
    return found


def _inverted(side: str, alike: Tensor, mask: Tensor) -> Finding | None:
    """By content, where padding shows by it; else by form: the real ones at the end, and no row is whole."""
    shown, hidden = int(mask.sum()), int((~mask).sum())
    if not shown or not hidden:
        return None
    padding_shown, padding_hidden = int((mask & alike).sum()) / shown, int((~mask & alike).sum()) / hidden
    by_content = padding_shown > 0.9 and padding_hidden < 0.1
    starts_hidden = bool((~mask[:, 0]).all()) and bool((mask[:, 1:] >= mask[:, :-1]).all())
    by_form = starts_hidden and padding_hidden < 0.1 and mask.shape[0] > 1
    if not (by_content or by_form):
        return None
    seen = f"{side}_mask hides {hidden} of {mask.numel()} fragments"
    if by_content:
        seen += f", which differ from one another, and shows {shown} that are zero or one and the same vector."
    else:
        seen += ": in each row the first ones, and in no row none."
    return Finding("inverted mask", seen, INVERSE)


def padding_like(fragments: Tensor) -> Tensor:
    """(N, R) bool: zero vectors, and two or more equal ones at an end of the row, as padding leaves them.

    What is not finite is like nothing.
    """
    zero = (fragments == 0).all(dim=2)
    alike = zero
    for order in (fragments, fragments.flip(1)):
        same = (order == order[:, :1]).all(dim=2).cumprod(dim=1).bool()  # equal to the first, up to here
        run = same & (same.sum(dim=1, keepdim=True) > 1)
        alike = alike | (run if order is fragments else run.flip(1))
    return alike
