"""Terms of the loss that stand still or have nothing to compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from hrem_layers.loss import HREMLoss
from hrem_layers.losses import TripletLoss, distance_weighted_negative
from hrem_layers.tools.diagnosis.findings import Finding
from hrem_layers.tools.diagnosis.history import ENOUGH, Record, series
from hrem_layers.tools.diagnosis.observed import Observed, untouched

NEAR = 0.02
"""So near to the value of equal similarities, as a share of it, a term stands at it."""
NOBODY = 0.1
"""Share of the anchors."""


def look_at_terms(loss: HREMLoss, seen: Observed, history: Sequence[Record]) -> list[Finding]:
    with torch.no_grad(), untouched(loss, seen.image.device):
        return [*_nobody(loss, seen), *_at_chance(loss, seen, history)]


def _nobody(loss: HREMLoss, seen: Observed) -> list[Finding]:
    """Anchors without a positive, without a negative, or whose negatives the sampling all leaves out."""
    counts: dict[str, int] = {}
    similarity = seen.image @ seen.text.t()
    for s, positives in ((similarity, seen.positives), (similarity.t(), seen.positives.t())):
        no_positive, no_negative = ~positives.any(dim=1), positives.all(dim=1)
        found = _found(loss.pair_loss, s, positives)
        left_out = ~no_negative & ~found
        for why, which in (
            ("have no positive", no_positive),
            ("have only positives", no_negative),
            ("have negatives, all of which the sampling leaves out", left_out),
        ):
            counts[why] = counts.get(why, 0) + int(which.sum())
    anchors = sum(seen.positives.shape)
    if sum(counts.values()) <= NOBODY * anchors:
        return []
    said = "; ".join(f"{count} {why}" for why, count in counts.items() if count)
    remedy = (
        "Such an anchor adds nothing to the loss. No positive: image_ids, image_index or positives "
        "do not match the rows. "
        "Only positives: the batch holds one image over and over, or image_ids is constant. Left "
        "out: the negatives are "
        'farther than nonzero_cutoff; raise it (up to 2), or use "hardest" or "expected" negatives.'
    )
    return [Finding("anchors without candidates", f"Of {anchors} anchors {said}.", remedy)]


def _found(pair_loss: object, s: Tensor, positives: Tensor) -> Tensor:
    """(rows,) bool: for whom the pair loss has a negative."""
    some = ~positives.all(dim=1)
    if not isinstance(pair_loss, TripletLoss):
        return some
    if callable(pair_loss.negative_sampling):
        return pair_loss.negative_sampling(s, positives)[1].reshape(-1)
    if pair_loss.negative_sampling not in ("distance_weighted", "expected"):
        return some
    options = {name: getattr(pair_loss, name) for name in ("cutoff", "nonzero_cutoff", "weight_dim")}
    noise = torch.full_like(s[:, :1], 0.5)
    return distance_weighted_negative(s, positives, noise=noise, **options)[1].reshape(-1)


def equal_value(pair_loss: Callable[[Tensor, Tensor], Tensor], positives: Tensor, like: Tensor) -> float:
    """The loss if all similarities were equal: 2·margin per positive pair for one negative each, log N for InfoNCE."""
    equal = torch.full(positives.shape, 0.5, dtype=like.dtype, device=like.device)
    return float(pair_loss(equal, positives))


def _at_chance(loss: HREMLoss, seen: Observed, history: Sequence[Record]) -> list[Finding]:
    """A term at the value of equal similarities: now and the similarities are alike, or in all that was logged."""
    pairs = [("base", loss.pair_loss, seen.image, seen.text)]
    if seen.image_enhanced is not None and seen.text_enhanced is not None and loss.enhanced_weight:
        pair_loss = loss.enhanced_pair_loss or loss.pair_loss
        pairs.append(("enhanced", pair_loss, seen.image_enhanced, seen.text_enhanced))
    found = []
    for name, pair_loss, v, u in pairs:
        equal = equal_value(pair_loss, seen.positives, v)
        value = float(getattr(seen.terms, name))
        logged = series(history, name)[-ENOUGH:]
        stuck = len(logged) >= ENOUGH and all(abs(x - equal) <= NEAR * abs(equal) for x in logged)
        apart = float((v @ u.t()).std(correction=0))
        now = abs(value - equal) <= NEAR * abs(equal) and apart < _scale(pair_loss)
        if equal == 0 or not (now or stuck):
            continue
        hinge = isinstance(pair_loss, TripletLoss)
        what = _hinge_in_words(cast(TripletLoss, pair_loss), seen.positives) if hinge else "no pair told from another"
        text = f"{name} is {value:.4g}; with equal similarities it would be {equal:.4g} ({what}). "
        text += f"The similarities differ by {apart:.2g} (standard deviation)."
        if stuck:
            text += f" The last {len(logged)} entries of the history lie there too."
        found.append((name, hinge, text))
    if not found:
        return []
    title = "hinge at the margin" if all(hinge for _, hinge, _ in found) else "pair loss at chance"
    if any(name == "base" for name, _, _ in found):
        remedy = (
            "The encoders tell no pair from another: look at collapsed embeddings first, then at the "
            "order of images and "
            "texts (row i of both must belong together, or image_index say so) and at image_ids. In "
            "the first steps of a "
            'training it is normal. Else a lower learning rate, a warm-up of it, and "all" or '
            '"distance_weighted" negatives '
            'instead of "hardest".'
        )
    else:
        remedy = (
            "Only the relational term stands still: give loss.relation_parameters() a tenth of the "
            "learning rate, or use "
            "warmup_steps (10 to 30% of all steps)."
        )
    return [Finding(title, " ".join(text for _, _, text in found), remedy)]


def _scale(pair_loss: object) -> float:
    """Similarities that differ by less mean nothing to the loss: a share of the margin or the temperature."""
    margin, temperature = getattr(pair_loss, "margin", None), getattr(pair_loss, "temperature", None)
    for unit in (margin, temperature):
        if isinstance(unit, float) and unit > 0:
            return 0.1 * unit
    return 0.02


def _hinge_in_words(pair_loss: TripletLoss, positives: Tensor) -> str:
    pairs = int(positives.sum())
    if pair_loss.negative_sampling == "all":
        return f"the margin {pair_loss.margin:g} for every negative"
    if pair_loss.reduction == "mean":
        return f"2·margin = {2 * pair_loss.margin:g}"
    return f"2·N·margin = 2·{pairs}·{pair_loss.margin:g}"
