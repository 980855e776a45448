"""L_reg against the pair terms: by their values and by what each does to the relevance that both pull at."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hrem_layers.loss import HREMLoss
from hrem_layers.relations import RelationGraph
from hrem_layers.tools.diagnosis.findings import Finding
from hrem_layers.tools.diagnosis.observed import Observed, untouched
from hrem_layers.tools.diagnosis.terms import equal_value

SHARE = 0.5
"""Of the total: from there on L_reg is what the loss curve shows."""
LEARNED = 0.1
"""Below this share of the value of equal similarities a pair loss has done its work."""
STRONG, WEAK = 3000.0, 0.02
"""Gradient of L_reg over that of the pair terms, on S across the modalities. 0.04 to 300 in a training with
the defaults."""
NOTHING = 0.01
"""L_reg over the pair terms: what is weak by its gradient must also be small."""

SCALE = (
    'L_reg is a mean over the nodes and a pair loss with reduction="sum" grows with the batch; with '
    'reduction="mean" their '
    "ratio does not depend on N."
)


def look_at_regularizer(loss: HREMLoss, seen: Observed) -> list[Finding]:
    if not loss.regularization_weight or not (loss.enhanced_weight or loss.cross_weight) or seen.graph is None:
        return []
    value = loss.regularization_weight * float(seen.terms.regularization)
    pairs = float(seen.terms.total) - value
    ratio = _gradient_ratio(loss, seen, seen.graph)
    text = (
        f"{loss.regularization_weight:g}·L_reg is {value:.3g}, the pair terms {pairs:.3g} at N = "
        f"{seen.positives.shape[0]}; "
        f"on S across the modalities its gradient is {ratio:.2g} times theirs."
    )
    with torch.no_grad(), untouched(loss, seen.image.device):
        equal = equal_value(loss.pair_loss, seen.positives, seen.image)
    learned = float(seen.terms.base) < LEARNED * equal  # then the pair terms are small for a good reason
    outweighs = value > SHARE * (value + max(pairs, 0.0)) or ratio > STRONG
    if outweighs and (not learned or value > equal):
        wish = loss.regularization_weight * min(0.1 * max(pairs, equal) / max(value, 1e-30), 1.0)
        wish = min(wish, loss.regularization_weight / ratio) if 0 < ratio < math.inf and not learned else wish
        remedy = f"Lower regularization_weight, to {wish:.1g} say, or relevance learns nothing from the pairs. {SCALE}"
        return [Finding("regulariser too large", text, remedy)]
    if ratio < WEAK and value < NOTHING * pairs:
        raised = "Raise regularization_weight"
        if ratio > 0:
            raised += f", to {loss.regularization_weight * 0.3 / ratio:.1g} say"
        remedy = f"Nothing holds relevance near the geometry of the embeddings. {raised}, or set it to 0. {SCALE}"
        return [Finding("regulariser too small", text, remedy)]
    return []


def _gradient_ratio(loss: HREMLoss, seen: Observed, graph: RelationGraph) -> float:
    """‖∂(w_r·L_reg)/∂S‖ / ‖∂(pair terms)/∂S‖ over both blocks across; with the interaction's gate open; 1 if
    the pair terms do not pull."""
    with torch.enable_grad(), untouched(loss, seen.image.device):
        relevance = graph.relevance.detach().clone().requires_grad_()
        leaf = graph._replace(relevance=relevance)
        v, u = seen.image, seen.text
        v_enhanced, u_enhanced = (torch.nn.functional.normalize(x.float(), dim=1) for x in loss.interaction(v, u, leaf))
        pairs = relevance.sum() * 0
        if loss.enhanced_weight:
            enhanced = (loss.enhanced_pair_loss or loss.pair_loss)(v_enhanced @ u_enhanced.t(), seen.positives)
            pairs = pairs + loss.enhanced_weight * enhanced
        if loss.cross_weight:
            cross = loss.cross_pair_loss or loss.pair_loss
            both = cross(v_enhanced @ u.to(v_enhanced.dtype).t(), seen.positives) + cross(
                v.to(v_enhanced.dtype) @ u_enhanced.t(), seen.positives
            )
            pairs = pairs + loss.cross_weight * both
        regularization = loss.graph.regularization(leaf, v, u) + relevance.sum() * 0  # type: ignore[operator]
        of_pairs, of_reg = (_across(torch.autograd.grad(x, relevance)[0], graph) for x in (pairs, regularization))
    if of_pairs == 0:
        return 1.0
    gate = getattr(loss.interaction, "learned_gate", None)  # as long as it is nearly closed the pairs pull little
    opened = 1.0 if gate is None else abs(float(gate.detach()))
    return loss.regularization_weight * of_reg / of_pairs * opened


def _across(grad: Tensor, graph: RelationGraph) -> float:
    blocks = graph._replace(relevance=grad.double())
    i2t, t2i = (float(blocks.block(name).relevance.square().sum()) for name in ("i2t", "t2i"))
    return math.sqrt(i2t + t2i)
